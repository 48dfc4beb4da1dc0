"""Llama, Mistral, Mixtral, Phi-3, Qwen2 and Qwen3 (and their mixtures) in Hugging Face folders and GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmcompress.io.architectures import mixtures
from lmcompress.io.names import Foreign, Name, integer, layer_names, number
from lmcompress.models import Llama, LlamaConfig, Rope
from lmcompress.types import FormatError, Params

NAMES = (
  Name("embed/table", "model.embed_tokens.weight", "token_embd.weight"),
  Name("layers/{i}/attn_norm/scale", "model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight"),
  *layer_names(
    ("layers/{i}/attn/q", "model.layers.{i}.self_attn.q_proj", "blk.{i}.attn_q"),
    ("layers/{i}/attn/k", "model.layers.{i}.self_attn.k_proj", "blk.{i}.attn_k"),
    ("layers/{i}/attn/v", "model.layers.{i}.self_attn.v_proj", "blk.{i}.attn_v"),
    ("layers/{i}/attn/o", "model.layers.{i}.self_attn.o_proj", "blk.{i}.attn_output"),
  ),
  Name("layers/{i}/mlp_norm/scale", "model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight"),
  *layer_names(
    *((f"layers/{{i}}/mlp/{part}", f"model.layers.{{i}}.mlp.{part}_proj", f"blk.{{i}}.ffn_{part}")
      for part in ("gate", "up", "down"))
  ),
  Name("final_norm/scale", "model.norm.weight", "output_norm.weight"),
  Name("head/table", "lm_head.weight", "output.weight", True),
)  # fmt: skip

NORMED = (
  *NAMES,
  *(Name(f"layers/{{i}}/attn/{x}_norm/scale", f"model.layers.{{i}}.self_attn.{x}_norm.weight",
         f"blk.{{i}}.attn_{x}_norm.weight") for x in "qk"),
)  # fmt: skip
"""With the norms of queries and keys (Qwen3)."""


def _names(config: Mapping[str, Any]) -> tuple[Name, ...]:
  kind = config.get("model_type", "")
  heads = kv_heads = 1
  if kind == "phi3":
    heads = integer(config, "num_attention_heads", "config.json")
    kv_heads = integer(config, "num_key_value_heads", "config.json", heads)
  names = gguf_names(kind, heads, kv_heads)
  if kind not in mixtures.KINDS:
    return names
  return (*(name for name in names if "/mlp/" not in name.path), *mixtures.names(config))


def fused(heads: int, kv_heads: int) -> tuple[Name, ...]:
  """Names where queries, keys and values are one tensor, and gate and up another (Phi-3).

  Args:
    heads, kv_heads: how many of queries, and of keys and values.
  """
  hf, gguf = "model.layers.{i}", "blk.{i}"
  split = {
    **{f"attn/{x}": (f"{hf}.self_attn.qkv_proj.weight", f"{gguf}.attn_qkv.weight", (n, (heads, kv_heads, kv_heads)))
       for n, x in enumerate("qkv")},
    **{f"mlp/{x}": (f"{hf}.mlp.gate_up_proj.weight", f"{gguf}.ffn_up.weight", (n, (1, 1)))
       for n, x in enumerate(("gate", "up"))},
  }  # fmt: skip
  own = [name for name in NAMES if name.path.removeprefix("layers/{i}/").rpartition("/")[0] not in split]
  return (*own, *(Name(f"layers/{{i}}/{at}/kernel", *there[:2], part=there[2]) for at, there in split.items()))


def gguf_names(kind: str, heads: int, kv_heads: int) -> tuple[Name, ...]:
  """Names in GGUF of a `model_type`; experts of a mixture stacked."""
  if kind == "phi3":
    return fused(heads, kv_heads)
  names = NORMED if kind in ("qwen3", "qwen3_moe") else NAMES
  if kind not in mixtures.KINDS:
    return names
  shared = mixtures.SHARED if kind == "qwen2_moe" else ()
  return (*(name for name in names if "/mlp/" not in name.path), *mixtures.STACKED, *shared)


def read(config: Mapping[str, Any], where: Any) -> Llama:
  """The model of a `config.json`.

  Raises:
    FormatError: names the setting that is wrong or not known here.
  """
  if config.get("hidden_act", "silu") != "silu":
    raise FormatError(f"{where}: hidden_act {config['hidden_act']!r} is not known here; Llama uses 'silu'")
  head_dim = config.get("head_dim") or integer(config, "hidden_size", where) // integer(
    config, "num_attention_heads", where
  )
  if type(head_dim) is not int or head_dim < 2 or head_dim % 2:
    raise FormatError(f"{where}: head_dim is {head_dim!r}; an even integer is needed")
  max_length = integer(config, "max_position_embeddings", where, 2048)
  window, full = windows(config, where)
  return Llama(
    LlamaConfig(
      head_dim=head_dim,
      rope=read_rope(config, where, max_length, head_dim),
      rms_epsilon=number(config, "rms_norm_eps", 1e-6, where),
      max_length=max_length,
      window=window,
      full_layers=full,
      **mixtures.read(config, where),
    )
  )


def windows(config: Mapping[str, Any], where: Any) -> tuple[int | None, tuple[int, ...]]:
  """The window, and the layers that see all in spite of it."""
  kind = config.get("model_type")
  width = config.get("sliding_window")
  if kind == "llama" or width is None or (str(kind).startswith("qwen") and not config.get("use_sliding_window", False)):
    return None, ()
  width, layers = integer(config, "sliding_window", where), integer(config, "num_hidden_layers", where)
  types = config.get("layer_types")
  if isinstance(types, list) and len(types) == layers:
    return width, tuple(i for i, word in enumerate(types) if word == "full_attention")
  if str(kind).startswith("qwen"):
    return width, tuple(range(min(layers, integer(config, "max_window_layers", where, 0, least=0))))
  return width, ()


def write(model: Llama, params: Params) -> dict[str, Any]:
  """The `config.json` of a model."""
  c, layers = model.config, params["layers"]
  first = layers[min(layers, key=int)]
  attention, mlp = first["attn"], first["mlp"]
  biases = {part for part in "qkvo" if "bias" in attention[part]}
  kind = "qwen3" if "q_norm" in attention else "qwen2" if biases == set("qkv") else "llama"
  if kind == "llama" and c.window is not None:
    kind = "mistral"
  vocab, embed = params["embed"]["table"].shape
  heads = attention["q"]["kernel"].shape[-1] // c.head_dim
  config: dict[str, Any] = {
    "model_type": kind, "architectures": [f"{kind.capitalize()}ForCausalLM"], "vocab_size": vocab, "hidden_size": embed,
    "intermediate_size": mlp["up"]["kernel"].shape[-1] if "up" in mlp else 0, "num_hidden_layers": len(layers),
    "num_attention_heads": heads,
    "num_key_value_heads": attention["k"]["kernel"].shape[-1] // c.head_dim, "head_dim": c.head_dim,
    "hidden_act": "silu", "rms_norm_eps": c.rms_epsilon, "max_position_embeddings": c.max_length,
    "attention_bias": biases == set("qkvo"), "mlp_bias": "bias" in mlp.get("up", {}),
    "tie_word_embeddings": "head" not in params, **write_rope(c.rope),
  }  # fmt: skip
  if any("router" in layer["mlp"] for layer in layers.values()):
    config |= mixtures.write(model, params)
    config["architectures"] = [mixtures.CLASSES[config["model_type"]]]
  if c.window is not None:
    kinds = ["full_attention" if i in c.full_layers else "sliding_attention" for i in range(len(layers))]
    config |= {"sliding_window": c.window, "use_sliding_window": True, "layer_types": kinds}
    config |= {"max_window_layers": min((i for i, k in enumerate(kinds) if k != "full_attention"), default=0)}
  return config


def read_rope(config: Mapping[str, Any], where: Any, max_length: int, turned: int) -> Rope:
  """Both spellings: `rope_parameters` (with the base inside), and `rope_theta` beside `rope_scaling`.

  Args:
    turned: entries of a head that turn, two for each frequency.
  """
  scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
  if not isinstance(scaling, Mapping):
    raise FormatError(f"{where}: rope parameters are {scaling!r}; an object is needed")
  theta = number(scaling if "rope_theta" in scaling else config, "rope_theta", 10000.0, where)
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  part = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1))
  if config.get("model_type") == "phi3" and part != 1:
    raise FormatError(f"{where}: partial_rotary_factor {part!r} is not known here for phi3")
  phi3 = config.get("model_type") == "phi3"
  kind = "longrope" if phi3 and kind in ("su", "yarn") else kind  # what its first folders called it
  told = (known.get("original_max_position_embeddings") for known in (scaling, config))
  original = next((length for length in told if length), 4096 if kind == "longrope" and phi3 else max_length)
  if type(original) is not int or original < (2 if kind == "longrope" else 1):
    raise FormatError(f"{where}: original_max_position_embeddings is {original!r}; a positive integer is needed")
  if kind == "default":
    return Rope(theta)
  if kind == "longrope":
    attention = scaling.get("attention_factor")
    return Rope(
      theta, kind, number(scaling, "factor", max_length / original, where), original,
      attention_factor=None if attention is None else number(scaling, "attention_factor", 1.0, where),
      factors=_factors(scaling, "short_factor", where, turned // 2),
      long=_factors(scaling, "long_factor", where, turned // 2),
    )  # fmt: skip
  factor = number(scaling, "factor", 1.0, where)
  if kind == "linear":
    return Rope(theta, kind, factor)
  if kind == "dynamic":
    return Rope(theta, kind, factor, original)
  if kind == "llama3":
    return Rope(
      theta,
      kind,
      factor,
      original,
      number(scaling, "low_freq_factor", 1.0, where),
      number(scaling, "high_freq_factor", 4.0, where),
    )
  if kind == "yarn":
    return Rope(
      theta,
      kind,
      factor,
      original,
      number(scaling, "beta_slow", 1.0, where),
      number(scaling, "beta_fast", 32.0, where),
      None if scaling.get("attention_factor") is None else number(scaling, "attention_factor", 1.0, where),
      bool(scaling.get("truncate", True)),
    )
  known = "default, linear, dynamic, llama3, yarn, longrope"
  raise FormatError(f"{where}: rope type {kind!r} is not known here; known are {known}")


def _factors(scaling: Mapping[str, Any], key: str, where: Any, count: int) -> tuple[float, ...]:
  """What divides each frequency of a `longrope`."""
  values = scaling.get(key)
  values = values if isinstance(values, list) else []
  good = all(type(x) in (int, float) and 1e-30 < x < 1e30 for x in values)
  if len(values) != count or not good:
    raise FormatError(f"{where}: {key} is {str(scaling.get(key))[:80]}; a list of {count} positive numbers is needed")
  return tuple(map(float, values))


def write_rope(rope: Rope) -> dict[str, Any]:
  """Both spellings of a rope.

  Raises:
    FormatError: its frequencies have factors that only GGUF says.
  """
  if rope.factors and rope.kind != "longrope":
    raise FormatError("rope: its frequencies have factors of their own, which config.json cannot say")
  told: dict[str, Any] = {"rope_type": rope.kind}
  if rope.kind != "default":
    told["factor"] = rope.factor
  if rope.kind in ("dynamic", "llama3", "yarn", "longrope"):
    told["original_max_position_embeddings"] = rope.original_length
  if rope.kind == "llama3":
    told |= {"low_freq_factor": rope.low, "high_freq_factor": rope.high}
  if rope.kind == "yarn":
    told |= {"beta_slow": rope.low, "beta_fast": rope.high, "truncate": rope.truncate}
  if rope.kind == "longrope":
    told |= {"short_factor": list(rope.factors), "long_factor": list(rope.long)}
  if rope.kind in ("yarn", "longrope"):
    told |= {} if rope.attention_factor is None else {"attention_factor": rope.attention_factor}
  scaling = {"rope_scaling": told} if rope.kind != "default" else {}
  return {"rope_theta": rope.theta, **scaling, "rope_parameters": {**told, "rope_theta": rope.theta}}


FOREIGN = Foreign(
  Llama,
  ("llama", "mistral", "phi3", "qwen2", "qwen3", *mixtures.KINDS),
  _names,
  read,
  write,
  ignored=(r".*\.rotary_emb\.inv_freq",),
)
