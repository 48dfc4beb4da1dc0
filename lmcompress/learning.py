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
from lmcompress.config import Config, Samples, Train, WrittenTable, rules_of
from lmcompress.data.text import load_text, windows
from lmcompress.evaluate import profiling
from lmcompress.evaluate.memory import peak_bytes, reset_peak
from lmcompress.evaluate.samples import JUDGES
from lmcompress.generation import generate
from lmcompress.io.load import load
from lmcompress.judged_tasks import Judged, require_heads, rows_per_s, scored
from lmcompress.run_folder import TENSORBOARD, TRAINING, Records
from lmcompress.stages import Stage, Watcher, key
from lmcompress.types import ConfigError, LmcompressError, Params

HELD_OUT = 256
"""Held-out rows of a task that are scored on the way; at the end all are."""

SAMPLES_AT_ONCE = 50
"""Samples that are drawn together."""


@contextlib.contextmanager
def _settings(section: str = "training") -> Iterator[None]:
  """What a section of a config asks and cannot be done is the config's error."""
  try:
    yield
  except LmcompressError:
    raise
  except ValueError as error:
    raise ConfigError(f"{section}: {error}") from None


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

  rows = np.empty((0, train.length), np.int32)
  if train.text is not None:
    rows = windows(tokenizer, load_text(train.text), train.windows, train.length)
  held = train.held_out
  held_out = None if held is None else windows(tokenizer, load_text(held.text), held.windows, held.length)
  settings = train.settings()
  trains = _selector(train.trainable, stages[-1].params)
  teacher: Any = None
  if settings.needs_teacher or train.written is not None:
    rules = rules_of(config)
    teacher = (model, stages[0].params) if train.teacher is None else load(train.teacher, mesh, rules=rules)[:2]
  if train.written is not None:
    rows = np.concatenate([rows, _written(train, train.written, teacher, tokenizer, config.seed, folder, watcher)])
  spent = None if settings.privacy is None else epsilon(settings, len(rows))
  if settings.needs_teacher and train.teacher_top_k is not None:
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
        stages=1 if config.mesh is None else config.mesh.pipe,
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
  if profile and settings.privacy is None and (config.mesh is None or config.mesh.pipe == 1):
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


def _written(
  train: Train, table: WrittenTable, teacher: Any, tokenizer: Any, seed: int, folder: Path, watcher: Watcher
) -> np.ndarray:
  """The rows that the teacher writes, in the dtype of training."""
  from lmcompress.training import write_rows
  from lmcompress.training.step import floats_as

  begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
  if begin is None:
    raise ConfigError("train.written: the tokenizer has no token that begins or ends a text to start rows with")
  watcher.note(f"the teacher writes {table.rows} rows of {train.length} tokens")
  params = floats_as(teacher[1], train.compute)
  told = functools.partial(watcher.step, "writing")
  with _settings("train.written"):
    return write_rows(
      teacher[0], params, begin, table.rows, train.length, folder / TRAINING / "written",
      temperature=table.temperature, batch=table.batch, seed=seed, on_rows=told,
    )  # fmt: skip


