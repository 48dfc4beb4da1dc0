"""OutlierArray: a few inputs of each output, and zeros elsewhere."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmcompress.arrays import parts
from lmcompress.arrays.packing import inlined
from lmcompress.types import CompressedArray


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("values", "indices"), meta_fields=("inputs", "axis", "dtype")
)
@dataclasses.dataclass(frozen=True)
class OutlierArray(CompressedArray):
  """`dense[indices[k, o], o] == values[k, o]`, else 0; as many entries for each output.

  Attributes:
    values: `[..., few, out]` (`[..., vocab, few]` for axis -1), any float dtype.
    indices: uint16 (or int32 for more than 65,536 inputs) of the shape of `values`, ascending and distinct along
      `axis`.
    inputs: extent of the contraction axis, which no array tells.
    axis: the contraction axis.
    dtype: name of the dtype of the dense value.
  """

  values: jax.Array
  indices: jax.Array
  inputs: int
  axis: int
  dtype: str

  @property
  def shape(self) -> tuple[int, ...]:
    shape = list(self.values.shape)
    shape[self.axis] = self.inputs
    return tuple(shape)

  @property
  def nbits(self) -> int:
    return parts.nbits(self.values) + parts.nbits(self.indices)

  @property
  def kind(self) -> str:
    return f"{self.values.shape[self.axis]} outliers an output"

  @classmethod
  def trainable_fields(cls) -> tuple[str, ...]:
    return ("values",)

  @inlined
  def materialize(self) -> jax.Array:
    return self._spread(self.values, self.indices).astype(self.dtype)

  def columns(self, start: Any, size: int) -> jax.Array:
    where = self.values.ndim - 3 - self.axis
    cut = [jax.lax.dynamic_slice_in_dim(x, start, size, where) for x in (self.values, self.indices)]
    return self._spread(*cut)

  def rows(self, ids: jax.Array) -> jax.Array:
    return self._spread(self.values[ids], self.indices[ids])

  def sharding_like(self, spec: PartitionSpec) -> OutlierArray:
    """Split over outputs as the dense value is; an index counts all inputs, so they stay whole."""
    whole = parts.spec_of_rank(parts.without(spec, self.axis, len(self.shape)), len(self.shape))
    return dataclasses.replace(self, values=whole, indices=whole)  # type: ignore[arg-type]

  def _spread(self, values: jax.Array, indices: jax.Array) -> jax.Array:
    shape = list(values.shape)
    shape[self.axis] = self.inputs
    empty = jnp.zeros(shape, jnp.float32)
    return jnp.put_along_axis(
      empty, indices.astype(jnp.int32), values.astype(jnp.float32), axis=self.axis, inplace=False
    )


def outliers(w: jax.Array, score: jax.Array, few: int, axis: int, dtype: Any = jnp.bfloat16) -> OutlierArray:
  """The entries of each output with the largest score.

  Args:
    w: `[..., in, out]` for axis -2, `[..., vocab, features]` for axis -1.
    score: of the shape of `w`; of equals the earlier.
    few: entries of each output, at least 1.
    axis: the contraction axis.
    dtype: that values are stored in.

  Raises:
    ValueError: the parts do not fit one another.
  """
  what = f"outliers(few={few}, axis={axis})"
  if axis not in (-2, -1) or w.ndim < 2 or tuple(score.shape) != tuple(w.shape):
    raise ValueError(f"{what}: a score {tuple(score.shape)} of the shape of the weight {tuple(w.shape)}, axis -2 or -1")
  if not 1 <= few <= w.shape[axis]:
    raise ValueError(f"{what}: from 1 to the {w.shape[axis]} inputs")
  found = jnp.sort(jax.lax.slice_in_dim(_ranked(score, axis), 0, few, axis=axis), axis=axis)
  values = jnp.take_along_axis(w, found, axis=axis).astype(dtype)
  indices = found.astype(jnp.uint16 if w.shape[axis] <= 1 << 16 else jnp.int32)
  return OutlierArray(values, indices, w.shape[axis], axis, str(w.dtype))


@functools.partial(jax.jit, static_argnames=("axis",))
def _ranked(score: jax.Array, axis: int) -> jax.Array:
  """Positions by falling score; compiled once for all numbers of outliers."""
  return jnp.argsort(-score, axis=axis, stable=True)
