"""Quantization-aware training: weights that train as floats and compute as codes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lmcompress import tree
from lmcompress.arrays import FakeQuantArray, Integer, QuantizedArray, fake_quant
from lmcompress.transforms.combine import leafwise, require_dense
from lmcompress.transforms.round_to_nearest import quantize_matrix
from lmcompress.types import Transform, WeightError


def fake_quantize(
  bits: int = 4, group_size: int = 64, symmetric: bool = True, scale_dtype: str = "bfloat16"
) -> Transform:
  """Makes weights compute as the codes they will become while floats train (LSQ, arXiv:1902.08153).

  The weight becomes a `FakeQuantArray` whose scales, and minimums, train too; they start where rounding to nearest
  with the least squared error has them. A weight of integer codes, such as `gptq` leaves, starts from those: its own
  bits, groups and scales. `freeze` makes the codes of it, with the same outputs. An input that is rounded at run time
  (`quantize_inputs`) stays so.

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
    if isinstance(leaf, QuantizedArray):
      _require_codes(path, leaf, bits)
      return
    require_dense("fake_quantize", path, leaf)
    if not isinstance(leaf, jax.Array) and hasattr(leaf, "mask"):
      raise WeightError(
        f"fake_quantize at {path}: the weight is masked, and codes forget that; freeze it first"
      )
    inputs = leaf.shape[tree.contraction_axis(path)]
    if group_size != -1 and inputs % group_size:
      raise WeightError(f"fake_quantize(group_size={group_size}) at {path}: {inputs} inputs are not a multiple of it")

  def start(w: Any, *, axis: int) -> FakeQuantArray:
    if isinstance(w, QuantizedArray):
      return _from_codes(w, scale_dtype)
    found = quantize_matrix(
      w, axis=axis, bits=bits, group_size=group_size, symmetric=symmetric, zero="real", clip="mse",
      scale_dtype="float32",
    )  # fmt: skip
    minimum = None if symmetric else found.minimum
    return fake_quant(w.astype(jnp.float32), found.scale, minimum, bits, axis, scale_dtype, w.dtype)

  return leafwise(start, name="fake_quantize", check=check)


def _require_codes(path: str, leaf: QuantizedArray, bits: int) -> None:
  """Raises unless the codes are evenly spaced, of so many bits, and groups divide the inputs."""
  inputs, groups = leaf.shape[leaf.axis], leaf.scale.shape[leaf.axis]
  if not isinstance(leaf.grid, Integer) or leaf.grid.bits != bits or not bits >= 2:
    raise WeightError(f"fake_quantize(bits={bits}) at {path}: the weight is {leaf.kind}; give the bits of its codes")
  if inputs % groups or leaf.scale.shape[-3 - leaf.axis] != leaf.shape[-3 - leaf.axis]:
    raise WeightError(f"fake_quantize at {path}: scales of {leaf.kind} do not divide {inputs} inputs of each output")


def _from_codes(w: QuantizedArray, scale_dtype: str) -> FakeQuantArray:
  """The same values, with a minimum in the place of a zero point."""
  scale, zeros = w.scales(), w.zeros()
  minimum = w.minimum if zeros is None else -zeros * scale
  values = w.materialize().astype(jnp.float32)
  offset = None if minimum is None else minimum.astype(jnp.float32)
  return fake_quant(values, scale, offset, w.grid.bits, w.axis, scale_dtype, w.dtype)  # type: ignore[attr-defined]
