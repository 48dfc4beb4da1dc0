"""Narrowing the hidden stream: channels removed from all that reads or writes it, norms and embedding included."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.arrays import parts
from lmcompress.transforms.combine import chain, require_dense
from lmcompress.transforms.prune_entries import compensated
from lmcompress.transforms.structure import remaining, stream_norms, with_values
from lmcompress.types import Evidence, Params, State, Transform, WeightError


def prune_width(
  fraction: float | None = None, count: int | None = None, multiple: int = 1, compensate: bool = True
) -> Transform:
  """Removes channels of the hidden stream from the whole model (Muralidharan et al. 2024, Minitron, arXiv:2407.14679).

  A channel's score is the energy that the linears behind norms and the head get from it on calibration tokens, each
  stage's as a share of its whole. What reads the stream first takes over what those channels gave, by least squares.
  A norm over fewer channels divides by another root mean square: its scale makes up for that on average. Tables that
  are tied stay so.

  Args:
    fraction: of the channels, rounded. Or:
    count: channels.
    multiple: as many channels stay as make a multiple of this; fewer go.
    compensate: see above.

  Raises:
    ValueError: not exactly one of fraction and count, or out of range.
    WeightError (when planned): a weight is compressed or not selected, or no channel would be left.
  """
  if (fraction is None) == (count is None):
    raise ValueError(f"prune_width(fraction={fraction}, count={count}): give exactly one of the two")
  if (fraction is not None and not 0 <= fraction < 1) or (count or 0) < 0 or multiple < 1:
    raise ValueError(
      f"prune_width(fraction={fraction}, count={count}, multiple={multiple}): a fraction from 0 to below 1, a count "
      "from 0, a multiple from 1"
    )

  def init(params: Params, selected: frozenset[str] | None = None) -> State:
    if selected is not None and (left := tree.default_selection(params) - selected):
      raise WeightError(f"prune_width narrows the whole model; {min(left)} is not selected, leave the pattern out")
    for path, leaf in tree.weights(params).items():
      require_dense("prune_width", path, leaf)
    for path in tree.flatten(params):
      if path.endswith("/scale") and tree.get(params, path.replace("/scale", "/bias")) is not None:
        raise WeightError(f"prune_width at {path}: this norm subtracts a mean, which a narrower stream would move")
    return {}

  def measure(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    model, found = evidence.structure, dict(state)
    for block in model.blocks(params):
      for stage in block.stages:
        scale = tree.get(params, f"{block.path}/{stage.source}/scale")
        paths = [f"{block.path}/{linear}/kernel" for linear in stage.readers]
        if scale is None or tree.get(params, paths[0]) is None:
          continue
        moment = (evidence.statistics or {})[paths[0]]["second_moment"]
        found[f"{block.path}/{stage.source}"] = _energy(moment, [tree.get(params, path) for path in paths], scale)
    return params, found

  def plan(state: Mapping[str, Energy]) -> Transform:
    keep = functools.partial(_keep, state, fraction, count, multiple)
    return chain(_take_over(state, keep), _narrow(state, keep)) if compensate else _narrow(state, keep)

  needs = frozenset({"second_moment"})
  return Transform(init, measure, needs, scope="block", name="prune_width", plan=plan)


class Energy(NamedTuple):
  """What a norm gives, by channel `[channels]`, in shares that add up to 1.

  Attributes:
    read: of what the linears behind it get.
    normal: of the stream that it scales.
  """

  read: np.ndarray
  normal: np.ndarray


@jax.jit
def _square_rows(w: jax.Array) -> jax.Array:
  return jnp.sum(jnp.square(w.astype(jnp.float32)), axis=1)


def _energy(moment: jax.Array, readers: Sequence[Any], scale: jax.Array) -> Energy:
  read = np.asarray(moment * sum(_square_rows(parts.materialize(w)) for w in readers), np.float64)
  gain = np.square(np.asarray(scale, np.float64))
  normal = np.asarray(moment, np.float64) / np.where(gain > 0, gain, 1.0)
  return Energy(read / max(read.sum(), 1e-300), normal / max(normal.sum(), 1e-300))


def _keep(
  state: Mapping[str, Energy], fraction: float | None, count: int | None, multiple: int, params: Params
) -> np.ndarray:
  """The channels that stay, ascending; the head is one more reader, of the last norm."""
  if not state:
    raise WeightError("prune_width: no norm feeds a stage of the model; its structure does not tell what to narrow")
  score = np.mean([energy.read for energy in state.values()], axis=0)
  scales = {path: leaf for path, leaf in tree.flatten(params).items() if path.endswith("/scale")}
  last = [path for path, x in scales.items() if path.removesuffix("/scale") not in state and x.size == score.size]
  table = params["head"]["table"] if "head" in params else params["embed"]["table"]
  gain = np.square(np.asarray(tree.get(params, last[0]), np.float64)) if len(last) == 1 else 1.0
  head = list(state.values())[-1].normal * gain * np.asarray(_square_rows(parts.materialize(table).T), np.float64)
  score = score + head / max(head.sum(), 1e-300)
  n = score.size
  left = n - (count if count is not None else round(n * (fraction or 0.0)))
  left = min(n, math.ceil(left / multiple) * multiple)
  if left < 1:
    asked = f"count={count}" if count is not None else f"fraction={fraction}"
    raise WeightError(f"prune_width({asked}): the stream has {n} channels, and at least one stays")
  return np.sort(np.argsort(-score, kind="stable")[:left])


Keep = Callable[[Params], np.ndarray]


def _take_over(state: Mapping[str, Energy], keep: Keep) -> Transform:
  """Moves what readers of norms get from channels that will go to those that stay; nothing is removed yet."""

  def apply(params: Params, planned: State, evidence: Evidence) -> tuple[Params, State]:
    stays = np.zeros(next(iter(state.values())).read.size, bool)
    stays[planned] = True
    for block in evidence.structure.blocks(params):
      for stage in block.stages:
        paths = [f"{block.path}/{linear}/kernel" for linear in stage.readers]
        for path in paths if f"{block.path}/{stage.source}" in state else ():
          leaf = tree.get(params, path)
          moved = compensated(parts.materialize(leaf), (evidence.statistics or {})[path]["hessian"], jnp.asarray(stays))
          params = tree.put(params, path, with_values(leaf, moved))
    return params, planned

  needs = frozenset({"hessian"})
  return Transform(lambda params, selected=None: keep(params), apply, needs, scope="block", name="prune_width")


def _narrow(state: Mapping[str, Energy], keep: Keep) -> Transform:
  """Removes the channels everywhere, and rescales norms."""

  def apply(params: Params, planned: State, evidence: Evidence) -> tuple[Params, State]:
    model, n = evidence.structure, next(iter(state.values())).read.size
    shares = {path: float(energy.normal[planned].sum()) for path, energy in state.items()}
    axis, norms = stream_norms("prune_width", model, params)
    params = remaining(model, params, axis, planned)
    for path in norms:
      share, scale = shares.get(path, list(shares.values())[-1]), tree.get(params, f"{path}/scale")
      params = tree.put(params, f"{path}/scale", (scale * math.sqrt(share * n / len(planned))).astype(scale.dtype))
    return params, planned

  return Transform(lambda params, selected=None: keep(params), apply, scope="model", name="prune_width")
