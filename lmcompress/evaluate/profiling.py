"""Profiles: a trace that TensorBoard opens, the operations that took longest, and what a compiled program needs."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

_WRAPPERS = ("end: ", "Threadpool", "ThunkExecutor", "while", "call", "conditional")
"""Events that are no operation, or that last as long as those inside them."""


@contextlib.contextmanager
def trace(folder: Path) -> Iterator[None]:
  """Records what runs inside, for TensorBoard's profile tab (`tensorboard --logdir FOLDER`, with xprof installed).

  Raises:
    RuntimeError: another trace is being taken.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with jax.profiler.trace(str(folder), profiler_options=options):
    yield


class Stretch:
  """Traces a few steps of a loop, when what is compiled or read at its beginning is past.

  Args:
    folder: of the trace.
    after: steps before it begins.
    count: steps that it lasts, fewer if the loop ends.
  """

  def __init__(self, folder: Path, after: int = 2, count: int = 3):
    self._folder, self._after, self._last = folder, after, after + count
    self._done, self._open = 0, contextlib.ExitStack()

  def step(self) -> None:
    """Called after each step."""
    self._done += 1
    if self._done == self._after:
      self._open.enter_context(trace(self._folder))
    if self._done == self._last:
      self.close()

  def close(self) -> None:
    """Ends the trace, if one is being taken."""
    self._open.close()


def busiest(folder: Path, count: int = 15) -> list[dict[str, Any]]:
  """The operations of the latest trace in a folder that took longest, over all threads or devices.

  Returns:
    `operation`, `calls`, `ms` and its `share` of all operations' time, the longest first; empty without a trace.
  """
  files = sorted(Path(folder).glob("plugins/profile/*/*.xplane.pb"))
  if not files:
    return []
  calls, spent = collections.Counter(), collections.Counter()
  for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
    for line in plane.lines:
      if "XLA" not in line.name:
        continue
      for event in line.events:
        if not event.name.startswith(_WRAPPERS):
          calls[event.name] += 1
          spent[event.name] += event.duration_ns
  whole, longest = sum(spent.values()) or 1, spent.most_common(count)
  return [{"operation": name, "calls": calls[name], "ms": ns / 1e6, "share": ns / whole} for name, ns in longest]


def needs(compiled: Any) -> dict[str, float]:
  """What XLA says of a compiled program: `flops`, `bytes_accessed`, and bytes of `arguments`, `outputs`, `temporaries`.

  `peak_bytes` is what stands at once: arguments, temporaries and outputs that take no argument's place. A loop's body
  counts once in `flops` and `bytes_accessed`, however often it runs.
  """
  cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
  found = {"flops": float(cost.get("flops", 0.0)), "bytes_accessed": float(cost.get("bytes accessed", 0.0))}
  if memory is not None:
    outputs = memory.output_size_in_bytes
    found |= {
      "arguments": memory.argument_size_in_bytes, "outputs": outputs, "temporaries": memory.temp_size_in_bytes,
      "peak_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs - memory.alias_size_in_bytes,
    }  # fmt: skip
  return found
