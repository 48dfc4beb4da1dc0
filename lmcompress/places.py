"""Where the runs of a sweep go: processes of this machine, or Ray's."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from lmcompress.types import ConfigError

_PYTHON = "<python>"
"""In a command: the interpreter of the machine that runs it."""
_SETTINGS = ("LMCOMPRESS_", "JAX_", "XLA_")
"""What begins the names of the variables that a run takes with it."""


class Running(Protocol):
  """A command that was begun."""

  def ended(self) -> int | None:
    """Its exit status once it has ended."""

  def stop(self) -> None:
    """Ends it, and waits until it has."""


class Place(Protocol):
  """Where commands run."""

  def start(self, command: Sequence[str], log: Path) -> Running:
    """Begins a command whose output goes to a file."""
    ...

  def close(self) -> None:
    """Nothing more is begun."""


class Here:
  """Processes of this machine."""

  def start(self, command: Sequence[str], log: Path) -> Running:
    return _Process(command, log)

  def close(self) -> None:
    return


class _Process:
  def __init__(self, command: Sequence[str], log: Path):
    with log.open("w", encoding="utf-8") as file:
      self._process = subprocess.Popen(list(command), stdout=file, stderr=subprocess.STDOUT)

  def ended(self) -> int | None:
    return self._process.poll()

  def stop(self) -> None:
    self._process.terminate()
    self._process.wait()


class OnRay:
  """Tasks of a Ray cluster, each a process beside Ray's worker; Ray decides when there is room for one.

  Machines of the cluster see the folder of results and this working directory under the same paths. A machine that is
  lost ends its runs with an error; the same sweep begun again goes on with them.

  Args:
    address: of the cluster; `local` starts one on this machine.
    cpus, gpus: that a run takes.

  Raises:
    ConfigError: Ray is not installed, no cluster answers, or no machine of it has so much.
  """

  def __init__(self, address: str, cpus: float = 1, gpus: float = 0):
    try:
      import ray
      import ray.exceptions
    except ImportError:
      raise ConfigError("--ray needs Ray: pip install 'lmcompress[ray]'") from None
    if cpus < 0 or gpus < 0 or cpus + gpus == 0:
      raise ConfigError(f"--cpus {cpus:g} --gpus {gpus:g}: a run takes some of one")
    self._ray: Any = ray
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
      if port.isdigit():  # Ray itself would try for minutes
        socket.create_connection((host, int(port)), timeout=10).close()
      own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
      ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, ray.exceptions.RayError, ValueError, RuntimeError, OverflowError) as error:
      raise ConfigError(f"--ray {address}: no cluster answers there ({str(error).splitlines()[0]})") from None
    most = [(n["Resources"].get("CPU", 0), n["Resources"].get("GPU", 0)) for n in ray.nodes() if n["Alive"]]
    if not any(c >= cpus and g >= gpus for c, g in most):
      self.close()
      raise ConfigError(f"--cpus {cpus:g} --gpus {gpus:g}: machines of the cluster have {most} (CPUs, GPUs)")
    self._task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_called)

  def start(self, command: Sequence[str], log: Path) -> Running:
    _stop_file(str(log.resolve())).unlink(missing_ok=True)
    parts = [_PYTHON if part == sys.executable else part for part in command]
    settings = {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)}
    return _Task(self._ray, self._task.remote(parts, str(log.resolve()), os.getcwd(), settings), log)

  def close(self) -> None:
    self._ray.shutdown()


class _Task:
  def __init__(self, ray: Any, reference: Any, log: Path):
    self._ray, self._reference, self._log, self._asked = ray, reference, log, _stop_file(str(log.resolve()))

  def ended(self) -> int | None:
    if not self._ray.wait([self._reference], timeout=0)[0]:
      return None
    try:
      return self._ray.get(self._reference)
    except self._ray.exceptions.RayError as error:
      with self._log.open("a", encoding="utf-8") as file:
        file.write(f"\nRay: {str(error).strip().splitlines()[0]}\n")
      return 1

  def stop(self) -> None:
    self._asked.touch()
    self._ray.cancel(self._reference)  # what has not begun
    self._ray.wait([self._reference], timeout=60)
    self._asked.unlink(missing_ok=True)


def _stop_file(log: str) -> Path:
  """What stands beside a log once its run is to end; an interrupt within Ray's worker may be lost."""
  return Path(f"{log}.stop")


def _called(command: Sequence[str], log: str, folder: str, settings: dict[str, str]) -> int:
  """Runs a command of this machine's Python, within Ray's worker."""
  made, asked = [sys.executable if part == _PYTHON else part for part in command], _stop_file(log)
  with open(log, "w", encoding="utf-8") as file:
    process = subprocess.Popen(made, stdout=file, stderr=subprocess.STDOUT, cwd=folder, env=os.environ | settings)
    try:
      while process.poll() is None and not asked.exists():
        time.sleep(0.1)
    finally:
      if process.poll() is None:
        process.terminate()
    return process.wait()
