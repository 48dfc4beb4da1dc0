"""Magnitude pruning: removes the weights closest to zero."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmcompress import tree
from lmcompress.arrays import ClusteredArray, MaskedArray, QuantizedArray, SharedRef, masked, parts
from lmcompress.ops import masks
from lmcompress.transforms.combine import leafwise, require_dense
from lmcompress.types import CompressedArray, Evidence, Params, State, Transform, WeightError

Scope = Literal["weight", "row", "global"]


def magnitude(
  sparsity: float | Callable[[jax.Array], jax.Array] | None = None,
  threshold: float | None = None,
  pattern: str | None = None,
  scope: Scope = "weight",
) -> Transform:
  """Removes the smallest weights by absolute value (Han et al. 2015, arXiv:1506.02626).

  Give exactly one of `sparsity`, `threshold` and `pattern`. The weight becomes a `MaskedArray`; removed
  values stay under the mask, so that a schedule may bring them back. Codes of a quantized or clustered weight are
  ranked by what they stand for, and stay.

  Args:
    sparsity: fraction removed, exact to the entry, ties broken by position; or a function of the training
      step, which makes a `"step"` transform that updates the masks of `MaskedArray` weights.
    threshold: removes what is smaller than this, the article's loop `if abs(weight) < alpha: weight = 0`.
    pattern: `"n:m"` keeps the n largest of each m consecutive inputs, e.g. `"2:4"`.
    scope: over what a sparsity is met: each `weight`, each `row` (the inputs of one output), or `global`
      (all selected weights together).

  Raises:
    ValueError: not exactly one of the three is given, or one is out of range.
    WeightError (when planned): inputs are no multiple of m, a weight without values of its own, NaN or infinity.
  """
  given = [
    name
    for name, value in (("sparsity", sparsity), ("threshold", threshold), ("pattern", pattern))
    if value is not None
  ]
  if len(given) != 1:
    raise ValueError(f"magnitude: give exactly one of sparsity, threshold and pattern; found {given or 'none'}")
  if scope not in ("weight", "row", "global"):
    raise ValueError(f"magnitude(scope={scope!r}): scopes are weight, row, global")
  if isinstance(sparsity, (int, float)) and not 0 <= sparsity <= 1:
    raise ValueError(f"magnitude(sparsity={sparsity}): a fraction from 0 to 1")
  if threshold is not None and not threshold >= 0:
    raise ValueError(f"magnitude(threshold={threshold}): a threshold is not negative")
  if scope != "weight" and sparsity is None:
    raise ValueError(f"magnitude(scope={scope!r}) says over what a sparsity is met; give sparsity, not {given[0]}")
  n, m = masks.parse_pattern("magnitude", pattern) if pattern is not None else (0, 0)

  if callable(sparsity):
    if scope == "global":
      raise ValueError("magnitude(sparsity=<schedule>, scope='global'): schedules are per weight or per row")
    return _scheduled(sparsity, scope)
  if scope == "global" and sparsity is not None:
    return _global(sparsity)

  def check(path: str, leaf: Any) -> None:
    require_prunable("magnitude", path, leaf)
    inputs = leaf.shape[tree.contraction_axis(path)]
    if m and inputs % m:
      raise WeightError(f"magnitude(pattern={pattern!r}) at {path}: {inputs} inputs are not a multiple of {m}")

  def prune(w: Any, *, axis: int) -> MaskedArray:
    values = parts.materialize(w)
    if pattern:
      keep = n_of_m(values, n=n, m=m, axis=axis)
    elif threshold is not None:
      keep = jnp.abs(values) >= threshold
    else:
      keep = keep_largest(values, _count(values, sparsity, scope, axis), axis=axis if scope == "row" else None)
    return pruned(w, keep, axis)

  return leafwise(prune, name="magnitude", check=check)


@functools.partial(jax.jit, static_argnames=("axis",))
def keep_largest(values: jax.Array, removed: Any, axis: int | None = None) -> jax.Array:
  """The mask that drops the `removed` smallest by magnitude, in all or along `axis`; jits, `removed` may be traced."""
  return ~masks.smallest(jnp.abs(values), removed, axis)


@functools.partial(jax.jit, static_argnames=("n", "m", "axis"))
def n_of_m(values: jax.Array, *, n: int, m: int, axis: int) -> jax.Array:
  """The mask that keeps the `n` largest by magnitude of each `m` consecutive inputs."""
  return masks.n_of_m(jnp.abs(values), n, m, axis)


def pruned(w: Any, keep: jax.Array, axis: int) -> MaskedArray:
  """The weight under a mask; values that are compressed stay so, and what a mask over them removed stays removed."""
  inner = w.values if isinstance(w, MaskedArray) else w
  if not isinstance(inner, CompressedArray):
    return masked(parts.materialize(w), keep, axis)
  return masked(inner, keep & (w.mask.unpack() != 0) if isinstance(w, MaskedArray) else keep, axis)


def require_prunable(name: str, path: str, leaf: Any) -> None:
  """Raises unless the weight holds values that a mask can lie over: dense, codes on a grid or in a codebook."""
  inner = leaf.values if isinstance(leaf, MaskedArray) else leaf
  if isinstance(inner, ClusteredArray) and isinstance(inner.codebook, SharedRef):
    raise WeightError(f"{name} at {path}: its values are shared with other weights; prune before sharing them")
  if not isinstance(inner, (QuantizedArray, ClusteredArray)):
    require_dense(name, path, leaf)


def _count(values: jax.Array, sparsity: Any, scope: str, axis: int) -> Any:
  extent = values.shape[axis] if scope == "row" else values.size
  return round(extent * sparsity) if isinstance(sparsity, (int, float)) else jnp.round(extent * sparsity).astype(int)


def _scheduled(sparsity: Callable[[jax.Array], jax.Array], scope: str) -> Transform:
  def check(path: str, leaf: Any) -> None:
    if not isinstance(leaf, MaskedArray) or isinstance(leaf.values, CompressedArray):
      raise WeightError(
        f"magnitude(sparsity=<schedule>) at {path}: a schedule updates masks and keeps the tree's structure; "
        "make the weight a MaskedArray first, with magnitude(sparsity=0.0)"
      )

  def update(w: MaskedArray, *, axis: int, step: Any) -> MaskedArray:
    removed = _count(w.values, sparsity(jnp.asarray(step)), scope, axis)
    return masked(w.values, keep_largest(w.values, removed, axis=axis if scope == "row" else None), axis)

  return leafwise(update, name="magnitude", phase="step", check=check)


def _global(sparsity: float) -> Transform:
  """One ranking over all selected weights; planned on the whole tree, since a block cannot know it."""

  def init(params: Params, selected: frozenset[str] | None = None) -> State:
    chosen = tree.default_selection(params) if selected is None else selected
    found = {path: leaf for path, leaf in tree.weights(params).items() if path in chosen}
    for path, leaf in found.items():
      require_prunable("magnitude", path, leaf)
    scores = [jnp.abs(parts.materialize(leaf)) for leaf in found.values()]
    removed = round(sum(s.size for s in scores) * sparsity)
    return dict(zip(found, masks.split_removals(scores, removed), strict=True))

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    def prune(path: str, w: Any) -> MaskedArray:
      values = parts.materialize(w)
      return pruned(w, keep_largest(values, state[path]), tree.contraction_axis(path))

    return tree.map_weights(prune, params, state), state

  return Transform(init, apply, scope="model", name="magnitude")
