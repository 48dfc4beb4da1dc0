"""Products of compressed weights on GPUs, by rows of x.

Up to `FEW_ROWS` rows are bound by reading the weight: kernels read the stored bytes and decode them in registers
(`gpu_quantized`, `gpu_sparse`). With more rows a kernel decodes the same codes again for each tile of rows; on an H100
that took up to three times as long as what is done instead: a slab of outputs is decoded once, in the dtype of x, and
multiplied by the vendor's dense product. A slab is at most `SLAB_BYTES`, so that no more than a part of one weight ever
stands dense.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress.arrays.nm_sparse import NMSparseArray
from lmcompress.arrays.quantized import QuantizedArray
from lmcompress.ops.kernels import gpu_quantized, gpu_sparse
from lmcompress.ops.kernels.gpu_tiles import FEW_ROWS, Tiles
from lmcompress.ops.kernels.opaque import Product, around, dtype_reason, quantized_reason
from lmcompress.ops.linear import gathered_embed, over_tiles, tiled_attend, tiled_linear

SLAB_BYTES = 1 << 28
"""Bytes of a weight that stand dense at a time."""


def supports(x: Any, w: Any, door: str) -> str:
  """Why `door(x, w)` is left to the reference, in a short phrase, or '' if the kernel takes it."""
  if isinstance(w, NMSparseArray):
    if door != "linear":
      return "a 2:4 table"
    return dtype_reason(x) or gpu_sparse.sparse_reason(w)
  if not isinstance(w, QuantizedArray):
    return f"a {type(w).__name__}"
  if door == "embed":
    return quantized_reason(w, -1)
  return dtype_reason(x) or quantized_reason(w, -2 if door == "linear" else -1) or gpu_quantized.block_reason(w)


def linear(x: jax.Array, w: Any, *, interpret: bool = False, tiles: Tiles | None = None) -> jax.Array:
  """`x @ w` for `x: [..., in]` and a compressed kernel `w: [in, out]` that `supports` takes, in the dtype of x.

  `tiles` stand for what is chosen by the number of rows, slabs too; powers of two, 16 rows and inputs at least.
  """
  return _door("linear", type(w), interpret, tiles)(x, w)


def attend(x: jax.Array, w: QuantizedArray, *, interpret: bool = False, tiles: Tiles | None = None) -> jax.Array:
  """`x @ w.T` for `x: [..., features]` and a compressed table `w: [vocab, features]`, in the dtype of x."""
  return _door("attend", type(w), interpret, tiles)(x, w)


embed = gathered_embed
"""Rows of a table: a gather of bytes, which XLA does as well."""


@functools.cache
def _door(door: str, kind: type, interpret: bool, tiles: Tiles | None) -> Product:
  kernel = (gpu_sparse if kind is NMSparseArray else gpu_quantized).product

  def product(x: jax.Array, w: Any) -> jax.Array:
    if tiles is None and x.shape[0] > FEW_ROWS:
      return slabs(x, w, door)
    return kernel(x, w, interpret, tiles)

  if door == "linear":
    return around(product, tiled_linear, lambda w: w.shape[-1])
  return around(product, tiled_attend, lambda w: w.shape[-2])


def slabs(x: jax.Array, w: Any, door: str) -> jax.Array:
  """`[m, inputs] -> [m, outputs]` by dense products with slabs of the weight."""
  transposed = door == "attend"
  outputs = w.shape[-2] if transposed else w.shape[-1]
  contract = (((1,), (1 if transposed else 0,)), ((), ()))
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

  def product(start: jax.Array, size: int) -> jax.Array:
    dense = w.columns(start, size).astype(x.dtype)
    return jax.lax.dot_general(x, dense, contract, precision=precision, preferred_element_type=x.dtype)

  slab = max(1, SLAB_BYTES // (x.shape[1] * x.dtype.itemsize))
  return product(jnp.int32(0), outputs) if outputs <= slab else over_tiles(product, outputs, slab)
