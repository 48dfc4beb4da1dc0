"""Mixtures of experts in Hugging Face folders and GGUF: what Mixtral, Qwen2-MoE and Qwen3-MoE have beside Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmcompress.io.names import Name, integer
from lmcompress.models import Llama
from lmcompress.types import FormatError, Params

CLASSES = {"mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
KINDS = tuple(CLASSES)

_PARTS = {"mixtral": {"gate": "w1", "up": "w3", "down": "w2"}}
_QWEN = {part: f"{part}_proj" for part in ("gate", "up", "down")}


STACKED = (
  Name("layers/{i}/mlp/router/kernel", "", "blk.{i}.ffn_gate_inp.weight"),
  *(Name(f"layers/{{i}}/mlp/experts/{part}/kernel", "", f"blk.{{i}}.ffn_{part}_exps.weight") for part in _QWEN),
)
"""In GGUF, where the experts of a mixture are one tensor `[experts, out, in]`."""

SHARED = (
  Name("layers/{i}/mlp/shared_gate/kernel", "", "blk.{i}.ffn_gate_inp_shexp.weight"),
  *(Name(f"layers/{{i}}/mlp/shared/{part}/kernel", "", f"blk.{{i}}.ffn_{part}_shexp.weight") for part in _QWEN),
)
"""With an expert that all tokens go to (Qwen2-MoE)."""


def dense_layers(config: Mapping[str, Any], where: Any) -> set[int]:
  """The layers that have an MLP and no mixture.

  Raises:
    FormatError: a setting is none.
  """
  if config["model_type"] == "mixtral":
    return set()
  step = integer(config, "decoder_sparse_step", where, 1)
  listed = config.get("mlp_only_layers") or []
  if not isinstance(listed, list) or any(type(i) is not int for i in listed):
    raise FormatError(f"{where}: mlp_only_layers is {listed!r}; a list of layers is needed")
  layers = range(integer(config, "num_hidden_layers", where))
  return {i for i in layers if i in listed or (i + 1) % step}


def experts(config: Mapping[str, Any], where: Any) -> int:
  """How many experts a mixture has, under either key."""
  return integer(config, "num_experts" if "num_experts" in config else "num_local_experts", where)


def names(config: Mapping[str, Any]) -> tuple[Name, ...]:
  """Where the parameters of each layer's mixture lie, or those of its MLP."""
  kind, where = config["model_type"], "config.json"
  parts, block = _PARTS.get(kind, _QWEN), "block_sparse_moe" if kind == "mixtral" else "mlp"
  dense, found = dense_layers(config, where), []
  for i in range(integer(config, "num_hidden_layers", where)):
    here, there = f"layers/{i}/mlp", f"model.layers.{i}.{block}"
    if i in dense:
      found += [Name(f"{here}/{part}/kernel", f"{there}.{theirs}.weight") for part, theirs in parts.items()]
      continue
    found.append(Name(f"{here}/router/kernel", f"{there}.gate.weight"))
    for e in range(experts(config, where)):
      found += [
        Name(f"{here}/experts/{e}/{part}/kernel", f"{there}.experts.{e}.{theirs}.weight")
        for part, theirs in parts.items()
      ]
    if kind == "qwen2_moe":
      found.append(Name(f"{here}/shared_gate/kernel", f"{there}.shared_expert_gate.weight"))
      found += [
        Name(f"{here}/shared/{part}/kernel", f"{there}.shared_expert.{theirs}.weight")
        for part, theirs in parts.items()
      ]
  return tuple(found)


def read(config: Mapping[str, Any], where: Any) -> dict[str, Any]:
  """What the config of a Llama says of mixtures."""
  if config["model_type"] not in KINDS:
    return {}
  count = integer(config, "num_experts_per_tok", where)
  if count > experts(config, where):
    raise FormatError(f"{where}: num_experts_per_tok is {count}, and there are {experts(config, where)} experts")
  normal = config["model_type"] == "mixtral" or bool(config.get("norm_topk_prob", False))
  return {"experts_per_token": count, "normalize_experts": normal}


def write(model: Llama, params: Params) -> dict[str, Any]:
  """What `config.json` says of a model with mixtures: its kind, and their sizes.

  Raises:
    FormatError: no kind that is written has such layers.
  """
  layers = params["layers"]
  mixed = {int(i): layer["mlp"] for i, layer in layers.items() if "router" in layer["mlp"]}
  first, attention = mixed[min(mixed)], layers[min(layers, key=int)]["attn"]
  count = len(first["experts"])
  width = first["experts"]["0"]["up"]["kernel"].shape[-1]
  dense = sorted(set(map(int, layers)) - set(mixed))
  kind = "qwen3_moe" if "q_norm" in attention else "qwen2_moe" if "shared" in first else "mixtral"
  if kind == "mixtral" and (dense or not model.config.normalize_experts):
    raise FormatError("config.json: mixtures in some layers, or whose shares do not add up to 1, are of Qwen's kinds")
  told: dict[str, Any] = {
    "model_type": kind, "num_experts_per_tok": model.config.experts_per_token, "intermediate_size": width,
    "num_local_experts": count,
  }  # fmt: skip
  if kind != "mixtral":
    inner = layers[str(dense[0])]["mlp"]["up"]["kernel"].shape[-1] if dense else width
    told |= {"num_experts": count, "moe_intermediate_size": width, "intermediate_size": inner, "mlp_only_layers": dense}
    told |= {"norm_topk_prob": model.config.normalize_experts, "decoder_sparse_step": 1}
  if kind != "qwen2_moe" and any("bias" in attention[part] for part in "qkvo"):
    raise FormatError(f"config.json: a mixture with biases of queries and keys and no shared expert is none of {KINDS}")
  if kind == "qwen2_moe":
    told["shared_expert_intermediate_size"] = first["shared"]["up"]["kernel"].shape[-1]
    told["qkv_bias"] = "bias" in attention["q"]
  return told
