"""Questions whose answer is a part of a passage, made of texts: a sentence with a gap, and the passage it is from.

No such data with answers by people can be had from package registries, so that these are synthetic: what the gap
hides is a name or a number of its own sentence, and the passage holds that sentence whole among others. They say
whether a model finds and points at a place, not whether it understands a question.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lmcompress.data.labelled import load_labelled, require_name
from lmcompress.types import ConfigError

QUESTIONS: dict[str, str] = {
  "gaps": "sentences of BBC's articles with a name or a number left out, and what stands around them; split as bbc"
}
"""One line for each data set that has a name."""

GAP = "which"
"""Stands in a question for what is asked."""
_PER_ARTICLE = 3
_AROUND = 2
"""Sentences on either side."""
_NAME = re.compile(r"(?<=[a-z,] )(?:[A-Z][\w'-]+|\d[\d.,]*\d|\d+)(?: (?:[A-Z][\w'-]+|\d[\d.,]*\d))*")
_SENTENCE = re.compile(r"(?<=[a-z\d][.!?])\s+(?=[A-Z\"'])")


@dataclasses.dataclass(frozen=True)
class Question:
  """A question, the passage that answers it, and from which character on and up to which the answer stands there."""

  question: str
  passage: str
  start: int
  end: int


@dataclasses.dataclass(frozen=True)
class Questions:
  """A data set."""

  train: Sequence[Question]
  test: Sequence[Question]


def load_questions(name: str) -> Questions:
  """A data set by its name in `QUESTIONS`.

  Raises:
    SourceError: no such name, or it cannot be downloaded.
  """
  require_name(name, QUESTIONS)
  data = load_labelled("bbc")
  train, test = ([q for text in part[0] for q in gaps(str(text))] for part in (data.train, data.test))
  known = {text for q in train for text in (q.question, q.passage)}  # some articles stand under two headlines
  return Questions(train, [q for q in test if q.question not in known and q.passage not in known])


def gaps(article: str) -> list[Question]:
  """Questions on an article, spread over it; what a passage says twice is not asked."""
  sentences = [" ".join(s.split()) for s in _SENTENCE.split(article.partition("\n")[2])]
  sentences = [s for s in sentences if 30 <= len(s) <= 240]
  found = []
  for i, sentence in enumerate(sentences):
    answers = [m for m in _NAME.finditer(sentence) if len(m.group()) >= 2]
    if not answers:
      continue
    answer = answers[len(found) % len(answers)]
    first = max(0, i - _AROUND)
    passage = " ".join(sentences[first : i + _AROUND + 1])
    if passage.count(answer.group()) != 1:
      continue
    start = passage.index(answer.group())
    question = f"{sentence[: answer.start()]}{GAP}{sentence[answer.end() :]}"
    found.append(Question(question, passage, start, start + len(answer.group())))
  step = max(1, len(found) // _PER_ARTICLE)
  return found[::step][:_PER_ARTICLE]


class Encoded(NamedTuple):
  """Questions and passages as tokens.

  Attributes:
    tokens, mask: int32 `[n, length]`.
    spans: int32 `[n, 2]`, the first and the last token of the answer.
    passages: int32 `[n, 2]`, those of the passage.
    numbers: which of the questions these are.
  """

  tokens: np.ndarray
  mask: np.ndarray
  spans: np.ndarray
  passages: np.ndarray
  numbers: list[int]


def encode_questions(questions: Sequence[Question], tokenizer: Any, length: int, special: bool = False) -> Encoded:
  """A row for each question and its passage; those that have more than `length` tokens are left out.

  Args:
    special: adds the tokens that the tokenizer's template puts around and between two texts.

  Raises:
    ConfigError: none fits.
  """
  rows = []
  for number, asked in enumerate(questions):
    found = tokenizer.backend.encode(asked.question, asked.passage, add_special_tokens=special)
    passage = [i for i, part in enumerate(found.sequence_ids) if part == 1]
    inside = [i for i in passage if found.offsets[i][0] < asked.end and found.offsets[i][1] > asked.start]
    if len(found.ids) <= length and inside:
      rows.append((found.ids, inside, passage, number))
  if not rows:
    raise ConfigError(f"length: not one of {len(questions)} questions with their passages has {length} tokens or fewer")
  tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
  for row, (ids, *_) in enumerate(rows):
    tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
  spans, passages = (np.asarray([(row[part][0], row[part][-1]) for row in rows], np.int32) for part in (1, 2))
  return Encoded(tokens, mask, spans, passages, [row[3] for row in rows])
