"""Removing hidden neurons: columns of what writes them and rows of what reads them."""

from __future__ import annotations

from typing import Literal

from lmcompress.transforms.prune_entries import Score, prune_entries
from lmcompress.transforms.structure import neuron_axes
from lmcompress.types import Transform


def prune_neurons(
  fraction: float | None = None,
  count: int | None = None,
  score: Score = "activation",
  scope: Literal["block", "global"] = "block",
  compensate: bool = True,
  axis: str | None = None,
) -> Transform:
  """Removes hidden neurons of the feed-forward parts: columns of what writes them and rows of what reads them.

  The model gets smaller arrays, and runs as any other. Scores of a neuron: `activation` is the energy of what it adds
  to the output on calibration tokens, `E[h**2] ||w||**2`; `magnitude` the squares of its weights; `taylor` what the
  loss changes to first order when it goes, `(sum g w)**2`; `gradient` `sum |g w|` (Molchanov et al. 2019,
  arXiv:1906.10771).

  Args:
    fraction: of the neurons of each block (or of all, with `scope="global"`), rounded. Or:
    count: neurons of each block.
    score: which go first.
    scope: `global` ranks all blocks' neurons together, by their share of the block's score, so that widths differ.
    compensate: the weights that read what stays are moved to the least squares solution for what went (Frantar and
      Alistarh 2022, arXiv:2208.11580); needs calibration tokens.
    axis: the logical axis, where the model has more than one that is not within heads.

  Raises:
    ValueError: not exactly one of fraction and count, or out of range.
    WeightError: the axis is not there, a weight is compressed or not selected, none would be left, or
      a fraction is less than half of one.
  """

  return prune_entries(
    "prune_neurons", "neurons", neuron_axes, axis=axis, fraction=fraction, count=count, score=score, scope=scope,
    compensate=compensate,
  )  # fmt: skip
