"""Several processes of one run on this machine: started together, ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

GRACE_S = 15
"""Seconds that the others have to end by themselves when one has."""


PROGRAM = (sys.executable, "-m", "lmcompress.cli")


def launch(
  count: int, arguments: Sequence[str], folder: Path, say: Callable[[str], None], program: Sequence[str] = PROGRAM
) -> int:
  """Runs `lmcompress` with the same arguments in so many processes; gives the first code but 0.

  Process 0 writes to this terminal, each other to `process-<n>.log` in the run folder. Each has its share of the cores
  that this one may use, where there are enough. When one ends with an error or
  is killed, the others are ended within `GRACE_S` seconds, and what it was is said.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  folder.mkdir(parents=True, exist_ok=True)
  running, logs = [], []
  before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # whoever ends this ends the processes too
  try:
    for n in range(count):
      command = [*program, *arguments]
      command += ["--coordinator", address, "--process", str(n), "--processes", str(count)]
      log = None if n == 0 else (folder / f"process-{n}.log").open("w", encoding="utf-8")
      logs.append(log)
      running.append(subprocess.Popen(command, stdout=log, stderr=log))
      if shares := cores_of(n, count):
        with contextlib.suppress(ProcessLookupError):  # what ended at once is reported below
          os.sched_setaffinity(running[-1].pid, shares)
    while True:
      codes = [one.poll() for one in running]
      failed = [(n, code) for n, code in enumerate(codes) if code]
      if failed:
        n, code = failed[0]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        where = "above" if n == 0 else f"in {folder / f'process-{n}.log'}"
        say(f"process {n} of {count} {how} (its messages are {where}); the others are ended. "
            f"What was saved is kept: lmcompress resume {folder}")  # fmt: skip
        return 128 - code if code < 0 else code
      if all(code == 0 for code in codes):
        return 0
      time.sleep(0.1)
  finally:
    signal.signal(signal.SIGTERM, before)
    _end(running)
    for log in logs:
      if log is not None:
        log.close()


def cores_of(n: int, count: int) -> list[int]:
  """The n-th share of this process's cores; none where there are fewer than shares, or where a system does not say."""
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  return cores[n * len(cores) // count : (n + 1) * len(cores) // count] if len(cores) >= count else []


def _end(running: Sequence[subprocess.Popen]) -> None:
  """Asks what still runs to end, and after a while makes it."""
  until = time.monotonic() + GRACE_S
  for one in running:
    if one.poll() is None:
      one.terminate()
  for one in running:
    try:
      one.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
      one.kill()
      one.wait()
