"""MaskedArray: a weight whose removed entries read as zero while their values are kept for training."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmcompress.arrays.packing import Packed, choose_block, multiple, pack
from lmcompress.types import CompressedArray


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "mask"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class MaskedArray(CompressedArray):
  """`dense == where(mask, values, 0)`; True keeps. Masks stand outermost: `values` may be compressed.

  Attributes:
    values: `[..., in, out]` dense or compressed.
    mask: one packed bit per entry.
  """

  values: Any
  mask: Packed

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  @property
  def dtype(self) -> Any:
    return self.values.dtype

  @property
  def axis(self) -> int:
    """The contraction axis."""
    return self.mask.axis

  @property
  def nbits(self) -> int:
    values = self.values
    return (values.nbits if isinstance(values, CompressedArray) else values.nbytes * 8) + self.mask.nbits

  @property
  def kind(self) -> str:
    values = self.values
    return f"masked {values.kind if isinstance(values, CompressedArray) else values.dtype}"

  @classmethod
  def trainable_fields(cls) -> tuple[str, ...]:
    return ("values",)

  def materialize(self) -> jax.Array:
    values = self.values.materialize() if isinstance(self.values, CompressedArray) else self.values
    return jnp.where(self.mask.unpack() != 0, values, 0).astype(values.dtype)

  def columns(self, start: Any, size: int) -> jax.Array:
    """`size` outputs (table rows) from `start` on, dense float32: a tile of the weight."""
    if isinstance(self.values, CompressedArray):
      values = self.values.columns(start, size)
    else:
      values = jax.lax.dynamic_slice_in_dim(self.values, start, size, self.values.ndim - 3 - self.axis)
    return jnp.where(self.mask.columns(start, size).unpack() != 0, values.astype(jnp.float32), 0.0)

  def rows(self, ids: jax.Array) -> jax.Array:
    """Table rows `[*ids.shape, features]` in float32."""
    values = self.values.rows(ids) if isinstance(self.values, CompressedArray) else self.values[ids]
    mask = dataclasses.replace(self.mask, data=self.mask.data[ids])
    return jnp.where(mask.unpack() != 0, values.astype(jnp.float32), 0.0)

  def sharding_like(self, spec: PartitionSpec) -> MaskedArray:
    values = self.values.sharding_like(spec) if isinstance(self.values, CompressedArray) else spec
    return MaskedArray(values, self.mask.sharding_like(spec))


def masked(values: Any, mask: jax.Array, axis: int) -> MaskedArray:
  """Wraps `values` with a boolean `mask` of the same shape; a mask already there is replaced.

  Raises:
    ValueError: the shapes differ.
  """
  if isinstance(values, MaskedArray):
    values = values.values
  if tuple(mask.shape) != tuple(values.shape):
    raise ValueError(f"masked: a mask of shape {mask.shape} does not fit values of shape {values.shape}")
  block = choose_block(mask.shape[axis], -1, 1)
  return MaskedArray(values, pack(mask.astype(jnp.uint8), 1, axis, block if block % multiple(1) == 0 else 8))
