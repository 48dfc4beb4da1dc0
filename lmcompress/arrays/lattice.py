"""LatticeArray: eight weights at a time in 16 bits, as a point of the E8 lattice; two bits a weight."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lmcompress.arrays import parts
from lmcompress.arrays.packing import inlined
from lmcompress.types import CompressedArray

VECTOR = 8
"""Weights that share a code."""


@functools.cache
def patterns() -> tuple[np.ndarray, np.ndarray]:
  """The 256 patterns of magnitudes `[256, 8]` (halves: 0.5, 1.5, 2.5) of E8P, and which need an odd number of signs.

  All that belong to D8 shifted by a half with squared norm 10 at most are 227; of those with 12 the first 29 with five
  entries of 1.5 fill the table (Tseng et al. 2024, QuIP#, arXiv:2402.04396, section 4.2, which lists 29 others).
  """
  found: list[tuple[float, ...]] = []
  for norm in (2, 4, 6, 8, 10, 12):
    for high in range(2):  # entries of 2.5
      ones = (norm - 2 - 6 * high) // 2
      if not 0 <= ones <= VECTOR - high or (norm == 12 and high):
        continue
      for tops in itertools.combinations(range(VECTOR), high):
        rest = [i for i in range(VECTOR) if i not in tops]
        for mids in itertools.combinations(rest, ones):
          found.append(tuple(2.5 if i in tops else 1.5 if i in mids else 0.5 for i in range(VECTOR)))
  table = np.asarray(found[:256], np.float32)
  return table, table.sum(axis=1) % 2 == 1


def decode(codes: jax.Array) -> jax.Array:
  """float32 `[..., 8]` of uint16 `[...]`: bits 0 to 7 name a pattern, 8 to 14 are signs, 15 shifts by +-1/4.

  The eighth sign makes the sum of the signed pattern even.
  """
  table, odd = patterns()
  index, signs, up = codes & 255, codes >> 8 & 127, codes >> 15
  flips = (signs[..., None] >> jnp.arange(VECTOR, dtype=jnp.uint16) & 1).astype(bool)  # the eighth is still 0
  last = (jnp.sum(flips, axis=-1) % 2 == 1) ^ jnp.asarray(odd)[index]
  flips = flips.at[..., VECTOR - 1].set(last)
  values = jnp.asarray(table)[index]
  return jnp.where(flips, -values, values) + jnp.where(up == 1, 0.25, -0.25)[..., None]


def encode(x: jax.Array) -> jax.Array:
  """The nearest codes, uint16 `[...]`, of float32 `x: [..., 8]`."""
  table, odd = (jnp.asarray(t) for t in patterns())
  norms = jnp.sum(table * table, axis=1)

  def shifted(shift: float) -> tuple[jax.Array, jax.Array]:
    y = x - shift
    size, negative = jnp.abs(y), y < 0
    # ||y - p||^2 less ||y||^2 with each sign as in y; where those make the sum odd, the cheapest one is turned
    free = norms - 2 * jnp.einsum("...d,pd->...p", size, table, precision=jax.lax.Precision.HIGHEST)
    products = size[..., None, :] * table
    wrong = (jnp.sum(negative, axis=-1) % 2 == 1)[..., None] ^ odd
    cost = free + jnp.where(wrong, 4 * jnp.min(products, axis=-1), 0.0) + jnp.sum(y * y, axis=-1, keepdims=True)
    best = jnp.argmin(cost, axis=-1)
    least = jnp.take_along_axis(cost, best[..., None], axis=-1)[..., 0]
    turned = jnp.argmin(size * table[best], axis=-1)
    turn = jnp.take_along_axis(wrong, best[..., None], axis=-1) & (jnp.arange(VECTOR) == turned[..., None])
    signs = jnp.sum((negative ^ turn)[..., :7].astype(jnp.uint16) << jnp.arange(7, dtype=jnp.uint16), axis=-1)
    return least, best.astype(jnp.uint16) | signs.astype(jnp.uint16) << 8

  (low_cost, low), (high_cost, high) = shifted(-0.25), shifted(0.25)
  return jnp.where(high_cost < low_cost, high | jnp.uint16(1 << 15), low)


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("codes", "scale"), meta_fields=("axis", "pad", "group_size", "dtype")
)
@dataclasses.dataclass(frozen=True)
class LatticeArray(CompressedArray):
  """`dense == decode(codes) * scale`, eight inputs a code, the scale broadcast over groups of inputs.

  Attributes:
    codes: uint16 `[..., in / 8, out]` for axis -2, `[..., vocab, features / 8]` for axis -1.
    scale: `[..., groups, out]` (`[..., vocab, groups]`), any float dtype.
    axis: the contraction axis.
    pad: inputs at the end that are not part of the weight.
    group_size: inputs that share a scale, a multiple of 8; -1 for a row.
    dtype: name of the dtype of the dense value.
  """

  codes: jax.Array
  scale: jax.Array
  axis: int
  pad: int
  group_size: int
  dtype: str

  @property
  def shape(self) -> tuple[int, ...]:
    shape = list(self.codes.shape)
    shape[self.axis] = shape[self.axis] * VECTOR - self.pad
    return tuple(shape)

  @property
  def nbits(self) -> int:
    return parts.nbits(self.codes) + parts.nbits(self.scale)

  @property
  def kind(self) -> str:
    return f"e8p {'row' if self.group_size == -1 else f'g{self.group_size}'}"

  @classmethod
  def trainable_fields(cls) -> tuple[str, ...]:
    return ("scale",)

  @inlined
  def materialize(self) -> jax.Array:
    return self._decode(self.codes, self.scale).astype(self.dtype)

  def columns(self, start: Any, size: int) -> jax.Array:
    where = self.codes.ndim - 3 - self.axis
    return self._decode(*(jax.lax.dynamic_slice_in_dim(x, start, size, where) for x in (self.codes, self.scale)))

  def rows(self, ids: jax.Array) -> jax.Array:
    return self._decode(self.codes[ids], self.scale[ids])

  def sharding_like(self, spec: PartitionSpec) -> LatticeArray:
    along = parts.spec_of_rank(spec, len(self.shape))
    scale = parts.without(along, self.axis, len(self.shape)) if self.scale.shape[self.axis] == 1 else along
    codes = parts.without(along, self.axis, len(self.shape)) if self.pad else along
    return dataclasses.replace(self, codes=codes, scale=scale)  # type: ignore[arg-type]

  def _decode(self, codes: jax.Array, scale: jax.Array) -> jax.Array:
    values = jnp.moveaxis(decode(codes), -1, codes.ndim + self.axis + 1)
    shape = list(codes.shape)
    shape[self.axis] *= VECTOR
    values, scale = values.reshape(shape), scale.astype(jnp.float32)
    if scale.shape[self.axis] > 1:
      scale = jnp.repeat(scale, self.group_size, axis=self.axis)
      scale = jax.lax.slice_in_dim(scale, 0, shape[self.axis], axis=codes.ndim + self.axis)
    where = codes.ndim + self.axis
    return jax.lax.slice_in_dim(values * scale, 0, shape[self.axis] - self.pad, axis=where)


@functools.partial(jax.jit, static_argnames=("axis", "group_size", "scale_dtype"))
def lattice(
  w: jax.Array, axis: int, group_size: int = -1, spread: float = 1.0, scale_dtype: str = "bfloat16"
) -> LatticeArray:
  """Rounds `w` to the nearest points, eight inputs at a time.

  Args:
    w: `[..., in, out]` for axis -2, `[..., vocab, features]` for axis -1.
    group_size: inputs that share a scale, a multiple of 8; -1 for a row.
    spread: scales are the root mean square of a group divided by this.
  """
  where, inputs = w.ndim + axis, w.shape[axis]
  size = inputs + -inputs % VECTOR if group_size == -1 else group_size
  pad, spare = -inputs % VECTOR, -inputs % size
  wide = jnp.moveaxis(w.astype(jnp.float32), where, -1)
  groups = jnp.pad(wide, [(0, 0)] * (w.ndim - 1) + [(0, spare)]).reshape(*wide.shape[:-1], -1, size)
  count = jnp.clip(inputs - jnp.arange(groups.shape[-2]) * size, 1, size)
  scale = jnp.sqrt(jnp.sum(groups * groups, axis=-1) / count) / spread
  scale = jnp.maximum(scale, jnp.finfo(scale_dtype).tiny).astype(scale_dtype)  # no point is 0
  codes = encode((groups / scale[..., None].astype(jnp.float32)).reshape(*wide.shape[:-1], -1, VECTOR))
  codes = codes[..., : (inputs + pad) // VECTOR]
  back = functools.partial(jnp.moveaxis, source=-1, destination=where)
  return LatticeArray(back(codes), back(scale), axis, pad, group_size, str(w.dtype))
