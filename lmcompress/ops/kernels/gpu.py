"""Products of compressed weights on GPUs: codes are read as bytes and decoded in registers (Pallas, by Triton).

A program owns a tile of `[rows of x, outputs]` and loops over steps of the contraction axis; a step is a slice of one
packing block, so that its low nibbles meet a contiguous slice of x, its high nibbles another (two half products,
nothing interleaved), and all of it one scale group. One row multiplies without tensor cores: each element of a tile
of codes keeps a sum of its own, and the tile is summed up once at the end. More rows go through tensor cores. Bare
codes, which any float type holds exactly, are multiplied and the scale goes on the partial product, once at the end
where a row has one scale; only where groups are small and rows are many does the scale go on the decoded tile, which
is rounded to the dtype of x. With few rows (bound by memory) steps are split over programs and the splits summed.
Sums are in float32. No operand is padded or copied: every load is masked. Block sizes are powers of two, as Triton
wants.

Codes become floats by their bits, not by conversions, of which a multiprocessor does 16 a cycle: on an H100 those
took longer than reading the codes. Tile sizes are the best of a search there (`experiments/gpu_kernels.py sweep`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lmcompress.arrays.grids import Grid, Integer
from lmcompress.arrays.nm_sparse import NMSparseArray
from lmcompress.arrays.packing import Packed
from lmcompress.arrays.quantized import QuantizedArray, affine
from lmcompress.ops.kernels.opaque import DTYPES, Product, around, dtype_reason, quantized_reason
from lmcompress.ops.linear import gathered_embed, tiled_attend, tiled_linear


class Tiles(NamedTuple):
  """Block sizes of one case.

  Attributes:
    inputs: the largest slice of a packing block, in bytes (of 2:4 weights, quads).
    programs: what splitting the contraction axis aims at; 0 splits nothing.
  """

  rows: int
  outputs: int
  inputs: int
  warps: int
  stages: int
  programs: int = 0


FEW_ROWS = 16
"""Rows of x up to which a product is bound by reading the codes; also the least that a tensor core takes."""

TILES = {
  ("vector", 4): Tiles(rows=1, outputs=128, inputs=16, warps=4, stages=2, programs=2112),
  ("vector", 8): Tiles(rows=1, outputs=512, inputs=32, warps=8, stages=2, programs=264),
  ("few", 4): Tiles(rows=FEW_ROWS, outputs=256, inputs=64, warps=4, stages=3, programs=264),
  ("few", 8): Tiles(rows=FEW_ROWS, outputs=128, inputs=32, warps=8, stages=3, programs=1056),
  ("many", 4): Tiles(rows=64, outputs=128, inputs=64, warps=4, stages=3),
  ("many", 8): Tiles(rows=128, outputs=128, inputs=64, warps=4, stages=3),
}
"""By kind of product and bits of a code; float32 rows take half the inputs, as their tiles are twice as large."""

SPARSE_FEW = Tiles(rows=FEW_ROWS, outputs=128, inputs=32, warps=4, stages=4, programs=264)
SPARSE_MANY = Tiles(rows=64, outputs=128, inputs=32, warps=8, stages=3)

STEPS_OF_A_SPLIT = 4
LEAST_DOT = 16
LEAST_SCALED = 64
"""Inputs of a step from which a scale costs less on the partial product of many rows than on the tile."""

WASTE = 0.25


class Layout(NamedTuple):
  """Where codes, scales and zeros lie; static to the kernel.

  Attributes:
    parts: slices of a block that share bytes, 2 at 4 bits.
    block: inputs of a block.
    length: bytes of a block along the contraction axis.
    blocks: blocks of the contraction axis.
    blocks_per_group: blocks that share a scale; 0 where one scale serves the row.
    zero_block: zero points packed together along the outputs; 0 for none.
    minimum: the zero is a real minimum.
    table: outputs are the first axis.
    inputs, outputs: extents of the dense weight.
    scaled_outputs: outputs that have scales of their own, 1 where one serves them all.
  """

  grid: Grid
  parts: int
  block: int
  length: int
  blocks: int
  blocks_per_group: int
  zero_block: int
  minimum: bool
  table: bool
  inputs: int
  outputs: int
  scaled_outputs: int


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


def linear(x: jax.Array, w: Any, *, interpret: bool = False, tiles: Tiles | None = None) -> jax.Array:
  """`x @ w` for `x: [..., in]` and a compressed kernel `w: [in, out]` that `supports` takes, in the dtype of x.

  `tiles` stand for those that are chosen by the number of rows; powers of two, 16 rows and inputs at least.
  """
  return (_sparse if isinstance(w, NMSparseArray) else _linear)(interpret, tiles)(x, w)


def attend(x: jax.Array, w: QuantizedArray, *, interpret: bool = False, tiles: Tiles | None = None) -> jax.Array:
  """`x @ w.T` for `x: [..., features]` and a compressed table `w: [vocab, features]`, in the dtype of x."""
  return _attend(interpret, tiles)(x, w)


embed = gathered_embed
"""Rows of a table: a gather of bytes, which XLA does as well."""


@functools.cache
def _linear(interpret: bool, tiles: Tiles | None = None) -> Product:
  return around(functools.partial(_quantized, interpret=interpret, tiles=tiles), tiled_linear, lambda w: w.shape[-1])


@functools.cache
def _attend(interpret: bool, tiles: Tiles | None = None) -> Product:
  return around(functools.partial(_quantized, interpret=interpret, tiles=tiles), tiled_attend, lambda w: w.shape[-2])


@functools.cache
def _sparse(interpret: bool, tiles: Tiles | None = None) -> Product:
  return around(functools.partial(_nm_sparse, interpret=interpret, tiles=tiles), tiled_linear, lambda w: w.shape[-1])


# Quantized kernels and tables


def _block_reason(w: QuantizedArray) -> str:
  """A slice that a tensor core takes would be mostly padding (8-bit blocks may be joined)."""
  length = w.codes.data.shape[w.axis]
  if w.codes.bits == 4 and 2 * length < LEAST_DOT:
    return f"packing blocks of {length} bytes, {LEAST_DOT // 2} at least are taken"
  return ""


def _layout(w: QuantizedArray) -> Layout:
  codes = w.codes
  inputs, outputs = w.shape[w.axis], w.shape[-3 - w.axis]
  one = w.scale.shape[w.axis] == 1
  block, blocks = codes.block, codes.blocks
  if codes.bits == 8:  # a byte is a code: a block may be as long as a group
    block, blocks = (inputs, 1) if one else (w.group_size, pl.cdiv(inputs, w.group_size))
  return Layout(
    grid=w.grid,
    parts=8 // codes.bits,
    block=block,
    length=block * codes.bits // 8,
    blocks=blocks,
    blocks_per_group=0 if one else w.group_size // block,
    zero_block=0 if w.zero_point is None else w.zero_point.block,
    minimum=w.minimum is not None,
    table=w.axis == -1,
    inputs=inputs,
    outputs=outputs,
    scaled_outputs=w.scale.shape[-3 - w.axis],
  )


def _affine_operands(w: QuantizedArray) -> list[jax.Array]:
  """Scales as they are stored, and packed zero points or minimums."""
  scale = w.scale if isinstance(w.scale, jax.Array) and str(w.scale.dtype) in DTYPES else w.scales()
  if w.zero_point is not None:
    return [scale, _flat(w.zero_point)]
  return [scale] if w.minimum is None else [scale, w.minimum]


def _flat(packed: Packed) -> jax.Array:
  """The bytes of all blocks in one axis: a view."""
  data = packed.data
  if packed.axis == -1:
    return data.reshape(data.shape[0], data.shape[1] * data.shape[2])
  return data.reshape(data.shape[0] * data.shape[1], data.shape[2])


def _quantized(x: jax.Array, w: QuantizedArray, interpret: bool, tiles: Tiles | None) -> jax.Array:
  """`[m, inputs] -> [m, outputs]`."""
  at, rows = _layout(w), x.shape[0]
  operands = [_flat(w.codes), *_affine_operands(w)]
  kind = kind_of(rows)
  tiles = tiles or TILES[kind, w.codes.bits]
  if kind == "vector":
    tiles = tiles._replace(inputs=_slice_of(at.length, tiles.inputs, 1))
    over: Any = functools.partial(_over_vector, at=at)
  else:
    inputs = tiles.inputs // 2 if x.dtype == jnp.float32 else tiles.inputs
    tiles = tiles._replace(inputs=_slice_of(at.length, inputs, LEAST_DOT))
    long = tiles.inputs * at.parts >= LEAST_SCALED and not at.minimum
    scaled = kind == "few" or long or not at.blocks_per_group
    over = functools.partial(_over_dots, at=at, scaled=scaled, interpret=interpret)
  return _call(over, x, operands, at.outputs, tiles, at.blocks * pl.cdiv(at.length, tiles.inputs), interpret)


def kind_of(rows: int) -> str:
  """The kind of product, a key of `TILES`; four rows without tensor cores took twice as long as sixteen with them."""
  return "vector" if rows == 1 else "few" if rows <= FEW_ROWS else "many"


def _slice_of(length: int, largest: int, least: int) -> int:
  """The largest power of two up to `largest` that wastes at most a quarter of its lanes on a block of `length`."""
  size = largest
  while size > least and pl.cdiv(length, size) * size * (1 - WASTE) > length:
    size //= 2
  return size


def _call(
  over: Any, x: jax.Array, operands: list[jax.Array], outputs: int, tiles: Tiles, steps: int, interpret: bool
) -> jax.Array:
  """Runs `over` for each tile of rows and outputs; where `tiles.programs` asks for it steps are split too."""
  rows = x.shape[0]
  grid = (pl.cdiv(rows, tiles.rows), pl.cdiv(outputs, tiles.outputs))
  wanted = max(1, tiles.programs // (grid[0] * grid[1]))
  share = max(pl.cdiv(steps, wanted), min(steps, STEPS_OF_A_SPLIT))
  splits = pl.cdiv(steps, share)
  y = pl.pallas_call(
    functools.partial(over, tiles=tiles, steps=steps, share=share),
    grid=(*grid, splits),
    out_shape=jax.ShapeDtypeStruct((splits, rows, outputs), x.dtype if splits == 1 else jnp.float32),
    interpret=interpret,
    compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
    name=f"rows_{tiles.rows}",
  )(x, *operands)
  return y[0] if splits == 1 else jnp.sum(y, axis=0).astype(x.dtype)


class Window(NamedTuple):
  """Where a program's tile lies: its first row and output, all its outputs, which of both exist, and its steps."""

  row: jax.Array
  output: jax.Array
  outputs: jax.Array
  rows_inside: Any
  outputs_inside: jax.Array
  split: jax.Array
  first: jax.Array
  last: jax.Array


