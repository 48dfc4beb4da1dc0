"""Steps that survive being cut off: states saved on the way, a log that grows, numbers that are not finite named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.distributed import processes
from lmcompress.distributed.sharding import on_mesh_of
from lmcompress.io.whole import write_text
from lmcompress.training.resume import Saved
from lmcompress.training.step import Training, TrainState, placed_like
from lmcompress.types import FormatError, Params, WeightError

Metrics = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Keeping:
  """What is kept of a run, and when.

  Attributes:
    folder: of states and `train.jsonl`; None keeps nothing.
    decides: JSON that tells this run from others in that folder.
    save_every: steps from one saved state to the next.
    evaluate_every: steps from one score of held-out rows to the next.

  Raises:
    ValueError: steps below 1.
  """

  folder: Path | None = None
  decides: Any = None
  save_every: int = 50
  evaluate_every: int = 50

  def __post_init__(self) -> None:
    if self.save_every < 1 or self.evaluate_every < 1:
      raise ValueError(f"save_every={self.save_every}, evaluate_every={self.evaluate_every}: steps, from 1")


def run_steps(
  state: TrainState,
  update: Callable[[TrainState], tuple[TrainState, Metrics]],
  training: Training,
  keeping: Keeping,
  changes: bool,
  score: Callable[[TrainState], Metrics] | None = None,
  on_step: Callable[[int, Metrics], None] | None = None,
) -> tuple[TrainState, list[Metrics]]:
  """Updates a state to the last step, from the latest one that was saved.

  Args:
    update: a pure function of the state; its metrics have `loss`, `grad_norm` and `broken`, as of `step.advance`.
    changes: whether what does not train changes too, and is saved.
    score: of held-out rows, at some steps and the last.
    on_step: called with the steps done and the metrics; when it raises, the state is saved first.

  Raises:
    WeightError: the loss or a gradient is not finite; says where, and what was kept.
    FormatError: a saved state is damaged or of another run.
  """
  folder = keeping.folder
  saved = None if folder is None else Saved(folder / "states", keeping.decides)
  log = None if folder is None else folder / "train.jsonl"
  history: list[Metrics] = []
  try:
    if saved is not None and log is not None:
      if (found := saved.latest(_portable(state, changes))) is not None:
        state = _placed(found[1], state, changes)
        history = _records(log)[: found[0]]
        if len(history) < found[0]:
          raise FormatError(f"{log}: tells of {len(history)} of {found[0]} steps; remove {folder}")
      if processes.first():
        write_text(log, "".join(json.dumps(row) + "\n" for row in history))
    for step in range(int(state.step), training.steps):
      with on_mesh_of(state.trained):
        state, metrics = update(state)
      broken = metrics.pop("broken")
      if not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["grad_norm"]):
        where = _names(state.trained)[int(broken)] if broken >= 0 else "no gradient"
        kept = "" if saved is None else f"; the states saved before it are kept in {saved.folder}"
        raise WeightError(
          f"step {step}: the loss is {metrics['loss']:.6g} and the gradients' norm {metrics['grad_norm']:.6g}, first "
          f"not finite at {where}; lower the learning rate ({training.learning_rate:g}) or clip ({training.clip}){kept}"
        )
      last = step + 1 == training.steps
      if score is not None and ((step + 1) % keeping.evaluate_every == 0 or last):
        with on_mesh_of(state.trained):
          metrics |= score(state)
      history.append(metrics)
      if log is not None and processes.first():
        with log.open("a", encoding="utf-8") as lines:
          lines.write(json.dumps(metrics) + "\n")
      interrupted, alone = False, processes.count() == 1
      due = (step + 1) % keeping.save_every == 0 or last
      try:
        if on_step is not None:
          on_step(step + 1, metrics)
      except BaseException:
        due = interrupted = True  # an interrupt: what is done is kept, unless others would have to save, too
        raise
      finally:
        if saved is not None and due and (alone or not interrupted):
          saved.save(step + 1, _portable(state, changes))
    if saved is not None:
      saved.wait()
  finally:
    if saved is not None:
      saved.close()
  return state, history


def _names(trained: Params) -> list[str]:
  """The path of each array, in the order of the tree's leaves."""
  keys = (where for where, _ in jax.tree_util.tree_leaves_with_path(trained))
  return ["/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in where) for where in keys]


def _portable(state: TrainState, changes: bool) -> Any:
  """What has to be saved: what stays is made again by the recipe, unless a transform changes it."""
  return state if changes else state._replace(kept=None)  # type: ignore[arg-type]


def _placed(found: Any, state: TrainState, changes: bool) -> TrainState:
  """What was saved, where the state at hand lies."""
  like = state if changes else state._replace(kept=None)  # type: ignore[arg-type]
  found = jax.tree.map(lambda x, y: placed_like(jnp.asarray(x), y), found, like)
  return found if changes else found._replace(kept=state.kept)


def _records(path: Path) -> list[Metrics]:
  if not path.is_file():
    return []
  rows = []
  for line in path.read_text("utf-8").splitlines():
    try:
      rows.append(json.loads(line))
    except ValueError:
      break  # a line that was cut off
  return rows
