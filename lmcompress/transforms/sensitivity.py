"""Sensitivity: how much of each weight may go under a budget for all, by what its removal costs."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.arrays import parts
from lmcompress.ops.masks import Target
from lmcompress.ops.second_order import output_energy
from lmcompress.transforms.alps import alps
from lmcompress.transforms.combine import evidence_for, leafwise, partition
from lmcompress.transforms.magnitude import magnitude, require_prunable
from lmcompress.transforms.mixed_precision import allocate, divergences
from lmcompress.transforms.sparse_gpt import sparse_gpt
from lmcompress.transforms.wanda import keep_active, wanda
from lmcompress.types import Evidence, Params, State, Transform, WeightError

_METHODS = {"magnitude": magnitude, "wanda": wanda, "sparse_gpt": sparse_gpt, "alps": alps}
_NEEDS = {
  "weight": frozenset(),
  "output": frozenset({"hessian", "second_moment"}),
  "kl": frozenset({"tokens"}),
  "outliers": frozenset({"second_moment"}),
}
_STEPS = (-0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3)
"""Sparsities that are tried, beside the one asked for."""


def sensitivity(
  sparsity: float = 0.5,
  measure: Literal["outliers", "output", "weight", "kl"] = "outliers",
  method: Literal["sparse_gpt", "wanda", "alps", "magnitude"] = "sparse_gpt",
  spread: float = 0.08,
  outlier: float = 5.0,
  tokens: int = 256,
) -> Transform:
  """Measures what each weight loses at several sparsities, allots the sparsity that loses least in all, and prunes.

  What a sparsity costs is measured with plain masks. `weight` is the article's sensitivity `||dw|| / ||w||`, squared;
  `output` the relative error of the outputs on calibration tokens; `kl` the divergence of the model's predictions with
  the linears of one stage pruned by magnitude. Those are allotted exactly, by dynamic programming. `outliers` asks for
  no such cost: blocks that have more weights with `|w| ||x||` far above the mean keep more (Yin et al. 2024, OWL,
  arXiv:2310.05175); it is the default because costs of single weights, added up, do not tell what the model loses.

  Args:
    sparsity: fraction removed of all selected weights together.
    measure: see above.
    method: what prunes each weight then.
    spread: for `outliers`, how far a block's sparsity lies from the mean at most.
    outlier: for `outliers`, how many times the mean is far.
    tokens: calibration tokens that the divergence is measured on.

  Raises:
    ValueError: an argument is out of range.
  """
  if not 0 <= sparsity <= 1 or measure not in _NEEDS or method not in _METHODS:
    raise ValueError(
      f"sensitivity(sparsity={sparsity}, measure={measure!r}, method={method!r}): a fraction, one of "
      f"{', '.join(_NEEDS)}, and one of {', '.join(_METHODS)}"
    )
  if not 0 <= spread < 1 or not outlier > 0 or tokens < 2:
    raise ValueError(f"sensitivity(spread={spread}, outlier={outlier}, tokens={tokens}): spread below 1, tokens from 2")
  levels = tuple(sorted({min(max(sparsity + step, 0.0), 0.99 if sparsity < 0.99 else 1.0) for step in _STEPS}))

  def init(params: Params, selected: frozenset[str] | None = None) -> State:
    leafwise(lambda w: w, check=functools.partial(require_prunable, "sensitivity")).init(params, selected)
    return {}

  def each(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    chosen = tree.default_selection(params) if evidence.selected is None else evidence.selected
    found = dict(state)
    for path, leaf in tree.weights(params).items():
      if path in chosen:
        given = {need: evidence_for(need, path, evidence, "sensitivity") for need in sorted(_NEEDS[measure])}
        w, axis = parts.materialize(leaf), tree.contraction_axis(path)
        if measure == "outliers":
          found[path] = (w.size, float(_outliers(w, given["second_moment"], outlier)))
        else:
          found[(path,)] = (w.size, [float(_lost(w, axis=axis, level=level, **given)) for level in levels])
    return params, found

  def by_kl(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    chosen = tree.default_selection(params) if evidence.selected is None else evidence.selected
    if evidence.tokens is None:
      raise WeightError("sensitivity(measure='kl') runs the model: pass calibration=tokens [n, length]")
    rows = max(1, -(-tokens // evidence.tokens.shape[1]))
    some = evidence.tokens[:rows, : max(2, tokens // rows)]

    def change(path: str, leaf: Any, level: float) -> jax.Array:
      return _plain(parts.materialize(leaf), Target(level), tree.contraction_axis(path))

    return params, divergences(evidence.structure, params, chosen, some, levels, change)

  def plan(state: Mapping[Any, tuple[int, Any]]) -> Transform:
    allotted = _by_outliers(state, sparsity, spread) if measure == "outliers" else _allotted(state, levels, sparsity)
    parts = {f"{s:.4f}": _METHODS[method](round(s, 4)) for s in set(allotted.values())}
    labels = {path: f"{s:.4f}" for path, s in allotted.items()}
    return partition(labels.get, parts)  # type: ignore[arg-type]

  needs = _NEEDS[measure]
  if measure == "kl":
    return Transform(init, by_kl, needs, scope="model", name="sensitivity", plan=plan, inputs=True)
  return Transform(init, each, needs, scope="weight" if needs else "model", name="sensitivity", plan=plan)


@functools.partial(jax.jit, static_argnames=("goal", "axis"))
def _plain(w: jax.Array, goal: Target, axis: int) -> jax.Array:
  return jnp.where(goal.keep(jnp.abs(w), axis), w, 0)


@functools.partial(jax.jit, static_argnames=("axis", "level"))
def _lost(
  w: jax.Array,
  *,
  axis: int,
  level: float,
  hessian: jax.Array | None = None,
  second_moment: jax.Array | None = None,
) -> jax.Array:
  """`||dw||**2 / ||w||**2` by magnitude; with a Hessian `||X dw||**2 / ||X w||**2` by Wanda."""
  w = w.astype(jnp.float32)
  if hessian is None or second_moment is None:
    error = w - _plain(w, Target(level), axis)
    return jnp.sum(error * error) / jnp.maximum(jnp.sum(w * w), 1e-30)
  error = jnp.where(keep_active(w, second_moment, Target(level), axis), 0.0, w)
  return output_energy(error, hessian) / jnp.maximum(output_energy(w, hessian), 1e-30)


@functools.partial(jax.jit, static_argnames=("times",))
def _outliers(w: jax.Array, second_moment: jax.Array, times: float) -> jax.Array:
  """The fraction of `|w| ||x||` above so many times its mean."""
  score = jnp.abs(w.astype(jnp.float32)) * jnp.sqrt(second_moment)[:, None]
  return jnp.mean(score > times * jnp.mean(score))


def _allotted(
  state: Mapping[tuple[str, ...], tuple[int, Sequence[float]]], levels: Sequence[float], sparsity: float
) -> dict[str, float]:
  groups = list(state)
  sizes = [[state[g][0] - round(state[g][0] * level) for level in levels] for g in groups]
  budget = math.ceil((1 - sparsity) * sum(state[g][0] for g in groups))
  choice = allocate([state[g][1] for g in groups], sizes, budget)
  return {path: levels[i] for g, i in zip(groups, choice, strict=True) for path in g}


def _by_outliers(state: Mapping[str, tuple[int, float]], sparsity: float, spread: float) -> dict[str, float]:
  """The same for all weights of a block: less than the mean where there are more outliers, within the spread."""
  blocks: dict[str, list[str]] = {}
  for path in state:
    blocks.setdefault("/".join(path.split("/")[:2]), []).append(path)
  sizes = np.array([sum(state[p][0] for p in paths) for paths in blocks.values()], float)
  ratio = np.array([np.average([state[p][1] for p in paths], weights=[state[p][0] for p in paths])
                    for paths in blocks.values()])  # fmt: skip
  reach = ratio.max() - ratio.min()
  wanted = sparsity - spread * (2 * (ratio - ratio.min()) / reach - 1) if reach > 0 else np.full(len(ratio), sparsity)
  for _ in range(50):  # the mean stays what was asked for, whatever is cut off at 0 and 1
    wanted = np.clip(wanted + sparsity - np.average(wanted, weights=sizes), 0.0, 1.0)
  return {path: float(s) for s, paths in zip(wanted, blocks.values(), strict=True) for path in paths}