def _window(y_ref: Any, tiles: Tiles, steps: int, share: int) -> Window:
  row, output, split = pl.program_id(0) * tiles.rows, pl.program_id(1) * tiles.outputs, pl.program_id(2)
  outputs = output + _range(tiles.outputs)
  inside = row + _range(tiles.rows) < y_ref.shape[1] if tiles.rows >= LEAST_DOT else None
  first = split * share
  return Window(
    row, output, outputs, inside, outputs < y_ref.shape[2], split, first, jnp.minimum(first + share, steps)
  )


def _store(y_ref: Any, window: Window, total: jax.Array) -> None:
  """Stores a tile `[rows, outputs]`."""
  rows, outputs = total.shape
  plgpu.store(
    y_ref.at[window.split, pl.ds(window.row, rows), pl.ds(window.output, outputs)],
    total.astype(y_ref.dtype),
    mask=window.rows_inside[:, None] & window.outputs_inside[None, :],
  )


class Slice(NamedTuple):
  """The codes of one step and what makes weights of them.

  Attributes:
    codes: bytes, `[inputs, outputs]`, of a table `[outputs, inputs]`.
    scale, zero, minimum: float32 `[outputs]` or absent.
    starts: of each part, its first column of x.
    inside: lanes that are of the block.
  """

  codes: jax.Array
  scale: jax.Array
  zero: jax.Array | None
  minimum: jax.Array | None
  starts: list[jax.Array]
  inside: jax.Array


