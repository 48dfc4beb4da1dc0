"""Statistics of the inputs of a linear, accumulated over tokens in float32, padding left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Statistic(NamedTuple):
  """A reducer over `x: [tokens, in]` and `real: [tokens]` (True for tokens that count).

  Attributes:
    init: `in -> state`.
    update: `(state, x, real) -> state`.
    finish: `(state, count) -> value`.
  """

  init: Callable[[int], jax.Array]
  update: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  finish: Callable[[jax.Array, jax.Array], jax.Array]


def _gram(x: jax.Array) -> jax.Array:
  return jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)


STATISTICS = {
  "hessian": Statistic(
    lambda n: jnp.zeros((n, n), jnp.float32),
    lambda s, x, real: s + _gram(jnp.where(real[:, None], x, 0.0)),
    lambda s, count: 2.0 * s / count,
  ),
  "second_moment": Statistic(
    lambda n: jnp.zeros(n, jnp.float32),
    lambda s, x, real: s + jnp.sum(jnp.where(real[:, None], x * x, 0.0), axis=0),
    lambda s, count: s / count,
  ),
  "absmax": Statistic(
    lambda n: jnp.zeros(n, jnp.float32),
    lambda s, x, real: jnp.maximum(s, jnp.max(jnp.where(real[:, None], jnp.abs(x), 0.0), axis=0)),
    lambda s, count: s,
  ),
  "mean_abs": Statistic(
    lambda n: jnp.zeros(n, jnp.float32),
    lambda s, x, real: s + jnp.sum(jnp.where(real[:, None], jnp.abs(x), 0.0), axis=0),
    lambda s, count: s / count,
  ),
}
"""`hessian` is `(2 / tokens) sum x x^T: [in, in]`; `second_moment`, `absmax` and `mean_abs` are `[in]`."""
