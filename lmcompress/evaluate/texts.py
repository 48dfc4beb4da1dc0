"""Scores of written texts beside those that people wrote: BLEU and chrF of translations, ROUGE of summaries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from lmcompress.evaluate.resampling import resampled
from lmcompress.types import ConfigError

SHOWN = 5
"""Texts that a result keeps."""


def scores(
  written: Sequence[str],
  references: Sequence[str],
  measure: Literal["bleu", "rouge"],
  language: str = "en",
  resamples: int = 1000,
  seed: int = 0,
) -> dict[str, Any]:
  """How near written texts are to references, one for each.

  Args:
    measure: `bleu` gives BLEU and chrF, from 0 to 100 (sacrebleu), `rouge` the F-measures of ROUGE-1 and ROUGE-L, from
      0 to 1, words stemmed (rouge-score).
    language: of both, for sacrebleu's tokenizer: `zh` is cut into characters.
    resamples: bootstrap samples for the interval; 0 leaves it out.
    seed: of the resampling; sacrebleu has its own.

  Returns:
    `n`, `bleu`, `chrf` and `signature`, or `rouge1` and `rougeL`; `interval` of BLEU or ROUGE-L, `measure`, which names
    that, and `examples`, the first of both.

  Raises:
    ValueError: not one text for each reference, or none.
    ConfigError: the package that scores is missing.
  """
  if len(written) != len(references) or not written:
    raise ValueError(f"texts: {len(written)} were written for {len(references)} references; one each, and one at least")
  shown = [list(pair) for pair in zip(written, references, strict=True)][:SHOWN]
  found = _bleu(written, references, language, resamples) if measure == "bleu" else _rouge(
    written, references, resamples, seed
  )  # fmt: skip
  return {"n": len(written), **found, "examples": shown}


def _bleu(written: Sequence[str], references: Sequence[str], language: str, resamples: int) -> dict[str, Any]:
  try:
    from sacrebleu.metrics import BLEU, CHRF  # type: ignore[attr-defined]
  except ImportError:
    raise ConfigError("scores of translations need sacrebleu: pip install 'lmcompress[tasks]'") from None
  bleu = BLEU(tokenize="zh" if language == "zh" else "13a")
  found = bleu.corpus_score(list(written), [list(references)], n_bootstrap=resamples or 1)
  outcome = {
    "measure": "bleu", "bleu": found.score, "signature": bleu.get_signature().format(),
    "chrf": CHRF().corpus_score(list(written), [list(references)]).score,
  }  # fmt: skip
  if resamples > 1:
    told = json.loads(found.format(width=6, is_json=True, signature=bleu.get_signature().format()))
    mean, about = (float(told.get(f"confidence_{key}", 0)) for key in ("mean", "var"))  # absent where BLEU is 0
    outcome["interval"] = {"bleu": [mean - about, mean + about]}
  return outcome


def _rouge(written: Sequence[str], references: Sequence[str], resamples: int, seed: int) -> dict[str, Any]:
  try:
    from rouge_score.rouge_scorer import RougeScorer
  except ImportError:
    raise ConfigError("scores of summaries need rouge-score: pip install 'lmcompress[tasks]'") from None
  names = ("rouge1", "rougeL")
  scorer = RougeScorer(list(names), use_stemmer=True)
  found = [scorer.score(reference, text) for text, reference in zip(written, references, strict=True)]
  each = np.asarray([[score[name].fmeasure for name in names] for score in found])
  rouge = {name: float(each[:, i].mean()) for i, name in enumerate(names)}
  outcome: dict[str, Any] = {"measure": "rougeL", **rouge}
  if resamples:
    mean = lambda sums: sums / len(each)  # noqa: E731
    outcome["interval"] = {"rougeL": resampled(each[:, 1], mean, resamples, seed)}
  return outcome
