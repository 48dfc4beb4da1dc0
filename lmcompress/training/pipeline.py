"""Layers over devices: each holds some blocks, and small batches go through them one after the other."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.calibration.token_loss import head_loss, require_causal
from lmcompress.evaluate.roofline import leaf_bytes
from lmcompress.training.durable import Metrics
from lmcompress.training.loop import batches, checked_rows
from lmcompress.training.step import Training, TrainState, advance, result, start, whole_tree
from lmcompress.types import Params, WeightError


def split_stages(model: Any, params: Params, count: int) -> list[Params]:
  """A tree as consecutive stages of about as many bytes each.

  What comes before the blocks is in the first, what comes after in the last, and a table that is both in both.

  Raises:
    ValueError: fewer blocks than stages.
  """
  blocks = [block.path for block in model.blocks(params)]
  if not 1 <= count <= len(blocks):
    raise ValueError(f"{count} stages of {len(blocks)} blocks: from 1 to as many as there are blocks")
  leaves = tree.flatten(params)
  sizes = [sum(leaf_bytes(leaf) for p, leaf in leaves.items() if p.startswith(f"{path}/")) for path in blocks]
  of_block = dict(zip(blocks, _even(sizes, count), strict=True))
  parts: list[dict[str, Any]] = [{} for _ in range(count)]
  last = ("final_norm", "head")
  for path, leaf in leaves.items():
    home = next((of_block[block] for block in blocks if path.startswith(f"{block}/")), None)
    if home is None:
      home = count - 1 if path.split("/")[0] in last else 0
      if path.split("/")[0] == "embed" and "head" not in params:
        parts[-1][path] = leaf
    parts[home][path] = leaf
  return [tree.unflatten(part) for part in parts]


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


def fit_pipelined(
  model: Any,
  params: Params,
  rows: np.ndarray,
  training: Training,
  *,
  stages: int,
  devices: Sequence[Any] | None = None,
  seed: int = 0,
  trainable: Callable[[str], bool] = lambda path: True,
  on_step: Callable[[int, Metrics], None] | None = None,
) -> tuple[Params, list[Metrics]]:
  """Trains a tree whose blocks lie on several devices; `training.accumulate` is how many small batches a batch makes.

  Each device has the weights, gradients and moments of its stage alone, and is handed hidden states; inputs of stages
  are kept and what is inside is computed again on the way back.

  Args:
    rows: token ids `[n, length]`.
    devices: one for each stage, by default the first ones.

  Returns:
    The tree, where it was, and of each update the metrics of `fit`, with `held`, the inputs that the first stage held
    at once at most.

  Raises:
    ValueError: fewer devices or blocks than stages, or a setting that pipelines do not have.
    WeightError: the loss or a gradient is not finite.
  """
  require_causal(model, "a pipeline")
  devices = list(jax.devices() if devices is None else devices)
  if len(devices) < stages:
    raise ValueError(f"{stages} stages on {len(devices)} devices: one each is needed")
  refused = {"loss": training.loss.needs_teacher, "match": training.match, "generated": training.generated,
             "privacy": training.privacy, "average": training.average}  # fmt: skip
  if asked := [name for name, value in refused.items() if value]:
    raise ValueError(f"a pipeline learns labels: leave out {', '.join(asked)}")
  rows = checked_rows("rows", rows, params)
  source = batches(np.arange(len(rows))[:, None], training.batch, seed)
  parts = [jax.device_put(part, devices[i]) for i, part in enumerate(split_stages(model, params, stages))]
  plain = dataclasses.replace(training, clip=None, accumulate=1, batch=training.batch // training.accumulate)
  states = [
    start(part, plain, trainable) if _trains(part, trainable) else None for part in parts
  ]
  still = [tree.partition(part, lambda path: False) for part in parts]  # of stages in which nothing trains
  kept = [still[i][1] if state is None else state.kept for i, state in enumerate(states)]
  holes = [still[i][0] for i in range(stages)]
  states = [None if s is None else s._replace(kept=None) for s in states]
  first = states[0].trained if states[0] is not None else {}
  tied = stages > 1 and "head" not in params and isinstance(first.get("embed", {}).get("table"), jax.Array)
  history: list[Metrics] = []
  order = one_forward_one_backward(stages, training.accumulate)
  for step in range(training.steps):
    begun = time.perf_counter()
    chosen = np.asarray(source[step])[:, 0].reshape(training.accumulate, -1)
    small = [{"tokens": jnp.asarray(rows[some])} for some in chosen]
    gradients, total, count, held = _gradients(model, states, holes, kept, small, plain, order, devices)
    if tied:
      sums = gradients[0]["embed"]["table"] + jax.device_put(gradients[-1]["embed"]["table"], devices[0])
      gradients[0]["embed"]["table"] = sums
      gradients[-1]["embed"]["table"] = jax.device_put(sums, devices[stages - 1])
    tokens = max(count, 1)
    own = [g if i + 1 < stages or not tied else {k: v for k, v in g.items() if k != "embed"}
           for i, g in enumerate(gradients)]  # fmt: skip
    norm = float(np.sqrt(sum(float(_squares(g)) for g in own if g is not None))) / tokens
    if not np.isfinite(total) or not np.isfinite(norm):
      raise WeightError(
        f"step {step}: the loss is {total / tokens:.6g} and the gradients' norm {norm:.6g}; lower the learning rate "
        f"({training.learning_rate:g}) or clip ({training.clip})"
      )
    shrink = 1.0 if training.clip is None else min(1.0, training.clip / max(norm, 1e-30))
    metrics: Metrics = {}
    for i, state in enumerate(states):
      if state is not None:
        states[i], found = _update(state, kept[i], gradients[i], shrink / tokens, total / tokens, plain)
        metrics = {name: float(value) for name, value in found.items() if name != "broken"}
    metrics |= {"loss": total / tokens, "grad_norm": norm, "held": held, "seconds": time.perf_counter() - begun}
    history.append(metrics)
    if on_step is not None:
      on_step(step + 1, metrics)
  done = [part if s is None else result(s._replace(kept=k), part)
          for s, k, part in zip(states, kept, parts, strict=True)]  # fmt: skip
  home = jax.tree.map(lambda x: x.sharding if isinstance(x, jax.Array) else None, params)
  return jax.tree.map(lambda x, place: jax.device_put(x, place), merge_stages(done), home), history


def _trains(part: Params, trainable: Callable[[str], bool]) -> bool:
  return bool(jax.tree.leaves(tree.partition(part, trainable)[0]))


@jax.jit
def _squares(gradients: Params) -> jax.Array:
  return sum((jnp.sum(g * g) for g in jax.tree.leaves(gradients)), jnp.zeros(()))


@functools.partial(jax.jit, static_argnames="training")
def _update(state: TrainState, kept: Params, gradients: Params, scale: Any, loss: Any, training: Training) -> Any:
  scaled = jax.tree.map(lambda g: g * scale, gradients)
  return advance(state, kept, scaled, jnp.float32(loss), training, None, None)


def _floats(carry: Any) -> tuple[list[jax.Array], Any]:
  """What gradients go through, and all of it again from that."""
  leaves, treedef = jax.tree.flatten(carry)
  real = [jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves]

  def back(floats: Sequence[jax.Array]) -> Any:
    given = iter(floats)
    return treedef.unflatten([next(given) if is_real else x for x, is_real in zip(leaves, real, strict=True)])

  return [x for x, is_real in zip(leaves, real, strict=True) if is_real], back


def _through(model: Any, params: Params, carry: Any, first: bool, batch: Any) -> Any:
  """The blocks of a stage, after the start of the model where it is the first."""
  carry = model.start(params, batch) if first else carry
  for block in model.blocks(params):
    carry, _ = model.run(block, params, carry)
  return carry


@functools.partial(jax.jit, static_argnames=("model", "first", "training"))
def _ahead(model: Any, trained: Params, kept: Params, carry: Any, batch: Any, first: bool, training: Training) -> Any:
  return _through(model, whole_tree(trained, kept, training), carry, first, batch)


@functools.partial(jax.jit, static_argnames=("model", "first", "last", "training"))
def _back(
  model: Any, trained: Params, kept: Params, carry: Any, given: Any, batch: Any, first: bool, last: bool,
  training: Training,
) -> Any:  # fmt: skip
  """Gradients of a stage's arrays and of the floats of its input, and of the last stage the loss."""
  floats, back = ([], lambda floats: None) if first else _floats(carry)

  def run(trained: Params, floats: Sequence[jax.Array]) -> Any:
    whole = whole_tree(trained, kept, training)
    if last:
      after = _through(model, whole, back(floats), first, batch)
      return head_loss(model, whole, after, batch, training.loss, None, training.chunk)
    return _floats(_through(model, whole, back(floats), first, batch))[0], None

  made, pull, aux = jax.vjp(run, trained, floats, has_aux=True)
  gradients, before = pull(jnp.ones_like(made) if last else given)
  return gradients, before, (made, aux) if last else None


