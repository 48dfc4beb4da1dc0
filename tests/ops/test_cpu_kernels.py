"""The C++ kernels against products in float64: every form of weight, few rows and many, each kind of activations."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lmcompress import ops
from lmcompress.arrays import E2M1, FP8_E4M3, FP8_E5M2, NF4, BitmapArray, Integer, NMSparseArray, QuantizedArray
from lmcompress.arrays import clustered as make_clustered
from lmcompress.arrays.nm_sparse import nm_mask
from lmcompress.arrays.packing import choose_block, pack
from lmcompress.arrays.sparse_form import all_codes, as_n_of_m
from lmcompress.arrays.tiled import TiledArray, pack_tiles, unpack_tiles
from lmcompress.ops import backend
from lmcompress.ops.kernels.cpu import _describe
from lmcompress.ops.rounding import pack_zeros, quantize
from lmcompress.transforms.round_to_nearest import quantize_matrix

pytestmark = pytest.mark.skipif(backend.native() is None, reason="the kernels are not built")
quiet = functools.partial(settings, phases=[Phase.generate], deadline=None, derandomize=True, database=None)
fill = jax.jit(pack, static_argnames=("bits", "axis", "block"))
dense_value = jax.jit(lambda leaf: leaf.materialize())
AXES = pytest.mark.parametrize("axis", [-2, -1], ids=["kernel", "table"])
ACTIVATIONS = ("float32", "bfloat16", "int8", "int8_token")


class Case(NamedTuple):
  """A leaf, its dense value `[inputs, outputs]` in float64, and what the zero of each entry moves it by."""

  leaf: Any
  axis: int
  dense: np.ndarray
  shift: np.ndarray


def turned(x, axis):
  """`[inputs, outputs]` as the leaf has it, and back."""
  return x if axis == -2 else x.T


def packed(codes, bits, axis, group=-1):
  """Codes `[inputs, outputs]`."""
  return fill(np.ascontiguousarray(turned(codes, axis)), bits, axis, choose_block(codes.shape[0], group, bits))


def grid_values(grid, codes):
  if isinstance(grid, Integer):
    return codes.astype(np.float64) - grid.offset
  entries = len(grid.values) if hasattr(grid, "values") else 256
  return np.asarray(grid.decode(jnp.arange(entries, dtype=jnp.uint8)), np.float64)[codes]


def on_grid(rng, grid, group, axis, inputs, outputs, zero="symmetric", scale_dtype="float32"):
  """Codes from all of the grid; scales, zero points and minimums at random."""
  if isinstance(grid, Integer):
    codes = rng.integers(grid.lowest, 2**grid.bits, (inputs, outputs))
  else:
    codes = rng.integers(0, len(grid.values) if hasattr(grid, "values") else 256, (inputs, outputs))
    if grid in (FP8_E4M3, FP8_E5M2):
      codes = np.where(np.isfinite(grid_values(grid, codes)), codes, 0)
  size = inputs if group == -1 else group
  groups = -(-inputs // size)
  wide = lambda x: np.repeat(x, size, axis=0)[:inputs]  # noqa: E731
  if scale_dtype == "float8_e8m0fnu":
    scale = (2.0 ** rng.integers(-6, 4, (groups, outputs))).astype(ml_dtypes.float8_e8m0fnu)
  else:
    scale = rng.uniform(-2, 2, (groups, outputs)).astype(scale_dtype)
  s, zeros, minimum = wide(scale.astype(np.float64)), None, None
  values = grid_values(grid, codes)
  shift = np.abs(s * getattr(grid, "offset", 0))
  if zero == "zero point":
    zeros = rng.integers(0, 2**grid.bits, (groups, outputs)).astype(np.uint8)
    dense, shift = (values - wide(zeros)) * s, np.abs(wide(zeros) * s)
    zeros = pack_zeros(jnp.asarray(turned(zeros, axis)), grid.bits, -3 - axis, 8)
  elif zero == "minimum":
    minimum = rng.uniform(-9, 3, (groups, outputs)).astype(scale_dtype)
    dense, shift = values * s + wide(minimum.astype(np.float64)), np.abs(wide(minimum.astype(np.float64)))
    minimum = jnp.asarray(turned(minimum, axis))
  else:
    dense = values * s
  codes = packed(codes.astype(np.uint8), grid.bits, axis, group)
  leaf = QuantizedArray(codes, jnp.asarray(turned(scale, axis)), zeros, minimum, grid, group, "float32")
  return Case(leaf, axis, dense, shift)


def integer(rng, bits, group, axis, inputs, outputs, zero, scale_dtype="float32"):
  grid = Integer(bits, 2 ** (bits - 1) if zero == "symmetric" else 0)
  return on_grid(rng, grid, group, axis, inputs, outputs, zero, scale_dtype)


def rounded(rng, axis, inputs, outputs, **options):
  """A normal weight through `round_to_nearest`; its dense value is the leaf's own."""
  w = jnp.asarray(turned(rng.normal(0, 0.5, (inputs, outputs)), axis), jnp.float32)
  leaf = quantize_matrix(w, axis=axis, **options)
  at_zero = dataclasses.replace(leaf, codes=dataclasses.replace(leaf.codes, data=jnp.zeros_like(leaf.codes.data)))
  dense, shift = (turned(np.asarray(dense_value(x), np.float64), axis) for x in (leaf, at_zero))
  return Case(leaf, axis, dense, np.abs(shift))


