"""Adapters: a product of low rank beside each weight, for training alone; and putting them into the weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress import tree
from lmcompress.arrays import (
  DirectionArray,
  LowRankArray,
  SumArray,
  added,
  direction,
  low_rank,
  parts,
)
from lmcompress.transforms.combine import INPUTS, beneath, leafwise
from lmcompress.types import CompressedArray, Transform, WeightError


def lora(rank: int = 8) -> Transform:
  """Adds a product of low rank that starts at 0 (Hu et al. 2022, arXiv:2106.09685), over weights of any form.

  The weight becomes a `SumArray` of what it is and a `LowRankArray` of float32 factors; train those alone with the
  pattern `**/delta`. Over 4-bit weights that is QLoRA (arXiv:2305.14314). `low_rank_residual` starts from what
  compression lost instead (LoftQ, arXiv:2310.08659). There is no alpha: it scales the learning rate of the factors.

  Args:
    rank: of the product.

  Raises:
    ValueError: the rank is below 1.
    WeightError (when planned): a rank above full, or an adapter is there already.
  """
  if rank < 1:
    raise ValueError(f"lora(rank={rank}): a rank from 1")

  def check(path: str, leaf: Any) -> None:
    if rank > min(leaf.shape[-2:]):
      raise WeightError(f"lora(rank={rank}) at {path}: full rank is {min(leaf.shape[-2:])}")
    inner = leaf.weight if isinstance(leaf, DirectionArray) else leaf
    if isinstance(inner, SumArray) and isinstance(inner.delta, LowRankArray):
      raise WeightError(
        f"lora at {path}: there is a product of rank {inner.delta.rank} already; merge() it, or train it"
      )

  def adapt(w: Any, *, axis: int, key: jax.Array) -> Any:
    rows, columns = w.shape[-2:]
    left = jax.random.normal(key, (rows, rank)) / math.sqrt(rows)
    return added(w, low_rank(left, jnp.zeros((rank, columns)), axis), axis)

  return leafwise(adapt, name="lora", check=check)


def dora(rank: int = 8) -> Transform:
  """As `lora`, with the length of each output apart from its direction (Liu et al. 2024, DoRA, arXiv:2402.09353).

  The weight becomes a `DirectionArray` over the sum; train adapters and lengths with the patterns `**/delta` and
  `**/magnitude`. `freeze` puts lengths into the parts, which keep their forms; `merge` makes the weight dense.

  Args:
    rank: of the product.

  Raises:
    ValueError: the rank is below 1.
    WeightError (when planned): as of `lora`.
  """
  first = lora(rank)

  second = leafwise(lambda w, *, axis: direction(w, axis), name="dora")

  def apply(params: Any, state: Any, evidence: Any) -> Any:
    params, state = first.apply(params, state, evidence)
    return second.apply(params, state, evidence)

  return first._replace(apply=apply, name="dora")


def merge() -> Transform:
  """Puts adapters into their weights: a sum becomes the dense value that it stands for; other weights stay.

  A compressed base goes dense too: what it was rounded to is kept, and it can be quantized again.
  """

  def put(w: Any) -> Any:
    return w.materialize() if isinstance(w, (DirectionArray, SumArray)) else w

  return leafwise(put, name="merge")


def adapters(params: Any) -> dict[str, LowRankArray]:
  """The adapters of a tree by the path of their weight, to be kept and put over the same base again with `adapted`."""
  found = {path: beneath(leaf) for path, leaf in tree.weights(params).items()}
  return {
    path: leaf.delta
    for path, leaf in found.items()
    if isinstance(leaf, SumArray) and isinstance(leaf.delta, LowRankArray)
  }


def adapted(params: Any, deltas: dict[str, LowRankArray]) -> Any:
  """The tree with these adapters over its weights, in the place of those that are there; the base is shared.

  Raises:
    WeightError: an adapter's weight is missing, or of another shape.
  """
  for path, delta in deltas.items():
    leaf = tree.get(params, path)
    inner = beneath(leaf)
    base = inner.base if isinstance(inner, SumArray) and isinstance(inner.delta, LowRankArray) else inner
    if base is None or tuple(base.shape) != tuple(delta.shape):
      found = "nothing" if base is None else f"{parts.kind(base)} {tuple(base.shape)}"
      raise WeightError(f"adapted at {path}: an adapter of shape {tuple(delta.shape)} over {found}")
    whole: CompressedArray = added(base, delta, tree.contraction_axis(path))
    params = tree.put(params, path, dataclasses.replace(leaf, weight=whole) if isinstance(leaf, INPUTS) else whole)
  return params
