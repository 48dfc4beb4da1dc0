"""SumArray: a weight that is the sum of two, each stored in its own way."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmcompress.arrays import parts
from lmcompress.arrays.input import InputArray
from lmcompress.arrays.learned_input import LearnedInputArray
from lmcompress.arrays.packing import inlined
from lmcompress.types import CompressedArray


@functools.partial(jax.tree_util.register_dataclass, data_fields=("base", "delta"), meta_fields=("axis",))
@dataclasses.dataclass(frozen=True)
class SumArray(CompressedArray):
  """`dense == base + delta`: a quantized weight and a low-rank residual, a low-rank weight and what is sparse.

  Attributes:
    base, delta: `[..., in, out]` (`[..., vocab, features]` for axis -1), dense or compressed along `axis`.
    axis: the contraction axis.
  """

  base: Any
  delta: Any
  axis: int

  @property
  def shape(self) -> tuple[int, ...]:
    return self.base.shape

  @property
  def dtype(self) -> Any:
    return self.base.dtype

  @property
  def nbits(self) -> int:
    return parts.nbits(self.base) + parts.nbits(self.delta)

  @property
  def kind(self) -> str:
    return f"{parts.kind(self.base)} + {parts.kind(self.delta)}"

  @classmethod
  def trainable_fields(cls) -> tuple[str, ...]:
    return ("base", "delta")

  @inlined
  def materialize(self) -> jax.Array:
    """Added up in float32."""
    base, delta = (parts.materialize(part).astype(jnp.float32) for part in (self.base, self.delta))
    return (base + delta).astype(self.dtype)

  def columns(self, start: Any, size: int) -> jax.Array:
    base, delta = (parts.columns(part, start, size, self.axis) for part in (self.base, self.delta))
    return base + delta

  def rows(self, ids: jax.Array) -> jax.Array:
    return parts.rows(self.base, ids) + parts.rows(self.delta, ids)

  def sharding_like(self, spec: PartitionSpec) -> SumArray:
    base, delta = (parts.sharding_like(part, spec) for part in (self.base, self.delta))
    return dataclasses.replace(self, base=base, delta=delta)


def added(base: Any, delta: Any, axis: int) -> SumArray:
  """The sum of two weights as a weight.

  Args:
    base, delta: of one shape, dense or compressed along `axis`.
    axis: the contraction axis.

  Raises:
    ValueError: the parts do not fit one another, or one acts on its input.
  """
  what = f"added(axis={axis})"
  if axis not in (-2, -1) or any(getattr(part, "axis", axis) != axis for part in (base, delta)):
    raise ValueError(f"{what}: axis is -2 (kernel) or -1 (table), the same for both parts")
  if tuple(base.shape) != tuple(delta.shape):
    raise ValueError(f"{what}: shapes {tuple(base.shape)} and {tuple(delta.shape)} differ")
  if any(isinstance(part, (InputArray, LearnedInputArray)) for part in (base, delta)):
    raise ValueError(f"{what}: a part acts on its input, which the sum would do to one part alone; wrap the sum")
  return SumArray(base, delta, axis)
