"""Round to nearest: each weight to the closest point of a grid, a scale for each group. Needs no data."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmcompress.arrays import MaskedArray
from lmcompress.ops import rounding
from lmcompress.transforms.combine import leafwise, require_dense
from lmcompress.types import Transform, WeightError

GridName = Literal["int", "nf4", "fp8_e4m3", "fp8_e5m2", "mxfp4", "nvfp4"]

_LARGEST_SCALE = {"float32": 3.4e38, "bfloat16": 3.38e38, "float16": 65504.0}
_FIXED_GROUP = {"mxfp4": 32, "nvfp4": 16}


def round_to_nearest(
  bits: int = 4,
  group_size: int | Literal["tensor"] = 64,
  symmetric: bool = True,
  grid: GridName = "int",
  convention: Literal["full", "narrow", "signed"] = "full",
  zero: Literal["integer", "real"] = "integer",
  clip: Literal["none", "mse"] = "none",
  step: float | None = None,
  scale_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
  scale_bits: int | None = None,
) -> Transform:
  """Rounds weights to the nearest point of a grid, group by group.

  What a mask removed stays exactly 0. Every grid but one with a real minimum holds an exact 0, so its codes say
  what the mask said and the mask is dropped; over a real minimum it stays.

  Args:
    bits: width of an integer code, 2 to 8; other grids have their own.
    group_size: inputs that share a scale; -1 for a whole row, `"tensor"` for one scale in all. The last group
      of a row may be shorter. `mxfp4` and `nvfp4` are defined with 32 and 16.
    symmetric: no zero point; else a scale and a zero, with 0 inside each group's range.
    grid: `int`; `nf4` (arXiv:2305.14314); `fp8_e4m3`, `fp8_e5m2` (arXiv:2209.05433); `mxfp4` (OCP Microscaling
      Formats 1.0); `nvfp4` (fp4 with fp8 scales under a float32 scale).
    convention: where a symmetric integer grid lies: `full` (GPTQ, compressed-tensors), `narrow` (QuaRot),
      `signed` (GGUF Q4_0); see `arrays.integer`.
    zero: an asymmetric grid's zero: an `integer` zero point of `bits` bits, or a `real` minimum (GGUF Q4_1).
    clip: `mse` shrinks each group's range to the least `|error|**2.4` (GPTQ's code).
    step: rounds to multiples of this step, `round(w / step) * step`, instead of scaling each group.
    scale_dtype: storage of scales (and real minimums).
    scale_bits: quantizes the scales themselves to this many bits in groups of 256 (double quantization,
      arXiv:2305.14314, section 3).

  Raises:
    ValueError: an argument is out of range.
    WeightError (when planned): a group larger than the row, a step too fine for the bits, NaN or infinity.
  """
  _check_arguments(bits, group_size, grid, symmetric, step, scale_bits)
  for name, value, words in (
    ("convention", convention, ("full", "narrow", "signed")),
    ("zero", zero, ("integer", "real")),
    ("clip", clip, ("none", "mse")),
    ("scale_dtype", scale_dtype, tuple(_LARGEST_SCALE)),
  ):
    if value not in words:
      raise ValueError(f"round_to_nearest({name}={value!r}): one of {', '.join(words)}")
  size = _FIXED_GROUP.get(grid, group_size)
  options = {
    "bits": bits,
    "group_size": size,
    "symmetric": symmetric,
    "grid": grid,
    "convention": convention,
    "zero": zero,
    "clip": clip,
    "step": step,
    "scale_dtype": scale_dtype,
    "scale_bits": scale_bits,
  }

  def check(path: str, leaf: Any) -> None:
    require_dense("round_to_nearest", path, leaf)
    inputs = leaf.shape[-1] if path.endswith("table") else leaf.shape[-2]
    if step is None and isinstance(size, int) and size > inputs:
      raise WeightError(
        f"round_to_nearest(group_size={size}) at {path}: a row has {inputs} inputs; use at most {inputs}, "
        "or -1 for one group per row"
      )
    if scale_dtype == "float16" and step is None:
      values = leaf.values if isinstance(leaf, MaskedArray) else leaf
      reach = float(jnp.max(jnp.abs(values)))
      if reach / 2 ** (bits - 1) > _LARGEST_SCALE[scale_dtype]:
        raise WeightError(
          f"round_to_nearest(scale_dtype='float16') at {path}: a weight of {reach:.3g} needs a scale above 65504; "
          "use scale_dtype='bfloat16'"
        )
    if step is not None:
      values = leaf.values if isinstance(leaf, MaskedArray) else leaf
      reach = round(float(jnp.max(jnp.abs(values))) / step)
      if reach > 2 ** (bits - 1) - 1:
        need = math.ceil(math.log2(reach + 1)) + 1
        raise WeightError(
          f"round_to_nearest(step={step}, bits={bits}) at {path}: the largest weight is {reach} steps, "
          f"{bits} bits reach {2 ** (bits - 1) - 1}; use bits={need} or a larger step"
        )

  def quantize(w: Any, *, axis: int) -> Any:
    if not isinstance(w, MaskedArray):
      return quantize_matrix(w, axis=axis, **options)
    quantized = quantize_matrix(jnp.where(w.mask.unpack() != 0, w.values, 0), axis=axis, **options)
    return quantized if quantized.minimum is None else MaskedArray(quantized, w.mask)

  return leafwise(quantize, name="round_to_nearest", check=check)


quantize_matrix = functools.partial(
  jax.jit,
  static_argnames=tuple(
    (
      "bits",
      "group_size",
      "symmetric",
      "axis",
      "grid",
      "convention",
      "zero",
      "clip",
      "step",
      "scale_dtype",
      "scale_bits",
    )
  ),
)(rounding.quantize)
"""`round_to_nearest` on one matrix, jitted: `(w, *, bits, group_size, ..., axis) -> QuantizedArray`."""


def _check_arguments(
  bits: int, group_size: int | str, grid: str, symmetric: bool, step: float | None, scale_bits: int | None
) -> None:
  if not 2 <= bits <= 8:
    raise ValueError(f"round_to_nearest(bits={bits}): bits are 2 to 8")
  if isinstance(group_size, str) and group_size != "tensor":
    raise ValueError(f"round_to_nearest(group_size={group_size!r}): an integer, -1 for a row, or 'tensor'")
  if isinstance(group_size, int) and group_size != -1 and group_size < 1:
    raise ValueError(f"round_to_nearest(group_size={group_size}): at least 1, or -1 for a whole row")
  if grid not in ("int", *rounding.TABLES):
    raise ValueError(f"round_to_nearest(grid={grid!r}): grids are {['int', *rounding.TABLES]}")
  if grid != "int" and not symmetric:
    raise ValueError(f"round_to_nearest(grid={grid!r}, symmetric=False): only integer grids have a zero")
  if step is not None and not (step > 0 and math.isfinite(step)):
    raise ValueError(f"round_to_nearest(step={step}): a step is a positive number")
  if scale_bits is not None and not 2 <= scale_bits <= 8:
    raise ValueError(f"round_to_nearest(scale_bits={scale_bits}): 2 to 8, or none")