def clustered(rng, bits, axis, inputs, outputs):
  entries = rng.integers(1, 2**bits + 1)
  codebook = rng.normal(size=entries).astype(np.float32)
  codes = rng.integers(0, entries, (inputs, outputs))
  leaf = make_clustered(jnp.asarray(turned(codes, axis)), jnp.asarray(codebook), bits, axis)
  return Case(leaf, axis, codebook[codes].astype(np.float64), np.zeros((inputs, outputs)))


def bfloat16(rng, axis, inputs, outputs):
  w = rng.normal(size=(inputs, outputs)).astype(ml_dtypes.bfloat16)
  return Case(jnp.asarray(turned(w, axis)), axis, w.astype(np.float64), np.zeros(w.shape))


def sparse_values(rng, shape, kind, axis):
  """The stored values of a sparse weight `[kept, outputs]`, dense or with int8 codes, and what they are."""
  if kind == "int8":
    codes = rng.integers(0, 256, shape)
    codes = np.where(rng.random(shape) < 0.2, 128, codes).astype(np.uint8)
    scale = rng.uniform(0.1, 2, (1, shape[1])).astype(ml_dtypes.bfloat16)
    data = packed(codes, 8, axis)
    leaf = QuantizedArray(data, jnp.asarray(turned(scale, axis)), None, None, Integer(8, 128), -1, "float32")
    return leaf, (codes.astype(np.float64) - 128) * scale.astype(np.float64)
  values = np.where(rng.random(shape) < 0.2, 0, rng.normal(size=shape)).astype(jnp.dtype(kind))
  return jnp.asarray(turned(values, axis)), values.astype(np.float64)


