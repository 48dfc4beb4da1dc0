"""Block by block: statistics of one block at a time, each block fed by the compressed blocks before it."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.calibration.statistics import STATISTICS
from lmcompress.types import Block, Evidence, Params, Transform, WeightError


def block_by_block(
  model: Any,
  params: Params,
  link: Transform,
  state: Any,
  evidence: Evidence,
  tokens: np.ndarray,
  progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Params, dict[str, float]]:
  """Applies a link that needs statistics to each block in turn.

  Memory is one block's statistics and the hidden streams of the rows, whatever the depth. Linears of a stage
  share their statistics.

  Args:
    tokens: `[n, length]`, run one row at a time.

  Returns:
    The tree, and seconds per weight.

  Raises:
    WeightError: the tokens are not `[n, length]`, or a statistic asked for is not finite or did not come back.
  """
  if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
    raise WeightError(f"calibration tokens are [n, length] integers; found {tokens.dtype}{list(tokens.shape)}")
  wanted = tuple(sorted(link.needs & set(STATISTICS)))
  carries = [model.start(params, row[None]) for row in tokens]
  blocks, seconds = model.blocks(params), {}
  for n, block in enumerate(blocks):
    begun = time.perf_counter()
    collected = _collect(model, block, params, carries, wanted)
    subtree = tree.unflatten(
      {path: leaf for path, leaf in tree.flatten(params).items() if path.startswith(f"{block.path}/")}
    )
    done, state = link.apply(subtree, state, dataclasses.replace(evidence, statistics=collected))
    for path, leaf in tree.flatten(done).items():
      params = tree.put(params, path, leaf)
    carries = [model.run(block, params, carry)[0] for carry in carries]
    jax.block_until_ready(carries[-1])
    elapsed = time.perf_counter() - begun
    seconds.update({path: elapsed / len(collected) for path in collected})
    if progress is not None:
      progress(link.name, n + 1, len(blocks))
  outside = {p: leaf for p, leaf in tree.flatten(params).items() if not any(p.startswith(f"{b.path}/") for b in blocks)}
  done, _ = link.apply(tree.unflatten(outside), state, evidence)  # refuses a weight that has no statistics
  for path, leaf in tree.flatten(done).items():
    params = tree.put(params, path, leaf)
  return params, seconds


def _collect(
  model: Any, block: Block, params: Params, carries: list[Any], wanted: tuple[str, ...]
) -> dict[str, dict[str, jax.Array]]:
  """Statistics by weight path, from one run of the block over all rows."""
  taps = tuple(stage.name for stage in block.stages)
  states: dict[str, Any] = {}
  count = 0
  for carry in carries:
    _, inputs = model.run(block, params, carry, taps)
    for name in taps:
      if inputs.get(name) is None:
        raise WeightError(
          f"{block.path}: stage {name!r} returned no input; the model must tap every stage it publishes"
        )
      states[name] = _update(wanted, states.get(name), inputs[name])
    count += inputs[taps[0]].shape[0] * inputs[taps[0]].shape[1]
  found = {}
  for stage in block.stages:
    values = {w: STATISTICS[w].finish(s, jnp.float32(count)) for w, s in zip(wanted, states[stage.name], strict=True)}
    for name, value in values.items():
      if not bool(jnp.all(jnp.isfinite(value))):
        raise WeightError(
          f"{name} of {block.path}/{stage.linears[0]} is not finite: the calibration text drives the model to infinity"
        )
    for linear in stage.linears:
      found[f"{block.path}/{linear}/kernel"] = values
  return found


@functools.partial(jax.jit, static_argnames=("wanted",))
def _update(wanted: tuple[str, ...], states: Any, x: jax.Array) -> Any:
  rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  real = jnp.ones(rows.shape[0], bool)
  states = tuple(STATISTICS[w].init(rows.shape[1]) for w in wanted) if states is None else states
  return tuple(STATISTICS[w].update(s, rows, real) for w, s in zip(wanted, states, strict=True))
