"""How far two predictions are apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def kl(p: jax.Array, q: jax.Array) -> jax.Array:
  """`KL(p || q)` of log-probabilities `[..., vocab]`, nats `[...]`; what p never says counts nothing."""
  return jnp.sum(jnp.where(p == -jnp.inf, 0.0, jnp.exp(p) * (p - q)), axis=-1)


@jax.jit
def divergence(want: jax.Array, logits: jax.Array) -> jax.Array:
  """The mean over tokens of `KL(want || softmax(logits))`, nats; `want: [..., vocab]` are log-probabilities."""
  said = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  return jnp.mean(kl(want, said))
