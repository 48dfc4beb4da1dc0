"""Removing entries of a block's own axis, neurons or heads, from every weight that has it; what reads them makes up."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.arrays import parts
from lmcompress.transforms.structure import (
  Place,
  extents,
  local_axes,
  places,
  remaining,
  require_removable,
  with_values,
)
from lmcompress.types import Block, Evidence, Params, State, Transform, WeightError

Score = Literal["activation", "magnitude", "taylor", "gradient"]
NEEDS: Mapping[str, frozenset[str]] = {
  "activation": frozenset({"hessian"}),
  "magnitude": frozenset(),
  "taylor": frozenset({"grads"}),
  "gradient": frozenset({"grads"}),
}


def prune_entries(
  name: str,
  words: str,
  find: Callable[[Mapping[str, Place]], list[str]],
  *,
  axis: str | None,
  fraction: float | None,
  count: int | None,
  score: str,
  scope: str,
  compensate: bool,
) -> Transform:
  """The transform of `prune_neurons` and `prune_heads`: removes entries of an axis of each block.

  A fraction that is less than half an entry of a block is refused: nothing would be removed.

  Args:
    words: what an entry is called.
    find: picks axes among a block's own, with the first place of each; all of them lose entries (a decoder that looks
      at an encoder has heads of two kinds); `axis` says another.
    axis, fraction, count, score, scope, compensate: as in `prune_neurons`.
  """
  if (fraction is None) == (count is None):
    raise ValueError(f"{name}(fraction={fraction}, count={count}): give exactly one of the two")
  if fraction is not None and not 0 <= fraction < 1:
    raise ValueError(f"{name}(fraction={fraction}): a fraction from 0 to below 1; all {words} cannot go")
  if count is not None and count < 0:
    raise ValueError(f"{name}(count={count}): not negative")
  if score not in NEEDS or scope not in ("block", "global"):
    raise ValueError(f"{name}(score={score!r}, scope={scope!r}): scores are {', '.join(NEEDS)}; scopes block, global")
  if scope == "global" and fraction is None:
    raise ValueError(f"{name}(scope='global') takes a fraction")

  def axes_of(model: Any, params: Params, block: Block) -> list[str]:
    axes = local_axes(model, params, block.path)
    if axis is None:
      if found := find(axes):
        return found
      others = f"; of its others, {sorted(axes)}, say one with axis=" if axes else ""
      raise WeightError(f"{name} at {block.path}: it has no axis of its own whose entries are {words}{others}")
    if axis not in axes:
      raise WeightError(f"{name}(axis={axis!r}) at {block.path}: its own axes are {sorted(axes)}")
    return [axis]

  def chosen(params: Params, evidence: Evidence) -> list[tuple[Block, str, list[Place]]]:
    """Blocks to prune: those of which the selection names weights with the axis."""
    model, found = evidence.structure, []
    pairs = [(b, mine) for b in model.blocks(params) if b.stages for mine in axes_of(model, params, b)]
    for block, mine in pairs:
      where = places(model, params, mine, block.path)
      weights = [p.path for p in where if tree.is_weight(p.path)]
      selected = [p for p in weights if evidence.selected is None or p in evidence.selected]
      if selected and len(selected) < len(weights):
        left = min(set(weights) - set(selected))
        raise WeightError(f"{name} at {selected[0]}: {left} has the same {words} and is not selected")
      if selected:
        require_removable(name, params, where)
        found.append((block, mine, where))
    return found

  def scores(params: Params, evidence: Evidence, block: Block, mine: str, where: list[Place]) -> np.ndarray:
    """`[*outer, entries]`, float64."""
    sizes = extents(evidence.structure, params, block.path)
    counted = [p for p in where if tree.is_weight(p.path) and (score != "activation" or p.reads)]
    total = sum((entry_scores(score, evidence, params, place, mine, sizes) for place in counted), jnp.zeros(()))
    found = np.asarray(jnp.square(total) if score == "taylor" else total, np.float64)
    if not np.isfinite(found).all():
      raise WeightError(f"{name} at {block.path}: scores are not finite")
    return found

  def remove(params: Params, evidence: Evidence, part: Any, found: np.ndarray, gone: int) -> Params:
    block, mine, where = part
    n = found.shape[-1]
    if gone >= n:
      raise WeightError(f"{name} at {block.path}: {gone} of {n} {words} would go; leave at least one")
    if not gone:
      return params
    keep = np.sort(np.argsort(-found, axis=-1, kind="stable")[..., : n - gone], axis=-1)
    return _without(evidence, params, block, mine, where, keep, compensate)

  def each(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    for part in chosen(params, evidence):
      found = scores(params, evidence, *part)
      n = found.shape[-1]
      gone = count if count is not None else round(n * (fraction or 0.0))
      if fraction and not gone:
        raise WeightError(
          f"{name}(fraction={fraction}) at {part[0].path}: of {n} {words} that is less than half of one, and none "
          f"would go; give a fraction above {0.5 / n:.3g}, or a count"
        )
      params = remove(params, evidence, part, found, gone)
    return params, state

  def key(part: Any) -> str:
    return f"{part[0].path} {part[1]}"

  def measure(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    return params, {**state, **{key(part): scores(params, evidence, *part) for part in chosen(params, evidence)}}

  def plan(state: Mapping[str, np.ndarray]) -> Transform:
    counts = global_counts({path: s / max(float(s.sum()), 1e-300) for path, s in state.items()}, fraction or 0.0)
    if fraction and state and not any(counts.values()):
      total = sum(s.size for s in state.values())
      raise WeightError(
        f"{name}(fraction={fraction}, scope='global'): of {total} {words} none would go; give a fraction above "
        f"{0.5 / total:.3g}"
      )

    def planned(params: Params, _: State, evidence: Evidence) -> tuple[Params, State]:
      for part in chosen(params, evidence):
        params = remove(params, evidence, part, state[key(part)], counts[key(part)])
      return params, _

    return transform(planned, frozenset({"hessian"}) if compensate else frozenset())

  def transform(apply: Any, needs: frozenset[str], **more: Any) -> Transform:
    driven = "block" if "hessian" in needs else "model"
    return Transform(lambda params, selected=None: {}, apply, needs, scope=driven, name=name, **more)

  if scope == "global":
    return transform(measure, NEEDS[score], plan=plan)
  return transform(each, NEEDS[score] | (frozenset({"hessian"}) if compensate else frozenset()))


def global_counts(shares: Mapping[str, np.ndarray], fraction: float) -> dict[str, int]:
  """How many entries of each axis go, if all are ranked together and one of each stays."""
  ranked = sorted(
    (float(value), path) for path, values in shares.items() for value in np.sort(values.reshape(-1))[:-1]
  )
  gone = dict.fromkeys(shares, 0)
  for _, path in ranked[: round(fraction * sum(v.size for v in shares.values()))]:
    gone[path] += 1
  return gone


def entry_scores(
  score: str, evidence: Evidence, params: Params, place: Place, axis: str, sizes: Mapping[str, int]
) -> jax.Array:
  """`[*outer, entries]` of one place, as of `prune_neurons`; sums over places are squared for `taylor`."""
  leaf = tree.get(params, place.path)
  at = place.names.index(axis)
  outer = math.prod(sizes[n] for n in place.names[:at])
  shape = [sizes[n] for n in place.names[: at + 1]]
  shape = shape if len(shape) > 1 and outer > 1 else shape[-1:]
  entries = outer * sizes[axis]
  w = jnp.moveaxis(parts.materialize(leaf).astype(jnp.float32), place.dim, 0).reshape(entries, -1)
  if score == "magnitude":
    return jnp.sum(w * w, axis=1).reshape(shape)
  if score == "activation":
    found = (evidence.statistics or {}).get(place.path, {}).get("hessian")
    if found is None:
      raise WeightError(f"score 'activation' at {place.path} needs its Hessian, from calibration tokens")
    return _energy(parts.materialize(leaf), found, entries).reshape(shape)
  g = tree.get(evidence.grads or {}, place.path)
  if g is None:
    raise WeightError(f"score {score!r} at {place.path} needs gradients")
  product = w * jnp.moveaxis(g.astype(jnp.float32), place.dim, 0).reshape(entries, -1)
  return jnp.sum(product if score == "taylor" else jnp.abs(product), axis=1).reshape(shape)


@functools.partial(jax.jit, static_argnames=("entries",))
def _energy(w: jax.Array, hessian: jax.Array, entries: int) -> jax.Array:
  """`tr(W_e^T H_ee W_e)` for each entry e of some consecutive inputs of `w: [in, out]`."""
  inner = w.shape[0] // entries
  parts = w.astype(jnp.float32).reshape(entries, inner, -1)
  index = jnp.arange(entries)
  own = hessian.reshape(entries, inner, entries, inner)[index, :, index, :]
  return jnp.einsum("eio,eij,ejo->e", parts, own, parts)


def _without(
  evidence: Evidence, params: Params, block: Block, axis: str, where: list[Place], keep: np.ndarray, compensate: bool
) -> Params:
  """Removes the entries, after what reads them has taken over what they gave."""
  model = evidence.structure
  if compensate:
    sizes = extents(model, params, block.path)
    mark = np.zeros((*keep.shape[:-1], sizes[axis]), bool)
    np.put_along_axis(mark, keep, True, axis=-1)
    for place in (p for p in where if p.reads):
      at = place.names.index(axis)
      inner = math.prod(sizes[n] for n in place.names[at + 1 :])
      outer = math.prod(sizes[n] for n in place.names[:at])
      stays = np.repeat(np.broadcast_to(mark.reshape(-1, sizes[axis]), (outer, sizes[axis])), inner, axis=-1)
      leaf, hessian = tree.get(params, place.path), (evidence.statistics or {})[place.path]["hessian"]
      moved = compensated(parts.materialize(leaf), hessian, jnp.asarray(stays.reshape(-1)))
      params = tree.put(params, place.path, with_values(leaf, moved))
  return remaining(model, params, axis, keep, block.path)


@jax.jit
def compensated(w: jax.Array, hessian: jax.Array, stays: jax.Array, damping: float = 0.01) -> jax.Array:
  """`w: [in, out]` with the inputs that go at 0 and the others at the least `||X (W - W')||` (damped).

  Solves `H_SS D = H_SR W_R` for the inputs S that stay, without moving any shape.
  """
  both = stays[:, None] & stays
  d = damping * jnp.mean(jnp.diag(hessian))
  system = jnp.where(both, hessian, 0.0) + jnp.diag(jnp.where(stays, jnp.maximum(d, 1e-30), 1.0))
  lost = jnp.where(stays[:, None], 0.0, w.astype(jnp.float32))
  right = jnp.where(stays[:, None], jnp.matmul(hessian, lost), 0.0)
  change = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(system), True), right)
  change = jnp.where(jnp.all(jnp.isfinite(change)), change, 0.0)
  return jnp.where(stays[:, None], w + change, 0.0)
