"""Saved training states: written while training goes on, checked when they are read, so that a run resumes exactly."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmcompress.distributed import processes
from lmcompress.types import FormatError, SourceError


class Saved:
  """States of one training run in a folder, the last two kept (Orbax, asynchronous); the first process writes.

  Orbax notices neither flipped bits nor a tree of another run; a digest of each array and of what decides the run lies
  beside them.

  Args:
    folder: made if needed.
    decides: anything JSON: what decides the run's bits; states of another are refused.
  """

  def __init__(self, folder: Path, decides: Any):
    import orbax.checkpoint as ocp

    folder.mkdir(parents=True, exist_ok=True)
    self.folder = folder.resolve()
    self._decides = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    here = jax.process_index()
    given: dict[str, Any] = {"cleanup_tmp_directories": True, "todelete_subdir": "old"}
    if not processes.first():
      given = {"read_only": True}
    if processes.count() > 1:  # each manages by itself: it meets the others nowhere
      alone = {"primary_host": here, "active_processes": {here}, "barrier_sync_key_prefix": f"process-{here}"}
      given["create"] = False
      given["multiprocessing_options"] = ocp.options.MultiprocessingOptions(**alone)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True, **given)
    self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("arrays", "record"))
    self._args = ocp.args

  def save(self, step: int, state: Any) -> None:
    """Copies the state and returns; the writing goes on.

    Raises:
      SourceError: it, or the one before it, could not be written.
    """
    leaves = jax.tree.leaves(processes.whole(state))
    if not processes.first():
      return
    arrays = {f"{i:05d}": np.array(x) for i, x in enumerate(leaves)}  # donated buffers are used again
    record = {"decides": self._decides, "digests": {name: _digest(x) for name, x in arrays.items()}}
    given = self._args.Composite(arrays=self._args.StandardSave(arrays), record=self._args.JsonSave(record))
    self._writing(step, lambda: self._manager.save(step, args=given))

  def latest(self, like: Any) -> tuple[int, Any] | None:
    """The step and state last written, in the structure of `like`; None where there is none.

    Raises:
      FormatError: it is damaged, or of another run.
    """
    step = self._manager.latest_step()
    if step is None:
      return None
    leaves, treedef = jax.tree.flatten(like)
    wanted = {f"{i:05d}": jax.ShapeDtypeStruct(x.shape, x.dtype) for i, x in enumerate(leaves)}
    where = self.folder / str(step)
    try:
      record = self._manager.restore(step, args=self._args.Composite(record=self._args.JsonRestore()))["record"]
      if record["decides"] != self._decides:
        raise FormatError(f"{where}: a state of another run; remove {self.folder} to train anew")
      if set(record["digests"]) != set(wanted):
        raise FormatError(f"{where}: holds {len(record['digests'])} arrays, {len(wanted)} are needed")
      restore = self._args.Composite(arrays=self._args.StandardRestore(wanted))
      arrays = self._manager.restore(step, args=restore)["arrays"]
    except FormatError:
      raise
    except Exception as error:  # Orbax raises many kinds for a damaged folder
      what = " ".join(str(error).split())[:200]
      raise FormatError(
        f"{where}: cannot be read ({type(error).__name__}: {what}); remove it to go on before"
      ) from None
    for name, x in arrays.items():
      if _digest(np.asarray(x)) != record["digests"][name]:
        raise FormatError(f"{where}: array {name} is damaged (its digest does not fit); remove it to go on before")
    return step, treedef.unflatten([arrays[name] for name in wanted])

  def wait(self) -> None:
    """Returns when everything is written.

    Raises:
      SourceError: something could not be; the states before it are kept.
    """
    self._writing(None, self._manager.wait_until_finished)

  def _writing(self, step: int | None, act: Callable[[], Any]) -> None:
    """Orbax and the file system raise many kinds, of this save or of the one before it."""
    try:
      act()
    except Exception as error:
      free = shutil.disk_usage(self.folder).free
      what = " ".join(str(error).split())[:200]
      which = "a state" if step is None else f"the state of step {step}, or the one before it,"
      raise SourceError(
        f"{self.folder}: {which} could not be written ({type(error).__name__}: {what}); {free} bytes are free; the "
        "states before it are kept: make space and resume"
      ) from None

  def close(self) -> None:
    self._manager.close()


def _digest(x: np.ndarray) -> str:
  return hashlib.sha256(f"{x.dtype}{x.shape}".encode() + np.ascontiguousarray(x).tobytes()).hexdigest()
