"""T5 as encoder.onnx and decoder.onnx: weights by the names of the nodes that read them, integer ones dequantized."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from lmcompress import tree
from lmcompress.data.tokenizer import Tokenizer
from lmcompress.io import names
from lmcompress.io.architectures import t5
from lmcompress.models import T5, T5Config
from lmcompress.types import ConfigError, FormatError, Params

FILES = ("encoder.onnx", "decoder.onnx")
_LIMIT = 2 << 30
_PRODUCTS = ("MatMulInteger", "MatMul", "Gather")


def is_onnx(folder: Path) -> bool:
  """Whether a folder holds an encoder and a decoder as ONNX."""
  return all((folder / name).is_file() for name in FILES)


def load_onnx(folder: Path) -> tuple[T5, Params, Tokenizer | None]:
  """Model, float32 parameters and tokenizer of a T5 that was exported in two files, perhaps with integer weights.

  A weight's name is that of the module whose node reads it; an integer stands for `(code - zero point) * scale`.
  Activations, which such a graph rounds as it runs, are float32 here.

  Raises:
    ConfigError: the onnx package is missing.
    FormatError: a file is damaged, or holds another architecture.
  """
  tensors: dict[str, np.ndarray] = {}
  for name, side in zip(FILES, ("encoder", "decoder"), strict=True):
    for theirs, array in _weights(folder / name, side).items():
      tensors.setdefault(theirs, array)
  relative = tensors.get("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
  query = tensors.get("encoder.block.0.layer.0.SelfAttention.q.weight")
  if relative is None or query is None or relative.ndim != 2 or query.ndim != 2 or query.shape[0] % relative.shape[1]:
    raise FormatError(f"{folder}: no T5 that is known here; its biases of attention or its queries are not found")
  gated = any(name.endswith("wi_0.weight") for name in tensors)
  depth = {
    f"{side}/": 1 + max((int(m[1]) for t in tensors if (m := re.match(rf"{side}\.block\.(\d+)\.", t))), default=-1)
    for side in ("encoder", "decoder")
  }
  table = t5.names(gated)
  mapping = names.plan(table, "hf", tensors, depth, str(folder), ignored=t5.FOREIGN.ignored)
  config = T5Config(
    head_dim=query.shape[0] // relative.shape[1],
    activation="gelu_tanh" if gated else "relu",
    scaled="head/table" not in mapping,
  )
  params = tree.unflatten({path: name.read(tensors[theirs]) for path, (name, theirs) in mapping.items()})
  model = T5(config)
  names.check_shapes(model, params, str(folder))
  if not (folder / "tokenizer.json").is_file():
    return model, params, None
  tokenizer = Tokenizer.from_folder(folder)
  return model, params, Tokenizer(tokenizer.backend, tokens={"eos_token": "</s>", "pad_token": "<pad>"})


def _weights(path: Path, side: str) -> dict[str, np.ndarray]:
  """Weights of a file by the names of Hugging Face folders, linears `[out, in]`."""
  try:
    import onnx
    from onnx import numpy_helper
  except ImportError:
    raise ConfigError(f"{path} needs the onnx package: pip install 'lmcompress[onnx]'") from None
  if path.stat().st_size > _LIMIT:
    raise FormatError(f"{path}: {path.stat().st_size} bytes are over the limit of {_LIMIT}")
  try:
    graph = onnx.load(str(path), load_external_data=False).graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
  except Exception as error:  # protobuf and numpy raise errors of many kinds; all mean that it cannot be read
    raise FormatError(f"{path}: no ONNX file that can be read ({str(error).splitlines()[0][:120]})") from None
  found = {}
  for node in graph.node:
    if node.op_type in _PRODUCTS:
      for given in node.input:
        array = _dequantized(held, given, path)
        if array is not None and array.ndim == 2:
          product = node.op_type != "Gather"
          theirs = _module(node.name.rpartition("/")[0] if product else given.removesuffix("_quantized"), side)
          found[theirs if theirs.endswith(".weight") else f"{theirs}.weight"] = array.T if product else array
  for name, array in held.items():
    if name.endswith("layer_norm.weight"):
      found[_module(name, side)] = array
  return found


def _dequantized(held: dict[str, np.ndarray], name: str, path: Path) -> np.ndarray | None:
  """The float32 value of an initializer; None where there is none of the name."""
  array = held.get(name)
  if array is None or np.issubdtype(array.dtype, np.floating):
    return None if array is None else np.asarray(array, np.float32)
  if not name.endswith("_quantized"):
    return None
  base = name.removesuffix("_quantized")
  scale, zero = held.get(f"{base}_scale"), held.get(f"{base}_zero_point")
  if scale is None or zero is None:
    raise FormatError(f"{path}: {name} has no scale and zero point beside it")
  return (array.astype(np.float32) - np.asarray(zero, np.float32)) * np.asarray(scale, np.float32)


def _module(name: str, side: str) -> str:
  """A module's name in Hugging Face folders, of a node's path or a tensor's name in the file of one side."""
  parts = [part for part in re.split(r"[/.]", name) if part]
  for start in (side, side[:3]):
    if start in parts:
      parts = [side, *parts[parts.index(start) + 1 :]]
  if "lm_head" in parts:
    return "lm_head"
  return "shared.weight" if "embed_tokens" in parts or "shared" in parts else ".".join(parts)
