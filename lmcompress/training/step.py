"""The training step: a pure function of what trains, what stays and a batch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from lmcompress import tree
from lmcompress.arrays import FakeQuantArray, GatedArray, MaskedArray, ScoredArray
from lmcompress.arrays.gated import pressed, undrawn, with_gates_of
from lmcompress.calibration.token_loss import forward, head_loss, predictions
from lmcompress.distributed.sharding import beside, mesh_of, on_mesh_of, rows_split
from lmcompress.generation.cache import init_cache
from lmcompress.training.generated import Generated
from lmcompress.training.losses import Labels, Likeliest, Loss
from lmcompress.training.match import PROJECTIONS, Match
from lmcompress.types import CompressedArray, Evidence, Params, Transform

Schedule = Literal["constant", "linear", "cosine"]


@dataclasses.dataclass(frozen=True)
class Privacy:
  """Differentially private training (Abadi et al. 2016, arXiv:1607.00133), an example being a row of tokens.

  Attributes:
    noise: deviation of the noise on the summed gradients, in units of `clip`.
    clip: largest norm that the gradient of one row has; larger ones are scaled down.
    delta: for which epsilon is stated; less than one over the number of rows.

  Raises:
    ValueError: an attribute is out of range.
  """

  noise: float
  clip: float = 1.0
  delta: float = 1e-5

  def __post_init__(self) -> None:
    if not 0 < self.noise < float("inf") or not 0 < self.clip < float("inf") or not 0 < self.delta < 1:
      raise ValueError(
        f"Privacy(noise={self.noise}, clip={self.clip}, delta={self.delta}): noise, clip above 0, delta between 0 and 1"
      )


@dataclasses.dataclass(frozen=True)
class Training:
  """How a tree is trained.

  Attributes:
    steps: updates.
    batch: rows of an update.
    accumulate: pieces that a batch is cut into, one after the other; their gradients add up to the batch's.
    learning_rate: the highest; reached after `warmup` steps and then kept, or brought to 0 at the last step along a
      line or a cosine.
    warmup: steps of a linear rise.
    schedule: of the learning rate.
    optimizer: `adamw` or `sgd` (with momentum 0.9).
    weight_decay: of matrices, decoupled (arXiv:1711.05101).
    clip: largest norm of all gradients together; None leaves them.
    average: decay of an exponential moving average of what trains, which is then the result; None keeps the last.
    loss: `Labels()` or `Distill(...)`.
    match: bring what blocks see towards what the teacher's see, too.
    generated: let a model write some of the rows.
    compute: dtype of products; what trains is float32 all the while.
    chunk: positions whose logits are in memory at a time.
    remat: recompute each block on the way back.
    cache: tokens see keys and values as a cache of that dtype will hold them when text is generated, rounded straight
      through, so that weights learn to live with it; of a decoder.
    privacy: clip each row's gradient and add noise (DP-SGD); rows are then drawn one by one, `batch` in the mean.

  Raises:
    ValueError: an attribute is out of range.
  """

  steps: int
  batch: int = 4
  accumulate: int = 1
  learning_rate: float = 1e-4
  warmup: int = 0
  schedule: Schedule = "cosine"
  optimizer: Literal["adamw", "sgd"] = "adamw"
  weight_decay: float = 0.0
  clip: float | None = 1.0
  average: float | None = None
  loss: Loss = dataclasses.field(default_factory=Labels)
  match: Match | None = None
  generated: Generated | None = None
  compute: Literal["float32", "bfloat16"] = "float32"
  chunk: int = 64
  remat: bool = True
  privacy: Privacy | None = None
  cache: Literal["bfloat16", "int8", "int4"] | None = None

  def __post_init__(self) -> None:
    if min(self.steps, self.batch, self.accumulate, self.chunk) < 1 or self.batch % self.accumulate:
      raise ValueError(
        f"Training(steps={self.steps}, batch={self.batch}, accumulate={self.accumulate}, chunk={self.chunk}): "
        "each from 1, and accumulate divides batch"
      )
    if not 0 < self.learning_rate < float("inf") or not 0 <= self.warmup < self.steps or self.weight_decay < 0:
      raise ValueError(
        f"Training(learning_rate={self.learning_rate}, warmup={self.warmup}, weight_decay={self.weight_decay}): a rate "
        f"above 0, a warmup below the {self.steps} steps, no negative decay"
      )
    if self.cache not in (None, "bfloat16", "int8", "int4"):
      raise ValueError(f"Training(cache={self.cache!r}): bfloat16, int8, int4 or None")
    if self.privacy is not None and self.accumulate > 1:
      raise ValueError("Training(privacy=..., accumulate=...): rows are taken one by one; leave accumulate at 1")
    if self.privacy is not None and self.generated is not None:
      raise ValueError("Training(privacy=..., generated=...): private rows are the text's own; leave one out")
    if (self.clip is not None and not self.clip > 0) or (self.average is not None and not 0 < self.average < 1):
      raise ValueError(f"Training(clip={self.clip}, average={self.average}): above 0; between 0 and 1")

  @property
  def needs_teacher(self) -> bool:
    """Whether another model takes part."""
    writes = self.generated is not None and self.generated.by == "teacher"
    return self.loss.needs_teacher or self.match is not None or writes

  def rate(self, step: Any) -> Any:
    """The learning rate of the update after `step` others."""
    rest = self.steps - self.warmup
    fall = {
      "constant": optax.constant_schedule(self.learning_rate),
      "linear": optax.linear_schedule(self.learning_rate, 0.0, rest),
      "cosine": optax.cosine_decay_schedule(self.learning_rate, rest),
    }[self.schedule]
    rise = optax.linear_schedule(self.learning_rate / max(self.warmup, 1), self.learning_rate, max(self.warmup - 1, 1))
    return optax.join_schedules([rise, fall], [self.warmup])(step) if self.warmup else fall(step)

  def transformation(self) -> optax.GradientTransformation:
    """The optimizer."""
    first = [] if self.clip is None else [optax.clip_by_global_norm(self.clip)]
    inner = optax.scale_by_adam() if self.optimizer == "adamw" else optax.trace(0.9)

    def matrices(params: Params) -> Any:
      gate = lambda path: getattr(path[-1], "name", "") == "openness"  # noqa: E731
      return jax.tree_util.tree_map_with_path(lambda path, x: x.ndim > 1 and not gate(path), params)

    decay = [optax.add_decayed_weights(self.weight_decay, matrices)] if self.weight_decay else []
    return optax.chain(*first, inner, *decay, optax.scale_by_learning_rate(self.rate))


class TrainState(NamedTuple):
  """What an update changes.

  Attributes:
    step: updates done, int32.
    trained: float32 arrays, None where the tree has what stays.
    moments: the optimizer's.
    average: the moving average of `trained`, or None.
    kept: what does not train, which a transform of phase `step` may change (masks).
    links: that transform's state.
  """

  step: jax.Array
  trained: Any
  moments: Any
  average: Any
  kept: Any
  links: Any


def start(
  params: Params, training: Training, trainable: Callable[[str], bool], transform: Transform | None = None
) -> TrainState:
  """The state before the first update; holds copies of what trains.

  Args:
    trainable: as of `tree.partition`.
    transform: of phase `step`, applied after each update.

  Raises:
    ValueError: nothing trains, or the transform is of another phase, or closes gates none of which trains.
  """
  if transform is not None and transform.phase != "step":
    raise ValueError(f"training applies transforms of phase 'step'; {transform.name} is of phase {transform.phase!r}")
  if training.privacy is not None and _reads_gradients(transform):
    raise ValueError(f"private training clips gradients, and {transform.name} reads them; leave one of the two out")  # type: ignore[union-attr]
  trained, kept = tree.partition(params, trainable)
  gates = [x for x in tree.weights(trained).values() if isinstance(x, GatedArray)]
  if gates and all(x.openness is None for x in gates) and any(t.name.startswith("l0") for t in _links(transform)):
    raise ValueError("l0 closes gates that train, and none does; select them too, with the pattern **/openness")
  trained = beside(params, jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trained))
  if not jax.tree.leaves(trained):
    raise ValueError("nothing trains: no float array of the tree is selected")
  average = None if training.average is None else jax.tree.map(jnp.copy, trained)
  links = () if transform is None else transform.init(params)
  optimizer = training.transformation()
  moments = optax.tree.map_params(optimizer, placed_like, optimizer.init(trained), trained)
  step, moments, links = beside(params, (jnp.int32(0), moments, links))
  return TrainState(step, trained, moments, average, kept, links)


def placed_like(new: jax.Array, x: jax.Array) -> jax.Array:
  """An array where another lies, if that lies on a mesh; what is on one device may go anywhere."""
  sharding = getattr(x, "sharding", None)
  return jax.device_put(new, sharding) if isinstance(sharding, NamedSharding) else new


def result(state: TrainState, like: Params) -> Params:
  """The tree after training, each array in the dtype that it has in `like`."""
  whole = tree.combine(state.trained if state.average is None else state.average, state.kept)
  return jax.tree.map(lambda x, old: x.astype(old.dtype), whole, like)


def whole_tree(trained: Params, kept: Params, training: Training) -> Params:
  """What trains and what stays as one tree, in the dtype of products.

  What is rounded or compared on the way stays float32, so that training sees the codes and masks that come of it.
  """
  fine = (FakeQuantArray, ScoredArray)
  narrow = lambda x: x if isinstance(x, fine) else x.astype(training.compute)  # noqa: E731
  trained = jax.tree.map(narrow, trained, is_leaf=lambda x: isinstance(x, fine))
  if training.compute == "float32":
    return tree.combine(trained, kept)
  whole = tree.combine(trained, floats_as(kept, training.compute))
  made = lambda x: dataclasses.replace(x, dtype=training.compute) if isinstance(x, FakeQuantArray) else x  # noqa: E731
  return tree.map_leaves(lambda _, leaf: made(leaf), whole)


def loss_of(
  model: Any,
  kept: Params,
  training: Training,
  teacher: tuple[Any, Params] | None,
  trained: Params,
  rows: Any,
  through_masks: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """The summed loss of rows and the tokens that it counts, as a function of what trains.

  Args:
    rows: `tokens: [n, length]` and perhaps `attention_mask`, `counted`, and a teacher's `teacher_ids`,
      `teacher_logprobs` in its stead.
    through_masks: gradients reach what a mask over dense values removes, too.
  """
  whole = whole_tree(trained, kept, training)
  if through_masks:
    whole = tree.map_leaves(lambda _, x: _through_mask(x) if isinstance(x, MaskedArray) else x, whole)
  match, guide, shown = training.match, None, {}
  if teacher is not None and training.compute != "float32":
    teacher = teacher[0], floats_as(teacher[1], training.compute)
  paired = [] if match is None or teacher is None else match.pairs(model, whole, teacher)
  taps = [{} if match is None else match.taps(paired, side) for side in (0, 1)]
  held = None if training.cache is None else _cache(model, whole, rows["tokens"], training.cache)
  carry, seen = forward(model, whole, rows, training.remat, taps[0], held)
  if "teacher_ids" in rows:
    guide = stored_guide(rows)
  elif teacher is not None:
    theirs, shown = forward(*teacher, rows, False, taps[1])
    guide = predictions(*teacher, theirs) if training.loss.needs_teacher else None
  total, count = head_loss(model, whole, carry, rows, training.loss, guide, training.chunk)
  if match is not None:
    real = jnp.ones(rows["tokens"].shape, bool) if rows.get("attention_mask") is None else rows["attention_mask"] != 0
    total += count * match.loss(paired, seen, shown, whole.get(PROJECTIONS, {}), real)
  return total, count


def _cache(model: Any, params: Params, tokens: jax.Array, dtype: str) -> Any:
  """An empty one for rows `[n, length]`.

  Raises:
    ValueError: the model keeps no keys and values that could be rounded.
  """
  if not hasattr(model, "cache_shapes") or hasattr(model, "states") or hasattr(model, "encode"):
    raise ValueError(f"Training(cache={dtype!r}): a {type(model).__name__} keeps no such cache; leave cache out")
  rows, length = tokens.shape
  return init_cache(model, params, rows, length, dtype)


def stored_guide(rows: Any) -> Callable[[Any, int], Likeliest]:
  """What a stored teacher says of a run of tokens."""
  return lambda first, count: Likeliest(
    *(jax.lax.dynamic_slice_in_dim(rows[f"teacher_{name}"], first, count, 1) for name in Likeliest._fields)
  )


def _through_mask(w: MaskedArray) -> Any:
  """The dense value, with the gradient of a weight that no mask lies over."""
  if isinstance(w.values, CompressedArray):
    return w
  removed = w.values - jax.lax.stop_gradient(w.values)  # 0
  return jnp.where(w.mask.unpack() != 0, w.values, removed)


@functools.partial(jax.jit, static_argnames=("model", "training", "transform", "teacher_model"), donate_argnums=(1,))
def train_step(
  model: Any,
  moving: TrainState,
  kept: Params,
  batch: Mapping[str, jax.Array],
  training: Training,
  transform: Transform | None = None,
  teacher_model: Any = None,
  teacher: Params | None = None,
  key: jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update.

  Args:
    moving: the state without `kept`; its buffers are given up.
    kept: what does not train; its buffers stay.
    batch: `tokens: [accumulate, rows, length]`, and perhaps `attention_mask`.
    teacher_model, teacher: for a loss that needs one.
    key: for the transform.

  Returns:
    The state, its `kept` None unless a transform changed it, and scalars: `loss` (a mean over tokens), `grad_norm`,
    `learning_rate`, and `broken`, the first of the arrays that train whose gradient is not finite, or -1.
  """

  def lost(trained: Params, piece: Mapping[str, jax.Array], kept: Params, teacher: Params | None) -> Any:
    guide = None if teacher is None else (teacher_model, teacher)
    through = _reads_gradients(transform)
    return loss_of(model, kept, training, guide, trained, piece, through_masks=through)

  def add(sums: Any, piece: Mapping[str, jax.Array]) -> tuple[Any, None]:
    # else XLA gathers all blocks before the loop, where they do not change
    given = jax.lax.optimization_barrier((moving.trained, dict(piece), kept, teacher))
    (total, count), grads = jax.value_and_grad(lost, has_aux=True)(*given)
    return jax.tree.map(jnp.add, sums, (total, count, grads)), None

  def mean(trained: Params) -> jax.Array:
    total, count = lost(trained, {name: rows[0] for name, rows in batch.items()}, kept, teacher)
    return total / jnp.maximum(count, 1).astype(jnp.float32)

  if training.accumulate == 1:  # no sums of gradients beside them, and nothing to divide
    loss, grads = jax.value_and_grad(mean)(moving.trained)
  else:
    zeros = (jnp.zeros(()), jnp.int32(0), jax.tree.map(jnp.zeros_like, moving.trained))
    (total, count, grads), _ = jax.lax.scan(add, zeros, dict(batch))
    tokens = jnp.maximum(count, 1).astype(jnp.float32)
    loss, grads = total / tokens, jax.tree.map(lambda g: g / tokens, grads)
  return advance(moving, kept, grads, loss, training, transform, key)


