"""The KV cache: keys and values of each block, laid out `[batch, kv heads, slots, head]`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=("k", "v"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class LayerCache:
  """Keys and values of one block, dense float32 or bfloat16, keys after RoPE."""

  k: jax.Array
  v: jax.Array

  def update(self, k: jax.Array, v: jax.Array, slot: jax.Array) -> LayerCache:
    """Writes `[batch, kv, length, head]` at `slot`."""
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=2)
    return LayerCache(write(self.k, k.astype(self.k.dtype)), write(self.v, v.astype(self.v.dtype)))

  def keys(self) -> jax.Array:
    return self.k

  def values(self) -> jax.Array:
    return self.v


@functools.partial(jax.tree_util.register_dataclass, data_fields=("layers", "real", "length"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class KVCache:
  """What a model has read: a `LayerCache` per block path, which slots hold real tokens, how many are filled.

  Sequences of a batch share slots; padding occupies slots that are not real and are never looked at.
  """

  layers: dict[str, LayerCache]
  real: jax.Array
  length: jax.Array

  def reserve(self, mask: jax.Array) -> KVCache:
    """Marks the next slots as real where `mask: [batch, length]` is."""
    real = jax.lax.dynamic_update_slice_in_dim(self.real, mask, self.length, axis=1)
    return dataclasses.replace(self, real=real)

  def positions(self, length: int) -> jax.Array:
    """Positions `[batch, length]` of the next tokens: how many real ones stand before each."""
    return jax.lax.dynamic_slice_in_dim(jnp.maximum(jnp.cumsum(self.real, axis=1) - 1, 0), self.length, length, axis=1)

  def visible(self, length: int) -> jax.Array:
    """`[batch, length, slots]`: real slots up to each of the next tokens."""
    slots = jnp.arange(self.real.shape[1])
    past = slots[None, :] <= self.length + jnp.arange(length)[:, None]
    return past[None] & self.real[:, None, :]

  def layer(self, path: str) -> LayerCache:
    return self.layers[path]

  def with_layer(self, path: str, layer: LayerCache) -> KVCache:
    return dataclasses.replace(self, layers={**self.layers, path: layer})

  def advance(self, length: int) -> KVCache:
    """Counts `length` more slots as filled."""
    return dataclasses.replace(self, length=self.length + length)

  def rollback(self, n: Any) -> KVCache:
    """Forgets the last `n` slots."""
    length = self.length - n
    return dataclasses.replace(self, length=length, real=self.real & (jnp.arange(self.real.shape[1]) < length)[None])


def init_cache(model: Any, params: Any, batch: int, slots: int, dtype: Any = jnp.float32) -> KVCache:
  """An empty cache for `batch` sequences of up to `slots` tokens.

  Raises:
    ValueError: the dtype is neither float32 nor bfloat16.
  """
  if jnp.dtype(dtype) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
    raise ValueError(f"init_cache(dtype={dtype}): a dense cache is float32 or bfloat16")
  layers = {
    path: LayerCache(*(jnp.zeros((batch, kv, slots, head), dtype) for _ in range(2)))
    for path, (kv, head) in model.cache_shapes(params).items()
  }
  return KVCache(layers, jnp.zeros((batch, slots), bool), jnp.int32(0))
