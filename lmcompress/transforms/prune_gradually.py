"""Pruning while training: masks that grow with the steps, by magnitude or by scores that train (movement pruning)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from lmcompress.arrays import MaskedArray, ScoredArray, masked, scored
from lmcompress.transforms.combine import leafwise, require_dense, scheduled
from lmcompress.transforms.magnitude import keep_largest
from lmcompress.transforms.schedules import cubic, every
from lmcompress.types import CompressedArray, Transform, WeightError


def movement() -> Transform:
  """Gives each entry a score that trains beside it (Sanh et al. 2020, movement pruning, arXiv:2005.07683).

  The weight becomes a `ScoredArray` that keeps everything; `prune_gradually` removes the lowest scores while it trains,
  and `freeze` leaves a dense weight with zeros. What a mask had removed is zero before it begins.

  Raises:
    WeightError (when planned): a weight that is compressed or not finite.
  """

  def score(w: Any, *, axis: int) -> ScoredArray:
    values = w.materialize() if isinstance(w, MaskedArray) else w
    return scored(values, jnp.zeros(values.shape, jnp.float32), axis)

  return leafwise(score, name="movement", check=functools.partial(require_dense, "movement"))


def prune_gradually(sparsity: float = 0.5, start: int = 0, end: int = 100, interval: int = 10) -> Transform:
  """Removes more and more weights while they train (Zhu & Gupta 2017, arXiv:1710.01878), a `step` transform.

  Every `interval` steps the share removed of each weight is brought to the cubic schedule's: of a `MaskedArray` the
  smallest by magnitude, of a `ScoredArray` the lowest scores. What was removed may come back, since its value is kept.

  Args:
    sparsity: the share removed from step `end` on; of scores that are equal the ones at the threshold stay.
    start, end: steps between which it rises.
    interval: steps from one change to the next.

  Raises:
    ValueError: an argument is out of range.
    WeightError (when planned): a weight is neither; `magnitude(sparsity=0.0)` or `movement()` makes it so.
  """
  if not 0 < sparsity < 1 or not 0 <= start < end or interval < 1:
    raise ValueError(
      f"prune_gradually(sparsity={sparsity}, start={start}, end={end}, interval={interval}): a share between 0 and 1, "
      "0 <= start < end, an interval from 1"
    )
  ramp = cubic(sparsity, start, end)

  def check(path: str, leaf: Any) -> None:
    if not isinstance(leaf, ScoredArray) and not (
      isinstance(leaf, MaskedArray) and not isinstance(leaf.values, CompressedArray)
    ):
      found = leaf.kind if isinstance(leaf, CompressedArray) else f"dense {leaf.dtype}"
      raise WeightError(
        f"prune_gradually at {path}: the weight is {found}; make it a mask with magnitude(sparsity=0.0), or scores "
        "with movement()"
      )

  def update(w: Any, *, axis: int, step: Any) -> Any:
    removed = jnp.round(w.size * ramp(jnp.asarray(step))).astype(int)
    if isinstance(w, MaskedArray):
      return masked(w.values, keep_largest(w.values, removed), axis)
    ordered = jnp.sort(w.scores.reshape(-1))
    limit = jnp.where(removed > 0, ordered[removed], -jnp.inf)
    return dataclasses.replace(w, threshold=limit.astype(jnp.float32).reshape(1, 1))

  whole = leafwise(update, name="prune_gradually", phase="step", check=check)
  return scheduled(whole, every(interval, start % interval))._replace(name="prune_gradually")
