"""A kernel that JAX cannot look into, made differentiable, batched and split over a mesh beside its reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmcompress.arrays.grids import Float8, Integer
from lmcompress.arrays.nm_sparse import NMSparseArray
from lmcompress.arrays.quantized import QuantizedArray
from lmcompress.ops.kernels.partition import Cut, partitioned

Product = Callable[[jax.Array, Any], jax.Array]
"""`(x [..., inputs], w) -> [..., outputs]`."""

DTYPES = ("float32", "bfloat16", "float16")


def around(kernel: Product, reference: Product, outputs: Callable[[Any], int]) -> Product:
  """`kernel` as a product of any leading axes, with vmap by folding into rows and the reference's gradients.

  The backward pass is that of `reference`, which rebuilds tiles and holds no dense weight; it reaches x and the
  fields of the weight that train. Under vmap over x alone the mapped axis becomes rows of one call; where the
  weight is mapped too, the kernel runs once for each. On a mesh each shard runs it on its part (`split`).

  Args:
    kernel: `(x [m, inputs], w) -> [m, outputs]` in the dtype of x, m at least 1.
    reference: differentiable, any leading axes.
    outputs: extent of the result's last axis.
  """

  @jax.custom_batching.custom_vmap
  def forward(x: jax.Array, w: Any) -> jax.Array:
    lead, last = x.shape[:-1], outputs(w)
    if 0 in (*x.shape, last):
      return jnp.zeros((*lead, last), x.dtype)
    return split(kernel, x.reshape(math.prod(lead), x.shape[-1]), w).reshape(*lead, last)

  @forward.def_vmap
  def _(axis_size: int, in_batched: Any, x: jax.Array, w: Any) -> tuple[jax.Array, bool]:
    x_batched, w_batched = in_batched
    if not any(jax.tree.leaves(w_batched)):
      return forward(x, w), True

    leaves, structure = jax.tree.flatten(w)
    mapped = jax.tree.leaves(w_batched)

    def one(i: jax.Array) -> jax.Array:
      parts = [leaf[i] if m else leaf for leaf, m in zip(leaves, mapped, strict=True)]
      return forward(x[i] if x_batched else x, jax.tree.unflatten(structure, parts))

    return jax.lax.map(one, jnp.arange(axis_size, dtype=jnp.int32)), True

  @jax.custom_vjp
  def product(x: jax.Array, w: Any) -> jax.Array:
    return forward(x, w)

  def backward(saved: tuple[jax.Array, Any], g: jax.Array) -> Any:
    return jax.vjp(reference, *saved)[1](g)

  product.defvjp(lambda x, w: (forward(x, w), (x, w)), backward)
  return product


def split(kernel: Product, rows: jax.Array, w: Any) -> jax.Array:
  """`kernel(rows, w)`, of which each shard of a mesh computes its part.

  The weight may be split by outputs, which sends nothing, and by inputs, whose partial results are added: into as many
  parts as it has whole blocks and groups. Where they are not whole (padding, a last group cut short) it stays whole.
  Partial results are in the dtype of x, as the kernels give them, and are added in float32.
  """
  if jax.device_count() == 1:
    return kernel(rows, w)
  leaves, structure = jax.tree.flatten(w)
  along = ("inputs", "outputs") if w.axis == -2 else ("outputs", "inputs")
  specs = jax.tree.leaves(w.sharding_like(PartitionSpec(*along)), is_leaf=lambda s: isinstance(s, PartitionSpec))
  names = [(*spec, *[None] * (leaf.ndim - len(spec))) for spec, leaf in zip(specs, leaves, strict=True)]
  parts = {"inputs": rows.shape[1], "outputs": 0}
  for ns, leaf in zip(names, leaves, strict=True):
    for name, extent in zip(ns, leaf.shape, strict=True):
      if name is not None:
        parts[name] = math.gcd(parts[name], extent)
  parts |= dict.fromkeys(_cut_short(w), 1)

  def cut(name: str | None) -> Cut:
    return None if name is None or parts[name] == 1 else (name, parts[name])

  lead = ("rows", rows.shape[0])
  call = partitioned(
    lambda x, *arrays: [kernel(x, jax.tree.unflatten(structure, arrays)).astype(jnp.float32)],
    [[lead, cut("inputs")], *([cut(name) for name in ns] for ns in names)],
    [[lead, cut("outputs")]],
    sums="inputs",
  )
  return call(rows, *leaves)[0].astype(rows.dtype)


def _cut_short(w: Any) -> set[str]:
  """The factors along which a weight ends within a block or a group."""
  if isinstance(w, NMSparseArray):
    return _cut_short(w.values) | ({"inputs"} if w.indices.pad else set())
  if not isinstance(w, QuantizedArray):
    return set()
  groups, found = w.scale.shape[w.axis], {"inputs"} if w.codes.pad else set[str]()
  if groups > 1 and groups * w.group_size != w.shape[w.axis]:
    found.add("inputs")
  if w.zero_point is not None and w.zero_point.pad and w.zero_point.shape[w.zero_point.axis] > 1:
    found.add("inputs" if w.zero_point.axis == w.axis else "outputs")
  return found | ({"inputs", "outputs"} if _cut_short(w.scale) else set())


def dtype_reason(x: Any) -> str:
  """Why `x` cannot be multiplied, or ''."""
  return "" if str(x.dtype) in DTYPES else f"x is {x.dtype}, not one of {', '.join(DTYPES)}"


def quantized_reason(w: QuantizedArray, axis: int) -> str:
  """Why `w` is not a form that the kernels decode, or ''."""
  codes, grid = w.codes, w.grid
  if codes.data.ndim != 3:
    return f"a stack of {codes.data.ndim - 3} leading axes"
  if codes.axis != axis:
    return "a table where a kernel is read" if axis == -2 else "a kernel where a table is read"
  if not isinstance(grid, (Integer, Float8)):
    return f"the grid {grid.name}"
  if codes.bits not in (4, 8):
    return f"{codes.bits}-bit codes"
  if w.scale.shape[axis] > 1 and w.group_size % codes.block:
    return f"groups of {w.group_size} cut packing blocks of {codes.block}"
  return ""


def two_of_four_reason(w: NMSparseArray) -> str:
  """Why `w` is no 2:4 kernel, whatever its values are stored in, or ''."""
  if (w.n, w.m) != (2, 4):
    return f"{w.n}:{w.m} sparsity"
  if w.indices.data.ndim != 3:
    return f"a stack of {w.indices.data.ndim - 3} leading axes"
  return "a table where a kernel is read" if w.indices.axis != -2 else ""
