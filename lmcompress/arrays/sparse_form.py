"""The sparse form of a weight that holds zeros: what is not 0, and where it stands."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress.arrays import parts
from lmcompress.arrays.bitmap import BitmapArray, bitmap
from lmcompress.arrays.nm_sparse import NMSparseArray, _compress, _largest_group, nm_sparse
from lmcompress.arrays.packing import Packed, choose_block, pack, split_blocks
from lmcompress.arrays.quantized import QuantizedArray

_GROUPS = (4, 8)
"""Values of m that `smallest_sparse` looks for."""


def as_n_of_m(w: Any, n: int, m: int, axis: int) -> NMSparseArray:
  """n of each m consecutive inputs and their positions, to the bit.

  Args:
    w: `[..., in, out]`, dense or a `QuantizedArray` with an exact 0.

  Raises:
    ValueError: more than n of some m are not 0, or the form cannot be taken apart.
  """
  if isinstance(w, QuantizedArray):
    if reason := _whole(w, m):
      raise ValueError(f"as_n_of_m({n}:{m}): {w.kind} {reason}")
    return _codes_of_m(w, n, m)
  return nm_sparse(w, w != 0, n, m, axis)


def smallest_sparse(w: Any, axis: int) -> Any:
  """The form with the fewest bits among the weight as it is, n of m, and (for dense values) a bitmap.

  Args:
    w: `[..., in, out]`, dense or a `QuantizedArray`; other forms stay.
  """
  if isinstance(w, QuantizedArray) and w.minimum is not None:
    return w
  if not isinstance(w, (jax.Array, QuantizedArray)):
    return w
  nonzero = _nonzero(w)
  forms: list[Any] = [w]
  for m in _GROUPS:
    if w.shape[axis] % m or (isinstance(w, QuantizedArray) and _whole(w, m)):
      continue
    n = max(1, int(_largest_group(nonzero, m, axis)))
    if n < m:
      forms.append(as_n_of_m(w, n, m, axis))
  if isinstance(w, jax.Array):
    forms.append(bitmap(w, nonzero, axis))
  return min(forms, key=parts.nbits)


def all_codes(w: NMSparseArray) -> QuantizedArray:
  """The weight as codes of all entries, that of 0 where nothing was kept: what `as_n_of_m` was given.

  Raises:
    ValueError: its values are no codes with an exact 0.
  """
  if not isinstance(w.values, QuantizedArray) or w.values.minimum is not None:
    raise ValueError(f"all_codes: {w.kind} holds no codes with an exact 0")
  group = w.values.group_size if w.values.group_size == -1 else w.values.group_size // w.n * w.m
  return dataclasses.replace(w.values, codes=_spread_codes(w, group), group_size=group)


@functools.partial(jax.jit, static_argnames=("group",))
def _spread_codes(w: NMSparseArray, group: int) -> Packed:
  values, axis = w.values, w.axis
  zero = _code_of_zero(values, group, w.shape[axis])
  rest = split_blocks(jnp.broadcast_to(zero, w.shape).astype(jnp.uint8), axis, w.m)
  codes = w._spread(values.codes.unpack(), w.indices, rest)
  return pack(codes, values.codes.bits, axis, choose_block(w.shape[axis], group, values.codes.bits))


def _code_of_zero(w: QuantizedArray, group: int, inputs: int) -> jax.Array:
  """The code of 0, one for all or for each of so many inputs, `group` of which share a zero point."""
  if w.zero_point is None:
    return w.grid.encode(jnp.zeros((1, 1), jnp.float32))
  zero = w.zero_point.unpack()
  if zero.shape[w.axis] == 1:
    return zero
  return jax.lax.slice_in_dim(jnp.repeat(zero, group, axis=w.axis), 0, inputs, axis=w.axis)


def as_bitmap(w: Any, axis: int) -> BitmapArray:
  """One bit per entry and the values that are not 0.

  Raises:
    ValueError: the weight is compressed.
  """
  if not isinstance(w, jax.Array):
    raise ValueError(f"as_bitmap: {parts.kind(w)} has scales for groups of inputs, which a bitmap would tear apart")
  return bitmap(w, w != 0, axis)


def _whole(w: QuantizedArray, m: int) -> str | None:
  """Why groups of m do not lie within groups of one scale, or 0 has no code; None if they do."""
  if w.minimum is not None:
    return "has real minimums, which hold no exact 0"
  if w.group_size != -1 and w.group_size % m:
    return f"has groups of {w.group_size}, which are no multiple of {m}"
  return None


@functools.partial(jax.jit)
def _nonzero(w: Any) -> jax.Array:
  return parts.materialize(w) != 0


def _codes_of_m(w: QuantizedArray, n: int, m: int) -> NMSparseArray:
  nonzero = _nonzero(w)
  if (most := int(_largest_group(nonzero, m, w.axis))) > n:
    raise ValueError(f"as_n_of_m({n}:{m}): {most} of a group of {m} are not 0")
  codes, indices = _gather_codes(w, nonzero, n, m)
  group = w.group_size if w.group_size == -1 else w.group_size // m * n
  return NMSparseArray(dataclasses.replace(w, codes=codes, group_size=group), indices, n, m)


@functools.partial(jax.jit, static_argnames=("n", "m"))
def _gather_codes(w: QuantizedArray, nonzero: jax.Array, n: int, m: int) -> tuple[Packed, Packed]:
  """Codes of what is kept, with that of 0 where a group keeps fewer than n; and the positions."""
  axis = w.axis
  codes, used, indices = _compress(w.codes.unpack(), nonzero, n, m, axis)
  group = w.group_size if w.group_size == -1 else w.group_size // m * n
  codes = jnp.where(used, codes, _code_of_zero(w, group, codes.shape[axis])).astype(jnp.uint8)
  return pack(codes, w.codes.bits, axis, choose_block(codes.shape[axis], group, w.codes.bits)), indices
