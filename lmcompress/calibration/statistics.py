"""Statistics of the inputs of a linear, accumulated over tokens in float32, padding left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Statistic(NamedTuple):
  """A reducer over `x: [tokens, in]`, padding already 0.

  Attributes:
    init: `in -> state`.
    update: `(state, x, reference) -> state`; `reference` is what x would be in the model before compression.
    finish: `(state, count) -> value`, of `count` real tokens.
    reference: whether `update` reads `reference` (else it is None).
  """

  init: Callable[[int], jax.Array]
  update: Callable[[jax.Array, jax.Array, Any], jax.Array]
  finish: Callable[[jax.Array, jax.Array], jax.Array]
  reference: bool = False


def _gram(x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.matmul(x.T, y, precision=jax.lax.Precision.HIGHEST)


def _square(n: int) -> jax.Array:
  return jnp.zeros((n, n), jnp.float32)


def _row(n: int) -> jax.Array:
  return jnp.zeros(n, jnp.float32)


STATISTICS = {
  "hessian": Statistic(_square, lambda s, x, _: s + _gram(x, x), lambda s, count: 2.0 * s / count),
  "reference_hessian": Statistic(
    _square, lambda s, x, reference: s + _gram(x, reference), lambda s, count: 2.0 * s / count, reference=True
  ),
  "second_moment": Statistic(_row, lambda s, x, _: s + jnp.sum(x * x, axis=0), lambda s, count: s / count),
  "absmax": Statistic(_row, lambda s, x, _: jnp.maximum(s, jnp.max(jnp.abs(x), axis=0)), lambda s, count: s),
  "mean_abs": Statistic(_row, lambda s, x, _: s + jnp.sum(jnp.abs(x), axis=0), lambda s, count: s / count),
}
"""`hessian` is `(2 / tokens) sum x x^T: [in, in]`, `reference_hessian` `(2 / tokens) sum x r^T` with r the input in the
model before compression; `second_moment`, `absmax` and `mean_abs` are `[in]`."""
