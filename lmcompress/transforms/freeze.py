"""freeze: turns training forms into deployment forms; what a code already says is not stored twice."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress import tree
from lmcompress.arrays import InputArray, LowRankArray, MaskedArray
from lmcompress.types import CompressedArray, Evidence, Params, State, Transform


def freeze() -> Transform:
  """Makes the tree ready to deploy; acts on every weight unless `at` restricts it.

  A mask over a compressed weight that is exactly 0 wherever the mask removes is dropped: the codes say it
  already. A mask over dense values is applied to them. Where codes cannot express 0 (a real minimum), the mask
  stays. Within an `InputArray` and in the factors of a `LowRankArray` the same holds.
  """

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    return tree.map_weights(lambda _, w: _freeze(w), params, evidence.selected), state

  return Transform(lambda params, selected=None: (), apply, name="freeze")


def _freeze(w: Any) -> Any:
  if isinstance(w, InputArray):
    return dataclasses.replace(w, weight=_freeze(w.weight))
  if isinstance(w, LowRankArray):
    return dataclasses.replace(w, left=_freeze(w.left), right=_freeze(w.right))
  if not isinstance(w, MaskedArray):
    return w
  if not isinstance(w.values, CompressedArray):
    return _apply_mask(w)
  return w.values if bool(_expressed(w)) else w


@functools.partial(jax.jit)
def _apply_mask(w: MaskedArray) -> jax.Array:
  return w.materialize()


@functools.partial(jax.jit)
def _expressed(w: MaskedArray) -> jax.Array:
  return jnp.all((w.mask.unpack() != 0) | (w.values.materialize() == 0))
