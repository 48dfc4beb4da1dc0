"""CPU kernels: the C++ handlers as JAX functions that batch, differentiate and partition."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.arrays.tiled import TiledArray
from lmcompress.ops import backend
from lmcompress.ops.kernels.partition import Cut, partitioned
from lmcompress.ops.linear import Rules, gathered_embed, register, tiled_attend, tiled_linear

_CODES = {"integer": 0, "table": 1, "bfloat16": 2, "n_of_m": 3, "bitmap": 4}
_TYPES = {"": 0, "float32": 1, "bfloat16": 3, "uint8": 4}
_ACTIVATIONS = {"float32": 0, "bfloat16": 1, "int8": 2, "int8_token": 3}


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
  structure = jax.tree.structure(weights)

  def call(rows: jax.Array, *arrays: jax.Array) -> Sequence[jax.Array]:
    return _ffi_linear(rows, jax.tree.unflatten(structure, arrays))

  parts = tuple(math.gcd(*counts) for counts in zip(*(w.parts for w in weights), strict=True))
  lead, operands = ("rows", rows.shape[0]), [cut for w in weights for cut in _cuts(w, *parts)]
  result = [lead, _cut("outputs", parts[1])]
  run = partitioned(call, [[lead, _cut("inputs", parts[0])], *operands], [result] * len(weights), sums="inputs")
  return run(rows, *jax.tree.leaves(weights))


def _cut(factor: str, parts: int) -> Cut:
  return (factor, parts) if parts > 1 else None


def _cuts(w: TiledArray, inputs: int, outputs: int) -> list[list[Cut]]:
  """How each array of a weight splits, its inputs and its outputs into so many parts."""
  along = {"inputs": _cut("inputs", inputs), "outputs": _cut("outputs", outputs)}
  return [[along.get(name or "") for name in w.along(field)] for field in w.fields]


def _ffi_linear(rows: jax.Array, weights: Sequence[TiledArray]) -> Sequence[jax.Array]:
  forms = np.asarray([_describe(w) for w in weights], np.int64).reshape(-1)
  outputs = [jax.ShapeDtypeStruct((rows.shape[0], w.outputs), jnp.float32) for w in weights]
  operands = [array for w in weights for array in w.arrays]
  call = jax.ffi.ffi_call("lmc_linear", outputs)
  return call(rows, *operands, forms=forms, activations=np.int64(_ACTIVATIONS[weights[0].activations]))


def _linear(x: jax.Array, w: TiledArray) -> jax.Array:
  return products(x, [w])[0] if backend.runs_native() else tiled_linear(x, w)


def _attend(x: jax.Array, w: TiledArray) -> jax.Array:
  return products(x, [w])[0] if backend.runs_native() else tiled_attend(x, w)


def _embed(ids: jax.Array, w: TiledArray) -> jax.Array:
  if not backend.runs_native():
    return gathered_embed(ids, w)
  ids = jnp.asarray(ids, jnp.int32)
  ids = jnp.where(ids < 0, ids + w.outputs, ids)
  rows = _batched_embed(jnp.clip(ids, 0, w.outputs - 1).reshape(-1), w)
  return rows.reshape(*ids.shape, w.inputs)


@jax.custom_batching.sequential_vmap
def _batched_embed(ids: jax.Array, w: TiledArray) -> jax.Array:
  arrays, structure = jax.tree.flatten(w)

  def call(ids: jax.Array, *arrays: jax.Array) -> Sequence[jax.Array]:
    w = jax.tree.unflatten(structure, arrays)
    out = jax.ShapeDtypeStruct((ids.shape[0], w.inputs), jnp.float32)
    return [jax.ffi.ffi_call("lmc_embed", out)(ids, *arrays, form=np.asarray(_describe(w), np.int64))]

  def of_shard(place: jax.Array, ids: jax.Array, *arrays: jax.Array) -> Sequence[jax.Array]:
    rows = jax.tree.unflatten(structure, arrays).outputs
    ids = ids - place * rows
    found = (ids >= 0) & (ids < rows)
    return [jnp.where(found[:, None], call(jnp.clip(ids, 0, rows - 1), *arrays)[0], 0.0)]

  n = ids.shape[0]
  run = partitioned(
    call,
    [[("ids", n)], *_cuts(w, *w.parts)],
    [[("ids", n), _cut("inputs", w.parts[0])]],
    sums="outputs",
    by_place=of_shard,
  )
  return run(ids, *arrays)[0]


def _linears(x: jax.Array, weights: Sequence[TiledArray]) -> list[jax.Array]:
  if backend.runs_native() and len({w.activations for w in weights}) == 1:
    return products(x, weights)
  return [_linear(x, w) for w in weights]


register(TiledArray, Rules(_linear, _embed, _attend), _linears)


def _broadcasting(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """`kernel` under vmap: once, over all arguments with one more leading axis."""
  function = jax.custom_batching.custom_vmap(kernel)

  @function.def_vmap
  def _(axis_size: int, in_batched: Any, *args: jax.Array) -> tuple[jax.Array, bool]:
    pairs = zip(args, in_batched, strict=True)
    return function(*(x if there else jnp.broadcast_to(x, (axis_size, *x.shape)) for x, there in pairs)), True

  return function


def _each(x: jax.Array) -> list[Cut]:
  """Every dimension by itself."""
  return [(f"axis{i}", extent) for i, extent in enumerate(x.shape)]


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  """`x / rms(x) * scale` for float32 `x: [..., features]`."""

  @_broadcasting
  def run(x: jax.Array, scale: jax.Array) -> jax.Array:
    def call(x: jax.Array, scale: jax.Array) -> Sequence[jax.Array]:
      out = jax.ShapeDtypeStruct(x.shape, jnp.float32)
      return [jax.ffi.ffi_call("lmc_rms_norm", out)(x, scale, epsilon=np.float32(epsilon))]

    lead = _each(x)[:-1]
    cuts = [*lead, None]
    return partitioned(call, [cuts, [*lead[: scale.ndim - 1], None]], [cuts])(x, scale)[0]

  return run(x, scale)


@jax.custom_batching.sequential_vmap
def sparse_linear(x: jax.Array, w: jax.Array) -> jax.Array:
  """`x @ w` for float32 `x: [rows, in]`, `w: [in, out]`; rows of `w` whose input is 0 are not read."""

  def call(x: jax.Array, w: jax.Array) -> Sequence[jax.Array]:
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), jnp.float32)
    return [jax.ffi.ffi_call("lmc_sparse_linear", out)(x, w)]

  rows, inputs, outputs = (("rows", x.shape[0]), ("inputs", w.shape[0]), ("outputs", w.shape[1]))
  return partitioned(call, [[rows, inputs], [inputs, outputs]], [[rows, outputs]], sums="inputs")(x, w)[0]


@_broadcasting
def gated_silu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """`silu(gate) * up`, float32 of any shape."""

  def call(gate: jax.Array, up: jax.Array) -> Sequence[jax.Array]:
    return [jax.ffi.ffi_call("lmc_gated_silu", jax.ShapeDtypeStruct(gate.shape, jnp.float32))(gate, up)]

  return partitioned(call, [_each(gate)] * 2, [_each(gate)])(gate, up)[0]


@_broadcasting
def argmax(x: jax.Array) -> jax.Array:
  """The first largest of the last axis of float32 `x`, int32; a NaN counts as largest."""

  def call(x: jax.Array) -> Sequence[jax.Array]:
    return [jax.ffi.ffi_call("lmc_argmax", jax.ShapeDtypeStruct(x.shape[:-1], jnp.int32))(x)]

  lead = _each(x)[:-1]
  return partitioned(call, [[*lead, None]], [lead])(x)[0]


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
    buffers: those of a `LayerCache` or a `WindowedCache`; none without a cache.

  Returns:
    `[batch, length, heads * head]`, and the buffers.
  """

  def call(*arrays: jax.Array) -> Sequence[jax.Array]:
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (arrays[0], *arrays[7:])]
    aliases = {7 + i: 1 + i for i in range(len(buffers))}
    call = jax.ffi.ffi_call("lmc_attention", shapes, input_output_aliases=aliases)
    return call(*arrays, head=np.int64(head), factor=np.float32(scale))

  batch, heads = ("batch", q.shape[0]), _cut("heads", k.shape[-1] // head)
  stream, cached = [batch, None, heads], [[batch, heads, *[None] * (x.ndim - 2)] for x in buffers]
  angles = [batch, None, None]
  operands = [stream, stream, stream, angles, angles, [batch, None], [None], *cached]
  at = jnp.asarray(slot, jnp.int32).reshape(1)
  mixed, *after = partitioned(call, operands, [stream, *cached])(q, k, v, cos, sin, real, at, *buffers)
  return mixed, tuple(after)
