"""Peak memory of this process over a stretch of work, and how much of it is the runtime's own."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import resource
import subprocess
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
  """Starts a new stretch, where the system allows it (Linux); elsewhere the peak is that of the process."""
  try:
    _CLEAR.write_text("5")
  except OSError:
    return


def release() -> None:
  """Collects garbage and gives back what was freed, so that it is in nobody's peak."""
  gc.collect()
  trim()


def trim() -> None:
  """Gives back what was freed and the allocator still holds (glibc); compilers leave a lot."""
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).malloc_trim(0)


def peak_bytes() -> int:
  """The most resident memory since the last reset."""
  try:
    for line in _STATUS.read_text().splitlines():
      if line.startswith("VmHWM:"):
        return int(line.split()[1]) * 1024
  except OSError:
    pass
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def above_runtime(nbytes: int) -> int:
  """What a peak holds beyond an empty JAX process; never below 0."""
  return max(0, nbytes - runtime_bytes())


@functools.cache
def runtime_bytes() -> int:
  """Resident memory of a fresh process that imports JAX and makes one array: what every run pays before a model.

  Measured once, in a child process with this process's environment; 0 where none can be started.
  """
  try:
    done = subprocess.run([sys.executable, "-c", _EMPTY], capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout.split()[-1])
  except (OSError, subprocess.SubprocessError, ValueError, IndexError):
    return 0


_EMPTY = """
import resource
import jax
jax.block_until_ready(jax.numpy.zeros(1))
try:
  with open("/proc/self/statm") as file:
    print(int(file.read().split()[1]) * resource.getpagesize())
except OSError:
  print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