def compiled_step(
  model: Any,
  params: Params,
  training: Training,
  length: int,
  trainable: Callable[[str], bool],
  transform: Transform | None = None,
  teacher: tuple[Any, Params] | None = None,
) -> Any:
  """The compiled step for rows of `length` tokens, made from shapes alone: nothing is held or run.

  Shapes (or arrays) that say where they lie make it the program of one device of their mesh.
  """
  state = jax.eval_shape(lambda p: start(p, training, trainable, transform), params)
  state = _lying(state, params, training, trainable)
  shape = (training.accumulate, training.batch // training.accumulate, length)
  batch = {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows_split(mesh_of(params), shape[1], axis=1))}
  who, guide = teacher if teacher is not None else (None, None)
  key = jax.eval_shape(lambda: jax.random.key(0))
  moving = state._replace(kept=None)
  with on_mesh_of(params):
    return train_step.lower(model, moving, state.kept, batch, training, transform, who, guide, key).compile()


def _lying(state: Any, params: Params, training: Training, trainable: Callable[[str], bool]) -> Any:
  """A state of shapes, each part where the parameter lies that it belongs to."""

  def like(x: Any, old: Any) -> Any:
    sharding = getattr(old, "sharding", None)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if isinstance(sharding, NamedSharding) else None)

  trained, kept = tree.partition(params, trainable)
  return state._replace(
    trained=jax.tree.map(like, state.trained, trained),
    moments=optax.tree.map_params(training.transformation(), like, state.moments, trained),
    average=None if state.average is None else jax.tree.map(like, state.average, trained),
    kept=jax.tree.map(like, state.kept, kept),
  )


