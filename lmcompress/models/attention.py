"""Scaled dot-product attention with grouped queries, over the current tokens or over a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, scale: float) -> jax.Array:
  """Softmax attention in float32.

  Args:
    q: `[batch, length, kv, group, head]`.
    k, v: `[batch, kv, slots, head]`.
    visible: bool `[batch, length, slots]`, True where a query may look.
    scale: factor on the scores.

  Returns:
    `[batch, length, kv * group * head]` in the dtype of `q`.
  """
  scores = jnp.einsum("btkgh,bksh->bkgts", q * scale, k.astype(q.dtype), preferred_element_type=jnp.float32)
  scores = jnp.where(visible[:, None, None], scores, -1e30)
  weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
  out = jnp.einsum("bkgts,bksh->btkgh", weights, v.astype(q.dtype), preferred_element_type=jnp.float32)
  return out.reshape(*out.shape[:2], -1).astype(q.dtype)


def causal(mask: jax.Array) -> jax.Array:
  """What each token sees of its own sequence: `[batch, length, length]`, of `mask: [batch, length]`, True if real."""
  length = mask.shape[1]
  past = jnp.arange(length)[None, :] <= jnp.arange(length)[:, None]
  return past[None] & mask[:, None, :]