def _slice(
  window: Window, step: jax.Array, codes_ref: Any, scale_ref: Any, zero_refs: Any, at: Layout, tiles: Tiles
) -> Slice:
  chunks = pl.cdiv(at.length, tiles.inputs)
  block = step // chunks
  within = (step - block * chunks) * tiles.inputs
  byte = block * at.length + within
  inside = within + _range(tiles.inputs) < at.length
  stored = inside & (byte + _range(tiles.inputs) < codes_ref.shape[1 if at.table else 0])
  if at.table:
    at_codes = codes_ref.at[pl.ds(window.output, tiles.outputs), pl.ds(byte, tiles.inputs)]
    mask = window.outputs_inside[:, None] & stored[None, :]
  else:
    at_codes = codes_ref.at[pl.ds(byte, tiles.inputs), pl.ds(window.output, tiles.outputs)]
    mask = stored[:, None] & window.outputs_inside[None, :]
  codes = plgpu.load(at_codes, mask=mask, other=jnp.uint8(0))
  group = block // at.blocks_per_group if at.blocks_per_group else jnp.int32(0)
  affine_parts = _of_groups(scale_ref, zero_refs, group, window.outputs, at)
  starts = [block * at.block + part * at.length + within for part in range(at.parts)]
  return Slice(codes, *affine_parts, starts, inside)


