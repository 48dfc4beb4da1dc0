"""Products in steps: through the rank of a low-rank weight, after what is done to an input, and part by part."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lmcompress.arrays import parts
from lmcompress.arrays.gated import GatedArray
from lmcompress.arrays.input import InputArray, Threshold
from lmcompress.arrays.learned_input import LearnedInputArray
from lmcompress.arrays.low_rank import LowRankArray
from lmcompress.arrays.outliers import OutlierArray
from lmcompress.arrays.split import SplitArray
from lmcompress.arrays.sum import SumArray
from lmcompress.ops.elementwise import is_native, with_gradients
from lmcompress.ops.linear import TILE, Rules, attend, embed, gathered_embed, linear, register
from lmcompress.types import CompressedArray

_FEW = 2
"""Rows of an input of which each reads its own part of a weight; for more, the parts overlap and all of it is read."""


def low_rank_linear(x: jax.Array, w: LowRankArray) -> jax.Array:
  """`(x @ left) @ right`, float32 in between."""
  return linear(linear(x.astype(jnp.float32), w.left), w.right).astype(x.dtype)


def low_rank_attend(x: jax.Array, w: LowRankArray) -> jax.Array:
  """`(x @ right.T) @ left.T`, float32 in between."""
  return attend(attend(x.astype(jnp.float32), w.right), w.left).astype(x.dtype)


def low_rank_embed(ids: jax.Array, w: LowRankArray) -> jax.Array:
  """The rows of `left`, times `right`."""
  rows = parts.rows(w.left, ids)
  return _times_table(rows.reshape(-1, w.rank), w.right).reshape(*ids.shape, w.shape[-1]).astype(w.dtype)


def _times_table(x: jax.Array, table: Any) -> jax.Array:
  """`x @ table` for `x: [m, rank]`: against a table's grain, so tiles of its rows are added up."""
  if not isinstance(table, CompressedArray):
    return jnp.matmul(x, table.astype(jnp.float32))
  rank, features = table.shape
  tile = min(TILE, rank)

  def product(start: Any, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, 1) @ table.columns(start, size)

  def add(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
    return total + product(start, tile), None

  zeros = jnp.zeros((x.shape[0], features), jnp.float32)
  starts = jnp.arange(rank // tile, dtype=jnp.int32) * tile
  total, _ = jax.lax.scan(jax.checkpoint(add), zeros, starts)
  return total + product(rank - rank % tile, rank % tile) if rank % tile else total


def input_linear(x: jax.Array, w: InputArray) -> jax.Array:
  """`linear(act(x), weight)`, float32 from the act on; for a row or two, what a zero input meets is not read."""
  acted = w.act(x)
  rows = x.size // max(x.shape[-1], 1)
  if not isinstance(w.act, Threshold) or rows > _FEW or not is_native(acted, w.weight):
    return linear(acted, w.weight).astype(x.dtype)
  from lmcompress.ops.kernels import cpu

  product = with_gradients(cpu.sparse_linear, jnp.matmul)
  y = product(acted.reshape(rows, x.shape[-1]), w.weight)
  return y.reshape(*x.shape[:-1], w.shape[-1]).astype(x.dtype)


def input_attend(x: jax.Array, w: InputArray) -> jax.Array:
  """`attend(act(x), weight)`, float32 from the act on."""
  return attend(w.act(x), w.weight).astype(x.dtype)


def input_embed(ids: jax.Array, w: InputArray) -> jax.Array:
  """The weight's rows; ids are not acted on."""
  return embed(ids, w.weight)


def _apart(x: jax.Array, w: SplitArray) -> tuple[jax.Array, jax.Array]:
  """The input less the channels that are kept apart, and those channels."""
  few = jnp.take(x, w.channels, axis=-1)
  return x.at[..., w.channels].set(0), few


def split_linear(x: jax.Array, w: SplitArray) -> jax.Array:
  """Two products, added up in float32."""
  rest, few = _apart(x.astype(jnp.float32), w)
  return (linear(rest, w.base) + linear(few, w.outliers)).astype(x.dtype)


def split_attend(x: jax.Array, w: SplitArray) -> jax.Array:
  """Two products, added up in float32."""
  rest, few = _apart(x.astype(jnp.float32), w)
  return (attend(rest, w.base) + attend(few, w.outliers)).astype(x.dtype)


def split_embed(ids: jax.Array, w: SplitArray) -> jax.Array:
  """The base's rows with the channels kept apart in their place."""
  return embed(ids, w.base).at[..., w.channels].set(embed(ids, w.outliers).astype(w.dtype))


def sum_linear(x: jax.Array, w: SumArray) -> jax.Array:
  """Two products of one input, added up in float32."""
  x32 = x.astype(jnp.float32)
  return (linear(x32, w.base) + linear(x32, w.delta)).astype(x.dtype)


def sum_attend(x: jax.Array, w: SumArray) -> jax.Array:
  """Two products of one input, added up in float32."""
  x32 = x.astype(jnp.float32)
  return (attend(x32, w.base) + attend(x32, w.delta)).astype(x.dtype)


def sum_embed(ids: jax.Array, w: SumArray) -> jax.Array:
  """Rows of both parts, added up."""
  return (embed(ids, w.base).astype(jnp.float32) + embed(ids, w.delta).astype(jnp.float32)).astype(w.dtype)


def _few(x: jax.Array, w: OutlierArray) -> jax.Array:
  """`y[o] == sum_k x[indices[k, o]] values[k, o]`, one k at a time, so that nothing is as large as a weight."""
  rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  indices, values = (jnp.moveaxis(part, w.axis, 0) for part in (w.indices.astype(jnp.int32), w.values))

  def add(total: jax.Array, one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    return total + rows[:, one[0]] * one[1].astype(jnp.float32), None

  zeros = jnp.zeros((rows.shape[0], indices.shape[1]), jnp.float32)
  total, _ = jax.lax.scan(add, zeros, (indices, values))
  return total.reshape(*x.shape[:-1], zeros.shape[1]).astype(x.dtype)


register(SumArray, Rules(sum_linear, sum_embed, sum_attend))
register(OutlierArray, Rules(_few, gathered_embed, _few))
register(SplitArray, Rules(split_linear, split_embed, split_attend))
register(LowRankArray, Rules(low_rank_linear, low_rank_embed, low_rank_attend))
register(
  LearnedInputArray,
  Rules(
    lambda x, w: linear(w.rounded(x), w.weight).astype(x.dtype),
    lambda ids, w: embed(ids, w.weight),
    lambda x, w: attend(w.rounded(x), w.weight).astype(x.dtype),
  ),
)
register(
  GatedArray,
  Rules(
    lambda x, w: linear(w.let_through(x), w.weight).astype(x.dtype),
    gathered_embed,
    lambda x, w: attend(w.let_through(x), w.weight).astype(x.dtype),
  ),
)
register(InputArray, Rules(input_linear, input_embed, input_attend))
