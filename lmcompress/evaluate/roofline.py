"""Roofline: the bytes that a step must read, the arithmetic that it must do, and the time that these bound it to.

Everything here is a count from a tree and a cache, after Williams et al. 2009 (doi:10.1145/1498765.1498785): no
program runs faster than `max(bytes / bandwidth, operations / peak)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lmcompress import tree
from lmcompress.arrays import BitmapArray, InputArray, LowRankArray, NMSparseArray
from lmcompress.arrays.tiled import TiledArray
from lmcompress.types import Params


class Work(NamedTuple):
  """What a piece of work takes at least.

  Attributes:
    tokens: tokens that come of it, over the batch.
    operations: multiply-adds times 2.
    weight_bytes: bytes of weights, norms and biases that are read.
    kv_bytes: bytes of keys and values that are read and written.
  """

  tokens: int
  operations: float
  weight_bytes: float
  kv_bytes: float

  @property
  def nbytes(self) -> float:
    return self.weight_bytes + self.kv_bytes

  @property
  def intensity(self) -> float:
    """Operations a byte."""
    return self.operations / self.nbytes


def decode_work(params: Params, *, batch: int, depth: float, slot_bytes: float, chosen: int = 1) -> Work:
  """One decode step of `batch` sequences that each see `depth` tokens, their own included.

  Weights are read once for the whole batch; of a mixture those of the experts that the batch goes to in the mean, if
  all are as likely and each token goes to `chosen`. A token's keys and values are written once, and read with the
  others.
  """
  rows, body, head = _weights(params, chosen, batch)
  operations = 2.0 * batch * (body.multiply_adds + head.multiply_adds + 2 * _attended(params) * depth)
  weights = body.nbytes + head.nbytes + batch * rows
  return Work(batch, operations, weights, batch * slot_bytes * (depth + 1))


def prefill_work(
  params: Params, *, batch: int, length: int, slot_bytes: float, piece: int = 512, chosen: int = 1
) -> Work:
  """Reading prompts of `length` tokens into an empty cache, `piece` tokens at once.

  Each piece reads the weights once, the head included (which sees one row of each sequence), and the keys and
  values of all tokens up to its end.
  """
  rows, body, head = _weights(params, chosen, batch * min(piece, length))
  ends = [min(begin + piece, length) for begin in range(0, length, piece)]
  pairs = length * (length + 1) / 2  # a query and a key that it sees
  operations = (
    2.0 * batch * (body.multiply_adds * length + head.multiply_adds * len(ends) + 2 * _attended(params) * pairs)
  )
  weights = len(ends) * (body.nbytes + head.nbytes) + batch * length * rows
  return Work(batch * length, operations, weights, batch * slot_bytes * (length + sum(ends)))


def slot_bytes(cache: Any) -> float:
  """Bytes of keys, values and their scales that one token takes over all layers."""
  batch, slots = cache.real.shape
  return sum(x.size * x.dtype.itemsize for layer in cache.layers.values() for x in layer.per_slot) / (batch * slots)


def bound_s(work: Work, bandwidth: float, peak: float) -> float:
  """The least seconds that the work takes at `bandwidth` bytes and `peak` operations a second."""
  return max(work.nbytes / bandwidth, work.operations / peak)


def attainable(intensity: float, bandwidth: float, peak: float) -> float:
  """Operations a second that a program of that many operations a byte reaches at most."""
  return min(peak, intensity * bandwidth)


class _Count(NamedTuple):
  nbytes: float = 0
  multiply_adds: float = 0


def share(leaves: Mapping[str, Any], path: str, chosen: int) -> float:
  """The share of tokens that a weight is multiplied with: less than 1 for an expert's, or a stack's of them.

  Args:
    leaves: of the whole tree, by path.
    chosen: how many experts a token goes to.
  """
  if not tree.in_mixture(path):
    return 1.0
  before, _, after = path.partition(f"/{tree.EXPERTS}/")
  number, _, name = after.partition("/")
  if not number.isdigit():
    return min(1.0, chosen / leaves[path].shape[0])
  start, end = f"{before}/{tree.EXPERTS}/", f"/{name}"
  count = sum(p.startswith(start) and p.endswith(end) and p[len(start) : -len(end)].isdigit() for p in leaves)
  return min(1.0, chosen / count)


def _weights(params: Params, chosen: int, tokens: int) -> tuple[float, _Count, _Count]:
  """Bytes of an embedding's row, what the layers read, and what the head reads.

  A table that is the head too is read whole as the head, and its gathered rows are not counted again.
  """
  leaves = tree.flatten(params)
  head = "head/table" if "head/table" in leaves else "embed/table"
  rows, body = 0.0, _Count()
  for path, leaf in leaves.items():
    if path == head:
      continue
    if path.endswith("/table"):  # rows of it are gathered
      rows += leaf_bytes(leaf) / leaf.shape[-2]
    else:
      part = share(leaves, path, chosen)
      adds = part * multiply_adds(leaf) if tree.is_weight(path) else 0
      read = leaf_bytes(leaf) * (1 - (1 - part) ** tokens)
      body = _Count(body.nbytes + read, body.multiply_adds + adds)
  return rows, body, _Count(leaf_bytes(leaves[head]), multiply_adds(leaves[head]))


def leaf_bytes(leaf: Any) -> int:
  """Bytes of the arrays that a leaf holds, padding of a layout included."""
  return sum(x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(leaf))


def multiply_adds(leaf: Any) -> float:
  """Multiply-adds for one row of the input: the weights there are; those that a sparse form leaves out are none."""
  if isinstance(leaf, InputArray):
    return multiply_adds(leaf.weight)
  if isinstance(leaf, LowRankArray):
    return multiply_adds(leaf.left) + multiply_adds(leaf.right)
  if isinstance(leaf, TiledArray) and leaf.form.codes == "n_of_m":
    return leaf.size * leaf.form.n / leaf.form.m
  if isinstance(leaf, TiledArray) and leaf.form.codes == "bitmap":
    return leaf.codes.size
  if isinstance(leaf, NMSparseArray):
    return leaf.size * leaf.n / leaf.m
  if isinstance(leaf, BitmapArray):
    return leaf.values.size
  return leaf.size


def _attended(params: Params) -> int:
  """Outputs of the query projections over all layers: what meets a key, and then a value, of each token seen."""
  return sum(leaf.shape[-1] for path, leaf in tree.weights(params).items() if path.endswith("attn/q/kernel"))
