"""The conformance table of array types: one row each, every promise of a compressed leaf checked for it."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lmcompress import ops, tree
from lmcompress.arrays import (
  BitmapArray,
  ClusteredArray,
  DictionaryArray,
  DirectionArray,
  FakeQuantArray,
  GatedArray,
  InputArray,
  Int8PerToken,
  LatticeArray,
  LearnedInputArray,
  LowRankArray,
  MaskedArray,
  NestedArray,
  NMSparseArray,
  OutlierArray,
  Packed,
  QuantizedArray,
  ScoredArray,
  SplitArray,
  SumArray,
  added,
  bitmap,
  clustered,
  dictionary,
  direction,
  fake_quant,
  gated,
  lattice,
  learned_input,
  low_rank,
  masked,
  nested,
  nm_mask,
  nm_sparse,
  outliers,
  scored,
  split,
  with_act,
)
from lmcompress.arrays.lattice import patterns
from lmcompress.arrays.packing import PLANES
from lmcompress.arrays.tiled import TiledArray
from lmcompress.distributed import make_mesh, shard
from lmcompress.io import safetensors
from lmcompress.io.leaves import describe, rebuild
from lmcompress.ops.kernels.tiling import tile
from lmcompress.transforms.round_to_nearest import quantize_matrix
from lmcompress.types import CompressedArray


@dataclasses.dataclass(frozen=True)
class Row:
  """One kind of array.

  Attributes:
    make: `(w, axis) -> leaf` from a dense float32 `w`.
    bits: bits per entry of a `[64, 40]` kernel, counted by hand; None where it is not a round number.
    inputs: extent of the contraction axis.
    trains: data fields that gradients must reach.
    alike: differs from another row in numbers only; what depends on the form (loops, gradients, meshes) is
      checked for that row.
    keeps: `(w, axis) -> mask` in NumPy, of the entries that are not removed.
    error: largest relative error of the value against what is kept of `w`; None goes by the bits of the codes.
    rounding: relative, between two ways to the same value; 1e-6 but where the value itself is a sum.
    saved: whether checkpoints hold it; tiles are made for a machine and are not saved.
  """

  name: str
  make: Callable[[jax.Array, int], CompressedArray]
  bits: float | None = None
  inputs: int = 64
  trains: tuple[str, ...] = ("scale",)
  alike: bool = False
  keeps: Callable[[np.ndarray, int], np.ndarray] = lambda w, axis: np.ones(w.shape, bool)
  error: float | None = None
  rounding: float = 1e-6
  saved: bool = True


def quantized(**options):
  return lambda w, axis: quantize_matrix(w, axis=axis, **options)


def third(w, axis=-2):
  """Every third entry removed."""
  return np.arange(w.size).reshape(w.shape) % 3 != 0


def pruned(**options):
  """The values dense or quantized."""
  return lambda w, axis: masked(quantize_matrix(w, axis=axis, **options) if options else w, third(w), axis)


def largest(n, m):
  """The n largest magnitudes of each m inputs, in NumPy."""

  def keep(w, axis):
    groups = np.abs(np.moveaxis(w, axis, -1)).reshape(w.shape[-3 - axis], -1, m)
    rank = np.argsort(np.argsort(-groups, axis=-1, kind="stable"), axis=-1)
    return np.moveaxis((rank < n).reshape(w.shape[-3 - axis], -1), -1, axis)

  return keep


def sparse(n, m, **options):
  def of(w, axis):
    quantize = functools.partial(quantize_matrix, axis=axis, **options) if options else None
    return nm_sparse(w, nm_mask(w, n, m, axis), n, m, axis, quantize)

  return of


def unstructured(**options):
  def of(w, axis):
    return bitmap(w, third(w), axis, functools.partial(quantize_matrix, axis=axis, **options) if options else None)

  return of


def nearest(entries, bits, dtype="float32"):
  """Each weight to the closest of evenly spaced values."""

  def of(w, axis):
    codebook = np.linspace(-1.5, 1.5, entries, dtype=np.float32)
    codes = np.abs(np.asarray(w)[..., None] - codebook).argmin(-1)
    return clustered(jnp.asarray(codes), jnp.asarray(codebook, dtype), bits, axis, w.dtype)

  return of


def finer(seed, *more):
  """Codes of a few bits with a minimum, each cut finer to the nearest part."""

  def of(w, axis):
    leaf = quantize_matrix(w, axis=axis, bits=seed, group_size=32, symmetric=False, zero="real")
    for bits in more:
      base, width = leaf.quantized() if hasattr(leaf, "quantized") else leaf, 2**bits
      wide = lambda part, base=base: np.repeat(np.asarray(part, np.float32), 32, axis)  # noqa: E731
      part = np.asarray(base.materialize()) - wide(base.scales()).take(np.arange(w.shape[axis]), axis) / 2
      step = wide(base.scales()).take(np.arange(w.shape[axis]), axis) / width
      leaf = nested(leaf, jnp.clip(jnp.floor((w - part) / step), 0, width - 1).astype(jnp.uint8), bits)
    return leaf

  return of


def apart(channels, **options):
  def of(w, axis):
    at = jnp.asarray(channels)
    return split(quantize_matrix(w, axis=axis, **options), w.take(at, axis), at, axis)

  return of


def act_apart(channels, **options):
  def of(w, axis):
    base = with_act(quantize_matrix(w, axis=axis, **options), Int8PerToken(), axis)
    at = jnp.asarray(channels)
    return split(base, w.take(at, axis), at, axis)

  return of


def factored(rank, **options):
  """The best approximation of that rank, its factors dense or quantized."""

  def of(w, axis):
    u, s, vt = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    factors = (u[:, :rank] * np.sqrt(s[:rank])), np.sqrt(s[:rank])[:, None] * vt[:rank]
    factors = (jnp.asarray(f, w.dtype) for f in factors)
    return low_rank(*(quantize_matrix(f, axis=axis, **options) if options else f for f in factors), axis)

  return of


def by_run(books):
  """Each weight to the closest of a run of outputs' own values."""

  def of(w, axis):
    rows = np.asarray(w if axis == -1 else w.T)
    per = rows.shape[0] // books
    codebook = np.linspace(-1.5, 1.5, 16, dtype=np.float32) * (1 + np.arange(books, dtype=np.float32)[:, None] / books)
    codes = np.abs(rows[..., None] - np.repeat(codebook, per, axis=0)[:, None]).argmin(-1)
    return clustered(jnp.asarray(codes if axis == -1 else codes.T), jnp.asarray(codebook), 4, axis, w.dtype)

  return of


