"""A teacher's predictions on disk: the likeliest next tokens of each position, so that it need not run again."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.calibration.token_loss import forward
from lmcompress.distributed import processes
from lmcompress.io.whole import write_text
from lmcompress.types import FormatError, Params

_RECORD, _IDS, _LOGPROBS = "record.json", "ids.npy", "logprobs.npy"


class StoredTeacher:
  """What `store_predictions` left in a folder.

  Attributes:
    vocabulary: the teacher's.
    k: tokens kept of each position.

  Raises:
    FormatError: the folder is not whole.
  """

  def __init__(self, folder: Path):
    record = _record(folder)
    if record is None or record["done"] != record["rows"]:
      found = "nothing" if record is None else f"{record['done']} of {record['rows']} rows"
      raise FormatError(f"{folder}: {found} of a teacher's predictions; store_predictions writes the rest")
    self.folder, self.vocabulary, self.k, self._digest = folder, record["vocabulary"], record["k"], record["digest"]
    files = (folder / _IDS, folder / _LOGPROBS)
    self._ids, self._logprobs = (np.load(file, mmap_mode="r", allow_pickle=False) for file in files)

  def check(self, rows: np.ndarray) -> None:
    """Raises ValueError if the predictions are of other rows."""
    if _digest(rows) != self._digest:
      raise ValueError(f"{self.folder}: the teacher's predictions are of other rows; store them again")

  def __getitem__(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """`teacher_ids` and `teacher_logprobs`, `[rows, length, k]`, of the rows chosen; the last position is padding."""
    pad = ((0, 0), (0, 1), (0, 0))
    return {
      "teacher_ids": np.pad(self._ids[chosen], pad),
      "teacher_logprobs": np.pad(self._logprobs[chosen], pad),
    }


def store_predictions(
  model: Any,
  params: Params,
  rows: np.ndarray,
  folder: Path,
  k: int = 64,
  batch: int = 4,
  on_rows: Callable[[int, int], None] | None = None,
) -> StoredTeacher:
  """Writes a teacher's k likeliest next tokens of every position, 8 k bytes each; goes on where it was cut off.

  Args:
    rows: token ids `[n, length]`.
    folder: made if needed; predictions of other rows are refused.
    batch: rows at a time.
    on_rows: called with the rows done and those there are.

  Raises:
    ValueError: a k below 1 or above the vocabulary.
    FormatError: the folder holds something else.
  """
  vocabulary = params.get("head", params["embed"])["table"].shape[-2]
  if not 1 <= k <= vocabulary:
    raise ValueError(f"store_predictions(k={k}): from 1 to the vocabulary of {vocabulary}")
  folder.mkdir(parents=True, exist_ok=True)
  about = {"rows": len(rows), "k": k, "vocabulary": vocabulary, "digest": _digest(rows)}
  record = _record(folder)
  if record is not None and {key: record.get(key) for key in about} != about:
    raise FormatError(f"{folder}: holds a teacher's predictions of other rows or another k; remove it")
  done = 0 if record is None else record["done"]
  processes.meet("record of predictions")  # read by all before the first goes on writing it
  shape, mode, own = (len(rows), rows.shape[1] - 1, k), "w+" if record is None else "r+", processes.first()
  if own:
    ids = np.lib.format.open_memmap(folder / _IDS, mode, np.int32, shape)
    logprobs = np.lib.format.open_memmap(folder / _LOGPROBS, mode, np.float32, shape)
  for first in range(done, len(rows), batch):
    some = rows[first : first + batch]
    padded = np.pad(some, ((0, batch - len(some)), (0, 0)))
    found = _likeliest(model, params, jnp.asarray(padded), k)
    last = first + len(some)
    if own:
      ids[first:last], logprobs[first:last] = (np.asarray(x)[: len(some)] for x in found)
      ids.flush()
      logprobs.flush()
      write_text(folder / _RECORD, json.dumps({**about, "done": last}))
    if on_rows is not None:
      on_rows(last, len(rows))
  processes.meet("predictions")
  return StoredTeacher(folder)


@functools.partial(jax.jit, static_argnames=("model", "k"))
def _likeliest(model: Any, params: Params, rows: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Ids and log-probabilities `[batch, length - 1, k]`, a position at a time so that all logits never stand at once."""
  carry, _ = forward(model, params, {"tokens": rows}, remat=False)

  def at(position: jax.Array) -> tuple[jax.Array, jax.Array]:
    said = jax.nn.log_softmax(model.finish(params, carry, span=(position, 1))[:, 0].astype(jnp.float32), axis=-1)
    best, where = jax.lax.top_k(said, k)
    return where.astype(jnp.int32), best

  ids, logprobs = jax.lax.map(at, jnp.arange(rows.shape[1] - 1))
  return ids.swapaxes(0, 1), logprobs.swapaxes(0, 1)


def _record(folder: Path) -> dict[str, Any] | None:
  path = folder / _RECORD
  if not path.is_file():
    return None
  try:
    record = json.loads(path.read_text("utf-8"))
    return {key: record[key] for key in ("rows", "k", "vocabulary", "digest", "done")}
  except (ValueError, KeyError, TypeError):
    raise FormatError(f"{path}: not the record of a teacher's predictions; remove the folder") from None


def _digest(rows: np.ndarray) -> str:
  return hashlib.sha256(f"{rows.shape}".encode() + np.ascontiguousarray(rows, np.int64).tobytes()).hexdigest()
