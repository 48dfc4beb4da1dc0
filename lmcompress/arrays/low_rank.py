"""LowRankArray: a weight as a tall factor times a wide one, never multiplied out to be used."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmcompress.arrays import parts
from lmcompress.arrays.packing import inlined
from lmcompress.types import CompressedArray


@functools.partial(jax.tree_util.register_dataclass, data_fields=("left", "right"), meta_fields=("axis",))
@dataclasses.dataclass(frozen=True)
class LowRankArray(CompressedArray):
  """`dense == left @ right`, multiplied in float32.

  Attributes:
    left: `[..., in, rank]` for axis -2, `[..., vocab, rank]` for axis -1; dense, or compressed along `axis`.
    right: `[..., rank, out]` (`[..., rank, features]`); dense, or compressed along `axis`.
    axis: the contraction axis; a product with the weight contracts both factors along it, so both factors of a
      table are tables.
  """

  left: Any
  right: Any
  axis: int

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.left.shape[:-1], self.right.shape[-1])

  @property
  def dtype(self) -> Any:
    return jnp.promote_types(self.left.dtype, self.right.dtype)

  @property
  def rank(self) -> int:
    return self.right.shape[-2]

  @property
  def nbits(self) -> int:
    return parts.nbits(self.left) + parts.nbits(self.right)

  @property
  def kind(self) -> str:
    kinds = [parts.kind(part) for part in (self.left, self.right)]
    stored = "" if not any(isinstance(p, CompressedArray) for p in (self.left, self.right)) else kinds[0]
    return f"low rank {self.rank} {' x '.join(dict.fromkeys(kinds)) if stored else ''}".strip()

  @classmethod
  def trainable_fields(cls) -> tuple[str, ...]:
    return ("left", "right")

  @inlined
  def materialize(self) -> jax.Array:
    return jnp.matmul(parts.whole(self.left, self.axis), parts.whole(self.right, self.axis)).astype(self.dtype)

  def columns(self, start: Any, size: int) -> jax.Array:
    """A tile of one factor times all of the other, which is dense for that long."""
    if self.axis == -2:
      return jnp.matmul(parts.whole(self.left, -2), parts.columns(self.right, start, size, -2))
    return jnp.matmul(parts.columns(self.left, start, size, -1), parts.whole(self.right, -1))

  def rows(self, ids: jax.Array) -> jax.Array:
    return jnp.matmul(parts.rows(self.left, ids), parts.whole(self.right, -1))

  def sharding_like(self, spec: PartitionSpec) -> LowRankArray:
    """Each factor is split along the axis that it shares with the dense value; the rank stays whole."""
    ndim = len(self.shape)
    return dataclasses.replace(
      self,
      left=parts.sharding_like(self.left, parts.without(spec, -1, ndim)),
      right=parts.sharding_like(self.right, parts.without(spec, -2, ndim)),
    )


def low_rank(left: Any, right: Any, axis: int) -> LowRankArray:
  """The product of two factors as a weight.

  Args:
    left: `[..., in, rank]` (`[..., vocab, rank]` for axis -1), dense or compressed along `axis`.
    right: `[..., rank, out]` (`[..., rank, features]`), dense or compressed along `axis`.
    axis: the contraction axis.

  Raises:
    ValueError: the factors do not fit one another or the axis.
  """
  what = f"low_rank(axis={axis})"
  if axis not in (-2, -1):
    raise ValueError(f"{what}: axis is -2 (kernel) or -1 (table)")
  a, b = tuple(left.shape), tuple(right.shape)
  if len(a) < 2 or len(a) != len(b) or a[:-2] != b[:-2] or a[-1] != b[-2] or not a[-1]:
    raise ValueError(f"{what}: factors {a} and {b} cannot be multiplied; [..., in, rank] and [..., rank, out] can")
  for name, part in (("left", left), ("right", right)):
    if getattr(part, "axis", axis) != axis:
      raise ValueError(f"{what}: {name} is compressed along {part.axis}; compress both factors along {axis}")
    if not jnp.issubdtype(part.dtype, jnp.floating):
      raise ValueError(f"{what}: {name} has dtype {part.dtype}, a floating dtype is needed")
  return LowRankArray(left, right, axis)
