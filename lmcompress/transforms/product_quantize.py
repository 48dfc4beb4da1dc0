"""Product quantization: runs of inputs become the nearest of a few vectors that a matrix shares."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmcompress import tree
from lmcompress.arrays import DictionaryArray, dictionary
from lmcompress.ops.atoms import nearest_atoms, vector_kmeans
from lmcompress.transforms.combine import leafwise, require_dense
from lmcompress.types import Transform, WeightError

Sensitivity = Literal["none", "activation"]


def product_quantize(
  width: int = 4,
  atoms: int = 256,
  spaces: Literal["one", "each"] = "one",
  sensitivity: Sensitivity = "activation",
  steps: int = 20,
  dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
) -> Transform:
  """Codes each run of inputs by one vector of a codebook (Jegou et al. 2011; Stock et al. 2020, arXiv:1907.05686).

  The weight becomes a `DictionaryArray` of one term: `log2(atoms) / width` bits a weight, and the codebook, which
  gradients reach.

  Args:
    width: inputs of a run; the last run of an output may be shorter.
    atoms: vectors of a codebook, 2 to 256.
    spaces: `one` codebook for all runs of a matrix, or `each` run its own, as in the paper of 2011.
    sensitivity: what an error costs: the same everywhere, or the second moment of its input (`activation`).
    steps: of k-means.
    dtype: storage of the codebook.

  Raises:
    ValueError: an argument is out of range.
    WeightError (when planned): fewer vectors than atoms, a weight that is masked, compressed, or not finite.
  """
  if not 2 <= atoms <= 256 or not 1 <= width <= 64 or steps < 1:
    raise ValueError(f"product_quantize(width={width}, atoms={atoms}, steps={steps}): 1 to 64, 2 to 256, from 1")
  if spaces not in ("one", "each") or sensitivity not in ("none", "activation"):
    raise ValueError(
      f"product_quantize(spaces={spaces!r}, sensitivity={sensitivity!r}): one or each; none or activation"
    )

  def check(path: str, leaf: Any) -> None:
    require_vectors("product_quantize", path, leaf, width, atoms, spaces == "each")

  def code(w: jax.Array, key: jax.Array, axis: int, second_moment: jax.Array | None) -> DictionaryArray:
    return quantize_runs(w, second_moment, axis, width, atoms, spaces == "each", steps, key, dtype)

  return over_runs(code, sensitivity, "product_quantize", check)


def over_runs(code: Any, sensitivity: Sensitivity, name: str, check: Any) -> Transform:
  """Lifts `code(w, key, axis, second_moment)`; the moment only where the sensitivity asks for it."""
  if sensitivity == "none":
    return leafwise(lambda w, *, key, axis: code(w, key, axis, None), name=name, check=check)
  return leafwise(lambda w, *, key, axis, second_moment: code(w, key, axis, second_moment), name=name, check=check)


def require_vectors(name: str, path: str, leaf: Any, width: int, atoms: int, each: bool) -> None:
  """Raises unless the weight is dense, not masked, and has as many runs as atoms for each codebook."""
  require_dense(name, path, leaf)
  if not isinstance(leaf, jax.Array) and hasattr(leaf, "mask"):
    raise WeightError(f"{name} at {path}: the weight is masked, and vectors keep no zeros; prune afterwards")
  axis = tree.contraction_axis(path)
  vectors = leaf.shape[-3 - axis] * (1 if each else -(-leaf.shape[axis] // width))
  if vectors < atoms:
    raise WeightError(f"{name}(atoms={atoms}) at {path}: a codebook serves {vectors} runs of {width}; use fewer atoms")


def runs_of(w: jax.Array, axis: int, width: int) -> jax.Array:
  """float32 `[runs, outputs, width]`, zeros after the last input."""
  by_input = (w if axis == -2 else w.T).astype(jnp.float32)
  padded = jnp.pad(by_input, ((0, -by_input.shape[0] % width), (0, 0)))
  return jnp.swapaxes(padded.reshape(-1, width, padded.shape[1]), 1, 2)


def importance_of(second_moment: jax.Array | None, shape: tuple[int, ...], inputs: int) -> jax.Array:
  """float32 `[runs, outputs, width]`: what an error costs, nothing after the last input."""
  runs, _, width = shape
  moment = jnp.ones(inputs) if second_moment is None else second_moment.astype(jnp.float32)
  moment = jnp.maximum(moment, 1e-6 * jnp.mean(moment) + 1e-30)
  return jnp.broadcast_to(jnp.pad(moment, (0, runs * width - inputs)).reshape(runs, 1, width), shape)


def side_by_side(codes: jax.Array, axis: int) -> jax.Array:
  """`[runs * terms, out]` (`[vocab, runs * terms]` for axis -1) of `[runs, out, terms]`."""
  flat = jnp.swapaxes(codes, 1, 2).reshape(-1, codes.shape[1])
  return flat if axis == -2 else flat.T


def quantize_runs(
  w: jax.Array,
  second_moment: jax.Array | None,
  axis: int,
  width: int,
  atoms: int,
  each: bool,
  steps: int,
  key: jax.Array,
  dtype: str = "bfloat16",
) -> DictionaryArray:
  """`product_quantize` of one matrix `[in, out]` (`[vocab, features]` for axis -1).

  Args:
    second_moment: `[in]`, or None to count all inputs alike.
    each: whether each run of inputs has a codebook of its own.
  """
  x = runs_of(w, axis, width)
  cost = importance_of(second_moment, x.shape, w.shape[axis])
  xs, costs = (x, cost) if each else (a.reshape(1, -1, width) for a in (x, cost))
  found = jnp.stack(
    [
      vector_kmeans(v, s, atoms, k, steps)
      for v, s, k in zip(xs, costs, jax.random.split(key, xs.shape[0]), strict=True)
    ]
  ).astype(dtype)
  codes = jnp.stack([nearest_atoms(v, s, a.astype(jnp.float32))[0] for v, s, a in zip(xs, costs, found, strict=True)])
  return dictionary(found, side_by_side(codes.reshape(*x.shape[:2], 1), axis), None, w.shape[axis], axis, w.dtype)
