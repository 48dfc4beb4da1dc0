"""Layers that share their weights: one set under `shared/`, and a low-rank difference for each layer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress import tree
from lmcompress.arrays import MaskedArray, added
from lmcompress.arrays.shared import SHARED, refer
from lmcompress.transforms.combine import require_dense
from lmcompress.transforms.truncated_svd import cut, factor
from lmcompress.types import Evidence, Params, State, Transform, WeightError


def tie_layers(
  groups: Sequence[Sequence[int]] | None = None, size: int = 2, rank: int = 32, bits: int | None = None
) -> Transform:
  """Lets layers share their weights, each with a low-rank difference of its own (Bae et al. 2024, arXiv:2410.20672).

  The shared weight is the mean of its layers', once under `shared/`; a layer's kernel becomes the sum of a reference
  to it and the best product of low rank for what the layer has of its own. Norms and biases stay each layer's.

  Args:
    groups: layers that share, by their place in the model from 0; None takes runs of `size` layers between the first
      and the last.
    size: see above.
    rank: of the differences; 0 for none.
    bits: of the factors of the differences, in groups of up to 64; None keeps the dtype.

  Raises:
    ValueError: an argument is out of range.
    WeightError (when applied): no such layer, layers of unequal shapes, compressed weights, or a rank above full.
  """
  named = [tuple(group) for group in groups] if groups is not None else None
  flat = [i for group in named or () for i in group]
  if size < 2 or rank < 0 or len(set(flat)) != len(flat) or any(len(group) < 2 for group in named or ()) or named == []:
    raise ValueError(
      f"tie_layers(groups={groups}, size={size}, rank={rank}): groups of two layers or more, each layer in one; a size "
      "from 2, a rank from 0"
    )
  if bits is not None and not 2 <= bits <= 8:
    raise ValueError(f"tie_layers(bits={bits}): 2 to 8")

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    blocks = [block.path for block in evidence.structure.blocks(params) if block.stages]
    runs = named
    if runs is None:
      inner = range(1, len(blocks) - 1)
      runs = [tuple(inner[i : i + size]) for i in range(0, len(inner) - size + 1, size)]
    if not runs:
      raise WeightError(
        f"tie_layers(size={size}): there is no run of {size} layers between the first and the last of {len(blocks)}; "
        "name the groups"
      )
    if bad := [i for group in runs for i in group if not 0 <= i < len(blocks)]:
      raise WeightError(f"tie_layers: no layer {bad[0]} among {len(blocks)}")
    done = params
    for group in runs:
      after = _tie(done, [blocks[i] for i in group], rank, bits, evidence.selected)
      if named is not None and after is done:
        where = ", ".join(blocks[i] for i in group)
        raise WeightError(f"tie_layers: no weight is selected in all of {where}, the layers that are to share")
      done = after
    if done is params:
      raise WeightError(f"tie_layers(size={size}): no {size} layers in a row have a weight that is selected in all")
    return done, state

  return Transform(lambda params, selected=None: (), apply, scope="model", name="tie_layers")


def _tie(params: Params, paths: Sequence[str], rank: int, bits: int | None, selected: frozenset[str] | None) -> Params:
  linears = [p.removeprefix(f"{paths[0]}/") for p in tree.weights(params) if p.startswith(f"{paths[0]}/")]
  tied = [p for p in linears if selected is None or all(f"{path}/{p}" in selected for path in paths)]
  for part in tied:
    members = {path: tree.get(params, f"{path}/{part}") for path in paths}
    for path, leaf in members.items():
      if leaf is None:
        raise WeightError(f"tie_layers at {path}/{part}: there is none; layers that share have the same weights")
      require_dense("tie_layers", f"{path}/{part}", leaf)
      if isinstance(leaf, MaskedArray) or leaf.shape != members[paths[0]].shape:
        raise WeightError(f"tie_layers at {path}/{part}: layers that share are dense and of one shape")
      if rank > min(leaf.shape[-2:]):
        raise WeightError(f"tie_layers(rank={rank}) at {path}/{part}: full rank is {min(leaf.shape[-2:])}")
    axis, where = tree.contraction_axis(part), f"{SHARED}/{paths[0]}/{part}"
    mean = _mean(*members.values())
    params = tree.put(params, where, mean)
    reference = refer(where, mean, axis)
    for path, leaf in members.items():
      own: Any = reference
      if rank:
        difference = factor(leaf.astype(jnp.float32) - mean.astype(jnp.float32), None, None, 0.0)
        own = added(reference, cut(*difference, rank, leaf.dtype, axis, bits), axis)
      params = tree.put(params, f"{path}/{part}", own)
  return params


@functools.partial(jax.jit)
def _mean(*weights: jax.Array) -> jax.Array:
  return jnp.mean(jnp.stack([w.astype(jnp.float32) for w in weights]), axis=0).astype(weights[0].dtype)
