"""Every architecture against transformers: logits of random small models, and folders that it reads back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from lmcompress import tree
from lmcompress.generation.cache import init_cache
from lmcompress.io import checkpoint
from lmcompress.io.huggingface import load_folder, save_folder
from lmcompress.models import ARCHITECTURES, Encoded
from lmcompress.types import FormatError, Model

LLAMA = {
  "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
  "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": None,
}  # fmt: skip
LONG = {
  **LLAMA, "eos_token_id": 1,
  "rope_scaling": {
    "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.0, 2.0, 4.5, 7.0]
  },
}  # fmt: skip
GPT2 = {"vocab_size": 97, "n_embd": 42, "n_layer": 3, "n_head": 6, "n_inner": 70, "n_positions": 64,
        "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
BERT = {
  "vocab_size": 97, "hidden_size": 42, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
  "max_position_embeddings": 64, "type_vocab_size": 2, "initializer_range": 0.3,
}  # fmt: skip
DISTILBERT = {"vocab_size": 97, "dim": 42, "hidden_dim": 70, "n_layers": 3, "n_heads": 6, "max_position_embeddings": 64,
              "initializer_range": 0.3}  # fmt: skip
T5 = {"vocab_size": 97, "d_model": 42, "d_kv": 7, "d_ff": 70, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 5,
      "pad_token_id": 0, "decoder_start_token_id": 0, "relative_attention_num_buckets": 8,
      "relative_attention_max_distance": 12}  # fmt: skip
BART = {
  "vocab_size": 97, "d_model": 42, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 6,
  "decoder_attention_heads": 6, "encoder_ffn_dim": 70, "decoder_ffn_dim": 70, "max_position_embeddings": 64,
  "init_std": 0.3, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
  """A class of transformers with a config of its own, of odd sizes where it takes them."""

  net: str
  config: dict[str, Any]

  def build(self) -> Any:
    torch.manual_seed(0)
    cls = getattr(transformers, self.net)
    net = cls._from_config(cls.config_class(**self.config), attn_implementation="eager").eval()
    with torch.no_grad():
      for name, parameter in net.named_parameters():
        if name.endswith("bias") or "norm" in name.lower() or "ln_" in name:
          parameter += 0.1 * torch.randn_like(parameter)
    return net


CASES = {
  "mistral": Case("MistralForCausalLM", {**LLAMA, "sliding_window": 7}),
  "mistral without a window": Case("MistralForCausalLM", {**LLAMA, "sliding_window": None, "head_dim": 16}),
  "qwen2": Case("Qwen2ForCausalLM", LLAMA),
  "qwen2 with a window": Case(
    "Qwen2ForCausalLM", {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
  ),
  "qwen3": Case("Qwen3ForCausalLM", {**LLAMA, "head_dim": 10}),
  "qwen3 tied": Case("Qwen3ForCausalLM", {**LLAMA, "head_dim": 8, "tie_word_embeddings": True}),
  "mixtral": Case("MixtralForCausalLM", {**LLAMA, "num_local_experts": 5, "num_experts_per_tok": 2}),
  "mixtral with a window": Case(
    "MixtralForCausalLM", {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 3, "sliding_window": 9}
  ),
  "qwen3 mixture": Case("Qwen3MoeForCausalLM", {
    **LLAMA, "num_experts": 11, "num_experts_per_tok": 4, "moe_intermediate_size": 20, "head_dim": 10,
    "mlp_only_layers": [1], "norm_topk_prob": True,
  }),
  "qwen2 mixture": Case("Qwen2MoeForCausalLM", {
    **LLAMA, "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 36,
  }),
  "gemma": Case("GemmaForCausalLM", {**LLAMA, "head_dim": 10, "hidden_act": "gelu_pytorch_tanh"}),
  "gemma2": Case("Gemma2ForCausalLM", {
    **LLAMA, "head_dim": 10, "sliding_window": 6, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
  }),
  "gemma3": Case("Gemma3ForCausalLM", {
    **LLAMA, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 24, "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
  }),
  "gpt2 odd heads": Case("GPT2LMHeadModel", GPT2),
  "gpt2 relu untied": Case(
    "GPT2LMHeadModel", {**GPT2, "n_embd": 48, "activation_function": "relu", "tie_word_embeddings": False}
  ),
  "phi": Case("PhiForCausalLM", {**LLAMA, "partial_rotary_factor": 0.5}),
  "phi grouped": Case("PhiForCausalLM", {
    **LLAMA, "hidden_size": 60, "partial_rotary_factor": 0.4, "num_key_value_heads": 3, "hidden_act": "relu",
    "layer_norm_eps": 1e-4,
  }),
  "phi3": Case("Phi3ForCausalLM", {**LLAMA, "eos_token_id": 1}),
  "phi3 with a window": Case("Phi3ForCausalLM", {**LLAMA, "eos_token_id": 1, "sliding_window": 6}),
  "phi3 within its first length": Case("Phi3ForCausalLM", {**LONG, "original_max_position_embeddings": 64}),
  "phi3 past its first length": Case("Phi3ForCausalLM", {**LONG, "original_max_position_embeddings": 16}),
  "phi3 one past its first length": Case("Phi3ForCausalLM", {**LONG, "original_max_position_embeddings": 29}),
  "phi3 as long as its first length": Case("Phi3ForCausalLM", {**LONG, "original_max_position_embeddings": 30}),
  "bert": Case("BertModel", BERT),
  "bert masked": Case("BertForMaskedLM", {**BERT, "hidden_act": "relu"}),
  "roberta": Case("RobertaForMaskedLM", {**BERT, "pad_token_id": 1, "hidden_size": 48}),
  "roberta untied": Case("RobertaForMaskedLM", {**BERT, "pad_token_id": 0, "tie_word_embeddings": False}),
  "distilbert": Case("DistilBertModel", DISTILBERT),
  "distilbert masked": Case("DistilBertForMaskedLM", DISTILBERT),
  "t5": Case("T5ForConditionalGeneration", T5),
  "bart": Case("BartForConditionalGeneration", BART),
  "bart scaled": Case("BartForConditionalGeneration", {**BART, "scale_embedding": True, "activation_function": "relu"}),
  "mbart": Case("MBartForConditionalGeneration", {**BART, "scale_embedding": True}),
  "t5 gated untied": Case(
    "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
  ),
}
TOKENS = np.random.default_rng(0).integers(2, 97, (2, 30)).astype(np.int32)


WRITTEN = TOKENS[:, 3:20]
"""What a decoder that looks at an encoder has read."""


def inputs(model: Any) -> dict[str, Any]:
  """What goes with the tokens."""
  return {"decoder_input_ids": WRITTEN} if "decoder_input_ids" in model.takes else {}


def expected(net: Any) -> np.ndarray:
  with torch.no_grad():
    more = {"decoder_input_ids": torch.tensor(WRITTEN).long()} if net.config.is_encoder_decoder else {}
    given = net(torch.tensor(TOKENS).long(), **more)
    return (given.logits if hasattr(given, "logits") else given.last_hidden_state).numpy()


def output(model: Any, params: Any) -> np.ndarray:
  given = model.apply(params, TOKENS, **inputs(model))
  if isinstance(given, Encoded):
    given = given.hidden if given.logits is None else given.logits
  return np.asarray(given)


@pytest.fixture(scope="module", params=CASES)
def loaded(request, tmp_path_factory):
  """`(net, model, params)` of a case."""
  net = CASES[request.param].build()
  folder = tmp_path_factory.mktemp("model")
  net.save_pretrained(folder)
  return net, *load_folder(folder)[:2]


def test_output_equals_transformers(loaded):
  """Float32 against float32; 1e-4 leaves room for another order of summation."""
  net, model, params = loaded
  wanted = expected(net)
  assert np.abs(wanted).max() > 0.5
  np.testing.assert_allclose(output(model, params), wanted, atol=1e-4)


def test_a_saved_folder_loads_in_transformers(loaded, tmp_path):
  net, model, params = loaded
  save_folder(model, params, tmp_path / "out")
  own = json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == net.config.model_type
  reader = type(net) if own else transformers.AutoModelForCausalLM  # Phi-3 is written as the Llama that it is
  again = reader.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
  np.testing.assert_allclose(expected(again), expected(net), atol=1e-5)
  back, tree_, _ = load_folder(tmp_path / "out")
  assert back.config == model.config
  for path, leaf in tree.flatten(params).items():
    np.testing.assert_array_equal(leaf, tree.get(tree_, path))


def test_blocks_publish_all_that_they_hold(loaded):
  """Each kernel of a block is in one stage, whose tap has its inputs; each leaf has its axes."""
  _, model, params = loaded
  assert isinstance(model, Model)
  carry = model.start(params, {"tokens": TOKENS, **inputs(model)})
  for block in model.blocks(params):
    carry, taps = model.run(block, params, carry, tuple(stage.name for stage in block.stages))
    staged = [f"{block.path}/{linear}/kernel" for stage in block.stages for linear in stage.linears]
    held = [path for path in tree.weights(params) if path.startswith(f"{block.path}/")]
    assert sorted(staged) == sorted(held)
    for stage in block.stages:
      for linear in stage.linears:
        assert taps[stage.name].shape[-1] == tree.get(params, f"{block.path}/{linear}/kernel").shape[-2]
  for path, leaf in tree.flatten(params).items():
    found = [names for pattern, names in model.axes.items() if tree.matches(pattern, path)]
    assert len(found) == 1 and len(found[0]) == leaf.ndim, path
  made = jax.eval_shape(lambda: model.finish(params, carry))
  assert jax.tree.leaves(made)[0].shape[:2] == (WRITTEN if inputs(model) else TOKENS).shape


def test_every_architecture_is_here():
  nets = {case.net.lower() for case in CASES.values()}
  for name in set(ARCHITECTURES) - {"llama", "lstm", "seq2seq"}:  # these have a file of their own
    assert any(net.startswith(name) for net in nets), name


@pytest.mark.parametrize("name", ["gemma3", "mistral", "gpt2 odd heads", "phi", "phi3 past its first length"])
def test_a_cache_continues_what_was_read(name, tmp_path):
  """Windows, two kinds of positions and learned ones, over a cache as all at once; saved by us and read again."""
  net = CASES[name].build()
  net.save_pretrained(tmp_path / "hf")
  model, params, _ = load_folder(tmp_path / "hf")
  cache, pieces = init_cache(model, params, len(TOKENS), 32), []
  for piece in (TOKENS[:, :17], TOKENS[:, 17:18], TOKENS[:, 18:]):
    logits, cache = model.apply(params, piece, cache=cache)
    pieces.append(np.asarray(logits))
  np.testing.assert_allclose(np.concatenate(pieces, axis=1), output(model, params), atol=1e-4)
  checkpoint.save(tmp_path / "ours", model, params)
  back, again, _ = checkpoint.load_checkpoint(tmp_path / "ours")
  assert back.config == model.config
  np.testing.assert_array_equal(output(back, again), output(model, params))


@pytest.mark.parametrize(("name", "change", "said"), [
  ("gpt2 odd heads", {"n_head": 5}, "n_embd is 42, no multiple of n_head"),
  ("gpt2 odd heads", {"activation_function": "swoosh"}, "activation_function 'swoosh' is not known here"),
  ("gpt2 odd heads", {"n_layer": 4}, "the tensor 'transformer.h.3.ln_1.weight' is missing"),
  ("gpt2 odd heads", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is not known"),
  ("bert", {"num_hidden_layers": 2}, "has no place in this architecture"),
  ("bert", {"position_embedding_type": "relative_key"}, "relative positions"),
  ("roberta", {"pad_token_id": -1}, "pad_token_id is -1"),
  ("distilbert", {"dim": 40}, "no multiple of n_heads"),
  ("t5", {"feed_forward_proj": "gated-swoosh"}, "feed_forward_proj 'gated-swoosh' is not known here"),
  ("t5", {"num_decoder_layers": 4}, "the tensor 'decoder.block.3.layer.0.layer_norm.weight' is missing"),
  ("t5", {"d_kv": 4}, "no multiple of the head size 4"),
  ("bart", {"tie_word_embeddings": False}, "a table for each side and the head is not known here"),
  ("bart", {"decoder_attention_heads": 7}, "heads of 7 in the encoder and of 6 in the decoder"),
  ("mbart", {"activation_function": "swoosh"}, "activation_function 'swoosh'"),
  ("gemma2", {"attn_logit_softcapping": -1}, "attn_logit_softcapping is -1"),
  ("mistral", {"sliding_window": "wide"}, "sliding_window is 'wide'"),
  ("phi3", {"num_key_value_heads": 5}, "layers/0/attn/k/kernel has 25 outputs"),
  ("phi3", {"rope_parameters": None, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not known here"),
  ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "short_factor is None; a list of 4 positive numbers"),
  ("phi3", {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 1}},
   "original_max_position_embeddings is 1"),
  ("phi3", {"rope_parameters": {"rope_type": "mystery"}}, "rope type 'mystery' is not known here"),
  ("qwen2 with a window", {"max_window_layers": "x", "layer_types": None}, "max_window_layers is 'x'"),
])  # fmt: skip
def test_what_does_not_fit_is_named(name, change, said, tmp_path):
  CASES[name].build().save_pretrained(tmp_path)
  config = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
  with pytest.raises(FormatError) as caught:
    load_folder(tmp_path)
  assert said in str(caught.value) and "\n" not in str(caught.value)


def test_windows_stay_with_their_layers_where_others_are_removed(tmp_path):
  """A folder numbers layers anew; the one that sees all is still the one that sees all."""
  CASES["gemma3"].build().save_pretrained(tmp_path / "hf")
  model, params, _ = load_folder(tmp_path / "hf")
  params = {**params, "layers": {i: layer for i, layer in params["layers"].items() if i != "0"}}
  save_folder(model, params, tmp_path / "out")
  back, read, _ = load_folder(tmp_path / "out")
  assert model.config.full_layers == (2,) and back.config.full_layers == (1,)
  np.testing.assert_allclose(output(back, read), output(model, params), atol=1e-5)


@pytest.mark.parametrize(("name", "part", "rest", "message"), [
  ("t5", "mlp", ("down",), "MLPs of 7, 70 entries"), ("t5", "cross", ("o",), "heads of 7, 35 entries"),
  ("bart", "cross", ("o",), "heads of 7, 42 entries"), ("bart", "mlp", ("down",), None),
])  # fmt: skip
def test_widths_that_a_config_cannot_say_are_refused(name, part, rest, message, tmp_path):
  """A decoder whose MLP, or whose look at the encoder, has fewer entries than the rest, in all its layers."""
  CASES[name].build().save_pretrained(tmp_path / "in")
  model, params, _ = load_folder(tmp_path / "in")
  leaves = tree.flatten(params)
  for path, x in leaves.items():
    if path.startswith("decoder/") and f"/{part}/" in path:
      outward = path.split("/")[-2] in rest
      leaves[path] = (x if path.endswith("bias") else x[:7]) if outward else x[..., :7]
  if message is None:
    save_folder(model, tree.unflatten(leaves), tmp_path / "out")
    assert tree.get(load_folder(tmp_path / "out")[1], "decoder/layers/0/mlp/up/kernel").shape == (42, 7)
    return
  with pytest.raises(FormatError, match=message):
    save_folder(model, tree.unflatten(leaves), tmp_path / "out")
