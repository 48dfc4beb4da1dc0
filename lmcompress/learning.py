"""Training as a config says it: on a text or on tasks, what trains, who teaches, and how the tasks are scored."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmcompress import recipe as recipes
from lmcompress import tree
from lmcompress.config import Config, TaskTable, Train, rules_of
from lmcompress.data.text import load_text, windows
from lmcompress.evaluate import profiling
from lmcompress.evaluate.memory import peak_bytes, reset_peak
from lmcompress.io.load import load
from lmcompress.run_folder import TENSORBOARD, TRAINING, Records
from lmcompress.stages import Stage, Watcher, key
from lmcompress.types import ConfigError, LmcompressError, Params


@contextlib.contextmanager
def _settings() -> Iterator[None]:
  """What a config asks and training cannot do is the config's error."""
  try:
    yield
  except LmcompressError:
    raise
  except ValueError as error:
    raise ConfigError(f"training: {error}") from None


def train_text(
  config: Config,
  train: Train,
  model: Any,
  tokenizer: Any,
  stages: list[Stage],
  watcher: Watcher,
  folder: Path,
  decides: dict[str, Any],
  mesh: Any,
  profile: bool,
) -> dict[str, Any]:
  """Appends the stage `trained`; returns what the result says of the training."""
  from lmcompress.training import Labels, compiled_step, epsilon, fit, store_predictions

  assert train.text is not None
  rows = windows(tokenizer, load_text(train.text), train.windows, train.length)
  held = train.held_out
  held_out = None if held is None else windows(tokenizer, load_text(held.text), held.windows, held.length)
  settings = train.settings()
  spent = None if settings.privacy is None else epsilon(settings, len(rows))
  trains = _selector(train.trainable, stages[-1].params)
  teacher: Any = None
  if settings.needs_teacher:
    rules = rules_of(config)
    teacher = (model, stages[0].params) if train.teacher is None else load(train.teacher, mesh, rules=rules)[:2]
    if train.teacher_top_k is not None:
      watcher.note(f"writing the teacher's {train.teacher_top_k} likeliest tokens of {len(rows)} rows")
      told = functools.partial(watcher.step, "teacher")
      where = folder / TRAINING / "teacher"
      try:
        teacher = store_predictions(teacher[0], teacher[1], rows, where, train.teacher_top_k, train.batch, told)
      except ValueError as error:
        raise ConfigError(f"train.teacher_top_k: {error}") from None

  stretch = profiling.Stretch(folder / TENSORBOARD) if profile else None
  during = recipes.build(train.during, "train.during") if train.during else None

  def on_step(step: int, metrics: dict[str, float]) -> None:
    if stretch is not None:
      stretch.step()
    _told(watcher, train.steps, step, metrics)

  reset_peak()
  begun = time.perf_counter()
  try:
    with _settings():
      params, history = fit(
        model,
        stages[-1].params,
        rows,
        settings,
        seed=config.seed,
        trainable=trains,
        teacher=teacher,
        transform=during,
        folder=folder / TRAINING,
        decides=decides,
        save_every=train.save_every,
        held_out=held_out,
        evaluate_every=train.evaluate_every,
        on_step=on_step,
      )
  finally:
    if stretch is not None:
      stretch.close()
  untrained = stages[-1].params
  stages.append(Stage("trained", params, time.perf_counter() - begun, peak_bytes()))
  needs = None
  if profile and settings.privacy is None:
    watcher.note("compiling the training step from shapes alone, for what it needs")
    guide = teacher if isinstance(teacher, tuple) else None
    shown = dataclasses.replace(settings, match=None, loss=settings.loss if guide else Labels())
    step = compiled_step(model, untrained, shown, train.length, trains, during, guide)
    needs = profiling.needs(step)
  trained = jax.tree.leaves(tree.partition(params, trains)[0])
  return {
    "rows": len(rows),
    "tokens": train.steps * train.batch * train.length,
    "trained_parameters": int(sum(x.size for x in trained)),
    "epsilon": spent,
    "needs": needs,
    "history": history,
  }


