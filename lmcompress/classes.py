"""Classes of texts in a file by the heads of a trained model, and their shares by source, date or any other column."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmcompress.types import ConfigError, FormatError, Params, SourceError

PERIODS = {"day": 10, "month": 7, "year": 4}
"""Characters of an ISO date that say a period."""
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_WIDTHS = 32
"""Rows of texts have a multiple of so many tokens, so that files of like texts share a program."""
MOST_GROUPS = 40
"""Groups of a column that a plot shows, the largest."""


@dataclasses.dataclass(frozen=True)
class Texts:
  """A file of texts.

  Attributes:
    rows: all columns of each row.
    texts: the texts.
    by: the columns to add up by.
  """

  rows: tuple[Mapping[str, Any], ...]
  texts: tuple[str, ...]
  by: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Head:
  """What a head tells apart, and how many tokens of a text it was trained on."""

  classes: tuple[str, ...]
  length: int


def read_texts(path: Path, column: str, by: Sequence[str]) -> Texts:
  """Texts and the columns beside them.

  Raises:
    SourceError: the file is not there, or of no form that is known.
    FormatError: it is damaged, has no such column, or a row without a text.
  """
  readers: dict[str, Callable[[Path], Iterator[Mapping[str, Any]]]] = {
    ".csv": lambda path: _table(path, ","), ".tsv": lambda path: _table(path, "\t"), ".jsonl": _lines,
    ".txt": lambda path: ({column: line} for line in _nonempty(path)),
  }  # fmt: skip
  if path.suffix not in readers or not path.is_file():
    raise SourceError(f"{path}: a file of {', '.join(readers)} is needed")
  try:
    rows = tuple(readers[path.suffix](path))
  except (csv.Error, ValueError, RecursionError) as error:
    raise FormatError(f"{path}: cannot be read as {path.suffix[1:]} in UTF-8 ({str(error)[:120]})") from None
  if not rows:
    raise FormatError(f"{path}: no rows")
  for number, row in enumerate(rows, 1):
    for name in (column, *by):
      if name not in row:
        columns = ", ".join(str(key) for key in row)
        raise FormatError(f"{path}: row {number} has no column {name!r}; it has {columns}")
    if not isinstance(row[column], str) or not row[column].strip():
      raise FormatError(f"{path}: row {number} has no text in {column!r}; leave the row out")
  return Texts(rows, tuple(str(row[column]) for row in rows), tuple(by))


def _table(path: Path, delimiter: str) -> Iterator[Mapping[str, Any]]:
  with path.open(encoding="utf-8-sig", newline="") as file:
    for row in csv.DictReader(file, delimiter=delimiter, strict=True):
      if None in row or None in row.values():
        raise ValueError("a row has more or fewer cells than the header")
      yield row


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
  for line in _nonempty(path):
    row = json.loads(line)
    if not isinstance(row, dict):
      raise ValueError(f"a line is no object: {line[:40]}")
    yield row


def _nonempty(path: Path) -> Iterator[str]:
  with path.open(encoding="utf-8-sig") as file:
    yield from (line.strip() for line in file if line.strip())


def heads_of(folder: Path, params: Params, chosen: Sequence[str] | None = None) -> dict[str, Head]:
  """The heads of a saved model by the names of their tasks.

  Raises:
    ConfigError: the model has no heads, or none of a name that was asked for.
  """
  from lmcompress.io.load import read_tasks

  known = read_tasks(folder)
  others = {name: task["kind"] for name, task in known.items() if task.get("kind", "labels") != "labels"}
  known = {name: task for name, task in known.items() if name not in others}
  heads = {name: Head(tuple(task["classes"]), task["length"]) for name, task in known.items()}
  heads = {name: head for name, head in heads.items() if name in params.get("tasks", {})}
  if asked := [name for name in chosen or others if name in others and (chosen or not heads)]:
    told = f"head {asked[0]!r} is of {others[asked[0]]}, and classes of whole texts are told"
    raise ConfigError(f"{folder}: its {told}; it has {', '.join(heads) or 'no other'}")
  if not heads and params.get("tasks"):
    names = ", ".join(sorted(params["tasks"]))
    raise ConfigError(f"{folder}: it does not say the classes of its heads {names}; save it with `tasks=`, as runs do")
  if not heads:
    raise ConfigError(f"{folder}: the model has no heads; train them by a config with `tasks`, give its model folder")
  if missing := [name for name in chosen or () if name not in heads]:
    raise ConfigError(f"{folder}: no head {missing[0]!r}; it has {', '.join(heads)}")
  return {name: heads[name] for name in chosen or heads}


def classified(
  model: Any,
  params: Params,
  tokenizer: Any,
  texts: Sequence[str],
  heads: Mapping[str, Head],
  batch: int = 32,
  done: Callable[[int], None] = lambda count: None,
) -> dict[str, np.ndarray]:
  """Probabilities of each head's classes, float32 `[n, classes]`.

  Args:
    done: told how many more texts are read.

  Raises:
    ConfigError: a batch below 1, or a text without a token.
  """
  from lmcompress.data.labelled import encode_rows
  from lmcompress.training.tasks import Task, probabilities

  if batch < 1:
    raise ConfigError(f"batch {batch}: at least one text at once")
  found: dict[str, np.ndarray] = {}
  for name, head in heads.items():
    tokens, mask = encode_rows(list(texts), tokenizer, head.length, special=not getattr(model, "causal", True))
    longest = -(-int(mask.sum(1).max()) // _WIDTHS) * _WIDTHS  # where all are short, so is what is run
    tokens, mask, parts = tokens[:, :longest], mask[:, :longest], []
    for start in range(0, len(texts), 8 * batch):
      some = slice(start, start + 8 * batch)
      task = Task(tokens[some], mask[some], np.zeros(len(tokens[some]), np.int32), head.classes)
      parts.append(probabilities(model, params, name, task, batch))
      done(len(parts[-1]))
    found[name] = np.concatenate(parts)
  return found


def shares(said: np.ndarray, table: Texts, period: str = "month") -> list[tuple[str, list[float], int]]:
  """For all texts and each group: its name, the share of texts of each class, and how many texts there are.

  A text is of its likeliest class. A column of ISO dates is grouped by `period`.
  """
  likeliest = np.eye(said.shape[1])[said.argmax(1)]
  found = [("all", likeliest.mean(0).tolist(), len(said))]
  for column in table.by:
    groups = np.asarray(_groups(table, column, period))
    found += [
      (f"{column} {group}", likeliest[groups == group].mean(0).tolist(), int((groups == group).sum()))
      for group in sorted(set(groups.tolist()))
    ]
  return found


def _groups(table: Texts, column: str, period: str) -> list[str]:
  values = [str(row[column]) for row in table.rows]
  dates = all(_DATE.match(value) for value in values)
  return [value[: PERIODS[period]] for value in values] if dates else values


def write(path: Path, table: Texts, found: Mapping[str, np.ndarray], heads: Mapping[str, Head]) -> None:
  """The rows again as CSV, with each task's class and its probability."""
  columns = list(dict.fromkeys(key for row in table.rows for key in row))
  with path.open("w", encoding="utf-8", newline="") as file:
    writer = csv.writer(file)
    writer.writerow([*columns, *(name for task in heads for name in (task, f"{task}_probability"))])
    for i, row in enumerate(table.rows):
      added = [
        cell for task, head in heads.items()
        for cell in (head.classes[int(found[task][i].argmax())], f"{found[task][i].max():.4f}")
      ]  # fmt: skip
      writer.writerow([*(row.get(column, "") for column in columns), *added])


