"""BART and mBART in Hugging Face folders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmcompress.io.names import Foreign, Name, choice, divided, integer, layer_names, norm_names, one_width
from lmcompress.models import Bart, BartConfig
from lmcompress.models.bart import FIRST_POSITION
from lmcompress.types import FormatError, Params

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}


def _attention(path: str, hf: str) -> tuple[Name, ...]:
  pairs = (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj"))
  return layer_names(*((f"{path}/{ours}", f"{hf}.{theirs}", "") for ours, theirs in pairs), biases=True)


def _side(side: str, pre_norm: bool) -> tuple[Name, ...]:
  at, theirs = f"{side}/layers/{{i}}", f"{side}.layers.{{i}}"
  cross = (*_attention(f"{at}/cross", f"{theirs}.encoder_attn"),
           *norm_names(f"{at}/cross_norm", f"{theirs}.encoder_attn_layer_norm"))  # fmt: skip
  return (
    Name(f"{side}/positions/table", f"{side}.embed_positions.weight"),
    *norm_names(f"{side}/embed_norm", f"{side}.layernorm_embedding"),
    *_attention(f"{at}/attn", f"{theirs}.self_attn"),
    *norm_names(f"{at}/attn_norm", f"{theirs}.self_attn_layer_norm"),
    *(cross if side == "decoder" else ()),
    *layer_names((f"{at}/mlp/up", f"{theirs}.fc1", ""), (f"{at}/mlp/down", f"{theirs}.fc2", ""), biases=True),
    *norm_names(f"{at}/mlp_norm", f"{theirs}.final_layer_norm"),
    *(norm_names(f"{side}/final_norm", f"{side}.layer_norm") if pre_norm else ()),
  )


def _names(config: Mapping[str, Any]) -> tuple[Name, ...]:
  pre_norm = config["model_type"] == "mbart"
  return (
    Name("embed/table", "shared.weight"), *_side("encoder", pre_norm), *_side("decoder", pre_norm),
    Name("logits/bias", "final_logits_bias", optional=True, outside=True),
  )  # fmt: skip


def read(config: Mapping[str, Any], where: Any) -> Bart:
  """The model of a `config.json`.

  Raises:
    FormatError: names the setting that is wrong or not known here.
  """
  mbart = config["model_type"] == "mbart"
  if not config.get("tie_word_embeddings", True):
    raise FormatError(f"{where}: tie_word_embeddings is false: a table for each side and the head is not known here")
  forced = config.get("forced_bos_token_id")
  head = divided(config, "d_model", "encoder_attention_heads", where)
  other = divided(config, "d_model", "decoder_attention_heads", where)
  if head != other:
    raise FormatError(f"{where}: heads of {head} in the encoder and of {other} in the decoder; one width is known here")
  return Bart(
    BartConfig(
      head_dim=head,
      pre_norm=mbart,
      scaled=bool(config.get("scale_embedding", False)),
      activation=choice(config, "activation_function", "gelu", _ACTIVATIONS, where),
      start=integer(config, "decoder_start_token_id", where, 2, least=0),
      max_length=integer(config, "max_position_embeddings", where, 1024),
      first=None if forced is None else integer(config, "forced_bos_token_id", where, least=0),
    )
  )


def write(model: Bart, params: Params) -> dict[str, Any]:
  """The `config.json` of a model."""
  c, encoder, decoder = model.config, params["encoder"], params["decoder"]
  vocab, embed = params["embed"]["table"].shape
  sides = [list(side["layers"].values()) for side in (encoder, decoder)]
  if "head" in params:
    raise FormatError("head/table: a folder of BART has one table for both sides and the head")
  attentions = [x[part] for side in sides for x in side for part in ("attn", "cross") if part in x]
  if (width := one_width("heads", [x["q"]["kernel"].shape[-1] for x in attentions])) != embed:
    raise FormatError(f"heads of {width} entries in all over a stream of {embed}: config.json has one width for both")
  hidden = [one_width("MLPs of a side", [x["mlp"]["up"]["kernel"].shape[-1] for x in side]) for side in sides]
  word = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}[c.activation]
  heads, name = width // c.head_dim, "MBart" if c.pre_norm else "Bart"
  return {
    "model_type": name.lower(), "architectures": [f"{name}ForConditionalGeneration"], "vocab_size": vocab,
    "d_model": embed, "encoder_layers": len(encoder["layers"]), "decoder_layers": len(decoder["layers"]),
    "encoder_attention_heads": heads, "decoder_attention_heads": heads, "encoder_ffn_dim": hidden[0],
    "decoder_ffn_dim": hidden[1], "activation_function": word, "scale_embedding": c.scaled,
    "max_position_embeddings": params["encoder"]["positions"]["table"].shape[0] - FIRST_POSITION,
    "decoder_start_token_id": c.start, "forced_bos_token_id": c.first, "is_encoder_decoder": True,
  }  # fmt: skip


def _kind(word: str) -> Foreign:
  return Foreign(
    Bart, (word,), _names, read, write, depth={"encoder/": "encoder_layers", "decoder/": "decoder_layers"},
    prefixes=("model.", ""), tied=True, writing={"decoder_start_token_id": False, "forced_bos_token_id": True},
    ignored=(r"(model\.)?(encoder|decoder)\.embed_tokens\.weight", r"lm_head\.weight"),
  )  # fmt: skip


FOREIGN = (_kind("bart"), _kind("mbart"))
