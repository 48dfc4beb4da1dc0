"""LearnedInputArray: a weight whose input is rounded by a step that trains."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmcompress.arrays import parts
from lmcompress.arrays.input import InputArray, Int8Static, StaticStep
from lmcompress.types import CompressedArray


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weight", "step"), meta_fields=("bits", "axis"))
@dataclasses.dataclass(frozen=True)
class LearnedInputArray(CompressedArray):
  """`linear(x, self) == linear(clip(round(x / step), -high, high) * step, weight)`, `high == 2**(bits - 1) - 1`.

  Rounding passes gradients straight through inside the range and none outside it, and the step is learned (LSQ,
  arXiv:1902.08153, with its gradient scale); `high * step` is then the clipping that PACT learns (Choi et al. 2018,
  arXiv:1805.06085), of inputs with a sign. `freeze` fixes the step. The dense value is the weight's.

  Attributes:
    weight: dense or compressed.
    step: float32 `[..., 1, 1]`; its magnitude counts.
    bits: width of a code, 2 to 8.
    axis: the contraction axis.
  """

  weight: Any
  step: jax.Array
  bits: int
  axis: int

  @property
  def shape(self) -> tuple[int, ...]:
    return self.weight.shape

  @property
  def dtype(self) -> Any:
    return self.weight.dtype

  @property
  def nbits(self) -> int:
    return parts.nbits(self.weight) + parts.nbits(self.step)

  @property
  def kind(self) -> str:
    return f"training int{self.bits} inputs x {parts.kind(self.weight)}"

  @classmethod
  def trainable_fields(cls) -> tuple[str, ...]:
    return ("weight", "step")

  def rounded(self, x: jax.Array) -> jax.Array:
    """The input as the weight sees it, float32 of the shape of `x: [..., features]`."""
    x, high = x.astype(jnp.float32), 2 ** (self.bits - 1) - 1
    damp = 1 / math.sqrt(max(x.size, 1) * high)
    step = jnp.maximum(jnp.abs(self.step.astype(jnp.float32)).reshape(()), jnp.finfo(jnp.float32).tiny)
    step = step * damp + jax.lax.stop_gradient(step * (1 - damp))
    units = jnp.clip(x / step, -high, high)
    return (units + jax.lax.stop_gradient(jnp.round(units) - units)) * step

  def fixed(self) -> InputArray:
    """The form that runs: the step as it is now."""
    step = float(jnp.abs(self.step).reshape(()))
    return InputArray(self.weight, Int8Static(step) if self.bits == 8 else StaticStep(step, self.bits), self.axis)

  def materialize(self) -> jax.Array:
    return parts.materialize(self.weight)

  def columns(self, start: Any, size: int) -> jax.Array:
    return parts.columns(self.weight, start, size, self.axis)

  def rows(self, ids: jax.Array) -> jax.Array:
    return parts.rows(self.weight, ids)

  def sharding_like(self, spec: PartitionSpec) -> LearnedInputArray:
    one: Any = PartitionSpec(*[None] * self.step.ndim)
    return dataclasses.replace(self, weight=parts.sharding_like(self.weight, spec), step=one)


def learned_input(weight: Any, step: float, bits: int, axis: int) -> LearnedInputArray:
  """A weight whose input is rounded by a step that starts at `step`.

  Raises:
    ValueError: the step is not above 0, bits are not 2 to 8, the axis is neither -2 nor -1, or the weight's input is
      acted on already.
  """
  if not 0 < step < math.inf or not 2 <= bits <= 8 or axis not in (-2, -1):
    raise ValueError(f"learned_input(step={step}, bits={bits}, axis={axis}): above 0, 2 to 8, -2 or -1")
  if isinstance(weight, (InputArray, LearnedInputArray)):
    raise ValueError(f"learned_input: the input of {weight.kind} is acted on already")
  return LearnedInputArray(weight, jnp.full((1, 1), step, jnp.float32), bits, axis)
