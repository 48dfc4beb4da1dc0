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
  A norm over fewer channels subtracts another mean and divides by another deviation: its scale and bias make up for
  that on average, where the structure says which linears it feeds (a norm behind a part stays as it is). Tables that
  are tied stay so, but for a head that reads another axis than the stream.

  Args:
    fraction: of the channels, rounded. Or:
    count: channels.
    multiple: as many channels stay as make a multiple of this; fewer go.
    compensate: see above.

  Raises:
    ValueError: not exactly one of fraction and count, or out of range.
    WeightError (when planned): a weight is compressed or not selected, no channel would be left, or by rounding none
      would go.
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
    return {}

  def measure(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    found = dict(state)
    for path, linears in _reading(evidence.structure, params):
      readers = [tree.get(params, linear) for linear in linears]
      known = (evidence.statistics or {})[linears[0]]
      norm = {leaf: tree.get(params, f"{path}/{leaf}") for leaf in ("scale", "bias")}
      found[path] = _energy(known["second_moment"], known["mean"], readers, norm["scale"], norm["bias"])
    if found and (head := _head(evidence.structure, params, list(found.values())[-1])) is not None:
      found["head"] = head
    return params, found

  def plan(state: Mapping[str, Energy]) -> Transform:
    keep = functools.partial(_keep, state, fraction, count, multiple)
    return chain(_take_over(state, keep), _narrow(state, keep)) if compensate else _narrow(state, keep)

  needs = frozenset({"second_moment", "mean"})
  return Transform(init, measure, needs, scope="block", name="prune_width", plan=plan, inputs=True)


class Energy(NamedTuple):
  """What a norm, or the stream itself, gives the linears that read it, by channel `[channels]`.

  Attributes:
    read: of what the linears get, in shares that add up to 1.
    normal: the mean square of the normalized stream; ones where no norm is known.
    mean: the mean of the normalized stream; zeros under a norm that subtracts none.
  """

  read: np.ndarray
  normal: np.ndarray
  mean: np.ndarray


def _reading(model: Any, params: Params) -> list[tuple[str, list[str]]]:
  """What gives linears the hidden stream, and their paths: a norm, or where none is known a stage's name.

  A linear that several stages name, as those of experts, is counted with the first.
  """
  found, seen, stream = [], set[str](), stream_norms("prune_width", model, params)[0]
  for block in model.blocks(params):
    for stage in block.stages:
      linears = [f"{block.path}/{linear}/kernel" for linear in stage.readers]
      if seen.intersection(linears) or tree.get(params, linears[0]) is None:
        continue
      if tree.axes_of(model.axes, linears[0])[-2:-1] == (stream,):
        seen.update(linears)
        norm = f"{block.path}/{stage.source}"
        known = bool(stage.source) and tree.get(params, f"{norm}/scale") is not None
        found.append((norm if known else f"{block.path}/{stage.name}", linears))
  return found


@jax.jit
def _square_rows(w: jax.Array) -> jax.Array:
  return jnp.sum(jnp.square(w.astype(jnp.float32)), axis=1)


def _energy(moment: jax.Array, mean: jax.Array, readers: Sequence[Any], scale: Any, bias: Any) -> Energy:
  second, first = (np.asarray(x, np.float64) for x in (moment, mean))
  read = second * np.asarray(sum(_square_rows(parts.materialize(w)) for w in readers), np.float64)
  read = read / max(read.sum(), 1e-300)
  if scale is None:
    return Energy(read, np.ones_like(second), np.zeros_like(second))
  gain = np.asarray(scale, np.float64)
  known, gain = gain != 0, np.where(gain == 0, 1.0, gain)
  shift = np.zeros_like(gain) if bias is None else np.asarray(bias, np.float64)
  normal: np.ndarray = _completed((second - 2 * shift * first + shift**2) / gain**2, known, float(gain.size))
  middle: np.ndarray = np.zeros_like(gain) if bias is None else _completed((first - shift) / gain, known, 0.0)
  return Energy(read, np.clip(normal, 0.0, None), middle)


def _completed(values: np.ndarray, known: np.ndarray, total: float) -> np.ndarray:
  """Channels under a scale of 0, of which nothing is seen, share what is missing from the total of all.

  Without any, the epsilon of the norm is what is missing, and all share it.
  """
  if known.all():
    return values * (total / max(values.sum(), 1e-300)) if total else values
  rest: float = total - values[known].sum()
  values = values.copy()
  values[~known] = rest / np.count_nonzero(~known)
  return values


def _head(model: Any, params: Params, last: Energy) -> Energy | None:
  """The head as a reader, of a stream like the last norm's; None in a tree without one, or whose head reads another."""
  stream, norms = stream_norms("prune_width", model, params)
  if "embed" not in params or (tree.axes_of(model.axes, "head/table") or (stream,))[-1] != stream:
    return None
  table = params["head" if "head" in params else "embed"]["table"]
  single = [tree.get(params, f"{path}/scale") for path in norms]
  gain = np.square(np.asarray(single[0], np.float64)) if len(single) == 1 else 1.0
  read = last.normal * gain * np.asarray(_square_rows(parts.materialize(table).T), np.float64)
  return Energy(read / max(read.sum(), 1e-300), last.normal, last.mean)


def _keep(
  state: Mapping[str, Energy], fraction: float | None, count: int | None, multiple: int, params: Params
) -> np.ndarray:
  """The channels that stay, ascending; the head counts as much as all the blocks' readers together."""
  if not state:
    raise WeightError("prune_width: no stage of the model reads its stream; its structure does not tell what to narrow")
  blocks = [energy.read for path, energy in state.items() if path != "head"]
  score = np.mean(blocks, axis=0) + (state["head"].read if "head" in state else 0.0)
  n = score.size
  left = n - (count if count is not None else round(n * (fraction or 0.0)))
  left = min(n, math.ceil(left / multiple) * multiple)
  asked = f"count={count}" if count is not None else f"fraction={fraction}"
  if left == n and (fraction or count):
    raise WeightError(
      f"prune_width({asked}, multiple={multiple}): of {n} channels none would go, by rounding; "
      f"ask for {multiple} or more"
    )
  if left < 1:
    raise WeightError(f"prune_width({asked}): the stream has {n} channels, and at least one stays")
  return np.sort(np.argsort(-score, kind="stable")[:left])


Keep = Callable[[Params], np.ndarray]


def _take_over(state: Mapping[str, Energy], keep: Keep) -> Transform:
  """Moves what readers of norms get from channels that will go to those that stay; nothing is removed yet."""

  def apply(params: Params, planned: State, evidence: Evidence) -> tuple[Params, State]:
    stays = np.zeros(next(iter(state.values())).read.size, bool)
    stays[planned] = True
    for _, linears in _reading(evidence.structure, params):
      for path in linears:
        leaf = tree.get(params, path)
        moved = compensated(parts.materialize(leaf), (evidence.statistics or {})[path]["hessian"], jnp.asarray(stays))
        params = tree.put(params, path, with_values(leaf, moved))
    return params, planned

  needs = frozenset({"hessian"})
  return Transform(lambda params, selected=None: keep(params), apply, needs, scope="block", name="prune_width")


def _untied(model: Any, params: Params, axis: str) -> Params:
  """The tree with a table of its own for a head that reads another axis than the stream from the embedding's table."""
  head = tree.axes_of(model.axes, "head/table")[-1:]
  reads = any(tree.axes_of(model.axes, path)[-1:] == head for path in tree.flatten(params))
  if not head or head == (axis,) or "head" in params or not reads:
    return params
  return tree.put(params, "head/table", params["embed"]["table"])


def _narrow(state: Mapping[str, Energy], keep: Keep) -> Transform:
  """Removes the channels everywhere, and rescales norms."""

  def apply(params: Params, planned: State, evidence: Evidence) -> tuple[Params, State]:
    model, last = evidence.structure, list(state.values())[-1]
    if len(planned) == last.read.size:
      return params, planned
    axis, norms = stream_norms("prune_width", model, params)
    params = remaining(model, _untied(model, params, axis), axis, planned)
    within = tuple(f"{block.path}/" for block in model.blocks(params))
    for path in norms:
      if path not in state and path.startswith(within):
        continue  # it stands behind a part
      energy = state.get(path, last)
      shift = float(energy.mean[planned].mean())
      deviation = math.sqrt(max(float(energy.normal[planned].mean()) - shift**2, 0.0))
      scale, bias = (tree.get(params, f"{path}/{leaf}") for leaf in ("scale", "bias"))
      params = tree.put(params, f"{path}/scale", (scale * deviation).astype(scale.dtype))
      if bias is not None:
        params = tree.put(params, f"{path}/bias", (bias + scale * shift).astype(bias.dtype))
    return params, planned

  return Transform(lambda params, selected=None: keep(params), apply, scope="model", name="prune_width")
