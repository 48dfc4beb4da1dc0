"""Masks: which entries of a score matrix to keep, exactly as many as asked, ties broken by position."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmcompress.arrays.nm_sparse import n_of_m

__all__ = ["Target", "kth_smallest", "n_of_m", "parse_pattern", "smallest", "split_removals", "target"]


class Target(NamedTuple):
  """How much is removed: a fraction, or all but n of each m consecutive inputs.

  Attributes:
    sparsity: fraction removed, 0 to 1; None for a pattern.
    n, m: kept of how many; 0 for a fraction.
  """

  sparsity: float | None
  n: int = 0
  m: int = 0

  def keep(self, score: jax.Array, axis: int, per_row: bool = False) -> jax.Array:
    """True for what stays of a non-negative `score: [in, out]`, the lowest removed; exactly as many as asked.

    Args:
      axis: the contraction axis.
      per_row: the fraction is met by the inputs of each output, rather than by all entries.
    """
    if self.m:
      return n_of_m(score, self.n, self.m, axis)
    extent = score.shape[axis] if per_row else score.size
    return ~smallest(score, self.removed(extent), axis if per_row else None)

  def removed(self, extent: int) -> int:
    """Of so many entries; 0 for a pattern."""
    return round(extent * (self.sparsity or 0.0))

  def misfit(self, inputs: int) -> str | None:
    """Why so many inputs cannot be pruned to the pattern; None where they can."""
    return f"{inputs} inputs are not a multiple of {self.m}" if self.m and inputs % self.m else None


def target(name: str, sparsity: float | None, pattern: str | None) -> Target:
  """What `name(sparsity=..., pattern=...)` asks for.

  Raises:
    ValueError: both or neither are given, the fraction is not one, or the pattern is no pattern.
  """
  if (sparsity is None) == (pattern is None):
    raise ValueError(f"{name}(sparsity={sparsity}, pattern={pattern!r}): give exactly one of the two")
  if pattern is not None:
    return Target(None, *parse_pattern(name, pattern))
  if not 0 <= sparsity <= 1:  # type: ignore[operator]
    raise ValueError(f"{name}(sparsity={sparsity}): a fraction from 0 to 1")
  return Target(sparsity)


def parse_pattern(name: str, pattern: str, argument: str = "pattern", or_else: str = "") -> tuple[int, int]:
  """n and m of `"n:m"`; `argument` is what a message calls it, `or_else` the words that would do too."""
  found = re.fullmatch(r"(\d+):(\d+)", pattern)
  n, m = (int(found[1]), int(found[2])) if found else (0, 0)
  if not 0 < n < m:
    raise ValueError(f"{name}({argument}={pattern!r}): write n:m with 0 < n < m, e.g. '2:4'{or_else}")
  return n, m


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


def split_removals(scores: list[jax.Array], removed: int) -> list[int]:
  """How many of each array's entries are among the `removed` smallest of all; of equals, earlier arrays' go first."""
  cut = kth_smallest(scores, removed)
  bits = [_ordered(s) for s in scores]
  spare = removed - sum(int(jnp.sum(b < cut)) for b in bits)
  found = []
  for b in bits:
    ties = min(spare, int(jnp.sum(b == cut)))
    found.append(int(jnp.sum(b < cut)) + ties)
    spare -= ties
  return found
