"""Masks: which entries of a score matrix to keep, exactly as many as asked, ties broken by position."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lmcompress.arrays.nm_sparse import n_of_m

__all__ = ["kth_smallest", "n_of_m", "smallest"]


def _ordered(score: jax.Array) -> jax.Array:
  """Bits of a non-negative float32 as int32: the same order, and integers can be bisected exactly."""
  return jax.lax.bitcast_convert_type(score.astype(jnp.float32), jnp.int32)


def kth_smallest(scores: list[jax.Array], k: Any, axis: int | None = None) -> jax.Array:
  """The k-th smallest (1-based) of non-negative scores, as ordered int32 bits; -1 for k = 0.

  Bisects the 31 bits of the float by counting, so it never sorts, is exact, and a sharded score costs one
  small reduction a bit. `k` may be traced.

  Args:
    scores: arrays that are ranked together, e.g. of all weights of a model.
    k: how many; an integer, broadcast over the rows that `axis` leaves.
    axis: rank along this axis of the only array; None ranks all entries.
  """
  bits = [_ordered(s) for s in scores]

  def count(threshold: jax.Array) -> jax.Array:
    if axis is None:
      return sum((jnp.sum(b <= threshold, dtype=jnp.int32) for b in bits), jnp.int32(0))
    return jnp.sum(bits[0] <= jnp.expand_dims(threshold, axis), axis=axis, dtype=jnp.int32)

  shape = () if axis is None else jnp.sum(bits[0], axis=axis).shape
  low, high = jnp.full(shape, -1, jnp.int32), jnp.full(shape, 0x7F800000, jnp.int32)

  def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    low, high = ends
    middle = low + (high - low) // 2
    enough = count(middle) >= k
    return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

  found = jax.lax.fori_loop(0, 32, halve, (low, high))[1]
  return jnp.where(jnp.asarray(k) > 0, found, -1)


def smallest(score: jax.Array, k: Any, axis: int | None = None) -> jax.Array:
  """True for the `k` smallest entries (in all, or along `axis`); the earlier of equals first.

  Args:
    score: non-negative, any shape.
    k: how many; may be traced.
  """
  threshold = kth_smallest([score], k, axis)
  bits = _ordered(score)
  if axis is not None:
    threshold = jnp.expand_dims(threshold, axis)
  below = bits < threshold
  tied = bits == threshold
  if axis is None:
    spare = k - jnp.sum(below, dtype=jnp.int32)
    return below | (tied & (jnp.cumsum(tied.ravel(), dtype=jnp.int32).reshape(tied.shape) <= spare))
  spare = k - jnp.sum(below, axis=axis, keepdims=True, dtype=jnp.int32)
  return below | (tied & (jnp.cumsum(tied, axis=axis, dtype=jnp.int32) <= spare))
