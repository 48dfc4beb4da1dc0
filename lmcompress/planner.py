"""What a model needs on a machine that need not be there: bytes, messages, arithmetic and time, from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from lmcompress import tree
from lmcompress.calibration.token_loss import require_causal
from lmcompress.distributed.accelerators import Accelerator
from lmcompress.distributed.sharding import (
  AXES,
  BATCH,
  RULES,
  abstract_mesh,
  as_on,
  dense_specs,
  placements,
  require_division,
  shardings,
)
from lmcompress.evaluate.roofline import leaf_bytes, multiply_adds, share
from lmcompress.training import Labels, Training
from lmcompress.training.pipeline import is_tied, stages_of
from lmcompress.types import ConfigError, Params
from lmcompress.virtual import VirtualStep, temporaries

_COMPILED = (2, 4)
"""Blocks of the programs that a deeper model is drawn on from."""


class Message(NamedTuple):
  """Collectives of one kind in a step.

  Attributes:
    what: what is sent.
    kind: `all-gather`, `all-reduce`, `reduce-scatter`, or `send` from one device to another.
    axis: of the mesh, over which.
    count: in a step.
    nbytes: that each device sends in all of them, in a ring.
  """

  what: str
  kind: str
  axis: str
  count: int
  nbytes: float


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a step needs.

  Attributes:
    placements: of the weights, as of `distributed.placements`.
    nbytes: on one device, by what it is for.
    messages: of a step.
    operations: of a step, over all devices; a product and a sum are two.
    read: bytes that a device reads from its memory in a step at least.
    tokens: of a step, over all devices.
  """

  placements: list[Any]
  nbytes: dict[str, float]
  messages: list[Message]
  operations: float
  read: float
  tokens: int

  @property
  def total(self) -> float:
    """Bytes on one device."""
    return sum(self.nbytes.values())


class Estimate(NamedTuple):
  """Seconds of a step on a kind of device, and what follows.

  Attributes:
    arithmetic, memory, sending: seconds of each by itself.
    least: if all three overlap; most: if none does.
    joules: of all devices at their highest draw during `least`; None where that is not published.
  """

  arithmetic: float
  memory: float
  sending: float
  least: float
  most: float
  joules: float | None


