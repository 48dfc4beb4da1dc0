"""T5 and Flan-T5 in Hugging Face folders and in GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmcompress.io.names import Foreign, Name, integer, number, one_width
from lmcompress.models import T5, T5Config
from lmcompress.types import FormatError, Params

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}


def _attention(path: str, hf: str, gguf: str) -> tuple[Name, ...]:
  return tuple(Name(f"{path}/{x}/kernel", f"{hf}.{x}.weight", f"{gguf}_{x}.weight") for x in "qkvo")


def _side(side: str, gated: bool) -> tuple[Name, ...]:
  """Names of the encoder or the decoder, whose parts of a layer are numbered."""
  at, theirs, short = f"{side}/layers/{{i}}", f"{side}.block.{{i}}.layer", side[:3]
  block = f"{short}.blk.{{i}}"
  last = 2 if side == "decoder" else 1
  cross = (
    Name(f"{at}/cross_norm/scale", f"{theirs}.1.layer_norm.weight", f"{block}.cross_attn_norm.weight"),
    *_attention(f"{at}/cross", f"{theirs}.1.EncDecAttention", f"{block}.cross_attn"),
  )
  dense = f"{theirs}.{last}.DenseReluDense"
  wide = {"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}
  return (
    Name(f"{side}/relative/bias", f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
         f"{short}.blk.0.attn_rel_b.weight"),
    Name(f"{at}/attn_norm/scale", f"{theirs}.0.layer_norm.weight", f"{block}.attn_norm.weight"),
    *_attention(f"{at}/attn", f"{theirs}.0.SelfAttention", f"{block}.attn"),
    *(cross if side == "decoder" else ()),
    Name(f"{at}/mlp_norm/scale", f"{theirs}.{last}.layer_norm.weight", f"{block}.ffn_norm.weight"),
    *(Name(f"{at}/mlp/{ours}/kernel", f"{dense}.{name}.weight", f"{block}.ffn_{ours}.weight")
      for ours, name in {**wide, "down": "wo"}.items()),
    Name(f"{side}/final_norm/scale", f"{side}.final_layer_norm.weight", f"{short}.output_norm.weight"),
  )  # fmt: skip


def names(gated: bool) -> tuple[Name, ...]:
  """Where the parameters lie, with or without gates."""
  return (
    Name("embed/table", "shared.weight", "token_embd.weight"), *_side("encoder", gated), *_side("decoder", gated),
    Name("head/table", "lm_head.weight", "output.weight", optional=True),
  )  # fmt: skip


def _names(config: Mapping[str, Any]) -> tuple[Name, ...]:
  return names(str(config.get("feed_forward_proj", "relu")).startswith("gated-"))


def read(config: Mapping[str, Any], where: Any) -> T5:
  """The model of a `config.json`.

  Raises:
    FormatError: names the setting that is wrong or not known here.
  """
  word = config.get("feed_forward_proj", "relu")
  act = str(word).removeprefix("gated-")
  act = "gelu_new" if word == "gated-gelu" else act  # what the first folders of v1.1 meant by it
  if act not in _ACTIVATIONS:
    known = ", ".join(f"{name}, gated-{name}" for name in _ACTIVATIONS)
    raise FormatError(f"{where}: feed_forward_proj {word!r} is not known here; known are {known}")
  return T5(
    T5Config(
      head_dim=integer(config, "d_kv", where, 64),
      rms_epsilon=number(config, "layer_norm_epsilon", 1e-6, where),
      activation=_ACTIVATIONS[act],
      max_distance=integer(config, "relative_attention_max_distance", where, 128),
      scaled=bool(config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))),
      start=integer(config, "decoder_start_token_id", where, 0, least=0),
    )
  )


def write(model: T5, params: Params) -> dict[str, Any]:
  """The `config.json` of a model."""
  c, encoder, decoder = model.config, params["encoder"], params["decoder"]
  layer = next(iter(encoder["layers"].values()))
  vocab, embed = params["embed"]["table"].shape
  buckets, heads = encoder["relative"]["bias"].shape
  layers = [x for side in (encoder, decoder) for x in side["layers"].values()]
  hidden = one_width("MLPs", [x["mlp"]["up"]["kernel"].shape[-1] for x in layers])
  widths = [x[part]["q"]["kernel"].shape[-1] for x in layers for part in ("attn", "cross") if part in x]
  if (width := one_width("heads", widths)) != heads * c.head_dim:
    raise FormatError(f"heads of {width} entries in all and biases for {heads} of {c.head_dim} do not fit together")
  word = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[c.activation]
  gated = "gate" in layer["mlp"]
  if "head" in params and c.scaled:
    raise FormatError("head/table: a folder of T5 scales states only before the embedding's table; fold the scale in")
  proj = f"gated-{'gelu' if word == 'gelu_new' else word}" if gated else word
  return {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": vocab, "d_model": embed,
    "d_kv": c.head_dim, "d_ff": hidden, "num_layers": len(encoder["layers"]),
    "num_decoder_layers": len(decoder["layers"]), "num_heads": heads, "relative_attention_num_buckets": buckets,
    "relative_attention_max_distance": c.max_distance, "layer_norm_epsilon": c.rms_epsilon,
    "feed_forward_proj": proj, "is_encoder_decoder": True, "decoder_start_token_id": c.start,
    "tie_word_embeddings": "head" not in params, "scale_decoder_outputs": c.scaled,
  }  # fmt: skip


FOREIGN = Foreign(
  T5, ("t5",), _names, read, write, depth={"encoder/": "num_layers", "decoder/": "num_decoder_layers"},
  ignored=(r"(encoder|decoder)\.embed_tokens\.weight",), tied=True,
)  # fmt: skip
