"""Schedules: functions of the training step, for sparsity and for when to act."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def cubic(final: float, start: int, end: int, initial: float = 0.0) -> Callable[[jax.Array], jax.Array]:
  """Sparsity that rises fast, then settles: `final + (initial - final) (1 - t)**3`.

  Zhu & Gupta 2017, arXiv:1710.01878, equation 1.

  >>> float(cubic(0.5, start=0, end=100)(jnp.asarray(100)))
  0.5
  """
  if end <= start:
    raise ValueError(f"cubic(start={start}, end={end}): the end comes after the start")

  def sparsity(step: jax.Array) -> jax.Array:
    t = jnp.clip((step - start) / (end - start), 0.0, 1.0)
    return final + (initial - final) * (1 - t) ** 3

  return sparsity


def every(steps: int, start: int = 0, end: int | None = None) -> Callable[[jax.Array], jax.Array]:
  """True at `start`, `start + steps`, ... up to `end`: when `scheduled` acts."""
  if steps < 1:
    raise ValueError(f"every({steps}): at least 1 step")

  def active(step: jax.Array) -> jax.Array:
    due = (step >= start) & ((step - start) % steps == 0)
    return due if end is None else due & (step <= end)

  return active
