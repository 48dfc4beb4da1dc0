"""Learned rounding: which way each weight is rounded, learned from what a whole block gives."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.arrays import MaskedArray
from lmcompress.ops.rounding import Fit, Rounding
from lmcompress.ops.second_order import solve, warn_of_damping
from lmcompress.transforms.combine import by_stage, path_key, require_dense, side_by_side
from lmcompress.types import Evidence, Params, State, Transform, WeightError

_NEAR = 0.45
"""How far from a code's middle a weight may stand that the start has rounded the other way."""


def learned_rounding(
  bits: int = 4,
  group_size: int = 64,
  symmetric: bool = False,
  steps: int = 200,
  learning_rate: float = 5e-3,
  start: Literal["gptq", "nearest"] = "gptq",
  error_propagation: float = 0.0,
  damping: float = 0.01,
  scale_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
) -> Transform:
  """Learns roundings by signed gradients through one block (Cheng et al. 2023, AutoRound, arXiv:2309.05516).

  An offset V of each weight, `code = clip(round(w / scale + V))`, is moved by `-rate * sign(gradient)` of the mean
  squared difference between what the block gives on today's inputs and what it gave before compression; the rate falls
  linearly to 0. Gradients pass rounding straight through. Codes are kept only where the block's error fell.

  Args:
    bits, group_size, symmetric, damping, scale_dtype, error_propagation: as in `gptq`.
    steps: of each block, each over one batch of calibration rows.
    learning_rate: the first step of V, in codes.
    start: the codes to begin with: `gptq`'s, or the nearest as in the paper.

  Raises:
    ValueError: an argument is out of range.
    WeightError (when planned): a group larger than the row, a quantized or masked weight, NaN or infinity.
  """
  if not 2 <= bits <= 8 or (group_size != -1 and group_size < 16):
    raise ValueError(f"learned_rounding(bits={bits}, group_size={group_size}): 2 to 8 bits, groups of 16 or more or -1")
  if steps < 1 or not 0 < learning_rate <= 1 or not 0 <= error_propagation <= 1 or not 0 < damping < 1:
    raise ValueError(
      f"learned_rounding(steps={steps}, learning_rate={learning_rate}, error_propagation={error_propagation}, "
      f"damping={damping}): steps at least 1, the others above 0 and at most 1 (error_propagation may be 0)"
    )
  if start not in ("gptq", "nearest"):
    raise ValueError(f"learned_rounding(start={start!r}): gptq or nearest")
  rounding = Rounding(bits, symmetric, scale_dtype=scale_dtype)
  needs = frozenset({"hessian", "block", "key"} | ({"reference_hessian"} if error_propagation else set()))

  def init(params: Params, selected: frozenset[str] | None = None) -> State:
    chosen = tree.default_selection(params) if selected is None else selected
    for path, leaf in tree.weights(params).items():
      if path in chosen:
        require_dense("learned_rounding", path, leaf)
        if isinstance(leaf, MaskedArray):
          raise WeightError(f"learned_rounding at {path}: the weight is masked; prune afterwards, or use gptq")
        if group_size > leaf.shape[-2]:
          raise WeightError(f"learned_rounding(group_size={group_size}) at {path}: a row has {leaf.shape[-2]} inputs")
    return ()

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    chosen = tree.default_selection(params) if evidence.selected is None else evidence.selected
    began: dict[str, tuple[jax.Array, Fit]] = {}
    asked = needs - {"block", "key"}
    for members, given in by_stage(params, chosen, evidence, asked, "learned_rounding"):
      began |= _begin(members, given, rounding, group_size, damping, error_propagation, start)
    if not began:
      return params, state
    if evidence.block is None or evidence.key is None:
      raise WeightError("learned_rounding runs whole blocks and draws batches at random: use compress, with a key")
    codes = _learn(params, began, evidence.block, path_key(evidence.key, min(began)), rounding, group_size, steps,
                   learning_rate)  # fmt: skip
    for path, c in codes.items():
      dtype = str(tree.get(params, path).dtype)
      params = tree.put(params, path, rounding.assemble(c, began[path][1], group_size, -2, dtype))
    return params, state

  return Transform(init, apply, needs=needs, scope="block", name="learned_rounding", inputs=True)


def _begin(
  weights: Mapping[str, Any], given: Mapping[str, Any], rounding: Rounding, group_size: int, damping: float,
  propagation: float, start: str,
) -> dict[str, tuple[jax.Array, Fit]]:  # fmt: skip
  """Real-valued codes whose rounding is the start, and the parameters, of linears that read one input."""
  solved = solve(
    jnp.concatenate(list(weights.values()), axis=1), given["hessian"], given.get("reference_hessian"), None,
    rounding=rounding, group_size=group_size, order="group", clip=True, sweeps=1 if start == "gptq" else 0,
    damping=damping, propagation=propagation, feedback=start == "gptq",
  )  # fmt: skip
  warn_of_damping("learned_rounding", next(iter(weights)), solved.damping, solved.first)
  return {
    path: (_real_codes(w.astype(jnp.float32), own, mine, rounding, group_size), mine)
    for path, w, (own, mine) in side_by_side(weights, (solved.written, solved.fit))
  }


