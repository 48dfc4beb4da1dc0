"""Products of compressed weights on TPUs: packing blocks stream through VMEM and meet x as bare codes (Pallas, Mosaic).

The grid is `[tiles of rows, tiles of outputs, steps]`; the steps go over packing blocks one after another, add to an
accumulator in VMEM and write it at the last. A block's codes become numbers that any float type holds exactly, so
scale, zero point and minimum go on the partial product: `(x @ codes - sum(x) * zero) * scale + sum(x) * minimum`.
That serves few rows and many, which differ in tile sizes only. Low and high nibbles are put one above the other,
which moves nothing between sublanes when half a block fills whole ones; elsewhere, and in tables, they multiply apart.
2:4 weights are decoded and spread by position: four products with zeros in between, of what is stored only.

Weights are read where they lie, neither padded nor copied: past their end x is zero and codes are masked. Rows of x
are padded (x is small), scales and zeros become float32. A tile's last two axes are multiples of (8, 128) or whole.
Sizes are estimates for a device that was not at hand: only interpret mode and the lowering to Mosaic are tested.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lmcompress.arrays.grids import Grid, Integer
from lmcompress.arrays.nm_sparse import NMSparseArray
from lmcompress.arrays.packing import fields
from lmcompress.arrays.quantized import QuantizedArray, affine
from lmcompress.ops.kernels.opaque import Product, around, dtype_reason, quantized_reason, two_of_four_reason
from lmcompress.ops.linear import gathered_embed, tiled_attend, tiled_linear


class Tiles(NamedTuple):
  """Block sizes of one case: rows of x, outputs, and bytes of the contraction axis in a step."""

  rows: int
  outputs: int
  inputs: int


FEW_ROWS = 16
"""Rows of x up to which a product is bound by reading the codes: wide tiles, all rows in one."""

FEW = Tiles(rows=FEW_ROWS, outputs=512, inputs=512)
MANY = Tiles(rows=256, outputs=256, inputs=512)

SUBLANES = 8
LARGEST_COUNT = 8
"""Blocks of a step: each is a product of its own in the program."""
LARGEST_BLOCK = 2048
"""Bytes of a packing block that still fit VMEM decoded, with room for x and the accumulator."""


def supports(x: Any, w: Any, door: str) -> str:
  """Why `door(x, w)` is left to the reference, in a short phrase, or '' if the kernel takes it."""
  if isinstance(w, NMSparseArray):
    if door != "linear":
      return "a 2:4 table"
    return dtype_reason(x) or _sparse_reason(w)
  if not isinstance(w, QuantizedArray):
    return f"a {type(w).__name__}"
  if door == "embed":
    return quantized_reason(w, -1)
  return dtype_reason(x) or quantized_reason(w, -2 if door == "linear" else -1) or _block_reason(w)


def linear(x: jax.Array, w: Any, *, interpret: bool = False) -> jax.Array:
  """`x @ w` for `x: [..., in]` and a compressed kernel `w: [in, out]` that `supports` takes, in the dtype of x."""
  return (_sparse if isinstance(w, NMSparseArray) else _linear)(interpret)(x, w)


def attend(x: jax.Array, w: QuantizedArray, *, interpret: bool = False) -> jax.Array:
  """`x @ w.T` for `x: [..., features]` and a compressed table `w: [vocab, features]`, in the dtype of x."""
  return _attend(interpret)(x, w)


embed = gathered_embed
"""Rows of a table: a gather of bytes, which XLA does as well."""


@functools.cache
def _linear(interpret: bool) -> Product:
  return around(functools.partial(_quantized, interpret=interpret), tiled_linear, lambda w: w.shape[-1])


@functools.cache
def _attend(interpret: bool) -> Product:
  return around(functools.partial(_quantized, interpret=interpret), tiled_attend, lambda w: w.shape[-2])


@functools.cache
def _sparse(interpret: bool) -> Product:
  return around(functools.partial(_nm_sparse, interpret=interpret), tiled_linear, lambda w: w.shape[-1])


def _block_reason(w: QuantizedArray) -> str:
  length = w.codes.data.shape[w.axis]
  fits = SUBLANES <= length <= LARGEST_BLOCK
  return "" if fits else f"packing blocks of {length} bytes, {SUBLANES} to {LARGEST_BLOCK} are taken"


# What both kinds of product share


def _prepare(x: jax.Array) -> tuple[jax.Array, Tiles]:
  """x with whole tiles of rows, in a dtype that the device multiplies, and the tiles for it."""
  x = x.astype(jnp.float32) if x.dtype == jnp.float16 else x
  rows = x.shape[0]
  tiles = FEW if rows <= FEW_ROWS else MANY
  tiles = tiles._replace(rows=min(tiles.rows, 2 * SUBLANES * pl.cdiv(rows, 2 * SUBLANES)))
  return jnp.pad(x, ((0, -rows % tiles.rows), (0, 0))), tiles


def _affine_operands(w: QuantizedArray, outputs: int) -> tuple[list[jax.Array], bool, bool]:
  """Scales, and zero points or minimums, as `[groups, outputs]` float32; which of the two there is."""
  given = [w.scales(), w.zeros(), w.minimum]
  rows = [v if v is None or w.axis == -2 else v.T for v in given]
  wide = [jnp.broadcast_to(v, (v.shape[0], outputs)).astype(jnp.float32) for v in rows if v is not None]
  return wide, w.zero_point is not None, w.minimum is not None


def _call(
  body: Any,
  x: jax.Array,
  x_spec: pl.BlockSpec,
  operands: list[tuple[jax.Array, pl.BlockSpec]],
  shape: tuple[int, int],
  tiles: Tiles,
  outputs_tile: int,
  steps: int,
  dtype: Any,
  interpret: bool,
) -> jax.Array:
  """Runs `body(step, x_ref, *refs) -> [rows, outputs]` over the grid, summing over steps in VMEM."""

  def kernel(x_ref: Any, *refs: Any) -> None:
    *operand_refs, y_ref, total_ref = refs
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
      total_ref[...] = jnp.zeros_like(total_ref)

    total_ref[...] += body(step, x_ref, *operand_refs)

    @pl.when(step == steps - 1)
    def _() -> None:
      y_ref[...] = total_ref[...].astype(y_ref.dtype)

  rows, outputs = shape
  y = pl.pallas_call(
    kernel,
    grid=(rows // tiles.rows, pl.cdiv(outputs, outputs_tile), steps),
    in_specs=[x_spec, *(spec for _, spec in operands)],
    out_specs=pl.BlockSpec((tiles.rows, outputs_tile), lambda m, n, k: (m, n)),
    out_shape=jax.ShapeDtypeStruct(shape, jnp.float32 if dtype == jnp.float16 else dtype),
    scratch_shapes=[pltpu.VMEM((tiles.rows, outputs_tile), jnp.float32)],
    interpret=interpret,
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
  )(x, *(operand for operand, _ in operands))
  return y.astype(dtype)


def _dot(x: jax.Array, w: jax.Array, transposed: bool = False) -> jax.Array:
  """`x @ w` or `x @ w.T` in float32, with float32 operands in full precision."""
  return jax.lax.dot_general(
    x,
    w,
    (((1,), (1 if transposed else 0,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )


def _decode(codes: jax.Array, grid: Grid) -> jax.Array:
  """float32 values of int32 `codes`; exact in bfloat16 too, since a code fits 8 bits of mantissa."""
  if isinstance(grid, Integer):
    return (codes - grid.offset).astype(jnp.float32)
  return float8(codes, grid.name)


def float8(codes: jax.Array, name: str) -> jax.Array:
  """float32 values of 8-bit floats in int32 `codes`, by integer arithmetic alone.

  Few devices cast them, and bits shifted into a float32 would make subnormals that are flushed to 0: those of the
  8-bit float are scaled integers here.
  """
  mantissa, bias = (3, 7) if name == "fp8_e4m3" else (2, 15)
  magnitude = codes & 0x7F
  normal = jax.lax.bitcast_convert_type((magnitude << (23 - mantissa)) + ((127 - bias) << 23), jnp.float32)
  subnormal = magnitude.astype(jnp.float32) * 2.0 ** (1 - bias - mantissa)
  value = jnp.where(magnitude < 2**mantissa, subnormal, normal)
  if name == "fp8_e4m3":
    value = jnp.where(magnitude == 0x7F, jnp.nan, value)
  else:
    value = jnp.where(magnitude >= 0x7C, jnp.where(magnitude == 0x7C, jnp.inf, jnp.nan), value)
  return jnp.where(codes >= 0x80, -value, value)


def _group(block: Any, blocks_per_group: int) -> Any:
  """The group of a block; 0 where one scale serves the row."""
  return jax.lax.div(block, jnp.int32(blocks_per_group)) if blocks_per_group else 0


def _row(ref: Any, group: Any) -> jax.Array:
  """The values of a group, `[1, outputs]`; past the last group, the last."""
  return ref[pl.ds(jnp.minimum(group, ref.shape[0] - 1), 1), :]


# Quantized kernels and tables


def _quantized(x: jax.Array, w: QuantizedArray, interpret: bool) -> jax.Array:
  """`[m, inputs] -> [m, outputs]`."""
  rows, dtype, table, codes = x.shape[0], x.dtype, w.axis == -1, w.codes
  outputs, length = w.shape[-3 - w.axis], codes.data.shape[w.axis]
  x, tiles = _prepare(x)
  outputs_tile = min(tiles.outputs // 2 if table else tiles.outputs, outputs)
  count = max(1, min(codes.blocks, tiles.inputs // length, LARGEST_COUNT))
  if table and count < codes.blocks:  # blocks are the second last axis of a table's codes
    count = SUBLANES
  if table and outputs_tile == 1:  # Mosaic has no bfloat16 product with one row
    x = x.astype(jnp.float32)
  steps = pl.cdiv(codes.blocks, count)
  x = jnp.pad(x, ((0, 0), (0, steps * count * codes.block - x.shape[1])))
  x = jnp.moveaxis(x.reshape(x.shape[0], steps * count, codes.block), 1, 0)

  if table:
    codes_spec = pl.BlockSpec((outputs_tile, count, length), lambda m, n, k: (n, k, 0))
  else:
    codes_spec = pl.BlockSpec((count, length, outputs_tile), lambda m, n, k: (k, 0, n))
  affine_parts, zero, minimum = _affine_operands(w, outputs)
  groups = affine_parts[0].shape[0]
  affine_spec = pl.BlockSpec((groups, outputs_tile), lambda m, n, k: (0, n))
  body = functools.partial(
    _product,
    grid=w.grid,
    count=count,
    blocks=codes.blocks,
    blocks_per_group=0 if groups == 1 else w.group_size // codes.block,
    zero=zero,
    minimum=minimum,
    table=table,
  )
  y = _call(
    body,
    x,
    pl.BlockSpec((count, tiles.rows, codes.block), lambda m, n, k: (k, m, 0)),
    [(codes.data, codes_spec), *((part, affine_spec) for part in affine_parts)],
    (x.shape[1], outputs),
    tiles,
    outputs_tile,
    steps,
    dtype,
    interpret,
  )
  return y[:rows]


def _product(
  step: jax.Array,
  x_ref: Any,
  codes_ref: Any,
  scale_ref: Any,
  *zero_refs: Any,
  grid: Grid,
  count: int,
  blocks: int,
  blocks_per_group: int,
  zero: bool,
  minimum: bool,
  table: bool,
) -> jax.Array:
  """The product of a step's blocks, `[rows, outputs]` float32."""
  total = jnp.zeros((x_ref.shape[1], scale_ref.shape[1]), jnp.float32)
  for i in range(count):
    block = step * count + i
    xs = x_ref[i]
    codes = (codes_ref[:, i, :] if table else codes_ref[i]).astype(jnp.int32)
    if blocks % count:
      codes = jnp.where(block < blocks, codes, 0)
    partial = jnp.zeros_like(total)
    start = 0
    for half in _halves(codes, grid.bits, table):
      values = _decode(half, grid).astype(xs.dtype)
      width = values.shape[1 if table else 0]
      partial += _dot(xs[:, start : start + width], values, table)
      start += width
    group = _group(block, blocks_per_group)
    if zero or minimum:
      sums = jnp.sum(xs.astype(jnp.float32), axis=1, keepdims=True)
      shift = sums * _row(zero_refs[0], group)
      partial = (partial - shift) * _row(scale_ref, group) if zero else partial * _row(scale_ref, group) + shift
    else:
      partial = partial * _row(scale_ref, group)
    total += partial
  return total


