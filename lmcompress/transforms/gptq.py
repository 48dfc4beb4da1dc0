"""GPTQ: quantizes a weight input by input, each error absorbed by the inputs not yet done."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmcompress.arrays import MaskedArray
from lmcompress.ops.rounding import Rounding
from lmcompress.ops.second_order import solve, warn_of_damping
from lmcompress.transforms.combine import require_dense, side_by_side, stagewise
from lmcompress.types import Transform, WeightError


def gptq(
  bits: int = 4,
  group_size: int = 64,
  symmetric: bool = True,
  grid: Literal["int", "nf4", "mxfp4"] = "int",
  order: Literal["group", "activation", "none"] = "group",
  clip: Literal["error", "none"] = "error",
  zero: Literal["integer", "real"] = "integer",
  convention: Literal["full", "narrow", "signed"] = "full",
  sequential: Literal["stage", "block"] = "stage",
  damping: float = 0.01,
  sweeps: int = 1,
  error_propagation: float = 0.0,
  scale_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
) -> Transform:
  """Quantizes with second-order error feedback (Frantar et al. 2022, arXiv:2210.17323).

  Linears that read one input are solved side by side. An input that is always 0 on the calibration text is set to 0.
  Where the Hessian cannot be factored the damping is raised tenfold until it can, and a warning names the weight.

  Args:
    bits: width of a code, 2 to 8.
    group_size: inputs that share a scale, at least 16; -1 for a whole row. The last group of a row may be shorter.
    symmetric: no zero point; else a scale and a zero, as in `round_to_nearest`.
    grid: `int`, `nf4` or `mxfp4` (groups of 32).
    order: `group` takes the most active groups first and within them the most active inputs, so that scales are still
      fitted to weights that carry the errors so far; `activation` sorts all inputs over scales fixed beforehand (the
      paper's code calls it act-order, with static groups); `none` goes from the first to the last.
    clip: `error` shrinks each group's range to the least error as this method weighs it.
    zero, convention, scale_dtype: as in `round_to_nearest`.
    sequential: `stage` takes the statistics of each stage with the stages before it compressed (true-sequential),
      `block` those of all stages of a block before any of it is.
    damping: added to the Hessian's diagonal, as a fraction of its mean.
    sweeps: of coordinate descent over all codes afterwards (QuantEase, arXiv:2309.01885); each lowers the error.
    error_propagation: 0 to 1, how far the weight is first moved to undo what the compression of earlier layers did to
      its input (QEP, arXiv:2504.09629).

  Raises:
    ValueError: an argument is out of range.
    WeightError (when planned): a group larger than the row, a quantized weight, NaN or infinity.
  """
  size = 32 if grid == "mxfp4" else group_size
  if not 2 <= bits <= 8:
    raise ValueError(f"gptq(bits={bits}): bits are 2 to 8")
  if size != -1 and size < 16:
    raise ValueError(f"gptq(group_size={group_size}): at least 16, or -1 for a whole row")
  if grid != "int" and not symmetric:
    raise ValueError(f"gptq(grid={grid!r}, symmetric=False): only integer grids have a zero")
  if not 0 < damping < 1 or not 0 <= error_propagation <= 1 or sweeps < 0:
    raise ValueError(
      f"gptq(damping={damping}, error_propagation={error_propagation}, sweeps={sweeps}): damping lies between 0 and 1, "
      "error_propagation is 0 to 1, sweeps are not negative"
    )
  if sequential not in ("stage", "block"):
    raise ValueError(f"gptq(sequential={sequential!r}): stage or block")
  rounding = Rounding(bits, symmetric, grid, convention, zero, scale_dtype)
  options: dict[str, Any] = {
    "rounding": rounding, "group_size": size, "order": order, "clip": clip == "error", "sweeps": sweeps,
    "damping": damping, "propagation": error_propagation,
  }  # fmt: skip

  def check(path: str, leaf: Any) -> None:
    require_dense("gptq", path, leaf)
    if size > leaf.shape[-2]:
      raise WeightError(
        f"gptq(group_size={size}) at {path}: a row has {leaf.shape[-2]} inputs; use at most that, or -1 for one group"
      )

  def quantize(weights: dict[str, Any], hessian: jax.Array, reference_hessian: Any = None) -> dict[str, Any]:
    masked = any(isinstance(leaf, MaskedArray) for leaf in weights.values())
    dense = [leaf.values if isinstance(leaf, MaskedArray) else leaf for leaf in weights.values()]
    kept = [
      leaf.mask.unpack() != 0 if isinstance(leaf, MaskedArray) else jnp.ones(leaf.shape, bool)
      for leaf in weights.values()
    ]
    keep = jnp.concatenate(kept, axis=1) if masked else None
    codes, fit, used, first, _ = solve(jnp.concatenate(dense, axis=1), hessian, reference_hessian, keep, **options)
    warn_of_damping("gptq", next(iter(weights)), used, first)
    done: dict[str, Any] = {}
    for path, leaf, (mine, own) in side_by_side(weights, (fit, codes)):
      w = leaf.values if isinstance(leaf, MaskedArray) else leaf
      q = rounding.assemble(own, mine, size, -2, str(w.dtype))
      done[path] = MaskedArray(q, leaf.mask) if isinstance(leaf, MaskedArray) and q.minimum is not None else q
    return done

  needs = frozenset({"hessian"} | ({"reference_hessian"} if error_propagation else set()))
  solved = stagewise(quantize, name="gptq", needs=needs, check=check)
  return solved._replace(scope="block") if sequential == "block" else solved