def task_data(table: TaskTable, tokenizer: Any, special: bool = False) -> tuple[Any, Any]:
  """What a task trains on and what it is judged by; `special` as of `encode_rows`."""
  from lmcompress.data.labelled import encode_rows, load_labelled
  from lmcompress.training import Task

  data = load_labelled(table.data)
  parts = []
  for documents, labels in (data.train, data.test):
    chosen = np.arange(len(labels))
    if table.rows is not None and not parts:  # spread over the data, whatever its order
      chosen = chosen[np.linspace(0, len(chosen) - 1, min(table.rows, len(chosen))).astype(int)]
    some = documents[chosen] if isinstance(documents, np.ndarray) else [documents[i] for i in chosen.tolist()]
    parts.append(Task(*encode_rows(some, tokenizer, table.length, special), labels[chosen], data.classes))
  return parts[0], parts[1]


def train_tasks(
  config: Config,
  train: Train,
  model: Any,
  tasks: dict[str, tuple[Any, Any]],
  stages: list[Stage],
  watcher: Watcher,
  folder: Path,
  decides: dict[str, Any],
) -> dict[str, Any]:
  """Appends the stage `trained`, whose tree has a head for each task; returns what the result says of the training."""
  from lmcompress.training import Weighting, fit_tasks

  trains = _selector(train.trainable, stages[-1].params)
  weighting = Weighting(**train.weighting.model_dump()) if train.weighting else Weighting()
  during = recipes.build(train.during, "train.during") if train.during else None
  learned = {name: part[0] for name, part in tasks.items()}
  reset_peak()
  begun = time.perf_counter()
  with _settings():
    params, history = fit_tasks(
      model,
      stages[-1].params,
      learned,
      train.settings(),
      weighting,
      seed=config.seed,
      trainable=trains,
      transform=during,
      folder=folder / TRAINING,
      decides=decides,
      save_every=train.save_every,
      on_step=functools.partial(_told, watcher, train.steps),
    )
  stages.append(Stage("trained", params, time.perf_counter() - begun, peak_bytes()))
  heads = jax.tree.leaves(params["tasks"])
  return {
    "rows": sum(len(task.labels) for task in learned.values()),
    "tokens": None,
    "trained_parameters": int(sum(x.size for x in [*jax.tree.leaves(tree.partition(params, trains)[0]), *heads])),
    "epsilon": None,
    "needs": None,
    "history": history,
  }


def _told(watcher: Watcher, steps: int, step: int, metrics: dict[str, float]) -> None:
  """Tells of a step of training."""
  watcher.step("training", step, steps)
  if step % max(1, steps // 10) == 0 or "held_out" in metrics:
    held_out = f", held out {metrics['held_out']:.4f}" if "held_out" in metrics else ""
    watcher.note(f"step {step} of {steps}: loss {metrics['loss']:.4f}{held_out}, {metrics['seconds']:.1f} s a step")


def score_tasks(
  model: Any,
  stages: list[Stage],
  ready: list[Params],
  tasks: dict[str, tuple[Any, Any]],
  records: Records,
  watcher: Watcher,
) -> dict[str, dict[str, Any]]:
  """Each task's scores at each stage that has its head, on the rows that are held out."""
  from lmcompress.evaluate.classification import scores
  from lmcompress.training import probabilities

  found = {row["stage"]: row["scores"] for row in records.found("tasks")}
  for i, params in enumerate(ready):
    heads = params.get("tasks", {})
    if key(stages, i) not in found and any(name in heads for name in tasks):
      with _settings():
        judged = {
          name: scores(held.labels, probabilities(model, params, name, held), held.classes)
          for name, (_, held) in tasks.items()
          if name in heads
        }
      records.add({"kind": "tasks", "stage": key(stages, i), "scores": judged})
      found[key(stages, i)] = judged
      watcher.step("tasks", i + 1, len(stages))
  return found


def _selector(patterns: Sequence[str], params: Params) -> Callable[[str], bool]:
  """Whether a path of an array is selected by one of the patterns, each of which selects something.

  Raises:
    ConfigError: a pattern selects nothing that trains; shows the nearest paths.
  """
  paths: list[str] = []
  tree.partition(params, lambda path: bool(paths.append(path)))
  for pattern in patterns:
    if not any(tree.matches(pattern, path) for path in paths):
      near = ", ".join(difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)) or "none"
      found = f"selects none of {len(paths)} arrays that may train"
      raise ConfigError(f"train.trainable: {pattern!r} {found}; nearest: {near}")
  return lambda path: any(tree.matches(pattern, path) for pattern in patterns)
