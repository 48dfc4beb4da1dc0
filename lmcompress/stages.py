"""The states that a run's tree goes through, and who is told how the run gets on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from lmcompress.types import Params


class Watcher(Protocol):
  """Told how a run gets on."""

  def step(self, what: str, done: int, total: int) -> None: ...

  def note(self, text: str) -> None: ...


class Silent:
  """A watcher that says nothing."""

  def step(self, what: str, done: int, total: int) -> None:
    return

  def note(self, text: str) -> None:
    return


@dataclasses.dataclass
class Stage:
  """A state of the tree: after loading, after a link, after training."""

  name: str
  params: Params
  seconds: float
  peak_memory_bytes: int


def key(stages: Sequence[Stage], i: int) -> str:
  """What records call a stage."""
  return f"{i}:{stages[i].name}"
