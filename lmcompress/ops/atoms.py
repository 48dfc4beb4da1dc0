"""Atoms for runs of weights: k-means of vectors, and dictionaries learned for orthogonal matching pursuit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_AT_ONCE = 1 << 12
"""Vectors that are compared with all atoms in one go."""


def _in_blocks(fn: Callable[..., Any], *arrays: jax.Array) -> Any:
  """`fn` of as many vectors at a time, put side by side again; each array is `[n, width]`."""
  n = arrays[0].shape[0]
  size = min(_AT_ONCE, n)
  blocks = [jnp.pad(x, ((0, -n % size), (0, 0))).reshape(-1, size, x.shape[1]) for x in arrays]
  found = jax.lax.map(lambda block: fn(*block), tuple(blocks))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], found)


def _first(scores: jax.Array, best: jax.Array) -> jax.Array:
  """int32 `[vectors]`: where each column of `scores: [count, vectors]` first is `best`; argmin is far slower."""
  places = jnp.arange(scores.shape[0], dtype=jnp.int32)[:, None]
  return jnp.min(jnp.where(scores == best, places, scores.shape[0] - 1), axis=0)


@jax.jit
def nearest_atoms(x: jax.Array, importance: jax.Array, atoms: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The atom of least weighted squared error for each vector, and that error.

  Args:
    x, importance: `[n, width]`, the importance not negative; atoms: `[count, width]`.

  Returns:
    int32 `[n]` and float32 `[n]`.
  """

  def some(v: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    cost = jnp.square(atoms) @ s.T - 2 * (atoms @ (s * v).T)
    least = jnp.min(cost, axis=0)
    return _first(cost, least), jnp.maximum(least + jnp.sum(s * v * v, axis=1), 0.0)

  return _in_blocks(some, x, importance)


@functools.partial(jax.jit, static_argnames=("count", "steps"))
def vector_kmeans(x: jax.Array, importance: jax.Array, count: int, key: jax.Array, steps: int) -> jax.Array:
  """Lloyd's iteration on vectors; an atom that nothing is near to moves to one of the worst-served vectors.

  The weighted squared error never rises from step to step.

  Args:
    x, importance: float32 `[n, width]`, at least `count` vectors.

  Returns:
    float32 `[count, width]`.
  """

  def step(_: int, atoms: jax.Array) -> jax.Array:
    index, cost = nearest_atoms(x, importance, atoms)
    total = jnp.zeros_like(atoms).at[index].add(importance)
    first = jnp.zeros_like(atoms).at[index].add(importance * x)
    moved = jnp.where(total > 0, first / jnp.where(total > 0, total, 1.0), atoms)
    return _reseeded(moved, jnp.zeros(count, int).at[index].add(1), x, cost)

  return jax.lax.fori_loop(0, steps, step, _drawn(x, count, key))


def _drawn(x: jax.Array, count: int, key: jax.Array) -> jax.Array:
  return x[jax.random.choice(key, x.shape[0], (count,), replace=False)]


def _reseeded(atoms: jax.Array, used: jax.Array, x: jax.Array, cost: jax.Array) -> jax.Array:
  """Atoms that nothing uses become the vectors of the largest cost."""
  worst = jax.lax.top_k(cost, atoms.shape[0])[1]
  place = jnp.cumsum(used == 0) - 1
  return jnp.where((used == 0)[:, None], x[worst[place]], atoms)


def pursue(x: jax.Array, importance: jax.Array, atoms: jax.Array, terms: int) -> tuple[jax.Array, jax.Array]:
  """Orthogonal matching pursuit (Pati et al. 1993): the atom that explains most of what is left, then all refitted.

  Args:
    x, importance: float32 `[n, width]`; errors count by importance.
    atoms: `[count, width]`.
    terms: atoms of a vector, at most `count`.

  Returns:
    int32 and float32 `[n, terms]`: which atoms, all different, and their coefficients.
  """
  return _in_blocks(lambda v, s: _pursue(v, s, atoms, terms), x, importance)


def _pursue(v: jax.Array, s: jax.Array, atoms: jax.Array, terms: int) -> tuple[jax.Array, jax.Array]:
  norms = jnp.sqrt(jnp.square(atoms) @ s.T)  # [count, vectors]
  places = jnp.arange(atoms.shape[0], dtype=jnp.int32)[:, None]
  taken = jnp.zeros(norms.shape, bool)
  rest, chosen, fitted = v, [], jnp.zeros((v.shape[0], 0))
  for _ in range(terms):
    gain = jnp.where(taken, -1.0, jnp.abs(atoms @ (s * rest).T) / jnp.where(norms > 0, norms, 1.0))
    chosen.append(_first(gain, jnp.max(gain, axis=0)))
    taken = taken | (places == chosen[-1])
    some = atoms[jnp.stack(chosen, axis=1)]  # [vectors, terms so far, width]
    fitted = jax.vmap(_least_squares)(some, s, v)
    rest = v - jnp.einsum("nt,ntw->nw", fitted, some)
  return jnp.stack(chosen, axis=1), fitted


def _least_squares(some: jax.Array, s: jax.Array, v: jax.Array) -> jax.Array:
  """`min over c of sum of s * (v - c @ some)**2`, a hair of ridge for atoms that are alike."""
  gram = (some * s) @ some.T
  ridge = 1e-6 * jnp.trace(gram) / gram.shape[0] + 1e-30
  return jnp.linalg.solve(gram + ridge * jnp.eye(gram.shape[0]), some @ (s * v))


@functools.partial(jax.jit, static_argnames=("count", "terms", "steps"))
def learn_dictionary(
  x: jax.Array, importance: jax.Array, count: int, terms: int, key: jax.Array, steps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Atoms and sparse codes, by turns (method of optimal directions, Engan et al. 1999).

  Args:
    x, importance: float32 `[n, width]`, at least `count` vectors.

  Returns:
    Atoms `[count, width]` of norm 1, codes int32 `[n, terms]`, coefficients float32 `[n, terms]`; the pursuit is of
    those very atoms.
  """

  def step(_: int, atoms: jax.Array) -> jax.Array:
    codes, values = pursue(x, importance, atoms, terms)
    pairs = values[:, :, None] * values[:, None, :]
    empty = jnp.zeros((count, count, x.shape[1]))
    grams = empty.at[codes[:, :, None], codes[:, None, :]].add(pairs[..., None] * importance[:, None, None, :])
    sums = jnp.zeros_like(atoms).at[codes].add(values[..., None] * (importance * x)[:, None, :])
    grams = jnp.moveaxis(grams, -1, 0)  # the normal equations of each entry of the atoms: [width, count, count]
    ridge = 1e-6 * jnp.trace(grams, axis1=1, axis2=2) / count + 1e-30
    solve = jax.vmap(functools.partial(jax.scipy.linalg.solve, assume_a="pos"))
    found = solve(grams + ridge[:, None, None] * jnp.eye(count), sums.T).T
    rest = x - jnp.einsum("nt,ntw->nw", values, atoms[codes])
    used = jnp.zeros(count, int).at[codes].add(values != 0)
    return _unit(_reseeded(found, used, x, jnp.sum(importance * jnp.square(rest), axis=1)))

  atoms = jax.lax.fori_loop(0, steps, step, _unit(_drawn(x, count, key)))
  return atoms, *pursue(x, importance, atoms, terms)


def _unit(atoms: jax.Array) -> jax.Array:
  norms = jnp.linalg.norm(atoms, axis=1, keepdims=True)
  return jnp.where(norms > 0, atoms / jnp.where(norms > 0, norms, 1.0), jnp.eye(atoms.shape[0], atoms.shape[1]))
