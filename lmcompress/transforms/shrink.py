"""Weights that shrink at every step until they are exactly zero: proximal steps of the L1 norm and of groups."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmcompress.arrays import MaskedArray
from lmcompress.transforms.combine import leafwise, require_dense
from lmcompress.types import Transform


def shrink(amount: float = 1e-5, group: Literal["entry", "input", "output"] = "entry", start: int = 0) -> Transform:
  """Brings weights towards zero after each update, and to zero exactly, a `step` transform.

  Each step replaces w by `sign(w) max(|w| - amount, 0)`, the proximal step of the L1 norm (ISTA, Daubechies et al.
  2004, arXiv:math/0307152); with groups by `w max(1 - amount sqrt(n) / ||w||, 0)` over the n weights of an input or an
  output, the group lasso's (Yuan & Lin 2006), which leaves whole rows or columns zero: neurons that `prune_neurons`
  then removes without loss. `amount` is the learning rate times the penalty's weight of these papers.

  Args:
    amount: by which an entry shrinks, in units of the weights.
    group: what reaches zero together.
    start: the first step that shrinks; before it the weights train as they are.

  Raises:
    ValueError: an argument is out of range.
    WeightError (when planned): a weight that is compressed or not finite.
  """
  if not 0 < amount < math.inf or group not in ("entry", "input", "output") or start < 0:
    raise ValueError(
      f"shrink(amount={amount}, group={group!r}, start={start}): an amount above 0; entry, input or output; from 0"
    )

  def shorten(w: Any, *, axis: int, step: Any) -> Any:
    if isinstance(w, MaskedArray):
      return dataclasses.replace(w, values=shorten(w.values, axis=axis, step=step))
    now = jnp.where(jnp.asarray(step) >= start, amount, 0.0)
    return _proximal(w, now, None if group == "entry" else axis if group == "output" else -3 - axis)

  return leafwise(shorten, name="shrink", phase="step", check=functools.partial(require_dense, "shrink"))


def _proximal(w: jax.Array, amount: jax.Array, along: int | None) -> jax.Array:
  """Entries by themselves, or all along an axis together."""
  if along is None:
    return (jnp.sign(w) * jnp.maximum(jnp.abs(w) - amount, 0)).astype(w.dtype)
  norm = jnp.linalg.norm(w.astype(jnp.float32), axis=along, keepdims=True)
  factor = jnp.maximum(1 - amount * math.sqrt(w.shape[along]) / jnp.maximum(norm, 1e-30), 0)
  return (w * factor).astype(w.dtype)
