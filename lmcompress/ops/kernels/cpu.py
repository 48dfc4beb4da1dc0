"""CPU kernels: the C++ handlers as JAX functions that batch, differentiate and partition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.arrays.tiled import TiledArray
from lmcompress.ops import backend
from lmcompress.ops.linear import Rules, gathered_embed, register, tiled_attend, tiled_linear

_CODES = {"integer": 0, "table": 1, "bfloat16": 2, "n_of_m": 3, "bitmap": 4}
_TYPES = {"": 0, "float32": 1, "bfloat16": 3, "uint8": 4}
_ACTIVATIONS = {"float32": 0, "bfloat16": 1, "int8": 2}


def _describe(w: TiledArray) -> list[int]:
  """The numbers of `native/linear.cpp`'s `Field`, in its order."""
  form = w.form
  row = max(32, -(-w.inputs // 32) * 32)
  padded = row if form.padded_group == -1 else form.padded_group
  group = padded if form.padded_group == -1 else form.group
  return [
    _CODES[form.codes],
    form.bits,
    w.inputs,
    w.outputs,
    padded,
    group,
    form.offset,
    form.n,
    form.m,
    int(w.scale is not None),
    int(w.zero is not None),
    int(w.minimum is not None),
    form.outer,
    int(w.table is not None),
    _TYPES[form.value],
  ]


def products(x: jax.Array, weights: Sequence[TiledArray]) -> list[jax.Array]:
  """`x @ w` for each of several weights in one operation; tables are contracted over their features.

  Args:
    x: `[..., inputs]`.
    weights: tiled, of the same inputs and activations.

  Returns:
    `[..., outputs]` for each, in the dtype of `x`.
  """
  lead = x.shape[:-1]
  rows = x.reshape(math.prod(lead), x.shape[-1]).astype(jnp.float32)
  ys = _product(rows, tuple(weights))
  return [y.reshape(*lead, y.shape[-1]).astype(x.dtype) for y in ys]


@jax.custom_vjp
def _product(rows: jax.Array, weights: tuple[TiledArray, ...]) -> tuple[jax.Array, ...]:
  return _batched(rows, weights)


def _reference(rows: jax.Array, weights: tuple[TiledArray, ...]) -> tuple[jax.Array, ...]:
  return tuple(tiled_linear(rows, w) if w.axis == -2 else tiled_attend(rows, w) for w in weights)


def _backward(saved: tuple, g: Any) -> Any:
  """The reference's, tile by tile. Rounded activations pass gradients straight through."""
  return jax.vjp(_reference, *saved)[1](g)


_product.defvjp(lambda rows, weights: (_batched(rows, weights), (rows, weights)), _backward)


@jax.custom_batching.custom_vmap
def _batched(rows: jax.Array, weights: tuple[TiledArray, ...]) -> tuple[jax.Array, ...]:
  return _call(rows, weights)


@_batched.def_vmap
def _(axis_size: int, in_batched: Any, rows: jax.Array, weights: Any) -> Any:
  rows_batched, weights_batched = in_batched
  mapped = jax.tree.leaves(weights_batched)
  if not any(mapped):  # the mapped axis becomes rows of one call
    ys = _batched(rows.reshape(-1, rows.shape[-1]), weights)
    return tuple(y.reshape(axis_size, -1, y.shape[-1]) for y in ys), (True,) * len(ys)
  leaves, structure = jax.tree.flatten(weights)

  def one(i: jax.Array) -> Any:
    parts = [leaf[i] if m else leaf for leaf, m in zip(leaves, mapped, strict=True)]
    return _batched(rows[i] if rows_batched else rows, jax.tree.unflatten(structure, parts))

  ys = jax.lax.map(one, jnp.arange(axis_size, dtype=jnp.int32))
  return ys, (True,) * len(ys)


def _call(rows: jax.Array, weights: tuple[TiledArray, ...]) -> tuple[jax.Array, ...]:
  forms = np.asarray([_describe(w) for w in weights], np.int64).reshape(-1)
  outputs = [jax.ShapeDtypeStruct((rows.shape[0], w.outputs), jnp.float32) for w in weights]
  call = jax.ffi.ffi_call("lmc_linear", outputs)
  operands = [array for w in weights for array in w.arrays]
  return tuple(call(rows, *operands, forms=forms, activations=np.int64(_ACTIVATIONS[weights[0].activations])))


def _linear(x: jax.Array, w: TiledArray) -> jax.Array:
  return products(x, [w])[0] if backend.runs_native() else tiled_linear(x, w)


def _attend(x: jax.Array, w: TiledArray) -> jax.Array:
  return products(x, [w])[0] if backend.runs_native() else tiled_attend(x, w)


def _embed(ids: jax.Array, w: TiledArray) -> jax.Array:
  if not backend.runs_native():
    return gathered_embed(ids, w)
  ids = jnp.asarray(ids, jnp.int32)
  ids = jnp.where(ids < 0, ids + w.outputs, ids)
  out = jax.ShapeDtypeStruct((*ids.shape, w.inputs), jnp.float32)
  form = np.asarray(_describe(w), np.int64)
  return jax.ffi.ffi_call("lmc_embed", out, vmap_method="sequential")(ids, *w.arrays, form=form)


def _linears(x: jax.Array, weights: Sequence[TiledArray]) -> list[jax.Array]:
  if backend.runs_native() and len({w.activations for w in weights}) == 1:
    return products(x, weights)
  return [_linear(x, w) for w in weights]


register(TiledArray, Rules(_linear, _embed, _attend), _linears)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  """`x / rms(x) * scale` for float32 `x: [..., features]`."""
  call = jax.ffi.ffi_call("lmc_rms_norm", jax.ShapeDtypeStruct(x.shape, jnp.float32), vmap_method="broadcast_all")
  return call(x, scale, epsilon=np.float32(epsilon))


def gated_silu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """`silu(gate) * up`, float32 of any shape."""
  call = jax.ffi.ffi_call("lmc_gated_silu", jax.ShapeDtypeStruct(gate.shape, jnp.float32), vmap_method="broadcast_all")
  return call(gate, up)


def argmax(x: jax.Array) -> jax.Array:
  """The first largest of the last axis of float32 `x`, int32; a NaN counts as largest."""
  out = jax.ShapeDtypeStruct(x.shape[:-1], jnp.int32)
  return jax.ffi.ffi_call("lmc_argmax", out, vmap_method="broadcast_all")(x)


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
  real: jax.Array,
  slot: jax.Array,
  buffers: tuple[jax.Array, ...],
  head: int,
  scale: float,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Rotary positions, the cache's update (in place where the buffers may be given up), and attention.

  Args:
    q: `[batch, length, heads * head]` float32; k, v: `[batch, length, kv * head]`.
    cos, sin: `[batch, length, head / 2]`.
    real: bool `[batch, slots]`.
    slot: int32, where the first of these tokens goes.
    buffers: keys, values and, where they are codes, their scales; none without a cache.

  Returns:
    `[batch, length, heads * head]`, and the buffers.
  """
  shapes = [jax.ShapeDtypeStruct(b.shape, b.dtype) for b in buffers]
  out = [jax.ShapeDtypeStruct(q.shape, jnp.float32), *shapes]
  aliases = {7 + i: 1 + i for i in range(len(buffers))}
  call = jax.ffi.ffi_call("lmc_attention", out, input_output_aliases=aliases)
  at = jnp.asarray(slot, jnp.int32).reshape(1)
  mixed, *after = call(q, k, v, cos, sin, real, at, *buffers, head=np.int64(head), factor=np.float32(scale))
  return mixed, tuple(after)
