"""What the verbs share: their common arguments, progress, and tables on a terminal."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from lmcompress.errors import ConfigError

ConfigFile = Annotated[str, typer.Argument(help="A config file, or its name as `lmcompress ls` shows it.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Dotted overrides, e.g. evaluate.windows=4 seed=1.")]
Results = Annotated[Path, typer.Option("--results", help="Folder of the run folders.")]
RESULTS = Path("results")
CONFIGS = Path("configs")


def console() -> Any:
  """Standard output, through rich."""
  from rich.console import Console

  return Console()


class Progress:
  """Shows a run's progress: bars in a terminal, a line for each part elsewhere."""

  def __init__(self, console: Any):
    import rich.progress
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

    self.console = console
    self.interrupted = False
    self.live = console.is_terminal
    self.bars = rich.progress.Progress(
      TextColumn("{task.description}"),
      BarColumn(),
      MofNCompleteColumn(),
      TimeElapsedColumn(),
      console=console,
      transient=False,
    )
    self.tasks: dict[str, Any] = {}

  def _interrupt(self, *_: Any) -> None:
    """The first Ctrl-C ends the run after the part in work (an exception inside XLA is lost); the second at once."""
    if self.interrupted:
      os._exit(130)
    self.interrupted = True

  def __enter__(self) -> Progress:
    self.before = signal.signal(signal.SIGINT, self._interrupt)
    if self.live:
      self.bars.start()
    return self

  def __exit__(self, *_: Any) -> None:
    signal.signal(signal.SIGINT, self.before)
    if self.live:
      self.bars.stop()

  def step(self, what: str, done: int, total: int) -> None:
    if self.interrupted:
      raise KeyboardInterrupt
    if not self.live:
      if done == total:
        self.console.print(f"{what}: {total} done", markup=False, highlight=False)
      return
    if what not in self.tasks:
      self.tasks[what] = self.bars.add_task(what, total=total)
    self.bars.update(self.tasks[what], completed=done)

  def note(self, text: str) -> None:
    self.console.print(text, markup=False, highlight=False)


def find_config(name: str) -> Path:
  """A path, or a name below configs/ with or without `.yaml`."""
  path = Path(name)
  with contextlib.suppress(OSError, ValueError):  # no name that a file can have
    for candidate in (path, CONFIGS / name, CONFIGS / f"{name}.yaml", *sorted(CONFIGS.glob(f"**/{name}.yaml"))):
      if candidate.is_file():
        return candidate
  raise ConfigError(f"{name}: no such config file; `lmcompress ls` lists those there are")


def wide(console: Any) -> Any:
  """Tables keep their columns where the output is no terminal."""
  if not console.is_terminal:
    console.width = max(console.width, 140)
  return console
