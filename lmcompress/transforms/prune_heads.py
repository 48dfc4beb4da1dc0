"""Removing attention heads: groups of queries with their key and value, or queries of each group."""

from __future__ import annotations

import functools
from typing import Literal

from lmcompress.transforms.prune_entries import Score, prune_entries
from lmcompress.transforms.structure import head_axes
from lmcompress.types import Transform


def prune_heads(
  fraction: float | None = None,
  count: int | None = None,
  what: Literal["groups", "queries"] = "groups",
  score: Score = "activation",
  scope: Literal["block", "global"] = "block",
  compensate: bool = True,
  axis: str | None = None,
) -> Transform:
  """Removes attention heads: whole groups of queries with their key and value, or as many queries of each group.

  Scores and compensation as for `prune_neurons`: a head's `activation` is the energy of what it adds to the output,
  `tr(W_o^T E[x x^T] W_o)` over its inputs (Michel et al. 2019, arXiv:1905.10650, ask the same of the loss).

  Args:
    fraction: of the groups of each block (of the queries of each group), rounded; with `scope="global"` of all. Or:
    count: groups of each block, or queries of each group.
    what: `groups`, or `queries`, where several of them share a key and value.
    score, scope, compensate: as in `prune_neurons`; queries are as many in each group, so their scope is `block`.
    axis: the logical axis, where the structure does not tell.

  Raises:
    ValueError: not exactly one of fraction and count, or out of range.
    WeightError: the axis is not there, a weight is compressed or not selected, none would be left, or
      a fraction is less than half of one.
  """
  if what not in ("groups", "queries"):
    raise ValueError(f"prune_heads(what={what!r}): groups or queries")
  if what == "queries" and scope == "global":
    raise ValueError("prune_heads(what='queries', scope='global'): each group keeps as many queries; use scope='block'")

  find = functools.partial(head_axes, depth=0 if what == "groups" else 1)
  return prune_entries(
    "prune_heads", what, find, axis=axis, fraction=fraction, count=count, score=score, scope=scope,
    compensate=compensate,
  )  # fmt: skip