def _gradients(
  model: Any, states: Sequence[Any], holes: Sequence[Params], kept: Sequence[Params], small: Sequence[Any],
  training: Training, order: Sequence[Work], devices: Sequence[Any],
) -> tuple[list[Any], float, int, int]:  # fmt: skip
  """Sums over the small batches: gradients by stage, the loss, the tokens; and what the first stage held at most."""
  stages = len(states)
  trained = [hole if s is None else s.trained for s, hole in zip(states, holes, strict=True)]
  inputs: dict[tuple[int, int], Any] = {}
  given: dict[tuple[int, int], Any] = {}
  sums: list[Any] = [None] * stages
  losses, held = [], 0
  for stage, b, way in order:
    first, last, device = stage == 0, stage + 1 == stages, devices[stage]
    batch = jax.device_put(small[b], device)
    if way == "forward":
      if first:
        inputs[0, b] = None
      if not last:
        carry = _ahead(model, trained[stage], kept[stage], inputs[stage, b], batch, first, training)
        inputs[stage + 1, b] = jax.device_put(carry, devices[stage + 1])
      held = max(held, sum(1 for s, _ in inputs if s == 0))
      continue
    gradients, before, told = _back(
      model, trained[stage], kept[stage], inputs.pop((stage, b)), given.pop((stage, b), None), batch, first, last,
      training,
    )  # fmt: skip
    if told is not None:
      losses.append(told)
    if not first:
      given[stage - 1, b] = jax.device_put(before, devices[stage - 1])
    sums[stage] = gradients if sums[stage] is None else jax.tree.map(jnp.add, sums[stage], gradients)
  total, count = sum(float(t) for t, _ in losses), sum(int(c) for _, c in losses)
  return sums, total, count, held

