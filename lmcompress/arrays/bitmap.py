"""BitmapArray: unstructured sparsity as one bit per entry and each output's kept values in order."""

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
from lmcompress.arrays.packing import Packed, choose_block, inlined, multiple, pack
from lmcompress.types import CompressedArray


@functools.partial(jax.tree_util.register_dataclass, data_fields=("bitmap", "values"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class BitmapArray(CompressedArray):
  """Of each output: `dense[i] == values[ones of bitmap before i]` where `bitmap[i]`, else 0.

  Attributes:
    bitmap: one packed bit per entry of `[..., in, out]` (or `[..., vocab, features]` for axis -1).
    values: `[..., most, out]` (`[..., vocab, most]`), dense or quantized along the same axis: what an output
      keeps, in the order of the inputs, then zeros up to the largest count of any output.
  """

  bitmap: Packed
  values: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return self.bitmap.shape

  @property
  def dtype(self) -> Any:
    return self.values.dtype

  @property
  def axis(self) -> int:
    """The contraction axis."""
    return self.bitmap.axis

  @property
  def nbits(self) -> int:
    return self.bitmap.nbits + parts.nbits(self.values)

  @property
  def kind(self) -> str:
    return f"bitmap {parts.kind(self.values)}"

  @classmethod
  def trainable_fields(cls) -> tuple[str, ...]:
    return ("values",)

  @inlined
  def materialize(self) -> jax.Array:
    return self._spread(self.bitmap, parts.materialize(self.values))

  def columns(self, start: Any, size: int) -> jax.Array:
    return self._spread(self.bitmap.columns(start, size), parts.columns(self.values, start, size, self.axis))

  def rows(self, ids: jax.Array) -> jax.Array:
    return self._spread(self.bitmap.rows(ids), parts.rows(self.values, ids))

  def sharding_like(self, spec: PartitionSpec) -> BitmapArray:
    """The bits are split as the dense value; the values only over the outputs, since a rank counts all inputs."""
    outputs = parts.without(spec, self.axis, len(self.shape))
    return BitmapArray(self.bitmap.sharding_like(spec), parts.sharding_like(self.values, outputs))

  def _spread(self, bitmap: Packed, values: jax.Array) -> jax.Array:
    """In the dtype of `values`; a bit without a value reads as NaN."""
    kept = bitmap.unpack() != 0
    rank = jnp.maximum(jnp.cumsum(kept, axis=self.axis, dtype=jnp.int32) - 1, 0)
    return jnp.where(kept, jnp.take_along_axis(values, rank, axis=self.axis), 0)


def bitmap(
  w: jax.Array,
  mask: jax.Array,
  axis: int,
  quantize: Callable[[jax.Array], Any] | None = None,
  most: int | None = None,
) -> BitmapArray:
  """Stores what `mask` keeps of `w`.

  Args:
    w: `[..., in, out]` for axis -2, `[..., vocab, features]` for axis -1.
    mask: True keeps.
    axis: the contraction axis.
    quantize: maps the kept values `[..., most, out]` to a compressed array along the same axis.
    most: room for the values of an output; the largest count if None, which a traced mask cannot tell. Layers
      that are to be stacked need the same.

  Raises:
    ValueError: the parts do not fit one another.
  """
  what = f"bitmap(axis={axis})"
  if axis not in (-2, -1):
    raise ValueError(f"{what}: axis is -2 (kernel) or -1 (table)")
  if w.ndim < 2 or tuple(mask.shape) != tuple(w.shape):
    raise ValueError(f"{what}: a mask of shape {mask.shape} does not fit a weight of shape {w.shape}")
  if not isinstance(mask, jax.core.Tracer):
    largest = max(1, int(_largest_count(mask, axis))) if mask.size else 1
    if most is not None and most < largest:
      raise ValueError(f"{what}: most={most}, and an output keeps {largest}")
    most = largest if most is None else most
  if most is None or not 1 <= most <= max(1, w.shape[axis]):
    raise ValueError(f"{what}: most={most}; from 1 to {w.shape[axis]}, and to be given where the mask is traced")
  values, bits = _compress(w, mask, axis, most)
  stored = values if quantize is None else quantize(values)
  if tuple(stored.shape) != tuple(values.shape) or getattr(stored, "axis", axis) != axis:
    raise ValueError(f"{what}: quantize gave {parts.kind(stored)} {stored.shape}, {values.shape} along {axis} expected")
  return BitmapArray(bits, stored)


@functools.partial(jax.jit, static_argnames=("axis",))
def _largest_count(mask: jax.Array, axis: int) -> jax.Array:
  return jnp.max(jnp.sum(mask != 0, axis=axis))


@functools.partial(jax.jit, static_argnames=("axis", "most"))
def _compress(w: jax.Array, mask: jax.Array, axis: int, most: int) -> tuple[jax.Array, Packed]:
  """Each output's kept values in order, then zeros; and the bits."""
  mask = mask != 0
  order = jax.lax.slice_in_dim(jnp.argsort(~mask, axis=axis, stable=True), 0, most, axis=axis)
  values = jnp.where(jnp.take_along_axis(mask, order, axis=axis), jnp.take_along_axis(w, order, axis=axis), 0)
  block = choose_block(w.shape[axis], -1, 1)
  return values, pack(mask, 1, axis, block if block % multiple(1) == 0 else 8)
