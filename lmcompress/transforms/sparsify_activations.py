"""Sparse activations: inputs near zero are left out at run time, by a threshold that calibration finds."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from lmcompress.arrays import Threshold, with_act
from lmcompress.ops.observers import percentile
from lmcompress.transforms.combine import stagewise
from lmcompress.transforms.smooth_quant import fresh_input
from lmcompress.types import Transform


def sparsify_activations(sparsity: float = 0.4) -> Transform:
  """Sets the smallest inputs of each weight to zero (Liu et al. 2024, TEAL, arXiv:2408.14690).

  The weight becomes an `InputArray` whose act is a `Threshold`: the magnitude below which that share of its inputs
  lies on the calibration text, to a bin of 4.4 %. Decoding need not read the weights of an input that is zero.

  Args:
    sparsity: share of the inputs set to zero, from 0 to below 1; the same for all weights (TEAL's uniform form).

  Raises:
    ValueError: the share is out of range.
    WeightError (when planned): something is done to the weight's input already.
  """
  if not 0 <= sparsity < 1:
    raise ValueError(f"sparsify_activations(sparsity={sparsity}): a share from 0 to below 1")

  def wrap(weights: dict[str, Any], histogram: jax.Array) -> dict[str, Any]:
    limit = percentile(np.asarray(histogram, np.float64), 100 * sparsity) if sparsity else 0.0
    return {path: with_act(w, Threshold(limit), -2) for path, w in weights.items()}

  check = functools.partial(fresh_input, "sparsify_activations")
  return stagewise(wrap, name="sparsify_activations", needs=frozenset({"histogram"}), check=check)._replace(inputs=True)
