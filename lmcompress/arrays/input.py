"""InputArray: a weight that does something to its input first, such as rounding it to 8 bits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmcompress.arrays import parts
from lmcompress.types import CompressedArray


class Act(Protocol):
  """What is done to an input: a frozen, hashable value that is called.

  Attributes:
    name: short word for tables.
  """

  @property
  def name(self) -> str: ...

  def __call__(self, x: jax.Array) -> jax.Array:
    """float32 of the shape of `x: [..., features]`."""
    ...


def _straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
  """`rounded`, with the gradient of `x`; NaN and infinity in `x` become NaN."""
  return jax.lax.stop_gradient(rounded) + (x - jax.lax.stop_gradient(x))


@dataclasses.dataclass(frozen=True)
class Int8PerToken:
  """Rounds each token to int8 by a scale of its own: `scale == max(|x|) / 127`, symmetric.

  `x` comes back fake-quantized; its gradient passes straight through. A token that holds NaN or infinity
  becomes NaN.
  """

  @property
  def name(self) -> str:
    return "int8 per token"

  def scale(self, x: jax.Array) -> jax.Array:
    """`[..., 1]` float32; 1 for a token of zeros."""
    scale = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True, initial=0.0) / 127
    return jnp.where(scale == 0, 1.0, scale)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    scale = self.scale(x)
    rounded = jnp.clip(jnp.round(x / scale), -127, 127) * scale
    return _straight_through(x, rounded)


@dataclasses.dataclass(frozen=True)
class Int8PerGroup:
  """Rounds each token to int8 with a scale for every 32 inputs: an outlier coarsens its neighbours alone."""

  @property
  def name(self) -> str:
    return "int8 per group"

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    spare = -x.shape[-1] % _GROUP
    groups = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, spare)]).reshape(*x.shape[:-1], -1, _GROUP)
    return Int8PerToken()(groups).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]


@dataclasses.dataclass(frozen=True)
class Float8PerToken:
  """Rounds each token to fp8 (e4m3) by a scale of its own: `scale == max(|x|) / 448` (arXiv:2209.05433)."""

  @property
  def name(self) -> str:
    return "fp8 per token"

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0.0) / 448
    scale = jnp.where(scale == 0, 1.0, scale)
    rounded = jnp.clip(x / scale, -448, 448).astype(jnp.float8_e4m3fn).astype(jnp.float32) * scale
    return _straight_through(x, rounded)


@dataclasses.dataclass(frozen=True)
class Uint8PerTensor:
  """Rounds an input to uint8 by the range of all its tokens, zero in it, as ONNX's DynamicQuantizeLinear.

  `scale == (max - min) / 255`, `zero == round(-min / scale)`, `(clip(round(x / scale) + zero, 0, 255) - zero) * scale`.
  What a token becomes depends on the others of the call, padding and other rows with them. A range past float32's
  largest number gives NaN, there as here.
  """

  @property
  def name(self) -> str:
    return "uint8 per tensor"

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    low, high = jnp.min(x, initial=0.0), jnp.max(x, initial=0.0)
    scale = jnp.where(high == low, 1.0, (high - low) / 255)
    zero = jnp.clip(jnp.round(-low / scale), 0, 255)
    rounded = (jnp.clip(jnp.round(x / scale) + zero, 0, 255) - zero) * scale
    return _straight_through(x, rounded)


@dataclasses.dataclass(frozen=True)
class Int8Static:
  """Rounds to int8 by one scale that calibration chose beforehand: `clip(round(x / step), -127, 127) * step`."""

  step: float

  nbits = 32
  """Bits of the scale."""

  @property
  def name(self) -> str:
    return "int8 static"

  def __call__(self, x: jax.Array) -> jax.Array:
    return StaticStep(self.step, 8)(x)


@dataclasses.dataclass(frozen=True)
class StaticStep:
  """Rounds to so many bits by one scale: `clip(round(x / step), -high, high) * step`, `high == 2**(bits - 1) - 1`."""

  step: float
  bits: int

  nbits = 32
  """Bits of the scale."""

  @property
  def name(self) -> str:
    return f"int{self.bits} static"

  def __call__(self, x: jax.Array) -> jax.Array:
    x, high = x.astype(jnp.float32), 2 ** (self.bits - 1) - 1
    rounded = jnp.clip(jnp.round(x / self.step), -high, high) * self.step
    return _straight_through(x, rounded)


@dataclasses.dataclass(frozen=True)
class FixedStep:
  """Rounds to the nearest multiple of `step`, whatever the size: `round(x / step) * step`."""

  step: float

  @property
  def name(self) -> str:
    return f"step {self.step:g}"

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    rounded = jnp.round(x / self.step) * self.step
    return _straight_through(x, rounded)


@dataclasses.dataclass(frozen=True)
class Threshold:
  """Sets to zero what is smaller: `where(|x| >= limit, x, 0)`; NaN stays."""

  limit: float

  nbits = 32
  """Bits of the limit."""

  @property
  def name(self) -> str:
    return f"above {self.limit:.3g}"

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return jnp.where(jnp.abs(x) < self.limit, 0.0, x)


_GROUP = 32
ACTS: dict[str, Act] = {
  "int8_per_token": Int8PerToken(), "int8_per_group": Int8PerGroup(), "fp8_per_token": Float8PerToken(),
  "uint8_per_tensor": Uint8PerTensor(),
}  # fmt: skip
"""What may be done to an input, by the name that a recipe gives it."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weight",), meta_fields=("act", "axis"))
@dataclasses.dataclass(frozen=True)
class InputArray(CompressedArray):
  """`linear(x, self) == linear(act(x), weight)`, and `attend` likewise; the dense value is the weight's.

  It stands outermost, over masks too: what decodes a weight tile by tile would leave `act` out.

  Attributes:
    weight: dense or compressed.
    act: what is done to the input.
    axis: the contraction axis, which a dense weight does not tell.
  """

  weight: Any
  act: Act
  axis: int

  @property
  def shape(self) -> tuple[int, ...]:
    return self.weight.shape

  @property
  def dtype(self) -> Any:
    return self.weight.dtype

  @property
  def nbits(self) -> int:
    return parts.nbits(self.weight) + getattr(self.act, "nbits", 0)

  @property
  def kind(self) -> str:
    return f"{self.act.name} x {parts.kind(self.weight)}"

  @classmethod
  def trainable_fields(cls) -> tuple[str, ...]:
    return ("weight",)

  def materialize(self) -> jax.Array:
    return parts.materialize(self.weight)

  def columns(self, start: Any, size: int) -> jax.Array:
    return parts.columns(self.weight, start, size, self.axis)

  def rows(self, ids: jax.Array) -> jax.Array:
    return parts.rows(self.weight, ids)

  def sharding_like(self, spec: PartitionSpec) -> InputArray:
    return dataclasses.replace(self, weight=parts.sharding_like(self.weight, spec))


def with_act(weight: Any, act: Act, axis: int | None = None) -> InputArray:
  """A weight with `act` on its input.

  Args:
    weight: dense or compressed.
    act: such as `Int8PerToken()`.
    axis: the contraction axis; a compressed weight knows it.

  Raises:
    ValueError: the axis is missing, or is not the weight's.
  """
  known = getattr(weight, "axis", axis)
  if known not in (-2, -1) or axis not in (None, known):
    raise ValueError(
      f"with_act(axis={axis}) over {parts.kind(weight)}: axis is -2 (kernel) or -1 (table), the weight's is {known}"
    )
  return InputArray(weight, act, known)
