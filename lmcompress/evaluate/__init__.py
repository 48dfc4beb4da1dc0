"""Evaluation: perplexity, sizes, latency and the article's measures, one number family each."""

from lmcompress.evaluate.measures import compression_efficiency, pruning_sensitivity, quantization_error, speedup
from lmcompress.evaluate.perplexity import Score, compare, perplexity
from lmcompress.evaluate.size import sizes

__all__ = [
  "Score",
  "compare",
  "compression_efficiency",
  "perplexity",
  "pruning_sensitivity",
  "quantization_error",
  "sizes",
  "speedup",
]