def n_of_m(rng, n, m, kind, axis, inputs, outputs):
  groups = -(-inputs // m)
  positions = np.sort(np.argsort(rng.random((groups, m, outputs)), axis=1)[:, :n], axis=1)
  leaf, values = sparse_values(rng, (groups * n, outputs), kind, axis)
  dense = np.zeros((groups, m, outputs))
  np.put_along_axis(dense, positions, values.reshape(groups, n, outputs), axis=1)
  bits = (m - 1).bit_length()
  indices = packed(positions.reshape(groups * n, outputs).astype(np.uint8), bits, axis)
  shape = groups * m, outputs
  return Case(NMSparseArray(leaf, indices, n, m), axis, dense.reshape(shape), np.zeros(shape))


def bitmap(rng, kind, axis, inputs, outputs):
  there = rng.random((inputs, outputs)) < 0.4
  leaf, values = sparse_values(rng, (max(1, int(there.sum(axis=0).max())), outputs), kind, axis)
  dense = np.where(there, np.take_along_axis(values, np.maximum(np.cumsum(there, axis=0) - 1, 0), axis=0), 0)
  bits = fill(np.ascontiguousarray(turned(there, axis)).astype(np.uint8), 1, axis, 8)
  return Case(BitmapArray(bits, leaf), axis, dense, np.zeros(dense.shape))


# ---------------------------------------------------------------------------------------------- what is to be expected


def tiled(case, activations="float32"):
  name = "kernel" if case.axis == -2 else "table"
  leaf = ops.prepare({name: case.leaf}, activations=activations)[name]
  assert isinstance(leaf, TiledArray)
  return leaf


def units(w):
  """Where inputs begin that share a scale of their int8 activations: every 32 of a group (16 where groups are 16)."""
  if w.activations == "int8_token":
    return [0]
  form, size = w.form, 16 if w.form.padded_group == 16 else 32
  group = w.inputs if form.group == -1 else form.group
  return [i for start in range(0, w.inputs, group) for i in range(start, min(start + group, w.inputs), size)]


def int8(x, w):
  """`x` rounded to 8 bits by the unit, and how much of it a tie may move: values within 1e-4 of the middle."""
  y, ties = np.zeros(x.shape), np.zeros(x.shape)
  starts = units(w)
  for first, last in zip(starts, [*starts[1:], x.shape[1]], strict=True):
    part = x[:, first:last]
    amax = np.abs(part).max(axis=1, keepdims=True)
    scale = np.where(amax > 0, amax / np.float32(127), np.float32(1))
    at = part * np.where(amax > 0, np.float32(127) / np.where(amax > 0, amax, np.float32(1)), np.float32(0))
    y[:, first:last] = np.round(at) * scale.astype(np.float64)
    ties[:, first:last] = scale * (np.abs(np.abs(at - np.floor(at)) - 0.5) < 1e-4)
  return y, ties


def product(x, w):
  return (ops.linear if w.axis == -2 else ops.attend)(x, w)


def check(case, w, rows, seed=7):
  """Within what roundings can do to the product in float64.

  float32: n products added in float32 are n roundings of up to the sum of magnitudes, a random walk of sqrt(n) steps of
  2**-24, times 8 for its tail; magnitudes are those before a zero cancels. bfloat16: many rows and their weights are
  rounded to it, 2**-8 each (weights that are bfloat16 are exact); few rows stay in float32. int8: the activations
  are the rounded ones, exact but for ties.
  """
  x = np.random.default_rng(seed).normal(size=(rows, case.dense.shape[0])).astype(np.float32)
  y = np.asarray(product(jnp.asarray(x), w))
  assert y.shape == (rows, case.dense.shape[1]) and y.dtype == np.float32
  inputs, ties = int8(x, w) if w.activations.startswith("int8") else (x.astype(np.float64), 0 * x)
  magnitude = np.abs(inputs)
  bound = 8 * x.shape[1] ** 0.5 * 2.0**-24 * (magnitude @ (np.abs(case.dense) + 2 * case.shift)) + 2.0**-100
  bound += ties @ np.abs(case.dense)
  if w.activations == "bfloat16" and rows > 8:
    bound += 2.0**-8 * (1 if w.form.codes == "bfloat16" else 2) * (magnitude @ np.abs(case.dense))
  error = np.abs(y - inputs @ case.dense)
  assert np.all(error <= bound), (w.kind, rows, float(np.max(error / bound)))


def check_all(case, few, many, all_activations=True):
  """Each path of a weight, and rows of a table."""
  w = tiled(case)
  assert w.shape == case.leaf.shape and w.outputs == case.dense.shape[1]
  for activations in ACTIVATIONS if all_activations else ("float32",):
    name = "kernel" if case.axis == -2 else "table"
    acting = ops.prepare({name: w}, activations=activations)[name]
    if acting.activations == activations:  # int8 is for integers
      check(case, acting, many)
      if few and activations != "bfloat16":
        check(case, acting, few)
  if case.axis == -1:
    ids = np.random.default_rng(5).integers(-case.dense.shape[1], case.dense.shape[1], (2, 3))
    y, bound = np.asarray(ops.embed(jnp.asarray(ids), w)), 2.0**-22 * (np.abs(case.dense) + 2 * case.shift).T[ids]
    assert y.shape == (2, 3, case.dense.shape[0]) and np.all(np.abs(y - case.dense.T[ids]) <= bound)


shapes = given(
  axis=st.sampled_from([-2, -1]),
  inputs=st.sampled_from([83, 1, 40, 32, 129, 64, 47, 200]),
  outputs=st.sampled_from([37, 1, 16, 49, 5, 70]),
  few=st.sampled_from([3, 1, 8, 7, 2]),
  many=st.sampled_from([9, 33, 14, 50]),
  seed=st.integers(0, 1000),
)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [-1, 16, 20, 32, 64])
@quiet(max_examples=2)
@shapes
def test_integers(bits, group, axis, inputs, outputs, few, many, seed):
  """Symmetric, with zero points, with minimums."""
  rng = np.random.default_rng(seed)
  dtypes = ["float32", "bfloat16", "float16"]
  rng.shuffle(dtypes)
  for zero, dtype in zip(("symmetric", "zero point", "minimum"), dtypes, strict=True):
    check_all(integer(rng, bits, group, axis, inputs, outputs, zero, dtype), few, many)


GRIDS = {
  "nf4 g32": (NF4, 32, "bfloat16"),
  "nf4 g20": (NF4, 20, "float32"),
  "nf4 row": (NF4, -1, "float16"),
  "mxfp4": (E2M1, 32, "float8_e8m0fnu"),
  "fp4 g16 e4m3": (E2M1, 16, "float8_e4m3fn"),
  "fp8_e4m3 row": (FP8_E4M3, -1, "float32"),
  "fp8_e4m3 g16": (FP8_E4M3, 16, "bfloat16"),
  "fp8_e5m2 g64": (FP8_E5M2, 64, "float32"),
  "fp8_e5m2 g20": (FP8_E5M2, 20, "float32"),
}


