"""Hugging Face folders: each tensor lands in its place, and what does not fit is named."""

from __future__ import annotations

import json
import random
import shutil

import gguf
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from gguf import GGUFWriter
from safetensors.numpy import save_file
from tokenizers.models import BPE

import lmcompress as lmc
from lmcompress import tree
from lmcompress.distributed import make_mesh
from lmcompress.io import huggingface
from lmcompress.types import FormatError

VOCAB, EMBED, MLP, HEADS, KV, HEAD, LAYERS = 48, 32, 64, 4, 2, 8, 2
CONFIG = {
  "model_type": "llama", "vocab_size": VOCAB, "hidden_size": EMBED, "intermediate_size": MLP,
  "num_hidden_layers": LAYERS,
  "num_attention_heads": HEADS, "num_key_value_heads": KV, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
  "max_position_embeddings": 128, "tie_word_embeddings": False, "hidden_act": "silu",
}
LINEARS = {"self_attn.q_proj": (EMBED, EMBED), "self_attn.k_proj": (KV * HEAD, EMBED),
           "self_attn.v_proj": (KV * HEAD, EMBED),
           "self_attn.o_proj": (EMBED, EMBED), "mlp.gate_proj": (MLP, EMBED), "mlp.up_proj": (MLP, EMBED),
           "mlp.down_proj": (EMBED, MLP)}
SHAPES = {
  "model.embed_tokens.weight": (VOCAB, EMBED), "model.norm.weight": (EMBED,),
  "lm_head.weight": (VOCAB, EMBED),
  **{f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in LINEARS.items()},
  **{f"model.layers.{i}.{name}.weight": (EMBED,) for i in range(LAYERS)
     for name in ("input_layernorm", "post_attention_layernorm")},
}
BIASES = {f"model.layers.{i}.{name}.bias": shape[:1]
          for i in range(LAYERS) for name, shape in LINEARS.items()}
Q = "model.layers.1.self_attn.q_proj.weight"


def tensors(shapes=SHAPES, dtype=np.float32):
  rng = np.random.default_rng(0)
  return {name: rng.normal(0, 0.2, shape).astype(dtype) for name, shape in shapes.items()}


