"""HQQ on one matrix: the paper's iterations in NumPy, and that a group never gets worse than plain rounding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress.ops.rounding import Rounding
from lmcompress.transforms import hqq
from lmcompress.transforms.hqq import hqq_matrix
from lmcompress.transforms.round_to_nearest import quantize_matrix


def weight(seed=0):
  w = np.random.default_rng(seed).standard_t(3, size=(64, 12)) * 0.1
  return w.astype(np.float32)


def run(w, bits, group=16, iterations=20):
  rounding = Rounding(bits, symmetric=False, zero="real", scale_dtype="float32")
  return hqq_matrix(jnp.asarray(w), axis=-2, rounding=rounding, group_size=group, norm=0.7, iterations=iterations)


def paper(w, bits, iterations):
  """The iterations of the authors' code in float64: the mean |error| of a group at the best of them."""
  levels = 2**bits - 1
  low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
  s, beta = levels / (high - low), 10.0
  z, best = -low * s, np.inf
  for i in range(iterations + 1):
    codes = np.clip(np.round(w * s + z), 0, levels)
    error = w - (codes - z) / s
    best = np.minimum(best, np.abs(error).mean(0))
    if i < iterations:
      size = np.abs(error)
      outliers = np.sign(error) * np.maximum(size - np.maximum(size, 1e-12) ** -0.3 / beta, 0)
      z = (codes - (w - outliers) * s).mean(0)
      beta *= 1.01
  return best


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_are_the_papers(bits):
  w = weight()
  done = np.asarray(run(w, bits).materialize(), np.float64)
  for i in range(0, 64, 16):
    want = paper(w[i : i + 16].astype(np.float64), bits, 20)
    np.testing.assert_allclose(np.abs(done[i : i + 16] - w[i : i + 16]).mean(0), want, rtol=2e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_group_is_worse_than_rounding(bits):
  w = weight(3)
  options = dict(group_size=16, symmetric=False, zero="real", scale_dtype="float32")
  rounded = quantize_matrix(jnp.asarray(w), bits=bits, **options)
  mean = lambda q: np.abs(np.asarray(q.materialize()) - w).reshape(4, 16, 12).mean(1)  # noqa: E731
  assert (mean(run(w, bits)) <= mean(rounded) * (1 + 1e-5)).all()
  if bits < 8:
    assert mean(run(w, bits)).mean() < 0.99 * mean(rounded).mean()


def test_jit_equals_eager():
  """But for sums in another order, which may make another iteration the best."""
  w = weight()
  with jax.disable_jit():
    eager = np.asarray(run(w, 3).materialize())
  error = lambda dense: np.abs(dense - w).reshape(4, 16, 12).mean(1)  # noqa: E731
  np.testing.assert_allclose(error(np.asarray(run(w, 3).materialize())), error(eager), rtol=2e-3)


def test_flat_groups_are_finite():
  w = weight()
  w[:16], w[16:32] = 0, 0.25
  dense = np.asarray(run(w, 3).materialize())
  assert np.isfinite(dense).all()
  np.testing.assert_allclose(dense[:32], w[:32], atol=1e-3)


def test_arguments_out_of_range():
  for options in ({"bits": 1}, {"group_size": 0}, {"norm": 0.0}, {"iterations": 0}):
    with pytest.raises(ValueError, match="bits are 2 to 8"):
      hqq(**options)
