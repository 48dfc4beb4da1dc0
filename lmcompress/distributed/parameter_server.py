"""A parameter server: arrays in parts that apply updates on their own, and a clock that keeps workers within bounds.

Li et al. 2014 (OSDI) and stale synchronous parallel, Ho et al. 2013 (NeurIPS). Nothing here knows of models: workers
pull arrays, push gradients, and ask the clock whether they may go on. The classes are plain; where they live (in this
process, or as actors of Ray) is their `Host`'s matter.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmcompress.types import CompressedArray, FormatError, LmcompressError


class DroppedError(LmcompressError):
  """A worker that was silent for too long and is not waited for any more; it may join again."""


class Turn(NamedTuple):
  """What a worker is to do.

  Attributes:
    number: of the batch; None where all updates are done.
    clock: of the worker, how many updates it has made.
  """

  number: int | None
  clock: int


class Clock:
  """Hands out batches, and holds a worker back that is more than `staleness` updates ahead of the slowest one alive.

  Args:
    updates: to be made in all.
    staleness: 0 lets nobody begin an update before all have made as many.
    patience: seconds after which a silent worker is dropped.
    log: a file of what each update recorded, its batch among it, a line each; a clock that is started again goes on
      after it.
    now: what time it is.
  """

  def __init__(
    self,
    updates: int,
    staleness: int,
    patience: float = 30.0,
    log: Path | None = None,
    now: Callable[[], float] = time.monotonic,
  ):
    self.updates, self.staleness, self.patience, self._now = updates, staleness, patience, now
    self._lock = threading.Lock()
    self._clocks: dict[str, int] = {}
    self._seen: dict[str, float] = {}
    self._given: dict[str, int] = {}
    self._returned: list[int] = []
    self._next = self._done = 0
    self._ended = False
    self.history: list[dict[str, float]] = []
    self._log = log
    if log is not None and log.is_file():
      self.history = [json.loads(line) for line in log.read_text("utf-8").splitlines() if line.endswith("}")]
      self.back_to({int(row["batch"]) for row in self.history})

  def join(self, worker: str) -> None:
    """A worker begins, where the slowest one is."""
    with self._lock:
      self._clocks[worker] = min(self._clocks.values(), default=0)
      self._seen[worker] = self._now()

  def end(self) -> None:
    """No more updates are wanted: who asks is told so, and who comes with one is refused."""
    with self._lock:
      self._ended = True
      self._clocks.clear()

  def leave(self, worker: str) -> None:
    """A worker is gone; the batch that it had is given to another."""
    with self._lock:
      self._forget(worker)

  def turn(self, worker: str) -> Turn | None:
    """The worker's next batch; None where it has to wait and ask again.

    Raises:
      DroppedError: the worker was given up.
    """
    with self._lock:
      if self._ended or self._done >= self.updates:
        return Turn(None, self._clocks.get(worker, 0))
      self._alive(worker)
      gap = self._clocks[worker] - min(self._clocks.values())
      if gap > self.staleness or (not self._returned and self._next >= self.updates):
        return None
      if self._returned:
        number = self._returned.pop()
      else:
        number, self._next = self._next, self._next + 1
      self._given[worker] = number
      return Turn(number, self._clocks[worker])

  def admit(self, worker: str) -> int:
    """How many updates ahead of the slowest one the worker is, now that its gradient is there.

    Raises:
      DroppedError: the worker was given up; its gradient is not wanted.
    """
    with self._lock:
      self._alive(worker)
      return self._clocks[worker] - min(self._clocks.values())

  def advance(self, worker: str, record: Mapping[str, float]) -> int:
    """The worker's update is made; returns how many are, of all."""
    with self._lock:
      self._alive(worker)
      self._clocks[worker] += 1
      self._given.pop(worker, None)
      self._done += 1
      self.history.append(dict(record))
      if self._log is not None:
        with self._log.open("a", encoding="utf-8") as lines:
          lines.write(json.dumps(self.history[-1]) + "\n")
      return self._done

  def latest(self) -> tuple[int, dict[str, float]]:
    """How many updates are made, and what the last one recorded."""
    with self._lock:
      return self._done, dict(self.history[-1]) if self.history else {}

  def told(self) -> list[dict[str, float]]:
    """What each update recorded, in their order."""
    with self._lock:
      return list(self.history)

  def back_to(self, batches: Collection[int]) -> None:
    """Keeps the updates of such batches, which all saved states have, and forgets the others: those are given again."""
    with self._lock:
      kept = {int(row["batch"]): row for row in self.history if row["batch"] in batches}
      self.history = list(kept.values())
      self._done, self._next = len(kept), max(kept, default=-1) + 1
      self._returned = [n for n in range(self._next) if n not in kept]
      if self._log is not None:
        part = self._log.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in self.history), "utf-8")
        part.replace(self._log)

  def _alive(self, worker: str) -> None:
    now = self._now()
    if worker not in self._clocks:
      raise DroppedError(f"worker {worker} was silent for over {self.patience:g} seconds; it has to join again")
    self._seen[worker] = now
    for other, seen in list(self._seen.items()):
      if now - seen > self.patience:
        self._forget(other)

  def _forget(self, worker: str) -> None:
    self._clocks.pop(worker, None)
    self._seen.pop(worker, None)
    if worker in self._given:
      self._returned.append(self._given.pop(worker))


