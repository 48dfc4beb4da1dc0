"""Grids against their publications: NF4, the two 8-bit floats, the 4-bit float, and the integers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lmcompress.arrays import E2M1, FP8_E4M3, FP8_E5M2, NF4, Float8, Integer, Table, integer

# Dettmers et al. 2023, arXiv:2305.14314, appendix E, as printed.
PUBLISHED_NF4 = [
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
  -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
  0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
  0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]


def test_nf4_is_the_published_table():
  assert list(NF4.values) == PUBLISHED_NF4
  assert NF4.bits == 4 and NF4.largest == 1.0


@pytest.mark.parametrize("grid", [NF4, E2M1, Table("odd", (-3.0, -0.1, 0.25, 7.0))], ids=lambda g: g.name)
def test_a_table_encodes_to_the_nearest(grid):
  """Against a search over all values. Between equals (a midpoint), either is nearest."""
  values = np.asarray(grid.values, np.float64)
  midpoints = (values[1:] + values[:-1]) / 2
  x = np.concatenate([
    np.random.default_rng(0).uniform(values[0] - 1, values[-1] + 1, 4000), values, midpoints,
    midpoints - 1e-4, midpoints + 1e-4, [1e30, -1e30],
  ]).astype(np.float32)
  codes = np.asarray(jax.jit(grid.encode)(x))
  assert codes.dtype == np.uint8 and codes.max() < len(values)
  distance = np.abs(x.astype(np.float64)[:, None] - values)
  chosen, best = distance[np.arange(len(x)), codes], distance.min(1)
  # midpoints are kept in float32: half an ulp of a value below 16
  np.testing.assert_allclose(chosen, best, rtol=1e-6, atol=5e-7)


@pytest.mark.parametrize("grid", [NF4, E2M1, FP8_E4M3, FP8_E5M2, Integer(4, 8), Integer(8)],
                         ids=lambda grid: grid.name)
def test_every_value_encodes_to_itself(grid):
  codes = np.arange(len(grid.values) if isinstance(grid, Table) else 2**grid.bits, dtype=np.uint8)
  values = np.asarray(grid.decode(jnp.asarray(codes)))
  finite = np.isfinite(values)
  assert finite.sum() >= len(codes) - 8  # e5m2 has two infinities and six NaN, e4m3fn two NaN
  again = np.asarray(grid.decode(grid.encode(jnp.asarray(values[finite]))))
  np.testing.assert_array_equal(again, values[finite])


@pytest.mark.parametrize("grid, name", [(FP8_E4M3, "float8_e4m3fn"), (FP8_E5M2, "float8_e5m2")])
def test_fp8_is_ml_dtypes(grid, name):
  dtype = getattr(ml_dtypes, name)
  patterns = np.arange(256, dtype=np.uint8)
  np.testing.assert_array_equal(grid.decode(jnp.asarray(patterns)), patterns.view(dtype).astype(np.float32))
  assert grid.largest == float(ml_dtypes.finfo(dtype).max)
  rng = np.random.default_rng(0)
  x = (rng.normal(size=4000) * np.exp2(rng.uniform(-14, 7, 4000))).astype(np.float32)
  x = np.concatenate([x, [0.0, grid.largest, -grid.largest]]).astype(np.float32)
  want = np.clip(x, -grid.largest, grid.largest).astype(dtype).view(np.uint8)
  np.testing.assert_array_equal(jax.jit(grid.encode)(x), want)


@pytest.mark.parametrize("grid", [FP8_E4M3, FP8_E5M2], ids=lambda g: g.name)
def test_fp8_saturates(grid):
  x = jnp.asarray([1e30, -1e30, grid.largest * 1.5, jnp.inf, -jnp.inf])
  signs = np.array([1, -1, 1, 1, -1])
  np.testing.assert_array_equal(grid.decode(grid.encode(x)), signs * grid.largest)


def test_e2m1_is_the_four_bit_float():
  """OCP Microscaling Formats 1.0, table 4: one sign, two exponent bits (bias 1), one mantissa bit."""
  positive = {m / 2 if e == 0 else 2.0 ** (e - 1) * (1 + m / 2) for e in range(4) for m in range(2)}
  assert list(E2M1.values) == sorted({-v for v in positive if v} | positive)
  assert E2M1.bits == 4 and E2M1.largest == 6.0


@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_conventions(bits):
  half = 2 ** (bits - 1)
  x = jnp.asarray([-1e9, -half, -half + 1, 0.0, half - 1, 1e9])
  for convention, low in (("full", -half), ("signed", -half), ("narrow", -half + 1)):
    grid = integer(bits, True, convention)
    np.testing.assert_array_equal(grid.decode(grid.encode(x)), [low, low, -half + 1, 0, half - 1, half - 1])
  grid = integer(bits, False)
  np.testing.assert_array_equal(grid.decode(grid.encode(x)), [0, 0, 0, 0, half - 1, 2**bits - 1])
  assert grid.largest == 2**bits - 1 and integer(bits, True).largest == half - 1


def test_grids_are_values():
  """Static fields of a leaf: equal grids give equal tree structures, so a jitted function is traced once."""
  assert hash(Integer(4, 8)) == hash(Integer(4, 8)) and Integer(4, 8) == Integer(4, 8)
  assert Float8("fp8_e4m3") == FP8_E4M3 and Table("nf4", NF4.values) == NF4