def draw(path: Path, table: Texts, found: Mapping[str, np.ndarray], heads: Mapping[str, Head], period: str) -> None:
  """Stacked bars of the shares of classes, a panel for each task and column."""
  import matplotlib

  with matplotlib.rc_context({"text.parse_math": False}):  # a source may be called US$
    _panels(table, found, heads, period).savefig(path, format="svg", metadata={"Date": None})


def _panels(table: Texts, found: Mapping[str, np.ndarray], heads: Mapping[str, Head], period: str) -> Any:
  from matplotlib.figure import Figure

  panels = [(name, column) for name in heads for column in table.by or ("",)]
  figure = Figure(figsize=(7, 2.2 * len(panels) + 0.6), layout="constrained")
  for at, (name, column) in enumerate(panels, 1):
    axes, head = figure.add_subplot(len(panels), 1, at), heads[name]
    rows = shares(found[name], dataclasses.replace(table, by=(column,) if column else ()), period)
    rows = rows[1:] if column else rows
    kept = {row[0] for row in sorted(rows, key=lambda row: -row[2])[:MOST_GROUPS]}
    rows = [row for row in rows if row[0] in kept]
    names, bottom = [f"{group.removeprefix(f'{column} ')}\n{count}" for group, _, count in rows], np.zeros(len(rows))
    for c, word in enumerate(head.classes):
      heights = np.asarray([row[1][c] for row in rows])
      axes.bar(range(len(rows)), heights, bottom=bottom, label=word)
      bottom += heights
    axes.set_xticks(range(len(rows)), names, fontsize=7, rotation=0 if sum(map(len, names)) <= 80 else 90)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of texts")
    axes.set_title(f"{name}, by {column}" if column else name, fontsize=9)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
  return figure
