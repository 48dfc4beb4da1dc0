"""Structured pruning that is learned: gates on neurons or heads, closed by a price until a target is met."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.arrays import GatedArray, gated
from lmcompress.transforms.combine import path_key
from lmcompress.transforms.schedules import cubic
from lmcompress.transforms.structure import (
  extents,
  head_axes,
  local_axes,
  neuron_axes,
  places,
  remaining,
  require_removable,
)
from lmcompress.types import Evidence, Params, State, Transform, WeightError

CLOSED, OPEN = -20.0, -1.0
"""`log_alpha` of a gate that was closed for good, and the least of one that stays."""


def hard_concrete(
  what: Literal["neurons", "heads"] = "neurons", start: float = 2.5, rate: float = 1000.0, axis: str | None = None
) -> Transform:
  """Puts gates on what reads neurons or heads (Louizos et al. 2018, arXiv:1712.01312), to be closed by `l0`.

  The weight that reads them, as `mlp/down` or `attn/o`, becomes a `GatedArray` with one gate for each neuron of its
  block, or for each group of queries with their key and value. Weights and gates then train together.

  Args:
    what: what a gate closes.
    start: `log_alpha` of all gates at first; at 2.5 one in fifty is closed by chance.
    rate: how much faster a gate's `log_alpha` moves than a weight does.
    axis: the logical axis, where the structure does not tell.

  Raises:
    ValueError: no such things to close, or numbers out of range.
    WeightError (when applied): a block has no such axis, or more than one weight reads it, or weights are compressed.
  """
  if what not in ("neurons", "heads") or not math.isfinite(start) or not 0 < rate < math.inf:
    raise ValueError(
      f"hard_concrete(what={what!r}, start={start}, rate={rate}): neurons or heads, a finite start, a rate above 0"
    )

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    model = evidence.structure
    for block in model.blocks(params):
      own = local_axes(model, params, block.path)
      mine = [axis] if axis in own else [] if axis else (neuron_axes if what == "neurons" else head_axes)(own)
      reads = [p for name in mine for p in places(model, params, name, block.path) if p.reads]
      if len(reads) != len(mine) or not mine:
        raise WeightError(
          f"hard_concrete at {block.path}: one weight that reads {axis or what} is needed, found "
          f"{', '.join(p.path for p in reads) or 'none'}; its own axes are {sorted(own)}"
        )
      for name, place in zip(mine, reads, strict=True):
        leaf = tree.get(params, place.path)
        if evidence.selected is not None and place.path not in evidence.selected:
          continue
        require_removable("hard_concrete", params, places(model, params, name, block.path))
        if leaf.ndim != 2 or place.names[0] != name:
          raise WeightError(f"hard_concrete at {place.path}: {name} is not the outermost axis of a matrix's inputs")
        runs = extents(model, params, block.path)[name]
        params = tree.put(params, place.path, gated(leaf, runs, place.dim, start, rate))
    return params, state

  return Transform(lambda params, selected=None: (), apply, scope="model", name="hard_concrete")


def l0(
  sparsity: float = 0.25,
  start: int = 0,
  end: int = 100,
  scope: Literal["global", "block"] = "global",
  gain: float = 1.0,
  damping: float = 20.0,
) -> Transform:
  """Closes gates while the model trains, until a share is closed, a `step` transform (Xia et al. 2023, Sheared LLaMA).

  Each step draws the gates anew and sets a price for being open (`GatedArray.pressure`), the multiplier of a
  constraint: the expected share that is closed follows a cubic schedule to `sparsity` (arXiv:2310.06694, equation 3,
  with the price raised by what is missing). From step `end` on the gates that are least open are closed for good,
  that share of the inputs that gates lie on, less what is no whole gate, one of each weight staying; what stays trains
  on without noise, and recovers. `remove_closed` then removes them.

  Args:
    sparsity: the share that closes.
    start, end: steps between which it rises; train for longer than `end`.
    scope: `global` compares gates of all weights, so that widths come to differ; `block` closes as many of each.
    gain: nats by which the price rises with a step in which all is missing.
    damping: nats of the price for what is missing now.

  Raises:
    ValueError: an argument is out of range.
    WeightError (when planned): no selected weight has gates, which `hard_concrete` makes, or the share is less than a
      gate's.
  """
  if not 0 < sparsity < 1 or not 0 <= start < end or scope not in ("global", "block") or gain <= 0 or damping < 0:
    raise ValueError(
      f"l0(sparsity={sparsity}, start={start}, end={end}, scope={scope!r}, gain={gain}, damping={damping}): a share "
      "between 0 and 1, 0 <= start < end, global or block, a gain above 0, no negative damping"
    )
  ramp = cubic(sparsity, start, end)

  def of(params: Params, selected: frozenset[str] | None) -> dict[str, GatedArray]:
    chosen = tree.default_selection(params) if selected is None else selected
    return {p: x for p, x in tree.weights(params).items() if p in chosen and isinstance(x, GatedArray)}

  def groups(found: dict[str, GatedArray]) -> list[list[str]]:
    return [list(found)] if scope == "global" else [[path] for path in found]

  def init(params: Params, selected: frozenset[str] | None = None) -> State:
    found = of(params, selected)
    if not found:
      raise WeightError("l0: no selected weight has gates; make them with hard_concrete()")
    for members in groups(found):
      leaves = [found[path] for path in members]
      total, least = sum(x.shape[x.axis] for x in leaves), min(x.shape[x.axis] // x.openness.size for x in leaves)
      if round(sparsity * total) < least:
        raise WeightError(
          f"l0(sparsity={sparsity}, scope={scope!r}) at {members[0]}: {round(sparsity * total)} of {total} inputs are "
          f"less than the {least} of one gate, and none would close; give a share from {least / total:.3g}"
        )
    return [jnp.zeros(()) for _ in groups(found)]

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    step, prices = jnp.asarray(evidence.step) + 1, []
    found = of(params, evidence.selected)
    for members, owed in zip(groups(found), state, strict=True):
      leaves = [found[path] for path in members]
      width = [leaf.shape[leaf.axis] / leaf.openness.size for leaf in leaves]
      total = sum(leaf.shape[leaf.axis] for leaf in leaves)
      open_ = sum(w * jnp.sum(leaf.open_chance()) for w, leaf in zip(width, leaves, strict=True)) / total
      missing = ramp(step) - (1 - open_)
      owed = jnp.maximum(owed + gain * missing, 0.0)
      price = jnp.maximum(owed + damping * missing, 0.0) / total
      closing = _closing(leaves, width, round(sparsity * total))
      for path, leaf, wide, closes in zip(members, leaves, width, closing, strict=True):
        key = path_key(evidence.key, path)  # type: ignore[arg-type]
        drawn = dataclasses.replace(
          leaf, price=jnp.full_like(leaf.price, price * wide),
          noise=jax.random.logistic(key, leaf.noise.shape, leaf.noise.dtype),
        )  # fmt: skip
        done = _settled(leaf, closes)
        after = jax.tree.map(lambda a, b: jnp.where(step > end, a, b), done, drawn)
        params = tree.put(params, path, after)
      prices.append(owed)
    return params, prices

  return Transform(init, apply, needs=frozenset({"step", "key"}), phase="step", name="l0")


def _closing(leaves: list[GatedArray], width: list[float], gone: int) -> list[jax.Array]:
  """Which gates of each weight close: the least open ones, so many that at most `gone` inputs lie behind them.

  Of gates that are as open as each other the first close. The most open one of a weight never does.
  """
  logs = [leaf.log_alpha.reshape(-1) for leaf in leaves]
  ranked = jnp.concatenate([jnp.where(jnp.arange(x.size) == jnp.argmax(x), jnp.inf, x) for x in logs])
  inputs = jnp.concatenate([jnp.full(x.size, w) for x, w in zip(logs, width, strict=True)])
  order = jnp.argsort(ranked, stable=True)
  first = (jnp.cumsum(inputs[order]) <= gone + 0.5) & jnp.isfinite(ranked[order])
  closes = jnp.zeros(ranked.size, bool).at[order].set(first)
  starts = np.cumsum([0, *(x.size for x in logs)])
  return [closes[a : a + x.size].reshape(leaf.openness.shape) for a, x, leaf in zip(starts, logs, leaves, strict=False)]


def _settled(leaf: GatedArray, closes: jax.Array) -> GatedArray:
  """Each gate closed for good, or open without noise."""
  now = jnp.where(closes, CLOSED, jnp.maximum(leaf.log_alpha, OPEN)) / leaf.rate
  return dataclasses.replace(
    leaf, openness=now.astype(leaf.openness.dtype), noise=jnp.zeros_like(leaf.noise), price=jnp.zeros_like(leaf.price)
  )


def remove_closed() -> Transform:
  """Removes the neurons and heads whose gates are closed; the other gates go into the weights that they lie on.

  The outputs stay what they were. For `finish`, after training with `l0`.

  Raises (when applied):
    WeightError: no weight has gates, gates are still being drawn (training ended before `l0` did), or a weight of the
      axis is compressed.
  """

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    model, any_ = evidence.structure, False
    for block in model.blocks(params):
      for name in local_axes(model, params, block.path):
        where = places(model, params, name, block.path)
        leaves = [(p, tree.get(params, p.path)) for p in where if p.reads and p.names[0] == name]
        for place, leaf in ((p, x) for p, x in leaves if isinstance(x, GatedArray)):
          if evidence.selected is not None and place.path not in evidence.selected:
            continue
          if bool(jnp.any(leaf.noise != 0)):
            raise WeightError(
              f"remove_closed at {place.path}: its gates are still being drawn; train for more steps than l0's end"
            )
          keep, any_ = np.flatnonzero(np.asarray(leaf.gates()).reshape(-1) > 0), True
          params = tree.put(params, place.path, leaf.materialize())
          require_removable("remove_closed", params, where)
          params = remaining(model, params, name, keep, block.path)
    if not any_:
      raise WeightError("remove_closed: no selected weight has gates; hard_concrete() makes them")
    return params, state

  return Transform(lambda params, selected=None: (), apply, scope="model", name="remove_closed")
