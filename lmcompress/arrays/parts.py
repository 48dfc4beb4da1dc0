"""Parts of a composite: dense or compressed themselves, read in one way."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lmcompress.arrays.packing import _pad_spec
from lmcompress.types import CompressedArray


def nbits(part: Any) -> int:
  """Bits that a part takes in its stored form."""
  return part.nbits if hasattr(part, "nbits") else part.size * np.dtype(part.dtype).itemsize * 8


def kind(part: Any) -> str:
  """How a part is stored, in a word or two."""
  return part.kind if isinstance(part, CompressedArray) else str(part.dtype)


def materialize(part: Any) -> jax.Array:
  """The dense value, in the part's dtype."""
  return part.materialize() if isinstance(part, CompressedArray) else part


def columns(part: Any, start: Any, size: int, axis: int) -> jax.Array:
  """`size` outputs (table rows for axis -1) from `start` on, dense float32."""
  if isinstance(part, CompressedArray):
    return part.columns(start, size)
  return jax.lax.dynamic_slice_in_dim(part, start, size, part.ndim - 3 - axis).astype(jnp.float32)


def whole(part: Any, axis: int) -> jax.Array:
  """All of a part, dense float32; for the factors of a product, which are small beside it."""
  return columns(part, 0, part.shape[-3 - axis], axis)


def rows(part: Any, ids: jax.Array) -> jax.Array:
  """Table rows `[*ids.shape, features]`, dense float32."""
  return part.rows(ids) if isinstance(part, CompressedArray) else part[ids].astype(jnp.float32)


def sharding_like(part: Any, spec: PartitionSpec) -> Any:
  """A `PartitionSpec` for each array of the part, of its rank."""
  return part.sharding_like(spec) if isinstance(part, CompressedArray) else spec_of_rank(spec, part.ndim)


def spec_of_rank(spec: PartitionSpec, ndim: int) -> PartitionSpec:
  """A dense spec written out for `ndim` axes."""
  return PartitionSpec(*_pad_spec(spec, ndim))


def without(spec: PartitionSpec, axis: int, ndim: int) -> PartitionSpec:
  """A dense spec whose `axis` stays whole."""
  parts = list(_pad_spec(spec, ndim))
  parts[axis] = None
  return PartitionSpec(*parts)
