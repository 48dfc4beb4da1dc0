"""Rounding to a grid: the scales of a group, their search, and the codes. Pure functions of one matrix."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmcompress.arrays.grids import TABLES, Grid, Integer
from lmcompress.arrays.packing import Packed, choose_block, multiple, pack
from lmcompress.arrays.quantized import QuantizedArray, integer

_SCALE_GROUP = 256
_MSE_SHRINKS, _MSE_STEPS, _MSE_NORM = 80, 100, 2.4


def grouped(x: jax.Array, group_size: int, axis: int) -> jax.Array:
  """Splits the contraction axis in `[groups, group]`, the ragged last group filled with zeros."""
  inputs = x.shape[axis]
  group = inputs if group_size == -1 else min(group_size, inputs)
  where = x.ndim + axis
  widths = [(0, 0)] * x.ndim
  widths[where] = (0, -inputs % group)
  x = jnp.pad(x, widths)
  return x.reshape(*x.shape[:where], -1, group, *x.shape[where + 1 :])


def ungrouped(x: jax.Array, inputs: int, axis: int) -> jax.Array:
  """Undoes `grouped` for a row of `inputs`."""
  where = x.ndim + axis
  x = x.reshape(*x.shape[: where - 1], -1, *x.shape[where + 1 :])
  return jax.lax.slice_in_dim(x, 0, inputs, axis=axis)


def store(scale: jax.Array, dtype: str) -> jax.Array:
  """Rounds a scale to its storage dtype, never to 0 or infinity; `float8_e8m0fnu` takes the power of two."""
  if dtype == "float8_e8m0fnu":
    return jnp.exp2(jnp.clip(jnp.round(jnp.log2(scale)), -127, 127)).astype(jnp.float8_e8m0fnu)
  info = jnp.finfo(dtype)
  least = float(info.smallest_subnormal if dtype == "float16" else info.tiny)  # XLA flushes other subnormals
  magnitude = jnp.clip(jnp.abs(scale), least, float(info.max))
  return jnp.where(scale < 0, -magnitude, magnitude).astype(dtype)


def affine_range(g: jax.Array, bits: int, axis: int, shrink: jax.Array | float = 1.0) -> tuple[jax.Array, jax.Array]:
  """Scale and minimum of each group, `scale == (max - min) / (2**bits - 1)`, with 0 inside the range.

  Args:
    g: `[..., groups, group, ...]` float32.
    shrink: fraction of the range that is kept.
  """
  low = jnp.minimum(jnp.min(g, axis=axis), 0.0) * shrink
  high = jnp.maximum(jnp.max(g, axis=axis), 0.0) * shrink
  step = high / (2**bits - 1) - low / (2**bits - 1)
  return jnp.where(step > 0, step, jnp.finfo(jnp.float32).tiny), low  # so that finer steps of it hold 0 as well


def symmetric_scale(g: jax.Array, grid: Grid, convention: str, axis: int, shrink: jax.Array | float = 1.0) -> jax.Array:
  """Scale of each group for a grid without a zero point; an all-zero group gets 1."""
  amax = jnp.max(jnp.abs(g), axis=axis) * shrink
  if not isinstance(grid, Integer):
    scale = amax / grid.largest
  elif convention == "signed":
    high, low = jnp.max(g, axis=axis), jnp.min(g, axis=axis)
    scale = jnp.where(high > -low, high, low) * shrink / -(2.0 ** (grid.bits - 1))
  elif convention == "narrow":
    scale = amax / max(1, 2 ** (grid.bits - 1) - 1)
  else:
    scale = amax * (2.0 / (2**grid.bits - 1))
  return jnp.where(scale != 0, scale, 1.0)


def _nonzero(scale: jax.Array) -> jax.Array:
  """A scale that can be divided by; one that was itself quantized may have become 0."""
  return jnp.where(scale == 0, 1.0, scale)


class Fit(NamedTuple):
  """Scale, as it will be read back and as it is stored, and the zero point or the minimum of each group.

  Attributes:
    scale: float32 `[..., groups, out]`, without the group's own axis.
    stored: the same in its storage dtype, or quantized again.
    zero_point: whole numbers in float32, or None.
    minimum: float32 of values that the storage dtype holds, or None.
  """

  scale: jax.Array
  stored: Any
  zero_point: jax.Array | None
  minimum: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Rounding:
  """How groups are rounded; the fields are `round_to_nearest`'s arguments.

  Scales are computed in float32 and rounded to their storage dtype *before* the codes, so that the codes are the
  nearest for the scales that will be read back.
  """

  bits: int = 4
  symmetric: bool = True
  grid: str = "int"
  convention: str = "full"
  zero: str = "integer"
  scale_dtype: str = "bfloat16"
  scale_bits: int | None = None

  @property
  def values(self) -> Grid:
    """What a code means."""
    return integer(self.bits, self.symmetric, self.convention) if self.grid == "int" else TABLES[self.grid]

  @property
  def affine(self) -> bool:
    return self.grid == "int" and not self.symmetric

  def fit(self, g: jax.Array, along: int, shrink: Any = 1.0) -> Fit:
    """The parameters of groups `g` that lie along an axis, their range shrunk to a fraction."""
    minimum = None
    if self.affine:
      raw, minimum = affine_range(g, self.bits, along, shrink)
    else:
      raw = symmetric_scale(g, self.values, self.convention, along, shrink)
      if self.grid == "mxfp4":
        raw = jnp.exp2(jnp.floor(jnp.log2(raw * self.values.largest)) - 2)
    return self.fitted(raw, minimum)

  def fitted(self, raw: jax.Array, minimum: jax.Array | None) -> Fit:
    """Parameters from a scale and an affine grid's minimum."""
    dtype = {"mxfp4": "float8_e8m0fnu", "nvfp4": "float8_e4m3fn"}.get(self.grid, self.scale_dtype)
    stored = _store_scale(raw, self.grid, dtype, self.scale_bits)
    scale = (stored.materialize() if isinstance(stored, QuantizedArray) else stored).astype(jnp.float32)
    if not self.affine:
      return Fit(scale, stored, None, None)
    assert minimum is not None
    if self.zero == "integer":
      return Fit(scale, stored, jnp.clip(jnp.round(-minimum / _nonzero(scale)), 0, 2**self.bits - 1), None)
    return Fit(scale, stored, None, minimum.astype(self.scale_dtype).astype(jnp.float32))

  def encode(self, g: jax.Array, fit: Fit, along: int) -> jax.Array:
    """Codes uint8 of values `[..., group, ...]`."""
    wide, levels = jnp.expand_dims(_nonzero(fit.scale), along), 2**self.bits - 1
    if fit.zero_point is not None:
      return jnp.clip(jnp.round(g / wide) + jnp.expand_dims(fit.zero_point, along), 0, levels).astype(jnp.uint8)
    if fit.minimum is not None:
      return jnp.clip(jnp.round((g - jnp.expand_dims(fit.minimum, along)) / wide), 0, levels).astype(jnp.uint8)
    return self.values.encode(g / wide)

  def decode(self, codes: jax.Array, fit: Fit, along: int) -> jax.Array:
    """Values of codes, float32."""
    v, wide = self.values.decode(codes), jnp.expand_dims(fit.scale, along)
    if fit.zero_point is not None:
      return (v - jnp.expand_dims(fit.zero_point, along)) * wide
    return v * wide if fit.minimum is None else v * wide + jnp.expand_dims(fit.minimum, along)

  def assemble(self, codes: jax.Array, fit: Fit, group_size: int, axis: int, dtype: str) -> QuantizedArray:
    """The array of codes `[..., in, out]`."""
    minimum = None if fit.minimum is None else fit.minimum.astype(self.scale_dtype)
    return assemble(codes, self.values, fit.stored, fit.zero_point, minimum, group_size, axis, dtype)


