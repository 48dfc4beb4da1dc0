"""GGUF files of known architectures: metadata to a model, tensors to its tree."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lmcompress import tree
from lmcompress.data.tokenizer import Tokenizer
from lmcompress.io import gguf, names
from lmcompress.io.architectures import llama
from lmcompress.models import Llama, LlamaConfig, Rope
from lmcompress.types import FormatError, Params

_ROPE_FACTORS = "rope_freqs.weight"
_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"


def describe(path: Path) -> str:
  """What float32 weights read from the file are, e.g. `float32, dequantized from Q4_1`."""
  tensors = gguf.read_header(path).tensors.values()
  kinds = Counter[str]()
  for info in tensors:
    kinds[info.type.name] += int(np.prod(info.shape))
  kind = kinds.most_common(1)[0][0] if kinds else "F32"
  return "float32" if kind == "F32" else f"float32, dequantized from {kind}"


def load_gguf(path: Path, lazy: bool = False) -> tuple[Any, Params, Tokenizer]:
  """Model, float32 parameters and tokenizer of a GGUF file.

  Args:
    lazy: weights are read when they are used (`StoredArray`), norms and biases at once.

  Raises:
    FormatError: the file is damaged or its architecture is not known here.
  """
  header = gguf.read_header(path)
  kind = header.metadata.get("general.architecture")
  if kind not in KINDS:
    raise FormatError(f"{path}: architecture {str(kind)[:80]!r} is not known here; known are {', '.join(KINDS)}")
  data = _Metadata(header, str(kind))
  word, config = KINDS[kind](data)
  found = [name for name in header.tensors if name not in (_ROPE_FACTORS, _SHORT, _LONG)]
  heads = data.number("attention.head_count")
  kv_heads = data.number("attention.head_count_kv", heads)
  layers = {"": data.number("block_count")}
  if isinstance(config, LlamaConfig):
    model, known = Llama(config), llama.gguf_names(word, heads, kv_heads)
  else:
    told = {"model_type": word, **config}
    foreign = names.foreign()[word]
    model, known = foreign.read(told, path), foreign.names(told)
    if isinstance(foreign.depth, Mapping):
      layers = {stack: told[key] for stack, key in foreign.depth.items()}
  # norms are as they are, and linears [out, in], in every architecture
  theirs = [dataclasses.replace(name, offset=0.0, turned=True) for name in known]
  mapping = names.plan(theirs, "gguf", found, layers, str(path))
  gguf.require_decoders(header)
  pairs = {"q": heads, "k": kv_heads} if kind == "llama" else {}
  experts = data.number("expert_count", 1)
  for own, (_, tensor) in mapping.items():
    shape = header.tensors[tensor].shape
    if tree.in_mixture(own) and (len(shape) != 3 or shape[0] != experts):
      raise FormatError(f"{path}: tensor {tensor!r} is {list(shape)}; a matrix for each of {experts} is expected")
  sources = {own: source for at in mapping for own, source in _sources(header, at, *mapping[at], pairs).items()}

  def leaf(own: str) -> Any:
    name, read, shape = sources[own]
    return names.lazily(name, read, shape) if lazy and tree.is_weight(own) else name.read(read())

  with ThreadPoolExecutor(max_workers=2) as pool:  # NumPy's loops release the lock
    params = tree.unflatten(dict(zip(sources, pool.map(leaf, sources), strict=True)))
  names.check_shapes(model, params, str(path))
  rows, start = params["embed"]["table"].shape[0], getattr(model.config, "start", 0)
  if start >= rows:
    raise FormatError(f"{path}: {kind}.decoder_start_token_id is {start}, and the table has {rows} rows")
  return model, params, Tokenizer.from_gguf(header.metadata, str(path))


def _sources(
  header: gguf.Header, path: str, name: names.Name, tensor: str, pairs: Mapping[str, int]
) -> dict[str, tuple[names.Name, Callable[[], np.ndarray], tuple[int, ...]]]:
  """For each parameter of a tensor, its name, what reads its values as other formats have them, and their shape.

  A stack of experts is a parameter for each.
  """
  shape, part = header.tensors[tensor].shape, path.split("/")[-2]
  if tree.in_mixture(path):
    start, _, end = path.partition(f"/{tree.EXPERTS}/")
    return {
      f"{start}/{tree.EXPERTS}/{i}/{end}": (name, functools.partial(gguf.read_tensor, header, tensor, i), shape[1:])
      for i in range(shape[0])
    }
  if part in ("shared_gate", "types") and len(shape) == 1:
    shape = (1, *shape)  # files leave out an axis of one
  heads = pairs.get(part)
  if heads is not None and shape[0] % (2 * heads):
    raise FormatError(f"{header.path}: {path} has {shape[0]} rows, which {heads} heads do not divide")

  def read() -> np.ndarray:
    array = gguf.read_tensor(header, tensor).reshape(shape)
    return array if heads is None else unpermute(array, heads)

  return {path: (name, read, shape)}


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
  """Rows of q and k from GGUF's order (pairs of a rotation side by side) to halves of each head."""
  return array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


