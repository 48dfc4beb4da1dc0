"""What matters and what changed, against losses that are measured one by one, and NumPy."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import byte_level
from typer.testing import CliRunner

import lmcompress as lmc
from lmcompress import tree
from lmcompress.cli import app
from lmcompress.evaluate.importance import drift, entries, outliers, token_kl, without_layers
from lmcompress.evaluate.perplexity import perplexity
from lmcompress.models import LSTM, Llama, LlamaConfig, LlamaSizes, LSTMSizes

TOKENS = np.random.default_rng(0).integers(0, 64, (3, 24)).astype(np.int32)


def loss(model, params):
  return math.log(perplexity(model, params, TOKENS))


def test_a_layer_is_worth_what_the_loss_rises_without_it(tiny):
  model, params = tiny
  found = without_layers(model, params, TOKENS)
  for i in "01":
    left = {**params, "layers": {k: v for k, v in params["layers"].items() if k != i}}
    assert found[f"layers/{i}"] == pytest.approx(loss(model, left) - loss(model, params), abs=1e-5)


def test_layers_that_cannot_be_left_out_are_not_in_it():
  """The first of an LSTM's layers takes an embedding of another width."""
  model = LSTM(sizes=LSTMSizes(vocab=64, embed=16, units=24, layers=2))
  assert "layers/0" not in without_layers(model, model.init(jax.random.key(0)), TOKENS)


def test_neurons_are_scored_by_the_slope_of_the_loss(tiny):
  """Weights of a neuron times 1 + e: the score is the slope at e = 0, measured by differences."""
  model, params = tiny
  found = entries(model, params, TOKENS)["layers/1"]
  assert found["mlp"].shape == (64,) and found["kv"].shape == (2,)

  def scaled(e, neuron):
    leaves = tree.flatten(params)
    for part, dim in (("gate", 1), ("up", 1), ("down", 0)):
      path = f"layers/1/mlp/{part}/kernel"
      index = (neuron,) if dim == 0 else (slice(None), neuron)
      leaves[path] = leaves[path].at[index].multiply(1 + e)
    return tree.unflatten(leaves)

  for neuron in np.argsort(-found["mlp"])[:2]:
    slope = (loss(model, scaled(0.05, neuron)) - loss(model, scaled(-0.05, neuron))) / 0.1
    assert found["mlp"][neuron] == pytest.approx(abs(slope), rel=0.05, abs=1e-5)


def test_values_that_the_model_shares_are_scored(tiny):
  model, params = tiny
  shared, _ = lmc.compress(model, params, lmc.at("layers/*", lmc.share(16)))
  assert entries(model, shared, TOKENS)["layers/0"]["mlp"].max() > 0


def test_what_changed(tiny):
  """Nothing where nothing did; else the norms and divergences that NumPy has of logits."""
  model, params = tiny
  assert all(row["change"] == 0 for row in drift(model, params, params, TOKENS))
  assert np.abs(token_kl(model, params, params, TOKENS)).max() < 1e-6
  small, _ = lmc.compress(model, params, lmc.at("layers/0", lmc.round_to_nearest(2, 16)))
  rows = {(row["block"], row["stage"]): row["change"] for row in drift(model, params, small, TOKENS)}
  assert rows["layers/0", "qkv"] == 0 < rows["layers/0", "o"] < 2 and rows["layers/1", "qkv"] > 0
  kl = token_kl(model, params, small, TOKENS)
  assert kl.shape == (3, 23)
  p, q = (np.asarray(jax.nn.log_softmax(model.apply(t, TOKENS)), np.float64)[:, :-1] for t in (params, small))
  np.testing.assert_allclose(kl, (np.exp(p) * (p - q)).sum(-1), atol=1e-5)


def test_outlier_channels(tiny):
  model, params = tiny
  scale = jnp.ones(32).at[7].set(50.0)
  loud = tree.put(params, "layers/0/mlp_norm/scale", scale)
  rows = [row for row in outliers(model, loud, TOKENS) if (row["block"], row["stage"]) == ("layers/0", "gate_up")]
  assert rows[0]["channel"] == 7 and rows[0]["ratio"] > 20 and len(rows) == 3


def test_the_command_tells_and_draws(tmp_path):
  model = Llama(LlamaConfig(head_dim=8), LlamaSizes(vocab=264, embed=16, mlp=32, layers=2, heads=2, kv_heads=2))
  params = model.init(jax.random.key(0))
  lmc.save(tmp_path / "m", model, params, byte_level())
  small, _ = lmc.compress(model, params, lmc.at("layers/*", lmc.round_to_nearest(3, 16)))
  lmc.save(tmp_path / "s", model, small, byte_level())
  (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
  arguments = ["explain", str(tmp_path / "s"), "--against", str(tmp_path / "m"), "--text", str(tmp_path / "text.txt"),
               "--windows", "2", "--length", "16", "--out", str(tmp_path / "out")]  # fmt: skip
  result = CliRunner().invoke(app, arguments)
  assert result.exit_code == 0, result.output
  other = Llama(LlamaConfig(head_dim=8), LlamaSizes(vocab=300, embed=16, mlp=32, layers=1, heads=2, kv_heads=2))
  lmc.save(tmp_path / "o", other, other.init(jax.random.key(0)), byte_level())
  refused = CliRunner().invoke(app, [*arguments[:3], str(tmp_path / "o"), *arguments[4:]])
  assert "with a vocabulary of 300" in str(refused.exception)
  names = {path.name for path in (tmp_path / "out").iterdir()}
  plots = ("drift", "layers", "tokens", "axis_kv", "axis_group", "axis_mlp")
  assert names == {"explain.json", *(f"{plot}.svg" for plot in plots)}
  body = json.loads((tmp_path / "out" / "explain.json").read_text())
  assert len(body["tokens"]) == 2 and len(body["tokens"][0]) == 15 and "layers/1" in result.output
