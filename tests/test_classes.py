"""Texts of a file, their classes by saved heads, and shares by column."""

from __future__ import annotations

import csv
import json

import jax
import numpy as np
import pytest
from small_model import byte_level, random_params

import lmcompress as lmc
from lmcompress import classes
from lmcompress.io import checkpoint
from lmcompress.models import Llama, LlamaConfig
from lmcompress.training.tasks import Task, probabilities, with_heads
from lmcompress.types import ConfigError, FormatError, SourceError

ROWS = [
  {"body": "a wolf came", "source": "x", "date": "2024-01-31T10:00"},
  {"body": "kings", "source": "y", "date": "2024-02-01"},
  {"body": "bread and butter", "source": "x", "date": "2024-02-29"},
]  # fmt: skip
MOOD = ("bad", "good")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A model with two heads, and its folder."""
  model, folder = Llama(LlamaConfig(head_dim=16, max_length=256)), tmp_path_factory.mktemp("m") / "model"
  none = np.zeros((1, 4), np.int32)
  tasks = {name: Task(none, none, np.zeros(1, np.int32), words) for name, words in (("mood", MOOD), ("topic", "abc"))}
  params = with_heads(model, random_params(), tasks, jax.random.key(0))
  told = {"mood": {"classes": MOOD, "length": 12}, "topic": {"classes": ("a", "b", "c"), "length": 12}}
  checkpoint.save(folder, model, params, byte_level(), tasks=told)
  return folder, model, params


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "news.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  return path


def test_every_form_of_a_file(tmp_path, file):
  want = tuple(row["body"] for row in ROWS)
  assert classes.read_texts(file, "body", ["source"]).texts == want
  for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
    path = tmp_path / f"news{suffix}"
    with path.open("w", newline="") as f:
      writer = csv.DictWriter(f, ROWS[0], delimiter=delimiter)
      writer.writeheader()
      writer.writerows(ROWS)
    table = classes.read_texts(path, "body", ["date", "source"])
    assert table.texts == want and table.rows == tuple(ROWS) and table.by == ("date", "source")
  (tmp_path / "odd.jsonl").write_text(json.dumps({"text": "a\u2028b"}, ensure_ascii=False) + "\n", "utf-8")
  assert classes.read_texts(tmp_path / "odd.jsonl", "text", []).texts == ("a\u2028b",)
  (tmp_path / "news.txt").write_text("\ufeff" + "\n\n".join(want) + "\n")
  assert classes.read_texts(tmp_path / "news.txt", "text", []).texts == want


@pytest.mark.parametrize("name, content, message", [
  ("a.csv", "text,b\nx\n", "a row has more or fewer cells"), ("a.csv", "text\n", "no rows"),
  ("a.csv", "body\nx\n", "row 1 has no column 'text'; it has body"),
  ("a.csv", "text,b\n ,c\n", "row 1 has no text in 'text'"),
  ("a.jsonl", "[1]\n", "a line is no object"), ("a.jsonl", "{\n", "cannot be read as jsonl"),
  ("a.jsonl", "[" * 200000, "cannot be read as jsonl"), ("a.jsonl", '{"text": 3}\n', "row 1 has no text"),
  ("a.txt", b"\xff\xfe", "cannot be read as txt"),
])  # fmt: skip
def test_files_that_are_refused(tmp_path, name, content, message):
  path = tmp_path / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(FormatError, match=message):
    classes.read_texts(path, "text", [])


def test_a_file_of_no_known_form(tmp_path):
  for name in ("a.pdf", "nowhere.csv"):
    with pytest.raises(SourceError, match=r"a file of \.csv, \.tsv, \.jsonl, \.txt is needed"):
      classes.read_texts(tmp_path / name, "text", [])


def test_classes_are_those_of_the_heads(saved, file):
  folder, model, params = saved
  model, again, tokenizer = lmc.load(folder)
  heads = classes.heads_of(folder, again)
  assert heads == {"mood": classes.Head(MOOD, 12), "topic": classes.Head(("a", "b", "c"), 12)}
  texts = classes.read_texts(file, "body", []).texts * 7  # more than a call takes at once
  told = []
  found = classes.classified(model, again, tokenizer, texts, heads, 2, told.append)
  assert sum(told) == 42 and found["topic"].shape == (21, 3)
  tokens = np.zeros((1, 12), np.int32)
  tokens[0, :5] = tokenizer.encode("kings")
  task = Task(tokens, (tokens > 0).astype(np.int32), np.zeros(1, np.int32), MOOD)
  np.testing.assert_allclose(found["mood"][1], probabilities(model, params, "mood", task, 1)[0], atol=1e-6)
  np.testing.assert_array_equal(found["mood"][:3], found["mood"][3:6])


def test_shares_by_source_and_period(file):
  said = np.asarray([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
  table = classes.read_texts(file, "body", ["source", "date"])
  assert classes.shares(said, table) == [
    ("all", [pytest.approx(1 / 3), pytest.approx(2 / 3)], 3), ("source x", [0.5, 0.5], 2), ("source y", [0.0, 1.0], 1),
    ("date 2024-01", [1.0, 0.0], 1), ("date 2024-02", [0.0, 1.0], 2),
  ]  # fmt: skip
  assert [row[0] for row in classes.shares(said, table, "year")][3:] == ["date 2024"]
  days = ["date 2024-01-31", "date 2024-02-01", "date 2024-02-29"]
  assert [row[0] for row in classes.shares(said, table, "day")][3:] == days


def test_what_is_written(tmp_path, file):
  table, head = classes.read_texts(file, "body", ["source"]), {"mood": classes.Head(MOOD, 12)}
  found = {"mood": np.asarray([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])}
  classes.write(tmp_path / "out.csv", table, found, head)
  with (tmp_path / "out.csv").open(newline="") as f:
    rows = list(csv.DictReader(f))
  assert [row["mood"] for row in rows] == ["bad", "good", "good"] and rows[1]["mood_probability"] == "0.8000"
  assert rows[0]["body"] == "a wolf came"
  rows = ({**ROWS[0], "source": "$\\x$"}, *ROWS[1:])
  for by in (("source", "date"), ()):
    classes.draw(tmp_path / "out.svg", classes.Texts(rows, table.texts, by), found, head, "month")
    assert "<svg" in (tmp_path / "out.svg").read_text()


def test_models_without_heads(saved, tmp_path):
  folder, model, params = saved
  with pytest.raises(ConfigError, match="no head 'taste'; it has mood, topic"):
    classes.heads_of(folder, params, ["taste"])
  lmc.save(tmp_path / "plain", model, random_params(), byte_level())
  for where in (tmp_path / "plain", tmp_path):
    with pytest.raises(ConfigError, match="the model has no heads; train them"):
      classes.heads_of(where, random_params())
  with pytest.raises(ConfigError, match="does not say the classes of its heads mood, topic"):
    classes.heads_of(tmp_path / "plain", params)


def test_heads_of_other_kinds_are_named(saved, tmp_path):
  """A head that tags words tells no class of a text; beside one that does it is left aside."""
  folder, model, params = saved
  known = checkpoint.read_tasks(folder)
  tagged = {**known, "mood": {**known["mood"], "kind": "tags"}}
  checkpoint.save(tmp_path / "one", model, params, byte_level(), tasks=tagged)
  assert list(classes.heads_of(tmp_path / "one", params)) == ["topic"]
  with pytest.raises(ConfigError, match="'mood' is of tags, and classes of whole texts are told; it has topic"):
    classes.heads_of(tmp_path / "one", params, ["mood"])
  both = {name: {**task, "kind": "spans"} for name, task in known.items()}
  checkpoint.save(tmp_path / "two", model, params, byte_level(), tasks=both)
  with pytest.raises(ConfigError, match="is of spans, and classes of whole texts are told; it has no other"):
    classes.heads_of(tmp_path / "two", params)


def test_a_damaged_list_of_classes(saved, tmp_path):
  _, model, params = saved
  checkpoint.save(tmp_path / "m", model, params, tasks={"mood": {"classes": [1], "length": 2}})
  with pytest.raises(FormatError, match="its tasks have no classes"):
    checkpoint.read_tasks(tmp_path / "m")
