"""The article's measures: quantization error, pruning sensitivity, compression efficiency, speedup."""

from __future__ import annotations

from typing import Any

import numpy as np


def quantization_error(x: Any, quantized: Any) -> Any:
  """`|x - quantized|`, elementwise.

  The article's example, a value rounded to a step of 0.1:

  >>> round(float(quantization_error(3.14, 3.1)), 10)
  0.04
  """
  return np.abs(np.asarray(x, np.float64) - np.asarray(quantized, np.float64))


def pruning_sensitivity(w: Any, pruned: Any) -> float:
  """`||w - pruned|| / ||w||`: how much of a weight's norm pruning moves.

  The article's example is 1 / sqrt(14), which rounds to 0.267 (the article cuts it to 0.26):

  >>> round(pruning_sensitivity([1, 2, 3], [0, 2, 3]), 3)
  0.267
  """
  w, pruned = np.asarray(w, np.float64), np.asarray(pruned, np.float64)
  norm = float(np.linalg.norm(w))
  if norm == 0:
    raise ValueError("pruning_sensitivity: the weight is all zeros, its norm cannot be divided by")
  return float(np.linalg.norm(w - pruned)) / norm


def compression_efficiency(original_size: float, compressed_size: float) -> float:
  """`(original - compressed) / original`, sizes in the same unit.

  The article's example, 100 MB to 50 MB:

  >>> compression_efficiency(100, 50)
  0.5
  """
  if original_size <= 0 or compressed_size < 0:
    raise ValueError(f"compression_efficiency({original_size}, {compressed_size}): sizes are positive")
  return (original_size - compressed_size) / original_size


def speedup(single: float, distributed: float) -> float:
  """`T_single / T_distributed`, times in the same unit.

  The article's example, 100 h to 50 h:

  >>> speedup(100, 50)
  2.0
  """
  if single <= 0 or distributed <= 0:
    raise ValueError(f"speedup({single}, {distributed}): times are positive")
  return single / distributed