def _halves(codes: jax.Array, bits: int, table: bool) -> list[jax.Array]:
  """The codes of a block in parts along the contraction axis, one part where that moves nothing."""
  if bits == 8:
    return [codes]
  halves = [codes & 15, codes >> 4]
  return [jnp.concatenate(halves, axis=0)] if not table and codes.shape[0] % SUBLANES == 0 else halves


# 2:4 kernels


def _sparse_reason(w: NMSparseArray) -> str:
  if reason := two_of_four_reason(w):
    return reason
  lengths = [w.indices.data.shape[-2]]
  if isinstance(w.values, QuantizedArray):
    if reason := quantized_reason(w.values, -2):
      return reason
    lengths.append(w.values.codes.data.shape[-2])
  elif not isinstance(w.values, jax.Array):
    return f"values in a {type(w.values).__name__}"
  elif w.values.dtype == jnp.float16:
    return "float16 values"
  odd = [length for length in lengths if length % SUBLANES]
  if odd:
    return f"packing blocks of {odd[0]} bytes, not a multiple of {SUBLANES}"
  return f"a unit of {_unit(w)} entries" if _unit(w) > LARGEST_BLOCK else ""


def _unit(w: NMSparseArray) -> int:
  """Stored entries that are whole blocks of indices and of values."""
  return math.lcm(w.indices.block, w.values.codes.block) if isinstance(w.values, QuantizedArray) else w.indices.block


