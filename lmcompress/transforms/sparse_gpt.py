"""SparseGPT: removes weights input by input, each error absorbed by inputs not yet done; and quantizes on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lmcompress.ops.masks import target
from lmcompress.ops.rounding import Rounding
from lmcompress.transforms.gptq import by_error_feedback
from lmcompress.types import Transform

_QUANTIZE = {"bits": 4, "group_size": 64, "symmetric": True, "grid": "int", "convention": "full", "clip": "error"}


def sparse_gpt(
  sparsity: float | None = None,
  pattern: str | None = None,
  quantize: Mapping[str, Any] | None = None,
  block_size: int = 128,
  order: Literal["group", "none"] = "group",
  refit: int = 10,
  sweeps: int = 1,
  damping: float = 0.01,
  error_propagation: float = 0.0,
) -> Transform:
  """Prunes with second-order error feedback (Frantar and Alistarh 2023, arXiv:2301.00774).

  Each block of inputs loses its share of the weights that cost least, `w**2 / [H^-1]_ii`, and what is left takes over
  what they did. With `quantize`, what stays is rounded in the same pass, from the best values for what was removed, and
  then to what the weight gave before both. It becomes a `MaskedArray`, or codes that are 0 where it was removed.

  Args:
    sparsity: fraction removed, exact in every weight. Or:
    pattern: `"n:m"` keeps n of each m consecutive inputs, e.g. `"2:4"`.
    quantize: what stays on a grid: `bits`, `group_size`, `symmetric`, `grid` (`int`, `nf4`, `mxfp4`), `convention` and
      `clip` (`error`, `none`) as in `gptq`; those left out are its defaults.
    block_size: inputs that are ranked together, and done between two updates of the rest; with `quantize` its groups.
    order: `group` takes the most active blocks first, and within them the most active inputs (of a pattern, groups of
      m); `none` goes from the first to the last, as the paper does.
    refit: steps of conjugate gradients afterwards, in which the weights that stay find their best values together.
    sweeps: with `quantize`, of coordinate descent over all codes, to what the weight gave before.
    damping: added to the Hessian's diagonal, as a fraction of its mean.
    error_propagation: 0 to 1, how far the weight is first moved to undo what the compression of earlier layers did to
      its input (QEP, arXiv:2504.09629).

  Raises:
    ValueError: an argument is out of range.
    WeightError (when planned): inputs are no multiple of m, a quantized weight, NaN or infinity.
  """
  goal = target("sparse_gpt", sparsity, pattern)
  if not 0 < damping < 1 or not 0 <= error_propagation <= 1 or refit < 0 or sweeps < 0:
    raise ValueError(
      f"sparse_gpt(damping={damping}, error_propagation={error_propagation}, refit={refit}, sweeps={sweeps}): damping "
      "lies between 0 and 1, error_propagation is 0 to 1, refit and sweeps are not negative"
    )
  if order not in ("group", "none"):
    raise ValueError(f"sparse_gpt(order={order!r}): group or none")
  rounding, size, clip = None, block_size, False
  if quantize is not None:
    if not isinstance(quantize, Mapping):
      raise ValueError(f"sparse_gpt(quantize={quantize!r}): a table, such as {{'bits': 4}}")
    if unknown := set(quantize) - set(_QUANTIZE):
      raise ValueError(f"sparse_gpt(quantize=...) does not take {min(unknown)!r}; it takes {', '.join(_QUANTIZE)}")
    q = {**_QUANTIZE, **quantize}
    if not isinstance(q["bits"], int) or not 2 <= q["bits"] <= 8 or q["clip"] not in ("error", "none"):
      raise ValueError(f"sparse_gpt(quantize={dict(quantize)}): bits are 2 to 8, clip is error or none")
    bad = q["grid"] not in ("int", "nf4", "mxfp4") or q["convention"] not in ("full", "narrow", "signed")
    if bad or type(q["symmetric"]) is not bool or type(q["group_size"]) is not int:
      raise ValueError(
        f"sparse_gpt(quantize={dict(quantize)}): grid is int, nf4 or mxfp4, convention full, narrow or signed, "
        "symmetric true or false, group_size a number"
      )
    if q["grid"] != "int" and q["bits"] != 4:
      raise ValueError(f"sparse_gpt(quantize={dict(quantize)}): codes of {q['grid']} have 4 bits")
    if q["grid"] != "int" and not q["symmetric"]:
      raise ValueError("sparse_gpt(quantize=...): only integer grids have a zero; leave symmetric out")
    size, clip = 32 if q["grid"] == "mxfp4" else q["group_size"], q["clip"] == "error"
    rounding = Rounding(q["bits"], q["symmetric"], q["grid"], q["convention"], "integer", "bfloat16")
  if size != -1 and (size < 16 or size % max(goal.m, 1)):
    asked = f"pattern={pattern!r}, " if goal.m else ""
    raise ValueError(
      f"sparse_gpt({asked}{'group_size' if quantize else 'block_size'}={size}): at least 16, and a multiple of the "
      "pattern's m"
    )
  options = {
    "rounding": rounding, "group_size": size, "order": order, "clip": clip, "damping": damping,
    "sweeps": 0 if rounding is None else sweeps, "propagation": error_propagation, "refit_steps": refit,
  }  # fmt: skip
  needs = frozenset({"hessian"} | ({"reference_hessian"} if error_propagation else set()))
  return by_error_feedback("sparse_gpt", options, needs, goal)
