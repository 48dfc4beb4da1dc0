"""A run folder: the files in it, how they are found and read, and the records that grow while a run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmcompress.config import Config, check, dump
from lmcompress.distributed import processes
from lmcompress.io import hub
from lmcompress.io.whole import write_text
from lmcompress.io.yaml_text import parse
from lmcompress.types import ConfigError, FormatError, SourceError

RESULT, METRICS, CONFIG, MODEL, BLOCKS = "result.json", "metrics.jsonl", "config.yaml", "model", "blocks"
TRAINING, FINISHED, TENSORBOARD = "training", "finished", "tensorboard"
_FIELDS = {"tree": ("tree_hash",), "score": ("text", "window", "scores"), "latency": ("stage", "tokens_per_s"),
           "tasks": ("stage", "scores"), "samples": ("stage", "scores")}  # fmt: skip


class Records:
  """The lines of `metrics.jsonl`: written one by one and flushed, so that nothing measured is lost."""

  def __init__(self, path: Path):
    self.path = path
    self.rows: list[dict[str, Any]] = []
    if path.is_file():
      whole = [line for line in path.read_bytes().split(b"\n")[:-1] if line]  # a cut last line is dropped
      try:
        self.rows = [json.loads(line) for line in whole]
        for row in self.rows:
          _ = [row[key] for key in _FIELDS[row["kind"]]]
      except (ValueError, KeyError, TypeError):
        raise FormatError(f"{path}: not JSON lines; remove the file and resume") from None
      write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))

  def clear(self) -> None:
    """Forgets all that was measured."""
    self.rows = []
    write_text(self.path, "")

  def found(self, kind: str) -> list[dict[str, Any]]:
    return [row for row in self.rows if row.get("kind") == kind]

  def add(self, row: dict[str, Any]) -> None:
    self.rows.append(row)
    with self.path.open("a", encoding="utf-8") as file:
      file.write(json.dumps(row) + "\n")
      file.flush()
      os.fsync(file.fileno())


def read_result(folder: Path) -> dict[str, Any]:
  """The result of a run folder.

  Raises:
    SourceError: the run is not complete; says how to continue it.
    FormatError: the file is damaged.
  """
  path = folder / RESULT
  if not path.is_file():
    hint = f"`lmcompress resume {folder}` continues it" if (folder / CONFIG).is_file() else "it is no run folder"
    raise SourceError(f"{folder} has no {RESULT}; {hint}")
  try:
    result = json.loads(path.read_text("utf-8"))
    _ = result["stages"], result["name"]
  except (ValueError, KeyError, TypeError):
    raise FormatError(f"{path}: not a result; remove it and resume the run") from None
  return result


def read_run(folder: Path) -> Config:
  """The config of a run folder."""
  path = folder / CONFIG
  if not path.is_file():
    raise SourceError(f"{folder} has no {CONFIG}; resume takes a run folder such as results/quickstart-1a2b3c4d")
  table = parse(path.read_text("utf-8"), str(path))
  if not isinstance(table, dict):
    raise ConfigError(f"{path}: a config is a table of keys")
  return check(table, str(path))


def prepare(config: Config, results: Path, folder: Path | None = None) -> Path:
  """Makes the run folder and writes the config, so that `resume` finds it whatever happens next."""
  if not Path(config.model).exists() and config.model not in hub.MODELS:
    hub.resolve_model(config.model)  # raises with the names that there are
  folder = folder or results / config.folder
  folder.mkdir(parents=True, exist_ok=True)
  if processes.first():
    write_text(folder / CONFIG, dump(config))
  return folder


def run_folders(results: Path) -> Iterator[Path]:
  """The run folders below `results`, newest last."""
  if results.is_dir():
    yield from sorted((p for p in results.iterdir() if (p / CONFIG).is_file()), key=lambda p: p.stat().st_mtime)
