"""Scores of a classifier: accuracy, precision, recall, F1, the confusion matrix and ROC AUC, with intervals."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmcompress.types import ConfigError

ROC_POINTS = 51
"""Points of a ROC curve, from no false positive to all."""


def scores(
  labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
  """What a classifier's probabilities are worth (scikit-learn).

  Args:
    labels: int `[n]`.
    probabilities: `[n, classes]`, rows that add up to 1.
    classes: names, by label.
    resamples: bootstrap samples for the intervals; 0 leaves them out.
    seed: of the resampling.

  Returns:
    `measure`, which is `accuracy`, `n`, `accuracy` and macro means `precision`, `recall`, `f1` and `auc` (one against
    the rest; None where a class is absent), `roc` (for each class the true positive rates at `ROC_POINTS` even false
    positive rates; None likewise),
    `interval` (the middle 95 % of accuracy and F1 over resamples), `confusion` (rows are the truth) and `classes`.

  Raises:
    ValueError: shapes that do not fit, no row, or a probability that is not finite.
    ConfigError: scikit-learn is missing.
  """
  labels, probabilities = np.asarray(labels), np.asarray(probabilities, np.float64)
  if labels.shape != probabilities.shape[:1] or probabilities.shape[1:] != (len(classes),) or not len(labels):
    raise ValueError(
      f"scores: labels {list(labels.shape)}, probabilities {list(probabilities.shape)} and {len(classes)} classes do "
      "not fit, or there is no row"
    )
  if not np.all(np.isfinite(probabilities)):
    raise ValueError("scores: a probability is not finite")
  try:
    from sklearn import metrics
  except ImportError:
    raise ConfigError("scores of a task need scikit-learn: pip install 'lmcompress[tasks]'") from None
  said, every = probabilities.argmax(1), list(range(len(classes)))
  precision, recall, f1, _ = metrics.precision_recall_fscore_support(
    labels, said, labels=every, average="macro", zero_division=0,  # pyright: ignore[reportArgumentType]
  )
  auc, roc = None, None
  if set(labels.tolist()) == set(every):
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      auc = float(np.mean([metrics.roc_auc_score(labels == c, probabilities[:, c]) for c in every]))
      roc = [_curve(*metrics.roc_curve(labels == c, probabilities[:, c])[:2]) for c in every]
  confusion = metrics.confusion_matrix(labels, said, labels=every)
  found = {
    "measure": "accuracy", "n": len(labels), "accuracy": float(np.mean(labels == said)), "precision": float(precision),
    "recall": float(recall), "f1": float(f1), "auc": auc, "roc": roc, "confusion": confusion.tolist(),
    "classes": list(classes),
  }  # fmt: skip
  if resamples:
    draw = np.random.default_rng(seed)
    cells = draw.multinomial(len(labels), confusion.ravel() / len(labels), resamples)
    drawn = np.stack([_from_confusion(counts) for counts in cells])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    found["interval"] = {name: [float(low[i]), float(high[i])] for i, name in enumerate(("accuracy", "f1"))}
  return found


def _curve(false_rates: np.ndarray, true_rates: np.ndarray) -> list[float]:
  """True positive rates at even false positive rates: straight between corners, the upper end where a curve rises."""
  asked = np.linspace(0, 1, ROC_POINTS)
  before = np.searchsorted(false_rates, asked, side="right") - 1
  after = np.minimum(before + 1, len(false_rates) - 1)
  width = np.maximum(false_rates[after] - false_rates[before], 1e-12)
  part = np.where(after > before, (asked - false_rates[before]) / width, 0)
  return [round(float(rate), 4) for rate in true_rates[before] + part * (true_rates[after] - true_rates[before])]


def _from_confusion(counts: np.ndarray) -> tuple[float, float]:
  """Accuracy and macro F1 of a flat confusion matrix; drawing rows anew draws its cells from a multinomial."""
  c = counts.reshape((int(len(counts) ** 0.5),) * 2)
  right = np.diag(c)
  sizes = c.sum(0) + c.sum(1)
  return right.sum() / c.sum(), float(np.mean(2 * right / np.maximum(sizes, 1)))
