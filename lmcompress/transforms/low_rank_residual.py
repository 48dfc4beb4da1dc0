"""A product of low rank beside a compressed weight, for what its compression took."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lmcompress import tree
from lmcompress.arrays import SharedRef, added, parts
from lmcompress.transforms.combine import evidence_for, leafwise
from lmcompress.transforms.truncated_svd import NEEDS, Whitening, cut, factor
from lmcompress.types import CompressedArray, Evidence, Params, State, Transform, WeightError


def low_rank_residual(
  rank: int = 16,
  whitening: Whitening = "hessian",
  bits: int | None = None,
  group_size: int = 64,
  damping: float = 1e-3,
) -> Transform:
  """Adds the best product of low rank for what compression took (Zhang et al. 2024, LQER, arXiv:2402.02446).

  The residual is taken against the weight as it was when it was last dense in this recipe, and the weight becomes a
  `SumArray` of what it is and a `LowRankArray`.

  Args:
    rank: of the product.
    whitening, bits, group_size, damping: as in `truncated_svd`.

  Raises:
    ValueError: an argument is out of range.
    WeightError: a rank above full (when planned), a weight that is not compressed (when applied).
  """
  if rank < 1 or whitening not in NEEDS or (bits is not None and not 2 <= bits <= 8) or group_size < 1:
    raise ValueError(
      f"low_rank_residual(rank={rank}, whitening={whitening!r}, bits={bits}, group_size={group_size}): a rank from 1, "
      f"whitening one of {', '.join(NEEDS)}, bits 2 to 8, groups from 1"
    )

  def check(path: str, leaf: Any) -> None:
    if any(isinstance(part, SharedRef) for part in jax.tree.leaves(leaf, is_leaf=lambda x: isinstance(x, SharedRef))):
      raise WeightError(f"low_rank_residual at {path}: its values are shared with other weights; add it before sharing")
    if rank > min(leaf.shape[-2:]):
      raise WeightError(f"low_rank_residual(rank={rank}) at {path}: full rank is {min(leaf.shape[-2:])}")

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    chosen = tree.default_selection(params) if evidence.selected is None else evidence.selected

    def visit(path: str, leaf: Any) -> Any:
      if not isinstance(leaf, CompressedArray):
        raise WeightError(f"low_rank_residual at {path}: the weight is dense, nothing is lost; compress it first")
      dense, axis = evidence_for("reference", path, evidence, "low_rank_residual"), tree.contraction_axis(path)
      if dense.shape != leaf.shape:
        raise WeightError(f"low_rank_residual at {path}: it is {leaf.shape}, and was {dense.shape} when it was dense")
      given = {need: evidence_for(need, path, evidence, "low_rank_residual") for need in NEEDS[whitening]}
      lost = dense.astype(jnp.float32) - parts.materialize(leaf).astype(jnp.float32)
      product = factor(lost, given.get("hessian"), given.get("mean_abs"), damping)
      return added(leaf, cut(*product, rank, leaf.dtype, axis, bits, group_size), axis)

    return tree.map_weights(visit, params, chosen), state

  needs = NEEDS[whitening] | {"reference"}
  return Transform(leafwise(lambda w: w, check=check).init, apply, needs, name="low_rank_residual")
