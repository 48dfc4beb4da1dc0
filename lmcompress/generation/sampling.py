"""Sampling: from logits to the next token, on the device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lmcompress import ops


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How the next token is drawn.

  Attributes:
    temperature: divides the logits; 0 is greedy.
    top_k: draws among the k likeliest; 0 is all.
    top_p: draws among the fewest tokens whose probability reaches p (Holtzman et al. 2019, arXiv:1904.09751).
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def check(self) -> None:
    """Raises ValueError for a setting out of range."""
    if not self.temperature >= 0:
      raise ValueError(f"temperature={self.temperature}: 0 for greedy, or positive")
    if self.top_k < 0:
      raise ValueError(f"top_k={self.top_k}: 0 for all tokens, or positive")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p={self.top_p}: above 0, at most 1")

  def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
    """Tokens `[batch]` int32 of `logits: [batch, vocab]`."""
    if self.temperature == 0:
      return ops.argmax(logits)
    logits = restrict(logits / self.temperature, self.top_k, self.top_p)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def restrict(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
  """Logits with everything outside the top k, then outside the top p, at minus infinity."""
  vocab = logits.shape[-1]
  if 0 < top_k < vocab:
    kth = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p < 1:
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    probability = jax.nn.softmax(ordered, axis=-1)
    kept = jnp.cumsum(probability, axis=-1) - probability < top_p  # the likeliest is always kept
    cut = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < cut, -jnp.inf, logits)
  return logits