@pytest.mark.parametrize("form", GRIDS)
@quiet(max_examples=2)
@shapes
def test_tables(form, axis, inputs, outputs, few, many, seed):
  grid, group, scale_dtype = GRIDS[form]
  check_all(
    on_grid(np.random.default_rng(seed), grid, group, axis, inputs, outputs, scale_dtype=scale_dtype), few, many
  )


@pytest.mark.parametrize(
  "options",
  [
    {"bits": 4, "group_size": 16, "scale_bits": 8},
    {"bits": 3, "group_size": 20, "scale_bits": 8, "symmetric": False},
    {"bits": 8, "group_size": "tensor", "symmetric": False},
    {"grid": "nvfp4", "group_size": 16},
    {"grid": "nf4", "group_size": 32, "scale_bits": 8},
  ],
  ids=lambda options: "-".join(str(v) for v in options.values()),
)
@AXES
def test_scales_of_scales(options, axis):
  """Scales that are codes themselves: an entry for 256 of them, so more than 256 outputs, and groups."""
  for inputs, outputs in ((83, 37), (64, 300)) if axis == -2 else ((5300, 3), (83, 37)):
    check_all(rounded(np.random.default_rng(inputs), axis, inputs, outputs, **options), 3, 9)


@pytest.mark.parametrize("bits", range(1, 9))
@quiet(max_examples=2)
@shapes
def test_clustered(bits, axis, inputs, outputs, few, many, seed):
  check_all(clustered(np.random.default_rng(seed), bits, axis, inputs, outputs), few, many)


@quiet(max_examples=6)
@shapes
def test_bfloat16(axis, inputs, outputs, few, many, seed):
  check_all(bfloat16(np.random.default_rng(seed), axis, inputs, outputs), few, many)


@pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (4, 8)], ids=["1of4", "2of4", "4of8"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@quiet(max_examples=2)
@shapes
def test_n_of_m(pattern, kind, axis, inputs, outputs, few, many, seed):
  check_all(n_of_m(np.random.default_rng(seed), *pattern, kind, axis, inputs, outputs), few, many)


@pytest.mark.parametrize("asked", [
  {"bits": 4, "group_size": 32}, {"bits": 4, "group_size": 32, "symmetric": False}, {"bits": 8, "group_size": -1,
  "symmetric": False}, {"bits": 4, "group_size": 64, "scale_bits": 8}, {"bits": 3, "group_size": 16},
], ids=["int4", "zero points", "int8 zero points", "quantized scales", "int3"])  # fmt: skip
@pytest.mark.parametrize("axis", [-2, -1])
def test_kept_values_of_few_bits(axis, asked):
  """Read as codes of all entries, to the bit those that were taken apart."""
  shape = (64, 21) if axis == -2 else (21, 64)
  w = jax.random.normal(jax.random.key(0), shape)
  whole = quantize(jnp.where(nm_mask(w, 2, 4, axis), w, 0.0), axis=axis, **asked)
  leaf = as_n_of_m(whole, 2, 4, axis)
  again = all_codes(leaf)
  assert again.group_size == whole.group_size
  np.testing.assert_array_equal(again.codes.unpack(), whole.codes.unpack())
  dense = np.asarray(whole.materialize(), np.float64)
  dense = dense if axis == -2 else dense.T
  check_all(Case(leaf, axis, dense, np.zeros(dense.shape)), 2, 9)


@pytest.mark.parametrize("pattern", [(3, 4), (2, 8), (4, 16), (8, 16), (1, 2)])
def test_other_patterns(pattern):
  check_all(n_of_m(np.random.default_rng(0), *pattern, "float32", -2, 48, 21), 2, 9)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@quiet(max_examples=3)
@shapes
def test_bitmap(kind, axis, inputs, outputs, few, many, seed):
  check_all(bitmap(np.random.default_rng(seed), kind, axis, inputs, outputs), few, many)


# ---------------------------------------------------------------------------------------------- what products share


def some(axis=-2, inputs=83, outputs=37, seed=0):
  """A case of each kind of codes."""
  rng = np.random.default_rng(seed)
  return {
    "int4 g20 zero": integer(rng, 4, 20, axis, inputs, outputs, "zero point"),
    "int3 g16": integer(rng, 3, 16, axis, inputs, outputs, "symmetric"),
    "int8 row minimum": integer(rng, 8, -1, axis, inputs, outputs, "minimum"),
    "nf4 g32": on_grid(rng, NF4, 32, axis, inputs, outputs),
    "clustered 6": clustered(rng, 6, axis, inputs, outputs),
    "bfloat16": bfloat16(rng, axis, inputs, outputs),
    "2:4 int8": n_of_m(rng, 2, 4, "int8", axis, inputs, outputs),
    "bitmap float32": bitmap(rng, "float32", axis, inputs, outputs),
  }


FORMS = tuple(some())
each_form = pytest.mark.parametrize("form", FORMS)


def test_planes():
  """Each width of codes survives packing, on NumPy and on JAX."""
  rng = np.random.default_rng(0)
  for bits in range(1, 9):
    codes = rng.integers(0, 2**bits, (96, 48)).astype(np.uint8)
    data = pack_tiles(codes, bits)
    assert data.shape == (3, 3, 64 * bits)
    np.testing.assert_array_equal(data, pack_tiles(jnp.asarray(codes), bits))
    tiles = np.asarray(unpack_tiles(jnp.asarray(data), bits))
    np.testing.assert_array_equal(np.moveaxis(tiles, 0, 1).reshape(96, 48), codes)


@each_form
@AXES
def test_materialize_columns_rows(form, axis):
  """The plain JAX reading of tiles: what gradients and the reference use."""
  case = some(axis)[form]
  w, dense = tiled(case), turned(case.dense, axis)
  assert w.nbits == sum(x.size * x.dtype.itemsize * 8 for x in jax.tree.leaves(w))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-5)  # a product and a sum in float32
  close(jax.jit(lambda w: w.materialize())(w), dense)
  cut = jax.jit(lambda w, start: w.columns(start, 20))
  for start in (0, 3, 17):
    close(cut(w, start), dense[:, start : start + 20] if axis == -2 else dense[start : start + 20])
  if axis == -1:
    ids = np.asarray([[36, 0], [5, 17]])
    close(jax.jit(lambda w, ids: w.rows(ids))(w, ids), dense[ids])


