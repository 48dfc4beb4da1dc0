"""Sparse coding: runs of inputs become sums of a few atoms of a dictionary that is learned for the matrix."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lmcompress.arrays import DictionaryArray, dictionary
from lmcompress.ops.atoms import learn_dictionary, pursue
from lmcompress.transforms.product_quantize import (
  Sensitivity,
  importance_of,
  over_runs,
  require_vectors,
  runs_of,
  side_by_side,
)
from lmcompress.transforms.round_to_nearest import quantize_matrix
from lmcompress.types import Transform


def sparse_code(
  width: int = 16,
  atoms: int = 256,
  nonzeros: int = 3,
  bits: int | None = 4,
  group_size: int = 64,
  sensitivity: Sensitivity = "activation",
  steps: int = 8,
) -> Transform:
  """Codes each run of inputs by a few atoms and their coefficients (Engan et al. 1999; Pati et al. 1993).

  The article's sparse representation: a dictionary learned by turns with orthogonal matching pursuit. The weight
  becomes a `DictionaryArray`: `nonzeros * (log2(atoms) + bits) / width` bits a weight, the scales of the coefficients
  and the atoms in bfloat16.

  Args:
    width: inputs of a run; the last run of an output may be shorter.
    atoms: of the dictionary, 2 to 256.
    nonzeros: atoms of a run.
    bits: of a coefficient, 2 to 8; None keeps them in bfloat16.
    group_size: coefficients of an output that share a scale.
    sensitivity: what an error costs: the same everywhere, or the second moment of its input (`activation`).
    steps: turns of coding and of learning atoms.

  Raises:
    ValueError: an argument is out of range.
    WeightError (when planned): fewer runs than atoms, a weight that is masked, compressed, or not finite.
  """
  if not 2 <= atoms <= 256 or not 2 <= width <= 64 or not 1 <= nonzeros <= min(atoms, width) or steps < 0:
    raise ValueError(
      f"sparse_code(width={width}, atoms={atoms}, nonzeros={nonzeros}, steps={steps}): 2 to 64 inputs, 2 to 256 atoms, "
      "nonzeros from 1 to the smaller of both, steps from 0"
    )
  if (bits is not None and not 2 <= bits <= 8) or group_size < 1 or sensitivity not in ("none", "activation"):
    raise ValueError(
      f"sparse_code(bits={bits}, group_size={group_size}, sensitivity={sensitivity!r}): 2 to 8 bits or None, groups "
      "from 1, none or activation"
    )

  def check(path: str, leaf: Any) -> None:
    require_vectors("sparse_code", path, leaf, width, atoms, False)

  def code(w: jax.Array, key: jax.Array, axis: int, second_moment: jax.Array | None) -> DictionaryArray:
    return code_matrix(w, second_moment, axis, width, atoms, nonzeros, bits, group_size, steps, key)

  return over_runs(code, sensitivity, "sparse_code", check)


def code_matrix(
  w: jax.Array,
  second_moment: jax.Array | None,
  axis: int,
  width: int,
  atoms: int,
  nonzeros: int,
  bits: int | None,
  group_size: int,
  steps: int,
  key: jax.Array,
) -> DictionaryArray:
  """`sparse_code` of one matrix `[in, out]` (`[vocab, features]` for axis -1); `second_moment: [in]` or None."""
  x = runs_of(w, axis, width)
  flat, cost = x.reshape(-1, width), importance_of(second_moment, x.shape, w.shape[axis]).reshape(-1, width)
  found, codes, values = learn_dictionary(flat, cost, atoms, nonzeros, key, steps)
  stored = found.astype(jnp.bfloat16)
  codes, values = _pursue(flat, cost, stored.astype(jnp.float32), nonzeros)  # of the atoms as they are stored
  shaped = side_by_side(values.reshape(*x.shape[:2], nonzeros), axis)
  coefficients: Any = shaped.astype(jnp.bfloat16)
  if bits is not None:
    coefficients = quantize_matrix(shaped, axis=axis, bits=bits, group_size=group_size)
  indices = side_by_side(codes.reshape(*x.shape[:2], nonzeros), axis)
  return dictionary(stored[None], indices, coefficients, w.shape[axis], axis, w.dtype)


_pursue = jax.jit(pursue, static_argnames=("terms",))
