"""Scores of named entities: precision, recall and F1 of whole entities, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmcompress.evaluate.resampling import resampled
from lmcompress.types import ConfigError


def scores(
  tags: np.ndarray, said: np.ndarray, classes: Sequence[str], resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
  """What tags are worth, as CoNLL counts: an entity is right where its first word, its last and its type are (seqeval).

  Args:
    tags, said: int `[n, length]`, the true class of each word and the one that was said; -1 in `tags` counts nothing.
    classes: names, by class: `O`, `B-type`, `I-type`.
    resamples: bootstrap samples of texts for the interval; 0 leaves it out.
    seed: of the resampling.

  Returns:
    `n` texts, `entities` in them, `precision`, `recall`, `f1`, `types` (F1 of each type and how many there are),
    `interval` of F1, and `measure`, which is `f1`.

  Raises:
    ValueError: shapes that do not fit, or no text.
    ConfigError: seqeval is missing.
  """
  tags, said = np.asarray(tags), np.asarray(said)
  if tags.shape != said.shape or tags.ndim != 2 or not len(tags):
    raise ValueError(f"entities: tags {list(tags.shape)} and {list(said.shape)} do not fit, or there is no text")
  try:
    from seqeval.metrics import classification_report
    from seqeval.metrics.sequence_labeling import get_entities
  except ImportError:
    raise ConfigError("scores of entities need seqeval: pip install 'lmcompress[tasks]'") from None
  true, found = (
    [[classes[c] for c in row[counts >= 0]] for row, counts in zip(side, tags, strict=True)] for side in (tags, said)
  )
  report = classification_report(true, found, output_dict=True, zero_division=0)  # pyright: ignore[reportArgumentType]
  assert isinstance(report, dict)
  whole = report.pop("micro avg")
  entities = [(set(get_entities(a)), set(get_entities(b))) for a, b in zip(true, found, strict=True)]
  counts = np.asarray([[len(a & b), len(a) + len(b)] for a, b in entities])
  outcome = {
    "measure": "f1", "n": len(tags), "entities": int(whole["support"]), "precision": float(whole["precision"]),
    "recall": float(whole["recall"]), "f1": float(whole["f1-score"]),
    "types": {
      name: {"f1": float(row["f1-score"]), "n": int(row["support"])}
      for name, row in report.items() if not name.endswith(" avg")
    },
  }  # fmt: skip
  f1 = lambda sums: 2 * sums[..., 0] / np.maximum(sums[..., 1], 1)  # noqa: E731
  return outcome | ({"interval": {"f1": resampled(counts, f1, resamples, seed)}} if resamples else {})
