"""Rotation keeps the function, unties what it must, and spreads outliers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress import tree
from lmcompress.calibration import compress
from lmcompress.models import GPT2, GPT2Config, GPT2Sizes, Phi, PhiConfig, PhiSizes
from lmcompress.ops.hadamard import hadamard, random_rotation
from lmcompress.ops.rounding import quantize
from lmcompress.transforms import at, chain, magnitude, rotate, round_to_nearest
from lmcompress.types import WeightError

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12)).astype(np.int32)


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 36, 40, 60, 64, 576, 768, 960, 1536])
def test_hadamard(n):
  h = hadamard(n).astype(np.int64)
  assert set(np.unique(h)) <= {-1, 1}
  np.testing.assert_array_equal(h @ h.T, n * np.eye(n, dtype=np.int64))


@pytest.mark.parametrize("n", [6, 10, 64, 92])
def test_a_rotation_of_any_size(n):
  """Where no Hadamard matrix is known here (6, 10: there is none at all) any rotation does."""
  q = np.asarray(random_rotation(n, jax.random.key(3)), np.float64)
  np.testing.assert_allclose(q @ q.T, np.eye(n), atol=2e-6)
  assert not np.array_equal(q, random_rotation(n, jax.random.key(4)))


@pytest.mark.parametrize("n", [1, 6, 64])
def test_a_rotation_that_keeps_means(n):
  q = np.asarray(random_rotation(n, jax.random.key(3), means=True), np.float64)
  np.testing.assert_allclose(q @ q.T, np.eye(n), atol=3e-6)
  np.testing.assert_allclose(q.sum(axis=1), np.ones(n), atol=3e-6)  # the mean of x Q is that of x


@pytest.mark.parametrize("name", ["GPT2", "Phi"])
def test_norms_that_subtract_a_mean(name):
  """The logits stay, and outliers of the stream spread."""
  if name == "GPT2":
    model = GPT2(GPT2Config(head_dim=8, max_length=32), GPT2Sizes(vocab=64, embed=32, mlp=32, layers=2, heads=4))
  else:
    model = Phi(PhiConfig(head_dim=8, turned=4), PhiSizes(vocab=64, embed=32, mlp=32, layers=2, heads=4, kv_heads=4))
  params = model.init(jax.random.key(1))
  for i, (path, leaf) in enumerate(tree.flatten(params).items()):
    if path.endswith(("/bias", "norm/scale")):
      params = tree.put(params, path, leaf + 0.3 * jax.random.normal(jax.random.key(i), leaf.shape))
  done, _ = compress(model, params, rotate(), key=jax.random.key(0))
  a, b = (np.asarray(model.apply(p, TOKENS), np.float64) for p in (params, done))
  np.testing.assert_allclose(b, a, atol=2e-5 * np.abs(a).max())
  assert not np.allclose(done["embed"]["table"], params["embed"]["table"])


@pytest.fixture(scope="module")
def scaled(tiny):
  """The small Llama, tied, with norms that scale, the last one too."""
  model, params = tiny
  params = {name: part for name, part in params.items() if name != "head"}
  for i, path in enumerate(("layers/0/attn_norm", "layers/0/mlp_norm", "layers/1/attn_norm", "final_norm")):
    params = tree.put(params, f"{path}/scale", jnp.exp(0.5 * jax.random.normal(jax.random.key(i), (32,))))
  return model, params


@pytest.mark.parametrize("heads", [True, False])
def test_the_logits_stay(scaled, heads):
  model, params = scaled
  done, report = compress(model, params, rotate(heads), key=jax.random.key(0))
  a, b = (np.asarray(model.apply(p, TOKENS), np.float64) for p in (params, done))
  np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max())
  flat = tree.flatten(done)
  assert all(bool(jnp.all(leaf == 1)) for path, leaf in flat.items() if path.endswith("/scale"))
  assert "head/table" not in tree.flatten(params) and "head/table" in flat  # the last norm's scale unties it
  assert {row["path"] for row in report.rows} == set(tree.weights(done))


def test_a_tied_head_stays_tied_where_the_last_norm_is_one(tiny):
  model, params = tiny
  params = {name: part for name, part in params.items() if name != "head"}
  done, _ = compress(model, params, rotate(), key=jax.random.key(0))
  assert "head" not in done
  a, b = (np.asarray(model.apply(p, TOKENS)) for p in (params, done))
  np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max())


def test_biases_turn_too(tiny):
  model, params = tiny
  for i, (name, width) in enumerate((("attn/v", 16), ("attn/o", 32), ("mlp/down", 32), ("attn/q", 32))):
    width = tree.get(params, f"layers/0/{name}/kernel").shape[-1]
    params = tree.put(params, f"layers/0/{name}/bias", jax.random.normal(jax.random.key(i), (width,)))
  done, _ = compress(model, params, rotate(), key=jax.random.key(0))
  a, b = (np.asarray(model.apply(p, TOKENS)) for p in (params, done))
  np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max())


def test_outliers_cost_less_after_it():
  """An input thirty times the rest spoils each row that reads it, but not once it is spread over all."""
  w = jax.random.normal(jax.random.key(0), (64, 48)).at[5].mul(30.0)
  turned = random_rotation(64, jax.random.key(1)).T @ w
  plain, spread = (jnp.linalg.norm(quantize(x, bits=4).materialize() - x) for x in (w, turned))
  assert spread < 0.4 * plain


def refused(model, params, recipe, match):
  with pytest.raises(WeightError, match=match):
    compress(model, params, recipe, key=jax.random.key(0))


def test_what_it_cannot_turn(tiny):
  model, params = tiny
  silent = tree.put(params, "layers/0/attn_norm", {"scale": jnp.ones(32).at[3].set(0), "bias": jnp.ones(32)})
  refused(model, silent, rotate(), "layers/0/attn_norm: a scale of 0 beside a bias")
  refused(model, params, at("layers/*", chain(magnitude(0.5), rotate())), "masked")
  refused(model, params, chain(round_to_nearest(4, 16), rotate()), "layers/0/attn/k/kernel: the weight is already")
  refused(model, params, at("layers/*/mlp", rotate()), "turns the whole model; layers/0/attn/k/kernel")
  extra = tree.put(params, "layers/0/post_norm/scale", jnp.ones(32))
  refused(_Named(model, {**model.axes, "layers/*/post_norm/scale": ("embed",)}), extra, rotate(), "no stage reads")
  with pytest.raises(WeightError, match="pass key"):
    compress(model, params, rotate())


@dataclasses.dataclass(frozen=True)
class _Named:
  """A model that publishes other axes."""

  model: object
  axes: dict

  def __getattr__(self, name):
    return getattr(self.model, name)


def test_a_structure_that_does_not_tell_all_is_found_out(tiny):
  model, params = tiny
  silent = {path: names for path, names in model.axes.items() if "down" not in path}
  refused(_Named(model, silent), params, rotate(), "the logits changed")
