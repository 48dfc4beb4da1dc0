"""The lattice's points, block LDLQ against NumPy, and that each step lowers the error."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress import ops, tree
from lmcompress.arrays import LatticeArray, lattice
from lmcompress.arrays.lattice import decode, encode, patterns
from lmcompress.calibration import compress
from lmcompress.ops.second_order import inverse_factor
from lmcompress.ops.vector_rounding import round_vectors, solve_lattice
from lmcompress.transforms import chain, gptq, magnitude, quip_sharp, rotate
from lmcompress.types import WeightError

POINTS = np.asarray(decode(jnp.arange(1 << 16, dtype=jnp.uint16)), np.float64)


def test_the_points():
  """65,536 apart, each in E8 shifted by a quarter: all coordinates halves or all whole, with an even sum."""
  assert len(np.unique(POINTS, axis=0)) == 1 << 16
  halves = POINTS - np.where(np.arange(1 << 16) >> 15 == 1, 0.25, -0.25)[:, None]
  assert (halves * 2 % 2 == 1).all() and (halves.sum(1) % 2 == 0).all()
  table, odd = patterns()
  norms = (table.astype(np.float64) ** 2).sum(1)
  assert np.sum(norms <= 10) == 227 and norms.max() == 12 and 0 < odd.sum() < 256


@pytest.mark.parametrize("size", [0.3, 1.0, 3.0])
def test_encode_is_the_nearest(size):
  """Against a search over all points in float64."""
  x = np.random.default_rng(0).normal(0, size, (200, 8)).astype(np.float32)
  found = np.asarray(decode(jax.jit(encode)(x)), np.float64)
  distance = ((x[:, None] - POINTS) ** 2).sum(-1)
  np.testing.assert_allclose(((x - found) ** 2).sum(1), distance.min(1), rtol=1e-5)
  np.testing.assert_array_equal(encode(jnp.asarray(POINTS[::77], jnp.float32)), np.arange(1 << 16)[::77])


def test_normal_weights_lose_less_than_by_scalars():
  """0.092 of the variance at two bits; the best scalar quantizer loses 0.1175 (Max 1960), four even levels 0.119."""
  w = jax.random.normal(jax.random.key(0), (512, 128))
  error = lattice(w, -2, spread=1.03).materialize() - w
  assert 0.09 < float(jnp.mean(error**2)) < 0.096


def correlated(inputs, tokens=400, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(tokens, inputs)) @ (rng.normal(size=(inputs, inputs)) * np.exp(rng.normal(size=inputs)))
  return (x.T @ x / tokens).astype(np.float32)


def test_block_ldlq_against_numpy():
  """Eight inputs at a time, those left moved by what minimizes the error given the ones that are done, in float64."""
  w = np.random.default_rng(1).normal(size=(128, 6)).astype(np.float32)
  hessian = correlated(128)
  hessian += 0.1 * np.eye(128, dtype=np.float32) * hessian.trace() / 128
  factor = inverse_factor(jnp.asarray(hessian), 1e-6)
  codes = np.asarray(round_vectors(jnp.asarray(w), factor.upper, jnp.ones((16, 6))))
  left, h = w.astype(np.float64), hessian.astype(np.float64) + float(factor.damping) * np.eye(128)
  agree = 0
  for b in range(16):
    done, rest = slice(8 * b, 8 * b + 8), slice(8 * b + 8, 128)
    nearest = ((left[done].T[:, None] - POINTS) ** 2).sum(-1).argmin(1)
    agree += int(np.sum(nearest == codes[b]))
    error = left[done] - POINTS[codes[b]].T
    left[rest] += np.linalg.solve(h[rest, rest], h[rest, done] @ error)
  assert agree >= 0.97 * 96  # a tie in float32 may fall the other way


def output_error(w, hessian, leaf):
  error = np.asarray(leaf.materialize(), np.float64) - w
  return float(np.sum(error * (hessian.astype(np.float64) @ error)))


@pytest.mark.parametrize("inputs, group_size", [(100, -1), (100, 40)])
def test_errors_are_absorbed_and_sweeps_lower_them(inputs, group_size):
  """Rows that neither eight nor sixty-four divide, groups of any multiple of eight."""
  w = np.random.default_rng(2).normal(size=(inputs, 24)).astype(np.float32)
  hessian = correlated(inputs)
  options = {"group_size": group_size, "damping": 0.01, "spread": 1.03, "scale_dtype": "float32"}
  solve = lambda sweeps: solve_lattice(jnp.asarray(w), jnp.asarray(hessian), None, sweeps=sweeps, **options)[0]  # noqa: E731
  plain = output_error(w, hessian, lattice(jnp.asarray(w), -2, group_size, 1.03, "float32"))
  errors = [output_error(w, hessian, solve(sweeps)) for sweeps in (0, 1)]
  assert solve(0).shape == w.shape
  assert plain > errors[0] > errors[1]


def test_dead_inputs_and_too_few_tokens():
  rng = np.random.default_rng(3)
  x = rng.normal(size=(12, 64)).astype(np.float32)
  x[:, 5] = 0
  leaf, used, first = solve_lattice(
    jnp.asarray(rng.normal(size=(64, 8)).astype(np.float32)), jnp.asarray(x.T @ x), None,
    group_size=-1, damping=0.01, sweeps=1, spread=1.03, scale_dtype="bfloat16",
  )  # fmt: skip
  assert np.isfinite(leaf.materialize()).all() and float(used) >= 0.99 * float(first)


@pytest.fixture(scope="module")
def calibration():
  return np.random.default_rng(0).integers(0, 64, (16, 16)).astype(np.int32)


def test_on_a_model(tiny, calibration):
  """Two bits and a scale for each row; better than integers of two bits in groups, which take more; runs prepared."""
  model, params = tiny
  wide = chain(rotate(), quip_sharp(error_propagation=0.5))
  done, report = compress(model, params, wide, calibration, jax.random.key(0))
  leaf = done["layers"]["0"]["mlp"]["down"]["kernel"]
  assert isinstance(leaf, LatticeArray) and leaf.nbits == leaf.size * 2 + 16 * 32
  _, plain = compress(model, params, gptq(2, 32, False, error_propagation=0.5), calibration)
  errors = [np.mean([row["output_error"] for row in r.rows if row["link"] in ("quip_sharp", "gptq")])
            for r in (report, plain)]
  assert errors[0] < errors[1]
  want = np.asarray(model.apply(done, calibration))
  with ops.use_backend("native"):
    found = np.asarray(model.apply(ops.prepare(done), calibration))
  np.testing.assert_allclose(found, want, atol=2e-4 * np.abs(want).max())


def test_what_it_refuses(tiny, calibration):
  model, params = tiny
  with pytest.raises(ValueError, match="a multiple of 8"):
    quip_sharp(12)
  with pytest.raises(ValueError, match="damping lies between"):
    quip_sharp(damping=0.0)
  with pytest.raises(WeightError, match="layers/0/attn/k/kernel: the weight is masked"):
    compress(model, params, chain(magnitude(0.5), quip_sharp()), calibration)
  bad = tree.put(params, "layers/0/mlp/up/kernel", params["layers"]["0"]["mlp"]["up"]["kernel"].at[0, 0].set(jnp.nan))
  with pytest.raises(WeightError, match="layers/0/mlp/up/kernel: the weight holds NaN"):
    compress(model, bad, quip_sharp(), calibration)