@each_form
def test_the_leafs_own_value(form):
  """What these tests take for the dense value is what the leaf says."""
  case = some()[form]
  value = np.asarray(case.leaf if form == "bfloat16" else dense_value(case.leaf), np.float64)
  np.testing.assert_allclose(value, case.dense, rtol=1e-6, atol=1e-5)


@each_form
def test_jit_vmap_leading_axes(form):
  """A mapped x is more rows, leading axes are rows; no rows give none."""
  w = tiled(some()[form])
  x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, w.inputs)), jnp.float32)
  flat = np.asarray(ops.linear(x.reshape(6, -1), w)).reshape(2, 3, -1)
  for y in (ops.linear(x, w), jax.jit(ops.linear)(x, w), jax.vmap(jax.vmap(ops.linear, (0, None)), (0, None))(x, w)):
    np.testing.assert_allclose(y, flat, rtol=1e-6, atol=1e-5)
  for lead in ((0,), (2, 0)):
    assert ops.linear(jnp.zeros((*lead, w.inputs)), w).shape == (*lead, w.outputs)
  assert ops.linear(x[0, 0], w).shape == (w.outputs,)
  low = ops.linear(x.astype(jnp.bfloat16), w)
  assert low.dtype == jnp.bfloat16
  want = ops.linear(x.astype(jnp.bfloat16).astype(jnp.float32), w).astype(jnp.bfloat16)
  np.testing.assert_array_equal(np.asarray(low, np.float32), np.asarray(want, np.float32))


@pytest.mark.parametrize("form", [f for f in FORMS if not f.startswith("bitmap")])
def test_stacks(form):
  """Layers laid out together: mapped over, and each as it would be alone."""
  parts = [tiled(some(seed=seed, inputs=40)[form]) for seed in (0, 1)]
  if form == "clustered 6":  # a codebook of a fixed size
    rng = np.random.default_rng(3)
    books = jnp.asarray(rng.normal(size=(2, 64)), jnp.float32)
    codes = jnp.asarray(rng.integers(0, 64, (2, 40, 37)))
    parts = [tiled(Case(make_clustered(codes[i], books[i], 6, -2), -2, *2 * (np.zeros((40, 37)),))) for i in (0, 1)]
    stack = ops.prepare({"kernel": make_clustered(codes, books, 6, -2)})["kernel"]
  else:
    leaves = [some(seed=seed, inputs=40)[form].leaf for seed in (0, 1)]
    stack = ops.prepare({"kernel": jax.tree.map(lambda *xs: jnp.stack(xs), *leaves)})["kernel"]
  assert isinstance(stack, TiledArray) and stack.shape == (2, 40, 37)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 40)), jnp.float32)
  for y in (jax.vmap(ops.linear)(x, stack), jax.jit(jax.vmap(ops.linear))(x, stack)):
    for i in range(2):
      np.testing.assert_array_equal(y[i], ops.linear(x[i], parts[i]))
  shared = jax.vmap(ops.linear, (None, 0))(x[0], stack)
  np.testing.assert_array_equal(shared[1], ops.linear(x[0], parts[1]))
  np.testing.assert_allclose(stack.materialize()[1], parts[1].materialize(), rtol=1e-6)


