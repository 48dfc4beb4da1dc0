"""torch: transformers' Llama over a StaticCache, dense or quantized by torch or torchao, eager or compiled.

Options: `form`, a key of `FORMS`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import Engine, Setting, rounds, serve


def _dynamic_int8(model: Any) -> Any:
  """int8 weights by row, activations to int8 by tensor as they come; the kernels are oneDNN's and FBGEMM's."""
  return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def _torchao(config: Callable[[], Any], dtype: torch.dtype) -> Callable[[Any], Any]:
  def quantize(model: Any) -> Any:
    from torchao.quantization import quantize_  # type: ignore

    model = model.to(dtype)
    quantize_(model, config())
    return model

  return quantize


def _torchao_int8() -> Any:
  """int8 weights by row, activations to int8 by token."""
  from torchao.quantization import Int8DynamicActivationInt8WeightConfig  # type: ignore

  return Int8DynamicActivationInt8WeightConfig()


def _torchao_int4() -> Any:
  """4-bit weights in groups of 32 with a zero, bfloat16 activations: the only int4 kernel of its wheel for a CPU."""
  from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig  # type: ignore

  return PrototypeInt4WeightOnlyConfig(group_size=32)


FORMS: dict[str, Callable[[Any], Any]] = {
  "float32": lambda model: model,
  "bfloat16": lambda model: model.to(torch.bfloat16),
  "dynamic-int8": _dynamic_int8,
  "torchao-int8": _torchao(_torchao_int8, torch.float32),
  "torchao-int8-compiled": lambda model: torch.compile(FORMS["torchao-int8"](model), dynamic=False),
  "torchao-int4": _torchao(_torchao_int4, torch.bfloat16),
}


class Transformer(Engine):
  """One model; the cache of each number of sequences is made when first asked for."""

  def __init__(self, setting: Setting):
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(setting.threads)
    source = Path(setting.source)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32).eval()
    # The head is a matrix of its own before it is quantized: the embedding stays as it is.
    model.lm_head = copy.deepcopy(model.lm_head)
    self.model = FORMS[setting.options["form"]](model)
    self.slots = setting.prefill + setting.decode
    self.caches: dict[int, Any] = {}
    config = self.model.config
    head = config.hidden_size // config.num_attention_heads
    libraries = ("torch", "transformers", "torchao")
    self.about = {
      "versions": {name: version(name) for name in libraries},
      "weight_bytes": sum(_nbytes(module) for module in self.model.modules()),
      "cache_bytes": 2 * config.num_hidden_layers * config.num_key_value_heads * head * self.model.dtype.itemsize,
    }

  def start(self, batch: int) -> None:
    from transformers import StaticCache

    if batch not in self.caches:
      self.caches[batch] = StaticCache(config=self.model.config, max_cache_len=self.slots)
    self.cache = self.caches[batch]
    self.rewind(0)

  def read(self, tokens: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
      ids = torch.from_numpy(tokens.astype(np.int64))
      logits = self.model(input_ids=ids, cache=self.cache, use_cache=True, logits_to_keep=1).logits
      return logits[:, -1].argmax(-1).numpy().astype(np.int32)

  def rewind(self, length: int) -> None:
    extra = int(self.cache.get_seq_length()) - length
    if extra > 0:
      self.cache.crop(-extra)


def _nbytes(module: Any) -> int:
  """Bytes of a linear's weight: what every token reads (of the embedding it reads a row)."""
  if isinstance(module, torch.nn.Linear):
    return sum(part.numel() * part.element_size() for part in _parts(module.weight))
  return module.weight().numel() if callable(getattr(module, "weight", None)) else 0  # quantized by torch: int8


def _parts(weight: Any) -> Iterator[torch.Tensor]:
  """The plain tensors that a tensor of torchao is made of."""
  if type(weight) in (torch.Tensor, torch.nn.Parameter):
    yield weight
    return
  names, _ = weight.__tensor_flatten__()
  for name in names:
    yield from _parts(getattr(weight, name))


def build(setting: Setting) -> tuple[dict[str, Any], dict[str, Any]]:
  engine = Transformer(setting)
  return engine.about, rounds(engine, setting)


if __name__ == "__main__":
  serve(build)
