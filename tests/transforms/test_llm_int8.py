"""Outlier channels apart: found as the papers say, exact there, and what they cost the rest is gone."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress import ops, tree
from lmcompress.arrays import InputArray, QuantizedArray, SplitArray, split
from lmcompress.calibration import compress
from lmcompress.transforms import at, chain, llm_int8, magnitude, quantize_inputs, round_to_nearest
from lmcompress.types import WeightError

CALIBRATION = np.random.default_rng(0).integers(0, 64, (8, 16)).astype(np.int32)
UP = "layers/0/mlp/up/kernel"


@pytest.fixture(scope="module")
def spiky(tiny):
  """Two channels of one norm forty times as large as the rest, the weights that read them as much smaller."""
  model, params = tiny
  factor = jnp.ones(32).at[jnp.array([5, 17])].set(40.0)
  params = tree.put(params, "layers/0/mlp_norm/scale", factor)
  for name in ("gate", "up"):
    w = params["layers"]["0"]["mlp"][name]["kernel"]
    params = tree.put(params, f"layers/0/mlp/{name}/kernel", w / factor[:, None])
  return model, params


def logits(model, params):
  return np.asarray(model.apply(params, CALIBRATION), np.float64)


def test_the_channels_of_the_paper(spiky):
  model, params = spiky
  done, report = compress(model, params, llm_int8(threshold=10.0), CALIBRATION)
  leaf = tree.get(done, UP)
  assert isinstance(leaf, SplitArray) and leaf.channels.tolist() == [5, 17]
  assert tree.get(done, "layers/0/mlp/gate/kernel").channels.tolist() == [5, 17]
  assert isinstance(tree.get(done, "layers/1/mlp/up/kernel"), InputArray)  # no outlier, nothing kept apart
  assert leaf.nbits == 32 * 64 * 8 + 64 * 16 + 2 * 64 * 16 + 2 * 32
  want = tree.get(params, UP)[leaf.channels].astype(jnp.bfloat16)
  np.testing.assert_array_equal(leaf.materialize()[leaf.channels], want)
  assert {row["path"] for row in report.rows} == {p for p in tree.weights(params) if p.startswith("layers/")}


def test_it_spares_the_rest(spiky):
  """int8 for each token without and with the outliers kept apart, against the product in float64."""
  model, params = spiky
  want = logits(model, params)
  plain = chain(round_to_nearest(8, -1, convention="narrow"), quantize_inputs("int8_per_token"))
  errors = [
    np.linalg.norm(logits(model, compress(model, params, at("layers/0/mlp", r), CALIBRATION)[0]) - want)
    for r in (llm_int8(threshold=10.0), llm_int8(threshold=10.0, outlier_bits=8), plain)
  ]
  assert errors[0] < 0.3 * errors[2] and errors[1] < 0.3 * errors[2]


def test_a_fraction_by_what_rounding_costs(spiky):
  model, params = spiky
  w = np.asarray(tree.get(params, UP), np.float64)
  gate = np.asarray(tree.get(params, "layers/0/mlp/gate/kernel"), np.float64)
  both = np.concatenate([gate, w], axis=1)
  scale = np.asarray(jnp.asarray(np.abs(both).max(0) / 7).astype(jnp.bfloat16), np.float64)
  error = ((np.clip(np.round(both / scale), -7, 7) * scale - both) ** 2).sum(1)
  done, _ = compress(model, params, llm_int8(4, threshold=None, fraction=0.1, activations="none"), CALIBRATION)
  leaf = tree.get(done, UP)
  assert isinstance(leaf.base, QuantizedArray) and leaf.channels.shape == (3,)
  assert {5, 17} <= set(leaf.channels.tolist()) and error.shape == (32,)


@pytest.mark.parametrize("activations", ["int8_per_token", "none"])
def test_prepared(spiky, activations):
  """The kernel rounds inputs by thirty-two; the channels apart stay exact."""
  model, params = spiky
  done, _ = compress(model, params, llm_int8(threshold=10.0, activations=activations), CALIBRATION)
  want = logits(model, done)
  with ops.use_backend("native"):
    found = logits(model, ops.prepare(done))
  near = 2e-4 if activations == "none" else 0.03
  np.testing.assert_allclose(found, want, atol=near * np.abs(want).max())


def test_what_is_refused(tiny):
  model, params = tiny
  for options in ({"bits": 1}, {"group_size": 0}, {"outlier_bits": 4}, {"fraction": 0.1}, {"threshold": None},
                  {"threshold": -1.0}, {"threshold": None, "fraction": 1.0}, {"activations": "int7"}):  # fmt: skip
    with pytest.raises(ValueError, match="llm_int8"):
      llm_int8(**options)
  with pytest.raises(WeightError, match="masked"):
    compress(model, params, chain(magnitude(0.5), llm_int8()), CALIBRATION)
  w = jnp.ones((8, 4))
  for outliers, channels, match in (
    (w[:2], jnp.array([3, 3]), "ascending"), (w[:2], jnp.array([3, 8]), "within 8"), (w[:1], jnp.array([1, 2]), "fit"),
    (w[:0], jnp.zeros(0, int), "fit"), (w[:2], jnp.array([0.0, 1.0]), "integers"),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=match):
      split(w, outliers, channels, -2)