@each_form
@AXES
def test_gradient_to_x(form, axis):
  """That of the dense product; rounded activations pass it straight through."""
  case = some(axis)[form]
  rng = np.random.default_rng(1)
  x, g = (jnp.asarray(rng.normal(size=(3, n)), jnp.float32) for n in case.dense.shape)
  want = np.asarray(g, np.float64) @ case.dense.T
  bound = 1e-6 * (np.abs(g) @ (np.abs(case.dense) + 2 * case.shift).T)
  for activations in ("float32", "int8", "int8_token")[: 3 if form.startswith("int") else 1]:
    w = tiled(case, activations)
    got = jax.jit(jax.grad(lambda x, w=w: jnp.sum(g * product(x, w))))(x)
    assert np.all(np.abs(got - want) <= bound)


@pytest.mark.parametrize("rows", [3, 12])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_stay_in_their_row(rows, bad):
  for name, case in some().items():
    at = int(np.argmax(np.abs(case.dense).min(axis=1))) if name in ("2:4 int8", "bitmap float32") else 7
    for activations in ACTIVATIONS:
      w = tiled(case, activations)
      x = np.random.default_rng(1).normal(size=(rows, w.inputs)).astype(np.float32)
      clean = np.asarray(ops.linear(jnp.asarray(x), w))
      x[1, at] = bad
      y = np.asarray(ops.linear(jnp.asarray(x), w))
      reached = case.dense[at] != 0
      assert not np.isfinite(y[1, reached]).any(), (name, activations)
      np.testing.assert_array_equal(np.delete(y, 1, 0), np.delete(clean, 1, 0))


@pytest.mark.parametrize("rows", [2, 11])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_linears(rows, activations):
  """Several weights at once are those weights one by one, whether or not they share a layout."""
  rng = np.random.default_rng(0)
  cases = [
    integer(rng, 4, 20, -2, 83, 37, "zero point"),
    integer(rng, 4, 32, -2, 83, 5, "symmetric"),
    integer(rng, 8, -1, -2, 83, 16, "minimum"),
    integer(rng, 4, 32, -2, 83, 70, "zero point"),
  ]
  if not activations.startswith("int8"):
    cases += [bfloat16(rng, -2, 83, 21), on_grid(rng, NF4, 32, -2, 83, 20), bitmap(rng, "int8", -2, 83, 9)]
  weights = [tiled(case, activations) for case in cases]
  x = jnp.asarray(rng.normal(size=(rows, 83)), jnp.float32)
  together = jax.jit(ops.linears)(x, weights)
  for y, w in zip(together, weights, strict=True):
    np.testing.assert_allclose(y, ops.linear(x, w), rtol=1e-6, atol=1e-5)
  mixed = ops.linears(x, [weights[0], cases[1].dense.astype(np.float32) + jnp.zeros(())])
  np.testing.assert_allclose(mixed[0], together[0], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("group_size", [-1, 20_000])
def test_a_token_of_many_inputs(group_size):
  """Integers are summed over as many inputs as 32 bits hold, whatever the codes."""
  leaf = quantize_matrix(jnp.ones((140_000, 5)), axis=-2, bits=8, group_size=group_size)
  w = tiled(Case(leaf, -2, None, None), "int8_token")
  for rows in (1, 9):
    np.testing.assert_allclose(ops.linear(jnp.ones((rows, 140_000)), w), 140_000, rtol=1e-3)


def test_embed_clamps_and_maps():
  w = tiled(some(-1)["int4 g20 zero"])
  y = ops.embed(jnp.asarray([0, 36, 99, -1, -99]), w)
  np.testing.assert_array_equal(y[2], y[1])
  np.testing.assert_array_equal(y[3], y[1])
  np.testing.assert_array_equal(y[4], y[0])
  ids = jnp.arange(6).reshape(2, 3)
  np.testing.assert_array_equal(jax.vmap(ops.embed, (0, None))(ids, w), ops.embed(ids, w))
  assert ops.embed(jnp.zeros((0,), jnp.int32), w).shape == (0, 83)
  many = np.random.default_rng(0).integers(0, 37, 500)  # shared out over threads
  np.testing.assert_array_equal(ops.embed(jnp.asarray(many), w), ops.embed(jnp.arange(37), w)[many])


def test_threads_share_large_products():
  """Sizes that are cut into parts; the same numbers in every run."""
  case = integer(np.random.default_rng(0), 4, 32, -2, 512, 1000, "zero point")
  for activations in ACTIVATIONS:
    w = tiled(case, activations)
    for rows in (1, 70):
      check(case, w, rows)
      x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, 512)), jnp.float32)
      np.testing.assert_array_equal(ops.linear(x, w), ops.linear(x, w))


