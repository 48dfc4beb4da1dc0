"""The Llama model against transformers, and the protocol it keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lmcompress import tree
from lmcompress.io.huggingface import load_folder
from lmcompress.models import Llama, LlamaConfig, LlamaSizes
from lmcompress.types import FormatError, Model

BASE = {
  "vocab_size": 97,
  "hidden_size": 48,
  "intermediate_size": 80,
  "num_hidden_layers": 3,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "max_position_embeddings": 128,
  "initializer_range": 0.3,
}
ROPE = {"rope_theta": 10000.0}
CASES = {
  "grouped queries": {},
  "one query head per kv head": {"num_key_value_heads": 6},
  "one kv head": {"num_key_value_heads": 1},
  "tied": {"tie_word_embeddings": True},
  "biases": {"attention_bias": True, "mlp_bias": True},
  "wide heads": {"head_dim": 16},
  "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, **ROPE}},
  "dynamic rope": {"max_position_embeddings": 32, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **ROPE}},
  "llama3 rope": {
    "rope_parameters": {
      "rope_type": "llama3",
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 32,
      "rope_theta": 500000.0,
    }
  },
  "yarn rope": {
    "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **ROPE}
  },
}


def reference(case: str, tmp_path, **save):
  torch.manual_seed(0)
  net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**BASE, **CASES[case]})).eval()
  with torch.no_grad():
    for name, parameter in net.named_parameters():
      if name.endswith("bias") or "norm" in name:
        parameter += 0.1 * torch.randn_like(parameter)
  net.save_pretrained(tmp_path, **save)
  return net


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
  """Float32 against float32; 1e-4 leaves room for another order of summation over at most 80 terms."""
  net = reference(case, tmp_path, max_shard_size="40KB")
  model, params, _ = load_folder(tmp_path)
  if case == "dynamic rope":
    model = Llama(LlamaConfig(**{**vars(model.config), "max_length": 128}))
  tokens = np.random.default_rng(0).integers(0, 97, (2, 60), np.int32)
  with torch.no_grad():
    expected = net(torch.tensor(tokens).long()).logits.numpy()
  logits = np.asarray(model.apply(params, tokens))
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_rope_kinds_differ(tmp_path):
  """The parity above would prove nothing of the scaling if it did not move the logits."""
  model, params, _ = load_folder((reference("llama3 rope", tmp_path), tmp_path)[1])
  plain = Llama(LlamaConfig(**{**vars(model.config), "rope": type(model.config.rope)(500000.0)}))
  tokens = np.arange(60, dtype=np.int32)[None]
  assert float(jnp.abs(model.apply(params, tokens) - plain.apply(params, tokens)).max()) > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_logits(tiny, side):
  model, params = tiny
  tokens = np.random.default_rng(1).integers(0, 64, (1, 10), np.int32)
  pad = [(0, 0), (5, 0) if side == "left" else (0, 5)]
  padded, mask = np.pad(tokens, pad), np.pad(np.ones_like(tokens), pad)
  logits = model.apply(params, padded, attention_mask=mask)
  np.testing.assert_allclose(
    logits[:, 5:] if side == "left" else logits[:, :10], model.apply(params, tokens), atol=1e-5
  )


def test_is_a_model_and_block_view_equals_apply(tiny):
  model, params = tiny
  assert isinstance(model, Model)
  tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
  carry = model.start(params, tokens)
  for block in model.blocks(params):
    carry, taps = model.run(block, params, carry, tuple(stage.name for stage in block.stages))
    for stage in block.stages:
      for linear in stage.linears:
        kernel = tree.get(params, f"{block.path}/{linear}/kernel")
        assert taps[stage.name].shape == (2, 6, kernel.shape[-2])
  np.testing.assert_array_equal(model.finish(params, carry), model.apply(params, tokens))


def test_a_plain_function_can_be_a_model():
  """The protocol needs no linen: a bag of embeddings satisfies it."""

  class Bag:
    axes = {"embed/table": ("vocab", "embed")}  # noqa: RUF012

    def init(self, key):
      return {"embed": {"table": jax.random.normal(key, (11, 4))}}

    def start(self, params, inputs):
      return params["embed"]["table"][inputs]

    def blocks(self, params):
      return ()

    def run(self, block, params, carry, taps=()):
      return carry, {}

    def finish(self, params, carry, last=False):
      return carry @ params["embed"]["table"].T

    def features(self, params, carry):
      return carry

    def apply(self, params, tokens, **_):
      return self.finish(params, self.start(params, tokens))

  from lmcompress.evaluate import perplexity

  bag = Bag()
  assert isinstance(bag, Model)
  assert perplexity(bag, bag.init(jax.random.key(0)), np.arange(10, dtype=np.int32).reshape(2, 5)) > 1


def test_layers_may_be_missing_and_widths_may_differ():
  """Depth and widths are read from the tree; keys are never renumbered."""
  model = Llama(LlamaConfig(head_dim=8), LlamaSizes(vocab=64, embed=32, mlp=64, layers=3, heads=4, kv_heads=2))
  params = model.init(jax.random.key(0))
  del params["layers"]["1"]
  mlp = params["layers"]["2"]["mlp"]
  for name in ("gate", "up"):
    mlp[name] = {"kernel": mlp[name]["kernel"][:, :40]}
  mlp["down"] = {"kernel": mlp["down"]["kernel"][:40]}
  assert [b.path for b in model.blocks(params)] == ["layers/0", "layers/2"]
  assert model.apply(params, np.zeros((1, 4), np.int32)).shape == (1, 4, 64)


def test_every_parameter_has_axes(tiny):
  model, params = tiny
  for path, leaf in tree.flatten(params).items():
    found = [names for pattern, names in model.axes.items() if tree.matches(pattern, path)]
    assert len(found) == 1 and len(found[0]) == leaf.ndim, path


@pytest.mark.parametrize(
  ("tokens", "message"),
  [
    (np.zeros(4, np.int32), "batch, length"),
    (np.zeros((1, 4)), "integers"),
    (np.zeros((1, 3000), np.int32), "context"),
  ],
)
def test_bad_tokens(tiny, tokens, message):
  model, params = tiny
  with pytest.raises(ValueError, match=message):
    model.apply(params, tokens)


def test_unknown_rope_type(tmp_path):
  reference("tied", tmp_path)
  config = (tmp_path / "config.json").read_text().replace('"rope_type": "default"', '"rope_type": "mystery"')
  (tmp_path / "config.json").write_text(config)
  with pytest.raises(FormatError, match="mystery"):
    load_folder(tmp_path)
