"""Hugging Face folders: config.json, safetensors in one file or many, and the tokenizer."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmcompress import tree
from lmcompress.data.tokenizer import Tokenizer
from lmcompress.io import names, safetensors
from lmcompress.models import Llama, LlamaConfig, Rope
from lmcompress.types import FormatError, Params

_LLAMA_LIKE = ("llama",)


def read_json(path: Path, limit: int = 64 << 20) -> dict[str, Any]:
  """A JSON object within bounds.

  Raises:
    FormatError: missing, too large, or no JSON object.
  """
  if not path.is_file():
    raise FormatError(f"{path}: missing; a Hugging Face folder has config.json and *.safetensors")
  if path.stat().st_size > limit:
    raise FormatError(f"{path}: {path.stat().st_size} bytes are over the limit of {limit}")
  try:
    found = json.loads(path.read_text("utf-8"))
  except (ValueError, RecursionError) as error:
    raise FormatError(f"{path}: not valid JSON ({error})") from None
  if not isinstance(found, dict):
    raise FormatError(f"{path}: a JSON object is expected, found {type(found).__name__}")
  return found


def load_folder(folder: Path, lazy: bool = False) -> tuple[Llama, Params, Tokenizer | None]:
  """Model, float32 parameters and tokenizer (None where the folder has none).

  Args:
    lazy: leaves are read when they are used (`StoredArray`), norms and biases at once.

  Raises:
    FormatError: names the file, and the tensor, that is wrong.
  """
  config = read_json(folder / "config.json")
  kind = config.get("model_type")
  if kind not in _LLAMA_LIKE:
    raise FormatError(
      f"{folder / 'config.json'}: model_type {kind!r} is not known here; known are {', '.join(_LLAMA_LIKE)}"
    )
  model = Llama(_llama_config(config, folder / "config.json"))
  files = _tensors(folder)
  mapping = names.plan(names.LLAMA, "hf", files, _int(config, "num_hidden_layers", folder), str(folder))
  if config.get("tie_word_embeddings", False):
    mapping.pop("head/table", None)
  elif "head/table" not in mapping:
    raise FormatError(f"{folder}: the tensor 'lm_head.weight' is missing and config.json does not tie it")
  leaves = {}
  for path, theirs in mapping.items():
    entry = files[theirs].entries[theirs]
    if not np.issubdtype(entry.dtype, np.floating) and entry.dtype.name not in (
      "bfloat16",
      "float8_e4m3fn",
      "float8_e5m2",
    ):
      raise FormatError(f"{files[theirs].path}: tensor {theirs!r} is {entry.dtype}; floating weights are expected")
    read = functools.partial(files[theirs].read, theirs)
    stays = lazy and tree.is_weight(path)
    leaves[path] = names.lazily(path, read, entry.shape) if stays else names.orient(path, read())
  params = tree.unflatten(leaves)
  names.check_shapes(params, model.config.head_dim, str(folder))
  return model, params, Tokenizer.from_folder(folder) if (folder / "tokenizer.json").is_file() else None


def _tensors(folder: Path) -> dict[str, safetensors.File]:
  """The file of each tensor; an index may only name files beside it."""
  index = folder / "model.safetensors.index.json"
  if not index.is_file():
    single = folder / "model.safetensors"
    if not single.is_file():
      raise FormatError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there")
    file = safetensors.open_file(single)
    return {name: file for name in file.entries}
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
    raise FormatError(f"{index}: weight_map is missing or not a map of tensor to file")
  files = {}
  for name in sorted(set(weight_map.values())):
    path = folder / name
    if Path(name).name != name or "\\" in name or "\0" in name or not path.is_file():
      raise FormatError(f"{index}: {name!r} is no file beside it")
    files[name] = safetensors.open_file(path)
  for tensor, name in weight_map.items():
    if tensor not in files[name].entries:
      raise FormatError(f"{index}: tensor {tensor!r} is not in {name}")
  return {tensor: files[name] for tensor, name in weight_map.items()}


def _int(config: Mapping[str, Any], key: str, where: Path) -> int:
  value = config.get(key)
  if type(value) is not int or not 0 < value < 2**31:
    raise FormatError(f"{where}: {key} is {value!r}; a positive integer is needed")
  return value


def _number(config: Mapping[str, Any], key: str, default: float, where: Path) -> float:
  value = config.get(key, default)
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
    raise FormatError(f"{where}: {key} is {value!r}; a positive number is needed")
  try:
    return float(value)
  except OverflowError:
    raise FormatError(f"{where}: {key} is over the range of floats") from None


def _llama_config(config: Mapping[str, Any], where: Path) -> LlamaConfig:
  if config.get("hidden_act", "silu") != "silu":
    raise FormatError(f"{where}: hidden_act {config['hidden_act']!r} is not known here; Llama uses 'silu'")
  head_dim = config.get("head_dim") or _int(config, "hidden_size", where) // _int(config, "num_attention_heads", where)
  if type(head_dim) is not int or head_dim < 2 or head_dim % 2:
    raise FormatError(f"{where}: head_dim is {head_dim!r}; an even integer is needed")
  max_length = _int({"max_position_embeddings": 2048, **config}, "max_position_embeddings", where)
  return LlamaConfig(
    head_dim=head_dim,
    rope=_rope(config, where, max_length),
    rms_epsilon=_number(config, "rms_norm_eps", 1e-6, where),
    max_length=max_length,
  )


def _rope(config: Mapping[str, Any], where: Path, max_length: int) -> Rope:
  """Both spellings: `rope_parameters` (with the base inside), and `rope_theta` beside `rope_scaling`."""
  scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
  if not isinstance(scaling, Mapping):
    raise FormatError(f"{where}: rope parameters are {scaling!r}; an object is needed")
  theta = _number(scaling if "rope_theta" in scaling else config, "rope_theta", 10000.0, where)
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  original = (
    scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or max_length
  )
  if type(original) is not int or original < 1:
    raise FormatError(f"{where}: original_max_position_embeddings is {original!r}; a positive integer is needed")
  if kind == "default":
    return Rope(theta)
  factor = _number(scaling, "factor", 1.0, where)
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
      _number(scaling, "low_freq_factor", 1.0, where),
      _number(scaling, "high_freq_factor", 4.0, where),
    )
  if kind == "yarn":
    return Rope(
      theta,
      kind,
      factor,
      original,
      _number(scaling, "beta_slow", 1.0, where),
      _number(scaling, "beta_fast", 32.0, where),
      None if scaling.get("attention_factor") is None else _number(scaling, "attention_factor", 1.0, where),
      bool(scaling.get("truncate", True)),
    )
  raise FormatError(f"{where}: rope type {kind!r} is not known here; known are default, linear, dynamic, llama3, yarn")
