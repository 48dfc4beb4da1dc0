"""Compression of language models as composable transformations of a parameter tree."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
  "load": "lmcompress.io.load",
  "save": "lmcompress.io.checkpoint",
  "compress": "lmcompress.calibration.compress",
  "generate": "lmcompress.generation.generate",
  "perplexity": "lmcompress.evaluate.perplexity",
  "summary": "lmcompress.summary",
  **dict.fromkeys(("backends", "prepare", "use_backend"), "lmcompress.ops"),
  **dict.fromkeys(
    ("at", "chain", "leafwise", "named_chain", "partition", "scheduled"), "lmcompress.transforms.combine"
  ),
  **dict.fromkeys(("any_precision", "at_precision"), "lmcompress.transforms.any_precision"),
  **dict.fromkeys(("awq", "awq_scale"), "lmcompress.transforms.awq"),
  "freeze": "lmcompress.transforms.freeze",
  "gptq": "lmcompress.transforms.gptq",
  "hqq": "lmcompress.transforms.hqq",
  "learned_rounding": "lmcompress.transforms.learned_rounding",
  "llm_int8": "lmcompress.transforms.llm_int8",
  "magnitude": "lmcompress.transforms.magnitude",
  "mixed_precision": "lmcompress.transforms.mixed_precision",
  "quip_sharp": "lmcompress.transforms.quip_sharp",
  "rotate": "lmcompress.transforms.rotate",
  "round_to_nearest": "lmcompress.transforms.round_to_nearest",
  **dict.fromkeys(
    ("quantize_activations", "quantize_inputs", "smooth", "smooth_quant"), "lmcompress.transforms.smooth_quant"
  ),
  **dict.fromkeys(("FormatError", "ConfigError", "SourceError", "WeightError", "LmcompressError"), "lmcompress.errors"),
}

if TYPE_CHECKING:
  from lmcompress.calibration.compress import compress
  from lmcompress.errors import ConfigError, FormatError, LmcompressError, SourceError, WeightError
  from lmcompress.evaluate.perplexity import perplexity
  from lmcompress.generation.generate import generate
  from lmcompress.io.checkpoint import save
  from lmcompress.io.load import load
  from lmcompress.ops import backends, prepare, use_backend
  from lmcompress.summary import summary
  from lmcompress.transforms.any_precision import any_precision, at_precision
  from lmcompress.transforms.awq import awq, awq_scale
  from lmcompress.transforms.combine import at, chain, leafwise, named_chain, partition, scheduled
  from lmcompress.transforms.freeze import freeze
  from lmcompress.transforms.gptq import gptq
  from lmcompress.transforms.hqq import hqq
  from lmcompress.transforms.learned_rounding import learned_rounding
  from lmcompress.transforms.llm_int8 import llm_int8
  from lmcompress.transforms.magnitude import magnitude
  from lmcompress.transforms.mixed_precision import mixed_precision
  from lmcompress.transforms.quip_sharp import quip_sharp
  from lmcompress.transforms.rotate import rotate
  from lmcompress.transforms.round_to_nearest import round_to_nearest
  from lmcompress.transforms.smooth_quant import quantize_activations, quantize_inputs, smooth, smooth_quant

__all__ = [
  "ConfigError",
  "FormatError",
  "LmcompressError",
  "SourceError",
  "WeightError",
  "any_precision",
  "at",
  "at_precision",
  "awq",
  "awq_scale",
  "backends",
  "chain",
  "compress",
  "freeze",
  "generate",
  "gptq",
  "hqq",
  "leafwise",
  "learned_rounding",
  "llm_int8",
  "load",
  "magnitude",
  "mixed_precision",
  "named_chain",
  "partition",
  "perplexity",
  "prepare",
  "quantize_activations",
  "quantize_inputs",
  "quip_sharp",
  "rotate",
  "round_to_nearest",
  "save",
  "scheduled",
  "smooth",
  "smooth_quant",
  "summary",
  "use_backend",
]


def __getattr__(name: str) -> Any:
  """Names are fetched from their home at first use, so that importing the package is cheap."""
  home = _HOMES.get(name)
  if home is None:
    raise AttributeError(f"module 'lmcompress' has no attribute {name!r}")
  value = getattr(importlib.import_module(home), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted([*globals(), *_HOMES])
