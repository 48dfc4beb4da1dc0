"""Gradients of the next-token loss on calibration tokens: their mean, and their mean square over rows (Fisher)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.arrays import InputArray, fetch, parts, resolve
from lmcompress.calibration.token_loss import cross_entropy, mean_loss
from lmcompress.types import Params, WeightError

GRADIENTS = ("grads", "fisher")
"""Evidence that takes a backward pass over the whole model."""


def gradients(
  model: Any,
  params: Params,
  batches: Sequence[Mapping[str, np.ndarray]],
  wanted: frozenset[str],
  progress: Callable[[int, int], None] | None = None,
) -> dict[str, Params]:
  """What of `grads` and `fisher` is wanted, as trees of dense float32 arrays by path.

  `grads` is the gradient of the mean loss over rows, `fisher` the mean over rows of the square of each row's gradient
  (the empirical Fisher's diagonal, one row of tokens an example). Row by row, blocks recomputed on the way back, so
  that memory is the parameters, one gradient, the sums, and one block's activations. Compressed weights count as the
  dense values that they hold.

  Args:
    batches: each `tokens` and `attention_mask` `[n, length]`, of an encoder-decoder `decoder_input_ids` and its mask.

  Raises:
    WeightError: the loss is not finite, or the model predicts no next token.
  """
  leaves = {path: _dense(resolve(params, leaf)) for path, leaf in tree.flatten(params).items()}
  floats = {path: leaf for path, leaf in leaves.items() if tree.is_weight(path)}
  rest = {path: leaf for path, leaf in leaves.items() if path not in floats}
  sums: dict[str, dict[str, jax.Array]] = {
    name: {path: jnp.zeros(leaf.shape, jnp.float32) for path, leaf in floats.items()} for name in sorted(wanted)
  }
  rows = [{name: x[j][None] for name, x in b.items()} for b in batches for j in range(len(b["tokens"]))]
  for i, row in enumerate(rows):
    loss, sums = _add(model, floats, rest, sums, row)
    if not bool(jnp.isfinite(loss)):
      raise WeightError(f"the loss on row {i} of the calibration tokens is {float(loss)}; its gradient says nothing")
    if progress is not None:
      progress(i + 1, len(rows))
  return {name: tree.unflatten({p: g / len(rows) for p, g in found.items()}) for name, found in sums.items()}


def _dense(leaf: Any) -> Any:
  leaf = fetch(leaf)
  return parts.materialize(leaf.weight if isinstance(leaf, InputArray) else leaf)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("sums",))
def _add(
  model: Any,
  floats: Mapping[str, jax.Array],
  rest: Mapping[str, jax.Array],
  sums: dict[str, dict[str, jax.Array]],
  row: Mapping[str, jax.Array],
) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
  def lost(w: Mapping[str, jax.Array]) -> jax.Array:
    total, count = mean_loss(model, tree.unflatten({**rest, **w}), row, cross_entropy)
    return total / jnp.maximum(count, 1)

  loss, found = jax.value_and_grad(lost)(floats)
  new = {
    name: {path: s + (found[path] if name == "grads" else jnp.square(found[path])) for path, s in old.items()}
    for name, old in sums.items()
  }
  return loss, new
