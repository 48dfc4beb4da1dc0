"""Passages of a folder of texts, found by the meaning of a question: what an answer is to rest on."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmcompress.types import Params, SourceError

SUFFIXES = (".txt", ".md", ".rst")
LARGEST_FILE = 16 << 20
WORDS = 120
"""Words of a passage at most, about 160 tokens."""
LEAST = 0.25
"""Cosine from which a passage has to do with a question."""


@dataclasses.dataclass(frozen=True)
class Passage:
  """A piece of a file.

  Attributes:
    source: the file's path within the folder.
    line: where it begins, from 1.
  """

  source: str
  line: int
  text: str


def passages_of(folder: Path, note: Callable[[str], None] = lambda text: None) -> list[Passage]:
  """The passages of all text files below a folder, in the order of their paths.

  Paragraphs of one file are joined up to `WORDS`, longer ones cut. A file that is too large or no UTF-8 is left out and
  `note` told.

  Raises:
    SourceError: there is no such folder, or no text in it.
  """
  if not folder.is_dir():
    raise SourceError(f"{folder}: a folder of texts is needed ({', '.join(SUFFIXES)})")
  found: list[Passage] = []
  for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()):
    source = path.relative_to(folder).as_posix()
    if path.stat().st_size > LARGEST_FILE:
      note(f"{source} is left out: over {LARGEST_FILE >> 20} MiB")
      continue
    try:
      text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
      note(f"{source} is left out: no UTF-8 at byte {error.start}")
      continue
    found += [Passage(source, line, piece) for line, piece in _pieces(text)]
  if not found:
    raise SourceError(f"{folder}: no text in files of {', '.join(SUFFIXES)}")
  return found


def _pieces(text: str) -> Iterator[tuple[int, str]]:
  """`(line, words)` of pieces of at most `WORDS`; a paragraph is cut only if it is longer than that itself."""
  held: list[str] = []
  begun, line, last = 1, 1, 0
  for match in re.finditer(r"\S(?:.|\n(?!\s*\n))*", text):
    line += text.count("\n", last, match.start())
    last, words = match.start(), match.group().split()
    if held and len(held) + len(words) > WORDS:
      yield begun, " ".join(held)
      held = []
    begun = begun if held else line
    held += words
    while len(held) > WORDS:
      yield begun, " ".join(held[:WORDS])
      held, begun = held[WORDS:], line
  if held:
    yield begun, " ".join(held)


class Knowledge:
  """Passages and the vectors that an encoder gives them."""

  def __init__(self, model: Any, params: Params, tokenizer: Any, passages: Sequence[Passage], length: int = 256):
    """Reads all passages.

    Args:
      model, params, tokenizer: an encoder, such as `minilm-l6`.
      length: tokens of a passage that are read, fewer where the model takes fewer.

    Raises:
      ValueError: the model is no encoder, or there are no passages.
    """
    from lmcompress.evaluate.sentences import sentence_vectors

    if getattr(model, "causal", True) or hasattr(model, "encode") or tokenizer is None:
      why = "gives texts no vectors" if tokenizer is not None else "has no tokenizer"
      raise ValueError(f"{type(model).__name__} {why}; use an encoder such as minilm-l6")
    length = min(length, model.config.max_length)
    self.passages = list(passages)
    self._vectors = lambda texts: sentence_vectors(model, params, tokenizer, texts, length)
    self._found = self._vectors([passage.text for passage in self.passages])

  def search(self, question: str, count: int = 3, least: float = LEAST) -> list[tuple[Passage, float]]:
    """The passages nearest to a question in meaning, nearest first, with their cosines; none below `least`."""
    cosines = self._found @ self._vectors([question])[0]
    nearest = np.argsort(-cosines, kind="stable")[:count].tolist()
    return [(self.passages[i], float(cosines[i])) for i in nearest if cosines[i] >= least]
