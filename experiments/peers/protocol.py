"""The worker's half of the benchmark: an engine says how to read tokens, this module times it and answers the driver.

A worker runs as `python <worker>.py '<Setting as JSON>'`. It loads its model, prints one line

  {"about": {...}}

and then blocks on stdin, so that it takes no CPU while others are measured. Each line asks for one round, each
answer is one line:

  {"what": "prefill"}                           -> {"rate": tokens/s, "step_s": {"minimum": ...}}
  {"what": "decode"} or {"what": "decode8"}     -> the same, over 1 or 8 sequences
  {"what": "greedy", "prompt": [...]}           -> {"tokens": [...]}, the continuation, to see that the model is right
  {"what": "memory"}                            -> {"peak_bytes": ..., "load_peak_bytes": ...}

What cannot be done answers {"error": "one line"}. Only the standard library and NumPy are needed here: the module
runs in every environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Answer = dict[str, Any]
BATCHES = {"decode": 1, "decode8": 8}
CONTINUATION = 16
"""Tokens of the continuation that shows that the model is right."""
_WARM_STEPS = 2


@dataclasses.dataclass(frozen=True)
class Setting:
  """What every worker is told.

  Attributes:
    source: the GGUF file that all weights come from.
    folder: where files made of it are kept between runs.
    threads: threads of each worker.
    prefill: tokens of the prompt, which is the depth that decoding begins at.
    decode: tokens written in a round.
    vocab: tokens there are; the timed prompt is drawn from them.
    options: what tells the contenders of one worker apart.
  """

  source: str
  folder: str
  threads: int
  prefill: int
  decode: int
  vocab: int
  options: dict[str, Any]


class Engine(Protocol):
  """A model that reads tokens into a KV cache of fixed size and says the likeliest next ones."""

  about: dict[str, Any]
  """`versions`, `weight_bytes` (read for each token), `cache_bytes` (per token and sequence), notes."""

  def start(self, batch: int) -> None:
    """Empties the cache, which then holds `batch` sequences of up to `prefill + decode` tokens."""
    ...

  def read(self, tokens: np.ndarray) -> np.ndarray:
    """Appends `tokens: [batch, length]` int32, gives the likeliest next token of each, `[batch]`."""
    ...

  def rewind(self, length: int) -> None:
    """Forgets all but the first `length` tokens of each sequence."""
    ...


def prompt(setting: Setting, batch: int) -> np.ndarray:
  """Tokens `[batch, prefill]`, the same for all contenders (and for `lmcompress.evaluate.latency`)."""
  return np.random.default_rng(0).integers(0, setting.vocab, (batch, setting.prefill), np.int32)


def rounds(engine: Engine, setting: Setting) -> dict[str, Callable[..., Any]]:
  """The rounds of an engine by name. Each runs once untimed first: the round before was another process's."""

  def prefill() -> Answer:
    tokens = prompt(setting, 1)
    for _ in range(2):
      engine.start(1)
      begun = time.perf_counter()
      engine.read(tokens)
      seconds = time.perf_counter() - begun
    return answer(setting.prefill, [seconds])

  def decode(batch: int) -> Answer:
    engine.start(batch)
    first = engine.read(prompt(setting, batch))
    seconds = []
    for steps in (_WARM_STEPS, setting.decode):
      engine.rewind(setting.prefill)
      current, seconds = first, []
      for _ in range(steps):
        begun = time.perf_counter()
        current = engine.read(current[:, None])
        seconds.append(time.perf_counter() - begun)
    return answer(batch, seconds)

  def greedy(prompt: list[int]) -> Answer:
    engine.start(1)
    current = engine.read(np.asarray([prompt], np.int32))
    tokens = [int(current[0])]
    while len(tokens) < CONTINUATION:
      current = engine.read(current[:, None])
      tokens.append(int(current[0]))
    return {"tokens": tokens}

  return {"prefill": prefill, "greedy": greedy, **{name: lambda n=n: decode(n) for name, n in BATCHES.items()}}


def answer(amount: float, seconds: list[float]) -> Answer:
  """A round of steps that did `amount` each: the rate at the median step, and the steps' spread."""
  median = statistics.median(seconds)
  return {"rate": amount / median, "step_s": {"minimum": min(seconds), "median": median, "maximum": max(seconds)}}


def serve(build: Callable[[Setting], tuple[dict[str, Any], dict[str, Callable[..., Any]]]]) -> None:
  """Runs a worker: `build` gives what there is to say about it and its rounds by name."""
  # Libraries print what they like: the protocol keeps the real stdout for itself.
  channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)

  def say(message: dict[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()

  try:
    about, table = build(Setting(**json.loads(sys.argv[1])))
  except Exception as error:
    say({"error": one_line(error)})
    return
  load_peak = peak_bytes()
  _settle()
  table["memory"] = lambda: {"peak_bytes": peak_bytes(), "load_peak_bytes": load_peak}
  say({"about": about})
  for line in sys.stdin:
    request = json.loads(line)
    what = request.pop("what")
    try:
      say(table[what](**request) if what in table else {"error": f"no round {what!r}; there are {', '.join(table)}"})
    except Exception as error:
      say({"error": one_line(error)})


def one_line(error: Exception) -> str:
  """What went wrong, without the rest of it."""
  lines = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {lines[0][:300]}"


def peak_bytes() -> int:
  """The most resident memory of this process since the last reset (Linux), else ever."""
  try:
    for line in Path("/proc/self/status").read_text().splitlines():
      if line.startswith("VmHWM:"):
        return int(line.split()[1]) * 1024
  except OSError:
    pass
  import resource

  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _settle() -> None:
  """Gives back what loading took and starts a new peak (Linux): many workers wait in one machine."""
  gc.collect()
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