def quantize(
  w: jax.Array,
  *,
  bits: int = 4,
  group_size: int | str = -1,
  symmetric: bool = True,
  axis: int = -2,
  grid: str = "int",
  convention: str = "full",
  zero: str = "integer",
  clip: str = "none",
  step: float | None = None,
  scale_dtype: str = "bfloat16",
  scale_bits: int | None = None,
) -> QuantizedArray:
  """Rounds `w` to the nearest point of a grid, group by group; the arguments are `round_to_nearest`'s.

  Args:
    w: `[..., in, out]` for axis -2, `[..., vocab, features]` for axis -1.
  """
  w32, inputs = w.astype(jnp.float32), w.shape[axis]
  dtype = str(w.dtype)
  if step is not None:
    values = integer(bits, symmetric=True)
    scale = jnp.full((*w.shape[:-2], 1, 1), step, jnp.float32)
    return assemble(values.encode(w32 / step), values, scale, None, None, -1, axis, dtype)

  per_tensor = group_size == "tensor"
  size = -1 if isinstance(group_size, str) else group_size
  g = w32.reshape(*w.shape[:-2], 1, -1, 1) if per_tensor else grouped(w32, size, axis)
  along = -2 if per_tensor else axis
  rounding = Rounding(bits, symmetric, grid, convention, zero, scale_dtype, scale_bits)
  fit = rounding.fit(g, along, best_shrink(rounding, g, along) if clip == "mse" else 1.0)
  codes = rounding.encode(g, fit, along)
  codes = codes.reshape(w.shape) if per_tensor else ungrouped(codes, inputs, axis)
  return rounding.assemble(codes, fit, size, axis, dtype)


