"""Many tasks on one trunk: a head each, weights between them that are fixed or learned, and gradients that agree."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.calibration.token_loss import forward
from lmcompress.distributed.sharding import beside, data_mesh, over_data
from lmcompress.training.durable import Keeping, Metrics, run_steps
from lmcompress.training.heads import HEADS, Kind, Task, checked_task, loss, said
from lmcompress.training.loop import batches, vocabulary_of
from lmcompress.training.step import Training, TrainState, advance, result, start, whole_tree
from lmcompress.types import Params, Transform

_VARIANCE = "log_variance"


@dataclasses.dataclass(frozen=True)
class Weighting:
  """How losses of several tasks become one update of what they share.

  Attributes:
    kind: `fixed` takes the mean over all rows of a batch; `uncertainty` weighs a task's mean loss by exp(-s) and adds
      s / 2, with s trained (Kendall et al. 2018, arXiv:1705.07115); `gradnorm` moves the weights until the gradients of
      all tasks are as large as how slowly each learns asks (Chen et al. 2018, arXiv:1711.02257; over all that is
      shared, where the paper takes its last layer).
    alpha: of `gradnorm`: 0 makes gradients alike, more favours tasks that lag.
    rate: of `gradnorm`: learning rate of the weights.
    surgery: of two tasks' gradients that point against each other, each loses that part (PCGrad, arXiv:2001.06782).
    temperature: a batch has rows of a task by its size to the power 1 / temperature; 1 is by size, more evens out.

  Raises:
    ValueError: an attribute is out of range.
  """

  kind: Literal["fixed", "uncertainty", "gradnorm"] = "fixed"
  alpha: float = 1.5
  rate: float = 0.025
  surgery: bool = False
  temperature: float = 1.0

  def __post_init__(self) -> None:
    known = self.kind in ("fixed", "uncertainty", "gradnorm")
    if not known or not self.alpha >= 0 or not self.rate > 0 or not self.temperature > 0:
      raise ValueError(
        f"Weighting(kind={self.kind!r}, alpha={self.alpha}, rate={self.rate}, temperature={self.temperature}): fixed, "
        "uncertainty or gradnorm; from 0; above 0; above 0"
      )


def shares(sizes: Mapping[str, int], batch: int, temperature: float) -> dict[str, int]:
  """Rows of a batch for each task, one at least; they add up to about `batch`.

  >>> shares({"a": 900, "b": 100}, 10, 1.0), shares({"a": 900, "b": 100}, 10, 1e9)
  ({'a': 9, 'b': 1}, {'a': 5, 'b': 5})
  """
  largest = max(sizes.values())
  raised = {name: (n / largest) ** (1 / temperature) for name, n in sizes.items()}
  return {name: max(1, round(batch * x / sum(raised.values()))) for name, x in raised.items()}


def with_heads(model: Any, params: Params, tasks: Mapping[str, Task], key: jax.Array) -> Params:
  """The tree with a head, near 0, for each task that needs one and has none yet.

  Raises:
    ValueError: the tree has a head of that name for another number of classes.
  """
  heads = dict(params.get(HEADS, {}))
  needing = {name: task for name, task in sorted(tasks.items()) if task.has_head}
  if not needing:
    return params
  length = next(iter(needing.values())).tokens.shape[1]
  width = jax.eval_shape(functools.partial(_features, model), params, jnp.zeros((1, length), jnp.int32)).shape[-1]
  for i, (name, task) in enumerate(needing.items()):
    if name in heads:
      _fits(name, heads, task)
    else:
      kernel = jax.random.normal(jax.random.fold_in(key, i), (width, len(task.classes))) * 0.02
      heads[name] = {"kernel": kernel, "bias": jnp.zeros(len(task.classes))}
  return {**params, HEADS: heads}


def fit_tasks(
  model: Any,
  params: Params,
  tasks: Mapping[str, Task],
  training: Training,
  weighting: Weighting | None = None,
  *,
  seed: int = 0,
  trainable: Callable[[str], bool] = lambda path: True,
  teacher: tuple[Any, Params] | None = None,
  transform: Transform | None = None,
  folder: Path | None = None,
  decides: Any = None,
  save_every: int = 50,
  held_out: Mapping[str, Task] | None = None,
  evaluate_every: int = 50,
  on_step: Callable[[int, Metrics], None] | None = None,
) -> tuple[Params, list[Metrics]]:
  """Trains one trunk and a head for each task; arguments as of `fit`.

  Heads read states as `heads.said` says; a task of texts has none, and trains the whole encoder-decoder. A task that
  other trees have trained before keeps its head.

  Args:
    tasks: by name; each with at least one row.
    trainable: of the trunk; heads always train.
    teacher: for a loss that needs one: a model that reads the same tokens, and parameters with a head for each task.
    held_out: scored on the way: `accuracy/<task>` of classes, else `held_out/<task>`, the loss.

  Returns:
    The tree with heads under `tasks`, and the metrics of every step, `loss/<task>` and `weight/<task>` among them.

  Raises:
    ValueError: no task, rows or labels that do not fit, a setting that is of rows of text alone, or no teacher for a
      loss that needs one.
    WeightError, FormatError: as of `fit`.
  """
  weighting = weighting or Weighting()
  refused = [what for what in ("privacy", "match", "generated", "cache") if getattr(training, what) is not None]
  if refused:
    raise ValueError(f"fit_tasks learns tasks: no {', no '.join(refused)}")
  if training.accumulate > 1:
    raise ValueError(f"fit_tasks(accumulate={training.accumulate}): a batch has rows of all tasks at once; use 1")
  checked = {name: checked_task(name, task, model, params) for name, task in sorted(tasks.items())}
  if not checked:
    raise ValueError("fit_tasks: no task")
  teacher = _checked_teacher(model, checked, params, teacher) if training.loss.needs_teacher else None
  counts = shares({name: len(task.labels) for name, task in checked.items()}, training.batch, weighting.temperature)
  for name, task in checked.items():
    if len(task.labels) < counts[name]:
      raise ValueError(f"task {name}: {len(task.labels)} rows, and a batch takes {counts[name]}; take fewer at a time")
  sources = {
    name: batches(np.arange(len(task.labels))[:, None], counts[name], seed + i)
    for i, (name, task) in enumerate(checked.items())
  }
  whole = with_heads(model, params, checked, jax.random.key(seed))
  heads = whole.get(HEADS, {})
  if weighting.kind == "uncertainty":
    if texts := [name for name, task in checked.items() if not task.has_head]:
      raise ValueError(f"Weighting(kind='uncertainty') is learned beside heads, and {texts[0]} has none; use another")
    heads = {name: {**head, _VARIANCE: jnp.zeros(())} if name in checked else head for name, head in heads.items()}
    whole = {**whole, HEADS: heads}
  trains = lambda path: tree.matches(HEADS, path) or trainable(path)  # noqa: E731
  state = start(whole, training, trains, transform)
  ones = jnp.ones(len(checked))
  weights = beside(whole, {"weights": ones, "first": jnp.copy(ones)})
  state = state._replace(links={"transform": state.links, **weights})

  def update(state: TrainState) -> tuple[TrainState, Metrics]:
    begun, step = time.perf_counter(), int(state.step)
    rows = {}
    for name, task in checked.items():
      chosen = np.asarray(sources[name][step])[:, 0]
      rows[name] = over_data(data_mesh(state.trained), task.batch(chosen), counts[name])
    key, moving = jax.random.fold_in(jax.random.key(seed), step), state._replace(kept=None)
    who, guide = teacher or (None, None)
    new, found = tasks_step(model, moving, state.kept, rows, training, weighting, transform, key, who, guide)
    metrics = {name: float(value) for name, value in found.items()}
    kept = state.kept if new.kept is None else new.kept
    return new._replace(kept=kept), {**metrics, "seconds": time.perf_counter() - begun}

  def score(state: TrainState) -> Metrics:
    now = tree.combine(state.trained if state.average is None else state.average, state.kept)
    found = {}
    for name, task in sorted((held_out or {}).items()):
      if task.kind == "labels":
        found[f"accuracy/{name}"] = float(np.mean(probabilities(model, now, name, task).argmax(1) == task.labels))
      else:
        found[f"held_out/{name}"] = held_out_loss(model, now, name, task, counts[name])
    return found

  shown = {
    name: [list(t.tokens.shape), t.kind, t.classes, _digest(t.tokens, t.labels, t.second)]
    for name, t in checked.items()
  }
  about = [decides, seed, repr(training), repr(weighting), shown]
  keeping = Keeping(folder, about, save_every, evaluate_every)
  changes = transform is not None
  state, history = run_steps(state, update, training, keeping, changes, score if held_out else None, on_step)
  done = result(state, whole)
  if HEADS not in done:
    return done, history
  bare = {name: {k: x for k, x in head.items() if k != _VARIANCE} for name, head in done[HEADS].items()}
  return {**done, HEADS: bare}, history


@functools.partial(
  jax.jit, static_argnames=("model", "training", "weighting", "transform", "teacher_model"), donate_argnums=(1,)
)
def tasks_step(
  model: Any,
  moving: TrainState,
  kept: Params,
  rows: Mapping[str, Mapping[str, jax.Array]],
  training: Training,
  weighting: Weighting,
  transform: Transform | None,
  key: jax.Array,
  teacher_model: Any = None,
  teacher: Params | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update from a batch of every task, as of `train_step`; each task's gradient is made by itself."""
  names = sorted(rows)
  guide = None if teacher is None else (teacher_model, teacher)

  def lost(trained: Params, name: str) -> jax.Array:
    whole = whole_tree(trained, kept, training)
    return loss(model, whole, name, rows[name], training.remat, training.chunk, training.loss, guide)

  losses, grads = zip(*(jax.value_and_grad(lost)(moving.trained, name) for name in names), strict=True)
  losses, state = jnp.stack(losses), moving.links
  gram = jnp.stack([jnp.stack([_product(a, b) for b in grads]) for a in grads])
  first = jnp.where(moving.step == 0, losses, state["first"])
  weights = state["weights"]
  if weighting.kind == "fixed":
    sizes = jnp.asarray([rows[name]["tokens"].shape[0] for name in names], jnp.float32)
    used = sizes / jnp.sum(sizes)
  elif weighting.kind == "uncertainty":
    spread = jnp.stack([moving.trained[HEADS][name][_VARIANCE] for name in names])
    used = jnp.exp(-spread)
  else:
    weights = balanced(weights, losses / first, jnp.sqrt(jnp.diag(gram)), weighting.alpha, weighting.rate)
    used = weights
  mix = agreed(gram, used, key) if weighting.surgery else used
  total = jax.tree.map(lambda *g: sum(m * x for m, x in zip(mix, g, strict=True)), *grads)
  for i, name in enumerate(names):  # a head has one task, whose gradient is left alone
    if name not in grads[i].get(HEADS, {}):
      continue
    own = jax.tree.map(lambda x, i=i: used[i] * x, grads[i][HEADS][name])
    if weighting.kind == "uncertainty":
      own = {**own, _VARIANCE: 0.5 - used[i] * losses[i]}
    total = {**total, HEADS: {**total[HEADS], name: own}}
  inner = moving._replace(links=state["transform"])
  new, metrics = advance(inner, kept, total, jnp.dot(used, losses), training, transform, key)
  metrics |= {f"loss/{name}": losses[i] for i, name in enumerate(names)}
  metrics |= {f"weight/{name}": used[i] for i, name in enumerate(names)}
  return new._replace(links={"transform": new.links, "weights": weights, "first": first}), metrics


