"""Hadamard matrices, and the random rotations made of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def hadamard(n: int) -> np.ndarray | None:
  """A matrix of ones and minus ones `[n, n]` with `H H^T == n I`, or None where these constructions find none.

  Paley's two (1933), for `n - 1` or `n / 2 - 1` prime, doubled as often as needed (Sylvester 1867).
  """
  if n in (1, 2):
    return np.array([[1, 1], [1, -1]], np.int8)[:n, :n]
  if n % 4:
    return None
  for prime, symmetric in ((n - 1, False), (n // 2 - 1, True)):
    if prime % 4 == (1 if symmetric else 3) and all(prime % d for d in range(2, int(prime**0.5) + 1)):
      return _paley(prime, symmetric)
  half = hadamard(n // 2)
  return None if half is None else np.kron(np.array([[1, 1], [1, -1]], np.int8), half)


def _paley(prime: int, symmetric: bool) -> np.ndarray:
  squares = {x * x % prime for x in range(1, prime)}
  residue = np.array([0] + [1 if x in squares else -1 for x in range(1, prime)], np.int8)
  core = residue[(np.arange(prime)[:, None] - np.arange(prime)) % prime]
  edge = np.zeros((prime + 1, prime + 1), np.int8)
  edge[0, 1:], edge[1:, 0], edge[1:, 1:] = 1, 1 if symmetric else -1, core
  one = np.eye(prime + 1, dtype=np.int8)
  if not symmetric:
    return edge + one
  return np.kron(edge, np.array([[1, 1], [1, -1]], np.int8)) + np.kron(one, np.array([[1, -1], [-1, -1]], np.int8))


def random_rotation(n: int, key: jax.Array, means: bool = False) -> jax.Array:
  """An orthogonal matrix `[n, n]` float32: a Hadamard matrix with its rows' signs drawn at random (arXiv:2404.00456).

  Where there is none of that size, a matrix drawn from all rotations alike.

  Args:
    means: the mean of `x Q` is that of `x`: the matrix is reflected so that it leaves the direction of ones as it is.
  """
  q = _random_rotation(n, key)
  if not means:
    return q
  ones = jnp.full(n, n**-0.5, jnp.float32)
  apart = jnp.matmul(q, ones, precision=jax.lax.Precision.HIGHEST) - ones
  length = jnp.vdot(apart, apart)
  weight = jnp.where(length > 1e-12, 2.0 / jnp.maximum(length, 1e-12), 0.0)
  return q - weight * jnp.outer(apart, jnp.matmul(apart, q, precision=jax.lax.Precision.HIGHEST))


def _random_rotation(n: int, key: jax.Array) -> jax.Array:
  known = hadamard(n)
  if known is None:
    q, r = jnp.linalg.qr(jax.random.normal(key, (n, n), jnp.float32))
    return q * jnp.where(jnp.diag(r) < 0, -1.0, 1.0)
  signs = jax.random.rademacher(key, (n, 1), jnp.float32)
  return signs * jnp.asarray(known, jnp.float32) * n**-0.5