def _wide(fit: Fit, inputs: int, group_size: int) -> Fit:
  """Parameters `[groups, out]` for each input."""
  group = inputs if group_size == -1 else group_size
  return jax.tree.map(lambda x: jnp.repeat(x, group, axis=0)[:inputs], fit._replace(stored=fit.scale))


def _real_codes(w: jax.Array, codes: jax.Array, fit: Fit, rounding: Rounding, group_size: int) -> jax.Array:
  """Codes moved towards the weight, by less than what would round them otherwise."""
  wide = _wide(fit, w.shape[0], group_size)
  value = rounding.decode(codes[None], jax.tree.map(lambda x: x, wide), 0)[0]
  scale = jnp.where(wide.scale == 0, 1.0, wide.scale)
  return codes.astype(jnp.float32) + jnp.clip((w - value) / scale, -_NEAR, _NEAR)


def _values(codes: jax.Array, fit: Fit, rounding: Rounding, group_size: int) -> jax.Array:
  """Values of real-valued codes, float32; gradients pass to them."""
  wide = _wide(fit, codes.shape[0], group_size)
  offset = wide.zero_point if wide.zero_point is not None else float(2 ** (rounding.bits - 1))
  return (codes - offset) * wide.scale


@functools.partial(jax.jit, static_argnames=("run", "rounding", "group_size"))
def _loss(
  offsets: dict[str, jax.Array], began: Any, rest: Params, carry: Any, target: Any, mask: jax.Array, *, run: Any,
  rounding: Rounding, group_size: int,
) -> jax.Array:  # fmt: skip
  """The mean squared difference of the block's outputs on real tokens, relative to the target's mean square."""
  levels, block = 2**rounding.bits - 1, rest
  for path, v in offsets.items():
    real, fit = began[path]
    soft = jnp.clip(real + v, 0, levels)
    hard = soft + jax.lax.stop_gradient(jnp.round(soft) - soft)
    block = tree.put(block, path, _values(hard, fit, rounding, group_size))
  lost = whole = jnp.float32(0)
  for a, b in zip(jax.tree.leaves(run(block, carry)), jax.tree.leaves(target), strict=True):
    if jnp.issubdtype(jnp.result_type(b), jnp.floating) and b.shape[: mask.ndim] == mask.shape and b.ndim > mask.ndim:
      keep = mask.reshape(*mask.shape, *(1,) * (b.ndim - mask.ndim))
      lost += jnp.sum(jnp.where(keep, (a - b).astype(jnp.float32) ** 2, 0.0))
      whole += jnp.sum(jnp.where(keep, b.astype(jnp.float32) ** 2, 0.0))
  return lost / jnp.maximum(whole, 1e-30)


@functools.partial(jax.jit, static_argnames=("run", "rounding", "group_size"), donate_argnames=("offsets",))
def _step(
  offsets: dict[str, jax.Array], rate: jax.Array, began: Any, rest: Params, carry: Any, target: Any, mask: jax.Array, *,
  run: Any, rounding: Rounding, group_size: int,
) -> dict[str, jax.Array]:  # fmt: skip
  slope = jax.grad(_loss)(
    offsets, began, rest, carry, target, mask, run=run, rounding=rounding, group_size=group_size
  )
  return jax.tree.map(lambda v, g: jnp.clip(v - rate * jnp.sign(g), -1.0, 1.0), offsets, slope)


def _learn(
  params: Params, began: Mapping[str, tuple[jax.Array, Fit]], block: Any, key: jax.Array, rounding: Rounding,
  group_size: int, steps: int, learning_rate: float,
) -> dict[str, jax.Array]:  # fmt: skip
  """The learned codes by path."""
  local = {path.removeprefix(f"{block.path}/"): value for path, value in began.items()}
  rest = tree.get(params, block.path)
  options: dict[str, Any] = {"run": block.run, "rounding": rounding, "group_size": group_size}
  batches = list(zip(block.inputs, block.outputs, block.masks, strict=True))
  zeros = {path: jnp.zeros_like(real) for path, (real, _) in local.items()}
  error = lambda v: float(np.mean([_loss(v, local, rest, *batch, **options) for batch in batches]))  # noqa: E731
  first, offsets = error(zeros), jax.tree.map(jnp.copy, zeros)
  order = np.asarray(jax.random.randint(key, (steps,), 0, len(batches)))
  for n, i in enumerate(order):
    rate = jnp.float32(learning_rate * (1 - n / steps))
    offsets = _step(offsets, rate, local, rest, *batches[i], **options)
  if not error(offsets) < first:
    offsets = zeros
  levels = 2**rounding.bits - 1
  code = lambda path, real: jnp.round(jnp.clip(real + offsets[path], 0, levels)).astype(jnp.uint8)  # noqa: E731
  return {f"{block.path}/{path}": code(path, real) for path, (real, _) in local.items()}