def train_tasks(
  config: Config,
  train: Train,
  model: Any,
  tasks: dict[str, Judged],
  stages: list[Stage],
  watcher: Watcher,
  folder: Path,
  decides: dict[str, Any],
) -> dict[str, Any]:
  """Appends the stage `trained`, whose tree has the heads of tasks; returns what the result says of the training."""
  from lmcompress.training import Weighting, fit_tasks

  trains = _selector(train.trainable, stages[-1].params)
  weighting = Weighting(**train.weighting.model_dump()) if train.weighting else Weighting()
  during = recipes.build(train.during, "train.during") if train.during else None
  learned = {name: judged.train for name, judged in tasks.items()}
  settings, teacher = train.settings(), None
  if settings.needs_teacher:
    teacher = (model, stages[0].params) if train.teacher is None else load(train.teacher)[:2]
    require_heads(train.teacher or config.model, tasks)
  require_heads(config.model, tasks)
  reset_peak()
  begun = time.perf_counter()
  with _settings():
    params, history = fit_tasks(
      model,
      stages[-1].params,
      learned,
      settings,
      weighting,
      seed=config.seed,
      trainable=trains,
      teacher=teacher,
      transform=during,
      folder=folder / TRAINING,
      decides=decides,
      save_every=train.save_every,
      held_out={name: judged.test.spread(HELD_OUT) for name, judged in tasks.items()},
      evaluate_every=train.evaluate_every,
      on_step=functools.partial(_told, watcher, train.steps),
    )
  stages.append(Stage("trained", params, time.perf_counter() - begun, peak_bytes()))
  heads = jax.tree.leaves(params.get("tasks", {}))
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
  if step % max(1, steps // 10) == 0 or any(name.startswith("held_out") for name in metrics):
    held_out = "".join(
      f", {name.replace('held_out', 'held out').replace('/', ' ')} {value:.4f}"
      for name, value in metrics.items() if name.partition("/")[0] in ("held_out", "accuracy")
    )  # fmt: skip
    watcher.note(f"step {step} of {steps}: loss {metrics['loss']:.4f}{held_out}, {metrics['seconds']:.1f} s a step")


def score_tasks(
  model: Any,
  tokenizer: Any,
  stages: list[Stage],
  ready: list[Params],
  tasks: dict[str, Judged],
  records: Records,
  watcher: Watcher,
) -> dict[str, dict[str, Any]]:
  """Each task's scores at each stage that can do it, on the rows that are held out."""
  found = {row["stage"]: row["scores"] for row in records.found("tasks")}
  for i, params in enumerate(ready):
    heads = params.get("tasks", {})
    able = {name: judged for name, judged in tasks.items() if name in heads or not judged.test.has_head}
    if key(stages, i) not in found and able:
      with _settings("tasks"):
        outcomes = {
          name: {
            **scored(model, params, tokenizer, name, judged),
            "rows_per_s": rows_per_s(model, params, tokenizer, name, judged),
          }
          for name, judged in able.items()
        }
      records.add({"kind": "tasks", "stage": key(stages, i), "scores": outcomes})
      found[key(stages, i)] = outcomes
      watcher.step("tasks", i + 1, len(stages))
  return found


def check_samples(table: Samples, model: Any, tokenizer: Any) -> None:
  """Raises ConfigError where samples cannot be drawn or judged, before anything is done."""
  judge = JUDGES[table.judge]
  judge.require()
  longest = max(len(tokenizer.encode(prompt)) for prompt in judge.prompts()) + judge.max_new_tokens
  if longest > model.config.max_length:
    what = f"a sample has up to {longest} tokens, prompt included"
    raise ConfigError(f"samples.judge: {table.judge}: {what}; the model's context is {model.config.max_length}")


def judge_samples(
  config: Config,
  model: Any,
  tokenizer: Any,
  stages: list[Stage],
  ready: list[Params],
  records: Records,
  watcher: Watcher,
) -> dict[str, dict[str, Any]]:
  """What each stage makes of its own accord, judged as the config says."""
  table = config.samples
  found = {row["stage"]: row["scores"] for row in records.found("samples")}
  if table is None:
    return found
  judge = JUDGES[table.judge]
  begin = judge.prompts()
  prompts = [begin[i % len(begin)] for i in range(table.count)]
  for i, params in enumerate(ready):
    if key(stages, i) in found:
      continue
    texts = []
    for first in range(0, table.count, SAMPLES_AT_ONCE):
      some = prompts[first : first + SAMPLES_AT_ONCE]
      drawn = jax.random.fold_in(jax.random.key(config.seed), first)
      with _settings("samples"):
        texts += generate(
          model, params, tokenizer, some, judge.max_new_tokens, temperature=table.temperature, top_k=table.top_k,
          key=drawn, stop=("\n\n",),
        )  # fmt: skip
      watcher.step(f"samples of {stages[i].name}", len(texts), table.count)
    outcome = judge.judge([f"{prompt}{text}" for prompt, text in zip(prompts, texts, strict=True)], config.seed)
    records.add({"kind": "samples", "stage": key(stages, i), "scores": {table.judge: outcome}})
    found[key(stages, i)] = {table.judge: outcome}
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
