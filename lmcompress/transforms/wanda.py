"""Wanda: removes the weights that matter least to the output, by their size times that of their input."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmcompress import tree
from lmcompress.arrays import MaskedArray, parts
from lmcompress.ops.masks import Target, target
from lmcompress.transforms.combine import leafwise, sequentially
from lmcompress.transforms.magnitude import pruned, require_prunable
from lmcompress.types import Transform, WeightError


def wanda(
  sparsity: float | None = None,
  pattern: str | None = None,
  scope: Literal["row", "weight"] = "row",
  sequential: Literal["stage", "block"] = "stage",
) -> Transform:
  """Removes the least `|w_ij| * ||x_i||` (Sun et al. 2023, arXiv:2306.11695); what stays is not changed.

  Args:
    sparsity: fraction removed, exact to the entry. Or:
    pattern: `"n:m"` keeps n of each m consecutive inputs, e.g. `"2:4"`.
    scope: over what a sparsity is met: the inputs of one output (the paper), or each `weight`.
    sequential: `stage` takes the statistics of each stage with the stages before it pruned, `block` those of all
      stages of a block before any of it is (the paper's code).

  Raises:
    ValueError: not exactly one of the two is given, or it is out of range.
    WeightError (when planned): inputs are no multiple of m, a quantized weight, NaN or infinity.
  """
  goal = target("wanda", sparsity, pattern)
  if scope not in ("row", "weight"):
    raise ValueError(f"wanda(scope={scope!r}): scopes are row and weight")

  def prune(w: Any, *, axis: int, second_moment: jax.Array) -> MaskedArray:
    values = parts.materialize(w)
    return pruned(w, keep_active(values, second_moment, goal, axis, scope == "row"), axis)

  check = functools.partial(check_target, "wanda", goal)
  return sequentially("wanda", leafwise(prune, name="wanda", check=check), sequential)


@functools.partial(jax.jit, static_argnames=("goal", "axis", "per_row"))
def keep_active(
  w: jax.Array, second_moment: jax.Array, goal: Target, axis: int = -2, per_row: bool = True
) -> jax.Array:
  """The mask that keeps the largest `|w| * sqrt(second_moment)` of `w: [in, out]`."""
  activity = jnp.sqrt(second_moment)
  return goal.keep(jnp.abs(w).astype(jnp.float32) * (activity[:, None] if axis == -2 else activity), axis, per_row)


def check_target(name: str, goal: Target, path: str, leaf: Any) -> None:
  """Raises unless the weight may be pruned and fits the pattern."""
  require_prunable(name, path, leaf)
  if misfit := goal.misfit(leaf.shape[tree.contraction_axis(path)]):
    raise WeightError(f"{name} at {path}: {misfit}, as the pattern needs")
