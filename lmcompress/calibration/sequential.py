"""Block by block: statistics of one block at a time, each block fed by the compressed blocks before it."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.arrays import InputArray, LearnedInputArray, fetch, resolve
from lmcompress.calibration.statistics import STATISTICS
from lmcompress.distributed.sharding import data_mesh, gathered, over_data
from lmcompress.evaluate.memory import trim
from lmcompress.ops.second_order import output_energy
from lmcompress.types import (
  Block,
  BlockEvidence,
  CompressedArray,
  Evidence,
  Params,
  Stage,
  State,
  Transform,
  WeightError,
)

TOKENS = 4096
"""Tokens that run at once, at most (one row at least)."""
_WEIGHTS = {"attention_mask": "weights", "decoder_attention_mask": "decoder_weights"}
"""What says how much each token counts, beside the mask of a stage."""
_LARGE = 1 << 20
"""Bytes of weights after which it pays to give memory back."""


class Kept(Protocol):
  """Where the finished parts of a link are kept."""

  def put(self, part: str, leaves: Mapping[str, Any], work: Mapping[str, Any]) -> dict[str, Any]:
    """Keeps them; returns what stands in the tree from now on."""
    ...

  def find(self, part: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Leaves by path and what `put` was told of the work, if the part is finished."""
    ...


@dataclasses.dataclass
class Work:
  """By weight path: seconds, and the relative error `||X (W - W')|| / ||X W||` of its output where it was measured."""

  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  output_error: dict[str, float] = dataclasses.field(default_factory=dict)


def block_by_block(
  model: Any,
  params: Params,
  link: Transform,
  state: Any,
  evidence: Evidence,
  calibration: Any,
  progress: Callable[[str, int, int], None] | None = None,
  kept: Kept | None = None,
) -> tuple[Params, State, Work]:
  """Applies a link that needs statistics to each block in turn.

  A link of scope `weight` goes stage by stage: the statistics of a stage are taken with the stages before it
  compressed (Frantar et al. 2022, "true sequential"). A link of scope `block` gets all stages of a block at once, as
  they were. Linears of a stage share their statistics. Memory is one block's statistics and the hidden streams of
  the rows (a second stream for a link that looks at what an input was before), whatever the depth.

  Args:
    kept: parts that it has are not made again; what is finished goes there, if the link's state does not matter.
    calibration: tokens `[n, length]`, or `{"tokens": ..., "attention_mask": ...}`, the mask nonzero for real tokens,
      and whatever else the model takes, such as `decoder_input_ids`, a row for each text. `weights` `[n, length]`
      (`decoder_weights` of a decoder) say how much each token counts in the sums and means of statistics, 1 where they
      are not given; a token of weight 0 is in none, and in no extreme. Gradients and losses do not read them.

  Returns:
    The tree, the link's state at the end, and what was done to each weight.

  Raises:
    WeightError: the tokens are not `[n, length]` integers, or a statistic asked for is not finite or did not come back.
  """
  wanted = tuple(sorted(link.needs & set(STATISTICS)))
  batches = batches_of(calibration)
  original, ends = params, _ends(model, params)
  mesh = data_mesh(params)  # rows split over it; a statistic's sum over them is one all-reduce
  stream = [over_data(mesh, model.start(ends, batch), len(batch["tokens"])) for batch in batches]
  del ends
  whole = "block" in link.needs
  compares = any(STATISTICS[name].reference for name in wanted)
  second = list(stream) if whole or compares else None
  blocks, work = model.blocks(params), Work()
  for n, block in enumerate(blocks):
    alike = next(b for b in blocks if b[1:] == block[1:])  # one compilation serves blocks of one kind
    found, given = None if kept is None else kept.find(block.path), evidence
    after = None if second is None else _advance(model, block, alike, original, second)
    if whole and after is not None:
      masks = [jnp.asarray(batch[block.stages[-1].mask]) for batch in batches] if block.stages else []
      given = dataclasses.replace(given, block=BlockEvidence(block.path, _Run(model, alike), stream, after, masks))
    before = {p: leaf for p, leaf in tree.flatten(params).items() if p.startswith(f"{block.path}/")}
    if found is not None:
      for path, leaf in found[0].items():
        params = tree.put(params, path, leaf)
      work.seconds.update(found[1]["seconds"])
      work.output_error.update(found[1]["output_error"])
    groups = [block.stages] if link.scope == "block" else [(stage,) for stage in block.stages]
    for stages in [] if found or not block.stages else groups:
      begun = time.perf_counter()
      reference = (original, second) if second is not None and compares else None
      values = _collect(model, block, alike, params, stream, stages, wanted, batches, reference)
      statistics = {f"{block.path}/{linear}/kernel": values[stage.name] for stage in stages for linear in stage.linears}
      leaves = {p: fetch(leaf) for p, leaf in tree.flatten(params).items() if p.startswith(f"{block.path}/")}
      if link.scope != "block":
        leaves = {p: leaf for p, leaf in leaves.items() if p in statistics}
      done, state = link.apply(tree.unflatten(leaves), state, dataclasses.replace(given, statistics=statistics))
      for path, leaf in jax.block_until_ready(tree.flatten(done)).items():
        if leaf is not leaves[path]:
          params = tree.put(params, path, leaf)
          if "hessian" in wanted and link.scope != "block":
            work.output_error[path] = float(_output_error(leaves[path], leaf, statistics[path]["hessian"]))
      seconds = (time.perf_counter() - begun) / len(statistics)  # each weight's share
      work.seconds.update(dict.fromkeys(statistics, seconds))
      large = sum(x.nbytes for x in jax.tree.leaves(leaves)) > _LARGE
      del values, statistics, leaves, done
      if large:
        trim()
    if kept is not None and found is None:
      changed = {p: leaf for p in before if (leaf := tree.get(params, p)) is not before[p]}
      both = {"seconds": work.seconds, "output_error": work.output_error}
      told = {name: {p: v for p, v in values.items() if p in before} for name, values in both.items()}
      for path, leaf in kept.put(block.path, changed, told).items():
        params = tree.put(params, path, leaf)
    stream = _advance(model, block, alike, params, stream)
    second = after
    if progress is not None:
      progress(link.name, n + 1, len(blocks))
  outside = _outside(model, params)
  done, state = link.apply(tree.unflatten(outside), state, evidence)  # refuses a weight that has no statistics
  for path, leaf in tree.flatten(done).items():
    params = tree.put(params, path, leaf)
  return params, state, work


