"""Weight clustering: every weight becomes the nearest of a few shared values, found by k-means."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.arrays import MaskedArray, added, clustered, outliers
from lmcompress.ops.kmeans import linear_seeds, lloyd, nearest, optimal
from lmcompress.transforms.combine import evidence_for, leafwise, require_dense
from lmcompress.types import Evidence, Params, State, Transform, WeightError

_NEEDS = {"none": frozenset(), "activation": frozenset({"second_moment"}), "fisher": frozenset({"fisher"})}


def kmeans(
  clusters: int = 16,
  share: int | Literal["tensor", "row"] = "row",
  method: Literal["exact", "lloyd"] = "exact",
  sensitivity: Literal["none", "activation", "fisher"] = "none",
  outlier_fraction: float = 0.0,
  codebook_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
) -> Transform:
  """Shares a few values among all weights of a matrix (Han et al. 2016, Deep Compression, arXiv:1510.00149).

  The weight becomes a `ClusteredArray`: packed indices and the codebook, which gradients reach. Where a mask removed
  weights, one of the values is 0.

  Args:
    clusters: shared values, 2 to 256; an index takes as many bits as that needs.
    share: outputs that share a codebook: each has its own (`row`), all share one (`tensor`), or as many consecutive
      ones as the number says. The optimum for a whole matrix gives its few largest weights up, which costs much more
      than the squared error tells: keep them apart by `outlier_fraction`.
    method: `exact` is the optimum by dynamic programming (of more than 32,768 distinct values, of their merged
      neighbours, and then moved to a local optimum); `lloyd` iterates from evenly spaced values.
    sensitivity: what an error of a weight costs: the same for all; the second moment of its input (`activation`); or
      the Fisher information of the loss (Kim et al. 2023, SqueezeLLM, arXiv:2306.07629), by a backward pass.
    outlier_fraction: of each output's weights, the largest in magnitude by sensitivity are kept apart, in bfloat16.
    codebook_dtype: storage of the shared values.

  Raises:
    ValueError: an argument is out of range.
    WeightError (when planned): more clusters than an index's codebook has weights, outputs that a codebook does not
      divide, a quantized weight, NaN or infinity.
  """
  if not 2 <= clusters <= 256:
    raise ValueError(f"kmeans(clusters={clusters}): 2 to 256")
  if (isinstance(share, str) and share not in ("tensor", "row")) or (isinstance(share, int) and share < 1):
    raise ValueError(f"kmeans(share={share!r}): 'tensor', 'row', or a number of outputs from 1")
  if method not in ("exact", "lloyd") or sensitivity not in _NEEDS or not 0 <= outlier_fraction < 1:
    raise ValueError(
      f"kmeans(method={method!r}, sensitivity={sensitivity!r}, outlier_fraction={outlier_fraction}): method is exact "
      f"or lloyd, sensitivity {', '.join(_NEEDS)}, and a fraction lies from 0 to below 1"
    )

  def books(shape: tuple[int, ...], axis: int) -> int:
    outputs = shape[-3 - axis]
    return 1 if share == "tensor" else outputs if share == "row" else outputs // int(share)

  def check(path: str, leaf: Any) -> None:
    require_dense("kmeans", path, leaf)
    axis = tree.contraction_axis(path)
    outputs, inputs = leaf.shape[-3 - axis], leaf.shape[axis]
    if isinstance(share, int) and outputs % share:
      raise WeightError(f"kmeans(share={share}) at {path}: {outputs} outputs are no multiple of it")
    if clusters > (weights := outputs // books(leaf.shape, axis) * inputs):
      raise WeightError(f"kmeans(clusters={clusters}) at {path}: a codebook serves {weights} weights; use at most that")

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    chosen = tree.default_selection(params) if evidence.selected is None else evidence.selected

    def cluster(path: str, leaf: Any) -> Any:
      axis = tree.contraction_axis(path)
      importance = None
      if sensitivity == "activation":
        moment = evidence_for("second_moment", path, evidence, "kmeans")
        importance = jnp.broadcast_to(moment[:, None] if axis == -2 else moment, leaf.shape)
      elif sensitivity == "fisher":
        importance = evidence_for("fisher", path, evidence, "kmeans")
      return cluster_matrix(
        leaf, importance, axis, clusters, books(leaf.shape, axis), method, outlier_fraction, codebook_dtype
      )

    return tree.map_weights(cluster, params, chosen), state

  return Transform(leafwise(lambda w: w, check=check).init, apply, _NEEDS[sensitivity], name="kmeans")


def cluster_matrix(
  leaf: Any,
  importance: jax.Array | None,
  axis: int,
  clusters: int,
  books: int,
  method: str,
  outlier_fraction: float = 0.0,
  codebook_dtype: str = "bfloat16",
) -> Any:
  """`kmeans` of one matrix.

  Args:
    leaf: `[in, out]` for axis -2, `[vocab, features]` for axis -1; dense or masked dense.
    importance: of the same shape, not negative; None counts all alike.
    books: codebooks, a divisor of the outputs.
  """
  w, kept = (leaf.values, leaf.mask.unpack() != 0) if isinstance(leaf, MaskedArray) else (leaf, None)
  weights = jnp.ones(w.shape, jnp.float32) if importance is None else importance.astype(jnp.float32)
  weights = jnp.maximum(weights, 1e-6 * jnp.mean(weights) + 1e-30)
  values = w.astype(jnp.float32) if kept is None else jnp.where(kept, w, 0).astype(jnp.float32)
  few = round(outlier_fraction * w.shape[axis])
  apart = outliers(values.astype(w.dtype), jnp.square(values) * weights, few, axis) if few else None
  if apart is not None:
    weights = jnp.where(apart.materialize() != 0, 0.0, weights)
  counted = weights if kept is None else jnp.where(kept, weights, 0.0)
  zero = kept is not None
  x, s = (_by_book(a, axis, books) for a in (values, counted))
  centroids = _centroids(x, s, clusters - zero, method)
  if zero:  # what a mask removed keeps a value of its own
    centroids = jnp.sort(jnp.concatenate([centroids, jnp.zeros((books, 1))], axis=1), axis=1)
  centroids = centroids.astype(codebook_dtype)
  codes = nearest(x, centroids.astype(jnp.float32))
  if zero:
    at_zero = jnp.argmax(centroids == 0, axis=1)[:, None]
    codes = jnp.where(_by_book(kept, axis, books), codes, at_zero)
  codes = _from_books(codes, w.shape, axis)
  done = clustered(codes, centroids[0] if books == 1 else centroids, (clusters - 1).bit_length(), axis, w.dtype)
  if apart is None:
    return done
  there = jnp.take_along_axis(done.materialize(), apart.indices.astype(jnp.int32), axis=axis).astype(jnp.float32)
  rest = (apart.values.astype(jnp.float32) - there).astype(apart.values.dtype)
  return added(done, dataclasses.replace(apart, values=rest), axis)


def _by_book(x: jax.Array, axis: int, books: int) -> jax.Array:
  """`[books, weights of each]`."""
  return (jnp.swapaxes(x, -1, -2) if axis == -2 else x).reshape(books, -1)


def _from_books(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
  return jnp.swapaxes(x.reshape(shape[-1], shape[-2]), -1, -2) if axis == -2 else x.reshape(shape)


def _centroids(x: jax.Array, weights: jax.Array, k: int, method: str) -> jax.Array:
  """float32 `[books, k]`, ascending."""
  if method == "lloyd":
    return lloyd(x, weights, linear_seeds(x, k))
  found = jnp.asarray(optimal(np.asarray(x), np.asarray(weights), k), jnp.float32)
  return lloyd(x, weights, found, steps=3)
