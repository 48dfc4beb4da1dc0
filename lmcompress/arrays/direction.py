"""DirectionArray: a weight as the directions of its outputs, and how long each is."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmcompress.arrays import parts
from lmcompress.arrays.low_rank import LowRankArray
from lmcompress.arrays.packing import inlined
from lmcompress.arrays.quantized import QuantizedArray
from lmcompress.arrays.sum import SumArray
from lmcompress.types import CompressedArray


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weight", "magnitude"), meta_fields=("axis",))
@dataclasses.dataclass(frozen=True)
class DirectionArray(CompressedArray):
  """`dense == magnitude * weight / norm(weight)`, the norm of each output over its inputs, for training (DoRA).

  Gradients take the norm as a constant (Liu et al. 2024, arXiv:2402.09353, section 4.3).

  Attributes:
    weight: `[..., in, out]` for axis -2, `[..., vocab, features]` for axis -1; dense or compressed along `axis`.
    magnitude: float32 `[..., 1, out]` (`[..., vocab, 1]`).
    axis: the contraction axis.
  """

  weight: Any
  magnitude: jax.Array
  axis: int

  @property
  def shape(self) -> tuple[int, ...]:
    return self.weight.shape

  @property
  def dtype(self) -> Any:
    return self.weight.dtype

  @property
  def nbits(self) -> int:
    return parts.nbits(self.weight) + parts.nbits(self.magnitude)

  @property
  def kind(self) -> str:
    return f"directions of {parts.kind(self.weight)}"

  @classmethod
  def trainable_fields(cls) -> tuple[str, ...]:
    return ("weight", "magnitude")

  @inlined
  def materialize(self) -> jax.Array:
    values = parts.materialize(self.weight).astype(jnp.float32)
    return (values * self._scale(values, self.magnitude, self.axis)).astype(self.dtype)

  def columns(self, start: Any, size: int) -> jax.Array:
    values = parts.columns(self.weight, start, size, self.axis)
    some = jax.lax.dynamic_slice_in_dim(self.magnitude, start, size, self.magnitude.ndim - 3 - self.axis)
    return values * self._scale(values, some, self.axis)

  def rows(self, ids: jax.Array) -> jax.Array:
    values = parts.rows(self.weight, ids)
    return values * self._scale(values, self.magnitude[ids], -1)

  def sharding_like(self, spec: PartitionSpec) -> DirectionArray:
    along: Any = parts.without(spec, self.axis, len(self.shape))
    return dataclasses.replace(self, weight=parts.sharding_like(self.weight, spec), magnitude=along)

  def folded(self) -> Any:
    """The same values with the lengths put into the parts: a dense weight, codes, a product, or a sum of those.

    Raises:
      ValueError: a part has no scale for each output that could take it in.
    """
    values = parts.materialize(self.weight).astype(jnp.float32)
    return _scaled(self.weight, self._scale(values, self.magnitude, self.axis), self.axis)

  @staticmethod
  def _scale(values: jax.Array, magnitude: jax.Array, axis: int) -> jax.Array:
    norm = jnp.sqrt(jnp.sum(values**2, axis=axis, keepdims=True))
    return magnitude / jax.lax.stop_gradient(jnp.where(norm == 0, 1.0, norm))


def _scaled(part: Any, scale: jax.Array, axis: int) -> Any:
  """A weight times a number for each output, in its own form."""
  if not isinstance(part, CompressedArray):
    return (part * scale).astype(part.dtype)
  if isinstance(part, SumArray):
    base, delta = (_scaled(x, scale, axis) for x in (part.base, part.delta))
    return dataclasses.replace(part, base=base, delta=delta)
  if isinstance(part, LowRankArray) and axis == -2:
    return dataclasses.replace(part, right=_scaled(part.right, scale, axis))
  if isinstance(part, LowRankArray):
    return dataclasses.replace(part, left=_scaled(part.left, scale, axis))
  if isinstance(part, QuantizedArray) and not isinstance(part.scale, CompressedArray) and part.scale.size > 1:
    minimum = None if part.minimum is None else part.minimum * scale
    return dataclasses.replace(part, scale=(part.scale * scale).astype(jnp.float32), minimum=minimum)
  raise ValueError(f"{part.kind} has no scale of float for each output; merge() makes the weight dense")


def direction(weight: Any, axis: int) -> DirectionArray:
  """A weight of any form as directions and lengths, its value as it was.

  Raises:
    ValueError: the axis is neither -2 nor -1.
  """
  if axis not in (-2, -1):
    raise ValueError(f"direction(axis={axis}): axis is -2 (kernel) or -1 (table)")
  values = parts.materialize(weight).astype(jnp.float32)
  return DirectionArray(weight, jnp.sqrt(jnp.sum(values**2, axis=axis, keepdims=True)), axis)
