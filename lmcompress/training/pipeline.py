"""Layers over devices: each holds some blocks, and small batches go through them one after the other."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lmcompress import tree
from lmcompress.calibration.token_loss import head_loss, predictions, require_causal, through_blocks
from lmcompress.distributed.sharding import gathered, mesh_of, on_mesh, on_stage, split_on, stage_meshes
from lmcompress.evaluate.roofline import leaf_bytes
from lmcompress.training.durable import Metrics
from lmcompress.training.losses import Labels
from lmcompress.training.step import Training, TrainState, advance, floats_as, stored_guide, whole_tree
from lmcompress.types import Params


def split_stages(model: Any, params: Params, count: int) -> list[Params]:
  """A tree as consecutive stages of about as many bytes each.

  What comes before the blocks is in the first, what comes after in the last, and a table that is both in both.

  Raises:
    ValueError: fewer blocks than stages.
  """
  parts: list[dict[str, Any]] = [{} for _ in range(count)]
  for path, home in stages_of(model, params, count).items():
    parts[home][path] = tree.get(params, path)
    if is_tied(path, params):
      parts[-1][path] = parts[home][path]
  return [tree.unflatten(part) for part in parts]


def stages_of(model: Any, params: Params, count: int) -> dict[str, int]:
  """The stage of each leaf, by path; a table that is the head, too, has the first.

  Raises:
    ValueError: fewer blocks than stages.
  """
  blocks = [block.path for block in model.blocks(params)]
  if not 1 <= count <= len(blocks):
    raise ValueError(f"{count} stages of {len(blocks)} blocks: from 1 to as many as there are blocks")
  leaves = tree.flatten(params)
  sizes = [sum(leaf_bytes(leaf) for p, leaf in leaves.items() if p.startswith(f"{path}/")) for path in blocks]
  of_block = dict(zip(blocks, _even(sizes, count), strict=True))
  last = ("final_norm", "head")

  def home(path: str) -> int:
    block = next((block for block in blocks if path.startswith(f"{block}/")), None)
    return of_block[block] if block is not None else count - 1 if path.split("/")[0] in last else 0

  return {path: home(path) for path in leaves}


def is_tied(path: str, params: Params) -> bool:
  """Whether a leaf is of what comes before the blocks and after them, too."""
  return path.split("/")[0] == "embed" and "head" not in params


def merge_stages(parts: Sequence[Params]) -> Params:
  """The tree that `split_stages` took apart, bit for bit; of a leaf that is in two stages, the first one's."""
  leaves: dict[str, Any] = {}
  for part in parts:
    for path, leaf in tree.flatten(part).items():
      leaves.setdefault(path, leaf)
  return tree.unflatten(leaves)


def _even(sizes: Sequence[int], count: int) -> list[int]:
  """Which of so many parts each consecutive size goes to, none empty, by the middle of what it covers."""
  ends, total = np.cumsum(sizes), max(sum(sizes), 1)
  wanted = [int((end - size / 2) * count / total) for end, size in zip(ends, sizes, strict=True)]
  found = []
  for i, part in enumerate(wanted):
    least = max(found[-1] if found else 0, count - (len(sizes) - i))
    most = found[-1] + 1 if found else 0
    found.append(min(max(part, least), most, count - 1))
  return found


class Work(NamedTuple):
  """A stage's turn with a small batch, `forward` or `backward`."""

  stage: int
  batch: int
  way: Literal["forward", "backward"]


def one_forward_one_backward(stages: int, count: int) -> list[Work]:
  """The order in which stages take small batches (Narayanan et al. 2019, PipeDream's 1F1B, arXiv:1806.03377).

  Stage `i` holds the inputs of at most `stages - i` batches, however many there are.
  """
  queues = []
  for stage in range(stages):
    ahead = min(stages - stage, count)
    ways: list[tuple[int, Any]] = [(b, "forward") for b in range(ahead)]
    for b in range(count):
      ways.append((b, "backward"))
      if b + ahead < count:
        ways.append((b + ahead, "forward"))
    queues.append([Work(stage, b, way) for b, way in ways])
  done: set[Work] = set()
  order: list[Work] = []
  while any(queues):
    for stage in range(stages):
      if not queues[stage]:
        continue
      work = queues[stage][0]
      before = work._replace(stage=stage - 1 if work.way == "forward" else stage + 1)
      if not 0 <= before.stage < stages or before in done:
        order.append(queues[stage].pop(0))
        done.add(work)
  return order


