"""Which layers, heads and neurons matter to the loss, and what compression changed: by stage, by channel, by token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.arrays import resolve
from lmcompress.calibration.gradients import gradients
from lmcompress.calibration.sequential import batches_of
from lmcompress.calibration.token_loss import cross_entropy, head_loss, require_causal
from lmcompress.evaluate.perplexity import checked, log_probabilities
from lmcompress.transforms.prune_entries import entry_scores
from lmcompress.transforms.structure import extents, local_axes, places
from lmcompress.types import Evidence, Params


def explained(
  model: Any,
  params: Params,
  tokens: np.ndarray,
  tokenizer: Any,
  before: Params | None = None,
  note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
  """All of it, as `lmcompress explain` and a run's report show it: JSON values, to four digits.

  Args:
    tokens: `[n, length]`.
    before: the tree that compression began from; None leaves out what changed.
    note: told what is measured next.

  Returns:
    `layers` (as of `without_layers`), `entries`, `outliers`, and with `before` `drift` and `tokens` (of each row the
    texts of its tokens and the divergence after them).

  Raises:
    WeightError: the model predicts no next token.
  """
  short = lambda x: float(f"{x:.4g}")  # noqa: E731
  note("leaving layers out, one after the other")
  found: dict[str, Any] = {"layers": without_layers(model, params, tokens)}
  note("scoring heads and neurons by gradients")
  found["entries"] = {
    block: {axis: [short(v) for v in x.reshape(-1)] for axis, x in axes.items()}
    for block, axes in entries(model, params, tokens).items()
  }
  note("looking for outlier channels")
  found["outliers"] = outliers(model, params, tokens)
  if before is not None:
    note("comparing with the model before")
    found["drift"] = drift(model, before, params, tokens)
    kl = token_kl(model, before, params, tokens)
    found["tokens"] = [
      [[tokenizer.decode([int(t)]), short(k)] for t, k in zip(row[1:], ks, strict=True)]
      for row, ks in zip(tokens, kl, strict=True)
    ]
  return found


def without_layers(model: Any, params: Params, tokens: Any) -> dict[str, float]:
  """By block, how many nats a token the loss rises when it is left out (as Gromov et al. 2024, arXiv:2403.17887).

  A block that changes the form of what goes through it cannot be left out, and is not in it.

  Args:
    tokens: `[n, length]`, or with their mask as `compress` takes them.

  Raises:
    WeightError: the model predicts no next token.
  """
  require_causal(model, "what a layer is worth")
  blocks = model.blocks(params)
  lost, whole, counted = dict.fromkeys((block.path for block in blocks), 0.0), 0.0, 0
  for batch in batches_of(tokens):
    carries = [model.start(params, batch)]
    for block in blocks:
      carries.append(model.run(block, params, carries[-1])[0])
    total, count = _loss(model, params, carries[-1], batch)
    whole, counted = whole + float(total), counted + int(count)
    for i, block in enumerate(blocks):
      if block.path not in lost or _form(carries[i]) != _form(carries[i + 1]):
        lost.pop(block.path, None)
        continue
      carry = carries[i]
      for later in blocks[i + 1 :]:
        carry = model.run(later, params, carry)[0]
      lost[block.path] += float(_loss(model, params, carry, batch)[0])
  return {path: (total - whole) / max(counted, 1) for path, total in lost.items()}


@functools.partial(jax.jit, static_argnames=("model",))
def _loss(model: Any, params: Params, carry: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  return head_loss(model, params, carry, batch, cross_entropy, None, 64)


def _form(carry: Any) -> Any:
  return jax.tree.structure(carry), [(x.shape, x.dtype) for x in jax.tree.leaves(carry)]


def entries(model: Any, params: Params, tokens: Any) -> dict[str, dict[str, np.ndarray]]:
  """By block and axis of its own, such as key heads and neurons, what the loss changes to first order without an entry.

  `|sum g w|` over the weights that the entry has, float64 `[*outer, entries]` (Molchanov et al. 2019,
  arXiv:1906.10771); compressed weights count as the dense values that they hold.

  Raises:
    WeightError: the loss is not finite, or the model predicts no next token.
  """
  require_causal(model, "what a head or a neuron is worth")
  found = gradients(model, params, batches_of(tokens), frozenset({"grads"}))
  evidence = Evidence(structure=model, grads=found["grads"])
  params = tree.map_leaves(lambda _, leaf: resolve(params, leaf), params)  # values that the whole model shares
  scores: dict[str, dict[str, np.ndarray]] = {}
  for block in model.blocks(params):
    sizes = extents(model, params, block.path)
    for axis in local_axes(model, params, block.path):
      where = [p for p in places(model, params, axis, block.path) if tree.is_weight(p.path)]
      total = sum((entry_scores("taylor", evidence, params, p, axis, sizes) for p in where), jnp.zeros(()))
      scores.setdefault(block.path, {})[axis] = np.abs(np.asarray(total, np.float64))
  return scores


def drift(model: Any, before: Params, after: Params, tokens: Any) -> list[dict[str, Any]]:
  """How far the input of each stage is from what it was, `||x' - x|| / ||x||` over real tokens: `block, stage, change`.

  The stage after attention says how far what attention gives has drifted. Between a model and a rotation of it the
  number says nothing: the stream lies on other axes.

  Args:
    before, after: two trees of the model; blocks and stages that both have are compared.
  """
  squares: dict[tuple[str, str], np.ndarray] = {}
  shared = {block.path: block for block in model.blocks(after)}
  for batch in batches_of(tokens):
    carry = [model.start(params, batch) for params in (before, after)]
    for block in model.blocks(before):
      names = tuple(stage.name for stage in block.stages)
      other = shared.get(block.path)
      carry[0], was = model.run(block, before, carry[0], names)
      if other is None:
        continue
      carry[1], now = model.run(other, after, carry[1], tuple(stage.name for stage in other.stages))
      for stage in block.stages:
        x, y = was.get(stage.name), now.get(stage.name)
        if x is not None and y is not None and x.shape == y.shape:
          key = block.path, stage.name
          squares[key] = squares.get(key, np.zeros(2)) + np.asarray(_apart(x, y, batch[stage.mask]), np.float64)
  return [
    {"block": block, "stage": stage, "change": float(np.sqrt(apart / max(own, 1e-300)))}
    for (block, stage), (apart, own) in squares.items()
  ]


@jax.jit
def _apart(x: jax.Array, y: jax.Array, mask: jax.Array) -> jax.Array:
  real = (mask != 0).reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))
  x, y = (jnp.where(real, v.astype(jnp.float32), 0.0) for v in (x, y))
  return jnp.stack([jnp.sum(jnp.square(y - x)), jnp.sum(jnp.square(x))])


def outliers(model: Any, params: Params, tokens: Any, most: int = 3) -> list[dict[str, Any]]:
  """The `most` channels of each stage's input whose largest magnitude is the most times the median channel's.

  Rows of `block, stage, channel, ratio` (Dettmers et al. 2022, arXiv:2208.07339).
  """
  largest: dict[tuple[str, str], np.ndarray] = {}
  for batch in batches_of(tokens):
    carry = model.start(params, batch)
    for block in model.blocks(params):
      carry, seen = model.run(block, params, carry, tuple(stage.name for stage in block.stages))
      for stage in block.stages:
        x, mask = np.abs(np.asarray(seen[stage.name], np.float32)), np.asarray(batch[stage.mask]) != 0
        top = np.max(x.reshape(-1, x.shape[-1])[mask.reshape(-1)], axis=0)
        key = block.path, stage.name
        largest[key] = np.maximum(largest[key], top) if key in largest else top
  rows = []
  for (block, stage), top in largest.items():
    ratio = top / max(float(np.median(top)), 1e-30)
    for channel in np.argsort(-ratio, kind="stable")[:most]:
      rows.append({"block": block, "stage": stage, "channel": int(channel), "ratio": float(ratio[channel])})
  return rows


def token_kl(model: Any, before: Params, after: Params, tokens: Any) -> np.ndarray:
  """KL divergence of what each tree says of the token after each, nats, `[n, length - 1]` float64; a row at a time."""
  tokens, masks = checked(tokens)
  rows = []
  for i in range(len(tokens)):
    given = tokens[i : i + 1], masks[i : i + 1]
    rows.append(_kl(*(log_probabilities(model, params, *given) for params in (before, after))))
  return np.concatenate(rows)[:, :-1].astype(np.float64)


@jax.jit
def _kl(p: jax.Array, q: jax.Array) -> jax.Array:
  return jnp.sum(jnp.exp(p) * (p - q), axis=-1)
