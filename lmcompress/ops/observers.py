"""Observers: the range that a static scale covers, from a histogram of magnitudes."""

from __future__ import annotations

import numpy as np

BINS_PER_OCTAVE = 16
"""Bins are a sixteenth of a factor of two wide: 4.4 % of a value."""
LOWEST = -30 * BINS_PER_OCTAVE
"""Where the first bin lies: `2**-30`; what is smaller counts there."""
BINS = 60 * BINS_PER_OCTAVE

_LEVELS = 127


def edges() -> np.ndarray:
  """Lower edges of the bins and the last one's upper edge, `[BINS + 1]`."""
  return 2.0 ** ((np.arange(BINS + 1) + LOWEST) / BINS_PER_OCTAVE)


def absmax(counts: np.ndarray) -> float:
  """The upper edge of the last bin that holds something; 1 where none does."""
  held = np.flatnonzero(counts)
  return float(edges()[held[-1] + 1]) if held.size else 1.0


def percentile(counts: np.ndarray, share: float = 99.99) -> float:
  """The edge below which that share (in per cent) of the magnitudes lies."""
  total = counts.sum()
  if not total:
    return 1.0
  at = int(np.searchsorted(np.cumsum(counts), total * share / 100 * (1 - 1e-12)))
  return float(edges()[min(at, BINS - 1) + 1])


def mse(counts: np.ndarray) -> float:
  """The limit of least mean squared error of 8-bit codes: what is cut off above, and `step**2 / 12` below."""
  held = np.flatnonzero(counts)
  if not held.size:
    return 1.0
  tops, middle = edges()[1:], np.sqrt(edges()[1:] * edges()[:-1])
  best, least = absmax(counts), np.inf
  for at in range(max(0, held[-1] - 8 * BINS_PER_OCTAVE), held[-1] + 1):
    limit = tops[at]
    cut = np.sum(counts[at + 1 :] * (middle[at + 1 :] - limit) ** 2)
    error = cut + np.sum(counts[: at + 1]) * (limit / _LEVELS) ** 2 / 12
    if error < least:
      best, least = float(limit), error
  return best


OBSERVERS = {"absmax": absmax, "percentile": percentile, "mse": mse}
"""Limits by the name that a recipe gives them."""
