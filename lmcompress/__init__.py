"""Compression of language models as composable transformations of a parameter tree."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
  "ConfigError",
  "FormatError",
  "LmcompressError",
  "SourceError",
  "WeightError",
  "alps",
  "any_precision",
  "at",
  "at_precision",
  "awq",
  "awq_scale",
  "backends",
  "chain",
  "compress",
  "dora",
  "fake_quantize",
  "fake_quantize_inputs",
  "fit",
  "freeze",
  "generate",
  "gptq",
  "gradient",
  "hard_concrete",
  "hqq",
  "kmeans",
  "l0",
  "leafwise",
  "learned_rounding",
  "llm_int8",
  "load",
  "lora",
  "low_rank_residual",
  "magnitude",
  "merge",
  "mixed_precision",
  "movement",
  "named_chain",
  "partition",
  "perplexity",
  "prepare",
  "product_quantize",
  "prune_gradually",
  "prune_heads",
  "prune_layers",
  "prune_neurons",
  "prune_width",
  "quantize_activations",
  "quantize_inputs",
  "quip_sharp",
  "remove_closed",
  "rigl",
  "rotate",
  "round_to_nearest",
  "save",
  "scheduled",
  "sensitivity",
  "share",
  "shrink",
  "smooth",
  "smooth_quant",
  "sparse_code",
  "sparse_gpt",
  "sparsify_activations",
  "summary",
  "tie_layers",
  "truncated_svd",
  "use_backend",
  "wanda",
]

_HOMES = {
  **dict.fromkeys(__all__, "lmcompress.transforms"),  # methods and combinators; the others:
  "load": "lmcompress.io.load",
  "save": "lmcompress.io.checkpoint",
  "compress": "lmcompress.calibration.compress",
  "fit": "lmcompress.training",
  "generate": "lmcompress.generation.generate",
  "perplexity": "lmcompress.evaluate.perplexity",
  "summary": "lmcompress.leaf_table",
  **dict.fromkeys(("backends", "prepare", "use_backend"), "lmcompress.ops"),
  **dict.fromkeys(("FormatError", "ConfigError", "SourceError", "WeightError", "LmcompressError"), "lmcompress.errors"),
}

if TYPE_CHECKING:
  from lmcompress.calibration.compress import compress
  from lmcompress.errors import ConfigError, FormatError, LmcompressError, SourceError, WeightError
  from lmcompress.evaluate.perplexity import perplexity
  from lmcompress.generation.generate import generate
  from lmcompress.io.checkpoint import save
  from lmcompress.io.load import load
  from lmcompress.leaf_table import summary
  from lmcompress.ops import backends, prepare, use_backend
  from lmcompress.training import fit
  from lmcompress.transforms import (
    alps,
    any_precision,
    at,
    at_precision,
    awq,
    awq_scale,
    chain,
    dora,
    fake_quantize,
    fake_quantize_inputs,
    freeze,
    gptq,
    gradient,
    hard_concrete,
    hqq,
    kmeans,
    l0,
    leafwise,
    learned_rounding,
    llm_int8,
    lora,
    low_rank_residual,
    magnitude,
    merge,
    mixed_precision,
    movement,
    named_chain,
    partition,
    product_quantize,
    prune_gradually,
    prune_heads,
    prune_layers,
    prune_neurons,
    prune_width,
    quantize_activations,
    quantize_inputs,
    quip_sharp,
    remove_closed,
    rigl,
    rotate,
    round_to_nearest,
    scheduled,
    sensitivity,
    share,
    shrink,
    smooth,
    smooth_quant,
    sparse_code,
    sparse_gpt,
    sparsify_activations,
    tie_layers,
    truncated_svd,
    wanda,
  )


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
