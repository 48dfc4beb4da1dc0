"""Sweeps: every trial of a grid or of a config's variants is a run of its own, several at once."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmcompress import run_folder
from lmcompress.config import Config, check, override, variants_of
from lmcompress.errors import GateError
from lmcompress.gates import through_gates
from lmcompress.io.whole import write_text
from lmcompress.io.yaml_text import parse
from lmcompress.places import Here, Place, Running
from lmcompress.run_folder import read_result
from lmcompress.search import pareto
from lmcompress.stages import Watcher
from lmcompress.types import ConfigError, LmcompressError

RESULT, PLOT = "sweep.json", "pareto.svg"
_MOST = 1000
PROGRAM = (sys.executable, "-m", "lmcompress.cli")


@dataclasses.dataclass
class Trial:
  """A run of a sweep.

  Attributes:
    choice: the overrides that make it, by dotted key; of a variant, its name.
    folder: of the run.
    error: what it ended with, if it did not end well.
  """

  choice: dict[str, Any]
  config: Config
  folder: Path
  error: str = ""

  def row(self) -> dict[str, Any]:
    """What the table says of it."""
    row: dict[str, Any] = {"choice": self.choice, "folder": self.folder.name, "error": self.error}
    if not self.error:
      try:  # those that are complete already may have broken one, too
        through_gates(self.config, read_result(self.folder))
      except GateError as error:
        row["error"] = self.error = str(error)
    if not self.error:
      last = read_result(self.folder)["stages"][-1]
      row |= {key: last[key] for key in ("bits_per_weight", "bytes_on_disk", "perplexity", "kl", "tasks")}
      row["seconds"] = sum(stage["seconds"] for stage in read_result(self.folder)["stages"])
    return row


def trials_of(config: Config, grid: Sequence[str], results: Path) -> list[Trial]:
  """The product of `key=[values]` over the config and, where it has some, its variants.

  Raises:
    ConfigError: a key or a value does not fit, or there is nothing to vary, or too much.
  """
  keys, lists = [], []
  for text in grid:
    key, equals, raw = text.partition("=")
    values = parse(raw, f"--grid {text}") if equals else None
    if not key or not isinstance(values, list) or not values:
      raise ConfigError(f"--grid {text}: write a key and a list of values, e.g. recipe.0.bits=[2,3,4]")
    if key in keys:
      raise ConfigError(f"--grid {text}: {key} is given twice")
    keys.append(key)
    lists.append(values)
  bases = variants_of(config) if config.variants else [config]
  count = len(bases)
  for values in lists:
    count *= len(values)
  if count == 1 and not config.variants:
    raise ConfigError(f"{config.name}: nothing varies; give --grid key=[values], or a config with variants")
  if count > _MOST:
    raise ConfigError(f"a sweep of {count} runs: at most {_MOST}; leave values out")
  found = []
  for base in bases:
    for chosen in itertools.product(*lists):
      table = base.model_dump(mode="json", exclude={"variants"})
      pairs = dict(zip(keys, chosen, strict=True))
      made = check(override(table, [f"{key}={json.dumps(value)}" for key, value in pairs.items()]), "sweep")
      choice = ({"variant": base.name} if config.variants else {}) | pairs
      found.append(Trial(choice, made, results / made.folder))
  folders = [trial.folder for trial in found]
  if len(set(folders)) < len(folders):
    raise ConfigError("two trials are the same run; leave out what is given twice")
  return found


def sweep(
  config: Config, grid: Sequence[str], results: Path, at_once: int, watcher: Watcher, program: Sequence[str] = PROGRAM,
  place: Place | None = None,
) -> tuple[Path, list[dict[str, Any]]]:
  """Runs the trials, so many at once, each in a process and a run folder of its own.

  Trials that are complete are not run again, and one that was cut off goes on, so the same command continues a sweep.
  One that fails does not end the others.

  Args:
    place: where they run; this machine by default.

  Returns:
    The sweep's folder, which holds `sweep.json`, `pareto.svg` and a log for each run, and a row for each trial.

  Raises:
    ConfigError: as of `trials_of`.
  """
  if at_once < 1:
    raise ConfigError(f"--processes {at_once}: from 1")
  trials = trials_of(config, grid, results)
  folder = results / f"{config.name}-sweep"
  folder.mkdir(parents=True, exist_ok=True)
  waiting = [trial for trial in trials if not (trial.folder / run_folder.RESULT).is_file()]
  done = len(trials) - len(waiting)
  watcher.note(f"{len(trials)} runs, {done} of them complete already, {at_once} at once")
  running: list[tuple[Trial, Running]] = []
  place = place or Here()
  try:
    while waiting or running:
      while waiting and len(running) < at_once:
        trial = waiting.pop(0)
        try:
          run_folder.prepare(trial.config, results)
        except LmcompressError as error:
          trial.error, done = str(error), done + 1
          continue
        command = [*program, "resume", str(trial.folder)]
        running.append((trial, place.start(command, folder / f"{trial.folder.name}.log")))
      for entry in list(running):
        trial, run = entry
        code = run.ended()
        if code is None:
          continue
        running.remove(entry)
        done += 1
        if code:
          lines = (folder / f"{trial.folder.name}.log").read_text("utf-8", "replace").strip().splitlines()
          trial.error = lines[-1] if lines else f"ended with code {code}"
          watcher.note(f"{said(trial.choice)}: {trial.error}")
      watcher.step("runs", done, len(trials))
      time.sleep(0.1 if running else 0)
  finally:
    for _, run in running:
      run.stop()
  rows = [trial.row() for trial in trials]
  write_text(folder / RESULT, json.dumps({"format": 1, "name": config.name, "trials": rows}, indent=1) + "\n")
  _plot(folder / PLOT, rows)
  return folder, rows


def said(choice: dict[str, Any]) -> str:
  """A trial's choice in words."""
  return ", ".join(f"{key}={value}" for key, value in choice.items())


def _plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
  """Perplexity on the first text over megabytes, and the trials that no other beats in both."""
  from lmcompress import figures

  points = [(row["bytes_on_disk"] / 1e6, next(iter(row["perplexity"].values()))) for row in rows
            if not row["error"] and row["perplexity"]]  # fmt: skip
  if points:
    x, y = zip(*points, strict=True)
    write_text(path, figures.scatter(x, y, pareto(points), None, "MB on disk", "perplexity"))
