"""The real model: logits and perplexity against transformers, and what compression must keep true of it."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import lmcompress as lmc
from lmcompress import tree
from lmcompress.data.text import load_text, windows
from lmcompress.io.checkpoint import weights_size
from lmcompress.io.hub import resolve_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2():
  return lmc.load("smollm2-135m")


@pytest.fixture(scope="module")
def small(smollm2):
  model, params, _ = smollm2
  recipe = lmc.chain(
    lmc.at("layers/*/mlp", lmc.magnitude(sparsity=0.2)),
    lmc.at("layers/*", lmc.round_to_nearest(bits=4, group_size=64, symmetric=False)),
    lmc.at("embed", lmc.round_to_nearest(bits=8, group_size=-1)),
  )
  return lmc.compress(model, params, recipe)[0]


def test_logits_and_perplexity_equal_transformers(smollm2):
  """transformers imports the same GGUF file by its own code: 1e-3 on logits, 0.1 % on perplexity."""
  import torch
  import transformers

  model, params, tokenizer = smollm2
  path = resolve_model("smollm2-135m")
  net = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
  tokens = windows(tokenizer, load_text("pydoc"), 2, 128)
  with torch.no_grad():
    expected = net(torch.tensor(tokens).long()).logits
  np.testing.assert_allclose(np.asarray(model.apply(params, tokens)), expected.numpy(), atol=1e-3)
  logp = torch.log_softmax(expected[:, :-1].double(), -1)
  nll = -logp.gather(-1, torch.tensor(tokens[:, 1:, None]).long()).mean()
  assert lmc.perplexity(model, params, tokens) == pytest.approx(float(nll.exp()), rel=1e-3)


def test_compressed_is_small_readable_and_reloads_bitwise(smollm2, small, tmp_path):
  model, params, tokenizer = smollm2
  tokens = windows(tokenizer, load_text("pydoc"), 2, 128)
  before, after = lmc.perplexity(model, params, tokens), lmc.perplexity(model, small, tokens)
  assert before < after < 1.6 * before
  lmc.save(tmp_path / "model", model, small, tokenizer)
  nbits = sum(leaf.nbits if hasattr(leaf, "nbits") else leaf.size * 32 for leaf in tree.flatten(small).values())
  size = (tmp_path / "model" / "weights.safetensors").stat().st_size
  assert size == weights_size(small) and size <= 1.02 * nbits / 8
  again, loaded, again_tokenizer = lmc.load(tmp_path / "model")
  np.testing.assert_array_equal(again.apply(loaded, tokens[:1]), model.apply(small, tokens[:1]))
  assert again_tokenizer.encode("Hello, 2026!") == tokenizer.encode("Hello, 2026!")


def test_load_of_a_compressed_model_holds_nothing_dense(smollm2, small, tmp_path):
  model, _, tokenizer = smollm2
  lmc.save(tmp_path / "model", model, small, tokenizer)
  before = {id(x) for x in jax.live_arrays()}
  _, loaded, _ = lmc.load(tmp_path / "model")
  held = sum(x.nbytes for x in jax.live_arrays() if id(x) not in before)
  assert held <= 1.01 * weights_size(loaded)


@pytest.mark.parametrize("rows", [1, 512])
def test_compiled_forward_holds_no_dense_weight(smollm2, small, rows):
  """The temporaries of a compiled layer stay below the largest dense weight, for one token and for many."""
  from lmcompress.models.base import run_module

  model, _, _ = smollm2
  layer, module = small["layers"]["0"], model.layer_of(model.blocks(small)[0])
  carry = model.start(small, np.zeros((1, rows), np.int32))
  compiled = run_module.lower(module, layer, carry["h"], carry["view"], None).compile()
  dense = 576 * 1536 * 4
  activations = rows * (2 * 1536 + 8 * 576) * 4 + 3 * 9 * rows * rows * 4
  assert compiled.memory_analysis().temp_size_in_bytes < dense + activations
