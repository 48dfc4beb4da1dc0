"""Training on rows of tokens: batches by position, an update each, and what a teacher says of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.distributed.sharding import data_mesh, over_data
from lmcompress.training.durable import Keeping, Metrics, run_steps
from lmcompress.training.generated import continued
from lmcompress.training.match import PROJECTIONS
from lmcompress.training.pipeline import Pipeline
from lmcompress.training.privacy import Poisson, private_step
from lmcompress.training.step import Training, TrainState, held_out_loss, result, start, train_step
from lmcompress.training.stored import StoredTeacher
from lmcompress.types import Params, Transform


def batches(rows: np.ndarray, batch: int, seed: int) -> Any:
  """An endless sequence of `[batch, length]`, each epoch shuffled; `batches(...)[i]` is the same in every run.

  Raises:
    ValueError: fewer rows than a batch takes.
  """
  import grain

  if rows.ndim != 2 or len(rows) < batch or batch < 1:
    raise ValueError(f"a batch of {batch} rows from tokens {list(rows.shape)}; give more rows, or take fewer at a time")
  return grain.MapDataset.source(list(rows)).seed(seed).shuffle().repeat().batch(batch, drop_remainder=True)


def fit(
  model: Any,
  params: Params,
  rows: np.ndarray,
  training: Training,
  *,
  seed: int = 0,
  trainable: Callable[[str], bool] = lambda path: True,
  teacher: tuple[Any, Params] | StoredTeacher | None = None,
  transform: Transform | None = None,
  stages: int = 1,
  folder: Path | None = None,
  decides: Any = None,
  save_every: int = 50,
  held_out: np.ndarray | None = None,
  evaluate_every: int = 50,
  on_step: Callable[[int, Metrics], None] | None = None,
) -> tuple[Params, list[Metrics]]:
  """Trains a tree, dense or compressed, and returns it in its own form with the metrics of every step.

  Args:
    rows: token ids `[n, length]`, n at least the batch.
    seed: of the order of rows, and of the transform's keys.
    trainable: of an array's path, as of `tree.partition`; `layers/0/attn/q/kernel/delta/left` is an adapter's.
    teacher: model and parameters, for a loss that needs them, or their stored predictions of `rows`; of the student's
      vocabulary.
    transform: of phase `step`, applied after each update.
    stages: of a pipeline (`Pipeline`): so many devices, or groups of those that split weights, have some of the blocks
      each, and the `accumulate` pieces of a batch go through them, one forward one backward.
    folder: where states and `train.jsonl` are kept; a run that was cut off goes on to the same bits.
    decides: JSON that tells this run from others in that folder.
    save_every: steps from one saved state to the next.
    held_out: token ids `[n, length]` that do not train; every `evaluate_every` steps, and at the last, the metrics have
      `held_out`, their cross entropy, nats a token.
    on_step: called with the steps done and the metrics `loss`, `grad_norm`, `learning_rate`, `seconds` (of a pipeline
      `held`, too); when it raises, the state is saved first.

  Raises:
    ValueError: nothing trains, rows that are too few or no tokens of the model's, no teacher or one of another
      vocabulary, more stages than devices or blocks.
    WeightError: the loss or a gradient is not finite; says where, and what was kept.
    FormatError: a saved state is damaged or of another run.
  """
  rows = checked_rows("rows", rows, params)
  _check_teacher(params, teacher, training, rows)
  held_out = None if held_out is None else checked_rows("held_out", held_out, params)
  numbers = np.arange(len(rows))[:, None]
  draw = batches if training.privacy is None else Poisson
  source, whole = draw(numbers, training.batch, seed), params
  if training.match is not None and isinstance(teacher, tuple):
    key = jax.random.fold_in(jax.random.key(seed), training.steps)
    maps = training.match.projections(model, params, teacher, rows.shape[1], key)
    whole = {**params, PROJECTIONS: maps} if maps else params
  trains = lambda path: tree.matches(PROJECTIONS, path) or trainable(path)  # noqa: E731
  pipeline = None
  if stages < 1:
    raise ValueError(f"stages={stages}: one, or as many as a pipeline has")
  if stages > 1:
    whole = jax.tree.map(jnp.asarray, whole)  # of NumPy's arrays, too, it is said where they lie
    if transform is not None:
      raise ValueError(f"stages={stages}: a transform after each update sees a whole tree; leave one of the two out")
    guide = teacher if isinstance(teacher, tuple) and training.needs_teacher else None
    pipeline = Pipeline(model, whole, training, stages, guide)
  state = start(whole, training, trains, transform)
  if pipeline is not None:
    state = pipeline.spread(state)

  def update(state: TrainState) -> tuple[TrainState, Metrics]:
    chosen = np.asarray(source[int(state.step)])[:, 0]
    return _update(model, state, rows[chosen], chosen, training, transform, teacher, seed, pipeline)

  score = None if held_out is None else lambda state: {"held_out": _score(model, state, held_out, training, pipeline)}
  keeping = Keeping(folder, [decides, seed, repr(training)], save_every, evaluate_every)
  state, history = run_steps(state, update, training, keeping, transform is not None, score, on_step)
  done = result(state, whole)
  if pipeline is not None:
    done = jax.tree.map(lambda x, was: jax.device_put(x, was.sharding), done, whole)
  return {name: part for name, part in done.items() if name in params}, history


def _update(
  model: Any,
  state: TrainState,
  rows: np.ndarray,
  chosen: np.ndarray,
  training: Training,
  transform: Transform | None,
  teacher: tuple[Any, Params] | StoredTeacher | None,
  seed: int,
  pipeline: Pipeline | None,
) -> tuple[TrainState, Metrics]:
  begun = time.perf_counter()
  present = isinstance(teacher, tuple) and training.needs_teacher
  who, guide = teacher if present else (None, None)  # type: ignore[misc]
  step, moving = int(state.step), state._replace(kept=None)
  key = jax.random.fold_in(jax.random.key(seed), step)
  if training.privacy is not None:
    new, found = private_step(model, moving, state.kept, rows, training, transform, who, guide, key)
  else:
    batch: dict[str, Any] = {"tokens": rows}
    if training.generated is not None:
      batch["counted"] = np.ones_like(rows)
      if training.generated.due(seed, step):
        own = training.generated.by == "student"
        writer: Any = tree.combine(state.trained, state.kept) if own else guide
        drawn = continued(model if own else who, writer, rows, training.generated, jax.random.fold_in(key, 2))
        batch["tokens"], batch["counted"] = drawn
    if isinstance(teacher, StoredTeacher):
      batch |= teacher[chosen]
    pieces = {name: jnp.asarray(x).reshape(training.accumulate, -1, *x.shape[1:]) for name, x in batch.items()}
    if pipeline is not None:
      new, found = pipeline.step(moving, pieces)
      return new._replace(kept=state.kept), {**found, "seconds": time.perf_counter() - begun}
    pieces = over_data(data_mesh(state.trained), pieces, training.batch // training.accumulate, axis=1)
    new, found = train_step(model, moving, state.kept, pieces, training, transform, who, guide, key)
  metrics = {name: float(value) for name, value in found.items()}
  kept = state.kept if new.kept is None else new.kept
  return new._replace(kept=kept), {**metrics, "seconds": time.perf_counter() - begun}


def _score(
  model: Any, state: TrainState, rows: np.ndarray, training: Training, pipeline: Pipeline | None
) -> float:
  """Cross entropy of rows, a batch at a time; nats a token."""
  total, count = 0.0, 0
  for i in range(0, len(rows), training.batch):
    if pipeline is not None:
      lost, tokens = pipeline.score(state, rows[i : i + training.batch])
      total, count = total + lost, count + tokens
      continue
    some = jnp.asarray(rows[i : i + training.batch])
    trained = state.trained if state.average is None else state.average
    lost, tokens = held_out_loss(model, trained, state.kept, some, training)
    total, count = total + float(lost), count + int(tokens)
  return total / max(count, 1)


def _check_teacher(
  params: Params, teacher: tuple[Any, Params] | StoredTeacher | None, training: Training, rows: np.ndarray
) -> None:
  writes = training.generated
  if writes is not None and writes.prompt >= rows.shape[1]:
    raise ValueError(f"Generated(prompt={writes.prompt}): rows have {rows.shape[1]} tokens; nothing is left to write")
  if not training.needs_teacher:
    return
  if teacher is None:
    raise ValueError(f"{_who_needs(training)} needs a teacher: fit(..., teacher=(model, params))")
  if isinstance(teacher, StoredTeacher):
    if training.match is not None or writes is not None or training.privacy is not None:
      raise ValueError("a stored teacher has predictions of its rows alone: no match, no generated rows, no privacy")
    if getattr(training.loss, "temperature", 1.0) != 1:
      raise ValueError("a stored teacher's likeliest tokens cannot be softened: temperature 1 is needed")
    teacher.check(rows)
  theirs = teacher.vocabulary if isinstance(teacher, StoredTeacher) else vocabulary_of(teacher[1])
  ours = vocabulary_of(params)
  if ours != theirs:
    raise ValueError(f"the teacher's vocabulary has {theirs} entries, the student's {ours}; they must be the same")


def _who_needs(training: Training) -> str:
  needing = training.loss if training.loss.needs_teacher else training.match or training.generated
  return type(needing).__name__


def vocabulary_of(params: Params) -> int:
  return params.get("head", params["embed"])["table"].shape[-2]


def checked_rows(what: str, rows: Any, params: Params) -> np.ndarray:
  """Token ids as NumPy has them, or an error that says what is wrong; a compiled gather would clamp them silently."""
  rows = np.asarray(rows)
  if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer) or rows.shape[1] < 2 or not len(rows):
    found = f"{rows.dtype}{list(rows.shape)}"
    raise ValueError(f"{what}: token ids [n, length] are needed, two or more in a row; found {found}")
  vocabulary = vocabulary_of(params)
  if rows.min() < 0 or rows.max() >= vocabulary:
    raise ValueError(f"{what}: tokens from {rows.min()} to {rows.max()} are outside the vocabulary of {vocabulary}")
  return rows
