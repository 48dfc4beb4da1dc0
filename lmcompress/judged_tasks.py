"""A config's tasks: their rows by the name of a data set, and how what a model says of the held-out ones is scored."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmcompress.config import TaskTable
from lmcompress.data.labelled import DATASETS, encode_rows, load_labelled, require_name
from lmcompress.data.pairs import PAIRS, Pairs, load_pairs
from lmcompress.data.questions import QUESTIONS, encode_questions, load_questions
from lmcompress.data.tagged import TAGGED, encode_tagged, load_tagged
from lmcompress.io.load import read_tasks
from lmcompress.training import Task, probabilities
from lmcompress.types import ConfigError, Params

KNOWN: dict[str, dict[str, str]] = {
  "classes of texts and images": DATASETS,
  "entities in texts": TAGGED,
  "answers in passages": QUESTIONS,
  "texts to write": PAIRS,
}
"""Names of data sets and a line for each, by what a model learns of them."""

TEST_TEXTS = 500
"""Of held-out pairs are written at most, spread over them: writing takes longer than reading."""


BATCH = 16
"""Rows at once."""
_ROUNDS = 3


class Judged(NamedTuple):
  """A task.

  Attributes:
    train, test: its rows.
    pairs: of texts to write: all of them, and with `sources` and `references` those that `test` has.
  """

  train: Task
  test: Task
  pairs: Pairs | None = None
  sources: Sequence[str] = ()
  references: Sequence[str] = ()


def judged_task(table: TaskTable, model: Any, tokenizer: Any) -> Judged:
  """What a task trains on and what it is judged by.

  Raises:
    SourceError: no data set of that name, or it cannot be downloaded.
    ConfigError: the model cannot learn it, or no row fits.
  """
  where, name = f"task {table.name}: ", table.data
  writes = hasattr(model, "encode")
  require_name(name, (known for names in KNOWN.values() for known in names))
  if writes != (name in PAIRS):
    fits = "writes texts" if writes else "has no decoder beside an encoder to write texts with"
    alike = PAIRS if writes else {known: 0 for names in KNOWN.values() if names is not PAIRS for known in names}
    raise ConfigError(f"{where}data {name}, and the model {fits}; give one of {', '.join(alike)}")
  special = writes or not getattr(model, "causal", True)
  try:
    return _read(table, tokenizer, special)
  except ConfigError as error:
    raise ConfigError(f"{where}{error}") from None


def _read(table: TaskTable, tokenizer: Any, special: bool) -> Judged:
  """The rows of a data set, as its kind asks."""
  name = table.data
  if name in PAIRS:
    return _pairs(table, tokenizer)
  if name in TAGGED:
    found = load_tagged(name)
    parts = [
      Task(*encode_tagged(some, tokenizer, table.length, special), found.classes, "tags")
      for some in (_some(found.train, table.rows), found.test)
    ]
  elif name in QUESTIONS:
    asked = load_questions(name)
    encoded = [
      encode_questions(some, tokenizer, table.length, special)
      for some in (_some(asked.train, table.rows), asked.test)
    ]
    parts = [Task(e.tokens, e.mask, e.spans, ("start", "end"), "spans", e.passages) for e in encoded]
  else:
    parts = _labelled(table, tokenizer, special)
  require_scorer(parts[0].kind)
  return Judged(parts[0], parts[1])


def require_scorer(kind: str, measure: str = "") -> None:
  """Raises ConfigError where a package that scores is missing, before anything is learned."""
  package = {"tags": "seqeval", "labels": "sklearn", "texts": "sacrebleu" if measure == "bleu" else "rouge_score"}
  if kind in package and importlib.util.find_spec(package[kind]) is None:
    name = {"sklearn": "scikit-learn", "rouge_score": "rouge-score"}.get(package[kind], package[kind])
    raise ConfigError(f"scores of {kind} need {name}: pip install 'lmcompress[tasks]'")


def require_heads(model: str, tasks: Mapping[str, Judged]) -> None:
  """Raises ConfigError where a saved model has a head of a task's name that tells something else.

  Args:
    model: as `load` takes it.
  """
  known = read_tasks(model)
  for name, judged in tasks.items():
    head, task = known.get(name), judged.train
    if head is None or not task.has_head:
      continue
    told = head.get("kind", "labels"), tuple(head["classes"])
    if told != (task.kind, tuple(task.classes)):
      theirs, ours = (f"{kind} {', '.join(classes)[:80]}" for kind, classes in (told, (task.kind, task.classes)))
      raise ConfigError(f"task {name}: the head of that name in {model} tells {theirs}; the data {ours}; rename one")


def _spread(count: int, rows: int | None) -> np.ndarray:
  """Which of `count` rows are taken: all, or `rows` spread over them, whatever their order."""
  return np.arange(count) if rows is None else np.linspace(0, count - 1, min(rows, count)).astype(int)


def _some(values: Sequence[Any], rows: int | None) -> list[Any]:
  return [values[i] for i in _spread(len(values), rows).tolist()]


def _labelled(table: TaskTable, tokenizer: Any, special: bool) -> list[Task]:
  data, parts = load_labelled(table.data), []
  for (documents, labels), rows in ((data.train, table.rows), (data.test, None)):
    chosen = _spread(len(labels), rows)
    some: Any = documents[chosen] if isinstance(documents, np.ndarray) else [documents[i] for i in chosen.tolist()]
    parts.append(Task(*encode_rows(some, tokenizer, table.length, special), labels[chosen], data.classes))
  return parts


def _pairs(table: TaskTable, tokenizer: Any) -> Judged:
  """Pairs of which either side has more than `length` tokens are left out; a text to write ends with a token."""
  pairs = load_pairs(table.data)
  require_scorer("texts", pairs.measure)
  if tokenizer.eos_id is None:
    raise ConfigError("the tokenizer has no token that ends a text")
  tasks: list[Task] = []
  kept: tuple[list[str], list[str]] = [], []
  for (sources, targets), rows in ((pairs.train, table.rows), (pairs.test, TEST_TEXTS)):
    read, write, left = [], [], []
    for i in _spread(len(sources), rows).tolist():
      source = list(tokenizer.encode(sources[i], add_special=True))
      target = [*tokenizer.encode(targets[i]), tokenizer.eos_id]
      if source and max(len(source), len(target)) <= table.length:
        read.append(source)
        write.append(target)
        left.append(i)
    if not left:
      raise ConfigError(f"length {table.length}: no pair of {table.data} is so short; raise it")
    tokens, mask = np.zeros((len(left), table.length), np.int32), np.zeros((len(left), table.length), np.int32)
    texts = np.full((len(left), table.length), -1, np.int32)
    for row, (source, target) in enumerate(zip(read, write, strict=True)):
      tokens[row, : len(source)], mask[row, : len(source)], texts[row, : len(target)] = source, 1, target
    tasks.append(Task(tokens, mask, texts, (), "texts"))
    kept = [str(sources[i]) for i in left], [str(targets[i]) for i in left]
  return Judged(tasks[0], tasks[1], pairs, kept[0], kept[1])


def scored(model: Any, params: Params, tokenizer: Any, name: str, judged: Judged) -> dict[str, Any]:
  """What a model's answers to a task's held-out rows are worth; `measure` names the score that says most."""
  test = judged.test
  if test.kind == "texts":
    from lmcompress.evaluate import texts
    from lmcompress.generation.seq2seq import rewrite

    assert judged.pairs is not None
    written = rewrite(model, params, tokenizer, judged.sources, test.labels.shape[1], batch=BATCH)
    return texts.scores(written, judged.references, judged.pairs.measure, judged.pairs.language)
  said = probabilities(model, params, name, test, BATCH)
  if test.kind == "tags":
    from lmcompress.evaluate import entities

    return entities.scores(test.labels, said.argmax(-1), test.classes)
  if test.kind == "spans":
    from lmcompress.evaluate import spans

    return spans.scores(test.labels, spans.likeliest(said))
  from lmcompress.evaluate import classification

  return classification.scores(test.labels, said, test.classes)


def rows_per_s(model: Any, params: Params, tokenizer: Any, name: str, judged: Judged) -> float:
  """Rows that are answered in a second, `BATCH` at once: the median of some rounds after what `scored` compiled."""
  from lmcompress.generation.seq2seq import rewrite

  test, times = judged.test.spread(BATCH), []
  for _ in range(_ROUNDS):
    begun = time.perf_counter()
    if test.kind == "texts":
      rewrite(model, params, tokenizer, judged.sources[:BATCH], test.labels.shape[1], batch=BATCH)
    else:
      probabilities(model, params, name, test, BATCH)
    times.append(time.perf_counter() - begun)
  return len(test.labels) / float(np.median(times))
