"""Reference products of quantized and masked weights, in plain JAX, never more than a tile dense."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lmcompress.arrays.grids import Integer
from lmcompress.arrays.masked import MaskedArray
from lmcompress.arrays.packing import fields
from lmcompress.arrays.quantized import QuantizedArray
from lmcompress.ops.linear import Rules, gathered_embed, register, tiled_attend, tiled_linear

_SMALL_M = 8
"""Rows of x up to which a loop over groups beats tiles of outputs (measured, two AVX-512 cores)."""


def quantized_linear(x: jax.Array, w: QuantizedArray) -> jax.Array:
  """`x @ w`: a loop over blocks of the inputs for few rows, tiles of the outputs for many."""
  rows = 1
  for extent in x.shape[:-1]:
    rows *= extent
  return _block_linear(x, w) if rows <= _SMALL_M and _loops_over_blocks(w) else tiled_linear(x, w)


def _loops_over_blocks(w: QuantizedArray) -> bool:
  block, inputs = w.codes.block, w.shape[-2]
  group = inputs if w.group_size == -1 else w.group_size
  return (
    isinstance(w.grid, Integer)
    and w.codes.data.ndim == 3
    and block <= 256
    and (group % block == 0 or w.scale.shape[-2] == 1)
  )


@functools.partial(jax.jit, inline=False)
def _block_linear(x: jax.Array, w: QuantizedArray) -> jax.Array:
  """Sums over blocks of the inputs: partial products with bare codes, scale and zero on the partial sum.

  The parts of a block (low and high nibbles) multiply apart; putting them side by side costs more than the
  product itself.
  """
  codes, (inputs, outputs) = w.codes, w.shape
  rows = x.reshape(-1, inputs).astype(jnp.float32)
  rows = jnp.pad(rows, ((0, 0), (0, codes.pad))).reshape(-1, codes.blocks, codes.block)
  group = inputs if w.group_size == -1 else w.group_size
  scale = w._scale()
  offset = w._zero() if w.zero_point is not None else None
  per_group = max(1, group // codes.block)
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


register(QuantizedArray, Rules(quantized_linear, gathered_embed, tiled_attend))
register(MaskedArray, Rules(tiled_linear, gathered_embed, tiled_attend))
