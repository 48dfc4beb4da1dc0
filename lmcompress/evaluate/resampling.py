"""Bootstrap: how far a score moves when its rows are drawn anew."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def resampled(values: np.ndarray, score: Callable[[np.ndarray], np.ndarray], resamples: int, seed: int) -> list[float]:
  """The middle 95 % of a score over rows drawn with replacement (Efron 1979).

  Args:
    values: `[n]` or `[n, ...]`, what each row adds to the sums that the score is made of.
    score: of sums `[resamples, ...]`.
    resamples: how often `n` rows are drawn.
    seed: of the drawing.
  """
  draw = np.random.default_rng(seed)
  counts = draw.multinomial(len(values), np.full(len(values), 1 / len(values)), resamples)
  low, high = np.quantile(score(counts @ values), [0.025, 0.975])
  return [float(low), float(high)]
