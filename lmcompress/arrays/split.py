"""SplitArray: two precisions in one weight, a few input channels kept apart from the rest."""

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
  jax.tree_util.register_dataclass, data_fields=("base", "outliers", "channels"), meta_fields=("axis",)
)
@dataclasses.dataclass(frozen=True)
class SplitArray(CompressedArray):
  """`x @ w == x' @ base + x[channels] @ outliers`, with x' the input less those channels (arXiv:2208.07339).

  So what rounds the input of the base, such as a scale for each token, sees no outlier.

  Attributes:
    base: `[..., in, out]` (`[..., vocab, features]` for axis -1), dense or compressed; its entries at `channels` are
      not read.
    outliers: `[..., k, out]` (`[..., vocab, k]`), dense or compressed.
    channels: int32 `[..., k]`, ascending.
    axis: the contraction axis.
  """

  base: Any
  outliers: Any
  channels: jax.Array
  axis: int

  @property
  def shape(self) -> tuple[int, ...]:
    return self.base.shape

  @property
  def dtype(self) -> Any:
    return self.base.dtype

  @property
  def nbits(self) -> int:
    return parts.nbits(self.base) + parts.nbits(self.outliers) + parts.nbits(self.channels)

  @property
  def kind(self) -> str:
    return f"{parts.kind(self.base)} + {self.channels.shape[-1]} {parts.kind(self.outliers)}"

  @classmethod
  def trainable_fields(cls) -> tuple[str, ...]:
    return ("base", "outliers")

  @inlined
  def materialize(self) -> jax.Array:
    put = self._put
    for _ in self.shape[:-2]:
      put = jax.vmap(put)
    return put(parts.materialize(self.base), parts.materialize(self.outliers), self.channels)

  def columns(self, start: Any, size: int) -> jax.Array:
    base, outliers = (parts.columns(part, start, size, self.axis) for part in (self.base, self.outliers))
    return self._put(base, outliers, self.channels)

  def rows(self, ids: jax.Array) -> jax.Array:
    return parts.rows(self.base, ids).at[..., self.channels].set(parts.rows(self.outliers, ids))

  def sharding_like(self, spec: PartitionSpec) -> SplitArray:
    few = parts.without(spec, self.axis, len(self.shape))
    return dataclasses.replace(
      self,
      base=parts.sharding_like(self.base, spec),
      outliers=parts.sharding_like(self.outliers, few),
      channels=PartitionSpec(*few[: len(self.shape) - 2], None),  # type: ignore[arg-type]
    )

  def _put(self, base: jax.Array, outliers: jax.Array, channels: jax.Array) -> jax.Array:
    outliers = outliers.astype(base.dtype)
    return base.at[channels].set(outliers) if self.axis == -2 else base.at[:, channels].set(outliers)


def split(base: Any, outliers: Any, channels: jax.Array, axis: int) -> SplitArray:
  """A weight with some input channels kept apart.

  Args:
    base: the weight, dense or compressed along `axis`.
    outliers: what stands at `channels`, dense or compressed along `axis`.
    channels: `[..., k]` integers, ascending, at least one.

  Raises:
    ValueError: the parts do not fit one another.
  """
  what = f"split(axis={axis})"
  if axis not in (-2, -1) or any(getattr(part, "axis", axis) != axis for part in (base, outliers)):
    raise ValueError(f"{what}: axis is -2 (kernel) or -1 (table), the same for both parts")
  want = list(base.shape)
  want[axis] = channels.shape[-1]
  if list(outliers.shape) != want or not channels.shape[-1] or tuple(channels.shape[:-1]) != tuple(base.shape[:-2]):
    raise ValueError(
      f"{what}: outliers {tuple(outliers.shape)} at {tuple(channels.shape)} channels do not fit {tuple(base.shape)}"
    )
  if not jnp.issubdtype(channels.dtype, jnp.integer):
    raise ValueError(f"{what}: channels are integers, found {channels.dtype}")
  if not isinstance(channels, jax.core.Tracer):
    low, high = int(jnp.min(channels)), int(jnp.max(channels))
    if low < 0 or high >= base.shape[axis] or not bool(jnp.all(jnp.diff(channels, axis=-1) > 0)):
      raise ValueError(f"{what}: channels from {low} to {high}, ascending, within {base.shape[axis]} inputs")
  return SplitArray(base, outliers, channels.astype(jnp.int32), axis)
