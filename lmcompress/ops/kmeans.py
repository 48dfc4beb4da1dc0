"""One-dimensional k-means: the optimum by dynamic programming, and Lloyd's iteration; weighted, many rows at once."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.ops import backend

DISTINCT = 1 << 15
"""Values that the dynamic programme tells apart; of more, near ones are merged first."""
_AT_ONCE = 1 << 22
"""Candidates that the dynamic programme looks at in one go."""


def optimal(x: np.ndarray, weights: np.ndarray, k: int) -> np.ndarray:
  """Centroids of the least weighted squared error, for each row exactly (Wang and Song 2011, Ckmeans.1d.dp).

  In one dimension clusters are runs of the sorted values, and where the last run of the best clustering of the first j
  values begins never falls as j grows; so each of k layers is solved by halving, all rows side by side.

  Args:
    x: `[rows, n]`; weights: `[rows, n]`, not negative.
    k: clusters; where a row has fewer distinct values, the last ones repeat.

  Returns:
    float64 `[rows, k]`, ascending.
  """
  x, weights = (np.atleast_2d(np.asarray(a, np.float64)) for a in (x, weights))
  if x.shape[1] > DISTINCT:
    merged = [_merge(row, w) for row, w in zip(x, weights, strict=True)]
    return np.stack([optimal(v[None], w[None], k)[0] for v, w in merged])
  compiled = backend.native() if backend.runs_native() else None
  if compiled is not None:
    found = np.empty((len(x), k))
    threads = min(backend.threads(), len(x))
    compiled.optimal_clusters(np.ascontiguousarray(x), np.ascontiguousarray(weights), found, threads)
    return found
  rows = max(1, _AT_ONCE // (4 * x.shape[1]))
  return np.concatenate([_optimal(x[i : i + rows], weights[i : i + rows], k) for i in range(0, len(x), rows)])


def _merge(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Distinct values and the sums of their weights; above `DISTINCT`, the means of as many cells of equal width."""
  values, place = np.unique(x, return_inverse=True)
  if values.size > DISTINCT:
    low, high = values[0], values[-1]
    place = np.minimum(((x - low) / (high - low) * DISTINCT).astype(np.int64), DISTINCT - 1)
    values = np.zeros(DISTINCT)
    sums = np.bincount(place, weights, DISTINCT)
    plain = np.bincount(place, minlength=DISTINCT)
    moments = np.bincount(place, weights * x, DISTINCT)
    middle = np.bincount(place, x, DISTINCT) / np.maximum(plain, 1)
    values = np.where(sums > 0, moments / np.where(sums > 0, sums, 1), middle)
    used = plain > 0
    return values[used], sums[used]
  return values, np.bincount(place, weights, values.size)


