"""ALPS: chooses which weights to keep and their values together, by ADMM on the output error."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmcompress.arrays import MaskedArray, masked
from lmcompress.ops.masks import n_of_m, smallest, target
from lmcompress.ops.removal import refit
from lmcompress.ops.second_order import drift_corrected
from lmcompress.transforms.combine import require_dense, stagewise
from lmcompress.transforms.wanda import check_target
from lmcompress.types import Transform

_CHECK = 3
"""Iterations between two looks at whether the support still moves."""


def alps(
  sparsity: float | None = None,
  pattern: str | None = None,
  iterations: int = 150,
  refit_steps: int = 15,
  damping: float = 0.01,
  error_propagation: float = 0.0,
) -> Transform:
  """Prunes to the least output error (Meng et al. 2024, ALPS, arXiv:2406.07831); for high sparsity.

  Minimizes `||X (W - D)||**2` over D with so many entries, by the alternating direction method of multipliers; once
  the support no longer moves, the values on it are solved for by conjugate gradients.

  Args:
    sparsity: fraction removed, exact in every weight. Or:
    pattern: `"n:m"` keeps n of each m consecutive inputs, e.g. `"2:4"`.
    iterations: of ADMM at most; it stops as soon as the support stays.
    refit_steps: of conjugate gradients.
    damping: added to the Hessian's diagonal, as a fraction of its mean.
    error_propagation: as in `gptq`.

  Raises:
    ValueError: an argument is out of range.
    WeightError (when planned): inputs are no multiple of m, a quantized weight, NaN or infinity.
  """
  goal = target("alps", sparsity, pattern)
  if iterations < 1 or refit_steps < 0 or not 0 < damping < 1 or not 0 <= error_propagation <= 1:
    raise ValueError(
      f"alps(iterations={iterations}, refit_steps={refit_steps}, damping={damping}, error_propagation="
      f"{error_propagation}): iterations from 1, refit_steps from 0, damping between 0 and 1, error_propagation 0 to 1"
    )

  def prune(weights: dict[str, Any], hessian: jax.Array, reference_hessian: Any = None) -> dict[str, Any]:
    system = prepare(hessian, damping)
    done: dict[str, Any] = {}
    for path, leaf in weights.items():
      w, kept = (leaf.values, leaf.mask.unpack() != 0) if isinstance(leaf, MaskedArray) else (leaf, None)
      wanted = w.astype(jnp.float32)
      if reference_hessian is not None:
        wanted = drift_corrected(wanted, hessian, reference_hessian, damping=damping, share=error_propagation)
      values, keep = solve_support(
        wanted, system, kept, goal.removed(w.size), pattern=(goal.n, goal.m), iterations=iterations,
        refit_steps=refit_steps,
      )  # fmt: skip
      done[path] = masked(values.astype(w.dtype), keep, -2)
    return done

  needs = frozenset({"hessian"} | ({"reference_hessian"} if error_propagation else set()))

  def check(path: str, leaf: Any) -> None:
    require_dense("alps", path, leaf)  # it moves values, which codes cannot
    check_target("alps", goal, path, leaf)

  return stagewise(prune, name="alps", needs=needs, check=check)


class System(NamedTuple):
  """A damped Hessian with its diagonal scaled to 1, and its eigenvectors.

  Attributes:
    hessian: `[in, in]`; scale: `[in]`, what inputs were multiplied by.
    vectors: `[in, in]`; values: `[in]`.
  """

  hessian: jax.Array
  scale: jax.Array
  vectors: jax.Array
  values: jax.Array


@functools.partial(jax.jit, static_argnames=("damping",))
def prepare(hessian: jax.Array, damping: float) -> System:
  """Damps, scales and factors a Hessian, once for all weights that read the input."""
  h = hessian.astype(jnp.float32)
  dead = jnp.diag(h) == 0
  h = h + jnp.diag(damping * jnp.maximum(jnp.mean(jnp.diag(h)), 1e-30) + jnp.where(dead, 1.0, 0.0))
  scale = jnp.sqrt(jnp.diag(h))
  h = h / scale[:, None] / scale
  values, vectors = jnp.linalg.eigh(h)
  return System(h, scale, vectors, jnp.maximum(values, 0.0))


@functools.partial(jax.jit, static_argnames=("pattern", "iterations", "refit_steps"))
def solve_support(
  w: jax.Array, system: System, kept: jax.Array | None, removed: Any, *, pattern: tuple[int, int], iterations: int,
  refit_steps: int,
) -> tuple[jax.Array, jax.Array]:
  """ALPS of one matrix (algorithm 1, then 2 on the support).

  Args:
    w: `[in, out]` float32; kept: bool, False for what is 0 already, or None.
    removed: how many entries go, may be traced; pattern: n and m instead, or 0 and 0.

  Returns:
    Values and mask `[in, out]`.
  """
  target = w * system.scale[:, None]
  kept = jnp.ones(w.shape, bool) if kept is None else kept
  gradient = jnp.matmul(system.hessian, target)

  def project(x: jax.Array) -> jax.Array:
    score = jnp.where(kept, jnp.abs(x), 0.0)
    return (n_of_m(score, *pattern, -2) if pattern[1] else ~smallest(score, removed)) & kept

  def solved(right: jax.Array, rho: jax.Array) -> jax.Array:
    inner = jnp.matmul(system.vectors.T, right) / (system.values + rho)[:, None]
    return jnp.matmul(system.vectors, inner)

  def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
    i, d, v, rho, keep, old, _ = state
    x = solved(gradient - v + rho * d, rho)
    keep = project(x + v / rho)
    d = jnp.where(keep, x + v / rho, 0.0)
    v = v + rho * (x - d)
    moved = jnp.sum(keep != old, dtype=jnp.int32)
    share = moved / jnp.maximum(jnp.sum(keep, dtype=jnp.int32), 1)
    growth = jnp.where(share >= 0.1, 1.3, jnp.where(share >= 0.005, 1.2, 1.1))
    due = (i + 1) % _CHECK == 0
    return (
      i + 1, d, v, jnp.where(due, rho * growth, rho), keep, jnp.where(due, keep, old), due & (moved == 0)
    )  # fmt: skip

  first = project(target)
  start = (jnp.int32(0), jnp.where(first, target, 0.0), jnp.zeros_like(w), jnp.float32(0.1), first, first, False)
  state = jax.lax.while_loop(lambda s: (s[0] < iterations) & ~s[-1], step, start)
  d, keep = state[1], state[4]
  values = refit(target, system.hessian, d, keep, refit_steps)
  return jnp.where(keep, values / system.scale[:, None], 0.0), keep
