"""TiledArray: a weight laid out for the CPU kernels, in tiles of 16 outputs; made by `ops.prepare`, never saved."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmcompress.arrays.packing import PLANES, inlined
from lmcompress.types import CompressedArray

LANES, BLOCK = 16, 32
"""Outputs of a tile, and inputs of a block."""


class Form(NamedTuple):
  """What the arrays of a tiled weight mean; static, so that two weights of a form share a compilation.

  Attributes:
    codes: `integer`, `table`, `bfloat16`, `n_of_m` or `bitmap`.
    bits: width of a code; 16 for bfloat16.
    group: inputs per scale as they come; -1 for a whole row.
    padded_group: inputs per scale as they are laid out: 16, or a multiple of 32; -1 for a whole row.
    offset: taken off an integer code.
    n, m: of `n_of_m`.
    value: of sparse values: `float32`, `bfloat16` or `uint8`.
    outer: how scales of scales lie: 0 none, 1 one for all, 2 `[tiles / 16, groups, 2]`, 3 `[tiles, outer, 2, 16]`.
  """

  codes: str
  bits: int
  group: int = -1
  padded_group: int = -1
  offset: int = 0
  n: int = 0
  m: int = 0
  value: str = ""
  outer: int = 0


_ARRAYS = ("codes", "index", "start", "scale", "zero", "minimum", "outer", "table")


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=_ARRAYS,
  meta_fields=("form", "pad", "axis", "source", "activations"),
)
@dataclasses.dataclass(frozen=True)
class TiledArray(CompressedArray):
  """A weight for the kernels: `dense == value(codes) * scale + minimum`, zeros and offsets as in its source.

  Attributes:
    codes: uint8 `[..., tiles, blocks, bytes]`: of each block of 32 inputs and 16 outputs, the bit planes one
      after another (see `native/kernels.h`); bfloat16 `[..., tiles, blocks, 16, 16, 2]` pairs of inputs; for n:m
      `[..., tiles, windows, n * 16 / m, 16]` values (uint8 codes in fours); for bitmaps one row of values.
    index: n:m: uint16 or uint32 `[..., tiles, windows, 16]`, positions; bitmap: uint16 `[..., tiles, inputs]`, masks.
    start: bitmap: uint32 `[tiles + 1]`, the first value of each tile.
    scale: `[..., tiles, groups, 16]`, or None.
    zero: uint8, shaped as the scale, or None.
    minimum: shaped as the scale, or None.
    outer: float32 scales (and minimums) of the scales, or None.
    table: float32 `[..., 2**bits]`, what a code stands for, or None.
    form: what the arrays mean.
    pad: inputs and outputs that the layout adds.
    axis: the contraction axis of the logical array.
    source: the `kind` of the weight that it was made from.
    activations: `float32`, `bfloat16`, `int8` or `int8_token`: what inputs are rounded to before the product.
  """

  codes: jax.Array
  index: jax.Array | None
  start: jax.Array | None
  scale: jax.Array | None
  zero: jax.Array | None
  minimum: jax.Array | None
  outer: jax.Array | None
  table: jax.Array | None
  form: Form
  pad: tuple[int, int]
  axis: int
  source: str
  activations: str

  dtype = "float32"
  """Products and rows come in float32, whatever the source's dtype."""

  @property
  def inputs(self) -> int:
    """Extent of the contraction axis."""
    form = self.form
    if form.codes == "bitmap":
      return self.index.shape[-1] - self.pad[0]  # type: ignore[union-attr]
    if form.codes == "n_of_m":
      return self.index.shape[-2] * 16 - self.pad[0]  # type: ignore[union-attr]
    if form.codes == "bfloat16":
      return self.codes.shape[-4] * BLOCK - self.pad[0]
    laid = self.codes.shape[-2] * BLOCK
    return (laid if form.group == form.padded_group else laid // form.padded_group * form.group) - self.pad[0]

  @property
  def tiles(self) -> int:
    if self.form.codes in ("n_of_m", "bitmap"):
      return self.index.shape[-3 if self.form.codes == "n_of_m" else -2]  # type: ignore[union-attr]
    return self.codes.shape[-5 if self.form.codes == "bfloat16" else -3]

  @property
  def outputs(self) -> int:
    return self.tiles * LANES - self.pad[1]

  @property
  def _lead(self) -> tuple[int, ...]:
    rank = {"bfloat16": 5, "n_of_m": 4, "bitmap": 1}.get(self.form.codes, 3)
    return self.codes.shape[: self.codes.ndim - rank]

  @property
  def shape(self) -> tuple[int, ...]:
    pair = (self.inputs, self.outputs) if self.axis == -2 else (self.outputs, self.inputs)
    return (*self._lead, *pair)

  @property
  def fields(self) -> tuple[str, ...]:
    """Names of the arrays that there are, in the order in which the kernels take them."""
    return tuple(name for name in _ARRAYS if getattr(self, name) is not None)

  @property
  def arrays(self) -> tuple[jax.Array, ...]:
    return tuple(getattr(self, name) for name in self.fields)

  def along(self, field: str) -> tuple[str | None, ...]:
    """What each dimension of an array follows: `outputs`, `inputs` or neither."""
    rank = getattr(self, field).ndim - len(self._lead)
    if field in ("start", "table") or self.form.codes == "bitmap" or (field == "outer" and self.form.outer == 1):
      follows: list[str | None] = [None] * rank
    else:
      one = getattr(self, field).shape[len(self._lead) + 1] == 1 or (field == "outer" and self.form.outer == 3)
      follows = ["outputs", None if one else "inputs", *[None] * (rank - 2)]
    return (*[None] * len(self._lead), *follows)

  @property
  def parts(self) -> tuple[int, int]:
    """Into how many equal parts the inputs and the outputs may be cut, each part a tiled weight by itself."""
    extents: dict[str, list[int]] = {"inputs": [], "outputs": []}
    for field in self.fields:
      for name, extent in zip(self.along(field), getattr(self, field).shape, strict=True):
        if name is not None:
          extents[name].append(extent)
    held = self.along("codes")  # a single block or tile is not cut, however many groups it has
    inputs, outputs = (math.gcd(*found) if name in held else 1 for name, found in extents.items())
    form, outer = self.form, self.outer
    if form.codes == "n_of_m":
      inputs //= 2  # windows are half blocks
    if form.padded_group != -1 and self.scale is not None:
      whole = self.scale.shape[-2] * form.padded_group == self.codes.shape[-2] * BLOCK
      inputs = inputs if whole else 1  # the last group is cut short
    if form.outer == 2 and outputs * 16 != self.tiles:  # one entry serves 16 tiles
      outputs = 1
    if form.outer == 3 and outer is not None and outer.shape[-3] > 1:  # one entry serves 256 groups
      inputs = 1
    return 1 if self.pad[0] else inputs, 1 if self.pad[1] else outputs

  @property
  def nbits(self) -> int:
    return sum(x.size * x.dtype.itemsize * 8 for x in self.arrays)

  @property
  def kind(self) -> str:
    before = "" if self.activations == "float32" else f"{self.activations} x "
    return f"{before}{self.source} tiled"

  @inlined
  def materialize(self) -> jax.Array:
    dense = self._dense(self)
    return dense if self.axis == -2 else jnp.swapaxes(dense, -1, -2)

  def columns(self, start: Any, size: int) -> jax.Array:
    """`size` outputs (table rows) from `start` on, dense float32: a tile of the weight, from the tiles it touches."""
    count = min(self.tiles, -(-size // LANES) + 1)
    first = jnp.minimum(jnp.asarray(start) // LANES, self.tiles - count)
    dense = self._dense(self._cut(first, count))
    out = jax.lax.dynamic_slice_in_dim(dense, start - first * LANES, size, dense.ndim - 1)
    return out if self.axis == -2 else jnp.swapaxes(out, -1, -2)

  def rows(self, ids: jax.Array) -> jax.Array:
    """Table rows `[*ids.shape, features]` in float32."""
    flat = jnp.asarray(ids).reshape(-1)

    def row(i: jax.Array) -> jax.Array:
      dense = self._dense(self._cut(i // LANES, 1))
      return jax.lax.dynamic_index_in_dim(dense, i % LANES, dense.ndim - 1, keepdims=False)

    return jax.lax.map(row, flat, batch_size=64).reshape(*jnp.shape(ids), self.inputs)

  def sharding_like(self, spec: PartitionSpec) -> TiledArray:
    """Tiles are split as the outputs are, blocks and groups as the inputs; bitmaps stay whole."""
    dense = (*spec, *([None] * (len(self.shape) - len(spec))))
    lead, (a, b) = dense[:-2], dense[-2:]
    inputs, outputs = (a, b) if self.axis == -2 else (b, a)
    places = {"inputs": None if self.parts[0] == 1 else inputs, "outputs": None if self.parts[1] == 1 else outputs}

    def place(field: str) -> PartitionSpec:
      follows = self.along(field)[len(lead) :]
      return PartitionSpec(*lead, *(places.get(name or "") for name in follows))

    return dataclasses.replace(self, **{field: place(field) for field in self.fields})

  def _cut(self, first: Any, count: int) -> TiledArray:
    """`count` tiles from `first` on, all their outputs logical."""
    if self.form.codes == "bitmap":
      return _BitmapTiles.cut(self, first, count)
    at = len(self._lead)
    cut = lambda x: None if x is None else jax.lax.dynamic_slice_in_dim(x, first, count, at)  # noqa: E731
    outer = self.outer
    if self.form.outer == 2 and outer is not None:  # one entry serves 16 tiles
      outer = jnp.take(outer, (first + jnp.arange(count)) // 16, axis=at)
    elif self.form.outer == 3:
      outer = cut(outer)
    form = self.form._replace(outer=4) if self.form.outer == 2 else self.form
    return dataclasses.replace(
      self,
      codes=cut(self.codes),
      index=cut(self.index),
      scale=cut(self.scale),
      zero=cut(self.zero),
      minimum=cut(self.minimum),
      outer=outer,
      form=form,
      pad=(self.pad[0], 0),
    )

  def _dense(self, part: TiledArray) -> jax.Array:
    """`[..., inputs, outputs]` of `part`, in float32."""
    if part.form.codes == "bfloat16":
      pairs = jnp.moveaxis(part.codes, -2, -1)  # [.., tiles, blocks, 16 pairs, 2, 16]
      values = pairs.reshape(*part._lead, part.tiles, -1, LANES).astype(jnp.float32)
    elif part.form.codes == "n_of_m":
      values = _spread_n_of_m(part)
    elif part.form.codes == "bitmap":
      values = _BitmapTiles.spread(part)
    else:
      codes = unpack_tiles(part.codes, part.form.bits)
      values = codes.astype(jnp.float32) if part.table is None else _look_up(part.table, codes)
      values = part._affine(values)
    values = jnp.moveaxis(values, -3, -2)  # [.., padded inputs, tiles, 16]
    values = values.reshape(*values.shape[:-2], part.tiles * LANES)
    values = self._without_padding(values)
    return jax.lax.slice_in_dim(values, 0, values.shape[-1] - part.pad[1], axis=values.ndim - 1)

  def _affine(self, values: jax.Array) -> jax.Array:
    """Scales and shifts `[..., tiles, padded inputs, 16]`."""
    form, inputs = self.form, values.shape[-2]
    group = inputs if form.padded_group == -1 else form.padded_group
    wide = lambda x: jnp.repeat(x, group, axis=-2)[..., :inputs, :]  # noqa: E731
    scale = jnp.ones((1, 1, LANES)) if self.scale is None else self.scale.astype(jnp.float32)
    if self.outer is not None:
      scale = _outer_scale(form.outer, scale, self.outer)
    if self.minimum is not None:
      return values * wide(scale) + wide(self.minimum.astype(jnp.float32))
    if self.zero is not None:
      return (values - wide(self.zero.astype(jnp.float32))) * wide(scale)
    return (values - form.offset) * wide(scale)

  def _without_padding(self, values: jax.Array) -> jax.Array:
    """Rows of the logical inputs out of `[..., padded inputs, outputs]`."""
    form = self.form
    if form.codes in ("integer", "table") and form.group != form.padded_group:
      split = values.reshape(*values.shape[:-2], -1, form.padded_group, values.shape[-1])
      values = split[..., : form.group, :].reshape(*values.shape[:-2], -1, values.shape[-1])
    return jax.lax.slice_in_dim(values, 0, values.shape[-2] - self.pad[0], axis=values.ndim - 2)


def _look_up(table: jax.Array, codes: jax.Array) -> jax.Array:
  """`table[codes]`, a table for each of the leading axes."""
  flat = codes.reshape(*table.shape[:-1], -1).astype(jnp.int32)
  return jnp.take_along_axis(table, flat, axis=-1).reshape(codes.shape)


def _outer_scale(mode: int, scale: jax.Array, outer: jax.Array) -> jax.Array:
  """Scales `[..., tiles, groups, 16]` from their codes and the scales of those."""
  if mode == 1:
    return scale * outer[..., None, None, :]
  tiles, groups = scale.shape[-3:-1]
  if mode == 3:  # [.., tiles, outer groups, 2, 16]
    wide = jnp.repeat(outer, 256, axis=-3)[..., :groups, :, :]
    return scale * wide[..., 0, :] + wide[..., 1, :]
  wide = outer if mode == 4 else jnp.repeat(outer, 16, axis=-3)[..., :tiles, :, :]
  return scale * wide[..., 0:1] + wide[..., 1:2]


def pack_tiles(codes: Any, bits: int) -> Any:
  """Codes `[inputs, outputs]` uint8, multiples of 32 and 16, to bytes `[tiles, blocks, 64 * bits]`.

  Works on NumPy and on JAX arrays alike.
  """
  inputs, outputs = codes.shape
  blocks, tiles = inputs // BLOCK, outputs // LANES
  # input 4 v + b of a block lies in byte b of lane o of vector v
  vectors = codes.reshape(blocks, 8, 4, tiles, LANES).transpose(3, 0, 1, 4, 2)
  planes, shift = [], 0
  for width in PLANES[bits]:
    fields = ((vectors >> shift) & (2**width - 1)).reshape(tiles, blocks, width, 8 // width, LANES, 4)
    packed = fields[:, :, :, 0]
    for f in range(1, 8 // width):
      packed = packed | (fields[:, :, :, f] << (width * f))
    planes.append(packed.reshape(tiles, blocks, width * 64))
    shift += width
  return planes[0] if len(planes) == 1 else _concatenate(planes)


def _concatenate(planes: list[Any]) -> Any:
  import numpy as np

  return (np if isinstance(planes[0], np.ndarray) else jnp).concatenate(planes, axis=-1)


def unpack_tiles(data: jax.Array, bits: int) -> jax.Array:
  """Undoes `pack_tiles` up to the order of axes: uint8 `[..., tiles, blocks * 32, 16]`."""
  lead, blocks = data.shape[:-2], data.shape[-2]
  codes, shift, at = None, 0, 0
  for width in PLANES[bits]:
    plane = data[..., at : at + 64 * width].reshape(*lead, blocks, width, LANES, 4)
    fields = jnp.stack([(plane >> (width * f)) & (2**width - 1) for f in range(8 // width)], axis=-3)
    vectors = fields.reshape(*lead, blocks, 8, LANES, 4) << shift
    codes = vectors if codes is None else codes | vectors
    shift, at = shift + width, at + 64 * width
  assert codes is not None
  return jnp.swapaxes(codes, -1, -2).reshape(*lead, blocks * BLOCK, LANES)


def _spread_n_of_m(part: TiledArray) -> jax.Array:
  """`[..., tiles, inputs, 16]` of n:m values and positions."""
  form = part.form
  count = 16 * form.n // form.m
  bits = max(1, (form.m - 1).bit_length())
  assert part.index is not None
  lead = part.index.shape[:-1]
  if form.value == "uint8":  # codes lie in fours
    values = part.codes.reshape(*lead, count // 4, LANES, 4)
    values = jnp.swapaxes(values, -1, -2).reshape(*lead, count, LANES).astype(jnp.float32) - form.offset
  else:
    values = part.codes.astype(jnp.float32)
  shifts = (bits * jnp.arange(count, dtype=jnp.uint32))[:, None]
  position = (part.index[..., None, :].astype(jnp.uint32) >> shifts) & (form.m - 1)
  position = position + (jnp.arange(count, dtype=jnp.uint32) // form.n * form.m)[:, None]
  slots = jnp.arange(16, dtype=jnp.uint32)[:, None, None]
  dense = jnp.sum(jnp.where(position[..., None, :, :] == slots, values[..., None, :, :], 0.0), axis=-2)
  dense = dense.reshape(*lead[:-1], -1, LANES)
  return dense if part.scale is None else dense * part.scale.astype(jnp.float32)


class _BitmapTiles:
  """Reading of bitmap tiles, whose values lie one after another."""

  @staticmethod
  def cut(whole: TiledArray, first: Any, count: int) -> TiledArray:
    """Tiles of their own, still pointing into all values."""
    assert whole.index is not None and whole.start is not None
    take = lambda x: None if x is None else jax.lax.dynamic_slice_in_dim(x, first, count, 0)  # noqa: E731
    return dataclasses.replace(
      whole, index=take(whole.index), start=take(whole.start), scale=take(whole.scale), pad=(whole.pad[0], 0)
    )

  @staticmethod
  def spread(part: TiledArray) -> jax.Array:
    assert part.index is not None and part.start is not None
    there = (part.index[..., None] >> jnp.arange(LANES, dtype=jnp.uint16)) & 1  # [tiles, inputs, 16]
    flat = there.reshape(there.shape[0], -1).astype(jnp.int32)
    at = jnp.cumsum(flat, axis=1) - flat + part.start[: flat.shape[0], None].astype(jnp.int32)
    values = part.codes[at].astype(jnp.float32) - part.form.offset
    dense = jnp.where(flat != 0, values, 0.0).reshape(there.shape)
    return dense if part.scale is None else dense * part.scale.astype(jnp.float32)
