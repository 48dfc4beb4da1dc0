"""Quantization-aware training: weights that train as floats and compute as codes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lmcompress import tree
from lmcompress.arrays import FakeQuantArray, InputArray, fake_quant
from lmcompress.transforms.combine import leafwise, require_dense
from lmcompress.transforms.round_to_nearest import quantize_matrix
from lmcompress.types import Transform, WeightError


def fake_quantize(
  bits: int = 4, group_size: int = 64, symmetric: bool = True, scale_dtype: str = "bfloat16"
) -> Transform:
  """Makes weights compute as the codes they will become while floats train (LSQ, arXiv:1902.08153).

  The weight becomes a `FakeQuantArray` whose scales, and minimums, train too; they start where rounding to nearest
  with the least squared error has them. `freeze` makes the codes of it, with the same outputs. An input that is
  rounded at run time (`quantize_inputs`) stays so.

  Args:
    bits: width of a code, 2 to 8.
    group_size: inputs that share a scale, a divisor of them; -1 for a row.
    symmetric: without a minimum.
    scale_dtype: storage of scales and minimums: bfloat16, float16 or float32.

  Raises:
    ValueError: an argument is out of range.
    WeightError (when planned): groups that do not divide the inputs, a weight that is compressed or not finite.
  """
  if (
    not 2 <= bits <= 8 or (group_size != -1 and group_size < 2) or scale_dtype not in ("bfloat16", "float16", "float32")
  ):
    raise ValueError(
      f"fake_quantize(bits={bits}, group_size={group_size}, scale_dtype={scale_dtype!r}): 2 to 8 bits, groups of 2 or "
      "more or -1, bfloat16, float16 or float32"
    )

  def check(path: str, leaf: Any) -> None:
    inner = leaf.weight if isinstance(leaf, InputArray) else leaf
    require_dense("fake_quantize", path, inner)
    if not isinstance(inner, jax.Array) and hasattr(inner, "mask"):
      raise WeightError(
        f"fake_quantize at {path}: the weight is masked, and codes forget that; freeze it first"
      )
    inputs = inner.shape[tree.contraction_axis(path)]
    if group_size != -1 and inputs % group_size:
      raise WeightError(f"fake_quantize(group_size={group_size}) at {path}: {inputs} inputs are not a multiple of it")

  def start(w: jax.Array, axis: int) -> FakeQuantArray:
    found = quantize_matrix(
      w, axis=axis, bits=bits, group_size=group_size, symmetric=symmetric, zero="real", clip="mse",
      scale_dtype="float32",
    )  # fmt: skip
    minimum = None if symmetric else found.minimum
    return fake_quant(w.astype(jnp.float32), found.scale, minimum, bits, axis, scale_dtype)

  def visit(w: Any, *, axis: int) -> Any:
    if isinstance(w, InputArray):
      return InputArray(start(w.weight, axis), w.act, w.axis)
    return start(w, axis)

  return leafwise(visit, name="fake_quantize", check=check)
