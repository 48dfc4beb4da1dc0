"""Models of GGUF files, written by the gguf package under its own names: logits as transformers', and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants

import lmcompress as lmc
from lmcompress import tree
from lmcompress.arrays import StoredArray, fetch
from lmcompress.distributed import make_mesh
from lmcompress.io import gguf
from lmcompress.io.checkpoint import tree_hash
from lmcompress.io.gguf_model import load_gguf
from lmcompress.io.store import Store
from lmcompress.types import FormatError, SourceError

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 13)).astype(np.int32)
QWEN = {
  "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
  "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": None,
}  # fmt: skip
GEMMA = {**QWEN, "head_dim": 10, "tie_word_embeddings": True, "eos_token_id": 1, "bos_token_id": 0}
LLAMA = {
  "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
  "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
  "attention.head_count_kv": "num_key_value_heads",
}  # fmt: skip
CASES = {
  "qwen2": (MODEL_ARCH.QWEN2, "Qwen2ForCausalLM", QWEN, LLAMA, {"attention.layer_norm_rms_epsilon": 1e-6}),
  "qwen3": (MODEL_ARCH.QWEN3, "Qwen3ForCausalLM", {**QWEN, "head_dim": 10}, LLAMA,
            {"attention.layer_norm_rms_epsilon": 1e-6, "attention.key_length": 10}),
  "llama": (MODEL_ARCH.LLAMA, "MixtralForCausalLM",
            {**QWEN, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None}, LLAMA,
            {"attention.layer_norm_rms_epsilon": 1e-5, "expert_count": 5, "expert_used_count": 2,
             "rope.freq_base": 1e6}),
  "qwen2moe": (MODEL_ARCH.QWEN2MOE, "Qwen2MoeForCausalLM",
               {**QWEN, "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 36,
                "shared_expert_intermediate_size": 52}, LLAMA,
               {"attention.layer_norm_rms_epsilon": 1e-6, "expert_count": 5, "expert_used_count": 3}),
  "qwen3moe": (MODEL_ARCH.QWEN3MOE, "Qwen3MoeForCausalLM",
               {**QWEN, "head_dim": 10, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 36,
                "norm_topk_prob": True}, LLAMA,
               {"attention.layer_norm_rms_epsilon": 1e-6, "attention.key_length": 10, "expert_count": 4,
                "expert_used_count": 2}),
  "gpt2": (
    MODEL_ARCH.GPT2, "GPT2LMHeadModel",
    {"vocab_size": 97, "n_embd": 42, "n_layer": 3, "n_head": 6, "n_inner": 70, "n_positions": 64,
     "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0},
    {"context_length": "n_positions", "embedding_length": "n_embd", "block_count": "n_layer",
     "attention.head_count": "n_head"}, {"attention.layer_norm_epsilon": 1e-5},
  ),
  "phi2": (MODEL_ARCH.PHI2, "PhiForCausalLM",
           {**QWEN, "num_key_value_heads": 6, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5}, LLAMA,
           {"attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 4}),
  "phi3": (MODEL_ARCH.PHI3, "Phi3ForCausalLM", {**QWEN, "eos_token_id": 0, "sliding_window": 7}, LLAMA,
           {"attention.layer_norm_rms_epsilon": 1e-5, "attention.sliding_window": 7}),
  "phi3 long": (
    MODEL_ARCH.PHI3, "Phi3ForCausalLM",
    {**QWEN, "eos_token_id": 0, "sliding_window": None, "original_max_position_embeddings": 10, "rope_scaling": {
      "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.0, 2.0, 4.5, 7.0]}},
    LLAMA | {"rope.scaling.original_context_length": "original_max_position_embeddings"},
    {"attention.sliding_window": 0, "attention.layer_norm_rms_epsilon": 1e-5,
     "rope.scaling.attn_factor": float(1 + np.log(12.8) / np.log(10)) ** 0.5},
  ),
  "gemma": (MODEL_ARCH.GEMMA, "GemmaForCausalLM", GEMMA, LLAMA,
            {"attention.layer_norm_rms_epsilon": 1e-6, "attention.key_length": 10}),
  "gemma2": (MODEL_ARCH.GEMMA2, "Gemma2ForCausalLM",
             {**GEMMA, "sliding_window": 8, "query_pre_attn_scalar": 10, "attn_logit_softcapping": 5.0,
              "final_logit_softcapping": 9.0}, LLAMA,
             {"attention.layer_norm_rms_epsilon": 1e-6, "attention.key_length": 10, "attention.sliding_window": 8,
              "attn_logit_softcapping": 5.0, "final_logit_softcapping": 9.0}),
  "gemma3": (MODEL_ARCH.GEMMA3, "Gemma3ForCausalLM",
             {**GEMMA, "num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 10}, LLAMA,
             {"attention.layer_norm_rms_epsilon": 1e-6, "attention.key_length": 10, "attention.sliding_window": 8,
              "rope.freq_base": 1e6}),
  "t5": (
    MODEL_ARCH.T5, "T5ForConditionalGeneration",
    {"vocab_size": 97, "d_model": 36, "d_kv": 10, "d_ff": 52, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
     "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 3},
    {"embedding_length": "d_model", "block_count": "num_layers", "decoder_block_count": "num_decoder_layers",
     "attention.head_count": "num_heads", "attention.key_length": "d_kv", "feed_forward_length": "d_ff",
     "decoder_start_token_id": "decoder_start_token_id"},
    {"context_length": 64, "attention.layer_norm_rms_epsilon": 1e-6, "attention.relative_buckets_count": 32},
  ),
  "bert": (MODEL_ARCH.BERT, "BertModel",
           {"vocab_size": 97, "hidden_size": 42, "num_hidden_layers": 3, "num_attention_heads": 6,
            "intermediate_size": 70, "max_position_embeddings": 40, "type_vocab_size": 2, "layer_norm_eps": 1e-6},
           {"context_length": "max_position_embeddings", "embedding_length": "hidden_size",
            "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
            "attention.head_count": "num_attention_heads"}, {"attention.layer_norm_epsilon": 1e-6}),
}  # fmt: skip
CASES["bert distilled"] = (
  MODEL_ARCH.BERT, "DistilBertModel",
  {"vocab_size": 97, "dim": 42, "hidden_dim": 70, "n_layers": 3, "n_heads": 6, "max_position_embeddings": 40},
  {"context_length": "max_position_embeddings", "embedding_length": "dim", "block_count": "n_layers",
   "feed_forward_length": "hidden_dim", "attention.head_count": "n_heads"},
  {"attention.layer_norm_epsilon": 1e-12},
)  # fmt: skip
CASES["bert one type"] = (*CASES["bert"][:2], {**CASES["bert"][2], "type_vocab_size": 1}, *CASES["bert"][3:])
"""The package's word, the class of transformers and its config, keys of metadata by the config's, and others."""


def write(path, case, change=None):
  """A file as llama.cpp's converter writes it: norms of Gemma one more, linears of GPT-2 turned; and the net."""
  word, net, config, keys, more = CASES[case]
  kind = case.split()[0]
  torch.manual_seed(0)
  cls = getattr(transformers, net)
  net = cls._from_config(cls.config_class(**config), attn_implementation="eager").eval()
  with torch.no_grad():
    for x in net.parameters():
      x.add_(torch.randn_like(x) * 0.1)
  if kind == "t5":  # the class ties its head, folders of Flan-T5 have one of their own
    net.lm_head.weight = torch.nn.Parameter(torch.randn_like(net.lm_head.weight))
  called = get_tensor_name_map(word, net.config.num_hidden_layers)
  writer = GGUFWriter(path, kind)
  numbers = {key: config[theirs] for key, theirs in keys.items()} | more | (change or {})
  for key, value in numbers.items():
    (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{kind}.{key}", value)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("gpt-2")
  writer.add_token_list([*(chr(33 + i) for i in range(94)), "Ġ", "Ċ", "ab"])
  writer.add_token_types([1] * 97)
  writer.add_token_merges(["a b"])
  writer.add_eos_token_id(0)
  tied = net.config.tie_word_embeddings and kind != "t5"
  for name, x in net.state_dict().items():
    if name.endswith((".attn.bias", ".masked_bias", "inv_freq")) or (tied and name == "lm_head.weight"):
      continue
    if name.startswith("pooler.") or name.endswith("coder.embed_tokens.weight"):
      continue
    if name.endswith(("gate_up_proj", "experts.down_proj")):  # what transformers holds together
      block, word = f"blk.{name.split('.')[2]}", name.rsplit(".", 1)[1].removesuffix("_proj")
      parts = {"down": x} if word == "down" else dict(zip(("gate", "up"), x.chunk(2, dim=1), strict=True))
      for part, values in parts.items():
        writer.add_tensor(f"{block}.ffn_{part}_exps.weight", np.ascontiguousarray(values.numpy()))
      continue
    theirs = called.get_name(name, try_suffixes=(".weight", ".bias"))
    assert theirs, name
    if name.endswith("shared_expert_gate.weight") or (name.endswith("type_embeddings.weight") and len(x) == 1):
      x = x[0]
    if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
      x = x.unflatten(0, (-1, 2, 4)).swapaxes(1, 2).flatten(0, 2)
    if kind == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
      x = x.T
    if kind.startswith("gemma") and name.endswith("norm.weight"):
      x = x + 1
    writer.add_tensor(theirs, np.ascontiguousarray(x.float().numpy()))
  for long in ("long", "short") if "long" in case else ():
    factors = config["rope_scaling"][f"{long}_factor"]
    writer.add_tensor(f"rope_factors_{long}.weight", np.asarray(factors, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return net


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_transformers(case, tmp_path):
  net = write(tmp_path / "model.gguf", case)
  model, params, tokenizer = load_gguf(tmp_path / "model.gguf")
  written = {"decoder_input_ids": TOKENS[:, 4:]} if net.config.is_encoder_decoder else {}
  with torch.no_grad():
    want = net(torch.tensor(TOKENS).long(), **{key: torch.tensor(ids).long() for key, ids in written.items()})
  found = model.apply(params, TOKENS, **written)
  if case.startswith("bert"):
    found, want = found.hidden, want.last_hidden_state.numpy()
  else:
    want = want.logits.numpy()
  np.testing.assert_allclose(found, want, atol=1e-4)
  assert tokenizer.vocab_size == 97
  lazy = load_gguf(tmp_path / "model.gguf", lazy=True)[1]
  assert all(isinstance(leaf, StoredArray) for leaf in tree.weights(lazy).values())
  assert tree.flatten(lazy).keys() == tree.flatten(params).keys()
  for path, leaf in tree.flatten(lazy).items():
    there = tree.get(params, path)
    assert (leaf.shape, leaf.dtype) == (there.shape, there.dtype), path
    np.testing.assert_array_equal(fetch(leaf), there, err_msg=path)


@pytest.mark.parametrize("case", ["llama", "qwen3", "qwen3moe"])
def test_in_the_file_as_in_memory(case, tmp_path):
  """Compressed block by block where the weights stay in the file, to the same bits."""
  write(tmp_path / "model.gguf", case)
  model, whole, _ = lmc.load(tmp_path / "model.gguf")
  lazy = lmc.load(tmp_path / "model.gguf", lazy=True)[1]
  recipe = lmc.gptq(4, 16, error_propagation=0.5)
  want, report = lmc.compress(model, whole, recipe, TOKENS)
  found, other = lmc.compress(model, lazy, recipe, TOKENS, store=Store(tmp_path / "s", {}, mapped=True))
  assert all(isinstance(leaf, StoredArray) for leaf in tree.weights(found).values())
  assert tree_hash(tree.map_leaves(lambda path, leaf: fetch(leaf), found)) == tree_hash(want)
  assert [row["output_error"] for row in report.rows] == [row["output_error"] for row in other.rows]
  with pytest.raises(SourceError, match="and not on a mesh"):
    lmc.load(tmp_path / "model.gguf", mesh=make_mesh(data=2), lazy=True)


def test_a_mesh_reads_tensor_by_tensor(tmp_path, reads):
  """The same bits in parts; no weight is read before the one before it is placed and gone."""
  write(tmp_path / "model.gguf", "llama")
  local = lmc.load(tmp_path / "model.gguf")[1]
  spread = lmc.load(tmp_path / "model.gguf", mesh=make_mesh(data=2, fsdp=2, tensor=2))[1]
  assert reads["all"] == len(tree.weights(local)) and reads["alive"] <= 2
  for path, x in tree.flatten(local).items():
    np.testing.assert_array_equal(tree.get(spread, path), x, err_msg=path)
  assert tree.get(spread, "layers/0/attn/q/kernel").addressable_shards[0].data.shape == (24, 24)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_an_entry_is_that_of_the_whole(kind, tmp_path):
  """One expert of a stack, in types of blocks and in plain ones."""
  path, rng = tmp_path / "model.gguf", np.random.default_rng(0)
  writer, qtype = GGUFWriter(path, "llama"), GGMLQuantizationType[kind]
  for name, shape in {"a": (2, 64), "experts": (5, 3, 64)}.items():
    writer.add_tensor(name, quants.quantize(rng.normal(size=shape).astype(np.float32), qtype), raw_dtype=qtype)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  header = gguf.read_header(path)
  whole = gguf.read_tensor(header, "experts")
  assert whole.shape == (5, 3, 64) and len({float(x) for x in whole[:, 0, 0]}) == 5
  for i in range(5):
    np.testing.assert_array_equal(gguf.read_tensor(header, "experts", i), whole[i])
  for i in (-1, 5):
    with pytest.raises(FormatError, match=rf"is \[5, 3, 64\] and has no entry {i}"):
      gguf.read_tensor(header, "experts", i)


@pytest.mark.parametrize(("kind", "change", "message"), [
  ("gpt2", {"block_count": 4}, r"the tensor 'blk.3.attn_norm.weight' is missing"),
  ("gemma2", {"attention.key_length": 7}, "head_dim is 7; an even integer is needed"),
  ("phi2", {"rope.dimension_count": 3}, "partial_rotary_factor turns 3 of 8"),
  ("qwen3moe", {"expert_used_count": 9}, "expert_used_count is 9, and there are 4 experts"),
  ("qwen3moe", {"expert_count": 5}, r"is \[4, 36, 48\]; a matrix for each of 5 is expected"),
  ("qwen2", {"rope.dimension_count": 4}, "rotations over a part of the head"),
  ("t5", {"decoder_block_count": 3}, "the tensor 'dec.blk.2.attn_norm.weight' is missing"),
  ("t5", {"attention.key_length": 7}, "no multiple of the head size 7"),
  ("t5", {"decoder_start_token_id": 500}, "decoder_start_token_id is 500, and the table has 97 rows"),
  ("bert", {"context_length": 50}, "positions/table has 40 rows, and the context is said to be 50"),
  ("phi3 long", {"rope.scaling.original_context_length": 1}, "a first length above 1"),
  ("bert", {"attention.head_count": 5}, "hidden_size is 42, no multiple of num_attention_heads"),
])  # fmt: skip
def test_what_does_not_fit_is_named(kind, change, message, tmp_path):
  write(tmp_path / "model.gguf", kind, change)
  with pytest.raises(FormatError, match=message):
    load_gguf(tmp_path / "model.gguf")


def test_an_unknown_architecture_is_named(tmp_path):
  writer = GGUFWriter(tmp_path / "model.gguf", "mamba")
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(FormatError, match="architecture 'mamba' is not known here; known are llama, qwen2"):
    load_gguf(tmp_path / "model.gguf")