def atoms_of(width, terms, spaces=1, **options):
  """Each run of inputs as atoms drawn at random, their coefficients dense or quantized; one term has none."""

  def of(w, axis):
    rng, (inputs, outputs) = np.random.default_rng(0), w.shape if axis == -2 else w.shape[::-1]
    runs = -(-inputs // width)
    atoms = rng.normal(0, 0.5, (runs if spaces == "each" else 1, 16, width)).astype(np.float32)
    codes = rng.integers(0, 16, (runs * terms, outputs))
    values = jnp.asarray(rng.normal(size=codes.shape).astype(np.float32))
    turned = [x if axis == -2 else x.T for x in (jnp.asarray(codes), values)]
    given = None if terms == 1 else quantize_matrix(turned[1], axis=axis, **options) if options else turned[1]
    return dictionary(jnp.asarray(atoms), turned[0], given, inputs, axis)

  return of


def towards(bits, groups, minimum=False):
  """Floats on their way to codes: scales and minimums of each group's range."""

  def of(w, axis):
    parts = np.stack(np.split(np.asarray(w), groups, axis))
    low, high = (np.moveaxis(f(parts, axis=axis), 0, axis) for f in (np.min, np.max))
    reach = (high - low) / (2**bits - 1) if minimum else np.maximum(-low, high) / 2 ** (bits - 1)
    return fake_quant(w, jnp.asarray(reach), jnp.asarray(low) if minimum else None, bits, axis, "float32")

  return of


def by_scores(w, axis):
  """The third that `third` keeps has scores above the threshold."""
  leaf = scored(w, jnp.where(third(w), 1.0, -1.0) * jnp.abs(w), axis)
  return dataclasses.replace(leaf, threshold=jnp.zeros((1, 1)))


def half_open(w, axis):
  """Eight runs of inputs, each with a gate of its own: some open, some closed, some between."""
  logs = np.linspace(-3, 3, 8, dtype=np.float32).reshape((8, 1) if axis == -2 else (1, 8))
  leaf = gated(w, 8, axis, rate=10.0)
  return dataclasses.replace(leaf, openness=jnp.asarray(logs / 10), noise=jnp.asarray(logs[::-1, ::-1] / 4))


def half_open_codes(w, axis):
  return half_open(quantize_matrix(w, bits=4, group_size=16, axis=axis, scale_dtype="float32"), axis)


def of_codes(w, axis):
  """Lengths over four bits."""
  return direction(quantize_matrix(w, bits=4, group_size=16, axis=axis, scale_dtype="float32"), axis)


def few(count):
  return lambda w, axis: outliers(w, jnp.abs(w), count, axis)


def largest_of_output(count):
  """The largest magnitudes of each output, in NumPy."""
  return lambda w, axis: np.argsort(np.argsort(-np.abs(w), axis=axis, kind="stable"), axis=axis) < count


def low_rank_more(w, axis):
  base = quantize_matrix(w, axis=axis, bits=3, group_size=32)
  return added(base, factored(4)(w - base.materialize(), axis), axis)


def act_before(make):
  return lambda w, axis: with_act(make(w, axis), Int8PerToken(), axis)


def laid_out(make):
  """For the CPU kernels, as `prepare` does."""
  return lambda w, axis: tile(make(w, axis), axis, "float32")


F32 = {"scale_dtype": "float32"}
TILES = {"trains": (), "alike": True, "saved": False}
"""Gradients reach the inputs only; tests/ops checks loops, gradients and meshes of tiles."""
ROWS = [
  Row("int8 row", quantized(bits=8, group_size=-1), 8 + 16 / 64),
  Row("int8 tensor", quantized(bits=8, group_size="tensor", **F32), 8 + 32 / 2560),
  Row("int8 row zero", quantized(bits=8, group_size=-1, symmetric=False), 8 + 16 / 64 + 8 / 64, alike=True),
  Row("int4 g32", quantized(bits=4, group_size=32, **F32), 4 + 32 / 32),
  Row("int4 g32 narrow", quantized(bits=4, group_size=32, convention="narrow", **F32), 5.0, alike=True),
  Row("int4 g32 signed", quantized(bits=4, group_size=32, convention="signed", **F32), 5.0, alike=True),
  Row("int4 ragged", quantized(bits=4, group_size=32), inputs=48),
  Row("int4 ragged asym", quantized(bits=4, group_size=32, symmetric=False), inputs=48, alike=True),
  Row("int3 g32", quantized(bits=3, group_size=32), 3.5),
  Row("int3 odd", quantized(bits=3, group_size=20, symmetric=False), inputs=50),
  Row("int2 g16", quantized(bits=2, group_size=16), 3.0, alike=True),
  Row("int4 g32 zero", quantized(bits=4, group_size=32, symmetric=False), 4 + 16 / 32 + 4 / 32),
  Row("int4 g32 minimum", quantized(bits=4, group_size=32, symmetric=False, zero="real", **F32), 6.0,
      trains=("scale", "minimum")),
  Row("int4 g16 double", quantized(bits=4, group_size=16, scale_bits=8)),
  Row("nf4 g32", quantized(grid="nf4", group_size=32), 4.5),
  Row("fp8_e4m3 row", quantized(grid="fp8_e4m3", group_size=-1), 8.25),
  Row("fp8_e5m2 tensor", quantized(grid="fp8_e5m2", group_size="tensor", **F32), 8 + 32 / 2560, alike=True),
  Row("mxfp4", quantized(grid="mxfp4", group_size=32), 4 + 8 / 32, trains=()),
  Row("nvfp4", quantized(grid="nvfp4", group_size=16), 4 + 8 / 16 + 32 / 2560),
  Row("step", quantized(bits=8, step=2.0**-5), 8 + 32 / 2560, alike=True),
  Row("masked dense", pruned(), 32 + 1, trains=("values",), keeps=third),
  Row("masked int4", pruned(bits=4, group_size=32, **F32), 4 + 1 + 1, trains=("values",), keeps=third),
  Row("masked ragged minimum", pruned(bits=4, group_size=32, symmetric=False, zero="real"), inputs=48,
      trains=("values",), alike=True, keeps=third),
  Row("clustered 16", nearest(16, 4), 4 + 16 * 32 / 2560, trains=("codebook",), error=0.15),
  Row("clustered 5", nearest(5, 3, "bfloat16"), inputs=50, trains=("codebook",), alike=True, error=0.5),
  Row("clustered 16 x4", by_run(4), 4 + 4 * 16 * 32 / 2560, trains=("codebook",), error=0.25),
  Row("clustered 16 row", by_run(40), inputs=50, trains=("codebook",), alike=True, error=0.3),
  Row("outliers", few(3), 3 * 32 / 64, trains=("values",), keeps=largest_of_output(3), error=0.005),
  Row("int3 g32 + low rank 4", low_rank_more, 3.5 + 32 * 4 * 104 / 2560, trains=("base", "delta"), error=0.3,
      rounding=1e-5),
  Row("product 16 of 4", atoms_of(4, 1), 1 + 16 * 4 * 32 / 2560, trains=("atoms",), error=2.0),
  Row("product 16 of 6 each", atoms_of(6, 1, "each"), inputs=50, trains=("atoms",), alike=True, error=2.0),
  Row("3 of 16 atoms of 8", atoms_of(8, 3), 3 * (4 + 32) / 8 + 16 * 8 * 32 / 2560, trains=("atoms", "coefficients"),
      error=3.0, rounding=1e-5),
  Row("2 of 16 atoms of 6 int8", atoms_of(6, 2, bits=8, group_size=-1), inputs=50, trains=("atoms", "coefficients"),
      alike=True, error=3.0, rounding=1e-5),
  Row("training int4 g16", towards(4, 4), 32 + 32 / 16, trains=("values", "scale"), error=0.2),
  Row("training int3 row min", towards(3, 1, minimum=True), 32 + 64 / 64, trains=("values", "scale", "minimum"),
      alike=True, error=0.25),
  Row("directions", lambda w, axis: direction(w, axis), 32 + 32 / 64, trains=("weight", "magnitude")),
  Row("directions of codes", of_codes, 4 + 32 / 16 + 32 / 64, inputs=64, trains=("weight", "magnitude"), error=0.2),
  Row("training inputs", lambda w, axis: learned_input(w, 0.02, 8, axis), 32 + 32 / 2560, trains=("weight", "step")),
  Row("gated", half_open, 32 + (8 * 2 + 1) * 32 / 2560, trains=("weight", "openness"), error=4.0),
  Row("gated codes", half_open_codes, inputs=64, trains=("weight", "openness"), alike=True, error=4.0),
  Row("scored", by_scores, 64 + 32 / 2560, trains=("values", "scores"), keeps=third),
  Row("e8p row", lattice, 2 + 16 / 64, error=0.33),
  Row("e8p g16", lambda w, axis: lattice(w, axis, 16, scale_dtype="float32"), inputs=44, alike=True, error=0.33),
  Row("nested 3/4/8", finer(3, 1, 4), 8 + 2 * 16 / 32, trains=("base",), error=0.3),
  Row("nested 2/4", finer(2, 2), inputs=48, trains=("base",), alike=True, error=0.6),
  Row("split int4", apart((1, 7, 40), bits=4, group_size=32, scale_dtype="float32"),
      4 + 32 / 32 + 3 * 32 / 64 + 3 * 32 / 2560, trains=("base", "outliers"), error=0.16),
  Row("split int8 per token", act_apart((0, 5), bits=8, group_size=-1), trains=("base", "outliers"), alike=True,
      error=0.06),
  Row("2:4 float32", sparse(2, 4), 32 / 2 + 2 / 2, trains=("values",), keeps=largest(2, 4)),
  Row("2:4 int8 row", sparse(2, 4, bits=8), (8 + 2) / 2 + 16 / 64, trains=("values",), keeps=largest(2, 4)),
  Row("1:4 int4 g8 zero", sparse(1, 4, bits=4, group_size=8, symmetric=False), (4 + 2) / 4 + 20 / 32,
      trains=("values",), alike=True, keeps=largest(1, 4)),
  Row("4:8 float32", sparse(4, 8), inputs=56, trains=("values",), alike=True, keeps=largest(4, 8)),
  Row("bitmap float32", unstructured(), 1 + 32 * 43 / 64, trains=("values",), keeps=third),
  Row("bitmap int4 g32", unstructured(bits=4, group_size=32), inputs=50, trains=("values",), alike=True,
      keeps=third),
  Row("low rank 8", factored(8), 32 * 8 * 104 / 2560, trains=("left", "right"), error=0.9, rounding=1e-5),
  Row("low rank 8 int8", factored(8, bits=8), trains=("left", "right"), error=0.9, rounding=1e-5),
  Row("int8 per token x int4 g32", act_before(quantized(bits=4, group_size=32, **F32)), 5.0, trains=("weight",)),
  Row("int8 per token x dense", act_before(lambda w, axis: w), 32.0, trains=("weight",), alike=True),
  Row("int4 g32 tiled", laid_out(quantized(bits=4, group_size=32, **F32)), 5.0 * 48 / 40, error=0.16, **TILES),
  Row("int3 odd tiled", laid_out(quantized(bits=3, group_size=20, symmetric=False)), inputs=50, error=0.3, **TILES),
  Row("int8 row minimum tiled", laid_out(quantized(bits=8, group_size=-1, symmetric=False, zero="real")),
      error=0.06, **TILES),
  Row("nf4 g32 tiled", laid_out(quantized(grid="nf4", group_size=32)), error=0.16, **TILES),
  Row("clustered 5 tiled", laid_out(nearest(5, 3)), inputs=50, error=0.5, **TILES),
  Row("e8p g16 tiled", laid_out(lambda w, axis: lattice(w, axis, 16)), inputs=44, error=0.33, **TILES),
]
OUT = 40
AXES = [-2, -1]


@functools.cache
def weight(row: Row, axis: int, seed: int = 0, outputs: int = OUT) -> jax.Array:
  shape = (row.inputs, outputs) if axis == -2 else (outputs, row.inputs)
  return jnp.asarray(np.random.default_rng(seed).normal(0, 0.5, shape).astype(np.float32))


@functools.cache
def leaf_of(row: Row, axis: int, seed: int = 0, outputs: int = OUT) -> Any:
  return row.make(weight(row, axis, seed, outputs), axis)


@functools.cache
def dense_of(row: Row, axis: int, seed: int = 0, outputs: int = OUT) -> np.ndarray:
  return np.asarray(jax.jit(lambda leaf: leaf.materialize())(leaf_of(row, axis, seed, outputs)))


def inputs_of(row, *lead, seed=7):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(*lead, row.inputs)).astype(np.float32))