def put(folder, arrays=None, config=None, *, shards=0):
  """Writes a folder as transformers does: one file, or `shards` files and their index."""
  arrays = tensors() if arrays is None else arrays
  folder.mkdir(exist_ok=True)
  text = config if isinstance(config, str) else json.dumps({**CONFIG, **(config or {})})
  (folder / "config.json").write_text(text)
  if not shards:
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
  weight_map = {}
  for n in range(shards):
    name = f"model-{n + 1:05}-of-{shards:05}.safetensors"
    part = dict(sorted(arrays.items())[n::shards])
    save_file(part, folder / name, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(part, name))
  (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  return folder


def refused(folder, *words):
  with pytest.raises(FormatError) as caught:
    lmc.load(folder)
  message = str(caught.value)
  assert "\n" not in message and len(message) < 1000
  for word in (str(folder), *words):
    assert word in message, message


# ---------------------------------------------------------------------------------------- what is read


def test_each_tensor_lands_in_its_place(tmp_path):
  arrays = tensors({**SHAPES, **BIASES})
  model, params, tokenizer = lmc.load(put(tmp_path / "m", arrays))
  assert tokenizer is None and model.architecture == "llama"
  assert (model.config.head_dim, model.config.max_length, model.config.rms_epsilon) == (HEAD, 128, 1e-5)
  leaves = tree.flatten(params)
  assert len(leaves) == len(arrays) and all(str(leaf.dtype) == "float32" for leaf in leaves.values())
  np.testing.assert_array_equal(leaves["layers/1/attn/q/kernel"], arrays[Q].T)
  np.testing.assert_array_equal(leaves["layers/0/mlp/down/kernel"],
                                arrays["model.layers.0.mlp.down_proj.weight"].T)
  np.testing.assert_array_equal(leaves["layers/0/mlp/down/bias"], arrays["model.layers.0.mlp.down_proj.bias"])
  np.testing.assert_array_equal(leaves["head/table"], arrays["lm_head.weight"])
  np.testing.assert_array_equal(leaves["layers/0/mlp_norm/scale"],
                                arrays["model.layers.0.post_attention_layernorm.weight"])
  assert np.isfinite(model.apply(params, np.zeros((1, 4), np.int32))).all()


@pytest.mark.parametrize("shards", [1, 3])
def test_shards_give_the_same_tree(tmp_path, shards):
  _, whole, _ = lmc.load(put(tmp_path / "whole"))
  _, parts, _ = lmc.load(put(tmp_path / "parts", shards=shards))
  for path, leaf in tree.flatten(whole).items():
    np.testing.assert_array_equal(tree.get(parts, path), leaf)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_floats_become_float32(tmp_path, dtype):
  arrays = tensors(dtype=dtype)
  _, params, _ = lmc.load(put(tmp_path / "m", arrays))
  kernel = params["layers"]["1"]["attn"]["q"]["kernel"]
  assert str(kernel.dtype) == "float32"
  np.testing.assert_array_equal(kernel, arrays[Q].astype(np.float32).T)


def test_a_tied_head_is_the_embedding(tmp_path):
  arrays = tensors()
  assert "head" not in lmc.load(put(tmp_path / "spare", arrays, {"tie_word_embeddings": True}))[1]
  del arrays["lm_head.weight"]
  assert "head" not in lmc.load(put(tmp_path / "tied", arrays, {"tie_word_embeddings": True}))[1]


def test_buffers_that_hold_nothing_are_passed_over(tmp_path):
  arrays = {**tensors(), "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
  lmc.load(put(tmp_path / "m", arrays))


@pytest.mark.parametrize(("given", "kind", "theta"), [
  ({"rope_theta": 5e5}, "default", 5e5),
  ({"rope_scaling": None}, "default", 1e4),
  ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear", 1e4),
  ({"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}, "default", 2e4),
  ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "dynamic", 1e4),
  ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
                     "original_max_position_embeddings": 64}}, "llama3", 1e4),
  ({"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32}}, "yarn", 1e4),
])
def test_both_spellings_of_rope_are_read(tmp_path, given, kind, theta):
  model, _, _ = lmc.load(put(tmp_path / "m", config=given))
  assert (model.config.rope.kind, model.config.rope.theta) == (kind, theta)


# ----------------------------------------------------------------------------- folders that do not fit


def test_a_folder_without_a_config(tmp_path):
  refused(tmp_path, "config.json: missing")
  (put(tmp_path / "m") / "config.json").unlink()
  refused(tmp_path / "m", "config.json: missing; a Hugging Face folder has config.json and *.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '"x"', "[" * 100_000, '{"a":' * 50_000, "1" * 10_000,
                                  "\x00"])
def test_a_config_that_is_none(tmp_path, text):
  refused(put(tmp_path / "m", config=text), "config.json")


def test_a_config_of_other_bytes(tmp_path):
  folder = put(tmp_path / "m")
  (folder / "config.json").write_bytes(b"\xff\xfe")
  refused(folder, "config.json: not valid JSON")
  with (folder / "config.json").open("wb") as file:
    file.truncate((64 << 20) + 1)
  refused(folder, "config.json: 67108865 bytes are over the limit")


@pytest.mark.parametrize("kind", ["mamba", None, 1, ["llama"], {}])
def test_an_unknown_architecture(tmp_path, kind):
  refused(put(tmp_path / "m", config={"model_type": kind}),
          f"model_type {kind!r} is not known here; known are llama")


def test_no_weights(tmp_path):
  folder = put(tmp_path / "m")
  (folder / "model.safetensors").unlink()
  refused(folder, "neither model.safetensors nor model.safetensors.index.json is there")


def test_weights_in_a_pickle_are_not_read(tmp_path):
  folder = put(tmp_path / "m")
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  refused(folder, "neither model.safetensors")


@pytest.mark.parametrize("name", [
  "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", Q,
  "model.layers.0.mlp.down_proj.weight",
  "model.layers.1.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight",
])
def test_a_missing_tensor(tmp_path, name):
  """The head too: a config that does not tie it to the embedding promises one."""
  arrays = tensors()
  del arrays[name]
  refused(put(tmp_path / "m", arrays), repr(name))


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight",
                                  "model.layers.0.self_attn.q_norm.weight", "x", "\n"])
