"""Removing whole layers: those that change the hidden stream least, cost least, or have little left in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmcompress import tree
from lmcompress.arrays import SharedRef, parts, resolve
from lmcompress.arrays.shared import SHARED
from lmcompress.ops.divergence import divergence
from lmcompress.types import Evidence, Params, State, Transform, WeightError


def prune_layers(
  count: int | None = None,
  threshold: float | None = None,
  score: Literal["influence", "kl"] = "influence",
  iterative: bool = False,
  ends: bool = False,
  tokens: int = 2048,
) -> Transform:
  """Removes layers; the others keep their names, and the model goes over those that are there.

  `influence` of a layer is `1 - E[cos(x, y)]` of the hidden stream before and after it (Men et al. 2024, ShortGPT,
  arXiv:2403.03853). `kl` is what the predictions lose without it (Song et al. 2024, SLEB, arXiv:2402.09025, by
  perplexity), a run of the model for each layer.

  Args:
    count: how many layers go. Or:
    threshold: layers go that have fewer parameters left which are not 0: below 1 a fraction of the layer's entries,
      else a number (`if layer_size < beta: remove layer`).
    score: by which `count` layers are chosen.
    iterative: removes one, scores the rest again, and so on.
    ends: also the first and the last layer may go.
    tokens: calibration tokens that scores are taken on.

  Raises:
    ValueError: not exactly one of count and threshold, or out of range.
    WeightError (when applied): no layer would be left.
  """
  if (count is None) == (threshold is None):
    raise ValueError(f"prune_layers(count={count}, threshold={threshold}): give exactly one of the two")
  if (count or 0) < 0 or not (threshold or 0) >= 0 or tokens < 2:
    raise ValueError(f"prune_layers(count={count}, threshold={threshold}, tokens={tokens}): from 0, tokens from 2")
  if score not in ("influence", "kl"):
    raise ValueError(f"prune_layers(score={score!r}): influence or kl")

  def init(params: Params, selected: frozenset[str] | None = None) -> State:
    return ()

  def candidates(model: Any, params: Params, selected: frozenset[str] | None) -> list[str]:
    blocks = _layers(model, params)
    inner = blocks if ends else blocks[1:-1]
    weights = tree.weights(params)
    return [p for p in inner if selected is None or any(w.startswith(f"{p}/") and w in selected for w in weights)]

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    model = evidence.structure
    found = candidates(model, params, evidence.selected)
    total = len(_layers(model, params))
    if threshold is not None:
      gone = [path for path in found if _left(params, path, threshold)]
      if len(gone) >= total:
        raise WeightError(f"prune_layers(threshold={threshold}): all {total} layers have less; none would be left")
      return without(params, gone), state
    assert count is not None
    if count > len(found) or count >= total:
      raise WeightError(
        f"prune_layers(count={count}): {len(found)} of {total} layers may go"
        + (", the first and the last only with ends: true" if not ends else "") + "; leave at least one"
      )  # fmt: skip
    if evidence.tokens is None:
      raise WeightError("prune_layers runs the model: pass calibration=tokens [n, length]")
    rows = max(1, -(-tokens // evidence.tokens.shape[1]))
    some = {"tokens": evidence.tokens[:rows], **{name: x[:rows] for name, x in (evidence.beside or {}).items()}}
    want = _log_probabilities(model, params, some) if score == "kl" else None
    steps = [1] * count if iterative else [count] if count else []
    for step in steps:
      costs = _influences(model, params, some) if want is None else _divergences(model, params, some, want, found)
      if lost := [path for path in found if math.isnan(costs[path])]:
        raise WeightError(
          f"prune_layers at {lost[0]}: its score is no number; a weight or the calibration text drives the model to NaN"
        )
      gone = sorted(found, key=lambda path: costs[path])[:step]
      if wide := [path for path in gone if math.isinf(costs[path])]:
        raise WeightError(f"prune_layers at {wide[0]}: it changes the width of the stream, so what follows needs it")
      params, found = without(params, gone), [path for path in found if path not in gone]
    return params, state

  needs = frozenset({"tokens"}) if threshold is None else frozenset()
  return Transform(init, apply, needs=needs, scope="model", name="prune_layers", inputs=True)


def _layers(model: Any, params: Params) -> list[str]:
  """Paths of the blocks that hold weights; one that hands over from an encoder to a decoder holds none."""
  return [block.path for block in model.blocks(params) if block.stages]


def without(params: Params, paths: list[str]) -> Params:
  """The tree without some subtrees, and without shared values that nothing refers to any more."""
  left = {
    path: leaf
    for path, leaf in tree.flatten(params).items()
    if not any(path.startswith(f"{gone}/") for gone in paths)
  }  # fmt: skip
  nodes = jax.tree.leaves(list(left.values()), is_leaf=lambda x: isinstance(x, SharedRef))
  named = {node.path for node in nodes if isinstance(node, SharedRef)}
  return tree.unflatten({p: x for p, x in left.items() if not p.startswith(f"{SHARED}/") or p in named})


def _left(params: Params, layer: str, threshold: float) -> bool:
  """Whether fewer entries of a layer than the threshold are not 0."""
  weights = tree.weights(tree.get(params, layer))
  left = sum(int(jnp.sum(parts.materialize(resolve(params, w)) != 0)) for w in weights.values())
  return left < (threshold if threshold >= 1 else threshold * sum(w.size for w in weights.values()))


def _influences(model: Any, params: Params, inputs: Mapping[str, jax.Array]) -> dict[str, float]:
  carry, found = model.start(params, inputs), {}
  for block in model.blocks(params):
    after = model.run(block, params, carry)[0]
    if not block.stages:
      carry = after
      continue
    before = dict(jax.tree.leaves_with_path(carry))  # what a block adds to the carry has nothing to be compared with
    pairs = [(before[at], y) for at, y in jax.tree.leaves_with_path(after) if at in before and before[at] is not y]
    if any(x.shape != y.shape for x, y in pairs):
      found[block.path] = math.inf  # what follows could not read what comes before
    else:
      cosines = [float(_cosine(x, y)) for x, y in pairs]
      found[block.path] = 1 - sum(cosines) / max(len(cosines), 1)  # the streams that the block wrote
    carry = after
  return found


@jax.jit
def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
  """The mean over tokens of the cosine between rows."""
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
  return jnp.mean(jnp.sum(x * y, axis=-1) / jnp.maximum(norms, 1e-30))


def _log_probabilities(model: Any, params: Params, inputs: Mapping[str, jax.Array]) -> jax.Array:
  return jax.nn.log_softmax(model.apply(params, **inputs), axis=-1)


def _divergences(
  model: Any, params: Params, inputs: Mapping[str, jax.Array], want: jax.Array, paths: list[str]
) -> dict[str, float]:
  """KL of the predictions without each layer, nats; what comes before the layer is run once."""
  blocks = model.blocks(params)
  carry, found = model.start(params, inputs), {}
  for n, block in enumerate(blocks):
    if block.path in paths:
      rest = carry
      for later in blocks[n + 1 :]:
        rest = model.run(later, params, rest)[0]
      found[block.path] = float(divergence(want, model.finish(params, rest)))
    carry = model.run(block, params, carry)[0]
  return found