def row_of(name):
  return next(row for row in ROWS if row.name == name)


def product(axis):
  """The door that reads a kernel or a table."""
  return ops.linear if axis == -2 else ops.attend


def expected(x, dense, axis, row=None):
  """The product in float64, after what the row's leaf does to its input."""
  leaf = None if row is None else leaf_of(row, axis)
  return acted(np.asarray(x), leaf).astype(np.float64) @ (dense if axis == -2 else dense.T)


def acted(x, leaf):
  """The input as the product sees it, in NumPy."""
  if isinstance(leaf, SplitArray):
    rest = x.copy()
    rest[..., np.asarray(leaf.channels)] = 0
    rest = acted(rest, leaf.base)
    rest[..., np.asarray(leaf.channels)] = x[..., np.asarray(leaf.channels)]
    return rest
  if isinstance(leaf, LearnedInputArray):
    step, high = np.asarray(leaf.step)[0, 0], 2 ** (leaf.bits - 1) - 1
    return np.clip(np.round(x.astype(np.float32) / step), -high, high) * step
  if not isinstance(leaf, InputArray):
    return x
  x = x.astype(np.float32)
  scale = np.abs(x).max(-1, keepdims=True, initial=0) / np.float32(127)
  return np.round(x / np.where(scale == 0, 1, scale)) * scale


each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "-"))
each_saved = pytest.mark.parametrize("row", [r for r in ROWS if r.saved], ids=lambda row: row.name.replace(" ", "-"))
TABLES = ("int8 row", "int3 odd", "int4 g32 zero", "int4 g16 double", "masked int4",
          "2:4 int8 row", "bitmap float32", "low rank 8 int8")


def leaves(*pairs):
  ids = [f"{row.name.replace(' ', '-')}-{['kernel', 'table'][axis + 2]}" for row, axis in pairs]
  return pytest.mark.parametrize("row, axis", pairs, ids=ids)


each_leaf = leaves(*((row, axis) for row in ROWS for axis in AXES if axis == -2 or not row.alike))
each_form = leaves(*((row, axis) for row in ROWS for axis in AXES
                     if not row.alike and (axis == -2 or row.name in TABLES)))
"""What compiles a loop, a gradient or a program for eight devices: each form as a kernel, some as tables."""
each_axis = pytest.mark.parametrize("axis", AXES, ids=["kernel", "table"])