def _nm_sparse(x: jax.Array, w: NMSparseArray, interpret: bool) -> jax.Array:
  """`[m, inputs] -> [m, outputs]`."""
  rows, dtype, outputs, values, unit = x.shape[0], x.dtype, w.shape[-1], w.values, _unit(w)
  stored = values.shape[0]
  x, tiles = _prepare(x)
  outputs_tile = min(tiles.outputs, outputs)
  count = max(1, min(pl.cdiv(stored, unit), tiles.inputs // unit, LARGEST_COUNT))
  steps = pl.cdiv(stored, count * unit)

  by_position = jnp.repeat(x.reshape(x.shape[0], stored // 2, 4), 2, axis=1)  # each input beside both its candidates
  by_position = jnp.pad(by_position, ((0, 0), (0, steps * count * unit - stored), (0, 0)))
  by_position = by_position.reshape(x.shape[0], steps * count, unit, 4).transpose(1, 3, 0, 2)

  def packed(data: jax.Array, entries: int) -> tuple[jax.Array, pl.BlockSpec]:
    """Bytes `[blocks, bytes, outputs]` in steps of `count` units."""
    spec = pl.BlockSpec((count * unit // entries, data.shape[1], outputs_tile), lambda m, n, k: (k, 0, n))
    return data, spec

  operands = [packed(w.indices.data, w.indices.block)]
  zero = minimum = False
  if isinstance(values, QuantizedArray):
    operands.append(packed(values.codes.data, values.codes.block))
    parts, zero, minimum = _affine_operands(values, outputs)
    operands += [(p, pl.BlockSpec((p.shape[0], outputs_tile), lambda m, n, k: (0, n))) for p in parts]
  else:
    operands.append((values, pl.BlockSpec((count * unit, outputs_tile), lambda m, n, k: (k, n))))
  one = not isinstance(values, QuantizedArray) or values.scale.shape[0] == 1
  body = functools.partial(
    _sparse_product,
    grid=values.grid if isinstance(values, QuantizedArray) else None,
    unit=unit,
    index_block=w.indices.block,
    value_block=values.codes.block if isinstance(values, QuantizedArray) else unit,
    blocks_per_group=0 if one else values.group_size // values.codes.block,
    stored=stored,
    zero=zero,
    minimum=minimum,
  )
  y = _call(
    body,
    by_position,
    pl.BlockSpec((count, 4, tiles.rows, unit), lambda m, n, k: (k, 0, m, 0)),
    operands,
    (x.shape[0], outputs),
    tiles,
    outputs_tile,
    steps,
    dtype,
    interpret,
  )
  return y[:rows]


def _sparse_product(
  step: jax.Array,
  x_ref: Any,
  indices_ref: Any,
  values_ref: Any,
  *affine_refs: Any,
  grid: Grid | None,
  unit: int,
  index_block: int,
  value_block: int,
  blocks_per_group: int,
  stored: int,
  zero: bool,
  minimum: bool,
) -> jax.Array:
  """The product of a step's units, `[rows, outputs]` float32."""
  count = x_ref.shape[0]
  total = jnp.zeros((x_ref.shape[2], indices_ref.shape[-1]), jnp.float32)
  for i in range(count):
    first = step * count + i
    each = unit // index_block
    index = _stacked([indices_ref[i * each + j] for j in range(each)], 2)
    if grid is None:
      value = values_ref[i * unit : (i + 1) * unit, :].astype(jnp.float32)
    else:
      each, pieces = unit // value_block, []
      for j in range(each):
        group = _group(first * each + j, blocks_per_group)
        scale, *rest = (_row(ref, group) for ref in affine_refs)
        piece = _decode(_stacked([values_ref[i * each + j]], grid.bits), grid)
        pieces.append(affine(piece, scale, rest[0] if zero else None, rest[0] if minimum else None))
      value = pieces[0] if each == 1 else jnp.concatenate(pieces, axis=0)
    if stored % (count * unit):
      entry = first * unit + jax.lax.broadcasted_iota(jnp.int32, value.shape, 0)
      value = jnp.where(entry < stored, value, 0.0)
    for position in range(4):
      xs = x_ref[i, position]
      total += _dot(xs, jnp.where(index == position, value, 0.0).astype(xs.dtype))
  return total


def _stacked(blocks: list[jax.Array], bits: int) -> jax.Array:
  """The codes of blocks of bytes one below the other, int32; `fields` gives those of a block in order."""
  parts = [part for block in blocks for part in fields(block.astype(jnp.int32), bits, -2)]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)
