"""Inputs that are rounded while a model trains: the range of each linear's input is learned."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from lmcompress.arrays import learned_input
from lmcompress.ops.observers import percentile as limit_of
from lmcompress.transforms.combine import stagewise
from lmcompress.transforms.smooth_quant import fresh_input
from lmcompress.types import Transform


def fake_quantize_inputs(bits: int = 8, percentile: float = 99.99) -> Transform:
  """Rounds the input of each weight by a step that trains (LSQ, arXiv:1902.08153; PACT's clipping, arXiv:1805.06085).

  The weight becomes a `LearnedInputArray`; train its step alone with the pattern `**/step`. `freeze` fixes the steps,
  and the inputs are then rounded as `quantize_inputs(activations="int8_static")` rounds them. `fake_quantize` after it
  lets the weights learn, too.

  Args:
    bits: width of an input's code, 2 to 8, with a sign.
    percentile: share of the inputs' magnitudes that the range covers before it learns, 50 to 100.

  Raises:
    ValueError: an argument is out of range.
    WeightError (when planned): an input is rounded already.
  """
  if not 2 <= bits <= 8 or not 50 <= percentile <= 100:
    raise ValueError(f"fake_quantize_inputs(bits={bits}, percentile={percentile}): from 2 to 8; from 50 to 100")

  def wrap(weights: dict[str, Any], histogram: jax.Array) -> dict[str, Any]:
    step = limit_of(np.asarray(histogram, np.float64), percentile) / (2 ** (bits - 1) - 1)
    return {path: learned_input(w, step, bits, -2) for path, w in weights.items()}

  check = functools.partial(fresh_input, "fake_quantize_inputs")
  return stagewise(wrap, name="fake_quantize_inputs", needs=frozenset({"histogram"}), check=check)._replace(inputs=True)
