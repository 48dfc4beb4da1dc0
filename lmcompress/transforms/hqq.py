"""HQQ: zero points fitted so that a robust norm of the error is least; needs no data."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmcompress.ops.rounding import Fit, Rounding, grouped, ungrouped
from lmcompress.transforms.combine import leafwise, require_dense
from lmcompress.types import Transform, WeightError


def hqq(
  bits: int = 4,
  group_size: int = 64,
  norm: float = 0.7,
  iterations: int = 20,
  scale_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
) -> Transform:
  """Half-quadratic quantization (Badri and Shaji 2023): real-valued minimums by alternating two closed forms.

  The scale stays that of the range. Where the paper takes the last iteration, each group keeps its best by the mean
  absolute error, plain rounding included: at 3 bits the iterations can diverge.

  Args:
    bits: width of a code, 2 to 8.
    group_size: inputs that share a scale and a minimum; -1 for a whole row.
    norm: p of the `l_p` norm, below 1: outliers of the error count little.
    iterations: at most this many.
    scale_dtype: storage of scales and minimums.

  Raises:
    ValueError: an argument is out of range.
    WeightError (when planned): a group larger than the row, a quantized weight, NaN or infinity.
  """
  if not 2 <= bits <= 8 or group_size == 0 or group_size < -1 or not 0 < norm <= 1 or iterations < 1:
    raise ValueError(
      f"hqq(bits={bits}, group_size={group_size}, norm={norm}, iterations={iterations}): bits are 2 to 8, a group at "
      "least 1 or -1, the norm above 0 and at most 1, iterations at least 1"
    )
  rounding = Rounding(bits, symmetric=False, zero="real", scale_dtype=scale_dtype)

  def check(path: str, leaf: Any) -> None:
    require_dense("hqq", path, leaf)
    inputs = leaf.shape[-1] if path.endswith("table") else leaf.shape[-2]
    if group_size > inputs:
      raise WeightError(f"hqq(group_size={group_size}) at {path}: a row has {inputs} inputs; use at most that")

  def quantize(w: Any, *, axis: int) -> Any:
    return hqq_matrix(w, axis=axis, rounding=rounding, group_size=group_size, norm=norm, iterations=iterations)

  return leafwise(quantize, name="hqq", check=check)


@functools.partial(jax.jit, static_argnames=("axis", "rounding", "group_size", "norm", "iterations"))
def hqq_matrix(w: jax.Array, *, axis: int, rounding: Rounding, group_size: int, norm: float, iterations: int) -> Any:
  """The method on one matrix; returns a `QuantizedArray`. In the paper's letters, `z == -minimum / scale`."""
  g = grouped(w.astype(jnp.float32), group_size, axis)
  wide = functools.partial(jnp.expand_dims, axis=axis)
  start, levels = rounding.fit(g, axis), 2**rounding.bits - 1
  scale = wide(start.scale)
  assert start.minimum is not None

  def shrink(x: jax.Array, beta: jax.Array) -> jax.Array:
    size = jnp.maximum(jnp.abs(x), 1e-12)
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - size ** (norm - 1) / beta, 0.0)

  def error(minimum: jax.Array) -> jax.Array:
    fit = start._replace(minimum=minimum.astype(rounding.scale_dtype).astype(jnp.float32))
    return jnp.mean(jnp.abs(rounding.decode(rounding.encode(g, fit, axis), fit, axis) - g), axis=axis)

  def iterate(_: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    z, beta, best, least = state
    codes = jnp.clip(jnp.round(g / scale + wide(z)), 0, levels)
    outliers = shrink(g - (codes - wide(z)) * scale, beta)
    z = jnp.mean(codes - (g - outliers) / scale, axis=axis)
    minimum = -z * start.scale
    now = error(minimum)
    return z, 1.01 * beta, jnp.where(now < least, minimum, best), jnp.minimum(now, least)

  first = -start.minimum / start.scale, jnp.float32(10.0), start.minimum, error(start.minimum)
  _, _, best, _ = jax.lax.fori_loop(0, iterations, iterate, first)
  fit: Fit = start._replace(minimum=best.astype(rounding.scale_dtype).astype(jnp.float32))
  codes = ungrouped(rounding.encode(g, fit, axis), w.shape[axis], axis)
  return rounding.assemble(codes, fit, group_size, axis, str(w.dtype))
