"""Mixed precision: how many bits each weight gets under a budget, by what its output would lose."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.arrays import fetch
from lmcompress.ops.divergence import divergence
from lmcompress.ops.rounding import Rounding
from lmcompress.ops.second_order import output_energy
from lmcompress.transforms.awq import round_clipped
from lmcompress.transforms.combine import by_stage, chain, evidence_for, partition, require_dense
from lmcompress.transforms.gptq import gptq
from lmcompress.transforms.round_to_nearest import quantize_matrix, round_to_nearest
from lmcompress.types import Evidence, Params, State, Transform, WeightError

_STATES = 1 << 22
"""Most sizes that the allocation tells apart."""


def mixed_precision(
  bits: float = 3.5,
  candidates: Sequence[int] = (2, 3, 4, 5, 6, 8),
  group_size: int = 64,
  symmetric: bool = False,
  sensitivity: Literal["output", "fisher", "kl"] = "output",
  tokens: int = 256,
  tables: bool = False,
  sweeps: int = 1,
  error_propagation: float = 0.0,
) -> Transform:
  """Gives each weight the bits that lose least in all under a budget, and quantizes by `gptq` (Dong et al. 2019, HAWQ).

  What a width costs is measured with plain rounding. Linears that read one input share a width. The allocation is
  exact: a multiple-choice knapsack by dynamic programming.

  Args:
    bits: average over the selected weights, scales and zero points counted.
    candidates: widths to choose from.
    group_size, symmetric, sweeps, error_propagation: as in `gptq`.
    sensitivity: `output` is the relative output error `||X (W - Q(W))||**2 / ||X W||**2`, which the Hessian of
      calibration tokens tells; `fisher` is in proportion to what the loss of the model rises by to second order,
      `sum F (W - Q(W))**2 / 2` with the empirical Fisher's diagonal F over rows, which takes one pass of gradients;
      `kl` is the divergence of the model's predictions with that weight alone rounded, which takes a run of the model
      for each stage and width. The last two weigh tables too.
    tokens: calibration tokens on which the divergence is measured.
    tables: also chooses for the embedding and the head, which are rounded to nearest; for `fisher` and `kl`.

  Raises:
    ValueError: fewer bits than the narrowest candidate takes.
  """
  widths = sorted(set(candidates))
  if not widths or widths[0] < 2 or widths[-1] > 8:
    raise ValueError(f"mixed_precision(candidates={list(candidates)}): widths are 2 to 8")
  if sensitivity not in ("output", "fisher", "kl") or tokens < 2 or (tables and sensitivity == "output"):
    raise ValueError(
      f"mixed_precision(sensitivity={sensitivity!r}, tokens={tokens}, tables={tables}): sensitivity is output, fisher "
      "or kl, tokens at least 2, and tables go with fisher or kl"
    )
  quantizers = {b: gptq(b, group_size, symmetric, sweeps=sweeps, error_propagation=error_propagation) for b in widths}
  stored = {b: _stored_bits(b, group_size, symmetric) for b in widths}
  if bits < stored[widths[0]]:
    raise ValueError(
      f"mixed_precision(bits={bits}): the narrowest candidate takes {stored[widths[0]]:.4g} bits, scales counted; "
      "allow as many, or a narrower one"
    )

  def _chosen(params: Params, selected: frozenset[str] | None) -> frozenset[str]:
    chosen = tree.default_selection(params) if selected is None else selected
    return chosen | {path for path in tree.weights(params) if tables and path.endswith("table")}

  def init(params: Params, selected: frozenset[str] | None = None) -> State:
    for path, leaf in tree.weights(params).items():
      if path in _chosen(params, selected):
        require_dense("mixed_precision", path, fetch(leaf))
    return {}

  def by_output(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    chosen = tree.default_selection(params) if evidence.selected is None else evidence.selected
    found = dict(state)
    for members, given in by_stage(params, chosen, evidence, frozenset({"hessian"}), "mixed_precision"):
      w = jnp.concatenate(list(members.values()), axis=1)
      losses = [float(_loss(w, given["hessian"], Rounding(b, symmetric), group_size)) for b in widths]
      found[tuple(members)] = (w.size, losses)
    return params, found

  def rounded(path: str, w: Any, bits: int) -> jax.Array:
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "clip": "mse"}
    return quantize_matrix(w, axis=tree.contraction_axis(path), **options).materialize()

  def by_fisher(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    found = {}
    for _, paths in _groups(evidence.structure, params, _chosen(params, evidence.selected)):
      weights = {path: tree.get(params, path) for path in paths}
      given = {path: evidence_for("fisher", path, evidence, "mixed_precision") for path in paths}
      losses = [sum(float(_rise(w, rounded(p, w, b), given[p])) for p, w in weights.items()) for b in widths]
      found[tuple(paths)] = (sum(w.size for w in weights.values()), losses)
    return params, found

  def by_kl(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    chosen = _chosen(params, evidence.selected)
    if evidence.tokens is None:
      raise WeightError("mixed_precision(sensitivity='kl') runs the model: pass calibration=tokens [n, length]")
    rows = max(1, -(-tokens // evidence.tokens.shape[1]))
    some = evidence.tokens[:rows, : max(2, tokens // rows)]
    return params, divergences(evidence.structure, params, chosen, some, widths, rounded)

  def plan(state: Mapping[tuple[str, ...], tuple[int, list[float]]]) -> Transform:
    groups = list(state)
    sizes = [[round(state[g][0] * stored[b]) for b in widths] for g in groups]
    budget = math.floor(bits * sum(state[g][0] for g in groups))
    choice = allocate([state[g][1] for g in groups], sizes, budget)
    labels = {path: widths[i] for g, i in zip(groups, choice, strict=True) for path in g}
    tables = {path for path in labels if path.endswith("table")}
    linear = {path: b for path, b in labels.items() if path not in tables}
    solved = partition(linear.get, {b: quantizers[b] for b in sorted(set(linear.values()))})  # type: ignore[arg-type]
    if not tables:
      return solved
    rounded = {b: round_to_nearest(b, group_size, symmetric, clip="mse") for b in {labels[path] for path in tables}}
    whole = partition(lambda path: labels[path] if path in tables else None, rounded)  # type: ignore[arg-type]
    return chain(solved, whole) if linear else whole

  if sensitivity == "fisher":
    return Transform(init, by_fisher, frozenset({"fisher"}), scope="model", name="mixed_precision", plan=plan)
  if sensitivity == "kl":
    return Transform(init, by_kl, frozenset({"tokens"}), scope="model", name="mixed_precision", plan=plan, inputs=True)
  return Transform(init, by_output, needs=frozenset({"hessian"}), name="mixed_precision", plan=plan)


def divergences(
  model: Any,
  params: Params,
  chosen: frozenset[str],
  tokens: Any,
  choices: Sequence[Any],
  change: Callable[[str, Any, Any], jax.Array],
) -> dict[tuple[str, ...], tuple[int, list[float]]]:
  """What each group of weights costs at each choice: its size, and the KL of the predictions with it alone changed.

  Groups are the linears of a stage, and each table. Blocks before a group's are run once.

  Args:
    tokens: `[n, length]`.
    change: `(path, weight, choice) -> dense weight`.
  """
  blocks = model.blocks(params)
  carries = [model.start(params, {"tokens": tokens, "attention_mask": None})]
  for block in blocks:
    carries.append(model.run(block, params, carries[-1])[0])
  want = jax.nn.log_softmax(model.finish(params, carries[-1]), axis=-1)
  found = {}
  for n, paths in _groups(model, params, chosen):
    losses, size = [], sum(tree.get(params, path).size for path in paths)
    for choice in choices:
      changed = params
      for path in paths:
        changed = tree.put(changed, path, change(path, tree.get(params, path), choice))
      table = paths[0].endswith("table")
      carry = model.start(changed, {"tokens": tokens, "attention_mask": None}) if table else carries[n]
      for block in blocks[n:]:
        carry = model.run(block, changed, carry)[0]
      losses.append(float(divergence(want, model.finish(changed, carry))))
    found[tuple(paths)] = (size, losses)
  return found


def _groups(model: Any, params: Params, chosen: frozenset[str]) -> list[tuple[int, list[str]]]:
  """What is decided as one, with the number of its block: the linears of a stage, and each other weight by itself."""
  groups = [
    (n, [path for linear in stage.linears if (path := f"{block.path}/{linear}/kernel") in chosen])
    for n, block in enumerate(model.blocks(params))
    for stage in block.stages
  ]
  inside = {path for _, paths in groups for path in paths}
  return [group for group in groups if group[1]] + [(0, [path]) for path in sorted(chosen - inside)]


def _stored_bits(bits: int, group_size: int, symmetric: bool) -> float:
  """Bits of an entry with its share of a 16-bit scale and a zero point; rows count as groups of their own length."""
  return bits + (0 if group_size == -1 else (16 + (0 if symmetric else bits)) / group_size)


@functools.partial(jax.jit, static_argnames=("rounding", "group_size"))
def _loss(w: jax.Array, hessian: jax.Array, rounding: Rounding, group_size: int) -> jax.Array:
  q = round_clipped(w, hessian, rounding=rounding, group_size=group_size, clip=False)
  error, w = q.materialize() - w, w.astype(jnp.float32)
  return output_energy(error, hessian) / jnp.maximum(output_energy(w, hessian), 1e-30)


@jax.jit
def _rise(w: jax.Array, rounded: jax.Array, fisher: jax.Array) -> jax.Array:
  return 0.5 * jnp.sum(fisher * jnp.square(w.astype(jnp.float32) - rounded))


def allocate(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
  """The choice for each item with the least total loss whose sizes stay within a budget, exactly.

  Dynamic programming over sizes in units of their greatest common divisor (Kellerer et al. 2004, Knapsack Problems,
  11.5); above four million units, sizes are rounded up to coarser ones, so that the budget still holds.

  Args:
    losses, sizes: `[items][choices]`; sizes are whole numbers.

  Raises:
    ValueError: even the smallest choices are larger than the budget.
  """
  least = sum(min(row) for row in sizes)
  if least > budget:
    raise ValueError(f"allocate(budget={budget}): the smallest choices take {least}")
  unit = max(math.gcd(*(size for row in sizes for size in row)), -(-budget // _STATES))
  room = budget // unit
  best, taken = np.zeros(room + 1), []
  for row, costs in zip(sizes, losses, strict=True):
    options = np.full((len(row), room + 1), np.inf)
    for i, (size, loss) in enumerate(zip(row, costs, strict=True)):
      steps = -(-size // unit)
      if steps <= room:
        options[i, steps:] = best[: room + 1 - steps] + loss
    taken.append(options.argmin(axis=0))
    best = options.min(axis=0)
  choice, left = [], room
  for row, table in zip(reversed(sizes), reversed(taken), strict=True):
    i = int(table[left])
    choice.append(i)
    left -= -(-row[i] // unit)
  return choice[::-1]
