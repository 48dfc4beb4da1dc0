"""GPTQ: quantizes a weight input by input, each error absorbed by the inputs not yet done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmcompress.arrays import MaskedArray, masked
from lmcompress.ops.masks import Target
from lmcompress.ops.removal import Removal
from lmcompress.ops.rounding import Rounding
from lmcompress.ops.second_order import solve, warn_of_damping
from lmcompress.transforms.combine import require_dense, sequentially, side_by_side, stagewise
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
  rounding = Rounding(bits, symmetric, grid, convention, zero, scale_dtype)
  options: dict[str, Any] = {
    "rounding": rounding, "group_size": size, "order": order, "clip": clip == "error", "sweeps": sweeps,
    "damping": damping, "propagation": error_propagation,
  }  # fmt: skip

  needs = frozenset({"hessian"} | ({"reference_hessian"} if error_propagation else set()))
  return sequentially("gptq", by_error_feedback("gptq", options, needs), sequential)


def by_error_feedback(
  name: str, options: Mapping[str, Any], needs: frozenset[str], target: Target | None = None
) -> Transform:
  """`ops.second_order.solve`, lifted: linears that read one input side by side, what masks remove staying 0.

  Args:
    options: `solve`'s; its rounding is None where nothing is quantized.
    needs: `hessian`, and perhaps `reference_hessian`.
    target: what to remove on the way.
  """
  size, rounding = options["group_size"], options["rounding"]

  def check(path: str, leaf: Any) -> None:
    require_dense(name, path, leaf)
    inputs = leaf.shape[-2]
    if rounding is not None and size > inputs:
      raise WeightError(
        f"{name}(group_size={size}) at {path}: a row has {inputs} inputs; use at most that, or -1 for one group"
      )
    if target is not None and (misfit := target.misfit(inputs)):
      raise WeightError(f"{name} at {path}: {misfit}, as the pattern needs")

  def apply(weights: dict[str, Any], hessian: jax.Array, reference_hessian: Any = None) -> dict[str, Any]:
    parts = [(leaf.values, leaf.mask.unpack() != 0) if isinstance(leaf, MaskedArray) else (leaf, None)
             for leaf in weights.values()]  # fmt: skip
    keep = None
    if any(kept is not None for _, kept in parts):
      keep = jnp.concatenate([jnp.ones(w.shape, bool) if kept is None else kept for w, kept in parts], axis=1)
    outputs = tuple(w.shape[1] for w, _ in parts)
    removal = None if target is None else Removal.of(target, len(hessian), outputs)
    w = jnp.concatenate([w for w, _ in parts], axis=1)
    solved = solve(w, hessian, reference_hessian, keep, removal=removal, **options)
    warn_of_damping(name, next(iter(weights)), solved.damping, solved.first)
    found = side_by_side(weights, (solved.fit, solved.written, solved.keep))
    return {path: store(leaf, *mine) for path, leaf, mine in found}

  def store(leaf: Any, fit: Any, written: jax.Array, keep: jax.Array | None) -> Any:
    dtype = leaf.dtype
    done: Any = written.astype(dtype) if rounding is None else rounding.assemble(written, fit, size, -2, str(dtype))
    pruned = isinstance(leaf, MaskedArray) or target is not None
    exact = rounding is not None and done.minimum is None  # the codes say 0 themselves
    return masked(done, keep, -2) if pruned and not exact and keep is not None else done

  return stagewise(apply, name=name, needs=needs, check=check)
