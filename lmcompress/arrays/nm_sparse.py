"""NMSparseArray: n of every m consecutive inputs are kept, with their positions; the rest are zeros."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmcompress.arrays import parts
from lmcompress.arrays.packing import Packed, choose_block, inlined, merge_blocks, pack, split_blocks
from lmcompress.types import CompressedArray

_LARGEST_M = 256
"""A position is a packed code of at most 8 bits."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "indices"), meta_fields=("n", "m"))
@dataclasses.dataclass(frozen=True)
class NMSparseArray(CompressedArray):
  """Of group g of an output: `dense[g * m + indices[g * n + k]] == values[g * n + k]` for k < n, else 0.

  Attributes:
    values: `[..., in * n / m, out]` (`[..., vocab, features * n / m]` for axis -1), dense or quantized along
      the same axis.
    indices: packed, of the shape of `values`: the position within the group of m, ascending and distinct. A
      group of fewer than n entries holds zeros at positions that it does not use.
    n: inputs kept of each m.
    m: consecutive inputs of a group.
  """

  values: Any
  indices: Packed
  n: int
  m: int

  @property
  def shape(self) -> tuple[int, ...]:
    shape = list(self.values.shape)
    shape[self.axis] = shape[self.axis] // self.n * self.m
    return tuple(shape)

  @property
  def dtype(self) -> Any:
    return self.values.dtype

  @property
  def axis(self) -> int:
    """The contraction axis."""
    return self.indices.axis

  @property
  def nbits(self) -> int:
    return parts.nbits(self.values) + self.indices.nbits

  @property
  def kind(self) -> str:
    return f"{self.n}:{self.m} {parts.kind(self.values)}"

  @classmethod
  def trainable_fields(cls) -> tuple[str, ...]:
    return ("values",)

  @inlined
  def materialize(self) -> jax.Array:
    return self._spread(parts.materialize(self.values), self.indices)

  def columns(self, start: Any, size: int) -> jax.Array:
    return self._spread(parts.columns(self.values, start, size, self.axis), self.indices.columns(start, size))

  def rows(self, ids: jax.Array) -> jax.Array:
    return self._spread(parts.rows(self.values, ids), self.indices.rows(ids))

  def sharding_like(self, spec: PartitionSpec) -> NMSparseArray:
    values = parts.sharding_like(self.values, spec)
    return dataclasses.replace(self, values=values, indices=self.indices.sharding_like(spec))

  def _spread(self, values: jax.Array, indices: Packed, rest: jax.Array | int = 0) -> jax.Array:
    """Each of a group's n values to its position among m, in the dtype of `values`, and `rest` elsewhere."""
    axis = self.axis
    kept, positions = (split_blocks(x, axis, self.n) for x in (values, indices.unpack()))
    slots = jnp.arange(self.m, dtype=jnp.uint8).reshape(-1, *([1] * (-1 - axis)))
    dense = jnp.asarray(rest, values.dtype)
    for k in range(self.n):
      at, value = (jax.lax.slice_in_dim(x, k, k + 1, axis=axis) for x in (positions, kept))
      dense = jnp.where(at == slots, value, dense)
    return merge_blocks(dense, axis, 0)