@dataclasses.dataclass(frozen=True)
class _Run:
  """A block of a kind as a function of its own subtree; equal for blocks of one kind, so that it compiles once."""

  model: Any
  block: Block

  def __call__(self, params: Params, carry: Any) -> Any:
    return self.model.run(self.block, tree.put({}, self.block.path, params), carry)[0]


def _outside(model: Any, params: Params) -> dict[str, Any]:
  """The leaves of no block, by path."""
  blocks = model.blocks(params)
  return {p: leaf for p, leaf in tree.flatten(params).items() if not any(p.startswith(f"{b.path}/") for b in blocks)}


def _ends(model: Any, params: Params) -> Params:
  """What lies outside of the blocks, read from where it is stored, beside the blocks as they are."""
  for path, leaf in _outside(model, params).items():
    params = tree.put(params, path, fetch(leaf))
  return params


class Streamed(NamedTuple):
  """A model whose blocks are read one at a time, for scoring a tree that lies in files."""

  model: Any

  def apply(self, params: Params, tokens: Any, *, attention_mask: Any = None) -> jax.Array:
    """Logits `[batch, length, vocab]`."""
    carry = self.model.start(_ends(self.model, params), {"tokens": tokens, "attention_mask": attention_mask})
    blocks = self.model.blocks(params)
    for block in blocks:
      alike = next(b for b in blocks if b[1:] == block[1:])
      carry = _run(self.model, alike, _block_alone(block, alike, params), carry)
    return self.model.finish(_ends(self.model, params), carry)


def expected_bytes(params: Params, rows: int, length: int, needs: frozenset[str]) -> dict[str, int]:
  """About what the arrays of a link take beside the tree: `streams`, `statistics`, `batch` and `solver`, in bytes.

  Hidden streams of all rows (two where the model before compression is followed too), the statistics of the widest
  stage, the activations of one batch, and float32 copies of the widest stage's weights. It does not grow with depth.
  """
  kernels = {path: leaf.shape for path, leaf in tree.weights(params).items() if path.endswith("kernel")}
  if not kernels:
    return {"streams": 0, "statistics": 0, "batch": 0, "solver": 0}
  hidden = params["embed"]["table"].shape[-1]
  widest = max(shape[-2] for shape in kernels.values())
  largest = max(math.prod(shape[-2:]) for shape in kernels.values())
  squares = len(needs & {"hessian", "reference_hessian"})
  followed = 2 if needs & {"reference_hessian", "block"} else 1
  batch = min(rows * length, max(TOKENS, length))
  return {
    "streams": 4 * rows * length * hidden * followed,
    "statistics": 4 * widest * widest * squares,
    "batch": 4 * batch * (4 * hidden + 3 * widest),
    "solver": 4 * (6 * largest + 4 * widest * widest) if squares else 8 * largest,
  }


