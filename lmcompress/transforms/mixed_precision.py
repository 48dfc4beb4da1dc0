"""Mixed precision: how many bits each weight gets under a budget, by what its output would lose."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.arrays import fetch
from lmcompress.ops.rounding import Rounding
from lmcompress.ops.second_order import output_energy
from lmcompress.transforms.awq import round_clipped
from lmcompress.transforms.combine import by_stage, partition, require_dense
from lmcompress.transforms.gptq import gptq
from lmcompress.types import Evidence, Params, State, Transform

_STATES = 1 << 22
"""Most sizes that the allocation tells apart."""


def mixed_precision(
  bits: float = 3.5,
  candidates: Sequence[int] = (2, 3, 4, 5, 6, 8),
  group_size: int = 64,
  symmetric: bool = False,
  sweeps: int = 1,
  error_propagation: float = 0.0,
) -> Transform:
  """Gives each weight the bits that lose least in all under a budget, and quantizes by `gptq` (Dong et al. 2019, HAWQ).

  What a width costs is the relative output error `||X (W - Q(W))||**2 / ||X W||**2` of plain rounding;
  the Hessian of calibration tokens tells it. Linears that read one input share a width. The allocation is exact: a
  multiple-choice knapsack by dynamic programming.

  Args:
    bits: average over the selected weights, scales and zero points counted.
    candidates: widths to choose from.
    group_size, symmetric, sweeps, error_propagation: as in `gptq`.

  Raises:
    ValueError: fewer bits than the narrowest candidate takes.
  """
  widths = sorted(set(candidates))
  if not widths or widths[0] < 2 or widths[-1] > 8:
    raise ValueError(f"mixed_precision(candidates={list(candidates)}): widths are 2 to 8")
  quantizers = {b: gptq(b, group_size, symmetric, sweeps=sweeps, error_propagation=error_propagation) for b in widths}
  stored = {b: _stored_bits(b, group_size, symmetric) for b in widths}
  if bits < stored[widths[0]]:
    raise ValueError(
      f"mixed_precision(bits={bits}): the narrowest candidate takes {stored[widths[0]]:.4g} bits, scales counted; "
      "allow as many, or a narrower one"
    )

  def init(params: Params, selected: frozenset[str] | None = None) -> State:
    chosen = tree.default_selection(params) if selected is None else selected
    for path, leaf in tree.weights(params).items():
      if path in chosen:
        require_dense("mixed_precision", path, fetch(leaf))
    return {}

  def measure(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    chosen = tree.default_selection(params) if evidence.selected is None else evidence.selected
    found = dict(state)
    for members, given in by_stage(params, chosen, evidence, frozenset({"hessian"}), "mixed_precision"):
      w = jnp.concatenate(list(members.values()), axis=1)
      losses = [float(_loss(w, given["hessian"], Rounding(b, symmetric), group_size)) for b in widths]
      found[tuple(members)] = (w.size, losses)
    return params, found

  def plan(state: Mapping[tuple[str, ...], tuple[int, list[float]]]) -> Transform:
    groups = list(state)
    sizes = [[round(state[g][0] * stored[b]) for b in widths] for g in groups]
    budget = math.floor(bits * sum(state[g][0] for g in groups))
    choice = allocate([state[g][1] for g in groups], sizes, budget)
    labels = {path: widths[i] for g, i in zip(groups, choice, strict=True) for path in g}
    used = set(labels.values())
    return partition(
      lambda path: str(labels[path]) if path in labels else None, {str(b): quantizers[b] for b in widths if b in used}
    )

  return Transform(init, measure, needs=frozenset({"hessian"}), name="mixed_precision", plan=plan)


def _stored_bits(bits: int, group_size: int, symmetric: bool) -> float:
  """Bits of an entry with its share of a 16-bit scale and a zero point; rows count as groups of their own length."""
  return bits + (0 if group_size == -1 else (16 + (0 if symmetric else bits)) / group_size)


@functools.partial(jax.jit, static_argnames=("rounding", "group_size"))
def _loss(w: jax.Array, hessian: jax.Array, rounding: Rounding, group_size: int) -> jax.Array:
  q = round_clipped(w, hessian, rounding=rounding, group_size=group_size, clip=False)
  error, w = q.materialize() - w, w.astype(jnp.float32)
  return output_energy(error, hessian) / jnp.maximum(output_energy(w, hessian), 1e-30)


def allocate(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
  """The choice for each item with the least total loss whose sizes stay within a budget, exactly.

  Dynamic programming over sizes in units of their greatest common divisor (Kellerer et al. 2004, Knapsack Problems,
  11.5); above four million units, sizes are rounded up to coarser ones, so that the budget still holds.

  Args:
    losses, sizes: `[items][choices]`; sizes are whole numbers.

  Raises:
    ValueError: even the smallest choices are larger than the budget.
  """
  least = sum(min(row) for row in sizes)
  if least > budget:
    raise ValueError(f"allocate(budget={budget}): the smallest choices take {least}")
  unit = max(math.gcd(*(size for row in sizes for size in row)), -(-budget // _STATES))
  room = budget // unit
  best, taken = np.zeros(room + 1), []
  for row, costs in zip(sizes, losses, strict=True):
    options = np.full((len(row), room + 1), np.inf)
    for i, (size, loss) in enumerate(zip(row, costs, strict=True)):
      steps = -(-size // unit)
      if steps <= room:
        options[i, steps:] = best[: room + 1 - steps] + loss
    taken.append(options.argmin(axis=0))
    best = options.min(axis=0)
  choice, left = [], room
  for row, table in zip(reversed(sizes), reversed(taken), strict=True):
    i = int(table[left])
    choice.append(i)
    left -= -(-row[i] // unit)
  return choice[::-1]