def test_a_tensor_too_many(tmp_path, name):
  refused(put(tmp_path / "m", {**tensors(), name: np.ones(3, np.float32)}), repr(name), "no place")


@pytest.mark.parametrize("layers", [1, 3])
def test_more_or_fewer_layers_than_the_config_says(tmp_path, layers):
  refused(put(tmp_path / "m", config={"num_hidden_layers": layers}), "model.layers.")


SIZES = [(name, axis) for name, shape in SHAPES.items() if ".0." in name or "layers" not in name
         for axis in range(len(shape))]


@pytest.mark.parametrize(("name", "axis"), SIZES, ids=[f"{name}-{axis}" for name, axis in SIZES])
def test_a_tensor_of_another_size(tmp_path, name, axis):
  """One more along any axis never fits (the vocabulary must be the head's too)."""
  shape = list(SHAPES[name])
  shape[axis] += 1
  refused(put(tmp_path / "m", {**tensors(), **tensors({name: shape})}))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", Q,
                                  "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight",
                                  "model.layers.0.input_layernorm.weight"])
@pytest.mark.parametrize("extra", [-1, 1])
def test_a_tensor_of_another_rank(tmp_path, name, extra):
  shape = SHAPES[name][:-1] if extra < 0 else (1, *SHAPES[name])
  refused(put(tmp_path / "m", {**tensors(), **tensors({name: shape})}))


@pytest.mark.parametrize("name", sorted(BIASES)[:len(LINEARS)])
def test_a_bias_of_another_size(tmp_path, name):
  arrays = {**tensors({**SHAPES, **BIASES}), name: np.ones(BIASES[name][0] + 1, np.float32)}
  refused(put(tmp_path / "m", arrays))


def test_key_and_value_heads_that_differ(tmp_path):
  name = "model.layers.0.self_attn.v_proj.weight"
  refused(put(tmp_path / "m", {**tensors(), **tensors({name: (HEAD, EMBED)})}), "layers/0/attn")


def test_query_heads_that_keys_do_not_divide(tmp_path):
  shapes = {f"model.layers.0.self_attn.{x}_proj.weight": (3 * HEAD, EMBED) for x in "kv"}
  refused(put(tmp_path / "m", {**tensors(), **tensors(shapes)}), "layers/0/attn")


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_])
def test_weights_that_are_no_floats(tmp_path, dtype):
  refused(put(tmp_path / "m", {**tensors(), Q: np.ones(SHAPES[Q], dtype)}), repr(Q), "floating weights")


@pytest.mark.parametrize(("given", "word"), [
  ({"num_hidden_layers": 0}, "num_hidden_layers"),
  ({"num_hidden_layers": -1}, "num_hidden_layers"),
  ({"num_hidden_layers": "2"}, "num_hidden_layers"),
  ({"num_hidden_layers": 2.0}, "num_hidden_layers"),
  ({"num_hidden_layers": True}, "num_hidden_layers"),
  ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
  ({"num_hidden_layers": 2**31 - 1}, "model.layers.2."),
  ({"num_attention_heads": 0}, "num_attention_heads"),
  ({"num_attention_heads": None}, "num_attention_heads"),
  ({"hidden_size": "32"}, "hidden_size"),
  ({"hidden_act": "gelu"}, "hidden_act"),
  ({"head_dim": 7}, "head_dim"),
  ({"head_dim": "8"}, "head_dim"),
  ({"head_dim": -8}, "head_dim"),
  ({"head_dim": 24}, "head size 24"),
  ({"rms_norm_eps": "small"}, "rms_norm_eps"),
  ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
  ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
  ({"rms_norm_eps": True}, "rms_norm_eps"),
  ({"rope_theta": 0}, "rope_theta"),
  ({"rope_theta": [1e4]}, "rope_theta"),
  ({"max_position_embeddings": "long"}, "max_position_embeddings"),
  ({"max_position_embeddings": -1}, "max_position_embeddings"),
  ({"max_position_embeddings": 2048.5}, "max_position_embeddings"),
  ({"rope_scaling": "linear"}, "rope"),
  ({"rope_scaling": {"type": "spiral"}}, "rope type 'spiral'"),
  ({"rope_scaling": {"type": ["linear"]}}, "rope type"),
  ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
  ({"rope_scaling": {"type": "dynamic", "factor": 2, "original_max_position_embeddings": "x"}},
   "original_max_position_embeddings"),
  ({"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": "x"}}, "attention_factor"),
])
def test_a_setting_out_of_range(tmp_path, given, word):
  refused(put(tmp_path / "m", config=given), word)