class _Metadata:
  """The numbers of a file, by their keys after the architecture's word."""

  def __init__(self, header: gguf.Header, kind: str):
    self.header, self.kind, self.where = header, kind, header.path

  def number(self, key: str, default: Any = None, kind: type = int) -> Any:
    """A positive number, `default` where the file does not say.

    Raises:
      FormatError: it is none, or is missing without a default.
    """
    value = self.header.metadata.get(f"{self.kind}.{key}", default)
    if (
      isinstance(value, bool)
      or not isinstance(value, (int, float))
      or not value > 0
      or (kind is int and not isinstance(value, int))
    ):
      raise FormatError(
        f"{self.where}: {self.kind}.{key} is {str(value)[:80]!r}; a positive {kind.__name__} is needed"
      )
    return kind(value)

  def factors(self, name: str, count: int) -> tuple[float, ...]:
    """A tensor of what divides each frequency; nothing where the file has none.

    Raises:
      FormatError: there are more or fewer, or one is not positive.
    """
    if name not in self.header.tensors:
      return ()
    found = tuple(float(f) for f in gguf.read_tensor(self.header, name).ravel())
    if len(found) != count or not all(0 < f < float("inf") for f in found):
      raise FormatError(f"{self.where}: {name} holds {len(found)} factors, {count} positive ones expected")
    return found

  @property
  def head_dim(self) -> int:
    """The width of a head."""
    return self.number("attention.key_length", self.number("embedding_length") // self.number("attention.head_count"))


def _llama(data: _Metadata, word: str = "llama") -> tuple[str, LlamaConfig]:
  """Llama, and what differs from it by names alone."""
  header, where, head_dim = data.header, data.where, data.head_dim
  if data.number("rope.dimension_count", head_dim) != head_dim or head_dim % 2:
    raise FormatError(f"{where}: rotations over a part of the head ({head_dim}) are not known here")
  factors, long = (data.factors(name, head_dim // 2) for name in (_ROPE_FACTORS, _LONG))
  scaling = header.metadata.get(f"{data.kind}.rope.scaling.type", "none")
  if scaling not in ("none", "linear", "yarn", "longrope"):
    known = "known are none, linear, yarn, longrope"
    raise FormatError(f"{where}: {data.kind}.rope.scaling.type {str(scaling)[:80]!r} is not known here; {known}")
  length = data.number("context_length", 2048)
  rope = Rope(
    theta=data.number("rope.freq_base", 10000.0, float),
    kind="default" if scaling == "none" else scaling,
    factor=data.number("rope.scaling.factor", 1.0, float),
    original_length=data.number("rope.scaling.original_context_length", length),
    high=32.0 if scaling == "yarn" else 4.0,
    factors=factors,
  )
  if long:  # the type is not said where such factors are
    rope = dataclasses.replace(
      rope, kind="longrope", factor=length / rope.original_length, factors=data.factors(_SHORT, head_dim // 2),
      long=long, attention_factor=data.number("rope.scaling.attn_factor", 1.0, float),
    )  # fmt: skip
    if not rope.factors or rope.original_length < 2:
      raise FormatError(f"{where}: {_LONG} is there without {_SHORT} or a first length above 1")
  elif scaling == "longrope":
    raise FormatError(f"{where}: {data.kind}.rope.scaling.type is longrope, and there is no tensor {_LONG}")
  config = LlamaConfig(head_dim, rope, data.number("attention.layer_norm_rms_epsilon", 1e-5, float), length)
  if word == "phi3" and header.metadata.get(f"{data.kind}.attention.sliding_window"):  # 0 where there is none
    config = dataclasses.replace(config, window=data.number("attention.sliding_window"))
  if f"{data.kind}.expert_count" not in header.metadata:
    return word, config
  count, chosen = data.number("expert_count"), data.number("expert_used_count")
  if chosen > count:
    raise FormatError(f"{where}: {data.kind}.expert_used_count is {chosen}, and there are {count} experts")
  normal = word != "qwen2_moe"  # llama.cpp's own rule
  word = "mixtral" if word == "llama" else word
  return word, dataclasses.replace(config, experts_per_token=chosen, normalize_experts=normal)


def _bert(data: _Metadata) -> tuple[str, dict[str, Any]]:
  """BERT and what llama.cpp writes as one: a RoBERTa without the positions of its padding, a DistilBERT."""
  embed, heads = data.number("embedding_length"), data.number("attention.head_count")
  length, distil = data.number("context_length"), "token_types.weight" not in data.header.tensors
  if distil:
    return "distilbert", {"dim": embed, "n_heads": heads, "max_position_embeddings": length}
  return "bert", {
    "hidden_size": embed, "num_attention_heads": heads, "max_position_embeddings": length,
    "layer_norm_eps": data.number("attention.layer_norm_epsilon", 1e-12, float),
  }  # fmt: skip


def _t5(data: _Metadata) -> tuple[str, dict[str, Any]]:
  """T5; which activation and whether states are scaled follows from its gates and its head, as in llama.cpp."""
  tensors, layers = data.header.tensors, data.number("block_count")
  return "t5", {
    "d_kv": data.number("attention.key_length"), "num_layers": layers,
    "num_decoder_layers": data.number("decoder_block_count", layers),
    "layer_norm_epsilon": data.number("attention.layer_norm_rms_epsilon", 1e-6, float),
    "feed_forward_proj": "gated-gelu" if "enc.blk.0.ffn_gate.weight" in tensors else "relu",
    "tie_word_embeddings": "output.weight" not in tensors,
    "decoder_start_token_id": data.header.metadata.get("t5.decoder_start_token_id", 0),
  }  # fmt: skip


def _gpt2(data: _Metadata) -> tuple[str, dict[str, Any]]:
  return "gpt2", {
    "n_embd": data.number("embedding_length"), "n_head": data.number("attention.head_count"),
    "n_positions": data.number("context_length"),
    "layer_norm_epsilon": data.number("attention.layer_norm_epsilon", 1e-5, float),
  }  # fmt: skip


def _phi(data: _Metadata) -> tuple[str, dict[str, Any]]:
  head = data.head_dim
  return "phi", {
    "hidden_size": data.number("embedding_length"), "num_attention_heads": data.number("attention.head_count"),
    "max_position_embeddings": data.number("context_length"),
    "rope_theta": data.number("rope.freq_base", 10000.0, float),
    "partial_rotary_factor": data.number("rope.dimension_count", head) / head,
    "layer_norm_eps": data.number("attention.layer_norm_epsilon", 1e-5, float),
  }  # fmt: skip


def _gemma(data: _Metadata, word: str) -> tuple[str, dict[str, Any]]:
  """Gemma; which layers see all, and the largest models' scale of queries, are llama.cpp's own rules."""
  told, layers, head = data.header.metadata, data.number("block_count"), data.head_dim
  embed, heads = data.number("embedding_length"), data.number("attention.head_count")
  largest = layers == {"gemma2": 46, "gemma3_text": 62}.get(word)
  theta = data.number("rope.freq_base", 1e6 if word == "gemma3_text" else 1e4, float)
  config: dict[str, Any] = {
    "model_type": word, "head_dim": head, "num_hidden_layers": layers, "rope_theta": theta,
    "max_position_embeddings": data.number("context_length"),
    "query_pre_attn_scalar": embed / heads if largest else head,
    "rms_norm_eps": data.number("attention.layer_norm_rms_epsilon", 1e-6, float),
  }  # fmt: skip
  if word == "gemma":
    return word, config
  config["sliding_window"] = data.number("attention.sliding_window", 4096 if word == "gemma2" else 1024)
  if word == "gemma2":
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return word, config | {key: data.number(key, default, float) for key, default in caps.items()}
  if f"{data.kind}.rope.scaling.factor" in told:
    factor = data.number("rope.scaling.factor", 1.0, float)
    config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
  return word, config


KINDS: dict[str, Callable[[_Metadata], tuple[str, Any]]] = {
  "llama": _llama,
  "qwen2": functools.partial(_llama, word="qwen2"),
  "qwen3": functools.partial(_llama, word="qwen3"),
  "qwen2moe": functools.partial(_llama, word="qwen2_moe"),
  "qwen3moe": functools.partial(_llama, word="qwen3_moe"),
  "bert": _bert,
  "t5": _t5,
  "gpt2": _gpt2,
  "phi2": _phi,
  "phi3": functools.partial(_llama, word="phi3"),
  "gemma": functools.partial(_gemma, word="gemma"),
  "gemma2": functools.partial(_gemma, word="gemma2"),
  "gemma3": functools.partial(_gemma, word="gemma3_text"),
}
"""By the file's word: metadata to the word of `config.json` and a config as that would say it, or Llama's own."""
