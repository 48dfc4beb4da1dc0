"""Reference products of quantized and masked weights, in plain JAX, never more than a tile dense.

A weight that trains towards codes or zeros is as large as its dense value already, and is multiplied as one.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lmcompress.arrays.direction import DirectionArray
from lmcompress.arrays.fake_quant import FakeQuantArray
from lmcompress.arrays.grids import Integer
from lmcompress.arrays.masked import MaskedArray
from lmcompress.arrays.packing import fields, multiple
from lmcompress.arrays.quantized import QuantizedArray, affine, cut_outputs, per_block
from lmcompress.arrays.scored import ScoredArray
from lmcompress.ops.linear import (
  DENSE,
  Rules,
  gathered_embed,
  or_pallas,
  over_tiles,
  register,
  tiled_attend,
  tiled_linear,
)

_SMALL_M = 8
"""Rows of x up to which a loop over groups beats tiles of outputs (measured, two AVX-512 cores)."""


def quantized_linear(x: jax.Array, w: QuantizedArray) -> jax.Array:
  """`x @ w`: a loop over blocks of the inputs for few rows, tiles of the outputs for many."""
  rows = 1
  for extent in x.shape[:-1]:
    rows *= extent
  if not _blocks_within_groups(w):
    return tiled_linear(x, w)
  return _block_linear(x, w) if rows <= _SMALL_M and isinstance(w.grid, Integer) else _part_linear(x, w)


def _group(w: QuantizedArray) -> int:
  return w.shape[-2] if w.group_size == -1 else w.group_size


def _blocks_within_groups(w: QuantizedArray) -> bool:
  block = w.codes.block
  return w.codes.data.ndim == 3 and block <= 256 and (_group(w) % block == 0 or w.scale.shape[-2] == 1)


@functools.partial(jax.jit, inline=False)
def _part_linear(x: jax.Array, w: QuantizedArray) -> jax.Array:
  """Tiles of outputs, the parts of all blocks multiplied apart: x is split once, no tile is put together.

  Low nibbles meet the first half of each block of x, high nibbles the second.
  """
  codes, (inputs, outputs) = w.codes, w.shape
  rows = jnp.pad(x.reshape(-1, inputs).astype(jnp.float32), ((0, 0), (0, codes.pad)))
  count = multiple(codes.bits)
  width = codes.block // count
  split = rows.reshape(rows.shape[0], codes.blocks, count, width)
  xs = [split[:, :, j].reshape(rows.shape[0], codes.blocks * width) for j in range(count)]
  scale, zero = w.scales(), w.zeros()

  def product(start: jax.Array, size: int) -> jax.Array:
    cut = functools.partial(cut_outputs, start=start, size=size, axis=-2)
    wide = functools.partial(per_block, axis=-2, blocks=codes.blocks, repeats=max(1, _group(w) // codes.block))
    decoded = functools.partial(affine, scale=wide(cut(scale)), zero=wide(cut(zero)), minimum=wide(cut(w.minimum)))
    parts = fields(codes.columns(start, size).data, codes.bits, -2)
    return sum(
      (xj @ decoded(w.grid.decode(part)).reshape(-1, size) for xj, part in zip(xs, parts, strict=True)),
      jnp.zeros((), jnp.float32),
    )

  return over_tiles(product, outputs).reshape(*x.shape[:-1], outputs).astype(x.dtype)


@functools.partial(jax.jit, inline=False)
def _block_linear(x: jax.Array, w: QuantizedArray) -> jax.Array:
  """Sums over blocks of the inputs: partial products with bare codes, scale and zero on the partial sum.

  The parts of a block (low and high nibbles) multiply apart; putting them side by side costs more than the
  product itself.
  """
  codes, (inputs, outputs) = w.codes, w.shape
  rows = x.reshape(-1, inputs).astype(jnp.float32)
  rows = jnp.pad(rows, ((0, 0), (0, codes.pad))).reshape(-1, codes.blocks, codes.block)
  scale = w.scales()
  offset = w.zeros() if w.zero_point is not None else None
  per_group = max(1, _group(w) // codes.block)
  assert isinstance(w.grid, Integer)
  bare = w.grid.offset

  def of_block(values: jax.Array | None, b: jax.Array) -> jax.Array:
    assert values is not None
    g = b // per_group if values.shape[0] > 1 else 0
    return jax.lax.dynamic_index_in_dim(values.astype(jnp.float32), g, 0, keepdims=False)

  def add(total: jax.Array, b: jax.Array) -> tuple[jax.Array, None]:
    xb = jax.lax.dynamic_index_in_dim(rows, b, 1, keepdims=False)
    data = jax.lax.dynamic_index_in_dim(codes.data, b, 0, keepdims=False)
    parts = fields(data, codes.bits, -2)
    width = codes.block // len(parts)
    partial = sum(xb[:, j * width : (j + 1) * width] @ part.astype(jnp.float32) for j, part in enumerate(parts))
    sums = jnp.sum(xb, axis=1, keepdims=True)
    if offset is not None:
      partial = (partial - sums * of_block(offset, b)) * of_block(scale, b)
    elif w.minimum is not None:
      partial = partial * of_block(scale, b) + sums * of_block(w.minimum, b)
    else:
      partial = (partial - sums * bare) * of_block(scale, b)
    return total + partial, None

  start = jnp.zeros((rows.shape[0], outputs), jnp.float32)
  total, _ = jax.lax.scan(jax.checkpoint(add), start, jnp.arange(codes.blocks, dtype=jnp.int32))
  return total.reshape(*x.shape[:-1], outputs).astype(x.dtype)


register(
  QuantizedArray, Rules(or_pallas(quantized_linear, "linear"), gathered_embed, or_pallas(tiled_attend, "attend"))
)
register(MaskedArray, Rules(tiled_linear, gathered_embed, tiled_attend))
for _training in (DirectionArray, FakeQuantArray, ScoredArray):
  register(
    _training,
    Rules(
      lambda x, w: DENSE.linear(x, w.materialize().astype(x.dtype)),
      gathered_embed,
      lambda x, w: DENSE.attend(x, w.materialize().astype(x.dtype)),
    ),
  )