# ---------------------------------------------------------------------------------------------- shards


def index(folder, change):
  path = folder / "model.safetensors.index.json"
  table = json.loads(path.read_text())
  change(table)
  path.write_text(json.dumps(table))
  return folder


@pytest.mark.parametrize("name", ["../x", "../m/model-00001-of-00002.safetensors", "/etc/hostname", "sub/x",
                                  "..\\x", "a\0b",
                                  "", ".", "..", "model-00009-of-00002.safetensors"])
def test_an_index_that_points_elsewhere(tmp_path, name):
  folder = put(tmp_path / "m", shards=2)
  shutil.copy(folder / "model-00001-of-00002.safetensors", tmp_path / "x")
  refused(index(folder, lambda t: t["weight_map"].update({Q: name})), "index.json",
          f"{name!r} is no file beside it")


def test_a_missing_shard(tmp_path):
  folder = put(tmp_path / "m", shards=3)
  (folder / "model-00002-of-00003.safetensors").unlink()
  refused(folder, "'model-00002-of-00003.safetensors' is no file beside it")


@pytest.mark.parametrize("change", [
  lambda t: t.pop("weight_map"), lambda t: t.update(weight_map=[]), lambda t: t.update(weight_map="x"),
  lambda t: t["weight_map"].update({Q: 1}), lambda t: t["weight_map"].update({Q: None}),
], ids=range(5))
def test_an_index_that_is_none(tmp_path, change):
  refused(index(put(tmp_path / "m", shards=2), change), "index.json", "weight_map")


def test_an_index_whose_tensor_is_elsewhere(tmp_path):
  folder = put(tmp_path / "m", shards=2)
  names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
  other = next(name for name in names.values() if name != names[Q])
  refused(index(folder, lambda t: t["weight_map"].update({Q: other})), f"tensor {Q!r} is not in {other}")


# --------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("shards", [0, 2])
def test_a_damaged_safetensors_file_is_named(tmp_path, shards):
  folder = put(tmp_path / "m", shards=shards)
  path = sorted(folder.glob("*.safetensors"))[0]
  whole = path.read_bytes()
  for damaged in (b"", whole[:7], whole[:100], whole[:-1], b"\xff" * 8 + whole[8:],
                  whole[:8] + b"}" + whole[9:]):
    path.write_bytes(damaged)
    refused(folder, path.name)


def test_a_damaged_tokenizer_is_named(tmp_path):
  folder = put(tmp_path / "m")
  (folder / "tokenizer.json").write_text("{")
  refused(folder, "tokenizer.json")
  tokenizers.Tokenizer(BPE({"a": 0}, [])).save(str(folder / "tokenizer.json"))
  assert lmc.load(folder)[2].encode("a") == [0]


@pytest.mark.slow
def test_mutants_of_a_folder_are_read_or_refused(tmp_path):
  """Values of config and index replaced by what does not belong there: FormatError or a tree."""
  folder, rng, wrong, read = put(tmp_path / "m", shards=2), random.Random(0), [], 0
  rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "attention_factor": 1.0}
  index_path, config_path = folder / "model.safetensors.index.json", folder / "config.json"
  config = {**CONFIG, "head_dim": HEAD, "rope_scaling": rope}
  table = json.loads(index_path.read_text())
  values = [None, True, False, -1, 0, 1, 2**31, 2**70, 10**400, 0.5, -0.5, float("inf"), float("nan"), "",
            "x", "../x", "llama", [],
            [[]], {}, {"a": 1}]
  for _ in range(300):
    changed, changed_table = json.loads(json.dumps(config)), json.loads(json.dumps(table))
    target = rng.choice([changed, changed, changed["rope_scaling"], changed_table,
                         changed_table["weight_map"]])
    key = rng.choice(sorted(target))
    if rng.random() < 0.2:
      del target[key]
    else:
      target[key] = rng.choice(values)
    config_path.write_text(json.dumps(changed))
    index_path.write_text(json.dumps(changed_table))
    try:
      huggingface.load_folder(folder)
      read += 1
    except FormatError as error:
      assert str(folder) in str(error)
    except Exception as error:
      wrong.append(f"{key}: {type(error).__name__}: {error}"[:120])
  assert not wrong, f"{len(wrong)} of 300 mutants, such as {sorted(set(wrong))[:8]}"
  assert 0 < read < 250


