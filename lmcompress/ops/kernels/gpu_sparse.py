"""2:4 kernels on GPUs: quads are spread to dense tiles in registers (Pallas, by Triton), what is stored is read."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lmcompress.arrays.nm_sparse import NMSparseArray
from lmcompress.arrays.quantized import QuantizedArray, affine
from lmcompress.ops.kernels.gpu_tiles import (
  FEW_ROWS,
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
)
from lmcompress.ops.kernels.opaque import quantized_reason, two_of_four_reason

TILES = Tiles(rows=FEW_ROWS, outputs=128, inputs=32, warps=4, stages=4, programs=264)


def sparse_reason(w: NMSparseArray) -> str:
  if reason := two_of_four_reason(w):
    return reason
  if isinstance(w.values, QuantizedArray):
    return quantized_reason(w.values, -2)
  return "" if isinstance(w.values, jax.Array) else f"values in a {type(w.values).__name__}"


def product(x: jax.Array, w: NMSparseArray, interpret: bool, tiles: Tiles | None) -> jax.Array:
  """`[m, inputs] -> [m, outputs]`: quads are spread to dense tiles in registers; only what is stored is read."""
  tiles = tiles or TILES
  steps = pl.cdiv(x.shape[1] // 4, tiles.inputs)
  values = w.values
  quantized = isinstance(values, QuantizedArray)
  at = layout_of(values) if quantized else None
  operands = [flat_bytes(values.codes), *affine_operands(values)] if quantized else [values]
  over = functools.partial(
    _over_quads,
    at=at,
    value_block=values.codes.block if quantized else 0,
    group=values.group_size if quantized else 0,
    index_block=w.indices.block,
    interpret=interpret,
  )
  return tiled_call(over, x, [flat_bytes(w.indices), *operands], w.shape[-1], tiles, steps, interpret)


def _over_quads(x_ref: Any, *refs: Any, tiles: Tiles, steps: int, share: int, **product: Any) -> None:
  """Sums the partial products of a program's steps and stores the tile."""
  *operand_refs, y_ref = refs
  window = window_of(y_ref, tiles, steps, share)
  total = jax.lax.fori_loop(
    window.first,
    window.last,
    lambda step, total: total + _sparse_product(window, step, x_ref, *operand_refs, tiles=tiles, **product),
    jnp.zeros((tiles.rows, tiles.outputs), jnp.float32),
  )
  store_tile(y_ref, window, total)


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
  quads = step * tiles.inputs + lanes(tiles.inputs)
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
      value = decoded(codes.astype(jnp.uint8), at.grid, jnp.float32)
      which = entries // group if at.blocks_per_group else jnp.zeros_like(entries)
      last = affine_refs[0].shape[0] - 1
      which = jnp.broadcast_to(jnp.minimum(which, last)[:, None], shape)
      scale, zero, minimum = of_groups(affine_refs[0], affine_refs[1:], which, outputs, at)
      value = affine(value, scale, zero, minimum)
    kept.append((index, value))

  total = jnp.zeros((tiles.rows, tiles.outputs), jnp.float32)
  columns = jnp.broadcast_to((4 * quads)[None, :], (tiles.rows, tiles.inputs))
  rows = jnp.broadcast_to(window.row + lanes(tiles.rows)[:, None], columns.shape)
  for position in range(4):
    first, second = (jnp.where(index == position, value, 0.0) for index, value in kept)
    xs = plgpu.load(
      x_ref.at[rows, columns + position],
      mask=window.rows_inside[:, None] & inside[None, :],
      other=jnp.zeros((), x_ref.dtype),
    )
    total = total + dot(xs, (first + second).astype(x_ref.dtype), False, interpret)
  return total