# ---------------------------------------------------------------------------------------------- malformed operands


def raw(x, w, forms=None, activations=0, arrays=None, outputs=None):
  """`lmc_linear` as `ops.linear` calls it, with any part replaced."""
  shape = jax.ShapeDtypeStruct((x.shape[0], w.outputs) if outputs is None else outputs, jnp.float32)
  forms = np.asarray(_describe(w) if forms is None else forms, np.int64)
  call = jax.ffi.ffi_call("lmc_linear", [shape])
  return call(x, *(w.arrays if arrays is None else arrays), forms=forms, activations=np.int64(activations))[0]


def refused(*args, **kwargs):
  with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="lmc"):
    raw(*args, **kwargs)


@each_form
def test_operands_of_another_size_or_dtype(form):
  w = tiled(some()[form])
  x = jnp.ones((2, w.inputs))
  np.testing.assert_array_equal(raw(x, w), ops.linear(x, w))
  arrays = list(w.arrays)
  for i, array in enumerate(arrays):
    short = array[..., :-1] if not (form.startswith("bitmap") and i == 0) else array[:10]
    refused(x, w, arrays=[*arrays[:i], short, *arrays[i + 1 :]])
    refused(x, w, arrays=[*arrays[:i], array.astype(jnp.int32), *arrays[i + 1 :]])
  refused(x, w, arrays=arrays[:-1])
  refused(x, w, arrays=[*arrays, arrays[0]])
  refused(x.astype(jnp.bfloat16), w)
  refused(x[:, :-1], w)
  refused(x[None], w)
  refused(x, w, outputs=(2, w.outputs - 1))
  refused(x, w, activations=4)
  refused(x, w, forms=_describe(w)[:-1])
  refused(x, w, forms=[*_describe(w), *_describe(w)])


def mutations(count, seed):
  """Descriptions of real weights, a number or two of each replaced."""
  rng = np.random.default_rng(seed)
  forms = list(some().values())
  weights = [tiled(case) for case in forms]
  odd = [-(2**62), -33, -1, 0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 20, 32, 48, 64, 83, 96, 128]
  odd += [1 << 20, 2**31, 2**33, 2**59, 2**62]
  for _ in range(count):
    w = weights[rng.integers(len(weights))]
    form = _describe(w)
    for at in rng.integers(0, len(form), rng.integers(1, 4)):
      form[at] = int(rng.choice(odd)) if rng.random() < 0.7 else int(rng.integers(-5, 70))
    yield w, form


def test_descriptions_at_random():
  """Either what is described fits the buffers, or it is refused; nothing is read beyond them."""
  refusals = 0
  for i, (w, form) in enumerate(mutations(250, 0)):
    x = jnp.ones(((1, 3, 9)[i % 3], w.inputs))
    try:
      jax.block_until_ready(raw(x, w, form, activations=i % 4))
    except jax.errors.JaxRuntimeError:
      refusals += 1
  assert refusals > 100


def test_descriptions_of_tables_at_random():
  ids = jnp.asarray([0, 5, 2**30, -(2**31)], jnp.int32)
  refusals = 0
  for w, form in mutations(100, 1):
    call = jax.ffi.ffi_call("lmc_embed", jax.ShapeDtypeStruct((4, w.inputs), jnp.float32))
    try:
      jax.block_until_ready(call(ids, *w.arrays, form=np.asarray(form, np.int64)))
    except jax.errors.JaxRuntimeError:
      refusals += 1
  assert refusals > 40
  w = tiled(some()["int3 g16"])
  form = np.asarray(_describe(w), np.int64)
  for bad_ids, width, cut in ((ids.astype(jnp.float32), 83, 15), (ids, 82, 15), (ids, 83, 14)):
    call = jax.ffi.ffi_call("lmc_embed", jax.ShapeDtypeStruct((4, width), jnp.float32))
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="lmc"):
      call(bad_ids, *w.arrays, form=form[:cut])


def test_values_of_a_bitmap_beyond_its_buffer():
  """Starts that point outside are refused."""
  w = tiled(some()["bitmap float32"])
  assert w.start is not None
  x = jnp.ones((2, w.inputs))
  for start in (w.start.at[1].set(2**31), w.start.at[-1].set(10**6), w.start[::-1]):
    refused(x, w, arrays=dataclasses.replace(w, start=start).arrays)


