"""MaskedArray: a weight whose removed entries read as zero while their values are kept for training."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmcompress.arrays import parts
from lmcompress.arrays.input import InputArray
from lmcompress.arrays.packing import Packed, choose_block, inlined, multiple, pack
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
    return parts.nbits(self.values) + self.mask.nbits

  @property
  def kind(self) -> str:
    return f"masked {parts.kind(self.values)}"

  @classmethod
  def trainable_fields(cls) -> tuple[str, ...]:
    return ("values",)

  @inlined
  def materialize(self) -> jax.Array:
    return jnp.where(self.mask.unpack() != 0, parts.materialize(self.values), 0)

  def columns(self, start: Any, size: int) -> jax.Array:
    """`size` outputs (table rows) from `start` on, dense float32: a tile of the weight."""
    values = parts.columns(self.values, start, size, self.axis)
    return jnp.where(self.mask.columns(start, size).unpack() != 0, values, 0.0)

  def rows(self, ids: jax.Array) -> jax.Array:
    """Table rows `[*ids.shape, features]` in float32."""
    return jnp.where(self.mask.rows(ids).unpack() != 0, parts.rows(self.values, ids), 0.0)

  def sharding_like(self, spec: PartitionSpec) -> MaskedArray:
    return MaskedArray(parts.sharding_like(self.values, spec), self.mask.sharding_like(spec))


def masked(values: Any, mask: jax.Array, axis: int) -> MaskedArray:
  """Wraps `values` with a boolean `mask` of the same shape; a mask already there is replaced.

  Raises:
    ValueError: the shapes differ, or `values` acts on its input: mask the weight within.
  """
  if isinstance(values, InputArray):
    raise ValueError(f"masked: {values.kind} acts on its input, which a mask over it would leave out; mask its weight")
  if isinstance(values, MaskedArray):
    values = values.values
  if tuple(mask.shape) != tuple(values.shape):
    raise ValueError(f"masked: a mask of shape {mask.shape} does not fit values of shape {values.shape}")
  block = choose_block(mask.shape[axis], -1, 1)
  return MaskedArray(values, pack(mask.astype(jnp.uint8), 1, axis, block if block % multiple(1) == 0 else 8))
