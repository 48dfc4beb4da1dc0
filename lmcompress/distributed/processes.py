"""Many processes as one run: how they start, agree, meet, and see arrays that lie in several of them."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from typing import Any

import jax
import numpy as np

from lmcompress.types import ConfigError

HEARTBEAT_S = 10
"""Seconds of silence after which a process is taken for dead and all end."""


def start(coordinator: str, process: int | None = None, processes: int | None = None, patience: int = 60) -> None:
  """Joins the other processes; before JAX is used for anything.

  Args:
    coordinator: `host:port` of process 0, or `auto` where a cluster (SLURM, a TPU pod, Kubernetes) says it all.
    process: the number of this one.
    processes: how many there are.
    patience: seconds to wait for the others.

  Where the others do not come within `patience`, this process says so in a line and ends with code 1: what waits for
  them cannot be called back.

  Raises:
    ConfigError: what is said does not fit together, or no cluster says it.
  """
  given: dict[str, Any] = {}
  if coordinator != "auto":
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
      raise ConfigError(f"--coordinator {coordinator}: write HOST:PORT of process 0, or auto on a cluster that says it")
    if processes is None or process is None or not 0 <= process < processes:
      raise ConfigError(
        f"--process {process}, --processes {processes}: with --coordinator, say how many there are and which this is, "
        "from 0"
      )
    given = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}

  def give_up() -> None:
    sys.stderr.write(
      f"lmcompress: the processes did not find one another at {coordinator} within {patience} seconds; start all of "
      "them with the same --coordinator, and check that its port can be reached\n"
    )
    sys.stderr.flush()
    os._exit(1)

  timer = threading.Timer(patience, give_up)
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      **given, initialization_timeout=patience + 30, heartbeat_timeout_seconds=HEARTBEAT_S,
      shutdown_timeout_seconds=HEARTBEAT_S,
    )  # fmt: skip
  except (RuntimeError, ValueError) as error:
    what = " ".join(str(error).split())[:200]
    raise ConfigError(f"--coordinator {coordinator}: {what}") from None
  finally:
    timer.cancel()


def count() -> int:
  """How many processes there are."""
  return jax.process_count() if jax.distributed.is_initialized() else 1  # asked of a backend, it would start


def first() -> bool:
  """Whether this is the process that writes."""
  return count() == 1 or jax.process_index() == 0


def whole(tree: Any) -> Any:
  """A tree whose arrays are NumPy's, entire, on every process; all must call it. One process gets its tree back."""
  if count() == 1:
    return tree
  from jax.experimental import multihost_utils

  def gather(x: Any) -> Any:
    spread = isinstance(x, jax.Array) and not x.is_fully_addressable
    return np.asarray(multihost_utils.process_allgather(x, tiled=True) if spread else x)

  return jax.tree.map(gather, tree)


def agree(**said: str) -> None:
  """Sees that every process says the same of each thing; all must call it.

  Raises:
    ConfigError: on every process, which of them differs in what.
  """
  if count() == 1:
    return
  from jax.experimental import multihost_utils

  for what, value in said.items():
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest()[:8], np.int32)
    found = np.asarray(multihost_utils.process_allgather(digest))
    apart = [i for i, row in enumerate(found) if not np.array_equal(row, found[0])]
    if apart:
      raise ConfigError(
        f"process {', '.join(map(str, apart))} has another {what} than process 0; all need the same (here, process "
        f"{jax.process_index()}: {value[:120]})"
      )


def meet(what: str) -> None:
  """Waits until all processes are here."""
  if count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(what)