class Shard:
  """Some of the arrays and their optimizer's state.

  Args:
    arrays: float32 by path.
    optimizer: what makes updates of gradients; a norm over all gradients is not known here.
    folder: where its state is written every `save_every` updates, and read again if it is there.
    name: of the file.
  """

  def __init__(
    self,
    arrays: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    folder: Path | None = None,
    name: str = "shard",
    save_every: int = 50,
  ):
    self._arrays = {path: jnp.asarray(x) for path, x in arrays.items()}
    self._state = optimizer.init(self._arrays)
    self._path = None if folder is None else Path(folder) / f"{name}.npz"
    self._every, self.version = save_every, 0
    self._lock = threading.Lock()
    self._applied: set[int] = set()

    def update(arrays: Any, state: Any, gradients: Any, scale: Any) -> Any:
      updates, state = optimizer.update(gradients, state, arrays)
      return optax.apply_updates(arrays, jax.tree.map(lambda u: u * scale, updates)), state

    self._update = jax.jit(update)
    if self._path is not None and self._path.is_file():
      self._restore(self._path)

  def made(self) -> int:
    """How many updates were made."""
    return self.version

  def applied(self) -> set[int]:
    """The batches whose gradients it has applied."""
    with self._lock:
      return set(self._applied)

  def pull(self) -> tuple[int, dict[str, np.ndarray]]:
    """How many updates were made, and the arrays after them."""
    with self._lock:
      return self.version, {path: np.asarray(x) for path, x in self._arrays.items()}

  def push(self, batch: int, gradients: Mapping[str, Any], scale: float) -> int:
    """Applies gradients, dense or in a compressed form; those of a batch that came before are not applied again.

    Args:
      batch: its number.
      scale: of the update.
    """
    with self._lock:
      if batch in self._applied:
        return self.version
      dense = {
        path: jnp.asarray(g.materialize() if isinstance(g, CompressedArray) else g, jnp.float32)
        for path, g in gradients.items()
      }
      self._arrays, self._state = self._update(self._arrays, self._state, dense, jnp.float32(scale))
      self._applied.add(batch)
      self.version += 1
      if self._path is not None and self.version % self._every == 0:
        self._save(self._path)
      return self.version

  def save(self) -> None:
    """Writes the state."""
    with self._lock:
      if self._path is not None:
        self._save(self._path)

  def _save(self, path: Path) -> None:
    leaves = {f"{i:05d}": np.asarray(x) for i, x in enumerate(jax.tree.leaves((self._arrays, self._state)))}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    with part.open("wb") as file:
      np.savez(file, allow_pickle=False, batches=np.array(sorted(self._applied), np.int64), **leaves)
    part.replace(path)

  def _restore(self, path: Path) -> None:
    like, treedef = jax.tree.flatten((self._arrays, self._state))
    try:
      with np.load(path, allow_pickle=False) as file:
        leaves = [file[f"{i:05d}"] for i in range(len(like))]
        batches = file["batches"].astype(np.int64).tolist()
    except (OSError, ValueError, KeyError, EOFError) as error:
      raise FormatError(f"{path}: cannot be read ({error}); remove it to begin anew") from None
    if [(x.shape, x.dtype) for x in leaves] != [(x.shape, x.dtype) for x in like]:
      raise FormatError(f"{path}: holds other arrays than this model has; remove it to begin anew")
    self._arrays, self._state = treedef.unflatten([jnp.asarray(x) for x in leaves])
    self._applied, self.version = set(batches), len(batches)