# ---------------------------------------------------------------------------------------------- between products


@pytest.mark.parametrize("width", [1, 5, 16, 63, 576, 1031])
def test_rms_norm_and_gated_silu(width):
  """A sum of squares in float32: 2**-20 is sixteen roundings; silu's exponential is within 2e-7."""
  rng = np.random.default_rng(width)
  x, up = (jnp.asarray(rng.normal(0, 3, (5, width)), jnp.float32) for _ in range(2))
  scale = jnp.asarray(rng.normal(size=width), jnp.float32)
  wide = np.asarray(x, np.float64)
  want = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5) * np.asarray(scale, np.float64)
  np.testing.assert_allclose(ops.rms_norm(x, scale, 1e-5), want, rtol=2.0**-20, atol=1e-30)
  want = wide / (1 + np.exp(-wide)) * np.asarray(up, np.float64)
  np.testing.assert_allclose(ops.gated_silu(x, up), want, rtol=1e-6, atol=1e-30)
  bad = np.array(x)
  bad[1, width // 2], bad[3, 0] = np.nan, np.inf
  normal, gated = np.asarray(ops.rms_norm(jnp.asarray(bad), scale, 1e-5)), np.asarray(ops.gated_silu(bad + up * 0, up))
  assert np.isnan(normal[1]).all() and np.isfinite(normal[[0, 2, 4]]).all()
  assert np.isnan(normal[3, 0])
  assert np.isnan(gated[1, width // 2]) and np.isinf(gated[3, 0]) and np.isfinite(gated).sum() == gated.size - 2


def test_gated_silu_at_its_ends():
  x = jnp.asarray([-np.inf, -3e38, -200, -88, -87, -1e-30, -0.0, 0.0, 1e-30, 88, 3e38], jnp.float32)
  with np.errstate(over="ignore"):
    wide = np.asarray(x, np.float64)
    want = np.where(wide < -1000, 0, wide / (1 + np.exp(-wide)))
  got = np.asarray(ops.gated_silu(x, jnp.ones_like(x)))
  np.testing.assert_allclose(got[1:], want[1:], rtol=1e-6, atol=1e-35)


def test_between_products_maps_and_differentiates():
  rng = np.random.default_rng(0)
  x, up = (jnp.asarray(rng.normal(size=(4, 3, 20)), jnp.float32) for _ in range(2))
  scale = jnp.asarray(rng.normal(size=20), jnp.float32)
  norm = lambda x, scale: ops.rms_norm(x, scale, 1e-5)  # noqa: E731
  np.testing.assert_allclose(jax.vmap(norm, (0, None))(x, scale), norm(x, scale), rtol=1e-6, atol=1e-6)
  scales = jnp.stack([scale, 2 * scale, scale, -scale])
  for i, y in enumerate(jax.vmap(norm)(x, scales)):
    np.testing.assert_allclose(y, norm(x[i], scales[i]), rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(jax.vmap(ops.gated_silu)(x, up), ops.gated_silu(x, up), rtol=1e-6)
  for f, args in ((norm, (x, scale)), (ops.gated_silu, (x, up))):
    got = jax.jit(jax.grad(lambda *args, f=f: jnp.sum(jnp.sin(f(*args))), (0, 1)))(*args)
    with ops.use_backend("reference"):
      want = jax.jit(jax.grad(lambda *args, f=f: jnp.sum(jnp.sin(f(*args))), (0, 1)))(*args)
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  "target, shapes_in, shape_out, attributes",
  [
    ("lmc_rms_norm", [(2, 8), (7,)], (2, 8), {"epsilon": np.float32(0)}),
    ("lmc_rms_norm", [(2, 8), (8,)], (2, 7), {"epsilon": np.float32(0)}),
    ("lmc_rms_norm", [(), (1,)], (), {"epsilon": np.float32(0)}),
    ("lmc_gated_silu", [(2, 8), (2, 7)], (2, 8), {}),
    ("lmc_gated_silu", [(2, 8), (2, 8)], (2, 7), {}),
  ],
)
def test_elementwise_shapes_that_differ(target, shapes_in, shape_out, attributes):
  call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape_out, jnp.float32))
  with pytest.raises(jax.errors.JaxRuntimeError, match="shapes differ"):
    call(*(jnp.ones(shape) for shape in shapes_in), **attributes)
  with pytest.raises(jax.errors.JaxRuntimeError):
    call(*(jnp.ones(shape, jnp.bfloat16) for shape in shapes_in), **attributes)


def test_no_warnings():
  """What has a kernel says nothing."""
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    for case in some().values():
      tiled(case)
