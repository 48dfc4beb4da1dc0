"""Private training: rows drawn one by one, each row's gradient clipped, noise on their sum, and what it spends."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmcompress.training.step import Training, TrainState, advance, loss_of
from lmcompress.types import ConfigError, Params, Transform


class Poisson:
  """An endless sequence of batches in which every row is drawn by itself with the same probability.

  `Poisson(...)[i]` is the same in every run; a batch may be empty.

  Args:
    rows: `[n, length]`.
    batch: rows of a batch in the mean, at most n.
    seed: of the draws.

  Raises:
    ValueError: fewer rows than a batch has in the mean.
  """

  def __init__(self, rows: np.ndarray, batch: int, seed: int):
    if rows.ndim != 2 or not 1 <= batch <= len(rows):
      raise ValueError(f"a batch of {batch} rows in the mean from tokens {list(rows.shape)}; take fewer")
    self.rows, self.probability, self._seed = rows, batch / len(rows), seed

  def __getitem__(self, step: int) -> np.ndarray:
    return self.rows[np.random.default_rng([self._seed, step]).random(len(self.rows)) < self.probability]


def epsilon(training: Training, rows: int, steps: int | None = None) -> float:
  """What `steps` updates (all of them if None) on so many rows spend, at the delta of `training.privacy`.

  By Renyi differential privacy of the Poisson-sampled Gaussian mechanism (dp-accounting). It holds for whoever sees
  the trained tree and does not know the seed; the losses in the log are of the rows themselves, and are not covered.

  Raises:
    ValueError: the training is not private.
    ConfigError: dp-accounting is missing.
  """
  if training.privacy is None:
    raise ValueError("epsilon: the training has no privacy; give Training(privacy=Privacy(noise=...))")
  try:
    import dp_accounting
    from dp_accounting import rdp
  except ImportError:
    raise ConfigError("epsilon needs dp-accounting: pip install 'lmcompress[privacy]'") from None
  probability = min(training.batch / rows, 1.0)
  event = dp_accounting.PoissonSampledDpEvent(probability, dp_accounting.GaussianDpEvent(training.privacy.noise))
  accountant = rdp.RdpAccountant()
  accountant.compose(event, training.steps if steps is None else steps)
  return float(accountant.get_epsilon(training.privacy.delta))


def clipped(grads: Params, most: float) -> Params:
  """A gradient of norm `most` at the largest; one that is not finite becomes 0."""
  norm = optax.global_norm(grads)
  factor = jnp.minimum(1.0, most / jnp.maximum(norm, 1e-30))
  return jax.tree.map(lambda g: jnp.where(jnp.isfinite(norm), g * factor, 0.0), grads)


def private_step(
  model: Any,
  moving: TrainState,
  kept: Params,
  rows: np.ndarray,
  training: Training,
  transform: Transform | None = None,
  teacher_model: Any = None,
  teacher: Params | None = None,
  key: jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One private update; arguments and what it returns as of `train_step`, rows `[n, length]`, perhaps none.

  Rows go through one by one, so that memory is two gradients whatever the batch.
  """
  sums, total = jax.tree.map(jnp.zeros_like, moving.trained), jnp.zeros(())
  for row in rows[:, None]:
    sums, total = _add(model, moving.trained, kept, jnp.asarray(row), training, teacher_model, teacher, sums, total)
  return _noisy(moving, kept, sums, total / max(len(rows), 1), training, transform, key)


@functools.partial(jax.jit, static_argnames=("model", "training", "teacher_model"), donate_argnames=("sums",))
def _add(
  model: Any,
  trained: Params,
  kept: Params,
  row: jax.Array,
  training: Training,
  teacher_model: Any,
  teacher: Params | None,
  sums: Params,
  total: jax.Array,
) -> tuple[Params, jax.Array]:
  assert training.privacy is not None
  guide = None if teacher is None else (teacher_model, teacher)

  def mean(trained: Params) -> jax.Array:
    lost, count = loss_of(model, kept, training, guide, trained, {"tokens": row})
    return lost / jnp.maximum(count, 1)

  loss, grads = jax.value_and_grad(mean)(trained)
  return jax.tree.map(jnp.add, sums, clipped(grads, training.privacy.clip)), total + loss


@functools.partial(jax.jit, static_argnames=("training", "transform"), donate_argnames=("moving",))
def _noisy(
  moving: TrainState,
  kept: Params,
  sums: Params,
  loss: jax.Array,
  training: Training,
  transform: Transform | None,
  key: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
  assert training.privacy is not None
  deviation = training.privacy.noise * training.privacy.clip
  leaves, treedef = jax.tree.flatten(sums)
  draws = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
  noisy = [
    (x + deviation * jax.random.normal(k, x.shape)) / training.batch for x, k in zip(leaves, draws, strict=True)
  ]
  return advance(moving, kept, treedef.unflatten(noisy), loss, training, transform, key)