# -------------------------------------------------------------------------- GGUF through the same door


def small_gguf(path, raw=()):
  """A Llama of one layer as llama.cpp's converter writes it; tensors called `raw` in a type that nothing reads."""
  writer, rng = GGUFWriter(path, "llama"), np.random.default_rng(0)
  writer.add_block_count(1)
  writer.add_context_length(128)
  writer.add_embedding_length(EMBED)
  writer.add_feed_forward_length(MLP)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(KV)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(1e4)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list(["a", "b", "ab", *(f"t{i}" for i in range(VOCAB - 3))])
  writer.add_token_types([gguf.TokenType.NORMAL] * VOCAB)
  writer.add_token_merges(["a b"])
  shapes = {"token_embd": (VOCAB, EMBED), "output_norm": (EMBED,), "blk.0.attn_norm": (EMBED,),
            "blk.0.ffn_norm": (EMBED,)}
  for name, theirs in (("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"),
                       ("attn_v", "self_attn.v_proj"),
                       ("attn_output", "self_attn.o_proj"), ("ffn_gate", "mlp.gate_proj"),
                       ("ffn_up", "mlp.up_proj"),
                       ("ffn_down", "mlp.down_proj")):
    shapes[f"blk.0.{name}"] = LINEARS[theirs]
  for name, shape in shapes.items():
    if name in raw:
      blocks = np.zeros((shape[0], shape[1] // 32 * 40), np.uint8)
      writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_1)
    else:
      writer.add_tensor(f"{name}.weight", rng.normal(0, 0.2, shape).astype(np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def test_a_truncated_gguf_is_refused(tmp_path):
  path = small_gguf(tmp_path / "model.gguf")
  model, params, _ = lmc.load(path)
  assert np.isfinite(model.apply(params, np.zeros((1, 4), np.int32))).all()
  whole = path.read_bytes()
  rng = random.Random(0)
  for length in {0, 1, 3, 4, 8, 24, 100, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(60))}:
    path.write_bytes(whole[:length])
    refused(path)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_type_that_nothing_reads_is_told_before_any_weight_is_read(tmp_path, lazy, monkeypatch):
  path = small_gguf(tmp_path / "model.gguf", raw=("blk.0.ffn_down",))
  monkeypatch.delattr("lmcompress.io.gguf.read_tensor")
  with pytest.raises(FormatError, match=r"'blk.0.ffn_down.weight' has type Q8_1, which cannot be dequantized"):
    lmc.load(path, lazy=lazy)


def test_a_file_of_another_kind_is_refused(tmp_path):
  path = tmp_path / "model.safetensors"
  save_file({"x": np.ones(3, np.float32)}, path)
  refused(path, "files are GGUF, other forms are folders")


def test_a_model_that_is_nowhere(tmp_path):
  with pytest.raises(lmc.SourceError, match="no such path"):
    lmc.load(tmp_path / "nowhere")


def test_a_mesh_reads_tensor_by_tensor(tmp_path, reads):
  """The same bits in parts; no tensor is read before the one before it is placed and gone."""
  folder = put(tmp_path / "m")
  spread = lmc.load(folder, make_mesh(data=2, fsdp=2, tensor=2))[1]
  assert reads["all"] == 2 + 7 * LAYERS and reads["alive"] <= 2
  local = lmc.load(folder)[1]
  for path, x in tree.flatten(local).items():
    np.testing.assert_array_equal(tree.get(spread, path), x)
  assert tree.get(spread, "layers/0/mlp/up/kernel").addressable_shards[0].data.shape == (EMBED // 2, MLP // 2)
