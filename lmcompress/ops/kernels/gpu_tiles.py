"""What the GPU kernels share: tiles, the window of a program, and how stored codes become floats."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lmcompress.arrays.grids import Grid, Integer
from lmcompress.arrays.packing import Packed
from lmcompress.arrays.quantized import QuantizedArray
from lmcompress.ops.kernels.opaque import DTYPES


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

STEPS_OF_A_SPLIT = 4
LEAST_DOT = 16


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


def layout_of(w: QuantizedArray) -> Layout:
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


def affine_operands(w: QuantizedArray) -> list[jax.Array]:
  """Scales as they are stored, and packed zero points or minimums."""
  scale = w.scale if isinstance(w.scale, jax.Array) and str(w.scale.dtype) in DTYPES else w.scales()
  if w.zero_point is not None:
    return [scale, flat_bytes(w.zero_point)]
  return [scale] if w.minimum is None else [scale, w.minimum]


def flat_bytes(packed: Packed) -> jax.Array:
  """The bytes of all blocks in one axis: a view."""
  data = packed.data
  if packed.axis == -1:
    return data.reshape(data.shape[0], data.shape[1] * data.shape[2])
  return data.reshape(data.shape[0] * data.shape[1], data.shape[2])


def tiled_call(
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


def window_of(y_ref: Any, tiles: Tiles, steps: int, share: int) -> Window:
  row, output, split = pl.program_id(0) * tiles.rows, pl.program_id(1) * tiles.outputs, pl.program_id(2)
  outputs = output + lanes(tiles.outputs)
  inside = row + lanes(tiles.rows) < y_ref.shape[1] if tiles.rows >= LEAST_DOT else None
  first = split * share
  return Window(
    row, output, outputs, inside, outputs < y_ref.shape[2], split, first, jnp.minimum(first + share, steps)
  )


def store_tile(y_ref: Any, window: Window, total: jax.Array) -> None:
  """Stores a tile `[rows, outputs]`."""
  rows, outputs = total.shape
  plgpu.store(
    y_ref.at[window.split, pl.ds(window.row, rows), pl.ds(window.output, outputs)],
    total.astype(y_ref.dtype),
    mask=window.rows_inside[:, None] & window.outputs_inside[None, :],
  )


def of_groups(
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


def lanes(size: int) -> jax.Array:
  return jnp.arange(size, dtype=jnp.int32)


def decoded(codes: jax.Array, grid: Grid, dtype: Any, zero: jax.Array | None = None) -> jax.Array:
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
    return with_bits(codes.astype(jnp.uint32), 0x4B000000, dtype) - (2.0**23 + less)
  codes = codes.astype(jnp.uint16)
  if dtype == jnp.float16:
    return with_bits(codes, 0x6400, dtype) - jnp.asarray(1024.0 + less, dtype)
  if bits <= 7:
    return with_bits(codes, 0x4300, dtype) - jnp.asarray(128.0 + less, dtype)
  # seven bits fit a bfloat16 so; with the eighth 128 is to go, without it 256
  values = with_bits(codes & 0x7F, 0x4300, dtype) - jax.lax.bitcast_convert_type(0x4380 - (codes & 0x80), dtype)
  return values if isinstance(less, int) and less == 128 else values - jnp.asarray(less - 128.0, dtype)


def with_bits(codes: jax.Array, ones: int, dtype: Any) -> jax.Array:
  return jax.lax.bitcast_convert_type(codes | ones, dtype)


def dot(x: jax.Array, w: jax.Array, transposed: bool, interpret: bool) -> jax.Array:
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
