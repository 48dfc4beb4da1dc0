"""Ranges from a histogram, against the values themselves."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress.calibration.statistics import STATISTICS
from lmcompress.ops.observers import BINS, absmax, edges, mse, percentile

BIN = 2 ** (1 / 16)


def counts_of(x):
  statistic = STATISTICS["histogram"]
  state = statistic.init(x.shape[1])
  for part in np.array_split(x, 3):
    state = statistic.update(state, jnp.asarray(part, jnp.float32), None)
  return np.asarray(statistic.finish(state, len(x)), np.float64)


@pytest.fixture(scope="module")
def x():
  x = np.random.default_rng(0).standard_t(3, (4000, 16))
  x[:100] = 0  # padding
  return x


def test_every_value_is_in_its_bin(x):
  counts = counts_of(x)
  assert counts.sum() == np.count_nonzero(x) and counts.shape == (BINS,)
  want, _ = np.histogram(np.abs(x[x != 0]), edges())
  assert np.abs(counts - want).sum() <= 4  # a value at an edge


def test_absmax_and_percentile(x):
  counts, size = counts_of(x), np.abs(x[x != 0])
  assert 1 <= absmax(counts) / size.max() <= BIN * 1.001
  for share in (50, 99, 99.9, 100):
    assert 1 / BIN <= percentile(counts, share) / np.percentile(size, share) <= BIN * BIN


def test_mse_is_the_best_limit(x):
  """Against the error of rounding the values themselves at every limit."""
  limits = np.geomspace(1, np.abs(x).max(), 200)
  error = lambda limit: np.mean((np.clip(np.round(x / (limit / 127)), -127, 127) * limit / 127 - x) ** 2)  # noqa: E731
  found = error(mse(counts_of(x)))
  assert found <= 1.05 * min(map(error, limits)) and found < 0.9 * error(np.abs(x).max())


def test_nothing_seen():
  assert absmax(np.zeros(BINS)) == percentile(np.zeros(BINS)) == mse(np.zeros(BINS)) == 1.0
