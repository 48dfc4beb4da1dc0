"""Training by workers of their own pace: a parameter server, and copies that are averaged."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmcompress import tree
from lmcompress.distributed.parameter_server import Clock, DroppedError, Host, Shard, Threads, parts_of
from lmcompress.evaluate.roofline import leaf_bytes
from lmcompress.io.checkpoint import tree_hash
from lmcompress.io.whole import write_text
from lmcompress.training.durable import Metrics
from lmcompress.training.loop import batches, checked_rows
from lmcompress.training.step import Training, loss_of, start, train_step
from lmcompress.types import CompressedArray, Evidence, FormatError, LmcompressError, Params, Transform, WeightError


@dataclasses.dataclass(frozen=True)
class Asynchronous:
  """How workers share a parameter server.

  Attributes:
    workers: how many, each with a batch of its own.
    shards: parts of the server.
    staleness: how many updates a worker may be ahead of the slowest (Ho et al. 2013, stale synchronous parallel).
    damp: whether an update is divided by one more than those that others made since the worker pulled (Zhang et
      al. 2016, arXiv:1511.05950).
    compression: a transform of gradients that needs no evidence, such as `round_to_nearest(bits=8, group_size=-1)` or
      `chain(magnitude(sparsity=0.99), freeze("bitmap"))`; what it loses is added to the worker's next gradient (error
      feedback, Stich et al. 2018, arXiv:1809.07599).
    patience: seconds after which a silent worker is not waited for.
    save_every: updates from one saved state of the server to the next.

  Raises:
    ValueError: an attribute is out of range.
  """

  workers: int = 4
  shards: int = 2
  staleness: int = 2
  damp: bool = False
  compression: Transform | None = None
  patience: float = 30.0
  save_every: int = 50

  def __post_init__(self) -> None:
    if min(self.workers, self.shards, self.save_every) < 1 or self.staleness < 0 or not self.patience > 0:
      raise ValueError(
        f"Asynchronous(workers={self.workers}, shards={self.shards}, staleness={self.staleness}, patience="
        f"{self.patience}, save_every={self.save_every}): from 1, staleness from 0, patience above 0"
      )


def fit_async(
  model: Any,
  params: Params,
  rows: np.ndarray,
  training: Training,
  how: Asynchronous | None = None,
  *,
  seed: int = 0,
  trainable: Callable[[str], bool] = lambda path: True,
  host: Host | None = None,
  folder: Path | None = None,
  delay: Callable[[str, int], float] = lambda worker, clock: 0.0,
  on_step: Callable[[int, Metrics], None] | None = None,
) -> tuple[Params, list[Metrics]]:
  """Trains by workers that pull arrays and push gradients at their own pace; each update has a batch of its own.

  A worker that dies is replaced, its batch goes to another; a server that dies is started from its last saved state.

  Args:
    rows: token ids `[n, length]`.
    how: `Asynchronous()` by default.
    trainable: of an array's path; what does not train is not sent.
    host: where all this runs, by default threads of this process.
    folder: of the server's states and `updates.jsonl`; a run that was cut off goes on from there: every batch that one
      of the saved states lacks is learned again, and applied there alone. By default a temporary one.
    delay: seconds that a worker waits before it pushes, for experiments; raises to let it die.
    on_step: told the updates made and the latest one's metrics.

  Returns:
    The tree, and of each update `loss`, `gap` (updates ahead of the slowest worker), `lag` (updates of others since the
    worker pulled), `sent` and `dense` (bytes of its gradient as sent, and uncompressed) and `seconds`.

  Raises:
    ValueError: a setting that asynchronous training does not have: a teacher, a transform, privacy, accumulation.
    WeightError: a loss or a gradient is not finite.
    FormatError: the folder is of another run.
    LmcompressError: workers die faster than they work.
  """
  with contextlib.ExitStack() as stack:
    if folder is None:  # a server that dies begins again from its state
      folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    return _served(model, params, rows, training, how or Asynchronous(), seed, trainable, host, folder, delay, on_step)


def _served(
  model: Any,
  params: Params,
  rows: np.ndarray,
  training: Training,
  how: Asynchronous,
  seed: int,
  trainable: Callable[[str], bool],
  host: Host | None,
  folder: Path,
  delay: Callable[[str, int], float],
  on_step: Callable[[int, Metrics], None] | None,
) -> tuple[Params, list[Metrics]]:
  """`fit_async` with a folder."""
  _plain(training)
  rows = checked_rows("rows", rows, params)
  source = batches(np.arange(len(rows))[:, None], training.batch, seed)
  state = start(params, training, trainable)
  trained, kept = {_path(where): x for where, x in jax.tree_util.tree_leaves_with_path(state.trained)}, state.kept
  optimizer = dataclasses.replace(training, clip=None).transformation()
  parts = parts_of(trained, how.shards)
  begun = [repr(model), tree_hash(params), hashlib.sha256(rows.tobytes()).hexdigest()]
  _own(folder, [repr(training), seed, how.shards, parts, *begun])
  host = host or Threads()
  served = [
    host.serve(Shard, {p: np.asarray(trained[p]) for p in part}, optimizer, folder, f"shard-{i}", how.save_every)
    for i, part in enumerate(parts)
  ]
  clock = host.serve(Clock, training.steps, how.staleness, how.patience, folder / "updates.jsonl")
  host.call(clock, "back_to", set.intersection(*(host.call(shard, "applied") for shard in served)))
  like = jax.eval_shape(lambda x: x, state.trained)
  job = _Job(model, like, kept, rows, source, training, how, parts, delay)
  running, born, deaths, shown = {}, 0, 0, 0
  try:
    while True:
      for name, one in list(running.items()):
        ended = host.ended(one)
        if ended is False:
          continue
        del running[name]
        if isinstance(ended, WeightError):
          raise ended
        if ended is not True:
          deaths += 1
          host.call(clock, "leave", name)
          if deaths > 3 * how.workers + training.steps // 10:
            raise LmcompressError(f"{deaths} workers died, the last of: {type(ended).__name__}: {str(ended)[:200]}")
      made, last = host.call(clock, "latest")
      if on_step is not None and made > shown:
        on_step(made, last)
      shown = made
      if shown >= training.steps:
        break
      while shown < training.steps and len(running) < how.workers:
        name = f"worker-{born}"
        host.call(clock, "join", name)
        running[name] = host.start(_work, job, name, clock, served)
        born += 1
      time.sleep(0.01)
    history = host.call(clock, "told")
    for shard in served:
      host.call(shard, "save")
    found = {p: jnp.asarray(x) for shard in served for p, x in host.call(shard, "pull")[1].items()}
  finally:
    with contextlib.suppress(Exception):  # what went wrong before is what counts
      host.call(clock, "end")
    host.close()
  whole = tree.combine(_into(state.trained, found), kept)
  return jax.tree.map(lambda x, old: x.astype(old.dtype), whole, params), history


def _own(folder: Path, decides: Any) -> None:
  """Marks a folder as that of a run.

  Raises:
    FormatError: it is of another.
  """
  folder.mkdir(parents=True, exist_ok=True)
  digest, mark = hashlib.sha256(json.dumps(decides).encode()).hexdigest(), folder / "run.json"
  if mark.is_file() and json.loads(mark.read_text("utf-8")).get("digest") != digest:
    raise FormatError(f"{folder}: holds another run, of other rows, settings or arrays; name another folder")
  write_text(mark, json.dumps({"digest": digest}) + "\n")


@dataclasses.dataclass(frozen=True)
class _Job:
  """What every worker knows."""

  model: Any
  like: Any
  kept: Params
  rows: np.ndarray
  source: Any
  training: Training
  how: Asynchronous
  parts: list[list[str]]
  delay: Callable[[str, int], float]


def _work(host: Host, job: _Job, worker: str, clock: Any, shards: list[Any]) -> None:
  """Updates until all are made."""
  codec = Codec(job.how.compression)
  while True:
    try:
      turn = host.call(clock, "turn", worker)
      if turn is None:
        time.sleep(0.005)
        continue
      if turn.number is None:
        return
      begun = time.perf_counter()
      pulled = [host.call(shard, "pull") for shard in shards]
      arrays = {p: jnp.asarray(x) for _, part in pulled for p, x in part.items()}
      some = jnp.asarray(job.rows[np.asarray(job.source[turn.number])[:, 0]])
      loss, gradients = _gradients(job.model, _into(job.like, arrays), job.kept, some, job.training)
      _require_finite(f"batch {turn.number}", float(loss), float(optax.global_norm(gradients)), job.training)
      sent = codec.encode({_path(where): g for where, g in jax.tree_util.tree_leaves_with_path(gradients)})
      wait = job.delay(worker, turn.clock)
      if wait:
        time.sleep(wait)
      gap = host.call(clock, "admit", worker)
      lags = []
      for part, shard, (version, _) in zip(job.parts, shards, pulled, strict=True):
        lag = max(0, host.call(shard, "made") - version)
        scale = 1.0 / (1 + lag) if job.how.damp else 1.0
        host.call(shard, "push", turn.number, {p: sent[p] for p in part}, scale)
        lags.append(lag)
      record = {
        "batch": turn.number, "loss": float(loss), "gap": gap, "lag": max(lags),
        "sent": sum(leaf_bytes(leaf) for leaf in sent.values()), "dense": sum(4 * leaf.size for leaf in sent.values()),
        "seconds": time.perf_counter() - begun,
      }  # fmt: skip
      host.call(clock, "advance", worker, record)
    except DroppedError:
      host.call(clock, "join", worker)


@functools.partial(jax.jit, static_argnames=("model", "training"))
def _gradients(model: Any, trained: Params, kept: Params, rows: jax.Array, training: Training) -> tuple[Any, Params]:
  """The mean loss of rows and its gradient, clipped as the training says: a server has no norm over all of it."""

  def lost(trained: Params) -> jax.Array:
    total, count = loss_of(model, kept, training, None, trained, {"tokens": rows})
    return total / jnp.maximum(count, 1)

  loss, gradients = jax.value_and_grad(lost)(trained)
  if training.clip is not None:
    shrink = jnp.minimum(1.0, training.clip / jnp.maximum(optax.global_norm(gradients), 1e-30))
    gradients = jax.tree.map(lambda g: g * shrink, gradients)
  return loss, gradients


def _require_finite(where: str, loss: float, norm: float, training: Training) -> None:
  if not (np.isfinite(loss) and np.isfinite(norm)):
    raise WeightError(
      f"{where}: the loss is {loss:.6g} and the gradients' norm {norm:.6g}; lower the learning rate "
      f"({training.learning_rate:g}) or clip ({training.clip})"
    )


class Codec:
  """Gradients in a compressed form; what it loses is kept for the next."""

  def __init__(self, transform: Transform | None):
    self._transform = transform
    self._lost: dict[str, jax.Array] = {}

  def encode(self, gradients: Mapping[str, jax.Array]) -> dict[str, Any]:
    """The gradients by path, those that the transform selects in its form; NumPy arrays inside."""
    links = () if self._transform is None else (self._transform.links or (self._transform,))
    whole = {p: g + self._lost.get(p, 0.0) for p, g in gradients.items()}
    sent: Any = tree.unflatten(whole)
    for link in links:
      sent = link.apply(sent, link.init(sent), Evidence())[0]
    found = tree.flatten(sent)
    self._lost = {
      p: whole[p] - x.materialize().astype(jnp.float32) for p, x in found.items() if isinstance(x, CompressedArray)
    }
    return jax.tree.map(np.asarray, found)


def _plain(training: Training) -> None:
  asked = {
    "loss": training.loss.needs_teacher, "match": training.match, "generated": training.generated,
    "privacy": training.privacy, "average": training.average, "accumulate": training.accumulate > 1,
  }  # fmt: skip
  if refused := [name for name, value in asked.items() if value]:
    raise ValueError(f"workers of their own pace learn labels by whole batches: leave out {', '.join(refused)}")


def _into(like: Params, found: Mapping[str, Any]) -> Params:
  """The tree of what trains with other arrays in it."""
  return jax.tree_util.tree_map_with_path(lambda where, _: found[_path(where)], like)


def _path(where: Any) -> str:
  return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in where)


# ---------------------------------------------------------------------------------------- copies that are averaged


@dataclasses.dataclass(frozen=True)
class Local:
  """Copies that train apart and are brought together (Stich 2018, arXiv:1805.09767; DiLoCo, arXiv:2311.08105).

  Attributes:
    workers: copies.
    inner: updates of each copy between two meetings.
    rate: of the outer step along the copies' mean change; 1 with no momentum takes their mean.
    momentum: Nesterov's, of the outer step.

  Raises:
    ValueError: an attribute is out of range.
  """

  workers: int = 4
  inner: int = 10
  rate: float = 1.0
  momentum: float = 0.0

  def __post_init__(self) -> None:
    if min(self.workers, self.inner) < 1 or not self.rate > 0 or not 0 <= self.momentum < 1:
      raise ValueError(
        f"Local(workers={self.workers}, inner={self.inner}, rate={self.rate}, momentum={self.momentum}): from 1, a "
        "rate above 0, momentum from 0 and below 1"
      )


def fit_local(
  model: Any,
  params: Params,
  rows: np.ndarray,
  training: Training,
  how: Local | None = None,
  *,
  seed: int = 0,
  trainable: Callable[[str], bool] = lambda path: True,
  on_step: Callable[[int, Metrics], None] | None = None,
) -> tuple[Params, list[Metrics]]:
  """Trains copies of a tree on rows of their own, and every so often takes them together.

  Each copy keeps its optimizer's state. A meeting sends each copy's arrays once; data parallel training sends its
  gradients at every update.

  Args:
    rows: token ids `[n, length]`; a step takes a batch for each copy.
    training: of a copy; `steps` are its updates.
    on_step: told the updates made and the latest metrics.

  Returns:
    The tree, and of each update `loss`, the mean over copies, and `sent`, bytes that a copy sent then.

  Raises:
    ValueError, WeightError: as of `fit_async`.
  """
  how = how or Local()
  _plain(training)
  rows = checked_rows("rows", rows, params)
  source = batches(np.arange(len(rows))[:, None], training.batch * how.workers, seed)
  first = start(params, training, trainable)
  copies = [start(params, training, trainable)._replace(kept=None) for _ in range(how.workers)]
  outer = optax.sgd(how.rate, how.momentum or None, nesterov=how.momentum > 0)
  centre, kept = first.trained, first.kept
  moments = outer.init(centre)  # type: ignore[arg-type]
  nbytes = sum(4 * x.size for x in jax.tree.leaves(centre))
  history: list[Metrics] = []
  for step in range(training.steps):
    chosen = np.asarray(source[step])[:, 0].reshape(how.workers, training.batch)
    losses = []
    for i, copy in enumerate(copies):
      batch = {"tokens": jnp.asarray(rows[chosen[i]])[None]}
      new, found = train_step(model, copy, kept, batch, training, None, None, None, jax.random.key(step))
      _require_finite(f"step {step} of copy {i}", float(found["loss"]), float(found["grad_norm"]), training)
      copies[i] = new._replace(kept=None)
      losses.append(float(found["loss"]))
    met = (step + 1) % how.inner == 0 or step + 1 == training.steps
    if met:
      mean = jax.tree.map(lambda *xs: sum(xs) / len(xs), *(copy.trained for copy in copies))
      change = jax.tree.map(jnp.subtract, centre, mean)
      updates, moments = outer.update(change, moments, centre)
      centre = optax.apply_updates(centre, updates)
      copies = [copy._replace(trained=jax.tree.map(jnp.copy, centre)) for copy in copies]
    history.append({"loss": float(np.mean(losses)), "sent": float(nbytes if met else 0)})
    if on_step is not None:
      on_step(step + 1, history[-1])
  whole = tree.combine(centre, kept)  # type: ignore[arg-type]
  return jax.tree.map(lambda x, old: x.astype(old.dtype), whole, params), history
