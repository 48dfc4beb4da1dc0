"""GGUF files of known architectures: metadata to a model, tensors to its tree."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lmcompress import tree
from lmcompress.data.tokenizer import Tokenizer
from lmcompress.io import gguf, names
from lmcompress.io.architectures.llama import NAMES
from lmcompress.models import Llama, LlamaConfig, Rope
from lmcompress.types import FormatError, Params

_ROPE_FACTORS = "rope_freqs.weight"


def describe(path: Path) -> str:
  """What float32 weights read from the file are, e.g. `float32, dequantized from Q4_1`."""
  tensors = gguf.read_header(path).tensors.values()
  kinds = Counter[str]()
  for info in tensors:
    kinds[info.type.name] += int(np.prod(info.shape))
  kind = kinds.most_common(1)[0][0] if kinds else "F32"
  return "float32" if kind == "F32" else f"float32, dequantized from {kind}"


def load_gguf(path: Path) -> tuple[Llama, Params, Tokenizer]:
  """Model, float32 parameters and tokenizer of a GGUF file.

  Raises:
    FormatError: the file is damaged or its architecture is not known here.
  """
  header = gguf.read_header(path)
  kind = header.metadata.get("general.architecture")
  if kind != "llama":
    raise FormatError(f"{path}: architecture {kind!r} is not known here; known are llama")
  config, heads, kv_heads, layers = _llama(header)
  found = [name for name in header.tensors if name != _ROPE_FACTORS]
  mapping = names.plan(NAMES, "gguf", found, {"": layers}, str(path))

  def read(path_: str) -> Any:
    name, tensor = mapping[path_]
    array = gguf.read_tensor(header, tensor)
    part = path_.split("/")[-2]
    if part in ("q", "k"):
      array = unpermute(array, heads if part == "q" else kv_heads, path_, path)
    return name.read(array)

  with ThreadPoolExecutor(max_workers=2) as pool:  # NumPy's loops release the lock
    leaves = dict(zip(mapping, pool.map(read, mapping), strict=True))
  params = tree.unflatten(leaves)
  names.check_shapes(Llama(config), params, str(path))
  return Llama(config), params, Tokenizer.from_gguf(header.metadata, str(path))


def unpermute(array: np.ndarray, heads: int, name: str, where: Path) -> np.ndarray:
  """Rows of q and k from GGUF's order (pairs of a rotation side by side) to halves of each head."""
  if array.shape[0] % (2 * heads):
    raise FormatError(f"{where}: {name} has {array.shape[0]} rows, which {heads} heads do not divide")
  return array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _llama(header: gguf.Header) -> tuple[LlamaConfig, int, int, int]:
  """Config, query heads, KV heads and layers."""
  data, where = header.metadata, header.path

  def number(key: str, default: Any = None, kind: type = int) -> Any:
    value = data.get(f"llama.{key}", default)
    if (
      isinstance(value, bool)
      or not isinstance(value, (int, float))
      or not value > 0
      or (kind is int and not isinstance(value, int))
    ):
      raise FormatError(f"{where}: llama.{key} is {str(value)[:80]!r}; a positive {kind.__name__} is needed")
    return kind(value)

  heads, embed = number("attention.head_count"), number("embedding_length")
  head_dim = number("attention.key_length", embed // heads)
  if number("rope.dimension_count", head_dim) != head_dim or head_dim % 2:
    raise FormatError(f"{where}: rotations over a part of the head ({head_dim}) are not known here")
  factors: tuple[float, ...] = ()
  if _ROPE_FACTORS in header.tensors:
    factors = tuple(float(f) for f in gguf.read_tensor(header, _ROPE_FACTORS).ravel())
    if len(factors) != head_dim // 2 or not all(f > 0 for f in factors):
      raise FormatError(
        f"{where}: {_ROPE_FACTORS} holds {len(factors)} factors, {head_dim // 2} positive ones expected"
      )
  scaling = data.get("llama.rope.scaling.type", "none")
  if scaling not in ("none", "linear", "yarn"):
    raise FormatError(f"{where}: llama.rope.scaling.type {scaling!r} is not known here; known are none, linear, yarn")
  length = number("context_length", 2048)
  rope = Rope(
    theta=number("rope.freq_base", 10000.0, float),
    kind="default" if scaling == "none" else scaling,
    factor=number("rope.scaling.factor", 1.0, float),
    original_length=number("rope.scaling.original_context_length", length),
    high=32.0 if scaling == "yarn" else 4.0,
    factors=factors,
  )
  epsilon = number("attention.layer_norm_rms_epsilon", 1e-5, float)
  config = LlamaConfig(head_dim, rope, epsilon, length)
  return config, heads, number("attention.head_count_kv", heads), number("block_count")
