"""QuIP#: two bits a weight, eight weights at a time rounded to a lattice, errors absorbed as in GPTQ."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmcompress.arrays import MaskedArray
from lmcompress.arrays.lattice import VECTOR
from lmcompress.ops.second_order import warn_of_damping
from lmcompress.ops.vector_rounding import solve_lattice
from lmcompress.transforms.combine import require_dense, side_by_side, stagewise
from lmcompress.types import Transform, WeightError

_SPREAD = 1.03
"""Root mean square of what is rounded, in the lattice's unit: the least error for normal weights."""


def quip_sharp(
  group_size: int = -1,
  damping: float = 0.01,
  sweeps: int = 1,
  error_propagation: float = 0.0,
  scale_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
) -> Transform:
  """Quantizes to two bits by the E8P codebook (Tseng et al. 2024, arXiv:2402.04396), which takes no storage itself.

  The codebook fits normal weights: let `rotate` come first. (The paper turns both sides of each matrix at run time;
  here the hidden stream is turned once for the whole model, which costs nothing at run time and leaves the inputs of
  `down` as they are.) Linears that read one input are solved side by side.

  Args:
    group_size: inputs that share a scale, a multiple of 8; -1 for a whole row.
    damping: added to the Hessian's diagonal, as a fraction of its mean.
    sweeps: of scales fitted and vectors moved afterwards; each lowers the error.
    error_propagation: as in `gptq`.
    scale_dtype: storage of scales.

  Raises:
    ValueError: an argument is out of range.
    WeightError (when planned): a quantized or masked weight, NaN or infinity.
  """
  if group_size != -1 and (group_size < VECTOR or group_size % VECTOR):
    raise ValueError(f"quip_sharp(group_size={group_size}): a multiple of {VECTOR}, or -1 for a whole row")
  if not 0 < damping < 1 or not 0 <= error_propagation <= 1 or sweeps < 0:
    raise ValueError(
      f"quip_sharp(damping={damping}, error_propagation={error_propagation}, sweeps={sweeps}): damping lies between 0 "
      "and 1, error_propagation is 0 to 1, sweeps are not negative"
    )
  options: dict[str, Any] = {
    "group_size": group_size, "damping": damping, "sweeps": sweeps, "propagation": error_propagation,
    "scale_dtype": scale_dtype, "spread": _SPREAD,
  }  # fmt: skip

  def check(path: str, leaf: Any) -> None:
    require_dense("quip_sharp", path, leaf)
    if isinstance(leaf, MaskedArray):
      raise WeightError(f"quip_sharp at {path}: the weight is masked, and no point of the lattice holds a 0")

  def quantize(weights: dict[str, Any], hessian: jax.Array, reference_hessian: Any = None) -> dict[str, Any]:
    together, used, first = solve_lattice(
      jnp.concatenate(list(weights.values()), axis=1), hessian, reference_hessian, **options
    )
    warn_of_damping("quip_sharp", next(iter(weights)), used, first)
    apart = side_by_side(weights, (together.codes, together.scale))
    return {
      path: dataclasses.replace(together, codes=codes, scale=scale, dtype=str(w.dtype))
      for path, w, (codes, scale) in apart
    }

  needs = frozenset({"hessian"} | ({"reference_hessian"} if error_propagation else set()))
  return stagewise(quantize, name="quip_sharp", needs=needs, check=check)