def advance(
  moving: TrainState,
  kept: Params,
  grads: Params,
  loss: jax.Array,
  training: Training,
  transform: Transform | None,
  key: jax.Array | None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """The update that gradients of what trains make: the optimizer, the transform, the average, and the metrics."""
  grads = pressed(grads, moving.trained, kept)
  dense = grads
  if _reads_gradients(transform):
    grads = jax.tree.map(lambda g, k: _where_kept(g, k), grads, kept, is_leaf=lambda x: isinstance(x, MaskedArray))
  updates, moments = training.transformation().update(grads, moving.moments, moving.trained)
  trained = optax.apply_updates(moving.trained, updates)
  links, changed = moving.links, None
  if transform is not None:
    bare = tree.map_leaves(lambda _, g: g.values if isinstance(g, MaskedArray) else g, dense)
    evidence = Evidence(step=moving.step, key=key, grads=bare)
    whole, links = transform.apply(tree.combine(trained, kept), links, evidence)  # type: ignore[arg-type]
    trained, changed = _split_like(whole, trained)  # type: ignore[arg-type]
  average = moving.average
  if training.average is not None:
    average: Any = optax.incremental_update(trained, average, 1 - training.average)
    average = with_gates_of(trained, average)  # type: ignore[arg-type]
  finite = jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)])
  metrics = {
    "loss": loss, "grad_norm": optax.global_norm(grads), "learning_rate": training.rate(moving.step),
    "broken": jnp.where(jnp.all(finite), -1, jnp.argmin(finite)),
  }  # fmt: skip
  return TrainState(moving.step + 1, trained, moments, average, changed, links), metrics


