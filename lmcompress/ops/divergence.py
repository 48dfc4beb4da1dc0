"""How far two predictions are apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.jit
def divergence(want: jax.Array, logits: jax.Array) -> jax.Array:
  """The mean over tokens of `KL(want || softmax(logits))`, nats; `want: [..., vocab]` are log-probabilities."""
  said = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  return jnp.mean(jnp.sum(jnp.exp(want) * (want - said), axis=-1))