def _optimal(x: np.ndarray, weights: np.ndarray, k: int) -> np.ndarray:
  rows, n = x.shape
  order = np.argsort(x, axis=1, kind="stable")
  x, weights = (np.take_along_axis(a, order, axis=1) for a in (x, weights))
  centre = x.mean(axis=1, keepdims=True)  # sums of squares lose less about it
  # a value without weight costs next to nothing, but has a place
  w = np.maximum(weights, 1e-12 * weights.mean(axis=1, keepdims=True) + 1e-300)
  sums = [np.pad(np.cumsum(a, axis=1), ((0, 0), (1, 0))).ravel() for a in (w, w * (x - centre), w * (x - centre) ** 2)]
  width = n + 1
  base = np.arange(rows) * width

  def cost(i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Of one cluster of the values i to j - 1, flat indices."""
    total, first, second = (s[j] - s[i] for s in sums)
    return np.where(total > 0, np.maximum(second - first * first / np.where(total > 0, total, 1), 0.0), 0.0)

  every = (base[:, None] + np.arange(width)).ravel()
  best = cost(np.repeat(base, width), every)
  starts = np.zeros((k, rows * width), np.int32)
  for layer in range(1, k):
    best, starts[layer] = _layer(best, cost, base, n)
  ends = np.full(rows, n)
  bounds = [ends]
  for layer in range(k - 1, 0, -1):
    ends = starts[layer][base + ends]
    bounds.append(ends)
  bounds.append(np.zeros(rows, int))
  edges = np.stack(bounds[::-1], axis=1) + base[:, None]
  total, first = (sums[i][edges[:, 1:]] - sums[i][edges[:, :-1]] for i in (0, 1))
  means = np.where(total > 0, first / np.where(total > 0, total, 1), np.nan)
  means = _filled(means) + centre
  return np.sort(means, axis=1)


def _layer(best: np.ndarray, cost: Any, base: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
  """`min over i <= j of best[i] + cost(i, j)` for every j, and that i; rows flat, `n + 1` entries each."""
  width, rows = n + 1, base.size
  found, start = np.full(rows * width, np.inf), np.zeros(rows * width, np.int32)
  stride = 1 << max(0, n.bit_length())
  done = np.zeros(width, bool)
  while stride:
    js = np.arange(0, width, stride)
    js = js[~done[js]]
    done[js] = True
    left, right = js - stride, np.minimum(js + stride, n)
    for row in range(0, rows, step := max(1, _AT_ONCE // width)):
      some = base[row : row + step, None]
      low = np.where(left >= 0, start[some + np.maximum(left, 0)], 0)
      known = (js + stride <= n) & done[right]
      high = np.where(known, np.minimum(start[some + right], js), js)
      high = np.maximum(high, low)
      counts = (high - low + 1).ravel()
      ends = np.cumsum(counts)
      at = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
      which = np.repeat(np.arange(counts.size), counts)
      i = low.ravel()[which] + at
      offset = np.broadcast_to(some, low.shape).ravel()[which]
      j = np.broadcast_to(js, low.shape).ravel()[which]
      values = best[offset + i] + cost(offset + i, offset + j)
      least = np.minimum.reduceat(values, ends - counts)
      first = np.full(counts.size, np.iinfo(np.int64).max)
      hit = values <= least[which]
      np.minimum.at(first, which[hit], i[hit])
      flat = (some + js).ravel()
      found[flat], start[flat] = least, first
    stride //= 2
  return found, start


def _filled(means: np.ndarray) -> np.ndarray:
  """Clusters without values stand where the one before them does."""
  for c in range(1, means.shape[1]):
    means[:, c] = np.where(np.isnan(means[:, c]), means[:, c - 1], means[:, c])
  for c in range(means.shape[1] - 2, -1, -1):
    means[:, c] = np.where(np.isnan(means[:, c]), means[:, c + 1], means[:, c])
  return means


@functools.partial(jax.jit, static_argnames=("steps",))
def lloyd(x: jax.Array, weights: jax.Array, centroids: jax.Array, steps: int = 20) -> jax.Array:
  """Centroids moved to the weighted means of the values nearest to them, again and again; the error never rises.

  Args:
    x, weights: `[rows, n]`; centroids: `[rows, k]`, ascending.

  Returns:
    float32 `[rows, k]`, ascending; a cluster that nothing is near to stays where it is.
  """
  rows, k = centroids.shape

  def step(_: Any, c: jax.Array) -> jax.Array:
    index = nearest(x, c) + k * jnp.arange(rows)[:, None]
    total = jnp.zeros(rows * k).at[index.ravel()].add(weights.ravel()).reshape(rows, k)
    first = jnp.zeros(rows * k).at[index.ravel()].add((weights * x).ravel()).reshape(rows, k)
    return jnp.sort(jnp.where(total > 0, first / jnp.where(total > 0, total, 1.0), c), axis=1)

  return jax.lax.fori_loop(0, steps, step, centroids.astype(jnp.float32))


@jax.jit
def nearest(x: jax.Array, centroids: jax.Array) -> jax.Array:
  """int32 `[rows, n]`: for each of `x: [rows, n]` the nearest of its row of ascending `centroids: [rows, k]`."""
  middles = (centroids[:, 1:] + centroids[:, :-1]) / 2
  return jax.vmap(lambda v, m: jnp.searchsorted(m, v, side="left", method="compare_all"))(x, middles).astype(jnp.int32)


def linear_seeds(x: jax.Array, k: int) -> jax.Array:
  """`[rows, k]` evenly spaced over each row's range, for Lloyd's iteration."""
  low, high = jnp.min(x, axis=1, keepdims=True), jnp.max(x, axis=1, keepdims=True)
  return low + (high - low) * (jnp.arange(k) / max(k - 1, 1))