def ring(kind: str, nbytes: float, n: int) -> float:
  """Bytes that each of `n` devices sends in a ring, for an array of so many bytes when it is whole."""
  return nbytes * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def train_plan(
  model: Any, params: Params, training: Training, length: int, sizes: Mapping[str, int],
  rules: Mapping[str, str | None] = RULES, trainable: Callable[[str], bool] = lambda path: True,
  teacher: tuple[Any, Params] | None = None,
) -> Plan:  # fmt: skip
  """What a training step takes on a mesh of such sizes, of which `pipe` is the stages of a pipeline.

  Weights, moments and gradients are counted. What else a step makes is XLA's account of its program for such a mesh,
  compiled for virtual devices (`virtual.temporaries`) and never run: of the whole model where it has few blocks, else
  drawn on from two and four of them. Of stages, it is the one that holds most; what a device waits for others is not
  counted.

  Args:
    params: shapes, of compressed leaves too.
    trainable: as of `tree.partition`; the rest has no gradients and no moments.
    teacher: the model whose predictions are distilled, and the shapes of its parameters.

  Raises:
    ConfigError: the mesh does not divide the model or the batch, there are more stages than blocks, or nothing trains.
    WeightError: the model predicts no next token.
    LmcompressError: the step does not compile.
  """
  require_causal(model, "a plan of training")
  stages, sizes = sizes.get("pipe", 1), {name: sizes.get(name, 1) for name in AXES}
  rows = _rows(training.batch, training.accumulate, sizes)
  learned = {path: _elements(leaf) for path, leaf in tree.flatten(tree.partition(params, trainable)[0]).items()}
  if not any(learned.values()):
    raise ConfigError("a plan of training: nothing trains, no float array of the tree is selected")
  student = _Part.of(model, params, sizes, stages, rules, learned)
  guide = None if teacher is None else _Part.of(*teacher, sizes, stages, rules)
  mine, rest = tree.partition(_only(student.split, student.own), trainable)
  trained, kept = 4 * _elements(mine), _nbytes(rest)  # what trains does so in float32
  moments = trained * (2 if training.optimizer == "adamw" else 1)
  width = 2 if training.compute == "bfloat16" else 4
  if rules.get("length") == "tensor" and length % sizes["tensor"]:
    raise ConfigError(f"rules length=tensor: tensor={sizes['tensor']} does not divide rows of {length} tokens")
  hidden = float(rows // training.accumulate * length * student.embed * width)
  states = hidden if guide is None else hidden * (1 + guide.embed / student.embed)
  made = _besides(student, guide, training, length, sizes, rules, stages, trainable)
  parts = {
    "weights, float32": float(trained), "weights that do not train": float(kept), "moments": float(moments),
    "gradients": float(trained), "average": float(trained if training.average is not None else 0),
    "the teacher": 0.0 if guide is None else float(guide.held),
    "activations, and what else the step makes": made,
    "inputs of small batches on their way": states * min(stages, training.accumulate) if stages > 1 else 0.0,
    "the first stage's table": float(_bytes(_only(student.split, student.tied))),
  }  # fmt: skip
  tokens = training.batch * length
  sent = tokens // ways(sizes)
  messages = _messages(student, sizes, rules, sent, width, training.remat, learned, training.accumulate)
  if guide is not None:
    told = _messages(guide, sizes, rules, sent, width, False, None, training.accumulate, narrow=True)
    messages += [m._replace(what=f"{m.what} of the teacher") for m in told]
  if stages > 1:
    count = 2 * training.accumulate
    nbytes = training.accumulate * (hidden + states)
    messages.append(Message("states to the next stage, gradients back", "send", "pipe", count, nbytes))
  operations = (2 + training.remat) * _operations(model, student.params, tokens, length)
  operations += _operations(model, student.params, tokens, length, learned=learned)
  operations += 0 if guide is None else _operations(guide.model, guide.params, tokens, length)
  read = 4 * trained + 2 * moments + 2 * kept + (0 if guide is None else guide.held)
  return Plan(
    placements(model, _only(student.params, student.own), sizes, rules), {name: n for name, n in parts.items() if n},
    messages, operations, float(read), tokens,
  )  # fmt: skip


def serve_plan(
  model: Any, params: Params, batch: int, length: int, sizes: Mapping[str, int],
  rules: Mapping[str, str | None] = RULES, kv_bytes: float = 2.0,
) -> Plan:  # fmt: skip
  """What a decoding step of `batch` sequences of `length` tokens takes, the weights as the tree has them.

  Args:
    kv_bytes: of an entry of the cache.

  Raises:
    ConfigError: as of `train_plan`.
  """
  require_causal(model, "a plan of decoding")
  sizes = {name: sizes.get(name, 1) for name in AXES}
  rows = _rows(batch, 1, sizes)
  part = _Part.of(model, params, sizes, 1, rules)
  params, whole = part.params, part.whole
  cache = sum(2 * kv * head * length * rows * kv_bytes for kv, head in model.cache_shapes(whole).values())
  layer = max((_bytes(whole) - _bytes(_with_layers(model, whole, 0))) / max(1, len(_blocks(model, params))), 0)
  parts = {
    "weights": float(part.held), "keys and values": float(cache),
    "gathered weights": float(2 * layer if sizes["fsdp"] > 1 else 0),
    "activations": 4.0 * rows * max(x.shape[-1] for x in tree.weights(whole).values()),
  }  # fmt: skip
  operations = _operations(model, params, batch, 1, seen=length)
  messages = _messages(part, sizes, rules, rows, 2, False, None)
  return Plan(
    placements(model, params, sizes, rules), {name: n for name, n in parts.items() if n}, messages, operations,
    float(_bytes(whole) - _unread(model, params, whole, rows) + cache), batch,
  )  # fmt: skip


def estimate(plan: Plan, device: Accelerator, sizes: Mapping[str, int]) -> Estimate:
  """The time that a roofline bounds a step to (Williams et al. 2009), and that of its messages.

  Latencies, kernels that reach less than the peak, and pipelines that wait are not in it.
  """
  devices = math.prod(sizes.values())
  arithmetic, memory = plan.operations / devices / device.operations, plan.read / device.bandwidth
  sending = sum(m.nbytes / _speed(device, m.axis, sizes) for m in plan.messages)
  least = max(arithmetic, memory, sending)
  joules = None if device.watts is None else device.watts * devices * least
  return Estimate(arithmetic, memory, sending, least, arithmetic + memory + sending, joules)


def largest_batch(total: Callable[[int], float], room: float, step: int) -> int:
  """The largest multiple of `step` whose bytes fit; 0 where none does."""
  if total(step) > room:
    return 0
  low, high = 1, 2
  while total(high * step) <= room and high < 1 << 20:
    low, high = high, high * 2
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if total(middle * step) <= room else (low, middle)
  return low * step


# ---------------------------------------------------------------------------------------- parts


def _besides(
  student: _Part, guide: _Part | None, training: Training, length: int, sizes: Mapping[str, int],
  rules: Mapping[str, str | None], stages: int, trainable: Callable[[str], bool],
) -> float:  # fmt: skip
  """Bytes that one device holds beside arguments and gradients while it runs the step, of a stage for a small batch."""
  model, params = student.model, student.params
  blocks, every = [f"{b.path}/" for b in _blocks(model, params)], _paths(params)
  of = [frozenset(p.removeprefix(b) for p in every if p.startswith(b) and trainable(p)) for b in blocks]
  alike = all(some == of[0] for some in of)  # else counted as if all trained
  loss = training.loss if guide is not None else Labels()  # predictions that were written before, and not by a teacher
  step = dataclasses.replace(training, match=None, loss=loss)
  if stages > 1:
    step = dataclasses.replace(step, batch=training.batch // training.accumulate, accumulate=1)
  few = min(2, sizes["data"])  # more that repeat the same would hold the same
  step = dataclasses.replace(step, batch=step.batch * few // sizes["data"])
  sizes = {**sizes, "data": few}
  count = len(_blocks(model, _only(params, student.own)))
  steps, grads = [], []
  for n in [count] if count <= _COMPILED[-1] else _COMPILED:
    first = _with_layers(model, params, n)
    some = frozenset(path for path in _paths(first) if trainable(path) or not alike)
    beside = None if guide is None else (guide.model, _with_layers(guide.model, guide.params, n))
    steps.append(VirtualStep(model, first, step, length, some, beside, sizes, rules))
    grads.append(4 * _elements(tree.partition(_local(model, first, sizes, rules), some.__contains__)[0]))
  held = [nbytes - some for nbytes, some in zip(temporaries(steps), grads, strict=True)]
  further = 0.0 if len(held) == 1 else (held[1] - held[0]) / (_COMPILED[1] - _COMPILED[0])
  return max(held[-1] + further * (count - min(count, _COMPILED[-1])), 0.0)


def ways(sizes: Mapping[str, int]) -> int:
  """Into how many parts such a mesh splits the rows of a batch."""
  return math.prod(sizes.get(name, 1) for name in BATCH)


def _rows(batch: int, accumulate: int, sizes: Mapping[str, int]) -> int:
  """Rows of one device."""
  parts = ways(sizes)
  if batch % (accumulate * parts):
    raise ConfigError(
      f"a batch of {batch} in {accumulate} pieces over data x fsdp = {parts} devices leaves rows over; take a multiple "
      f"of {accumulate * parts}"
    )
  return batch // parts


@dataclasses.dataclass(frozen=True)
class _Part:
  """What one device holds of a model on a mesh; of stages, the one that holds most.

  Attributes:
    params: the whole model's shapes, as they lie on such a mesh.
    split: what a device has of each leaf; whole: the same where `fsdp` were one.
    own: the paths of the stage; tied: of a table that it has from another.
  """

  model: Any
  params: Params
  split: Params
  whole: Params
  own: set[str]
  tied: set[str]

  @classmethod
  def of(
    cls, model: Any, params: Params, sizes: Mapping[str, int], stages: int, rules: Mapping[str, str | None],
    learned: Mapping[str, int] | None = None,
  ) -> _Part:  # fmt: skip
    require_division(model, params, {**sizes, "fsdp": sizes["fsdp"] * stages}, rules)  # as a run lies outside training
    params = as_on(params, sizes)
    split, whole = _local(model, params, sizes, rules), _local(model, params, {**sizes, "fsdp": 1}, rules)
    return cls(model, params, split, whole, *_heaviest(model, params, stages, learned or {}))

  @property
  def held(self) -> int:
    return _bytes(_only(self.split, self.own))

  @property
  def embed(self) -> int:
    return self.params["embed"]["table"].shape[-1]


def _paths(params: Params) -> list[str]:
  """Of all arrays that could train."""
  found: list[str] = []
  tree.partition(params, lambda path: bool(found.append(path)))
  return found


def _elements(part: Any) -> int:
  return sum(x.size for x in jax.tree.leaves(part))


def _nbytes(arrays: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def _bytes(params: Params) -> int:
  return sum(leaf_bytes(leaf) for leaf in tree.flatten(params).values())


def _blocks(model: Any, params: Params) -> tuple[Any, ...]:
  return model.blocks(params)


def _heaviest(model: Any, params: Params, stages: int, learned: Mapping[str, int]) -> tuple[set[str], set[str]]:
  """The paths of the stage that holds most, gradients and moments counted, and of a table that it has from another."""
  if stages == 1:
    return set(tree.flatten(params)), set()
  try:
    homes = stages_of(model, params, stages)
  except ValueError as error:
    raise ConfigError(f"mesh pipe={stages}: {error}") from None
  leaves = tree.flatten(params)
  nbytes = {path: leaf_bytes(leaves[path]) + 12 * learned.get(path, 0) for path in homes}
  held = [sum(nbytes[path] for path, home in homes.items() if home == stage) for stage in range(stages)]
  heaviest = held.index(max(held))
  tied = {path for path in leaves if is_tied(path, params)} if heaviest == stages - 1 else set()
  return {path for path, home in homes.items() if home == heaviest}, tied


def _only(params: Params, own: Container[str]) -> Params:
  return tree.unflatten({path: leaf for path, leaf in tree.flatten(params).items() if path in own})


def _with_layers(model: Any, params: Params, count: int) -> Params:
  """The tree with its first blocks alone."""
  gone = tuple(f"{b.path}/" for b in _blocks(model, params)[count:])
  return tree.unflatten({p: leaf for p, leaf in tree.flatten(params).items() if not p.startswith(gone)} if gone else
                        tree.flatten(params))  # fmt: skip


def _local(model: Any, params: Params, sizes: Mapping[str, int], rules: Mapping[str, str | None]) -> Params:
  """The shapes that one device holds, as a tree of the same form."""
  placed = shardings(model, params, abstract_mesh(sizes), rules)
  part = lambda x, p: jax.ShapeDtypeStruct(p.shard_shape(x.shape), x.dtype)  # noqa: E731
  return jax.tree.map(part, params, placed, is_leaf=lambda x: isinstance(x, NamedSharding))


def _operations(
  model: Any, params: Params, tokens: int, length: int, seen: int | None = None,
  learned: Mapping[str, int] | None = None,
) -> float:  # fmt: skip
  """Of a forward pass: products with every weight (of experts, those of a token), and of queries with what they see,
  half of a row in the mean. With `learned`, of the gradients of as many numbers of each weight, and of queries."""
  head = "head/table" if "head" in params else "embed/table"
  weights = tree.weights(params)
  adds = sum(
    (multiply_adds(leaf) if learned is None else learned.get(path, 0)) * share(weights, path, _chosen(model))
    for path, leaf in weights.items() if path == head or not path.endswith("/table")
  )  # fmt: skip
  attended = sum(leaf.shape[-1] for path, leaf in weights.items() if path.endswith("attn/q/kernel"))
  return 2.0 * tokens * (adds + 2 * attended * ((length + 1) / 2 if seen is None else seen))


def _unread(model: Any, params: Params, local: Params, rows: int) -> float:
  """Bytes of experts that so many tokens do not go to, in the mean, if all are as likely."""
  weights = tree.weights(params)
  return sum(
    leaf_bytes(leaf) * (1 - share(weights, path, _chosen(model))) ** rows
    for path, leaf in tree.weights(local).items() if tree.in_mixture(path)
  )  # fmt: skip


def _chosen(model: Any) -> int:
  """How many experts a token goes to."""
  return getattr(model.config, "experts_per_token", 1)


def _messages(
  part: _Part, sizes: Mapping[str, int], rules: Mapping[str, str | None], tokens: int, width: int, remat: bool,
  learned: Mapping[str, int] | None, pieces: int = 1, narrow: bool = False,
) -> list[Message]:  # fmt: skip
  """What theory asks of the leaves of a stage: Megatron's sums over `tensor` (arXiv:1909.08053), ZeRO's gathers
  (arXiv:1910.02054), once for each of the pieces that a batch is cut into.

  Args:
    learned: how many numbers of each leaf train; None where nothing does.
    narrow: a teacher's, whose dense weights are sent in the dtype of products too.
  """
  model, params, own, trains = part.model, part.params, part.own, learned is not None
  narrow = narrow or trains
  specs, embed = dense_specs(model, params, sizes, rules), tree.flatten(params)["embed/table"].shape[-1]
  leaves = {path: leaf for path, leaf in tree.flatten(params).items() if path in own}
  t, f = sizes["tensor"], sizes["fsdp"]
  found: list[Message] = []

  def add(what: str, kind: str, axis: str, each: list[float]) -> None:
    if sizes[axis] > 1 and each:
      found.append(Message(what, kind, axis, len(each), sum(ring(kind, n, sizes[axis]) for n in each)))

  forward, backward, mixed = [], [], []
  for block in _blocks(model, params):
    for stage in block.stages:
      paths = [p for linear in stage.linears if (p := f"{block.path}/{linear}/kernel") in leaves]
      if any(map(tree.in_mixture, paths)):
        continue  # below, apart and stacked alike
      forward += [float(tokens * leaves[p].shape[-1] * width) for p in paths if specs[p][-2] == "tensor"]
      if paths and specs[paths[0]][-1] == "tensor":
        backward.append(float(tokens * leaves[paths[0]].shape[-2] * width))
  downs = [p for p in leaves if tree.in_mixture(p) and p.endswith("/down/kernel")]
  for p in downs:  # rows of an expert, or of all that are in a stack
    rows = tokens * share(leaves, p, _chosen(model)) * (leaves[p].shape[0] if len(leaves[p].shape) == 3 else 1)
    if specs[p][-2] == "tensor":
      mixed.append(rows * embed * 4.0)
  sums = [float(tokens * embed * 4) for p in downs if specs[p][0] == "expert"]
  table = float(tokens * embed * width)
  if "embed/table" in own and specs["embed/table"][-2] == "tensor":
    add("the embedding's rows", "all-reduce", "tensor", [table])
  passes = 1 if not trains else 2 if remat else 1
  if trains and rules.get("length") == "tensor":  # a sum of all is one in parts and a gather (sequence_parallel)
    routed = [table] * sum(p.endswith("/router/kernel") for p in leaves)  # a mixture sees all tokens, and sums all
    add("inputs of column-parallel products, gradients of what row-parallel ones give", "all-gather", "tensor",
        (backward + routed) * passes + forward + routed)  # fmt: skip
    add("outputs of row-parallel products, gradients of what column-parallel ones take", "reduce-scatter", "tensor",
        forward * passes + backward + routed)  # fmt: skip
    if "embed/table" in own:
      add("gradients of the embedding's rows", "all-gather", "tensor", [table])
    add("outputs of experts, and gradients of their inputs", "all-reduce", "tensor", mixed * (passes + 1))
  else:
    add("outputs of row-parallel products", "all-reduce", "tensor", (forward + mixed) * passes)
    if trains:
      add("gradients of inputs of column-parallel products", "all-reduce", "tensor", backward + mixed)
  add("sums over experts", "all-reduce", "expert", sums * (passes + trains))
  size = lambda x: x.size * width if narrow and isinstance(x, jax.ShapeDtypeStruct) else leaf_bytes(x)  # noqa: E731
  e = sizes["expert"]
  parts = {p: (t if "tensor" in specs[p] else 1) * (e if "expert" in specs[p] else 1) for p in leaves}
  mine = {p: size(leaf) / parts[p] for p, leaf in leaves.items()}
  split = {p: float(n) for p, n in mine.items() if "fsdp" in specs[p]}
  gathers = [n for p, n in split.items() for _ in range(_passes(p, leaves, remat, narrow))]
  add("weights", "all-gather", "fsdp", gathers * pieces)
  if learned is not None:
    moved = {p: learned[p] * width / parts[p] for p in mine if learned.get(p)}
    add("gradients", "reduce-scatter", "fsdp", [n for p, n in moved.items() if p in split] * pieces)
    add("gradients", "all-reduce", "fsdp", [n for p, n in moved.items() if p not in split])
    add("gradients", "all-reduce", "data", [n / (f if p in split else 1) for p, n in moved.items()])
  return found


def _passes(path: str, leaves: Mapping[str, Any], remat: bool, trains: bool) -> int:
  """How often a weight is used in a step, from anew each time: logits are made twice, and blocks where they are."""
  if not trains:
    return 1
  if path.endswith("/table"):
    head = 2 if path == "head/table" or "head/table" not in leaves else 0
    return head + (path != "head/table")
  return 2 if remat else 1


def _speed(device: Accelerator, axis: str, sizes: Mapping[str, int]) -> float:
  """Bytes a second over an axis: the group's links where neighbours along it are within a group, else the network."""
  names = ["pipe", *AXES]
  inner = math.prod(sizes.get(name, 1) for name in names[names.index(axis) :])
  return device.link if inner <= device.group else device.network
