"""Scores of answers that are parts of a passage: exact matches and the F1 of tokens, with intervals."""

from __future__ import annotations

from typing import Any

import numpy as np

from lmcompress.evaluate.resampling import resampled


def likeliest(probabilities: np.ndarray, longest: int = 30) -> np.ndarray:
  """The first and last token of each row's likeliest span, int `[n, 2]`.

  Args:
    probabilities: `[n, 2, length]`, that a token begins and that one ends it.
    longest: tokens that a span has at most.
  """
  n, _, length = probabilities.shape
  best, spans = np.full(n, -1.0), np.zeros((n, 2), np.int64)
  for more in range(min(longest, length)):
    both = probabilities[:, 0, : length - more] * probabilities[:, 1, more:]
    first, value = both.argmax(1), both.max(1)
    better = value > best
    best[better] = value[better]
    spans[better] = np.stack([first, first + more], axis=1)[better]
  return spans


def scores(spans: np.ndarray, said: np.ndarray, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
  """Exact matches, and the F1 of the tokens that both spans hold (Rajpurkar et al. 2016, arXiv:1606.05250).

  Where the paper compares words of answers, whatever their place, this compares the places of tokens.

  Args:
    spans, said: int `[n, 2]`, the first and last token, the true one and the one that was said.
    resamples: bootstrap samples for the intervals; 0 leaves them out.
    seed: of the resampling.

  Returns:
    `n`, `exact`, `f1`, `interval` of both, and `measure`, which is `exact`.

  Raises:
    ValueError: shapes that do not fit, or no row.
  """
  spans, said = np.asarray(spans), np.asarray(said)
  if spans.shape != said.shape or spans.shape[1:] != (2,) or not len(spans):
    raise ValueError(f"spans: {list(spans.shape)} and {list(said.shape)} are no two spans of each row")
  shared = np.minimum(spans[:, 1], said[:, 1]) - np.maximum(spans[:, 0], said[:, 0]) + 1
  sizes = (spans[:, 1] - spans[:, 0] + 1) + (said[:, 1] - said[:, 0] + 1)
  each = np.stack([(spans == said).all(1), 2 * np.maximum(shared, 0) / sizes], axis=1).astype(np.float64)
  outcome: dict[str, Any] = {"measure": "exact", "n": len(spans)}
  outcome |= {name: float(each[:, i].mean()) for i, name in enumerate(("exact", "f1"))}
  if resamples:
    outcome["interval"] = {
      name: resampled(each[:, i], lambda sums: sums / len(spans), resamples, seed)
      for i, name in enumerate(("exact", "f1"))
    }
  return outcome