def balanced(weights: jax.Array, ratios: jax.Array, norms: jax.Array, alpha: float, rate: float) -> jax.Array:
  """GradNorm's weights after one step; they add up to their number.

  Args:
    ratios: each task's loss over its first.
    norms: of each task's gradient of what is shared, unweighted.
  """
  size = weights * norms
  aim = jnp.mean(size) * (ratios / jnp.mean(ratios)) ** alpha
  moved = jnp.maximum(weights - rate * jnp.sign(size - aim) * norms / jnp.maximum(jnp.mean(norms), 1e-30), 1e-3)
  return moved * len(weights) / jnp.sum(moved)


def agreed(gram: jax.Array, weights: jax.Array, key: jax.Array) -> jax.Array:
  """By how much each task's gradient enters PCGrad's sum.

  A projected gradient is a combination of the tasks' own, so products between those are all that is needed.

  Args:
    gram: `[tasks, tasks]`, products of the gradients.
    weights: of the tasks.
    key: of the order in which a task meets the others.
  """
  count = gram.shape[0]
  scaled = gram * weights[:, None] * weights[None, :]
  mix = jnp.zeros(count)
  for i in range(count):
    own = jnp.zeros(count).at[i].set(1.0)
    for j in jax.random.permutation(jax.random.fold_in(key, i), count):
      against = jnp.dot(own, scaled[:, j])
      remove = (j != i) & (against < 0)
      own = own.at[j].add(jnp.where(remove, -against / jnp.maximum(scaled[j, j], 1e-30), 0.0))
    mix += own
  return mix * weights


