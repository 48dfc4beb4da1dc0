"""ScoredArray: a weight whose entries are kept by scores that train beside them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmcompress.arrays import parts
from lmcompress.arrays.packing import inlined
from lmcompress.types import CompressedArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoredArray(CompressedArray):
  """`dense == where(scores >= threshold, values, 0)`; gradients reach the values that are kept, and all scores.

  The choice passes gradients straight through, so that a score learns `gradient * value`: it falls where the weight is
  moving towards zero (Sanh et al. 2020, movement pruning, arXiv:2005.07683).

  Attributes:
    values: float `[..., in, out]` for axis -2, `[..., vocab, features]` for axis -1.
    scores: float of the shape of `values`.
    threshold: float32 `[..., 1, 1]`; minus infinity keeps all.
    axis: the contraction axis.
  """

  values: jax.Array
  scores: jax.Array
  threshold: jax.Array
  axis: int = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  @property
  def dtype(self) -> Any:
    return self.values.dtype

  @property
  def nbits(self) -> int:
    """Of the training form; `freeze` leaves the values."""
    return sum(parts.nbits(part) for part in (self.values, self.scores, self.threshold))

  @property
  def kind(self) -> str:
    return f"scored {self.dtype}"

  @classmethod
  def trainable_fields(cls) -> tuple[str, ...]:
    return ("values", "scores")

  @inlined
  def materialize(self) -> jax.Array:
    return self._dense(self.values, self.scores, self.threshold).astype(self.dtype)

  def columns(self, start: Any, size: int) -> jax.Array:
    where = self.values.ndim - 3 - self.axis
    values, scores = (jax.lax.dynamic_slice_in_dim(x, start, size, where) for x in (self.values, self.scores))
    return self._dense(values, scores, self.threshold)

  def rows(self, ids: jax.Array) -> jax.Array:
    return self._dense(self.values[ids], self.scores[ids], self.threshold.reshape(()))

  def sharding_like(self, spec: PartitionSpec) -> ScoredArray:
    whole: Any = parts.spec_of_rank(spec, len(self.shape))
    one: Any = PartitionSpec(*whole[:-2], None, None)
    return dataclasses.replace(self, values=whole, scores=whole, threshold=one)

  def _dense(self, values: jax.Array, scores: jax.Array, threshold: jax.Array) -> jax.Array:
    values, through = values.astype(jnp.float32), scores.astype(jnp.float32)
    through = through - jax.lax.stop_gradient(through)  # 0, with the gradient of the scores
    return jnp.where(scores >= threshold, values, 0.0) + through * values


def scored(values: jax.Array, scores: jax.Array, axis: int) -> ScoredArray:
  """A weight that keeps everything until a threshold is set.

  Raises:
    ValueError: the scores are no floats of the shape of the values, or the axis is neither -2 nor -1.
  """
  if axis not in (-2, -1) or scores.shape != values.shape or not jnp.issubdtype(scores.dtype, jnp.floating):
    raise ValueError(f"scored(axis={axis}): float scores {tuple(values.shape)} are needed, found {tuple(scores.shape)}")
  return ScoredArray(values, scores, jnp.full((*values.shape[:-2], 1, 1), -jnp.inf), axis)