def best_shrink(rounding: Rounding, g: jax.Array, along: int, importance: Any = None) -> jax.Array:
  """The fraction of each group's range with the least `sum |error|**2.4` (Frantar et al. 2022, GPTQ's code).

  Args:
    importance: of each value, broadcast against `g`: then the least `sum importance * error**2`.
  """

  def loss(shrink: jax.Array) -> jax.Array:
    fit = rounding.fit(g, along, shrink)
    error = rounding.decode(rounding.encode(g, fit, along), fit, along) - g
    weighed = jnp.abs(error) ** _MSE_NORM if importance is None else importance * error * error
    return jnp.sum(weighed, axis=along)

  def better(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    shrink = 1.0 - i / _MSE_STEPS
    error = loss(shrink)
    return jnp.where(error < best[1], shrink, best[0]), jnp.minimum(error, best[1])

  first = loss(jnp.float32(1.0))
  return jax.lax.fori_loop(1, _MSE_SHRINKS, better, (jnp.ones_like(first), first))[0]


def _store_scale(scale: jax.Array, grid: str, dtype: str, scale_bits: int | None) -> Any:
  """The scale in its stored form: a float array, or quantized again."""
  if grid == "nvfp4":  # two levels: fp8 per group under one float32 per tensor
    return quantize(scale, grid="fp8_e4m3", group_size="tensor", axis=-1, scale_dtype="float32")
  if scale_bits is None:
    return store(scale, dtype)
  return quantize(
    scale, bits=scale_bits, group_size=_SCALE_GROUP, symmetric=False, zero="real", axis=-1, scale_dtype="float32"
  )


def assemble(
  codes: jax.Array, grid: Grid, scale: Any, zero_point: Any, minimum: Any, group_size: int, axis: int, dtype: str
) -> QuantizedArray:
  """Packs codes `[..., in, out]` (`[..., vocab, features]` for axis -1) beside their scales and zeros or minimums."""
  block = choose_block(codes.shape[axis], group_size, grid.bits)
  packed: Packed = pack(codes, grid.bits, axis, block)
  if zero_point is not None:
    zero_axis = -3 - axis  # along the outputs, so that splitting groups splits no byte
    outputs = zero_point.shape[zero_axis]
    m = multiple(grid.bits)
    zero_point = pack_zeros(zero_point, grid.bits, zero_axis, m * -(-outputs // m) if outputs < 64 else m * 8)
  return QuantizedArray(packed, scale, zero_point, minimum, grid, group_size, dtype)


def pack_zeros(zero_point: jax.Array, bits: int, axis: int, block: int) -> Packed:
  """Packs zero points along the outputs, with the largest block up to `block` that needs the least padding."""
  m, outputs = multiple(bits), zero_point.shape[axis]
  fits = [b for b in range(block, 0, -m) if outputs % b == 0]
  return pack(zero_point, bits, axis, fits[0] if fits else m)
