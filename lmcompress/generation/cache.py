"""The KV cache: keys and values of each block, laid out `[batch, kv heads, slots, head]`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress.generation.windowed import GROUP, WindowedCache, empty_windowed
from lmcompress.ops.attention import View, mix, rounded_through


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("k", "v", "k_scale", "v_scale"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class LayerCache:
  """Keys (after RoPE) and values of one block, dense or in codes; the form is the dtype of `k`.

  float32 and bfloat16 hold values. int8 holds codes with a scale for each token and head, `value == code * scale`,
  `scale == max(|x|) / 127`.

  Attributes:
    k, v: `[batch, kv, slots, head]`.
    k_scale, v_scale: float32 `[batch, kv, slots, 1]`; None for dense ones.
  """

  k: jax.Array
  v: jax.Array
  k_scale: jax.Array | None = None
  v_scale: jax.Array | None = None

  @property
  def buffers(self) -> tuple[jax.Array, ...]:
    """The arrays that there are: keys, values, and their scales."""
    return (self.k, self.v) if self.k_scale is None else (self.k, self.v, self.k_scale, self.v_scale)  # type: ignore

  @property
  def per_slot(self) -> tuple[jax.Array, ...]:
    """The arrays that grow with the slots: all of them."""
    return self.buffers

  def with_buffers(self, buffers: tuple[jax.Array, ...]) -> LayerCache:
    """The cache of new `buffers`."""
    return LayerCache(*buffers)

  def update(self, k: jax.Array, v: jax.Array, slot: Any) -> LayerCache:
    """Writes `[batch, kv, length, head]` at `slot`."""
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=2)
    if self.k_scale is None or self.v_scale is None:
      return LayerCache(write(self.k, k.astype(self.k.dtype)), write(self.v, v.astype(self.v.dtype)))
    (kc, ks), (vc, vs) = _to_int8(k), _to_int8(v)
    return LayerCache(write(self.k, kc), write(self.v, vc), write(self.k_scale, ks), write(self.v_scale, vs))

  def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, view: View, scale: float) -> tuple[jax.Array, LayerCache]:
    """Attention of `q: [batch, length, kv, group, head]` to what is held and to these tokens, which are added.

    Gradients pass through codes as if nothing were rounded.
    """
    cache = self.update(k, v, view.slot)
    keys, values = cache.keys(), cache.values()
    if self.k_scale is not None:
      put = lambda x: jax.lax.dynamic_update_slice_in_dim(  # noqa: E731
        jnp.zeros_like(keys), x.astype(keys.dtype), view.slot, axis=2
      )
      keys, values = rounded_through(keys, put(k)), rounded_through(values, put(v))
    return mix(q, keys, values, view.visible(), scale, view), cache

  def rollback(self, length: Any, written: Any) -> LayerCache:
    """The cache of the first `length` of `written` slots; what lies behind is written over."""
    return self

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


def _values(codes: jax.Array, scale: jax.Array | None) -> jax.Array:
  return codes if scale is None else codes.astype(jnp.float32) * scale


@functools.partial(jax.tree_util.register_dataclass, data_fields=("layers", "real", "length"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class KVCache:
  """What a model has read: a cache per block path, which slots hold real tokens, how many are filled.

  Sequences of a batch share slots; padding occupies slots that are not real and are never looked at.
  """

  layers: dict[str, LayerCache | WindowedCache]
  real: jax.Array
  length: jax.Array

  def reserve(self, mask: jax.Array) -> KVCache:
    """Marks the next slots as real where `mask: [batch, length]` is."""
    real = jax.lax.dynamic_update_slice_in_dim(self.real, mask, self.length, axis=1)
    return dataclasses.replace(self, real=real)

  def positions(self, length: int) -> jax.Array:
    """Positions `[batch, length]` of the next tokens: how many real ones stand before each."""
    return jax.lax.dynamic_slice_in_dim(jnp.maximum(jnp.cumsum(self.real, axis=1) - 1, 0), self.length, length, axis=1)

  def layer(self, path: str) -> LayerCache | WindowedCache:
    return self.layers[path]

  def with_layer(self, path: str, layer: LayerCache | WindowedCache) -> KVCache:
    return dataclasses.replace(self, layers={**self.layers, path: layer})

  def advance(self, length: int) -> KVCache:
    """Counts `length` more slots as filled."""
    return dataclasses.replace(self, length=self.length + length)

  def rollback(self, n: Any) -> KVCache:
    """Forgets the last `n` slots."""
    length, slots = self.length - n, jnp.arange(self.real.shape[1])
    filled = jnp.any(self.real, axis=0) & (slots < self.length)
    written = jnp.max(jnp.where(filled, slots + 1, 0))  # what padding takes pushes nothing out of a window
    layers = {path: layer.rollback(length, written) for path, layer in self.layers.items()}
    return dataclasses.replace(self, layers=layers, length=length, real=self.real & (slots < length)[None])


CACHE_DTYPES = ("float32", "bfloat16", "int8", "int4")


def init_cache(model: Any, params: Any, batch: int, slots: int, dtype: Any = jnp.float32) -> KVCache:
  """An empty cache for `batch` sequences of up to `slots` tokens.

  Args:
    dtype: of keys and values: float32, bfloat16, int8 (`LayerCache`) or "int4" (`WindowedCache`, slots rounded up to
      whole groups); a recurrent model's state is float32 always.

  Raises:
    ValueError: the dtype is none of these, or a head is odd and cannot hold two codes a byte.
  """
  name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
  if name not in CACHE_DTYPES:
    raise ValueError(f"init_cache(dtype={name}): a cache is one of {', '.join(CACHE_DTYPES)}")
  if name == "int4":
    slots = GROUP * -(-slots // GROUP)

  def layer(kv: int, head: int) -> LayerCache | WindowedCache:
    if name == "int4":
      return empty_windowed(batch, kv, slots, head)
    codes = [jnp.zeros((batch, kv, slots, head), name) for _ in range(2)]
    return LayerCache(*codes, *(jnp.zeros((batch, kv, slots, 1), jnp.float32) for _ in range(2) if name == "int8"))

  if hasattr(model, "states"):  # a recurrent model remembers the same whatever it has read
    layers = model.states(params, batch)
  else:
    layers = {path: layer(kv, head) for path, (kv, head) in model.cache_shapes(params).items()}
  return KVCache(layers, jnp.zeros((batch, slots), bool), jnp.int32(0))