def close(a, b, tolerance=1e-4):
  """Sums of about 64 products of order 1 in float32: 1e-4 is forty times their rounding."""
  np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance)


@each_leaf
def test_shape_dtype_bits(row, axis):
  leaf, w = leaf_of(row, axis), weight(row, axis)
  assert leaf.shape == w.shape and leaf.ndim == 2 and leaf.size == w.size and jnp.dtype(leaf.dtype) == w.dtype
  assert leaf.nbits == sum(x.size * x.dtype.itemsize * 8 for x in jax.tree.leaves(leaf))
  assert leaf.nbytes == leaf.nbits / 8
  assert isinstance(leaf.kind, str) and leaf.kind and leaf.axis == axis
  if row.bits is not None and axis == -2:
    assert leaf.nbits / leaf.size == pytest.approx(row.bits, abs=1e-6)
  for name in row.trains:
    assert name in leaf.trainable_fields()


@each_leaf
def test_materialize(row, axis):
  """Eager equals jit; the value is near the weight that it stands for, and is what the invariant says."""
  leaf, w, dense = leaf_of(row, axis), np.asarray(weight(row, axis)), dense_of(row, axis)
  if not row.alike:
    np.testing.assert_allclose(leaf.materialize(), dense, rtol=row.rounding, atol=row.rounding / 10)
  assert dense.shape == w.shape and dense.dtype == w.dtype and np.isfinite(dense).all()
  kept = row.keeps(w, axis)
  assert (dense[~kept] == 0).all()
  np.testing.assert_allclose(by_invariant(leaf), dense, rtol=row.rounding, atol=row.rounding)
  error = np.linalg.norm((dense - w)[kept]) / np.linalg.norm(w[kept])
  bits = bits_of_codes(leaf)
  assert error <= (row.error or {2: 0.6, 3: 0.3, 4: 0.16, 5: 0.07, 8: 0.06, None: 0}[bits])


def bits_of_codes(leaf):
  """Bits of the grid under a leaf's masks, positions and acts; None where the values are dense."""
  if isinstance(leaf, QuantizedArray):
    return leaf.grid.bits
  inner = getattr(leaf, "weight", getattr(leaf, "values", None))
  return None if inner is None else bits_of_codes(inner)


unpack = jax.jit(Packed.unpack)


def by_invariant(leaf):
  """What the docstring of a kind says that its dense value is, in NumPy float64."""
  if isinstance(leaf, CompressedArray):
    return INVARIANTS[type(leaf)](leaf)
  return np.asarray(unpack(leaf) if isinstance(leaf, Packed) else leaf).astype(np.float64)


def by_scale(leaf):
  """`(values - zero_point) * scale` or `values * scale + minimum`, the parts repeated for each input."""
  group = leaf.shape[leaf.axis] if leaf.group_size == -1 else leaf.group_size

  def wide(part):
    part = by_invariant(part)
    if part.shape[leaf.axis] > 1:
      part = np.repeat(part, group, axis=leaf.axis)
      part = part[: leaf.shape[0]] if leaf.axis == -2 else part[:, : leaf.shape[1]]
    return part

  values = np.asarray(leaf.grid.decode(unpack(leaf.codes)), np.float64)
  if leaf.zero_point is not None:
    return (values - wide(leaf.zero_point)) * wide(leaf.scale)
  return values * wide(leaf.scale) + (0 if leaf.minimum is None else wide(leaf.minimum))


