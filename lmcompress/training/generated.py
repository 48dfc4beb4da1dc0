"""Rows that a model writes: a student learns from its own texts as its teacher judges them, or from its teacher's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from lmcompress.distributed import processes
from lmcompress.io.whole import write_text
from lmcompress.types import FormatError, Params

_ROWS, _RECORD = "rows.npy", "record.json"


@dataclasses.dataclass(frozen=True)
class Generated:
  """The ends of some batches' rows are written by a model, and only they count.

  By the student with a divergence as the loss: on-policy distillation (GKD, arXiv:2306.13649; with the reverse KL what
  MiniLLM minimises, arXiv:2306.08543, its gradient taken token by token and not through the draw). By the teacher with
  labels as the loss: sequence-level distillation (Kim & Rush 2016, arXiv:1606.07947).

  Attributes:
    by: `student` or `teacher`.
    share: of batches that are written so; the others are of the text.
    prompt: tokens of a row that stay.
    temperature: of the draw; 0 takes the likeliest token.

  Raises:
    ValueError: an attribute is out of range.
  """

  by: Literal["student", "teacher"] = "student"
  share: float = 0.5
  prompt: int = 32
  temperature: float = 1.0

  def __post_init__(self) -> None:
    known = self.by in ("student", "teacher")
    if not known or not 0 < self.share <= 1 or self.prompt < 1 or not 0 <= self.temperature < float("inf"):
      raise ValueError(
        f"Generated(by={self.by!r}, share={self.share}, prompt={self.prompt}, temperature={self.temperature}): student "
        "or teacher, a share above 0 up to 1, a prompt from 1, a temperature from 0"
      )

  def due(self, seed: int, step: int) -> bool:
    """Whether the batch of a step is written; the same in every run."""
    return bool(np.random.default_rng([seed, step, 1]).random() < self.share)


def continued(
  model: Any, params: Params, rows: np.ndarray, settings: Generated, key: jax.Array
) -> tuple[np.ndarray, np.ndarray]:
  """Rows `[n, length]` whose tokens after the prompt the model drew, and a mask of those."""
  from lmcompress.generation.generate import decode
  from lmcompress.generation.sampling import Sampler

  prompts = [row[: settings.prompt].tolist() for row in rows]
  drawn = decode(model, params, prompts, rows.shape[1] - settings.prompt, Sampler(settings.temperature), key)
  ends = np.stack([np.asarray(tokens, rows.dtype) for tokens in drawn], axis=1)
  counted = np.zeros(rows.shape, np.int32)
  counted[:, settings.prompt :] = 1
  return np.concatenate([rows[:, : settings.prompt], ends], axis=1), counted


def write_rows(
  model: Any,
  params: Params,
  begin: int,
  count: int,
  length: int,
  folder: Path,
  *,
  temperature: float = 1.0,
  batch: int = 64,
  seed: int = 0,
  on_rows: Callable[[int, int], None] | None = None,
) -> np.ndarray:
  """Rows `[count, length]` that a model writes from nothing, for where its own training text cannot be had.

  Each is the token `begin` and what is drawn after it (LLM-QAT, Liu et al. 2023, arXiv:2305.17888; at temperature 1 all
  tokens are drawn as the model predicts them, where the paper takes the first few greedily). They are kept in `folder`,
  which is of this model alone; a call that was cut off goes on where it was.

  Args:
    begin: the token that begins a text.
    temperature: of the draw, above 0.
    batch: rows at a time; with it and the seed the rows are the same again.
    on_rows: called with the rows done and those there are.

  Raises:
    ValueError: an argument out of range, or rows longer than the model's context.
    FormatError: the folder holds something else.
  """
  from lmcompress.generation.generate import decode
  from lmcompress.generation.sampling import Sampler

  if min(count, batch) < 1 or length < 2 or not 0 < temperature < float("inf"):
    raise ValueError(
      f"write_rows(count={count}, length={length}, temperature={temperature}, batch={batch}): rows and a batch from 1, "
      "two tokens or more, a temperature above 0"
    )
  folder.mkdir(parents=True, exist_ok=True)
  about = {"begin": begin, "count": count, "length": length, "temperature": temperature, "batch": batch, "seed": seed}
  done = _done(folder, about)
  rows = np.zeros((count, length), np.int32) if done is None else _read(folder / _ROWS, (count, length))
  processes.meet("record of rows")  # read by all before the first goes on writing it
  kept = None
  if processes.first():
    kept = np.lib.format.open_memmap(folder / _ROWS, "w+" if done is None else "r+", np.int32, (count, length))
  sampler = Sampler(temperature)
  for first in range(done or 0, count, batch):
    key = jax.random.fold_in(jax.random.key(seed), first)
    drawn = decode(model, params, [[begin]] * batch, length - 1, sampler, key, params["embed"]["table"].dtype)
    last = min(first + batch, count)
    rows[first:last, 0] = begin
    rows[first:last, 1:] = np.stack([np.asarray(tokens, np.int32) for tokens in drawn], axis=1)[: last - first]
    if kept is not None:
      kept[first:last] = rows[first:last]
      kept.flush()
      write_text(folder / _RECORD, json.dumps({**about, "done": last}))
    if on_rows is not None:
      on_rows(last, count)
  return rows


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray:
  """The rows that a record tells of."""
  try:
    rows = np.load(path, allow_pickle=False)
  except (OSError, ValueError) as error:
    raise FormatError(f"{path}: cannot be read ({type(error).__name__}); remove the folder") from None
  if rows.shape != shape or rows.dtype != np.int32:
    raise FormatError(f"{path}: {rows.dtype}{list(rows.shape)}, and int32{list(shape)} is needed; remove the folder")
  return rows


def _done(folder: Path, about: dict[str, Any]) -> int | None:
  """How many rows a folder holds; None where it holds nothing."""
  path = folder / _RECORD
  if not path.is_file():
    return None
  try:
    record = json.loads(path.read_text("utf-8"))
    done = int(record.pop("done"))
  except (ValueError, KeyError, TypeError, AttributeError):
    raise FormatError(f"{path}: not the record of rows that a model wrote; remove the folder") from None
  if record != about:
    raise FormatError(f"{folder}: holds rows that were written otherwise: {record}; remove it")
  return done
