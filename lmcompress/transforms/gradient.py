"""Gradient pruning: removes the weights whose removal changes the loss least, by its derivatives."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmcompress import tree
from lmcompress.arrays import MaskedArray, parts
from lmcompress.ops import masks
from lmcompress.transforms.combine import evidence_for, leafwise
from lmcompress.transforms.magnitude import pruned
from lmcompress.transforms.wanda import check_target
from lmcompress.types import Evidence, Params, State, Transform

_NEEDS = {"snip": ("grads",), "fisher": ("fisher",), "taylor": ("grads", "fisher")}


def gradient(
  sparsity: float | None = None,
  pattern: str | None = None,
  score: Literal["snip", "fisher", "taylor"] = "fisher",
  scope: Literal["weight", "row", "global"] = "weight",
) -> Transform:
  """Removes weights by what the loss on calibration tokens says of them; a backward pass over the whole model.

  With g the gradient of the mean loss and F the mean over rows of the squared gradient of a row's loss, the score is
  `|g w|` for `snip` (Lee et al. 2019, arXiv:1810.02340), `F w**2 / 2` for `fisher` (Theis et al. 2018,
  arXiv:1801.05787), and `|F w**2 / 2 - g w|` for `taylor`, the loss to second order. A trained model's g is nearly 0,
  so `fisher` is the default.

  Args:
    sparsity: fraction removed, exact to the entry. Or:
    pattern: `"n:m"` keeps n of each m consecutive inputs.
    score: see above.
    scope: over what a sparsity is met: each `weight`, each `row`, or all selected weights together (`global`).

  Raises:
    ValueError: an argument is out of range.
    WeightError (when planned): inputs are no multiple of m, a quantized weight, NaN or infinity.
  """
  goal = masks.target("gradient", sparsity, pattern)
  if score not in _NEEDS or scope not in ("weight", "row", "global"):
    raise ValueError(
      f"gradient(score={score!r}, scope={scope!r}): scores are {', '.join(_NEEDS)}; scopes are weight, row, global"
    )
  if pattern is not None and scope != "weight":
    raise ValueError(f"gradient(pattern={pattern!r}, scope={scope!r}): a scope goes with sparsity")
  needs = frozenset(_NEEDS[score])
  check = functools.partial(check_target, "gradient", goal)

  def scored(path: str, w: Any, evidence: Evidence) -> jax.Array:
    given = {need: evidence_for(need, path, evidence, "gradient") for need in needs}
    return importance(parts.materialize(w), given.get("grads"), given.get("fisher"))

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    chosen = tree.default_selection(params) if evidence.selected is None else evidence.selected

    def prune(path: str, w: Any) -> MaskedArray:
      axis, s = tree.contraction_axis(path), scored(path, w, evidence)
      return pruned(w, goal.keep(s, axis, scope == "row"), axis)

    return tree.map_weights(prune, params, chosen), state

  def apply_global(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    chosen = tree.default_selection(params) if evidence.selected is None else evidence.selected
    found = {path: leaf for path, leaf in tree.weights(params).items() if path in chosen}
    scores = {path: scored(path, w, evidence) for path, w in found.items()}
    removed = round(sum(s.size for s in scores.values()) * (goal.sparsity or 0.0))
    counts = dict(zip(found, masks.split_removals(list(scores.values()), removed), strict=True))

    def prune(path: str, w: Any) -> MaskedArray:
      keep = ~masks.smallest(scores[path], counts[path])
      return pruned(w, keep, tree.contraction_axis(path))

    return tree.map_weights(prune, params, chosen), state

  init = leafwise(lambda w: w, check=check).init
  if scope == "global":
    return Transform(init, apply_global, needs, scope="model", name="gradient")
  return Transform(init, apply, needs, name="gradient")


@jax.jit
def importance(w: jax.Array, grads: jax.Array | None, fisher: jax.Array | None) -> jax.Array:
  """Non-negative scores of `w: [in, out]`: `|g w|`, `F w**2 / 2`, or with both `|F w**2 / 2 - g w|`."""
  w = w.astype(jnp.float32)
  first = 0.0 if grads is None else grads * w
  second = 0.0 if fisher is None else 0.5 * fisher * w * w
  return jnp.abs(second - first)