def batches_of(calibration: Any) -> list[dict[str, np.ndarray]]:
  """Rows of calibration, some at a time."""
  whole = _checked(calibration)
  rows, length = whole["tokens"].shape
  size = max(1, TOKENS // length)
  return [{name: x[i : i + size] for name, x in whole.items()} for i in range(0, rows, size)]


def _checked(calibration: Any) -> dict[str, np.ndarray]:
  """Tokens, masks and what else is given, a row for each text.

  Raises:
    WeightError: one of them is none.
  """
  given = calibration if isinstance(calibration, Mapping) else {"tokens": calibration}
  tokens = np.asarray(given["tokens"])
  if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
    raise WeightError(f"calibration tokens are [n, length] integers; found {tokens.dtype}{list(tokens.shape)}")
  mask = np.asarray(given.get("attention_mask", np.ones(tokens.shape, bool))) != 0
  if mask.shape != tokens.shape or not mask.any():
    raise WeightError(
      f"calibration's attention mask is {list(tokens.shape)} with real tokens in it; found {list(mask.shape)}"
    )
  whole = {"tokens": tokens, "attention_mask": mask}
  for name, other in given.items():
    if name not in whole and other is not None:
      whole[name] = np.asarray(other)
      if whole[name].ndim != 2 or len(whole[name]) != len(tokens):
        raise WeightError(f"calibration's {name} are a row for each of {len(tokens)} texts; found {whole[name].shape}")
  if "decoder_input_ids" in whole:
    whole.setdefault("decoder_attention_mask", np.ones(whole["decoder_input_ids"].shape, bool))
  for masks, name in _WEIGHTS.items():
    if name in whole:
      if masks not in whole:
        raise WeightError(f"calibration has {name} and no decoder_input_ids")
      whole[name] = _checked_weights(name, whole[name], whole[masks] != 0)
  return whole


def _checked_weights(name: str, given: np.ndarray, real: np.ndarray) -> np.ndarray:
  """Float32 weights of tokens.

  Raises:
    WeightError: they are no numbers of at least 0 for each token, above 0 for a real one.
  """
  numbers = jnp.issubdtype(given.dtype, jnp.number) or given.dtype == bool
  with np.errstate(over="ignore"):
    w = given.astype(np.float32) if numbers and given.dtype.kind != "c" else np.full(given.shape, np.nan)
  if w.shape != real.shape or not (np.isfinite(w) & (w >= 0)).all() or not (w * real).any():
    raise WeightError(f"calibration's {name} are a number of at least 0 for each token, above 0 for some real one; "
                      f"found {given.dtype}{list(given.shape)} for tokens {list(real.shape)}")  # fmt: skip
  return w


def weigh_first(calibration: Any, weight: float) -> Any:
  """Calibration whose rows' first real tokens count as so many in sums (Sung et al. 2025, RSQ, arXiv:2503.01820).

  Causal models rest much of their attention on the first token, so that an error there reaches all that follow; it is
  one of hundreds all the same.

  Args:
    calibration: as of `compress`, its weights, if it has any, multiplied; a decoder's first tokens are weighed too.
    weight: 1 changes nothing.

  Raises:
    ValueError: a negative weight, or one that is no number.
    WeightError: the calibration is none.
  """
  if not 0 <= weight < float("inf"):
    raise ValueError(f"weigh_first(weight={weight}): a finite number of at least 0")
  if weight == 1:
    return calibration
  whole = _checked(calibration)
  for masks, name in _WEIGHTS.items():
    if masks in whole:
      real = whole[masks] != 0
      first = np.arange(real.shape[1]) == real.argmax(axis=1)[:, None]
      whole[name] = np.where(first, weight, 1.0).astype(np.float32) * whole.get(name, np.float32(1))
  return whole


def _block_alone(block: Block, alike: Block, params: Params) -> Params:
  """The block's parameters, dense, at the path of one like it: what a calibration run reads and then forgets."""

  def dense(leaf: Any) -> Any:
    leaf = fetch(leaf)
    if isinstance(leaf, (InputArray, LearnedInputArray)):
      return dataclasses.replace(leaf, weight=dense(leaf.weight))
    return leaf.materialize() if isinstance(leaf, CompressedArray) else leaf

  return tree.unflatten(
    {
      alike.path + path.removeprefix(block.path): dense(resolve(params, leaf))
      for path, leaf in tree.flatten(params).items()
      if path.startswith(f"{block.path}/")
    }
  )


@functools.partial(jax.jit, static_argnames=("model", "block"))
def _run(model: Any, block: Block, params: Params, carry: Any) -> Any:
  return model.run(block, gathered(model, params, block.path), carry)[0]


@functools.partial(jax.jit, static_argnames=("model", "block", "taps"))
def _tapped(model: Any, block: Block, params: Params, carry: Any, taps: tuple[str, ...]) -> dict[str, jax.Array]:
  """Inputs of stages; what comes after them in the block is not computed."""
  return model.run(block, gathered(model, params, block.path), carry, taps)[1]


def _advance(model: Any, block: Block, alike: Block, params: Params, stream: list[Any]) -> list[Any]:
  alone = _block_alone(block, alike, params)
  return [_run(model, alike, alone, carry) for carry in stream]


def _collect(
  model: Any,
  block: Block,
  alike: Block,
  params: Params,
  stream: list[Any],
  stages: Sequence[Stage],
  wanted: tuple[str, ...],
  batches: list[dict[str, np.ndarray]],
  reference: tuple[Params, list[Any]] | None,
) -> dict[str, dict[str, jax.Array]]:
  """The statistics of each stage, from a run of the block over all rows up to there."""
  taps = tuple(stage.name for stage in stages)
  alone = _block_alone(block, alike, params)
  before = None if reference is None else _block_alone(block, alike, reference[0])
  states: dict[str, Any] = dict.fromkeys(taps)
  weights = {stage.name: [_weights(batch, stage.mask) for batch in batches] for stage in stages}
  counts = {name: jnp.float32(sum(float(w.sum()) for w in some)) for name, some in weights.items()}
  for i in range(len(batches)):
    inputs = _tapped(model, alike, alone, stream[i], taps)
    was = {} if reference is None else _tapped(model, alike, before, reference[1][i], taps)
    for name in taps:
      if inputs.get(name) is None:
        raise WeightError(
          f"{block.path}: stage {name!r} returned no input; the model must tap every stage it publishes"
        )
      states[name] = _update(wanted, states[name], inputs[name], was.get(name), weights[name][i])
  found = {}
  for stage in stages:
    state, count = states[stage.name], counts[stage.name]
    found[stage.name] = {w: STATISTICS[w].finish(s, count) for w, s in zip(wanted, state, strict=True)}
    for name, value in found[stage.name].items():
      if not bool(jnp.all(jnp.isfinite(value))):
        raise WeightError(
          f"{name} of {block.path}/{stage.linears[0]} is not finite: the calibration text drives the model to infinity"
        )
  return found


def _weights(batch: Mapping[str, np.ndarray], mask: str) -> np.ndarray:
  """How much each token counts, float32 `[rows, length]`; padding not at all."""
  return (batch[mask] != 0).astype(np.float32) * batch.get(_WEIGHTS[mask], np.float32(1))


@functools.partial(jax.jit, static_argnames=("wanted",))
def _update(wanted: tuple[str, ...], states: Any, x: jax.Array, reference: Any, weights: jax.Array) -> Any:
  weights = jnp.asarray(weights).reshape(-1, 1)

  def rows(x: jax.Array) -> jax.Array:
    return jnp.where(weights > 0, x.reshape(-1, x.shape[-1]).astype(jnp.float32), 0.0)

  def one(name: str, state: jax.Array) -> jax.Array:
    statistic = STATISTICS[name]
    by = weights**statistic.weight if statistic.weight else 1.0
    return statistic.update(state, x * by, None if reference is None else reference * by)

  x, reference = rows(x), None if reference is None else rows(reference)
  states = tuple(STATISTICS[w].init(x.shape[1]) for w in wanted) if states is None else states
  sound = jnp.all(jnp.isfinite(x))  # XLA's maximum may drop a NaN, so it is said here
  return tuple(jnp.where(sound, one(w, s), jnp.nan) for w, s in zip(wanted, states, strict=True))


@jax.jit
def _output_error(before: Any, after: Any, hessian: jax.Array) -> jax.Array:
  """`||X (W - W')|| / ||X W||`, from the Hessian alone."""
  w, done = (x if isinstance(x, jax.Array) else x.materialize() for x in (before, after))
  lost, whole = (output_energy(e.astype(jnp.float32), hessian) for e in (w - done, w))
  return jnp.sqrt(jnp.maximum(lost, 0.0) / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny))
