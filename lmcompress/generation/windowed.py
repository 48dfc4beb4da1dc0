"""WindowedCache: old keys and values in 4 bits, the recent ones as they are (KIVI)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress.ops.attention import View, mix, mix_parts, rounded_through

GROUP = 32
"""Tokens of which each channel of the keys shares a scale."""
WINDOW = 32
"""Tokens before the current group that are kept as they are, at least."""
RING = WINDOW + 2 * GROUP
"""Tokens that there is room for as they are: so many that up to a group may be rolled back."""


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("k", "v", "k_scale", "v_scale", "k_recent", "v_recent"),
  meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class WindowedCache:
  """Keys (after RoPE) and values of one block, in 4 bits but for the recent ones (Liu et al. 2024, arXiv:2402.02750).

  Keys have outlier channels, so a group of 32 tokens shares a scale for each channel; values have a scale for each
  token. A token at slot t sees codes of slots below `max(0, t // 32 * 32 - 32)` and the values from there on, however
  many tokens are read at once. `value == code * scale + minimum`, `scale == (max - min) / 15`; two codes share a byte,
  low nibbles the first half of a head.

  Attributes:
    k, v: uint8 `[batch, kv, slots, head / 2]`.
    k_scale: bfloat16 `[batch, kv, slots / 32, 2, head]`, scale and minimum.
    v_scale: float32 `[batch, kv, slots, 2]`, scale and minimum.
    k_recent, v_recent: bfloat16 `[batch, kv, 96, head]`, slot s at `s % 96`; slots without a token push nothing out.
  """

  k: jax.Array
  v: jax.Array
  k_scale: jax.Array
  v_scale: jax.Array
  k_recent: jax.Array
  v_recent: jax.Array

  @property
  def buffers(self) -> tuple[jax.Array, ...]:
    """The arrays, in the order in which the kernel takes them."""
    return self.k, self.v, self.k_scale, self.v_scale, self.k_recent, self.v_recent

  @property
  def per_slot(self) -> tuple[jax.Array, ...]:
    """The arrays that grow with the slots: all but the recent values."""
    return self.buffers[:4]

  def with_buffers(self, buffers: tuple[jax.Array, ...]) -> WindowedCache:
    """The cache of new `buffers`."""
    return WindowedCache(*buffers)

  def attend(
    self, q: jax.Array, k: jax.Array, v: jax.Array, view: View, scale: float
  ) -> tuple[jax.Array, WindowedCache]:
    """Attention of `q: [batch, length, kv, group, head]` to what is held and to these tokens, which are added.

    Gradients pass through codes as if nothing were rounded.

    Args:
      k, v: `[batch, kv, length, head]`.
    """
    length, slots = k.shape[2], jnp.arange(self.k.shape[2])
    before, after, real = _coded(view.slot), _coded(view.slot + length), jnp.any(view.real, axis=0)
    keys, values = (
      _placed(codes, recent, new, view.slot, before)
      for codes, recent, new in ((self.keys(), self.k_recent, k), (self.values(), self.v_recent, v))
    )
    encoded = functools.partial(self._encoded, keys, values, before, after, real)
    if length == 1:
      mixed = mix(q, keys, values, view.visible(), scale, view)
      cache = jax.lax.cond(after > before, encoded, lambda: self)
    else:
      cache, seen = encoded(), view.visible()
      old = slots < _coded(view.slot + jnp.arange(length)[:, None])
      coded = rounded_through(cache.keys(), keys), rounded_through(cache.values(), values)
      mixed = mix_parts(q, [(*coded, seen & old), (keys, values, seen & ~old)], scale, view)
    new = (slots >= view.slot) & (slots < view.slot + length)
    return mixed, cache._remembered(keys, values, new & real)

  def rollback(self, length: Any, written: Any) -> WindowedCache:
    """The cache of the first `length` of `written` slots; recent ones that were pushed out come back from codes."""

    def restored() -> WindowedCache:
      slots = jnp.arange(self.k.shape[2])
      lost = (slots >= length - RING) & (slots < length) & (slots < written - RING)
      return self._remembered(self.keys(), self.values(), lost)

    return jax.lax.cond(written - length > GROUP, restored, lambda: self)

  def keys(self) -> jax.Array:
    """float32 `[batch, kv, slots, head]` of the codes; of slots that are not coded yet, anything."""
    codes = _wide(self.k)
    scale = jnp.repeat(self.k_scale.astype(jnp.float32), GROUP, axis=2)
    return codes * scale[:, :, :, 0] + scale[:, :, :, 1]

  def values(self) -> jax.Array:
    """float32 `[batch, kv, slots, head]` of the codes; of slots that are not coded yet, anything."""
    return _wide(self.v) * self.v_scale[..., :1] + self.v_scale[..., 1:]

  def _encoded(self, keys: jax.Array, values: jax.Array, first: Any, last: Any, real: jax.Array) -> WindowedCache:
    """Codes of slots from `first` to `last`, whole groups, of `keys` and `values: [batch, kv, slots, head]`.

    Slots that are not `real: [slots]` stretch no scale.
    """
    batch, kv, slots, head = keys.shape
    groups, token = keys.reshape(batch, kv, -1, GROUP, head), real.reshape(-1, GROUP, 1)
    low = jnp.min(jnp.where(token, groups, jnp.inf), axis=3).astype(jnp.bfloat16).astype(jnp.float32)
    reach = (jnp.max(jnp.where(token, groups, -jnp.inf), axis=3) - low) / 15
    k_scale = jnp.where(reach <= 0, 1.0, reach).astype(jnp.bfloat16).astype(jnp.float32)
    k = _codes(groups, low[:, :, :, None], k_scale[:, :, :, None])
    v_low, v_high = jnp.min(values, axis=-1, keepdims=True), jnp.max(values, axis=-1, keepdims=True)
    v_scale = jnp.where(v_high <= v_low, 1.0, (v_high - v_low) / 15)
    v = _codes(values, v_low, v_scale)
    at = jnp.arange(slots)
    here = ((at >= first) & (at < last))[:, None]
    each = (here[::GROUP] & jnp.any(token, axis=1))[:, :, None]
    channels = jnp.stack([k_scale, low], axis=3).astype(jnp.bfloat16)
    return dataclasses.replace(
      self,
      k=jnp.where(here, _narrow(k.reshape(keys.shape)), self.k),
      v=jnp.where(here, _narrow(v), self.v),
      k_scale=jnp.where(each, channels, self.k_scale),
      v_scale=jnp.where(here, jnp.concatenate([v_scale, v_low], axis=-1), self.v_scale),
    )

  def _remembered(self, keys: jax.Array, values: jax.Array, kept: jax.Array) -> WindowedCache:
    """The last of the slots that `kept: [slots]` marks, as they are."""
    slots = jnp.arange(kept.shape[0])
    newest = jax.ops.segment_max(jnp.where(kept, slots, -1), slots % RING, RING)  # for each place of the ring

    def put(recent: jax.Array, dense: jax.Array) -> jax.Array:
      new = jnp.take(dense, jnp.maximum(newest, 0), axis=2).astype(recent.dtype)
      return jnp.where((newest >= 0)[:, None], new, recent)

    return dataclasses.replace(self, k_recent=put(self.k_recent, keys), v_recent=put(self.v_recent, values))


def _coded(slot: Any) -> Any:
  """The first slot that a token at `slot` sees as it is."""
  return jnp.maximum(slot // GROUP * GROUP - WINDOW, 0)


def _placed(codes: jax.Array, recent: jax.Array, new: jax.Array, slot: Any, coded: Any) -> jax.Array:
  """float32 `[batch, kv, slots, head]`: codes' values below `coded`, the ring's up to `slot`, then the new ones."""
  slots = jnp.arange(codes.shape[2])
  ring = jnp.take(recent, slots % RING, axis=2).astype(jnp.float32)
  held = jnp.where((slots < coded)[:, None], codes, ring)
  return jax.lax.dynamic_update_slice_in_dim(held, new.astype(recent.dtype).astype(jnp.float32), slot, axis=2)


def _codes(x: jax.Array, low: jax.Array, scale: jax.Array) -> jax.Array:
  return jnp.clip(jnp.round((x - low) / scale), 0, 15).astype(jnp.uint8)


def _narrow(codes: jax.Array) -> jax.Array:
  first, second = jnp.split(codes, 2, axis=-1)
  return first | second << 4


def _wide(codes: jax.Array) -> jax.Array:
  return jnp.concatenate([codes & 15, codes >> 4], axis=-1).astype(jnp.float32)


def empty_windowed(batch: int, kv: int, slots: int, head: int) -> WindowedCache:
  """An empty cache of `slots`, a multiple of 32.

  Raises:
    ValueError: a head is odd.
  """
  if head % 2:
    raise ValueError(f"init_cache(dtype=int4): a head of {head} is odd; two codes share a byte")
  return WindowedCache(
    k=jnp.zeros((batch, kv, slots, head // 2), jnp.uint8),
    v=jnp.zeros((batch, kv, slots, head // 2), jnp.uint8),
    k_scale=jnp.zeros((batch, kv, slots // GROUP, 2, head), jnp.bfloat16),
    v_scale=jnp.zeros((batch, kv, slots, 2), jnp.float32),
    k_recent=jnp.zeros((batch, kv, RING, head), jnp.bfloat16),
    v_recent=jnp.zeros((batch, kv, RING, head), jnp.bfloat16),
  )