def n_of_m(score: jax.Array, n: int, m: int, axis: int) -> jax.Array:
  """True for the `n` largest of each `m` consecutive entries along `axis`; the earlier of equals first."""
  where = score.ndim + axis
  s = score.reshape(*score.shape[:where], score.shape[axis] // m, m, *score.shape[where + 1 :])
  s = jnp.moveaxis(s, where + 1, 0)
  position = jnp.arange(m).reshape(m, *([1] * (s.ndim - 1)))
  rank = sum((s[j] > s) | ((s[j] == s) & (j < position)) for j in range(m))
  return jnp.moveaxis(rank < n, 0, where + 1).reshape(score.shape)


def nm_mask(w: jax.Array, n: int, m: int, axis: int) -> jax.Array:
  """The mask that keeps the `n` largest magnitudes of each `m` consecutive inputs; the earlier of equals first.

  Raises:
    ValueError: n and m are no pattern, or the inputs are not a multiple of m.
  """
  _check_pattern("nm_mask", w.shape, n, m, axis)
  return _largest_magnitudes(w, n, m, axis)


@functools.partial(jax.jit, static_argnames=("n", "m", "axis"))
def _largest_magnitudes(w: jax.Array, n: int, m: int, axis: int) -> jax.Array:
  return n_of_m(jnp.abs(w), n, m, axis)


def nm_sparse(
  w: jax.Array,
  mask: jax.Array,
  n: int,
  m: int,
  axis: int,
  quantize: Callable[[jax.Array], Any] | None = None,
) -> NMSparseArray:
  """Stores what `mask` keeps of `w`.

  Args:
    w: `[..., in, out]` for axis -2, `[..., vocab, features]` for axis -1.
    mask: True keeps; at most `n` of each `m` consecutive inputs (checked unless traced).
    axis: the contraction axis.
    quantize: maps the kept values `[..., in * n / m, out]` to a compressed array along the same axis.

  Raises:
    ValueError: the mask keeps more than n of m, the inputs are not a multiple of m, or the quantized values
      give a position that the mask does not keep a value (a real minimum cannot hold 0).
  """
  what = _check_pattern("nm_sparse", w.shape, n, m, axis)
  if tuple(mask.shape) != tuple(w.shape):
    raise ValueError(f"{what}: a mask of shape {mask.shape} does not fit a weight of shape {w.shape}")
  concrete = not isinstance(mask, jax.core.Tracer)
  if concrete and mask.size and (most := int(_largest_group(mask, m, axis))) > n:
    raise ValueError(f"{what}: the mask keeps {most} of a group of {m}; make one with nm_mask(w, {n}, {m}, {axis})")
  values, used, indices = _compress(w, mask, n, m, axis)
  stored = values if quantize is None else quantize(values)
  if tuple(stored.shape) != tuple(values.shape) or getattr(stored, "axis", axis) != axis:
    raise ValueError(f"{what}: quantize gave {parts.kind(stored)} {stored.shape}, {values.shape} along {axis} expected")
  if quantize is not None and concrete and not isinstance(w, jax.core.Tracer) and not bool(_zeros(stored, used)):
    raise ValueError(
      f"{what}: a group keeps fewer than {n}, and {parts.kind(stored)} cannot hold the 0 of an unused position; "
      "use values with an exact 0, or a mask that keeps n of every m"
    )
  return NMSparseArray(stored, indices, n, m)


def _check_pattern(name: str, shape: tuple[int, ...], n: int, m: int, axis: int) -> str:
  what = f"{name}(n={n}, m={m}, axis={axis})"
  if not 1 <= n < m <= _LARGEST_M or axis not in (-2, -1):
    raise ValueError(f"{what}: 1 <= n < m <= {_LARGEST_M} is needed, and axis -2 (kernel) or -1 (table)")
  if len(shape) < 2 or shape[axis] % m:
    raise ValueError(f"{what}: a weight of shape {tuple(shape)} has no multiple of {m} inputs along axis {axis}")
  return what


@functools.partial(jax.jit, static_argnames=("m", "axis"))
def _largest_group(mask: jax.Array, m: int, axis: int) -> jax.Array:
  return jnp.max(jnp.sum(split_blocks(mask != 0, axis, m), axis=axis))


@functools.partial(jax.jit, static_argnames=("n", "m", "axis"))
def _compress(w: jax.Array, mask: jax.Array, n: int, m: int, axis: int) -> tuple[jax.Array, jax.Array, Packed]:
  """Kept values (zeros where a group keeps fewer than n), which of them are used, and their positions, packed."""
  mask = split_blocks(mask != 0, axis, m)
  first = jnp.argsort(~mask, axis=axis, stable=True)  # kept positions in order, then the unused ones
  positions = jnp.sort(jax.lax.slice_in_dim(first, 0, n, axis=axis), axis=axis)
  used = jnp.take_along_axis(mask, positions, axis=axis)
  values = jnp.where(used, jnp.take_along_axis(split_blocks(w, axis, m), positions, axis=axis), 0)
  values, used, positions = (merge_blocks(x, axis, 0) for x in (values, used, positions))
  bits = (m - 1).bit_length()
  group = 128 * n // m  # so that a block of indices, as a block of values, spans 128 inputs
  block = choose_block(values.shape[axis], group if group >= 1 else -1, bits)
  return values, used, pack(positions, bits, axis, block)


@jax.jit
def _zeros(stored: Any, used: jax.Array) -> jax.Array:
  return jnp.all(used | (parts.materialize(stored) == 0))
