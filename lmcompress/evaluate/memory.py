"""Peak memory of this process over a stretch of work."""

from __future__ import annotations

import resource
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
  """Starts a new stretch, where the system allows it (Linux); elsewhere the peak is that of the process."""
  try:
    _CLEAR.write_text("5")
  except OSError:
    return


def peak_bytes() -> int:
  """The most resident memory since the last reset."""
  try:
    for line in _STATUS.read_text().splitlines():
      if line.startswith("VmHWM:"):
        return int(line.split()[1]) * 1024
  except OSError:
    pass
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
