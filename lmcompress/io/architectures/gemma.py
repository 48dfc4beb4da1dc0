"""Gemma 1, 2 and 3 (its text part) in Hugging Face folders, which keep norms as their distance from 1, and in GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmcompress.io.architectures.llama import read_rope, windows, write_rope
from lmcompress.io.names import Foreign, Name, choice, integer, layer_names, number
from lmcompress.models import Gemma, GemmaConfig
from lmcompress.types import FormatError, Params

_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_AT, _BLOCK = "model.layers.{i}", "blk.{i}"


def _norm(path: str, hf: str, gguf: str) -> Name:
  return Name(f"{path}/scale", f"{hf}.weight", f"{gguf}.weight", offset=1.0)


def _names(config: Mapping[str, Any]) -> tuple[Name, ...]:
  first = config["model_type"] == "gemma"
  before_mlp = "post_attention_layernorm" if first else "pre_feedforward_layernorm"
  after = (
    _norm("layers/{i}/attn_after/norm", f"{_AT}.post_attention_layernorm", f"{_BLOCK}.post_attention_norm"),
    _norm("layers/{i}/mlp_after/norm", f"{_AT}.post_feedforward_layernorm", f"{_BLOCK}.post_ffw_norm"),
  )
  normed = tuple(
    _norm(f"layers/{{i}}/attn/{x}_norm", f"{_AT}.self_attn.{x}_norm", f"{_BLOCK}.attn_{x}_norm") for x in "qk"
  )
  attention = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
  return (
    Name("embed/table", "model.embed_tokens.weight", "token_embd.weight"),
    _norm("layers/{i}/attn_norm", f"{_AT}.input_layernorm", f"{_BLOCK}.attn_norm"),
    *layer_names(
      *((f"layers/{{i}}/attn/{x}", f"{_AT}.self_attn.{x}_proj", f"{_BLOCK}.{gguf}") for x, gguf in attention.items())
    ),
    *(normed if config["model_type"] == "gemma3_text" else ()),
    _norm("layers/{i}/mlp_norm", f"{_AT}.{before_mlp}", f"{_BLOCK}.ffn_norm"),
    *layer_names(
      *((f"layers/{{i}}/mlp/{x}", f"{_AT}.mlp.{x}_proj", f"{_BLOCK}.ffn_{x}") for x in ("gate", "up", "down"))
    ),
    *(() if first else after),
    _norm("final_norm", "model.norm", "output_norm"),
    Name("head/table", "lm_head.weight", "output.weight", optional=True),
  )


def _cap(config: Mapping[str, Any], key: str, where: Any) -> float | None:
  return None if config.get(key) is None else number(config, key, 1.0, where)


def read(config: Mapping[str, Any], where: Any) -> Gemma:
  """The model of a `config.json`.

  Raises:
    FormatError: names the setting that is wrong or not known here.
  """
  kind, head = config["model_type"], integer(config, "head_dim", where, 256)
  if head % 2:
    raise FormatError(f"{where}: head_dim is {head}; an even integer is needed")
  length = integer(config, "max_position_embeddings", where, 8192)
  ropes = config.get("rope_parameters") or {}
  if isinstance(ropes, Mapping) and "full_attention" in ropes:  # one for each kind of layer
    rope, local = (
      read_rope({**config, "rope_parameters": ropes.get(word)}, where, length, head)
      for word in ("full_attention", "sliding_attention")
    )
  else:
    rope, local = read_rope(config, where, length, head), None
    if kind == "gemma3_text":
      base = number(config, "rope_local_base_freq", 10000.0, where)
      local = read_rope({"rope_theta": base}, where, length, head)
  window, full = (None, ()) if kind == "gemma" else windows(config, where)
  if kind != "gemma" and window is not None and not isinstance(config.get("layer_types"), list):
    every = 2 if kind == "gemma2" else integer(config, "sliding_window_pattern", where, 6)
    full = tuple(i for i in range(integer(config, "num_hidden_layers", where)) if (i + 1) % every == 0)
  act = "hidden_activation" if config.get("hidden_activation") is not None else "hidden_act"
  return Gemma(
    GemmaConfig(
      head_dim=head,
      kind=kind,
      query_scale=float(head) if kind == "gemma" else number(config, "query_pre_attn_scalar", 256.0, where),
      rope=rope,
      local_rope=local if local != rope else None,
      rms_epsilon=number(config, "rms_norm_eps", 1e-6, where),
      activation=choice({**config, act: config.get(act) or "gelu_pytorch_tanh"}, act, "", _ACTIVATIONS, where),
      max_length=length,
      window=window,
      full_layers=full,
      score_cap=_cap(config, "attn_logit_softcapping", where),
      logit_cap=_cap(config, "final_logit_softcapping", where),
    )
  )


def write(model: Gemma, params: Params) -> dict[str, Any]:
  """The `config.json` of a model."""
  c, layers = model.config, params["layers"]
  layer = layers[min(layers, key=int)]
  vocab, embed = params["embed"]["table"].shape
  name = {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3"}[c.kind]
  config: dict[str, Any] = {
    "model_type": c.kind, "architectures": [f"{name}ForCausalLM"], "vocab_size": vocab, "hidden_size": embed,
    "intermediate_size": layer["mlp"]["up"]["kernel"].shape[-1], "num_hidden_layers": len(layers),
    "num_attention_heads": layer["attn"]["q"]["kernel"].shape[-1] // c.head_dim,
    "num_key_value_heads": layer["attn"]["k"]["kernel"].shape[-1] // c.head_dim, "head_dim": c.head_dim,
    "rms_norm_eps": c.rms_epsilon, "max_position_embeddings": c.max_length,
    "hidden_activation": {ours: word for word, ours in _ACTIVATIONS.items()}[c.activation],
    "attention_bias": "bias" in layer["attn"]["q"], "tie_word_embeddings": "head" not in params, **write_rope(c.rope),
  }  # fmt: skip
  config["hidden_act"] = config["hidden_activation"]
  if c.kind == "gemma":
    return config
  full = range(len(layers)) if c.window is None else c.full_layers
  kinds = ["full_attention" if i in full else "sliding_attention" for i in range(len(layers))]
  config |= {
    "query_pre_attn_scalar": int(c.query_scale) if c.query_scale.is_integer() else c.query_scale,
    "sliding_window": c.window, "layer_types": kinds,
    "attn_logit_softcapping": c.score_cap, "final_logit_softcapping": c.logit_cap,
  }  # fmt: skip
  if c.kind == "gemma3_text":
    local = write_rope(c.local_rope or c.rope)["rope_parameters"]
    config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    config["rope_local_base_freq"] = (c.local_rope or c.rope).theta
  return config


FOREIGN = Foreign(
  Gemma, ("gemma", "gemma2", "gemma3_text"), _names, read, write, ignored=(r".*\.rotary_emb\.inv_freq",), tied=True
)