def by_position(leaf):
  """Entry by entry: value k of a group of n goes to its position in the group of m."""
  dense, values, positions = np.zeros(leaf.shape), by_invariant(leaf.values), by_invariant(leaf.indices).astype(int)
  outputs_first = (lambda x: x.T) if leaf.axis == -2 else (lambda x: x)  # views
  for dense_row, row_values, row_positions in zip(*map(outputs_first, (dense, values, positions)), strict=True):
    for i, (value, position) in enumerate(zip(row_values, row_positions, strict=True)):
      dense_row[i // leaf.n * leaf.m + position] = value
  return dense


def by_bitmap(leaf):
  """Each output's ones filled with its values in order."""
  dense, kept = np.zeros(leaf.shape), by_invariant(leaf.bitmap) != 0
  outputs_first = (lambda x: x.T) if leaf.axis == -2 else (lambda x: x)  # views
  for dense_row, ones, row in zip(*map(outputs_first, (dense, kept, by_invariant(leaf.values))), strict=True):
    dense_row[ones] = row[: ones.sum()]
  return dense


def by_tile(leaf):
  """From the bit planes of `native/kernels.h`: input 4 v + b of a block is byte b of lane o of vector v."""
  form, data = leaf.form, np.asarray(leaf.codes)
  tiles, blocks = data.shape[:2]
  codes, shift, at = np.zeros((tiles, blocks, 8, 16, 4), np.int64), 0, 0
  for width in PLANES[form.bits]:
    for v in range(8):
      vector, field = divmod(v, 8 // width)
      plane = data[:, :, at + 64 * vector : at + 64 * vector + 64].reshape(tiles, blocks, 16, 4)
      codes[:, :, v] |= (plane.astype(np.int64) >> width * field & 2**width - 1) << shift
    shift, at = shift + width, at + 64 * width
  codes = codes.transpose(1, 2, 4, 0, 3).reshape(blocks * 32, tiles * 16)
  group = len(codes) if form.padded_group == -1 else form.padded_group

  def wide(part):
    part = np.asarray(part).astype(np.float64).swapaxes(0, 1).reshape(part.shape[1], tiles * 16)
    return np.repeat(part, group, axis=0)[: len(codes)]

  values = codes.astype(np.float64) if leaf.table is None else np.asarray(leaf.table, np.float64)[codes]
  values = values - (form.offset if leaf.zero is None else wide(leaf.zero))
  values = values * (1 if leaf.scale is None else wide(leaf.scale))
  values = values + (0 if leaf.minimum is None else wide(leaf.minimum))
  kept = np.arange(len(codes)) % group < (group if form.group == -1 else form.group)
  values = values[kept][: leaf.inputs, : leaf.outputs]
  return values if leaf.axis == -2 else values.T


def by_lattice(leaf):
  """Entry by entry: a pattern of magnitudes, seven signs and one that makes the sum even, a shift by a quarter."""
  dense, table = np.zeros(leaf.shape), patterns()[0].astype(np.float64)
  outputs_first = (lambda x: x.T) if leaf.axis == -2 else (lambda x: x)  # views
  parts = dense, np.asarray(leaf.codes), by_invariant(leaf.scale)
  for row, codes, scales in zip(*map(outputs_first, parts), strict=True):
    for i, code in enumerate(codes.tolist()):
      signs = [-1.0 if code >> 8 + j & 1 else 1.0 for j in range(7)]
      point = table[code & 255] * [*signs, 1.0]
      point[7] *= -1 if point.sum() % 2 else 1
      for j, value in enumerate(point + (0.25 if code >> 15 else -0.25)):
        if 8 * i + j < len(row):
          group = 0 if leaf.group_size == -1 else (8 * i + j) // leaf.group_size
          row[8 * i + j] = value * scales[group]
  return dense


def by_bits(leaf):
  """A seed's interval halved and halved again, towards the upper part where the bit is 1."""
  seed, extras = leaf, []
  while isinstance(seed, NestedArray):
    extras.insert(0, seed.extra)
    seed = seed.base
  group = np.repeat(by_invariant(seed.scale), 32, axis=leaf.axis).take(np.arange(leaf.shape[leaf.axis]), leaf.axis)
  value, width = by_scale(seed), group
  for extra in extras:
    bits = by_invariant(extra).astype(int)
    for bit in reversed(range(extra.bits)):
      width = width / 2
      value = value + np.where(bits >> bit & 1, width / 2, -width / 2)
  return value


def by_channels(leaf):
  dense, channels = by_invariant(leaf.base).copy(), np.asarray(leaf.channels)
  np.moveaxis(dense, leaf.axis, 0)[channels] = np.moveaxis(by_invariant(leaf.outliers), leaf.axis, 0)
  return dense


def by_book(leaf):
  codes, books = by_invariant(leaf.codes).astype(int), by_invariant(leaf.codebook)
  if books.ndim == 1:
    return books[codes]
  codes = codes if leaf.axis == -1 else codes.T
  own = np.arange(len(codes)) * len(books) // len(codes)
  dense = np.stack([books[b][row] for b, row in zip(own, codes, strict=True)])
  return dense if leaf.axis == -1 else dense.T


def by_atoms(leaf):
  codes, atoms = by_invariant(leaf.codes).astype(int), by_invariant(leaf.atoms)
  values = np.ones(codes.shape) if leaf.coefficients is None else by_invariant(leaf.coefficients)
  codes, values = (x if leaf.axis == -2 else x.T for x in (codes, values))
  runs = []
  for r in range(len(codes) // leaf.terms):
    some = slice(r * leaf.terms, (r + 1) * leaf.terms)
    own = atoms[r if len(atoms) > 1 else 0]
    runs.append(np.einsum("to,tow->wo", values[some], own[codes[some]]))
  dense = np.concatenate(runs)
  dense = dense[: len(dense) - leaf.pad]
  return dense if leaf.axis == -2 else dense.T


def by_step(leaf):
  wide = lambda part: np.repeat(by_invariant(part), leaf.shape[leaf.axis] // part.shape[leaf.axis], leaf.axis)  # noqa: E731
  scale, minimum = wide(leaf.scale), 0.0 if leaf.minimum is None else wide(leaf.minimum)
  low, high = (-(2 ** (leaf.bits - 1)), 2 ** (leaf.bits - 1) - 1) if leaf.minimum is None else (0, 2**leaf.bits - 1)
  return np.clip(np.round((by_invariant(leaf.values) - minimum) / scale), low, high) * scale + minimum


def by_direction(leaf):
  w = by_invariant(leaf.weight)
  return by_invariant(leaf.magnitude) * w / np.linalg.norm(w, axis=leaf.axis, keepdims=True)


def by_gate(leaf):
  """The equations of arXiv:1712.01312, section 4.1."""
  log_alpha, noise = leaf.rate * np.asarray(leaf.openness, np.float64), np.asarray(leaf.noise, np.float64)
  gates = np.clip(1.2 / (1 + np.exp(-1.5 * (noise + log_alpha))) - 0.1, 0, 1)
  return by_invariant(leaf.weight) * np.repeat(gates, leaf.shape[leaf.axis] // gates.size, leaf.axis)


def by_index(leaf):
  dense, values, indices = np.zeros(leaf.shape), np.asarray(leaf.values, np.float64), np.asarray(leaf.indices, int)
  np.put_along_axis(dense, indices, values, leaf.axis)
  return dense


INVARIANTS = {
  QuantizedArray: by_scale,
  MaskedArray: lambda leaf: np.where(by_invariant(leaf.mask) != 0, by_invariant(leaf.values), 0),
  ClusteredArray: by_book,
  DictionaryArray: by_atoms,
  DirectionArray: by_direction,
  FakeQuantArray: by_step,
  GatedArray: by_gate,
  LearnedInputArray: lambda leaf: by_invariant(leaf.weight),
  ScoredArray: lambda leaf: np.where(by_invariant(leaf.scores) >= by_invariant(leaf.threshold), leaf.values, 0.0),
  OutlierArray: by_index,
  SumArray: lambda leaf: by_invariant(leaf.base) + by_invariant(leaf.delta),
  LatticeArray: by_lattice,
  NestedArray: by_bits,
  SplitArray: by_channels,
  NMSparseArray: by_position,
  BitmapArray: by_bitmap,
  LowRankArray: lambda leaf: by_invariant(leaf.left) @ by_invariant(leaf.right),
  InputArray: lambda leaf: by_invariant(leaf.weight),
  TiledArray: by_tile,
}


@each_leaf
def test_products(row, axis):
  """`linear` and `attend` for few rows, many, and none; jit equals eager."""
  leaf, dense, door = leaf_of(row, axis), dense_of(row, axis), product(axis)
  xs = [inputs_of(row, *lead) for lead in ((1,), (3,), (20,), (0,))]
  ys = jax.jit(lambda leaf, xs: [door(x, leaf) for x in xs])(leaf, xs)
  for x, y in zip(xs, ys, strict=True):
    assert y.shape == (*x.shape[:-1], OUT) and y.dtype == x.dtype
    close(y, expected(x, dense, axis, row))
  np.testing.assert_allclose(door(xs[1], leaf), ys[1], rtol=1e-5, atol=1e-5)


@each_axis
def test_leading_axes(axis):
  """Any number of them, none included, on either side of where the loop changes."""
  row = row_of("int4 g32")
  leaf, dense = leaf_of(row, axis), dense_of(row, axis)
  for lead in ((), (2, 2), (2, 3, 4), (2, 0, 3)):
    x = inputs_of(row, *lead)
    close(product(axis)(x, leaf), expected(x, dense, axis))


@each_leaf
def test_tiles(row, axis):
  """`columns(start, size)` is a slice of the dense value, in float32, wherever it starts."""
  leaf, dense = leaf_of(row, axis), dense_of(row, axis)
  cut = jax.jit(lambda leaf, start: leaf.columns(start, 7))
  for start in (0, 5, OUT - 7):
    tile = cut(leaf, start)
    assert tile.dtype == jnp.float32
    want = dense[:, start : start + 7] if axis == -2 else dense[start : start + 7]
    np.testing.assert_allclose(tile, want, rtol=row.rounding, atol=row.rounding / 10)


@each_row
def test_rows_and_embed(row):
  leaf, dense = leaf_of(row, -1), dense_of(row, -1)
  several = [np.array([3, 0, 3, OUT - 1]), np.array([[1, 2], [OUT - 1, 0]]), np.zeros((0,), int), np.array(5)]
  both = jax.jit(lambda leaf, several: [(leaf.rows(ids), ops.embed(ids, leaf)) for ids in several])
  found = both(leaf, several)
  for ids, (rows, embedded) in zip(several, found, strict=True):
    assert rows.shape == embedded.shape == (*ids.shape, row.inputs)
    assert rows.dtype == jnp.float32 and embedded.dtype == jnp.dtype(leaf.dtype)
    np.testing.assert_allclose(rows, dense[ids], rtol=row.rounding, atol=row.rounding / 10)
    np.testing.assert_allclose(embedded, dense[ids], rtol=row.rounding, atol=row.rounding / 10)


@each_form
def test_stacked(row, axis):
  """Under vmap and scan a stacked leaf is its layers, each with the right shape."""
  door, leaves = product(axis), [leaf_of(row, axis, seed) for seed in (0, 1)]
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *leaves)
  assert stacked.shape == (2, *leaves[0].shape)
  x = inputs_of(row, 3)

  def seen(leaf):
    assert leaf.shape == leaves[0].shape  # derived from the data, so it holds inside the loop
    return door(x, leaf)

  @jax.jit
  def run(stacked):
    scanned = jax.lax.scan(lambda _, leaf: (None, seen(leaf)), None, stacked)[1]
    return jax.vmap(seen)(stacked), scanned, stacked.materialize()

  want = np.stack([expected(x, dense_of(row, axis, seed), axis, row) for seed in (0, 1)])
  mapped, scanned, dense = run(stacked)
  close(mapped, want)
  close(scanned, want)
  both = np.stack([dense_of(row, axis, seed) for seed in (0, 1)])
  np.testing.assert_allclose(dense, both, rtol=row.rounding, atol=row.rounding / 10)


@each_form
def test_gradients(row, axis):
  """To x: `g @ dense.T`. To the fields that train: what autodiff through the dense value gives."""
  door, leaf, dense = product(axis), leaf_of(row, axis), dense_of(row, axis)
  train, rest = tree.partition({"kernel": leaf})
  x, g = inputs_of(row, 3), jnp.asarray(np.random.default_rng(3).normal(size=(3, OUT)).astype(np.float32))

  def through_the_door(x, train):
    return jnp.sum(g * door(x, tree.combine(train, rest)["kernel"]))

  def through_dense(train):
    whole = tree.combine(train, rest)["kernel"]
    w = whole.materialize()
    seen = whole.rounded(x) if isinstance(leaf, LearnedInputArray) else acted(np.asarray(x), leaf)  # its step trains
    return jnp.sum(g * (seen @ (w if axis == -2 else w.T)))

  gx, got = jax.jit(jax.grad(through_the_door, (0, 1)))(x, train)
  want = jax.jit(jax.grad(through_dense))(train)
  close(gx, np.asarray(g, np.float64) @ (dense.T if axis == -2 else dense))
  reached = jax.tree.leaves(got)
  assert bool(reached) == bool(row.trains)
  for a, b in zip(reached, jax.tree.leaves(want), strict=True):
    assert jnp.issubdtype(a.dtype, jnp.floating) and bool(jnp.all(jnp.isfinite(a)))
    # a gradient to a bfloat16 scale is itself bfloat16: 2**-8 relative
    size = float(jnp.max(jnp.abs(b.astype(jnp.float32)))) or 1.0
    tolerance = 1e-2 if a.dtype == jnp.bfloat16 else 1e-4
    close(a.astype(jnp.float32) / size, np.asarray(b, np.float32) / size, tolerance)


@pytest.mark.parametrize("axis", AXES, ids=["kernel", "table"])
def test_gradient_of_a_scale_by_finite_difference(axis):
  row = row_of("int4 g32 minimum")
  leaf, x = leaf_of(row, axis), inputs_of(row, 3)
  loss = jax.jit(lambda leaf: jnp.sum(jnp.sin(product(axis)(x, leaf))))
  for name in row.trains:
    value = getattr(leaf, name)
    moved = lambda v, name=name: loss(dataclasses.replace(leaf, **{name: v}))  # noqa: E731
    direction = jnp.asarray(np.random.default_rng(0).normal(size=value.shape).astype(np.float32))
    slope = float(jnp.vdot(jax.jit(jax.grad(moved))(value), direction))
    h = 1e-3
    numeric = float(moved(value + h * direction) - moved(value - h * direction)) / (2 * h)
    assert slope == pytest.approx(numeric, rel=2e-2, abs=2e-2)


COLUMN = types.SimpleNamespace(axes={"w/kernel": ("embed", "mlp"), "w/table": ("vocab", "embed")})
"""Outputs, or table rows, over the devices."""
INPUTS = types.SimpleNamespace(axes={"w/kernel": ("mlp", "embed"), "w/table": ("embed", "mlp")})
"""The contraction axis over the devices, where its blocks divide."""


@each_form
def test_sharded(row, axis):
  """On eight devices: the outputs split, nothing of the value changed, products equal."""
  leaf, name = leaf_of(row, axis), "kernel" if axis == -2 else "table"
  mesh = make_mesh(data=1, tensor=8)
  placed = shard(COLUMN, {"w": {name: leaf}}, mesh)["w"][name]
  chex.assert_trees_all_equal(placed, leaf)
  chex.assert_tree_is_sharded(codes_of(placed), devices=jax.devices())
  assert largest_shard(placed) <= codes_of(leaf).nbytes / 8
  x = inputs_of(row, 3)
  close(jax.jit(product(axis))(x, placed), expected(x, dense_of(row, axis), axis, row))


def codes_of(leaf):
  """The largest array that holds the outputs."""
  if isinstance(leaf, SumArray):
    leaf = leaf.base
  if isinstance(leaf, LowRankArray):
    leaf = leaf.right if leaf.axis == -2 else leaf.left
  return max(jax.tree.leaves(leaf), key=lambda x: x.nbytes)


def largest_shard(leaf):
  return max(s.data.nbytes for s in codes_of(leaf).addressable_shards)


@pytest.mark.parametrize("name", ["int8 row", "int4 g32 zero", "masked int4"])
@each_axis
def test_sharded_along_the_inputs(name, axis):
  """Blocks and groups split with the contraction axis; no shard splits a byte or a group."""
  row = dataclasses.replace(row_of(name), inputs=1024)
  leaf, name = leaf_of(row, axis), "kernel" if axis == -2 else "table"
  placed = shard(INPUTS, {"w": {name: leaf}}, make_mesh(tensor=8))["w"][name]
  assert largest_shard(placed) == codes_of(leaf).nbytes / 8
  chex.assert_trees_all_equal(placed, leaf)
  x = inputs_of(row, 3)
  y = jax.jit(product(axis))(x, placed)
  close(y, expected(x, dense_of(row, axis), axis), 1e-3)  # sums of 1024 products


@each_row
@each_axis
def test_sharding_like(row, axis):
  """A spec for every array, of its rank, and none for what one value serves."""
  leaf = leaf_of(row, axis)
  specs = leaf.sharding_like(PartitionSpec("data", "tensor"))
  flat = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
  arrays = jax.tree.leaves(leaf)
  assert len(flat) == len(arrays)
  for spec, x in zip(flat, arrays, strict=True):
    assert isinstance(spec, PartitionSpec) and len(spec) == x.ndim
    if x.ndim == 2:  # a scale or a minimum
      assert all(part is None for part, extent in zip(spec, x.shape, strict=True) if extent == 1)


@each_saved
@each_axis
def test_checkpoint_round_trip(row, axis, tmp_path):
  """Bitwise, static fields and all; a rebuilt leaf multiplies without a new trace."""
  leaf = leaf_of(row, axis)
  descriptions, arrays = describe({"w": {"kernel": leaf}})
  safetensors.write(tmp_path / "weights.safetensors", arrays)
  file = safetensors.open_file(tmp_path / "weights.safetensors")
  again = rebuild(descriptions["w/kernel"], file.read, "w/kernel", Path("manifest.json"))
  again = jax.device_put(again)
  assert jax.tree.structure(again) == jax.tree.structure(leaf)
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(leaf), strict=True):
    assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@each_row
@each_axis
def test_one_trace_for_two_leaves(row, axis):
  """What is static is the same for two weights of a form, so a jitted function is traced once."""
  chex.clear_trace_counter()
  shape_of = jax.jit(chex.assert_max_traces(lambda leaf: jnp.asarray(leaf.shape), n=1))
  for seed in (0, 1):
    shape_of(leaf_of(row, axis, seed))


@pytest.mark.parametrize("name", ["int4 g32 zero", "masked dense"])
@each_axis
def test_more_outputs_than_a_tile(name, axis):
  """A whole tile, then what is left over."""
  row = row_of(name)
  leaf, x = leaf_of(row, axis, outputs=200), inputs_of(row, 20)
  close(jax.jit(product(axis))(x, leaf), expected(x, dense_of(row, axis, outputs=200), axis))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["int4 g32 zero", "nf4 g32", "masked dense", "clustered 16", "low rank 8",
                                  "int8 per token x int4 g32"])
def test_low_precision_weights_and_inputs(name, dtype):
  """The leaf keeps the weight's dtype, a product keeps x's; sums are in float32."""
  row = row_of(name)
  leaf = row.make(weight(row, -2).astype(dtype), -2)
  assert jnp.dtype(leaf.dtype) == dtype and jax.eval_shape(leaf.materialize).dtype == dtype
  x = inputs_of(row, 3).astype(dtype)
  y = ops.linear(x, leaf)
  assert y.dtype == dtype
  dense = np.asarray(jax.jit(lambda leaf: leaf.columns(0, OUT))(leaf), np.float64)
  # one rounding, of the output, to 8 bits of mantissa
  np.testing.assert_allclose(np.asarray(y, np.float64), expected(x, dense, -2, row), rtol=2**-8, atol=2**-8)


class UnknownArray(CompressedArray):
  shape, dtype = (4, 4), jnp.float32


@pytest.mark.parametrize("door", ["linear", "embed", "attend"])
def test_a_type_without_a_rule_raises(door):
  arguments = (jnp.zeros((2,), jnp.int32),) if door == "embed" else (jnp.zeros((2, 4)),)
  with pytest.raises(TypeError, match=rf"ops\.{door} has no rule for UnknownArray; it knows .*Quantized"):
    getattr(ops, door)(*arguments, UnknownArray())


def test_a_subtype_does_not_inherit_a_rule():
  class Sub(QuantizedArray):
    pass

  leaf = leaf_of(ROWS[0], -2)
  sub = Sub(**{f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf)})
  with pytest.raises(TypeError, match="no rule for Sub"):
    ops.linear(jnp.zeros((1, 64)), sub)


def test_a_numpy_weight_raises():
  with pytest.raises(TypeError, match="no rule for ndarray"):
    ops.linear(jnp.zeros((1, 4)), np.zeros((4, 4), np.float32))


def test_masks_stand_outermost_and_are_replaced():
  w = weight(ROWS[0], -2)
  first, second = jnp.arange(w.size).reshape(w.shape) % 2 == 0, jnp.arange(w.size).reshape(w.shape) % 3 == 0
  twice = masked(masked(w, first, -2), second, -2)
  assert isinstance(twice.values, jax.Array)
  np.testing.assert_array_equal(twice.materialize(), np.where(second, w, 0))
  with pytest.raises(ValueError, match="does not fit values of shape"):
    masked(w, first[:3], -2)


def test_a_removed_value_gets_no_gradient():
  w = weight(ROWS[0], -2)
  keep = jnp.arange(w.size).reshape(w.shape) % 2 == 0
  x = inputs_of(ROWS[0], 3)
  gradient = jax.grad(lambda values: jnp.sum(ops.linear(x, masked(values, keep, -2))))(w)
  assert bool(jnp.all(jnp.where(keep, True, gradient == 0))) and bool(jnp.any(gradient != 0))


def test_the_backward_pass_holds_no_dense_weight():
  """Gradients rebuild tiles: the temporaries of a product's gradient stay below the dense weight."""
  leaf = quantize_matrix(jnp.ones((512, 2048)), bits=4, group_size=64)
  x = jnp.ones((16, 512))
  compiled = jax.jit(jax.grad(lambda x: jnp.sum(ops.linear(x, leaf) ** 2))).lower(x).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 512 * 2048 * 4


# ------------------------------------------------------------------------------------- one kind at a time


@each_axis
def test_a_group_of_fewer_than_n_holds_zeros_at_unused_positions(axis):
  """Positions stay ascending and distinct; what is removed, NaN included, does not come back."""
  w = np.arange(1.0, 17.0, dtype=np.float32).reshape(2, 8)
  keep = np.array([[0, 0, 0, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 1, 0, 0]], bool)
  dense = np.where(keep, w, 0)
  w = np.where(keep, w, np.nan)
  turn = (lambda x: x.T) if axis == -2 else (lambda x: x)
  leaf = nm_sparse(jnp.asarray(turn(w)), jnp.asarray(turn(keep)), 2, 4, axis)
  np.testing.assert_array_equal(leaf.materialize(), turn(dense))
  np.testing.assert_array_equal(turn(np.asarray(leaf.indices.unpack())), [[0, 3, 0, 1], [0, 2, 0, 1]])


def test_unused_positions_need_an_exact_zero():
  w = weight(row_of("2:4 float32"), -2) + 1.0
  minimum = functools.partial(quantize_matrix, bits=4, group_size=8, symmetric=False, zero="real")
  few = nm_mask(w, 1, 4, -2)
  with pytest.raises(ValueError, match=r"keeps fewer than 2, and int4 g8 min cannot hold the 0"):
    nm_sparse(w - 3.0, few, 2, 4, -2, lambda v: dataclasses.replace(minimum(v), minimum=minimum(v).scale))
  nm_sparse(w, few, 2, 4, -2, functools.partial(quantize_matrix, bits=4))
  nm_sparse(w, nm_mask(w, 2, 4, -2), 2, 4, -2, minimum)  # every position used


def test_the_largest_of_each_group_are_kept():
  w = jnp.asarray([[1.0, -4.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0]])
  np.testing.assert_array_equal(nm_mask(w, 2, 4, -1), [[0, 1, 1, 0, 1, 1, 0, 0]])


@each_axis
def test_outputs_that_keep_nothing_and_all(axis):
  """The room is the largest count; a mask of nothing keeps room for one."""
  w = weight(row_of("bitmap float32"), axis)
  outputs = jnp.arange(OUT) % 4 == 0
  keep = jnp.broadcast_to(outputs[None, :] if axis == -2 else outputs[:, None], w.shape)
  leaf = bitmap(w, keep, axis)
  assert leaf.values.shape == w.shape
  np.testing.assert_array_equal(leaf.materialize(), np.where(keep, w, 0))
  nothing = bitmap(w, jnp.zeros(w.shape, bool), axis)
  assert nothing.values.shape[axis] == 1 and not np.asarray(nothing.materialize()).any()


def test_layers_of_one_room_stack():
  w = weight(row_of("bitmap float32"), -2)
  keeps = [jnp.asarray(np.random.default_rng(seed).random(w.shape) < 0.5) for seed in (0, 1)]
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *(bitmap(w, keep, -2, most=64) for keep in keeps))
  np.testing.assert_array_equal(stacked.materialize(), [np.where(keep, w, 0) for keep in keeps])
  several = bitmap(jnp.stack([w, w]), jnp.stack(keeps), -2, most=64)  # or made at once
  chex.assert_trees_all_equal(several, stacked)


