"""GPT-2 in Hugging Face folders, where linears are Conv1D, `[in, out]`, and in GGUF; q, k and v share one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmcompress.io.names import Foreign, Name, choice, divided, integer, norm_names, number
from lmcompress.models import GPT2, GPT2Config
from lmcompress.types import FormatError, Params

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu",
                "silu": "silu"}  # fmt: skip


def _linear(path: str, hf: str, gguf: str, part: tuple[int, tuple[int, ...]] = (0, (1,))) -> tuple[Name, Name]:
  at, theirs = f"layers/{{i}}/{path}", f"blk.{{i}}.{gguf}"
  return (
    Name(f"{at}/kernel", f"h.{{i}}.{hf}.weight", f"{theirs}.weight", part=part, turned=False),
    Name(f"{at}/bias", f"h.{{i}}.{hf}.bias", f"{theirs}.bias", part=part),
  )


NAMES = (
  Name("embed/table", "wte.weight", "token_embd.weight"),
  Name("positions/table", "wpe.weight", "position_embd.weight"),
  *norm_names("layers/{i}/attn_norm", "h.{i}.ln_1", "blk.{i}.attn_norm"),
  *(name for n, x in enumerate("qkv") for name in _linear(f"attn/{x}", "attn.c_attn", "attn_qkv", (n, (1, 1, 1)))),
  *_linear("attn/o", "attn.c_proj", "attn_output"),
  *norm_names("layers/{i}/mlp_norm", "h.{i}.ln_2", "blk.{i}.ffn_norm"),
  *_linear("mlp/up", "mlp.c_fc", "ffn_up"),
  *_linear("mlp/down", "mlp.c_proj", "ffn_down"),
  *norm_names("final_norm", "ln_f", "output_norm"),
  Name("head/table", "lm_head.weight", "output.weight", optional=True, outside=True),
)


def read(config: Mapping[str, Any], where: Any) -> GPT2:
  """The model of a `config.json`.

  Raises:
    FormatError: names the setting that is wrong or not known here.
  """
  for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
    if config.get(key, False):
      raise FormatError(f"{where}: {key} is not known here")
  if not config.get("scale_attn_weights", True):
    raise FormatError(f"{where}: scale_attn_weights false is not known here")
  return GPT2(
    GPT2Config(
      head_dim=divided(config, "n_embd", "n_head", where),
      norm_epsilon=number(config, "layer_norm_epsilon", 1e-5, where),
      activation=choice(config, "activation_function", "gelu_new", _ACTIVATIONS, where),
      max_length=integer(config, "n_positions", where, 1024),
    )
  )


def write(model: GPT2, params: Params) -> dict[str, Any]:
  """The `config.json` of a model."""
  c, layer = model.config, next(iter(params["layers"].values()))
  vocab, embed = params["embed"]["table"].shape
  width = layer["attn"]["q"]["kernel"].shape[-1]
  if width != embed:
    raise FormatError(f"heads of {width} entries in all over a stream of {embed}: config.json has one width for both")
  theirs = {ours: word for word, ours in reversed(_ACTIVATIONS.items())}
  return {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": vocab, "n_embd": embed,
    "n_head": width // c.head_dim, "n_layer": len(params["layers"]),
    "n_positions": params["positions"]["table"].shape[0], "n_inner": layer["mlp"]["up"]["kernel"].shape[-1],
    "activation_function": theirs[c.activation], "layer_norm_epsilon": c.norm_epsilon,
    "tie_word_embeddings": "head" not in params,
  }  # fmt: skip


FOREIGN = Foreign(
  GPT2, ("gpt2",), lambda config: NAMES, read, write, depth="n_layer", prefixes=("transformer.", ""),
  ignored=(r".*\.attn\.(masked_)?bias",), tied=True,
)  # fmt: skip
