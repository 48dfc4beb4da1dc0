"""The KV cache: keys and values of each block, laid out `[batch, kv heads, slots, head]`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("k", "v", "k_scale", "v_scale"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class LayerCache:
  """Keys (after RoPE) and values of one block, dense or in codes; the form is the dtype of `k`.

  float32 and bfloat16 hold values. int8 holds codes with a scale for each token and head, `value == code * scale`,
  `scale == max(|x|) / 127`. uint8 holds two 4-bit codes a byte (low nibbles the first half of a head), with a scale
  and a minimum, `value == code * scale + minimum`, `scale == (max - min) / 15`.

  Attributes:
    k, v: `[batch, kv, slots, head]` (`head / 2` for 4-bit codes).
    k_scale, v_scale: float32 `[batch, kv, slots, 1]`, `[..., 2]` for 4-bit codes; None for dense ones.
  """

  k: jax.Array
  v: jax.Array
  k_scale: jax.Array | None = None
  v_scale: jax.Array | None = None

  @property
  def buffers(self) -> tuple[jax.Array, ...]:
    """The arrays that there are: keys, values, and their scales."""
    return (self.k, self.v) if self.k_scale is None else (self.k, self.v, self.k_scale, self.v_scale)  # type: ignore

  def with_buffers(self, buffers: tuple[jax.Array, ...]) -> LayerCache:
    """The cache of new `buffers`."""
    return LayerCache(*buffers)

  def update(self, k: jax.Array, v: jax.Array, slot: Any) -> LayerCache:
    """Writes `[batch, kv, length, head]` at `slot`."""
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=2)
    if self.k_scale is None or self.v_scale is None:
      return LayerCache(write(self.k, k.astype(self.k.dtype)), write(self.v, v.astype(self.v.dtype)))
    encode = _to_int8 if self.k.dtype == jnp.int8 else _to_int4
    (kc, ks), (vc, vs) = encode(k), encode(v)
    return LayerCache(write(self.k, kc), write(self.v, vc), write(self.k_scale, ks), write(self.v_scale, vs))

  def keys(self) -> jax.Array:
    """`[batch, kv, slots, head]`."""
    return _values(self.k, self.k_scale)

  def values(self) -> jax.Array:
    """`[batch, kv, slots, head]`."""
    return _values(self.v, self.v_scale)


def _to_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  x = x.astype(jnp.float32)
  amax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
  scale = jnp.where(amax == 0, 1.0, amax / 127)  # a NaN stays one, in the scale
  return jnp.round(x * jnp.where(amax == 0, 0.0, 127 / amax)).astype(jnp.int8), scale


def _to_int4(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  x = x.astype(jnp.float32)
  low, high = jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True)
  scale = jnp.where(high > low, (high - low) / 15, 1.0)
  codes = jnp.round((x - low) / scale).astype(jnp.uint8)
  first, second = jnp.split(codes, 2, axis=-1)
  return first | second << 4, jnp.concatenate([scale, low], axis=-1)


def _values(codes: jax.Array, scale: jax.Array | None) -> jax.Array:
  if scale is None:
    return codes
  if codes.dtype == jnp.int8:
    return codes.astype(jnp.float32) * scale
  wide = jnp.concatenate([codes & 15, codes >> 4], axis=-1).astype(jnp.float32)
  return wide * scale[..., :1] + scale[..., 1:]


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


CACHE_DTYPES = ("float32", "bfloat16", "int8", "int4")


def init_cache(model: Any, params: Any, batch: int, slots: int, dtype: Any = jnp.float32) -> KVCache:
  """An empty cache for `batch` sequences of up to `slots` tokens.

  Args:
    dtype: float32, bfloat16, int8 or "int4" (see `LayerCache`).

  Raises:
    ValueError: the dtype is none of these, or a head is odd and cannot hold two codes a byte.
  """
  name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
  if name not in CACHE_DTYPES:
    raise ValueError(f"init_cache(dtype={name}): a cache is one of {', '.join(CACHE_DTYPES)}")

  def layer(kv: int, head: int) -> LayerCache:
    if name in ("float32", "bfloat16"):
      return LayerCache(*(jnp.zeros((batch, kv, slots, head), name) for _ in range(2)))
    if name == "int4" and head % 2:
      raise ValueError(f"init_cache(dtype=int4): a head of {head} is odd; two codes share a byte")
    shape, parts = ((head,), 1) if name == "int8" else ((head // 2,), 2)
    codes = [jnp.zeros((batch, kv, slots, *shape), jnp.int8 if name == "int8" else jnp.uint8) for _ in range(2)]
    return LayerCache(*codes, *(jnp.zeros((batch, kv, slots, parts), jnp.float32) for _ in range(2)))

  layers = {path: layer(kv, head) for path, (kv, head) in model.cache_shapes(params).items()}
  return KVCache(layers, jnp.zeros((batch, slots), bool), jnp.int32(0))
