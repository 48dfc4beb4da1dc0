"""RigL: sparse from the start, and the mask moves to where gradients are large."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from lmcompress.arrays import MaskedArray, masked
from lmcompress.ops import masks
from lmcompress.transforms.combine import leafwise, scheduled
from lmcompress.transforms.schedules import every
from lmcompress.types import CompressedArray, Transform, WeightError


def rigl(fraction: float = 0.3, end: int = 100, interval: int = 10) -> Transform:
  """Drops the smallest weights and grows as many where the gradient is largest (Evci et al. 2020, arXiv:1911.11134).

  A `step` transform over masks, whose sparsity stays as it is to the entry. What grows starts at 0; gradients reach
  what is removed for the choice alone.

  Args:
    fraction: of the kept weights, that change places at first; it falls along a cosine to 0.
    end: the step from which masks stay.
    interval: steps from one change to the next.

  Raises:
    ValueError: an argument is out of range.
    WeightError (when planned): a weight is no mask over dense values; `magnitude` makes one.
  """
  if not 0 < fraction <= 1 or end < 1 or interval < 1:
    raise ValueError(f"rigl(fraction={fraction}, end={end}, interval={interval}): above 0 to 1, from 1, from 1")

  def check(path: str, leaf: Any) -> None:
    if not isinstance(leaf, MaskedArray) or isinstance(leaf.values, CompressedArray):
      found = leaf.kind if isinstance(leaf, CompressedArray) else f"dense {leaf.dtype}"
      raise WeightError(f"rigl at {path}: the weight is {found}; make it a mask first, such as magnitude(sparsity=0.8)")

  def move(w: MaskedArray, *, axis: int, step: Any, grads: Any) -> MaskedArray:
    kept, size = w.mask.unpack() != 0, jnp.abs(w.values)
    share = fraction / 2 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / end, 1.0)))
    count = jnp.minimum(jnp.round(share * jnp.sum(kept)).astype(int), jnp.sum(~kept))
    stays = kept & ~masks.smallest(jnp.where(kept, size, jnp.inf), count)
    wanted = jnp.abs(grads)
    grows = masks.smallest(jnp.where(stays, jnp.inf, jnp.max(wanted) - wanted), count)
    return masked(jnp.where(grows & ~kept, 0, w.values).astype(w.dtype), stays | grows, axis)

  whole = leafwise(move, name="rigl", phase="step", check=check)
  return scheduled(whole, every(interval, interval, end))._replace(name="rigl")
