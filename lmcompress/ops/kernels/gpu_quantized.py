"""Quantized kernels and tables on GPUs: codes are read as bytes and decoded in registers (Pallas, by Triton).

A program owns a tile of `[rows of x, outputs]` and loops over steps of the contraction axis; a step is a slice of one
packing block, so that its low nibbles meet a contiguous slice of x, its high nibbles another (two half products,
nothing interleaved), and all of it one scale group. One row multiplies without tensor cores: each element of a tile
of codes keeps a sum of its own, and the tile is summed up once at the end. More rows go through tensor cores. Bare
codes, which any float type holds exactly, are multiplied and the scale goes on the partial product, once at the end
where a row has one scale. Steps are split over programs and the splits summed, in float32. No operand is padded or
copied: every load is masked. Block sizes are powers of two, as Triton wants.

Codes become floats by their bits, not by conversions, of which a multiprocessor does 16 a cycle: on an H100 those
took longer than reading the codes. Tile sizes are the best of a search there (`experiments/gpu_kernels.py sweep`).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lmcompress.arrays.grids import Integer
from lmcompress.arrays.quantized import QuantizedArray
from lmcompress.ops.kernels.gpu_tiles import (
  FEW_ROWS,
  LEAST_DOT,
  Layout,
  Tiles,
  Window,
  affine_operands,
  decoded,
  dot,
  flat_bytes,
  lanes,
  layout_of,
  of_groups,
  store_tile,
  tiled_call,
  window_of,
  with_bits,
)

TILES = {
  ("vector", 4): Tiles(rows=1, outputs=128, inputs=16, warps=4, stages=2, programs=2112),
  ("vector", 8): Tiles(rows=1, outputs=512, inputs=32, warps=8, stages=2, programs=264),
  ("few", 4): Tiles(rows=FEW_ROWS, outputs=256, inputs=64, warps=4, stages=3, programs=264),
  ("few", 8): Tiles(rows=FEW_ROWS, outputs=128, inputs=32, warps=8, stages=3, programs=1056),
}
"""By kind of product and bits of a code; float32 rows take half the inputs, as their tiles are twice as large."""

WASTE = 0.25


def block_reason(w: QuantizedArray) -> str:
  """A slice that a tensor core takes would be mostly padding (8-bit blocks may be joined)."""
  length = w.codes.data.shape[w.axis]
  if w.codes.bits == 4 and 2 * length < LEAST_DOT:
    return f"packing blocks of {length} bytes, {LEAST_DOT // 2} at least are taken"
  return ""


def product(x: jax.Array, w: QuantizedArray, interpret: bool, tiles: Tiles | None) -> jax.Array:
  """`[m, inputs] -> [m, outputs]`."""
  at, rows = layout_of(w), x.shape[0]
  operands = [flat_bytes(w.codes), *affine_operands(w)]
  kind = kind_of(rows)
  tiles = tiles or TILES[kind, w.codes.bits]
  if kind == "vector":
    tiles = tiles._replace(inputs=_slice_of(at.length, tiles.inputs, 1))
    over: Any = functools.partial(_over_vector, at=at)
  else:
    inputs = tiles.inputs // 2 if x.dtype == jnp.float32 else tiles.inputs
    tiles = tiles._replace(inputs=_slice_of(at.length, inputs, LEAST_DOT))
    over = functools.partial(_over_dots, at=at, interpret=interpret)
  return tiled_call(over, x, operands, at.outputs, tiles, at.blocks * pl.cdiv(at.length, tiles.inputs), interpret)


def kind_of(rows: int) -> str:
  """The kind of product, a key of `TILES`; four rows without tensor cores took twice as long as sixteen with them."""
  return "vector" if rows == 1 else "few"


def _slice_of(length: int, largest: int, least: int) -> int:
  """The largest power of two up to `largest` that wastes at most a quarter of its lanes on a block of `length`."""
  size = largest
  while size > least and pl.cdiv(length, size) * size * (1 - WASTE) > length:
    size //= 2
  return size


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
  inside = within + lanes(tiles.inputs) < at.length
  stored = inside & (byte + lanes(tiles.inputs) < codes_ref.shape[1 if at.table else 0])
  if at.table:
    at_codes = codes_ref.at[pl.ds(window.output, tiles.outputs), pl.ds(byte, tiles.inputs)]
    mask = window.outputs_inside[:, None] & stored[None, :]
  else:
    at_codes = codes_ref.at[pl.ds(byte, tiles.inputs), pl.ds(window.output, tiles.outputs)]
    mask = stored[:, None] & window.outputs_inside[None, :]
  codes = plgpu.load(at_codes, mask=mask, other=jnp.uint8(0))
  group = block // at.blocks_per_group if at.blocks_per_group else jnp.int32(0)
  affine_parts = of_groups(scale_ref, zero_refs, group, window.outputs, at)
  starts = [block * at.block + part * at.length + within for part in range(at.parts)]
  return Slice(codes, *affine_parts, starts, inside)


def _values(codes: jax.Array, part: int, zero: jax.Array | None, at: Layout, dtype: Any) -> jax.Array:
  """Bare numbers of one part of a tile of bytes, less their zero points."""
  if at.parts == 2:
    codes = (codes >> 4) if part else codes & 15
  across = None if zero is None else zero[:, None] if at.table else zero[None, :]
  return decoded(codes, at.grid, dtype, across)


def _vector_values(codes: jax.Array, at: Layout) -> list[jax.Array]:
  """Bare float32 numbers of each part of a tile of bytes; high nibbles stay in their place, 16 times too large."""
  if not isinstance(at.grid, Integer):
    return [decoded(codes, at.grid, jnp.float32)]
  whole = with_bits(codes.astype(jnp.uint32), 0x4B000000, jnp.float32)
  if at.parts == 1:
    return [whole - (2.0**23 + at.grid.offset)]
  low = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(whole, jnp.int32) & ~0xF0, jnp.float32)
  return [low - 2.0**23, whole - low]


def _over_vector(x_ref: Any, *refs: Any, at: Layout, tiles: Tiles, steps: int, share: int) -> None:
  """One row: each element of the tile of codes has a sum, float32; offset, zero point and minimum go by sums of x."""
  codes_ref, scale_ref, *zero_refs, y_ref = refs
  window = window_of(y_ref, tiles, steps, share)
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
        mask=found.inside & (start + lanes(tiles.inputs) < at.inputs),
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
    scale, zero, minimum = of_groups(scale_ref, zero_refs, jnp.int32(0), window.outputs, at)
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
  x_ref: Any, *refs: Any, at: Layout, tiles: Tiles, steps: int, share: int, interpret: bool
) -> None:
  """More rows, by tensor cores."""
  codes_ref, scale_ref, *zero_refs, y_ref = refs
  window = window_of(y_ref, tiles, steps, share)

  def step(n: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    total, sums = carry
    found = _slice(window, n, codes_ref, scale_ref, zero_refs, at, tiles)
    grouped = bool(at.blocks_per_group)
    partial = jnp.zeros_like(total) if grouped else total
    shift = jnp.zeros_like(sums) if grouped else sums
    for part, start in enumerate(found.starts):
      xs = plgpu.load(
        x_ref.at[pl.ds(window.row, tiles.rows), pl.ds(start, tiles.inputs)],
        mask=window.rows_inside[:, None] & (found.inside & (start + lanes(tiles.inputs) < at.inputs))[None, :],
        other=jnp.zeros((), x_ref.dtype),
      )
      values = _values(found.codes, part, found.zero, at, x_ref.dtype)
      shift = shift + jnp.sum(xs.astype(jnp.float32), axis=1) if at.minimum else shift
      partial = partial + dot(xs, values, at.table, interpret)
    if grouped:
      partial = total + partial * found.scale[None, :]
      if found.minimum is not None:
        partial = partial + shift[:, None] * found.minimum[None, :]
    return partial, shift

  zeros = (jnp.zeros((tiles.rows, tiles.outputs), jnp.float32), jnp.zeros((tiles.rows,), jnp.float32))
  total, sums = jax.lax.fori_loop(window.first, window.last, step, zeros)
  if not at.blocks_per_group:
    scale, _, minimum = of_groups(scale_ref, zero_refs, jnp.int32(0), window.outputs, at)
    total = total * scale[None, :]
    total = total if minimum is None else total + sums[:, None] * minimum[None, :]
  store_tile(y_ref, window, total)