def probabilities(model: Any, params: Params, name: str, task: Task, batch: int = 16) -> np.ndarray:
  """A task's predictions, float32, a batch at a time.

  Returns:
    `[n, classes]`, of `tags` `[n, length, classes]`, of `spans` `[n, 2, length]`: where it begins and where it ends.

  Raises:
    ValueError: the tree has no head of that name, or one for another number of classes.
  """
  if name not in params.get(HEADS, {}):
    raise ValueError(f"no head for task {name}; the tree has {', '.join(sorted(params.get(HEADS, {}))) or 'none'}")
  _fits(name, params[HEADS], task)
  found = []
  for i in range(0, len(task.labels), batch):
    chosen = np.arange(i, min(i + batch, len(task.labels)))
    rows = task.batch(np.resize(chosen, batch))  # one shape: the last batch is filled with its own rows again
    seen = {key: x for key, x in rows.items() if key != task.kind}
    found.append(np.asarray(_said(model, params, name, seen, task.kind))[: len(chosen)])
  return np.concatenate(found)


def held_out_loss(model: Any, params: Params, name: str, task: Task, batch: int = 16) -> float:
  """The mean loss of a task's rows, nats, a batch at a time, each row as much as it has labels."""
  total, counted = 0.0, 0
  for i in range(0, len(task.labels), batch):
    rows = task.batch(np.arange(i, min(i + batch, len(task.labels))))
    some = int((rows[task.kind] >= 0).sum()) if task.kind in ("tags", "texts") else len(rows[task.kind])
    total, counted = total + some * float(_lost(model, params, name, rows)), counted + some
  return total / max(counted, 1)


