"""freeze: turns training forms into deployment forms; what a code already says is not stored twice."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress import tree
from lmcompress.arrays import (
  DirectionArray,
  FakeQuantArray,
  InputArray,
  LearnedInputArray,
  LowRankArray,
  MaskedArray,
  QuantizedArray,
  ScoredArray,
  SumArray,
  integer,
)
from lmcompress.arrays.sparse_form import as_bitmap, as_n_of_m, smallest_sparse
from lmcompress.ops import masks
from lmcompress.ops.rounding import assemble
from lmcompress.types import CompressedArray, Evidence, Params, State, Transform, WeightError


def freeze(sparse: str = "none") -> Transform:
  """Makes the tree ready to deploy; acts on every weight unless `at` restricts it.

  A mask over a compressed weight that is exactly 0 wherever the mask removes is dropped: the codes say it
  already. A mask over dense values is applied to them. Where codes cannot express 0 (a real minimum), the mask
  stays. A weight that trains as floats becomes what it computes as: codes (`fake_quantize`), zeros (`movement`). Within
  an `InputArray`, the factors of a `LowRankArray` and the base of a `SumArray` the same holds. Nothing is rounded.

  Args:
    sparse: how zeros are stored: `none` as any value; `"n:m"`, such as `2:4`, as an `NMSparseArray`; `bitmap` as a
      `BitmapArray`; `auto` in the form that takes the fewest bits, the weight as it is among them.

  Raises:
    ValueError: no such form.
    WeightError (when applied): a weight does not fit the form that was asked for.
  """
  n, m = (0, 0) if sparse in ("none", "auto", "bitmap") else masks.parse_pattern(
    "freeze", sparse, "sparse", ", or none, auto or bitmap"
  )

  def stored(w: Any, axis: int) -> Any:
    if sparse == "none":
      return w
    if sparse == "auto":
      return smallest_sparse(w, axis)
    return as_n_of_m(w, n, m, axis) if m else as_bitmap(w, axis)

  def visit(path: str, w: Any) -> Any:
    try:
      return _freeze(w, functools.partial(stored, axis=tree.contraction_axis(path)))
    except ValueError as error:
      raise WeightError(f"freeze(sparse={sparse!r}) at {path}: {error}") from None

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    chosen = evidence.selected
    if chosen is None and sparse not in ("none", "auto"):
      chosen = tree.default_selection(params)
    return tree.map_weights(visit, params, chosen), state

  return Transform(lambda params, selected=None: (), apply, name="freeze", inputs=True)


def _freeze(w: Any, stored: Callable[[Any], Any]) -> Any:
  if isinstance(w, InputArray):
    return dataclasses.replace(w, weight=_freeze(w.weight, stored))
  if isinstance(w, LowRankArray):
    return dataclasses.replace(w, left=_freeze(w.left, lambda x: x), right=_freeze(w.right, lambda x: x))
  if isinstance(w, SumArray):
    return dataclasses.replace(w, base=_freeze(w.base, stored), delta=_freeze(w.delta, lambda x: x))
  if isinstance(w, LearnedInputArray):
    return _freeze(w.fixed(), stored)
  if isinstance(w, DirectionArray):
    return _freeze(w.folded(), stored)
  if isinstance(w, ScoredArray):
    return stored(w.materialize())
  if isinstance(w, FakeQuantArray):
    return stored(_as_codes(w))
  if not isinstance(w, MaskedArray):
    return stored(w)
  if not isinstance(w.values, CompressedArray):
    return stored(_apply_mask(w))
  return stored(w.values) if bool(_expressed(w)) else w


@jax.jit
def _as_codes(w: FakeQuantArray) -> QuantizedArray:
  """The same values as codes."""
  codes, scale, minimum = w.codes()
  offset, grid = None if minimum is None else minimum.astype(w.scale_dtype), integer(w.bits, minimum is None)
  return assemble(codes, grid, scale.astype(w.scale_dtype), None, offset, w.group_size, w.axis, str(w.dtype))


@functools.partial(jax.jit)
def _apply_mask(w: MaskedArray) -> jax.Array:
  return w.materialize()


@functools.partial(jax.jit)
def _expressed(w: MaskedArray) -> jax.Array:
  return jnp.all((w.mask.unpack() != 0) | (w.values.materialize() == 0))
