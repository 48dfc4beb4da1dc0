"""Removing entries of a block's own axis, neurons or heads, from every weight that has it; what reads them makes up."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.transforms.structure import (
  Place,
  as_dense,
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


def prune_neurons(
  fraction: float | None = None,
  count: int | None = None,
  score: Score = "activation",
  scope: Literal["block", "global"] = "block",
  compensate: bool = True,
  axis: str | None = None,
) -> Transform:
  """Removes hidden neurons of the feed-forward parts: columns of what writes them and rows of what reads them.

  The model gets smaller arrays, and runs as any other. Scores of a neuron: `activation` is the energy of what it adds
  to the output on calibration tokens, `E[h**2] ||w||**2`; `magnitude` the squares of its weights; `taylor` what the
  loss changes to first order when it goes, `(sum g w)**2`; `gradient` `sum |g w|` (Molchanov et al. 2019,
  arXiv:1906.10771).

  Args:
    fraction: of the neurons of each block (or of all, with `scope="global"`), rounded. Or:
    count: neurons of each block.
    score: which go first.
    scope: `global` ranks all blocks' neurons together, by their share of the block's score, so that widths differ.
    compensate: the weights that read what stays are moved to the least squares solution for what went (Frantar and
      Alistarh 2022, arXiv:2208.11580); needs calibration tokens.
    axis: the logical axis, where the model has more than one that is not within heads.

  Raises:
    ValueError: not exactly one of fraction and count, or out of range.
    WeightError (when planned): the axis is not there, a weight is compressed or not selected, or none would be left.
  """

  def find(axes: Mapping[str, Place]) -> list[str]:
    return [name for name, place in axes.items() if place.names == (name,)]

  return prune_entries("prune_neurons", "neurons", axis, find, fraction, count, score, scope, compensate)


def prune_heads(
  fraction: float | None = None,
  count: int | None = None,
  what: Literal["groups", "queries"] = "groups",
  score: Score = "activation",
  scope: Literal["block", "global"] = "block",
  compensate: bool = True,
  axis: str | None = None,
) -> Transform:
  """Removes attention heads: whole groups of queries with their key and value, or as many queries of each group.

  Scores and compensation as for `prune_neurons`: a head's `activation` is the energy of what it adds to the output,
  `tr(W_o^T E[x x^T] W_o)` over its inputs (Michel et al. 2019, arXiv:1905.10650, ask the same of the loss).

  Args:
    fraction: of the groups of each block (of the queries of each group), rounded; with `scope="global"` of all. Or:
    count: groups of each block, or queries of each group.
    what: `groups`, or `queries`, where several of them share a key and value.
    score, scope, compensate: as in `prune_neurons`; queries are as many in each group, so their scope is `block`.
    axis: the logical axis, where the structure does not tell.

  Raises:
    ValueError: not exactly one of fraction and count, or out of range.
    WeightError (when planned): the axis is not there, a weight is compressed or not selected, or none would be left.
  """
  if what not in ("groups", "queries"):
    raise ValueError(f"prune_heads(what={what!r}): groups or queries")
  if what == "queries" and scope == "global":
    raise ValueError("prune_heads(what='queries', scope='global'): each group keeps as many queries; use scope='block'")

  def find(axes: Mapping[str, Place]) -> list[str]:
    depth = 0 if what == "groups" else 1
    return [name for name, p in axes.items() if len(p.names) > 1 and p.names[depth] == name]

  return prune_entries("prune_heads", what, axis, find, fraction, count, score, scope, compensate)


class Scores(NamedTuple):
  """Of one block: how much each entry counts, `[*outer, entries]`, and the share of the whole that it is."""

  values: np.ndarray

  @property
  def shares(self) -> np.ndarray:
    return self.values / max(float(self.values.sum()), 1e-30)


def prune_entries(
  name: str,
  words: str,
  axis: str | None,
  find: Any,
  fraction: float | None,
  count: int | None,
  score: str,
  scope: str,
  compensate: bool,
  counts: Mapping[str, int] | None = None,
) -> Transform:
  """The transform of `prune_neurons` and `prune_heads`: removes entries of an axis of each block.

  Args:
    words: what an entry is called.
    axis: its name; else `find` picks it among the block's own axes.
    counts: by block path, how many go; else fraction or count.
  """
  if counts is None and (fraction is None) == (count is None):
    raise ValueError(f"{name}(fraction={fraction}, count={count}): give exactly one of the two")
  if fraction is not None and not 0 <= fraction < 1:
    raise ValueError(f"{name}(fraction={fraction}): a fraction from 0 to below 1; all {words} cannot go")
  if count is not None and count < 0:
    raise ValueError(f"{name}(count={count}): not negative")
  if score not in NEEDS or scope not in ("block", "global"):
    raise ValueError(f"{name}(score={score!r}, scope={scope!r}): scores are {', '.join(NEEDS)}; scopes block, global")
  if scope == "global" and fraction is None:
    raise ValueError(f"{name}(scope='global') takes a fraction")
  needs = NEEDS[score] | (frozenset({"hessian"}) if compensate else frozenset())

  def axis_of(model: Any, params: Params, block: Block) -> str:
    axes = local_axes(model, params, block.path)
    if axis is None:
      found = find(axes)
      if len(found) == 1:
        return found[0]
      raise WeightError(f"{name} at {block.path}: axes {sorted(axes)} may be meant; say which, with axis=")
    if axis not in axes:
      raise WeightError(f"{name}(axis={axis!r}) at {block.path}: its own axes are {sorted(axes)}")
    return axis

  def chosen(params: Params, evidence: Evidence) -> list[tuple[Block, str, list[Place]]]:
    """Blocks to prune: those of which the selection names weights with the axis."""
    model, found = evidence.structure, []
    for block in model.blocks(params):
      mine = axis_of(model, params, block)
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

  def scores(params: Params, evidence: Evidence, block: Block, mine: str, where: list[Place]) -> Scores:
    sizes = extents(evidence.structure, params, block.path)
    total = 0.0
    for place in where:
      if not tree.is_weight(place.path) or (score == "activation" and not place.reads):
        continue
      total = total + _score(score, evidence, params, place, mine, sizes)
    return Scores(np.asarray(jnp.square(total) if score == "taylor" else total, np.float64))

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    for block, mine, where in chosen(params, evidence):
      s = scores(params, evidence, block, mine, where).values
      n = s.shape[-1]
      gone = counts.get(block.path, 0) if counts is not None else count if count is not None else round(n * fraction)
      if gone >= n:
        raise WeightError(f"{name} at {block.path}: {gone} of {n} {words} would go; leave at least one")
      if not np.isfinite(s).all():
        raise WeightError(f"{name} at {block.path}: scores are not finite")
      if gone:
        keep = np.sort(np.argsort(-s, axis=-1, kind="stable")[..., : n - gone], axis=-1)
        params = _without(evidence, params, block, mine, where, keep, compensate)
    return params, state

  def measure(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    new = {block.path: scores(params, evidence, block, mine, where) for block, mine, where in chosen(params, evidence)}
    return params, {**state, **new}

  def plan(state: Mapping[str, Scores]) -> Transform:
    assert fraction is not None
    goes = global_counts({path: s.shares for path, s in state.items()}, fraction)
    return prune_entries(name, words, axis, find, None, None, score, "block", compensate, goes)

  driven = "block" if needs & {"hessian"} else "model"
  if scope == "global":
    measured = NEEDS[score]
    scope_ = "block" if "hessian" in measured else "model"
    return Transform(lambda params, selected=None: {}, measure, measured, scope=scope_, name=name, plan=plan)
  return Transform(lambda params, selected=None: (), apply, needs, scope=driven, name=name)


def global_counts(shares: Mapping[str, np.ndarray], fraction: float) -> dict[str, int]:
  """How many entries of each block go, if all are ranked together and one of each block stays."""
  ranked = sorted(
    (float(value), path) for path, values in shares.items() for value in np.sort(values.reshape(-1))[:-1]
  )
  gone = dict.fromkeys(shares, 0)
  for _, path in ranked[: round(fraction * sum(v.size for v in shares.values()))]:
    gone[path] += 1
  return gone


def _score(
  score: str, evidence: Evidence, params: Params, place: Place, axis: str, sizes: Mapping[str, int]
) -> jax.Array:
  """`[*outer, entries]` of one place."""
  leaf = tree.get(params, place.path)
  at = place.names.index(axis)
  outer = math.prod(sizes[n] for n in place.names[:at])
  shape = [sizes[n] for n in place.names[: at + 1]]
  shape = shape if len(shape) > 1 and outer > 1 else shape[-1:]
  entries = outer * sizes[axis]
  w = jnp.moveaxis(as_dense(leaf).astype(jnp.float32), place.dim, 0).reshape(entries, -1)
  if score == "magnitude":
    return jnp.sum(w * w, axis=1).reshape(shape)
  if score == "activation":
    found = (evidence.statistics or {}).get(place.path, {}).get("hessian")
    if found is None:
      raise WeightError(f"score 'activation' at {place.path} needs its Hessian, from calibration tokens")
    return _energy(as_dense(leaf), found, entries).reshape(shape)
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
      moved = compensated(as_dense(leaf), hessian, jnp.asarray(stays.reshape(-1)))
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