@functools.partial(jax.jit, static_argnames=("model", "name", "kind"))
def _said(model: Any, params: Params, name: str, rows: Mapping[str, jax.Array], kind: Kind) -> jax.Array:
  return jax.nn.softmax(said(model, params, name, rows, kind), axis=-1)


@functools.partial(jax.jit, static_argnames=("model", "name"))
def _lost(model: Any, params: Params, name: str, rows: Mapping[str, jax.Array]) -> jax.Array:
  return loss(model, params, name, rows, remat=False)


def _fits(name: str, heads: Params, task: Task) -> None:
  found = heads[name]["kernel"].shape[-1]
  if found != len(task.classes):
    raise ValueError(f"task {name}: its head tells {found} classes apart, the data has {len(task.classes)}; rename one")


def _digest(*arrays: np.ndarray | None) -> str:
  some = [np.ascontiguousarray(x).tobytes() for x in arrays if x is not None]
  return hashlib.sha256(b"".join(some)).hexdigest()[:16]


def _checked_teacher(
  model: Any, tasks: Mapping[str, Task], params: Params, teacher: tuple[Any, Params] | None
) -> tuple[Any, Params]:
  if teacher is None:
    raise ValueError("a distillation needs a teacher: fit_tasks(..., teacher=(model, params))")
  ours, theirs = vocabulary_of(params), vocabulary_of(teacher[1])
  if ours != theirs:
    raise ValueError(f"the teacher's vocabulary has {theirs} entries, the student's {ours}; they must be the same")
  for name, task in tasks.items():
    if task.has_head and name not in teacher[1].get(HEADS, {}):
      raise ValueError(f"the teacher has no head for task {name}; train it on that first")
    if task.has_head:
      _fits(name, teacher[1][HEADS], task)
    elif not hasattr(teacher[0], "encode"):
      raise ValueError(f"the teacher of task {name} has no decoder beside an encoder to write texts with")
    elif teacher[0].config.start != model.config.start:
      starts = f"{teacher[0].config.start}, the student's with {model.config.start}"
      raise ValueError(f"the teacher's decoder begins with token {starts}; they must be the same")
  return teacher


def _features(model: Any, params: Params, row: jax.Array) -> jax.Array:
  return model.features(params, forward(model, params, {"tokens": row}, remat=False)[0])


def _product(a: Params, b: Params) -> jax.Array:
  """Of two gradients of the trunk, which the tasks share."""
  pairs = zip(*(jax.tree.leaves({k: x for k, x in g.items() if k != HEADS}) for g in (a, b)), strict=True)
  return sum((jnp.vdot(x, y) for x, y in pairs), jnp.zeros(()))
