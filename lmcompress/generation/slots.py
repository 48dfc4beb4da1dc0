"""Slots of a KV cache as data: kept in part, copied out and in, packed; for any cache whose arrays have slots."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmcompress.generation.cache import KVCache, init_cache
from lmcompress.types import Params


class Axes(NamedTuple):
  """Where an array of a cache counts sequences and slots.

  Attributes:
    batch: axis of the sequences.
    slots: axis of the slots.
    per: slots that share one entry along that axis (1, or a group's size for its scales).
  """

  batch: int
  slots: int
  per: int


def slot_axes(model: Any, params: Params, dtype: Any) -> tuple[Axes, ...]:
  """The axes of each array in `init_cache(model, params, ..., dtype).layers`, found by making it in other sizes.

  Raises:
    ValueError: an array has no axis of its own for sequences or for slots.
  """
  few, many = 256, 512
  plain, wide, long = (
    jax.tree.leaves(jax.eval_shape(lambda b=batch, s=slots: init_cache(model, params, b, s, dtype)).layers)
    for batch, slots in ((1, few), (2, few), (1, many))
  )
  found = []
  for a, b, c in zip(plain, wide, long, strict=True):
    batch = [i for i in range(a.ndim) if a.shape[i] != b.shape[i]]
    slots = [i for i in range(a.ndim) if a.shape[i] != c.shape[i]]
    if len(batch) != 1 or len(slots) != 1 or few % a.shape[slots[0]]:
      raise ValueError(
        f"cache dtype {dtype}: an array {list(a.shape)} of it has no slots that could be copied; "
        "use a float32, bfloat16 or int8 cache here"
      )
    found.append(Axes(batch[0], slots[0], few // a.shape[slots[0]]))
  return tuple(found)


def keep(cache: KVCache, read: int, kept: jax.Array) -> KVCache:
  """Of the last `read` slots keeps the first `kept: [batch]` of each sequence.

  Slots that no sequence keeps are rolled back; a sequence that keeps fewer than another has slots that are not
  real, which nobody looks at and which count in no position.
  """
  slots = jnp.arange(cache.real.shape[1])
  real = cache.real & (slots < cache.length - read + kept[:, None])
  return dataclasses.replace(cache, real=real).rollback(read - jnp.max(kept))


@functools.partial(jax.jit, static_argnames=("axes",), donate_argnames=("cache",))
def pack(cache: KVCache, axes: tuple[Axes, ...]) -> KVCache:
  """Moves every sequence's real slots to the front, in order; holes become free slots again. Donates the cache."""
  order = jnp.argsort(~cache.real, axis=1, stable=True)
  leaves, tree = jax.tree.flatten(cache.layers)

  def moved(leaf: jax.Array, where: Axes) -> jax.Array:
    rows = jnp.moveaxis(leaf, (where.batch, where.slots), (0, 1))
    rows = jnp.take_along_axis(rows, order.reshape(*order.shape, *(1,) * (rows.ndim - 2)), axis=1)
    return jnp.moveaxis(rows, (0, 1), (where.batch, where.slots))

  layers = jax.tree.unflatten(tree, [moved(leaf, where) for leaf, where in zip(leaves, axes, strict=True)])
  counts = jnp.sum(cache.real, axis=1)
  real = jnp.arange(cache.real.shape[1]) < counts[:, None]
  return dataclasses.replace(cache, layers=layers, real=real, length=jnp.max(counts).astype(cache.length.dtype))


@functools.partial(jax.jit, static_argnames=("axes", "width"))
def cut(cache: KVCache, row: jax.Array | int, axes: tuple[Axes, ...], width: int) -> list[jax.Array]:
  """A copy of the first `width` slots of one sequence: the arrays of `cache.layers`, a batch of one each."""
  return [
    jax.lax.dynamic_slice_in_dim(
      jax.lax.dynamic_slice_in_dim(leaf, row, 1, where.batch), 0, -(-width // where.per), where.slots
    )
    for leaf, where in zip(jax.tree.leaves(cache.layers), axes, strict=True)
  ]


@functools.partial(jax.jit, static_argnames=("axes", "width"), donate_argnames=("cache",))
def paste(
  cache: KVCache, row: jax.Array | int, piece: list[jax.Array], real: jax.Array, axes: tuple[Axes, ...], width: int
) -> KVCache:
  """Puts the first `width` slots of a `cut` at the front of one sequence; `real: [width]`. Donates the cache."""
  leaves, tree = jax.tree.flatten(cache.layers)

  def put(leaf: jax.Array, part: jax.Array, where: Axes) -> jax.Array:
    part = jax.lax.slice_in_dim(part, 0, -(-width // where.per), axis=where.slots)
    return jax.lax.dynamic_update_slice_in_dim(leaf, part, row, axis=where.batch)

  layers = jax.tree.unflatten(tree, [put(*parts) for parts in zip(leaves, piece, axes, strict=True)])
  marks = jax.lax.dynamic_update_slice(cache.real, real[None], (row, 0))
  return dataclasses.replace(cache, layers=layers, real=marks)