def _values(codes: jax.Array, part: int, zero: jax.Array | None, at: Layout, dtype: Any) -> jax.Array:
  """Bare numbers of one part of a tile of bytes, less their zero points."""
  if at.parts == 2:
    codes = (codes >> 4) if part else codes & 15
  across = None if zero is None else zero[:, None] if at.table else zero[None, :]
  return _decode(codes, at.grid, dtype, across)


def _vector_values(codes: jax.Array, at: Layout) -> list[jax.Array]:
  """Bare float32 numbers of each part of a tile of bytes; high nibbles stay in their place, 16 times too large."""
  if not isinstance(at.grid, Integer):
    return [_decode(codes, at.grid, jnp.float32)]
  whole = _with_bits(codes.astype(jnp.uint32), 0x4B000000, jnp.float32)
  if at.parts == 1:
    return [whole - (2.0**23 + at.grid.offset)]
  low = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(whole, jnp.int32) & ~0xF0, jnp.float32)
  return [low - 2.0**23, whole - low]


def _over_vector(x_ref: Any, *refs: Any, at: Layout, tiles: Tiles, steps: int, share: int) -> None:
  """One row: each element of the tile of codes has a sum, float32; offset, zero point and minimum go by sums of x."""
  codes_ref, scale_ref, *zero_refs, y_ref = refs
  window = _window(y_ref, tiles, steps, share)
  shape = (tiles.outputs, tiles.inputs) if at.table else (tiles.inputs, tiles.outputs)
  offset = at.grid.offset if isinstance(at.grid, Integer) and at.parts == 2 else 0
  grouped, moved = bool(at.blocks_per_group), bool(at.zero_block) or at.minimum

  def along(values: jax.Array, inputs: bool) -> jax.Array:
    return values[None, :] if inputs == at.table else values[:, None]

  def step(n: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    total, sums = carry
    found = _slice(window, n, codes_ref, scale_ref, zero_refs, at, tiles)
    columns = [
      plgpu.load(
        x_ref.at[window.row, pl.ds(start, tiles.inputs)],
        mask=found.inside & (start + _range(tiles.inputs) < at.inputs),
        other=jnp.zeros((), x_ref.dtype),
      ).astype(jnp.float32)
      for start in found.starts
    ]
    both = functools.reduce(jnp.add, columns)
    partial = jnp.zeros(shape, jnp.float32) if grouped else total
    if offset:
      partial = partial - along(offset * both, True)
    for part, (xs, values) in enumerate(zip(columns, _vector_values(found.codes, at), strict=True)):
      partial = partial + along(xs / 16 if part else xs, True) * values
    if not grouped:
      return partial, sums + both if moved else sums
    total = total + partial * along(found.scale, False)
    if moved:
      total = total + along(both, True) * along(_shift(found.scale, found.zero, found.minimum), False)
    return total, sums

  zeros = jnp.zeros(shape, jnp.float32), jnp.zeros((tiles.inputs,), jnp.float32)
  total, sums = jax.lax.fori_loop(window.first, window.last, step, zeros)
  y = jnp.sum(total, axis=1 if at.table else 0)
  if not grouped:
    scale, zero, minimum = _of_groups(scale_ref, zero_refs, jnp.int32(0), window.outputs, at)
    y = y * scale
    y = y + jnp.sum(sums) * _shift(scale, zero, minimum) if moved else y
  plgpu.store(
    y_ref.at[window.split, window.row, pl.ds(window.output, tiles.outputs)],
    y.astype(y_ref.dtype),
    mask=window.outputs_inside,
  )


def _shift(scale: jax.Array, zero: jax.Array | None, minimum: jax.Array | None) -> jax.Array:
  """What the weights of a group have in common: times the sum of their inputs it goes on the product."""
  return minimum if minimum is not None else -zero * scale  # type: ignore[operator]


def _over_dots(
  x_ref: Any, *refs: Any, at: Layout, tiles: Tiles, steps: int, share: int, scaled: bool, interpret: bool
) -> None:
  """More rows, by tensor cores; `scaled` puts the scale on products, else it goes on the decoded tile."""
  codes_ref, scale_ref, *zero_refs, y_ref = refs
  window = _window(y_ref, tiles, steps, share)

  def across(values: jax.Array) -> jax.Array:
    """One value for each output, laid along a tile of codes."""
    return values[:, None] if at.table else values[None, :]

  def step(n: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    total, sums = carry
    found = _slice(window, n, codes_ref, scale_ref, zero_refs, at, tiles)
    grouped = bool(at.blocks_per_group)
    partial = jnp.zeros_like(total) if scaled and grouped else total
    shift = jnp.zeros_like(sums) if grouped else sums
    for part, start in enumerate(found.starts):
      xs = plgpu.load(
        x_ref.at[pl.ds(window.row, tiles.rows), pl.ds(start, tiles.inputs)],
        mask=window.rows_inside[:, None] & (found.inside & (start + _range(tiles.inputs) < at.inputs))[None, :],
        other=jnp.zeros((), x_ref.dtype),
      )
      if scaled:
        values = _values(found.codes, part, found.zero, at, x_ref.dtype)
        shift = shift + jnp.sum(xs.astype(jnp.float32), axis=1) if at.minimum else shift
      else:
        values = _values(found.codes, part, found.zero, at, jnp.float32) * across(found.scale)
        values = values if found.minimum is None else values + across(found.minimum)
        values = values.astype(x_ref.dtype)  # where precision is dropped
      partial = partial + _dot(xs, values, at.table, interpret)
    if scaled and grouped:
      partial = total + partial * found.scale[None, :]
      if found.minimum is not None:
        partial = partial + shift[:, None] * found.minimum[None, :]
    return partial, shift

  zeros = (jnp.zeros((tiles.rows, tiles.outputs), jnp.float32), jnp.zeros((tiles.rows,), jnp.float32))
  total, sums = jax.lax.fori_loop(window.first, window.last, step, zeros)
  if not at.blocks_per_group:
    scale, _, minimum = _of_groups(scale_ref, zero_refs, jnp.int32(0), window.outputs, at)
    total = total * scale[None, :]
    total = total if minimum is None else total + sums[:, None] * minimum[None, :]
  _store(y_ref, window, total)


def _of_groups(
  scale_ref: Any, zero_refs: Sequence[Any], group: jax.Array, outputs: jax.Array, at: Layout
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
  """Scale, zero point and minimum in float32; `group` and `outputs` are a scalar and a row, or of one shape."""
  outputs = jnp.minimum(outputs, at.scaled_outputs - 1)

  def load(ref: Any, index: jax.Array) -> jax.Array:
    return plgpu.load(ref.at[index, group] if at.table else ref.at[group, index])

  zero = minimum = None
  if at.zero_block:
    bits = at.grid.bits
    length = at.zero_block * bits // 8
    block = outputs // at.zero_block
    within = outputs - block * at.zero_block
    part = within // length
    byte = load(zero_refs[0], block * length + within - part * length)
    zero = ((byte.astype(jnp.int32) >> (part * bits)) & (2**bits - 1)).astype(jnp.float32)
  elif at.minimum:
    minimum = load(zero_refs[0], outputs).astype(jnp.float32)
  return load(scale_ref, outputs).astype(jnp.float32), zero, minimum


def _range(size: int) -> jax.Array:
  return jnp.arange(size, dtype=jnp.int32)


def _decode(codes: jax.Array, grid: Grid, dtype: Any, zero: jax.Array | None = None) -> jax.Array:
  """Grid values of uint8 `codes`, less `zero`, in the dtype of x: exact, since every code fits 8 bits of mantissa."""
  if isinstance(grid, Integer):
    return _integers(codes, grid.bits, grid.offset if zero is None else grid.offset + zero, jnp.dtype(dtype))
  wide = codes.astype(jnp.uint16)
  if grid.name == "fp8_e5m2":  # the upper byte of a float16
    return jax.lax.bitcast_convert_type(wide << 8, jnp.float16).astype(dtype)
  # e4m3 shifted into a float16 is the value over 256, subnormals too; a hardware cast needs compute capability 8.9
  half = jax.lax.bitcast_convert_type(((wide & 0x80) << 8) | ((wide & 0x7F) << 7), jnp.float16)
  values = half.astype(jnp.float32) * 256.0
  return jnp.where((wide & 0x7F) == 0x7F, jnp.nan, values).astype(dtype)


def _integers(codes: jax.Array, bits: int, less: Any, dtype: Any) -> jax.Array:
  """`codes - less`, a code put among the last bits of a float whose last bit is 1; every step is exact."""
  if dtype == jnp.float32:
    return _with_bits(codes.astype(jnp.uint32), 0x4B000000, dtype) - (2.0**23 + less)
  codes = codes.astype(jnp.uint16)
  if dtype == jnp.float16:
    return _with_bits(codes, 0x6400, dtype) - jnp.asarray(1024.0 + less, dtype)
  if bits <= 7:
    return _with_bits(codes, 0x4300, dtype) - jnp.asarray(128.0 + less, dtype)
  # seven bits fit a bfloat16 so; with the eighth 128 is to go, without it 256
  values = _with_bits(codes & 0x7F, 0x4300, dtype) - jax.lax.bitcast_convert_type(0x4380 - (codes & 0x80), dtype)
  return values if isinstance(less, int) and less == 128 else values - jnp.asarray(less - 128.0, dtype)


def _with_bits(codes: jax.Array, ones: int, dtype: Any) -> jax.Array:
  return jax.lax.bitcast_convert_type(codes | ones, dtype)


def _dot(x: jax.Array, w: jax.Array, transposed: bool, interpret: bool) -> jax.Array:
  """`x @ w` or `x @ w.T` in float32; float32 operands meet in three tf32 products, as exact as float32 ones."""
  precision: Any = None
  if x.dtype == jnp.float32:
    precision = jax.lax.Precision.HIGHEST if interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
  return jax.lax.dot_general(
    x,
    w,
    (((1,), (1 if transposed else 0,)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


# 2:4 kernels


def _sparse_reason(w: NMSparseArray) -> str:
  if (w.n, w.m) != (2, 4):
    return f"{w.n}:{w.m} sparsity"
  if w.indices.data.ndim != 3:
    return f"a stack of {w.indices.data.ndim - 3} leading axes"
  if w.indices.axis != -2:
    return "a table where a kernel is read"
  if isinstance(w.values, QuantizedArray):
    return quantized_reason(w.values, -2)
  return "" if isinstance(w.values, jax.Array) else f"values in a {type(w.values).__name__}"


def _nm_sparse(x: jax.Array, w: NMSparseArray, interpret: bool, tiles: Tiles | None) -> jax.Array:
  """`[m, inputs] -> [m, outputs]`: quads are spread to dense tiles in registers; only what is stored is read."""
  few = x.shape[0] <= FEW_ROWS
  tiles = tiles or (SPARSE_FEW if few else SPARSE_MANY)
  steps = pl.cdiv(x.shape[1] // 4, tiles.inputs)
  values = w.values
  quantized = isinstance(values, QuantizedArray)
  at = _layout(values) if quantized else None
  operands = [_flat(values.codes), *_affine_operands(values)] if quantized else [values]
  over = functools.partial(
    _over_quads,
    at=at,
    value_block=values.codes.block if quantized else 0,
    group=values.group_size if quantized else 0,
    index_block=w.indices.block,
    interpret=interpret,
  )
  return _call(over, x, [_flat(w.indices), *operands], w.shape[-1], tiles, steps, interpret)


def _over_quads(x_ref: Any, *refs: Any, tiles: Tiles, steps: int, share: int, **product: Any) -> None:
  """Sums the partial products of a program's steps and stores the tile."""
  *operand_refs, y_ref = refs
  window = _window(y_ref, tiles, steps, share)
  total = jax.lax.fori_loop(
    window.first,
    window.last,
    lambda step, total: total + _sparse_product(window, step, x_ref, *operand_refs, tiles=tiles, **product),
    jnp.zeros((tiles.rows, tiles.outputs), jnp.float32),
  )
  _store(y_ref, window, total)


def _sparse_product(
  window: Window,
  step: jax.Array,
  x_ref: Any,
  indices_ref: Any,
  values_ref: Any,
  *affine_refs: Any,
  at: Layout | None,
  value_block: int,
  group: int,
  index_block: int,
  tiles: Tiles,
  interpret: bool,
) -> jax.Array:
  """The partial product `[rows, outputs]` of a slice of quads, float32."""
  quads = step * tiles.inputs + _range(tiles.inputs)
  inside = quads < x_ref.shape[1] // 4
  shape = (tiles.inputs, tiles.outputs)
  mask = inside[:, None] & window.outputs_inside[None, :]
  outputs = jnp.broadcast_to(window.outputs[None, :], shape)

  def field(ref: Any, entries: jax.Array, bits: int, block: int) -> jax.Array:
    """Codes `[entries, outputs]`, int32; the entries that share a byte read it from the cache."""
    length = block * bits // 8
    whole = entries // block
    within = entries - whole * block
    part = within // length
    byte = jnp.broadcast_to((whole * length + within - part * length)[:, None], shape)
    codes = plgpu.load(ref.at[byte, outputs], mask=mask, other=jnp.uint8(0)).astype(jnp.int32)
    return (codes >> (part * bits)[:, None]) & (2**bits - 1)

  kept = []
  for k in range(2):
    entries = 2 * quads + k
    index = field(indices_ref, entries, 2, index_block)
    if at is None:
      wide = jnp.broadcast_to(entries[:, None], shape)
      value = plgpu.load(values_ref.at[wide, outputs], mask=mask, other=jnp.zeros((), values_ref.dtype))
      value = value.astype(jnp.float32)
    else:
      codes = field(values_ref, entries, at.grid.bits, value_block)
      value = _decode(codes.astype(jnp.uint8), at.grid, jnp.float32)
      which = entries // group if at.blocks_per_group else jnp.zeros_like(entries)
      last = affine_refs[0].shape[0] - 1
      which = jnp.broadcast_to(jnp.minimum(which, last)[:, None], shape)
      scale, zero, minimum = _of_groups(affine_refs[0], affine_refs[1:], which, outputs, at)
      value = affine(value, scale, zero, minimum)
    kept.append((index, value))

  total = jnp.zeros((tiles.rows, tiles.outputs), jnp.float32)
  columns = jnp.broadcast_to((4 * quads)[None, :], (tiles.rows, tiles.inputs))
  rows = jnp.broadcast_to(window.row + _range(tiles.rows)[:, None], columns.shape)
  for position in range(4):
    first, second = (jnp.where(index == position, value, 0.0) for index, value in kept)
    xs = plgpu.load(
      x_ref.at[rows, columns + position],
      mask=window.rows_inside[:, None] & inside[None, :],
      other=jnp.zeros((), x_ref.dtype),
    )
    total = total + _dot(xs, (first + second).astype(x_ref.dtype), False, interpret)
  return total
