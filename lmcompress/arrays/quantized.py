"""QuantizedArray: codes on a grid with a scale for each group of inputs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lmcompress.arrays.grids import Grid, Integer
from lmcompress.arrays.packing import Packed, _pad_spec, fields, inlined, merge_blocks
from lmcompress.types import CompressedArray


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("codes", "scale", "zero_point", "minimum"),
  meta_fields=("grid", "group_size", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray(CompressedArray):
  """A weight as packed codes, a scale per group, and perhaps a zero point or a minimum.

  The invariant, broadcast over groups of the contraction axis:
  `dense == (grid.decode(codes) - zero_point) * scale`, or `grid.decode(codes) * scale + minimum`.

  Attributes:
    codes: packed codes of the logical shape `[..., in, out]` (or `[..., vocab, features]` for axis -1).
    scale: `[..., groups, out]` (`[..., vocab, groups]`), or one value `[..., 1, 1]` per tensor; any float
      dtype, or itself a `QuantizedArray` (double quantization).
    zero_point: packed integers shaped as the scale, or None.
    minimum: real values shaped as the scale, or None.
    grid: what a code means.
    group_size: inputs per scale; -1 for the whole row. The last group may be shorter.
    dtype: name of the dtype of the dense value.
  """

  codes: Packed
  scale: Any
  zero_point: Packed | None
  minimum: jax.Array | None
  grid: Grid
  group_size: int
  dtype: str

  @property
  def shape(self) -> tuple[int, ...]:
    return self.codes.shape

  @property
  def axis(self) -> int:
    """The contraction axis."""
    return self.codes.axis

  @property
  def nbits(self) -> int:
    parts = [self.codes, self.scale, self.zero_point, self.minimum]
    return sum(_bits(part) for part in parts if part is not None)

  @property
  def kind(self) -> str:
    inputs, groups = self.shape[self.axis], self.scale.shape[self.axis]
    group = "row" if groups == 1 and self.scale.shape[-3 - self.axis] > 1 else f"g{self.group_size}"
    if self.scale.shape[-2:] == (1, 1) and inputs > 1:
      group = "tensor"
    zero = "" if self.zero_point is None and self.minimum is None else " asym" if self.minimum is None else " min"
    return f"{self.grid.name} {group}{zero}{' dq' if isinstance(self.scale, QuantizedArray) else ''}"

  @classmethod
  def trainable_fields(cls) -> tuple[str, ...]:
    return ("scale", "minimum")

  @inlined
  def materialize(self) -> jax.Array:
    dense = self._decode(self.codes, self.scales(), self.zeros(), self.minimum)
    largest = float(jnp.finfo(self.dtype).max)
    return (jnp.clip(dense, -largest, largest) if self.dtype == "float16" else dense).astype(self.dtype)

  def columns(self, start: Any, size: int) -> jax.Array:
    """`size` outputs (table rows) from `start` on, dense float32: a tile of the weight."""
    cut = functools.partial(cut_outputs, start=start, size=size, axis=self.axis)
    return self._decode(self.codes.columns(start, size), cut(self.scales()), cut(self.zeros()), cut(self.minimum))

  def rows(self, ids: jax.Array) -> jax.Array:
    """Table rows `[*ids.shape, features]` in float32."""
    take = functools.partial(_take, ids=ids)
    codes = dataclasses.replace(self.codes, data=self.codes.data[ids])
    return self._decode(codes, take(self.scales()), take(self.zeros()), take(self.minimum))

  def sharding_like(self, spec: PartitionSpec) -> QuantizedArray:
    parts = _pad_spec(spec, len(self.shape))

    def along(shape: tuple[int, ...]) -> PartitionSpec:
      """The dense spec where the part has that axis in full, None where one value serves it all."""
      return PartitionSpec(*(None if extent == 1 else part for extent, part in zip(shape, parts, strict=True)))

    scale = self.scale
    scale = scale.sharding_like(along(scale.shape)) if isinstance(scale, CompressedArray) else along(scale.shape)
    zero = None if self.zero_point is None else self.zero_point.sharding_like(along(self.zero_point.shape))
    minimum = None if self.minimum is None else along(self.minimum.shape)
    return dataclasses.replace(
      self,
      codes=self.codes.sharding_like(spec),
      scale=scale,
      zero_point=zero,
      minimum=minimum,  # type: ignore
    )

  def scales(self) -> jax.Array:
    """The scales in float32, decoded if they are quantized themselves."""
    scale = self.scale.materialize() if isinstance(self.scale, CompressedArray) else self.scale
    return scale.astype(jnp.float32)

  def zeros(self) -> jax.Array | None:
    """The zero points in float32, or None."""
    return None if self.zero_point is None else self.zero_point.unpack().astype(jnp.float32)

  def _decode(self, codes: Packed, scale: Any, zero: jax.Array | None, minimum: jax.Array | None) -> jax.Array:
    """The invariant, block by block: parts of a block decoded and put side by side, in float32."""
    axis = self.axis
    values = jnp.concatenate([self.grid.decode(f) for f in fields(codes.data, codes.bits, axis)], axis=axis)
    group = self.shape[axis] if self.group_size == -1 else self.group_size
    if group % codes.block == 0 or scale.shape[axis] == 1:
      wide = functools.partial(per_block, axis=axis, blocks=codes.blocks, repeats=max(1, group // codes.block))
      return merge_blocks(affine(values, wide(scale), wide(zero), wide(minimum)), axis, codes.pad)
    wide = functools.partial(_per_input, axis=axis, group=group, inputs=self.shape[axis])
    return affine(merge_blocks(values, axis, codes.pad), wide(scale), wide(zero), wide(minimum))


def affine(values: jax.Array, scale: Any, zero: jax.Array | None, minimum: jax.Array | None) -> jax.Array:
  if zero is not None:
    return (values - zero) * scale
  return values * scale if minimum is None else values * scale + minimum


def per_block(x: jax.Array | None, axis: int, blocks: int, repeats: int) -> jax.Array | None:
  """Group values spread to `[..., blocks, 1, ...]`."""
  if x is None:
    return None
  if x.shape[axis] > 1 and repeats > 1:
    x = jax.lax.slice_in_dim(jnp.repeat(x, repeats, axis=axis), 0, blocks, axis=axis)
  return jnp.expand_dims(x.astype(jnp.float32), x.ndim + axis + 1)


def _per_input(x: jax.Array | None, axis: int, group: int, inputs: int) -> jax.Array | None:
  """Group values spread to one for each input."""
  if x is None:
    return None
  return jax.lax.slice_in_dim(jnp.repeat(x.astype(jnp.float32), group, axis=axis), 0, inputs, axis=axis)


def cut_outputs(x: jax.Array | None, start: Any, size: int, axis: int) -> jax.Array | None:
  """`size` outputs of a part shaped as the scale; a part with one output serves them all."""
  where = -3 - axis
  if x is None or x.shape[where] == 1:
    return x
  return jax.lax.dynamic_slice_in_dim(x, start, size, x.ndim + where)


def _take(x: jax.Array | None, ids: jax.Array) -> jax.Array | None:
  """Rows of a part shaped as a table's scale."""
  return x if x is None else x[0] if x.shape[-2] == 1 else x[ids]


def _bits(part: Any) -> int:
  return part.nbits if hasattr(part, "nbits") else part.size * np.dtype(part.dtype).itemsize * 8


def integer(bits: int, symmetric: bool, convention: str = "full") -> Integer:
  """The integer grid of `bits` bits.

  Symmetric conventions differ in the scale and so in where 0 lies between the ends:
  `full` uses every code with scale `2 amax / (2**bits - 1)` (GPTQ, compressed-tensors);
  `narrow` gives up the lowest code, scale `amax / (2**(bits-1) - 1)` (QuaRot);
  `signed` puts the signed extreme on the lowest code, scale `-extreme / 2**(bits-1)` (GGUF Q4_0).
  """
  if not symmetric:
    return Integer(bits)
  return Integer(bits, offset=2 ** (bits - 1), lowest=1 if convention == "narrow" else 0)
