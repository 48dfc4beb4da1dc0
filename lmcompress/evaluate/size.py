"""Sizes: parameters, bits per weight and bytes, counted and as stored."""

from __future__ import annotations

from typing import Any

import numpy as np

from lmcompress import tree
from lmcompress.arrays.shared import SharedRef
from lmcompress.arrays.stored import StoredArray
from lmcompress.types import CompressedArray, Params


def sizes(params: Params) -> dict[str, float]:
  """`parameters`, `nbits` (all leaves, as stored) and `bits_per_weight` (over kernels and tables)."""
  leaves = tree.flatten(params)
  weights = {path: leaf for path, leaf in leaves.items() if tree.is_weight(path)}
  count = sum(leaf.size for leaf in weights.values())
  return {
    "parameters": sum(leaf.size for leaf in leaves.values() if not isinstance(leaf, SharedRef)),
    "nbits": sum(tree.leaf_nbits(leaf) for leaf in leaves.values()),
    "bits_per_weight": sum(tree.leaf_nbits(leaf) for leaf in weights.values()) / max(1, count),
    "bytes_in_memory": bytes_in_memory(params),
  }


def bytes_in_memory(params: Params) -> int:
  """Bytes of the arrays that the tree holds in memory, each buffer once; what lies in files is not among them."""
  import jax

  held = [x for x in jax.tree.leaves(params) if not isinstance(x, StoredArray)]
  seen = {id(x): x.size * np.dtype(x.dtype).itemsize for x in held}
  return sum(seen.values())


def kind(leaf: Any) -> str:
  """How a leaf is stored, in a word or two."""
  return leaf.kind if isinstance(leaf, CompressedArray) else str(leaf.dtype)