_HOLE = {"is_leaf": lambda x: x is None}


class Pipeline:
  """The stages of a tree, each on a mesh of its own, and the update of a state through them.

  A state has the structure of any other's: what was saved goes on without a pipeline, and the other way. Its arrays lie
  with their stages; inputs of stages are kept, and what is inside is computed again on the way back.

  What does not train stays where it was, beside the stages' own; without a mesh all begins on one device, and so has to
  fit it.

  Args:
    params: as it lies; with a mesh, stages share the devices that split weights (`fsdp`) and are split as they are on
      it, else they have a device each.
    training: `accumulate` is how many small batches a batch makes.
    teacher: as of `train_step`; it is cut into as many stages.

  Raises:
    ValueError: fewer devices or blocks than stages, or a setting that pipelines do not have.
  """

  def __init__(
    self, model: Any, params: Params, training: Training, stages: int, teacher: tuple[Any, Params] | None = None
  ):
    require_causal(model, "a pipeline")
    refused = {name: getattr(training, name) for name in ("match", "generated", "privacy", "cache")}
    if asked := [name for name, value in refused.items() if value]:
      raise ValueError(f"a pipeline has rows and labels, or a teacher's predictions: leave out {', '.join(asked)}")
    self.model, self.training, self.meshes = model, training, stage_meshes(mesh_of(params), stages)
    _require_apart("the tree", params)
    homes = stages_of(model, params, stages)
    self._tied = stages > 1 and is_tied("embed/table", params)
    self._home = tree.map_leaves(lambda path, leaf: jax.tree.map(lambda _: homes[path], leaf), params)
    self._where = jax.tree.map(lambda x, home: split_on(self.meshes[home], x), params, self._home)
    self._last = jax.tree.map(functools.partial(split_on, self.meshes[-1]), params.get("embed"))
    self._teacher = None if teacher is None else self._placed(*teacher)
    self._kept: list[Params] = []
    # what a whole batch decides is done here: the norm of all gradients, and their sum over small batches
    self._plain = dataclasses.replace(
      training, clip=None if training.clip is None else math.inf, accumulate=1,
      batch=training.batch // training.accumulate,
    )  # fmt: skip

  def spread(self, state: TrainState) -> TrainState:
    """A state whose arrays lie with their stages; what stays is put there once, and stays in the state as it was."""
    self._kept = [self._part(self._at_home(state.kept), stage) for stage in range(len(self.meshes))]
    if self._tied:
      self._kept[-1] = self._with_table(self._kept[-1], state.kept)
    average = None if state.average is None else self._at_home(state.average)
    place = lambda x, where: x if where is None else jax.device_put(x, where)  # noqa: E731
    where = jax.tree.map(lambda x, to: None if x is None else to, state.trained, self._where, **_HOLE)
    moments = optax.tree_map_params(self.training.transformation(), place, state.moments, where)
    step = jnp.int32(int(state.step))  # on no mesh: each stage has its own
    return state._replace(step=step, trained=self._at_home(state.trained), average=average, moments=moments)

  def step(self, state: TrainState, pieces: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
    """An update, which gives up the state's buffers; `pieces` as the batch of `train_step`.

    Metrics are those of `fit` and `held`: inputs of the first stage that were held at once at most.
    """
    parts = self._stages(state.trained)
    small = [{name: x[i] for name, x in pieces.items()} for i in range(self.training.accumulate)]
    gradients, total, count, held = self._gradients(parts, small)
    if self._tied:
      theirs = jax.tree.map(lambda g, to: jax.device_put(g, to), gradients[-1].pop("embed"), self._where_of(parts[0]))
      with on_mesh(self.meshes[0]):
        gradients[0]["embed"] = jax.tree.map(jnp.add, gradients[0]["embed"], theirs)
      gradients[-1]["embed"] = jax.tree.map(lambda _: None, parts[-1]["embed"])
    tokens = max(count, 1)
    norm = self._norm(gradients) / tokens
    clip = self.training.clip
    scale = (1.0 if clip is None else min(1.0, clip / max(norm, 1e-30))) / tokens
    rate = float(self.training.rate(int(state.step)))
    following, moving = state.step + 1, [self._moving(stage, state) for stage in range(len(self.meshes))]
    done = [self._update(stage, moving[stage], gradients[stage], scale) for stage in range(len(self.meshes))]
    done.sort(key=lambda part: not jax.tree.leaves(part.trained))  # where nothing trains, no update is counted
    merged = _merged([part._asdict() for part in done])
    broken = -1 if np.isfinite(norm) else _broken(_merged([{"g": g} for g in gradients])["g"])
    new = TrainState(following, merged["trained"], merged["moments"], merged["average"], None, ())
    return new, {"loss": total / tokens, "grad_norm": norm, "learning_rate": rate, "broken": broken, "held": held}

  def score(self, state: TrainState, rows: np.ndarray) -> tuple[float, int]:
    """The summed cross entropy of rows and the tokens that it counts."""
    parts = self._stages(state.trained if state.average is None else state.average)
    carry: Any = None
    for stage, mesh in enumerate(self.meshes[:-1]):
      carry = self._ahead(stage, parts[stage], carry, on_stage(mesh, {"tokens": jnp.asarray(rows)}, len(rows)))
    said = dataclasses.replace(self._plain, loss=Labels())
    with on_mesh(self.meshes[-1]):
      batch = on_stage(self.meshes[-1], {"tokens": jnp.asarray(rows)}, len(rows))
      total, count = _scored(self.model, parts[-1], self._kept[-1], carry, batch, len(parts) == 1, said)
    return float(total), int(count)

  def _at_home(self, held: Params) -> Params:
    return jax.tree.map(lambda x, to: None if x is None else jax.device_put(x, to), held, self._where, **_HOLE)

  def _part(self, held: Params, stage: int) -> Params:
    """The arrays of a stage, None where others' are."""
    return jax.tree.map(lambda x, home: x if home == stage else None, held, self._home, **_HOLE)

  def _stages(self, held: Params) -> list[Params]:
    """The arrays of each stage, a tied table in the first and the last."""
    parts = [self._part(held, stage) for stage in range(len(self.meshes))]
    if self._tied:
      parts[-1] = self._with_table(parts[-1], held)
    return parts

  def _with_table(self, part: Params, held: Params) -> Params:
    put = lambda x, to: None if x is None else jax.device_put(x, to)  # noqa: E731
    return {**part, "embed": jax.tree.map(put, held["embed"], self._last, **_HOLE)}

  def _where_of(self, part: Params) -> Params:
    return jax.tree.map(lambda x, to: None if x is None else to, part["embed"], self._where["embed"], **_HOLE)

  def _placed(self, model: Any, params: Params) -> tuple[Any, list[Params]]:
    """A teacher's stages."""
    _require_apart("the teacher", params)
    params = params if self.training.compute == "float32" else floats_as(params, self.training.compute)
    try:
      parts = split_stages(model, params, len(self.meshes))
    except ValueError as error:
      raise ValueError(f"the teacher: {error}") from None
    put = lambda x, mesh: jax.device_put(x, split_on(mesh, jnp.asarray(x)))  # noqa: E731
    return model, [
      jax.tree.map(functools.partial(put, mesh=mesh), part) for part, mesh in zip(parts, self.meshes, strict=True)
    ]

  def _norm(self, gradients: Sequence[Params]) -> float:
    """Of all stages together; all are asked before one is waited for."""
    squares = []
    for mesh, some in zip(self.meshes, gradients, strict=True):
      with on_mesh(mesh):
        squares.append(_squares(some))
    return math.sqrt(sum(map(float, squares)))

  def _moving(self, stage: int, state: TrainState) -> TrainState:
    """A stage's arrays of a state, None where others' are; counts where they are needed."""
    homes = jax.tree.map(lambda x, home: None if x is None else home, state.trained, self._home, **_HOLE)
    count = NamedSharding(self.meshes[stage], PartitionSpec())
    moments = optax.tree_map_params(
      self.training.transformation(), lambda x, home: x if home == stage else None, state.moments, homes,
      transform_non_params=lambda x: jax.device_put(x, count),
    )  # fmt: skip
    average = None if state.average is None else self._part(state.average, stage)
    step = jax.device_put(state.step, count)
    return TrainState(step, self._part(state.trained, stage), moments, average, None, ())

  def _update(self, stage: int, moving: TrainState, gradients: Params, scale: float) -> TrainState:
    """An update of a stage's arrays, whose buffers are given up; as they were where none of them trains."""
    if not jax.tree.leaves(moving.trained):
      return moving
    with on_mesh(self.meshes[stage]):
      return _update(moving, gradients, scale, self._plain)

  def _ahead(self, stage: int, trained: Params, carry: Any, batch: Any) -> Any:
    """What a stage hands on, where the next one lies."""
    with on_mesh(self.meshes[stage]):
      made = _forward(self.model, trained, self._kept[stage], carry, batch, stage == 0, self._plain)
    return on_stage(self.meshes[stage + 1], made, batch["tokens"].shape[0])

  def _taught(self, stage: int, carry: Any, batch: Any) -> Any:
    """What the teacher's stage hands on, where the next one lies; None without a teacher."""
    if self._teacher is None:
      return None
    model, parts = self._teacher
    with on_mesh(self.meshes[stage]):
      made = _through(model, parts[stage], carry, stage == 0, batch)
    return on_stage(self.meshes[stage + 1], made, batch["tokens"].shape[0])

  def _gradients(self, trained: list[Params], small: Sequence[Any]) -> tuple[list[Any], float, int, int]:
    """Sums over the small batches: gradients by stage, the loss, the tokens; and what the first stage held at most."""
    stages = len(self.meshes)
    inputs: dict[tuple[int, int], Any] = {}
    given: dict[tuple[int, int], Any] = {}
    sums: list[Any] = [None] * stages
    losses, held = [], 0
    for stage, b, way in one_forward_one_backward(stages, len(small)):
      first, last, mesh = stage == 0, stage + 1 == stages, self.meshes[stage]
      rows = small[b]["tokens"].shape[0]
      batch = on_stage(mesh, small[b], rows)
      if way == "forward":
        if first:
          inputs[0, b] = None, None
        if not last:
          carry, theirs = inputs[stage, b]
          after = self._ahead(stage, trained[stage], carry, batch)
          inputs[stage + 1, b] = after, self._taught(stage, theirs, batch)
          inputs[stage, b] = carry, None
        held = max(held, sum(1 for s, _ in inputs if s == 0))
        continue
      carry, theirs = inputs.pop((stage, b))
      model, parts = (None, None) if self._teacher is None or not last else self._teacher
      with on_mesh(mesh):
        gradients, before, told = _back(
          self.model, trained[stage], self._kept[stage], carry, given.pop((stage, b), None), batch, first, last,
          self._plain, model, None if parts is None else parts[-1], theirs,
        )  # fmt: skip
      if told is not None:
        losses.append(told)
      if not first:
        given[stage - 1, b] = on_stage(self.meshes[stage - 1], before, rows)
      with on_mesh(mesh):
        sums[stage] = gradients if sums[stage] is None else jax.tree.map(jnp.add, sums[stage], gradients)
    return sums, sum(float(t) for t, _ in losses), sum(int(c) for _, c in losses), held


def _require_apart(what: str, params: Params) -> None:
  """Raises ValueError for values that several stages would refer to."""
  if "shared" in params:
    raise ValueError(f"a pipeline: {what} has values that the whole model shares, which stages cannot; use fsdp")


def _merged(parts: Sequence[Any]) -> Any:
  """Trees with None where others have a value, as one; of what all have, the first one's."""
  first = lambda *xs: next((x for x in xs if x is not None), None)  # noqa: E731
  return jax.tree.map(first, *parts, **_HOLE)


def _broken(gradients: Params) -> int:
  """The first array that is not finite, in the order of leaves; -1 if the sum of squares alone is not."""
  found = [not np.all(np.isfinite(np.asarray(g))) for g in jax.tree.leaves(gradients)]
  return found.index(True) if True in found else -1


@jax.jit
def _squares(gradients: Params) -> jax.Array:
  return sum((jnp.sum(g * g) for g in jax.tree.leaves(gradients)), jnp.zeros(()))


@functools.partial(jax.jit, static_argnames="training", donate_argnums=0)
def _update(moving: TrainState, gradients: Params, scale: Any, training: Training) -> TrainState:
  return advance(moving, {}, jax.tree.map(lambda g: g * scale, gradients), jnp.zeros(()), training, None, None)[0]


def _floats(carry: Any) -> tuple[list[jax.Array], Any]:
  """What gradients go through, and all of it again from that."""
  leaves, treedef = jax.tree.flatten(carry)
  real = [jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves]

  def back(floats: Sequence[jax.Array]) -> Any:
    given = iter(floats)
    return treedef.unflatten([next(given) if is_real else x for x, is_real in zip(leaves, real, strict=True)])

  return [x for x, is_real in zip(leaves, real, strict=True) if is_real], back


def _run(model: Any, params: Params, carry: Any, batch: Any, first: bool, remat: bool) -> Any:
  """The blocks of a stage, after the start of the model where it is the first."""
  carry = model.start(gathered(model, params), batch) if first else carry
  return through_blocks(model, params, carry, remat)[0]


@functools.partial(jax.jit, static_argnames=("model", "first"))
def _through(model: Any, params: Params, carry: Any, first: bool, batch: Any) -> Any:
  return _run(model, params, carry, batch, first, remat=False)


@functools.partial(jax.jit, static_argnames=("model", "first", "training"))
def _forward(model: Any, trained: Params, kept: Params, carry: Any, batch: Any, first: bool, training: Training) -> Any:
  return _run(model, _present(whole_tree(trained, kept, training)), carry, batch, first, remat=False)


@functools.partial(jax.jit, static_argnames=("model", "first", "training"))
def _scored(model: Any, trained: Params, kept: Params, carry: Any, batch: Any, first: bool, training: Training) -> Any:
  whole = _present(whole_tree(trained, kept, training))
  after = _run(model, whole, carry, batch, first, remat=False)
  return head_loss(model, whole, after, batch, training.loss, None, training.chunk)


@functools.partial(jax.jit, static_argnames=("model", "first", "last", "training", "teacher_model"))
def _back(
  model: Any, trained: Params, kept: Params, carry: Any, given: Any, batch: Any, first: bool, last: bool,
  training: Training, teacher_model: Any, teacher: Params | None, theirs: Any,
) -> Any:  # fmt: skip
  """Gradients of a stage's arrays and of the floats of its input, and of the last stage the loss."""
  floats, back = ([], lambda floats: None) if first else _floats(carry)
  guide = None
  if last and "teacher_ids" in batch:
    guide = stored_guide(batch)
  elif last and teacher is not None:
    guide = predictions(teacher_model, teacher, _run(teacher_model, teacher, theirs, batch, first, remat=False))

  def run(trained: Params, floats: Sequence[jax.Array]) -> Any:
    whole = _present(whole_tree(trained, kept, training))
    after = _run(model, whole, back(floats), batch, first, training.remat)
    if last:
      return head_loss(model, whole, after, batch, training.loss, guide, training.chunk)
    return _floats(after)[0], None

  made, pull, aux = jax.vjp(run, trained, floats, has_aux=True)
  gradients, before = pull(jnp.ones_like(made) if last else given)
  return gradients, before, (made, aux) if last else None


def _present(params: Params) -> Params:
  """The leaves of a tree that have their arrays."""
  return tree.unflatten({path: leaf for path, leaf in tree.flatten(params).items() if jax.tree.leaves(leaf)})
