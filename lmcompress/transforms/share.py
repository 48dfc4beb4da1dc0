"""Weight sharing across the whole model: one set of representatives for all weights, and layers that share weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.arrays import MaskedArray, QuantizedArray, added, clustered, outliers, parts
from lmcompress.arrays.shared import SHARED, SharedRef, refer
from lmcompress.ops.kmeans import DISTINCT, nearest, optimal
from lmcompress.transforms.combine import require_dense
from lmcompress.types import CompressedArray, Evidence, Params, State, Transform, WeightError

CODEBOOK = f"{SHARED}/codebook"


def share(
  values: int = 256,
  threshold: float | None = None,
  codebook_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> Transform:
  """Replaces each weight by the closest of a few values that the whole model shares.

  The article's loop: `weight = find_closest_weight_in_model(W, weight)`. The values are the optimum of one-dimensional
  k-means over all selected weights (told apart to 1/32768 of their range), lie once under `shared/`, and every
  `ClusteredArray` refers to them: they are counted, saved, sharded and differentiated once. Weights that are 0 stay 0
  where a mask or a code says so. Quantized weights are shared by the values that they stand for, and their scales go.

  Args:
    values: how many, 2 to 256.
    threshold: a weight farther from its closest value than this stays what it is, kept apart; None replaces all.
    codebook_dtype: storage of the shared values.

  Raises:
    ValueError: an argument is out of range.
    WeightError (when planned): a weight that is stored in a way which has no values of its own, NaN or infinity.
  """
  if not 2 <= values <= 256 or not (threshold is None or threshold >= 0):
    raise ValueError(f"share(values={values}, threshold={threshold}): values are 2 to 256, a threshold is not negative")

  def init(params: Params, selected: frozenset[str] | None = None) -> State:
    chosen = tree.default_selection(params) if selected is None else selected
    if tree.get(params, CODEBOOK) is not None:
      raise WeightError(f"share: {CODEBOOK} is there already; share all weights at once")
    for path, leaf in tree.weights(params).items():
      inner = leaf.values if isinstance(leaf, MaskedArray) else leaf
      if path in chosen and not isinstance(inner, QuantizedArray):
        require_dense("share", path, leaf)
    return ()

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    chosen = tree.default_selection(params) if evidence.selected is None else evidence.selected
    found = {path: leaf for path, leaf in tree.weights(params).items() if path in chosen}
    zeros = any(isinstance(leaf, CompressedArray) for leaf in found.values())
    book = representatives(list(found.values()), values, zeros).astype(codebook_dtype)
    reference = refer(CODEBOOK, book)

    def replace(path: str, leaf: Any) -> Any:
      return _shared(leaf, book, reference, threshold, tree.contraction_axis(path), (values - 1).bit_length())

    return tree.put(tree.map_weights(replace, params, chosen), CODEBOOK, book), state

  return Transform(init, apply, scope="model", name="share")


def representatives(leaves: Sequence[Any], values: int, zero: bool) -> jax.Array:
  """float32 `[values]`, ascending: the least squared error over all weights of several arrays; with 0 among them."""
  dense = [parts.materialize(leaf) for leaf in leaves]
  low = float(min(jnp.min(w) for w in dense))
  high = float(max(jnp.max(w) for w in dense))
  width = max(high - low, 1e-30) / DISTINCT
  count, total = np.zeros(DISTINCT), np.zeros(DISTINCT)
  for w in dense:
    x = np.asarray(w, np.float64).ravel()
    x = x[x != 0] if zero else x
    cell = np.clip(((x - low) / width).astype(np.int64), 0, DISTINCT - 1)
    count += np.bincount(cell, minlength=DISTINCT)
    total += np.bincount(cell, x, DISTINCT)
  used = count > 0
  if not used.any():
    return jnp.zeros(values)
  points = (total[used] / count[used])[None]
  found = optimal(points, count[used][None], values - zero)[0]
  return jnp.sort(jnp.asarray([*found, 0.0] if zero else found, jnp.float32))


def _shared(leaf: Any, book: jax.Array, reference: SharedRef, threshold: float | None, axis: int, bits: int) -> Any:
  w = parts.materialize(leaf).astype(jnp.float32)
  codes = nearest(w.reshape(1, -1), book.astype(jnp.float32)[None])[0].reshape(w.shape)
  stored = clustered(codes, book, bits, axis, leaf.dtype)
  far, few = _far(w, stored.materialize(), threshold, axis)
  base = type(stored)(stored.codes, reference, stored.dtype)  # type: ignore[arg-type]
  if not few:
    return base
  return added(base, outliers(w - stored.materialize().astype(jnp.float32), far, few, axis, jnp.float32), axis)


def _far(w: jax.Array, near: jax.Array, threshold: float | None, axis: int) -> tuple[jax.Array, int]:
  """Distances above the threshold, 0 elsewhere, and the most of them in an output."""
  if threshold is None:
    return jnp.zeros(()), 0
  distance = jnp.abs(w - near.astype(jnp.float32))
  far = jnp.where(distance > threshold, distance, 0.0)
  return far, int(jnp.max(jnp.sum(far > 0, axis=axis)))