@functools.partial(jax.jit, static_argnames=("model", "training"))
def held_out_loss(
  model: Any, trained: Params, kept: Params, rows: jax.Array, training: Training
) -> tuple[jax.Array, jax.Array]:
  """The summed cross entropy of rows `[n, length]`, whatever the training's loss, and the tokens that it counts."""
  alone = dataclasses.replace(training, loss=Labels(), match=None)
  return loss_of(model, undrawn(kept), alone, None, trained, {"tokens": rows})


def _links(transform: Transform | None) -> tuple[Transform, ...]:
  return () if transform is None else transform.links or (transform,)


def _reads_gradients(transform: Transform | None) -> bool:
  return transform is not None and "grads" in transform.needs


def _where_kept(g: Any, kept: Any) -> Any:
  """A gradient without what a mask removes; `kept` holds the mask."""
  if not isinstance(g, MaskedArray) or g.values is None:
    return g
  return dataclasses.replace(g, values=jnp.where(kept.mask.unpack() != 0, g.values, 0.0))


def floats_as(kept: Params, dtype: str) -> Params:
  """Dense floats of what stays in the dtype of products; compressed leaves decode to what they say."""
  return tree.map_leaves(
    lambda _, x: x.astype(dtype) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating) else x, kept
  )


def _split_like(whole: Params, trained: Params) -> tuple[Params, Params]:
  """A tree in two, as `trained` and what is not in it."""
  there = jax.tree.map(lambda t, x: x if t is not None else None, trained, whole, is_leaf=lambda x: x is None)
  rest = jax.tree.map(lambda t, x: x if t is None else None, trained, whole, is_leaf=lambda x: x is None)
  return there, rest