def parts_of(arrays: Mapping[str, Any], count: int) -> list[list[str]]:
  """Paths in so many parts of about as many bytes each, the largest arrays first."""
  parts: list[list[str]] = [[] for _ in range(count)]
  sizes = [0] * count
  for path in sorted(arrays, key=lambda p: (-arrays[p].size, p)):
    least = sizes.index(min(sizes))
    parts[least].append(path)
    sizes[least] += arrays[path].size
  return [sorted(part) for part in parts if part]


# ---------------------------------------------------------------------------------------- where they live


class Host(Protocol):
  """Where servers live and workers run."""

  def serve(self, make: Callable[..., Any], *args: Any) -> Any:
    """An object that workers may call."""
    ...

  def call(self, server: Any, method: str, *args: Any) -> Any:
    """What a method of it gives."""
    ...

  def start(self, work: Callable[..., Any], *args: Any) -> Any:
    """Runs `work(host, *args)` beside this."""
    ...

  def ended(self, running: Any) -> BaseException | bool:
    """False while it runs, True when it is done, or what it died of."""
    ...

  def close(self) -> None: ...


class Threads:
  """Everything in this process, a thread for each worker."""

  def __init__(self) -> None:
    self._threads: list[threading.Thread] = []

  def serve(self, make: Callable[..., Any], *args: Any) -> Any:
    return make(*args)

  def call(self, server: Any, method: str, *args: Any) -> Any:
    return getattr(server, method)(*args)

  def start(self, work: Callable[..., Any], *args: Any) -> Any:
    result: list[BaseException | bool] = [False]

    def run() -> None:
      try:
        work(self, *args)
        result[0] = True
      except BaseException as error:  # a worker's end is told to who waits for it
        result[0] = error

    thread = threading.Thread(target=run, daemon=True)
    self._threads.append(thread)
    thread.start()
    return result

  def ended(self, running: Any) -> BaseException | bool:
    return running[0]

  def close(self) -> None:
    for thread in self._threads:
      thread.join(timeout=10)


class Processes:
  """Actors and tasks of Ray (Moritz et al. 2018, arXiv:1712.05889), which may lie on other machines.

  Args:
    address: of a cluster; None starts one on this machine.

  Raises:
    LmcompressError: Ray is not installed.
  """

  def __init__(self, address: str | None = None):
    self._ray = _ray()
    self._own = not self._ray.is_initialized()
    if self._own:
      here: dict[str, Any] = {"num_cpus": 32, "include_dashboard": False} if address is None else {"address": address}
      self._ray.init(log_to_driver=False, configure_logging=False, **here)

  def serve(self, make: Callable[..., Any], *args: Any) -> Any:
    # what fails is started again, and what it was called for is called again
    actor = self._ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=16)(make)
    return actor.remote(*args)

  def call(self, server: Any, method: str, *args: Any) -> Any:
    try:
      return self._ray.get(getattr(server, method).remote(*args), timeout=60)
    except self._ray.exceptions.RayTaskError as error:
      raise error.cause if isinstance(error.cause, LmcompressError) else error from None

  def start(self, work: Callable[..., Any], *args: Any) -> Any:
    return self._ray.remote(num_cpus=0, max_retries=0)(_run_on_ray).remote(work, *args)

  def ended(self, running: Any) -> BaseException | bool:
    ready, _ = self._ray.wait([running], timeout=0)
    if not ready:
      return False
    try:
      self._ray.get(running)
    except self._ray.exceptions.RayError as error:
      cause = getattr(error, "cause", None)
      return cause if isinstance(cause, LmcompressError) else error
    return True

  def close(self) -> None:
    if self._own:
      self._ray.shutdown()


class _Inside(Processes):
  """The host as a worker within Ray sees it."""

  def __init__(self) -> None:
    self._ray, self._own = _ray(), False


def _run_on_ray(work: Callable[..., Any], *args: Any) -> None:
  work(_Inside(), *args)


def _ray() -> Any:
  try:
    import ray
    import ray.exceptions
  except ImportError:
    raise LmcompressError('workers in processes need Ray: pip install "lmcompress[ray]"') from None
  return ray
