"""Any precision: one set of codes that holds the same model in several widths, each a part of the next."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmcompress import tree
from lmcompress.arrays import MaskedArray, NestedArray, nested
from lmcompress.ops.rounding import Rounding
from lmcompress.ops.second_order import solve, warn_of_damping
from lmcompress.transforms.combine import require_dense, side_by_side, stagewise
from lmcompress.types import Params, Transform, WeightError


def any_precision(
  bits: Sequence[int] = (3, 4, 8),
  group_size: int = 64,
  clip: Literal["error", "none"] = "none",
  seed: Literal["nearest", "gptq"] = "nearest",
  damping: float = 0.01,
  scale_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
) -> Transform:
  """Quantizes once for several widths (Park et al. 2024, Any-Precision LLM, arXiv:2402.10517): 8 bits hold 4 and 3.

  The fewest bits come first; then each wider code only adds bits below, chosen in turn with the errors absorbed as in
  GPTQ. All widths share scales and minimums. `at_precision` picks one.

  Args:
    bits: the widths, ascending, 2 to 8.
    group_size: inputs that share a scale and a minimum, at least 16; -1 for a whole row.
    clip: `none` leaves ranges whole; `error` fits them to the fewest bits, which gain by it, and every width above
      keeps what was cut off.
    seed: `nearest` puts each weight into its own interval of the fewest bits, as the paper does, so that many bits lose
      nothing; `gptq` absorbs errors there already, which helps the fewest bits and holds the others to intervals that a
      weight has left.
    damping, scale_dtype: as in `gptq`.

  Raises:
    ValueError: an argument is out of range.
    WeightError (when planned): a group larger than the row, a quantized or masked weight, NaN or infinity.
  """
  widths = list(bits)
  if len(widths) < 2 or widths != sorted(set(widths)) or widths[0] < 2 or widths[-1] > 8:
    raise ValueError(f"any_precision(bits={widths}): two widths or more, ascending, from 2 to 8")
  if group_size != -1 and group_size < 16:
    raise ValueError(f"any_precision(group_size={group_size}): at least 16, or -1 for a whole row")
  if not 0 < damping < 1 or seed not in ("nearest", "gptq"):
    raise ValueError(f"any_precision(damping={damping}, seed={seed!r}): damping within 0 and 1, seed nearest or gptq")
  rounding = Rounding(widths[0], symmetric=False, zero="real", scale_dtype=scale_dtype)
  extra = tuple(b - a for a, b in itertools.pairwise(widths))

  def check(path: str, leaf: Any) -> None:
    require_dense("any_precision", path, leaf)
    if isinstance(leaf, MaskedArray):
      raise WeightError(f"any_precision at {path}: the weight is masked, and real minimums hold no exact 0")
    if group_size > leaf.shape[-2]:
      raise WeightError(f"any_precision(group_size={group_size}) at {path}: a row has {leaf.shape[-2]} inputs")

  def quantize(weights: dict[str, Any], hessian: jax.Array) -> dict[str, Any]:
    solved = solve(
      jnp.concatenate(list(weights.values()), axis=1), hessian, None, None, rounding=rounding, group_size=group_size,
      order="group", clip=clip == "error", sweeps=0, damping=damping, extra=extra,
      feedback=seed == "gptq",
    )  # fmt: skip
    warn_of_damping("any_precision", next(iter(weights)), solved.damping, solved.first)
    done: dict[str, Any] = {}
    for path, w, (mine, own, parts) in side_by_side(weights, (solved.fit, solved.written, solved.extra)):
      leaf: Any = rounding.assemble(own, mine, group_size, -2, str(w.dtype))
      for width, part in zip(extra, parts, strict=True):
        leaf = nested(leaf, part, width)
      done[path] = leaf
    return done

  return stagewise(quantize, name="any_precision", needs=frozenset({"hessian"}), check=check)


def at_precision(params: Params, bits: int) -> Params:
  """The tree with every nested weight at one of its widths; arrays are shared, nothing is copied.

  Raises:
    WeightError: no weight is nested, or one has no such width.
  """
  found = {path: leaf for path, leaf in tree.weights(params).items() if isinstance(leaf, NestedArray)}
  if not found:
    raise WeightError(f"at_precision({bits}): no weight holds several precisions; any_precision makes such")
  for path, leaf in found.items():
    if bits not in leaf.widths:
      raise WeightError(f"at_precision({bits}) at {path}: it has {', '.join(map(str, leaf.widths))} bits")
  return tree.map_weights(lambda path, leaf: leaf.at(bits), params, found)