def test_int8_per_token():
  """Within half a step of each token's own scale; zeros stay, NaN and infinity are not rounded away."""
  x = inputs_of(ROWS[0], 5) * jnp.asarray([1e-30, 1.0, 1e30, 0.0, 1.0])[:, None]
  act = jax.jit(Int8PerToken())
  y, scale = act(x), np.abs(x).max(-1, keepdims=True) / 127
  assert (np.abs(y - x) <= scale * (0.5 + 1e-5)).all() and not y[3].any()
  np.testing.assert_allclose(np.abs(y).max(-1), np.abs(x).max(-1), rtol=1e-6)
  bad = act(x.at[0, 3].set(jnp.nan).at[1, 5].set(jnp.inf).at[4, 5].set(-jnp.inf))
  assert np.isnan(bad[jnp.array([0, 1, 4])]).all()
  np.testing.assert_array_equal(bad[2], y[2])
  assert act(x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_an_act_stands_outside_a_mask():
  """A mask over it would decode the weight and leave the act out."""
  leaf = leaf_of(row_of("int8 per token x int4 g32"), -2)
  with pytest.raises(ValueError, match=r"int8 per token x int4 g32 acts on its input.*mask its weight"):
    masked(leaf, jnp.asarray(third(np.ones(leaf.shape))), -2)


@pytest.mark.parametrize("name", ["clustered 16", "2:4 int8 row", "bitmap float32", "low rank 8"])
def test_a_mask_over_any_form(name):
  row = row_of(name)
  keep = np.arange(64 * OUT).reshape(64, OUT) % 5 != 0
  leaf, x = masked(leaf_of(row, -2), jnp.asarray(keep), -2), inputs_of(row, 3)
  assert leaf.kind == f"masked {leaf.values.kind}"
  close(jax.jit(ops.linear)(x, leaf), expected(x, np.where(keep, dense_of(row, -2), 0), -2))


def test_a_rank_above_a_tile():
  """The rows of a compressed table add up over tiles of its rank."""
  rng = np.random.default_rng(0)
  left, right = (jnp.asarray(rng.normal(0, 0.1, shape).astype(np.float32)) for shape in ((8, 200), (200, 16)))
  leaf = low_rank(left, quantize_matrix(right, bits=8, axis=-1), -1)
  close(jax.jit(ops.embed)(jnp.arange(8), leaf), by_invariant(leaf))


def test_low_rank_multiplies_no_weight_out():
  """The largest temporary of a product is an activation."""
  leaf = low_rank(jnp.ones((2048, 8)), jnp.ones((8, 2048)), -2)
  compiled = jax.jit(ops.linear).lower(jnp.ones((4, 2048)), leaf).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 2048 * 2048


W = np.ones((8, 6), np.float32)
REFUSED = {
  "bits": (lambda: clustered(jnp.zeros((8, 6), int), jnp.ones(4), 9, -2), "bits are 1 to 8"),
  "entries": (lambda: clustered(jnp.zeros((8, 6), int), jnp.ones(5), 2, -2), "5 entries in the codebook"),
  "codes outside": (lambda: clustered(jnp.full((8, 6), 3), jnp.ones(3), 2, -2), "codes from 3 to 3 point outside"),
  "float codes": (lambda: clustered(jnp.zeros((8, 6)), jnp.ones(3), 2, -2), "integer codes and a float codebook"),
  "a codebook too many": (lambda: clustered(jnp.zeros((8, 6), int), jnp.ones((4, 3)), 2, -2), "4 codebooks do not"),
  "atoms too many": (lambda: dictionary(jnp.ones((1, 300, 4)), jnp.zeros((2, 6), int), None, 8, -2), "300 atoms of 4"),
  "runs": (lambda: dictionary(jnp.ones((1, 4, 4)), jnp.zeros((3, 6), int), None, 8, -2), "do not fit 2 runs of 4"),
  "spaces": (lambda: dictionary(jnp.ones((3, 4, 4)), jnp.zeros((2, 6), int), None, 8, -2), "3 spaces do not fit"),
  "terms alone": (lambda: dictionary(jnp.ones((1, 4, 4)), jnp.zeros((4, 6), int), None, 8, -2), "need coefficients"),
  "coefficients": (lambda: dictionary(jnp.ones((1, 4, 4)), jnp.zeros((4, 6), int), W, 8, -2), "coefficients"),
  "codes beyond atoms": (lambda: dictionary(jnp.ones((1, 4, 4)), jnp.full((2, 6), 4), None, 8, -2), "point outside 4"),
  "inputs": (lambda: nm_sparse(W, W > 0, 2, 4, -1), "no multiple of 4 inputs along axis -1"),
  "pattern": (lambda: nm_mask(W, 4, 4, -2), "1 <= n < m"),
  "a full mask": (lambda: nm_sparse(W, W > 0, 2, 4, -2), "the mask keeps 4 of a group of 4"),
  "another mask": (lambda: nm_sparse(W, W[:4] > 0, 2, 4, -2), "does not fit a weight"),
  "values along the outputs": (
    lambda: nm_sparse(W, nm_mask(W, 2, 4, -2), 2, 4, -2, functools.partial(quantize_matrix, axis=-1)),
    r"quantize gave int4 row \(4, 6\)"),
  "a bitmap's mask": (lambda: bitmap(W, W[:4] > 0, -2), "does not fit a weight"),
  "too little room": (lambda: bitmap(W, W > 0, -2, most=7), "most=7, and an output keeps 8"),
  "a traced mask": (lambda: jax.jit(lambda k: bitmap(W, k, -2))(W > 0), "to be given where the mask is traced"),
  "a bitmap's axis": (lambda: bitmap(W, W > 0, 0), "axis is -2"),
  "ranks": (lambda: low_rank(W, W, -2), r"\(8, 6\) and \(8, 6\) cannot be multiplied"),
  "a factor along the rank": (
    lambda: low_rank(W, quantize_matrix(jnp.ones((6, 8)), axis=-1), -2), "right is compressed along -1"),
  "integer factors": (lambda: low_rank(W.astype(int), W.T, -2), "left has dtype int"),
  "no axis": (lambda: with_act(jnp.asarray(W), Int8PerToken()), "axis is -2"),
  "another axis": (lambda: with_act(quantize_matrix(jnp.asarray(W)), Int8PerToken(), -1), "the weight's is -2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_factories_refuse_what_does_not_fit(case):
  make, words = REFUSED[case]
  with pytest.raises(ValueError, match=words):
    make()
