"""Statistics of the inputs of a linear, accumulated over tokens in float32, padding left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmcompress.ops.observers import BINS, BINS_PER_OCTAVE
from lmcompress.ops.observers import LOWEST as _LOWEST


class Statistic(NamedTuple):
  """A reducer over `x: [tokens, in]`, padding already 0.

  Attributes:
    init: `in -> state`.
    update: `(state, x, reference) -> state`; `reference` is what x would be in the model before compression.
    finish: `(state, count) -> value`, of `count` real tokens.
    reference: whether `update` reads `reference` (else it is None).
    weight: the power of a token's weight by which `update` gets its row multiplied: a half where rows are squared, 0
      for extremes and counts.
  """

  init: Callable[[int], jax.Array]
  update: Callable[[jax.Array, jax.Array, Any], jax.Array]
  finish: Callable[[jax.Array, jax.Array], jax.Array]
  reference: bool = False
  weight: float = 0.0


def _gram(x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.matmul(x.T, y, precision=jax.lax.Precision.HIGHEST)


def _square(n: int) -> jax.Array:
  return jnp.zeros((n, n), jnp.float32)


def _row(n: int) -> jax.Array:
  return jnp.zeros(n, jnp.float32)


def _count(s: jax.Array, x: jax.Array, _: Any) -> jax.Array:
  """Adds `|x|` to the bins; zeros, padding among them, are in none."""
  size = jnp.abs(x).reshape(-1)
  bins = jnp.clip(jnp.floor(jnp.log2(jnp.maximum(size, 1e-30)) * BINS_PER_OCTAVE) - _LOWEST, 0, BINS - 1)
  return s.at[bins.astype(jnp.int32)].add(jnp.where(size > 0, 1.0, 0.0))


STATISTICS = {
  "hessian": Statistic(_square, lambda s, x, _: s + _gram(x, x), lambda s, count: 2.0 * s / count, weight=0.5),
  "reference_hessian": Statistic(
    _square, lambda s, x, reference: s + _gram(x, reference), lambda s, count: 2.0 * s / count, True, weight=0.5
  ),
  "mean": Statistic(_row, lambda s, x, _: s + jnp.sum(x, axis=0), lambda s, count: s / count, weight=1.0),
  "second_moment": Statistic(_row, lambda s, x, _: s + jnp.sum(x * x, axis=0), lambda s, count: s / count, weight=0.5),
  "absmax": Statistic(_row, lambda s, x, _: jnp.maximum(s, jnp.max(jnp.abs(x), axis=0)), lambda s, count: s),
  "minimum": Statistic(_row, lambda s, x, _: jnp.minimum(s, jnp.min(x, axis=0)), lambda s, count: s),
  "maximum": Statistic(_row, lambda s, x, _: jnp.maximum(s, jnp.max(x, axis=0)), lambda s, count: s),
  "histogram": Statistic(lambda n: jnp.zeros(BINS, jnp.float32), _count, lambda s, count: s),
  "mean_abs": Statistic(_row, lambda s, x, _: s + jnp.sum(jnp.abs(x), axis=0), lambda s, count: s / count, weight=1.0),
}
"""`hessian` is `(2 / tokens) sum x x^T: [in, in]`, `reference_hessian` `(2 / tokens) sum x r^T` with r the input in the
model before compression; `mean`, `second_moment`, `absmax`, `mean_abs`, `minimum` and `maximum` (0 included) are
`[in]`; `histogram: [bins]` counts `|x|` of all inputs in `ops.observers`' bins. In sums and in
the number of tokens a token that weighs 2 is as two would be; extremes and the histogram see it once."""
