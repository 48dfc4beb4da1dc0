"""Phi-1, 1.5 and 2 in Hugging Face folders and in GGUF."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lmcompress.io.architectures.llama import read_rope, write_rope
from lmcompress.io.names import Foreign, Name, choice, divided, integer, layer_names, norm_names, number
from lmcompress.models import Phi, PhiConfig
from lmcompress.types import FormatError, Params

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu",
                "silu": "silu"}  # fmt: skip


NAMES = (
  Name("embed/table", "model.embed_tokens.weight", "token_embd.weight"),
  *norm_names("layers/{i}/norm", "model.layers.{i}.input_layernorm", "blk.{i}.attn_norm"),
  *layer_names(
    *((f"layers/{{i}}/attn/{x}", f"model.layers.{{i}}.self_attn.{x}_proj", f"blk.{{i}}.attn_{x}") for x in "qkv"),
    ("layers/{i}/attn/o", "model.layers.{i}.self_attn.dense", "blk.{i}.attn_output"),
    ("layers/{i}/mlp/up", "model.layers.{i}.mlp.fc1", "blk.{i}.ffn_up"),
    ("layers/{i}/mlp/down", "model.layers.{i}.mlp.fc2", "blk.{i}.ffn_down"),
    biases=True,
  ),
  *norm_names("final_norm", "model.final_layernorm", "output_norm"),
  Name("head/table", "lm_head.weight", "output.weight"),
  Name("head/bias", "lm_head.bias", "output.bias"),
)


def read(config: Mapping[str, Any], where: Any) -> Phi:
  """The model of a `config.json`.

  Raises:
    FormatError: names the setting that is wrong or not known here.
  """
  for key in ("qk_layernorm", "tie_word_embeddings"):
    if config.get(key, False):
      raise FormatError(f"{where}: {key} is not known here")
  head, length = divided(config, "hidden_size", "num_attention_heads", where), integer(
    config, "max_position_embeddings", where, 2048
  )
  told = config.get("rope_parameters")
  inside = isinstance(told, Mapping) and "partial_rotary_factor" in told
  turned = int(head * number(told if inside else config, "partial_rotary_factor", 0.5, where))  # type: ignore[arg-type]
  if not 2 <= turned <= head or turned % 2:
    raise FormatError(f"{where}: partial_rotary_factor turns {turned} of {head} entries of a head; an even number can")
  return Phi(
    PhiConfig(
      head_dim=head,
      turned=turned,
      rope=read_rope(config, where, length, turned),
      norm_epsilon=number(config, "layer_norm_eps", 1e-5, where),
      activation=choice(config, "hidden_act", "gelu_new", _ACTIVATIONS, where),
      max_length=length,
    )
  )


def write(model: Phi, params: Params) -> dict[str, Any]:
  """The `config.json` of a model."""
  c, layers = model.config, params["layers"]
  layer = layers[min(layers, key=int)]
  vocab, embed = params["embed"]["table"].shape
  width = layer["attn"]["q"]["kernel"].shape[-1]
  if width != embed:
    raise FormatError(f"heads of {width} entries in all over a stream of {embed}: config.json has one width for both")
  part, rope = c.turned / c.head_dim, write_rope(c.rope)
  if int(c.head_dim * part) != c.turned:  # readers cut the product off
    part = math.nextafter(part, 1)
  rope["rope_parameters"]["partial_rotary_factor"] = part
  theirs = {ours: word for word, ours in reversed(_ACTIVATIONS.items())}
  return {
    "model_type": "phi", "architectures": ["PhiForCausalLM"], "vocab_size": vocab, "hidden_size": embed,
    "intermediate_size": layer["mlp"]["up"]["kernel"].shape[-1], "num_hidden_layers": len(layers),
    "num_attention_heads": width // c.head_dim,
    "num_key_value_heads": layer["attn"]["k"]["kernel"].shape[-1] // c.head_dim,
    "hidden_act": theirs[c.activation], "layer_norm_eps": c.norm_epsilon, "max_position_embeddings": c.max_length,
    "partial_rotary_factor": part, "tie_word_embeddings": False, **rope,
  }  # fmt: skip


FOREIGN = Foreign(Phi, ("phi",), lambda config: NAMES, read, write, ignored=(r".*\.rotary_emb\.inv_freq",))
