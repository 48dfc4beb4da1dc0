"""Rotary position embeddings and their scaling variants."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
  """How positions turn queries and keys (Su et al. 2021, arXiv:2104.09864).

  Attributes:
    theta: base of the frequencies.
    kind: `default`, `linear` (positions divided by the factor), `dynamic` (NTK-aware base that grows with
      the length), `llama3` (long wavelengths scaled, short ones kept), `yarn` (arXiv:2309.00071), or `longrope`
      (arXiv:2402.13753: frequencies divided by `factors`, and in texts over the original length by `long`).
    factor: how much longer the context is than the original.
    original_length: positions that the model was trained on before scaling.
    low, high: `llama3`'s frequency factors, or `yarn`'s slow and fast rotations (beta_slow, beta_fast).
    attention_factor: scale of cos and sin of `yarn` and `longrope`; None computes it.
    truncate: whether `yarn` rounds the ends of its ramp to whole dimensions.
    factors: per frequency, what divides it; empty for none (GGUF stores `llama3` scaling so).
    long: of `longrope`, the same for long texts.
  """

  theta: float = 10000.0
  kind: str = "default"
  factor: float = 1.0
  original_length: int = 0
  low: float = 1.0
  high: float = 4.0
  attention_factor: float | None = None
  truncate: bool = True
  factors: tuple[float, ...] = ()
  long: tuple[float, ...] = ()

  def cos_sin(
    self, positions: jax.Array, head_dim: int, slots: int | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """cos and sin `[batch, length, head_dim / 2]` float32 of `positions: [batch, length]`.

    `slots` are those of the cache where there is one: by them `longrope` tells how long the text may become, so that
    keys that are there already never turn otherwise than those to come (llama.cpp goes by its context in the same way;
    transformers reads the whole text again when it passes the original length).
    """
    frequencies, scale = self._frequencies(positions, head_dim, slots)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale

  def _frequencies(self, positions: jax.Array, head_dim: int, slots: int | None) -> tuple[jax.Array, float]:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    if self.kind == "dynamic":
      length = jnp.maximum(jnp.max(positions) + 1, self.original_length).astype(jnp.float32)
      stretch = self.factor * length / self.original_length - (self.factor - 1)
      return 1.0 / (self.theta * stretch ** (head_dim / (head_dim - 2))) ** jnp.asarray(exponents), 1.0
    base = (1.0 / self.theta ** exponents.astype(np.float64)).astype(np.float32)
    if self.kind == "longrope":
      far = jnp.max(positions) >= self.original_length if slots is None else slots > self.original_length
      divided = jnp.where(far, jnp.asarray(self.long, jnp.float32), jnp.asarray(self.factors, jnp.float32))
      scale = self.attention_factor
      if scale is None:
        scale = math.sqrt(1 + math.log(self.factor) / math.log(self.original_length)) if self.factor > 1 else 1.0
      return jnp.asarray(base) / divided, scale
    if self.factors:
      base = base / np.asarray(self.factors, np.float32)
    if self.kind == "linear":
      base = base / self.factor
    elif self.kind == "llama3":
      wavelength = 2 * math.pi / base
      smooth = (self.original_length / wavelength - self.low) / (self.high - self.low)
      base = base * np.clip(smooth, 0, 1) + base / self.factor * (1 - np.clip(smooth, 0, 1))
    elif self.kind == "yarn":
      base = self._yarn(base, head_dim)
      scale = self.attention_factor or (0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0)
      return jnp.asarray(base, jnp.float32), scale
    return jnp.asarray(base, jnp.float32), 1.0

  def _yarn(self, base: np.ndarray, head_dim: int) -> np.ndarray:
    def dimension(rotations: float) -> float:
      return head_dim * math.log(self.original_length / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

    low, high = dimension(self.high), dimension(self.low)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return base * (1 - ramp) + base / self.factor * ramp

