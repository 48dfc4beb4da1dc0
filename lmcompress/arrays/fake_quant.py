"""FakeQuantArray: a weight that trains as floats and computes as the codes it will become."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmcompress.arrays import parts
from lmcompress.arrays.packing import inlined
from lmcompress.types import CompressedArray


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("values", "scale", "minimum"),
  meta_fields=("bits", "group_size", "axis", "scale_dtype", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class FakeQuantArray(CompressedArray):
  """`dense == clip(round((values - minimum) / scale), low, high) * scale + minimum`; gradients reach all three.

  Rounding passes gradients straight through (Bengio et al. 2013, arXiv:1308.3432), and the scale is learned as a step
  size (Esser et al. 2020, LSQ, arXiv:1902.08153, with its gradient scale; a minimum as in LSQ+, arXiv:2004.09576).
  Without a minimum codes run from `-2**(bits - 1)` on, with one from 0.

  Attributes:
    values: float `[..., in, out]` for axis -2, `[..., vocab, features]` for axis -1.
    scale: float, `[..., groups, out]` (`[..., vocab, groups]`); its magnitude counts.
    minimum: shaped as the scale, or None.
    bits: width of a code.
    group_size: inputs that share a scale, a divisor of them; -1 for a row.
    axis: the contraction axis.
    scale_dtype: what scales and minimums are rounded to, as they will be stored.
    dtype: name of the dtype of the dense value; what trains is finer.
  """

  values: jax.Array
  scale: jax.Array
  minimum: jax.Array | None
  bits: int
  group_size: int
  axis: int
  scale_dtype: str
  dtype: str

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  @property
  def nbits(self) -> int:
    """Of the training form; `freeze` makes it small."""
    return sum(parts.nbits(part) for part in (self.values, self.scale, self.minimum) if part is not None)

  @property
  def kind(self) -> str:
    group = "row" if self.group_size == -1 else f"g{self.group_size}"
    return f"training int{self.bits} {group}{'' if self.minimum is None else ' min'}"

  @classmethod
  def trainable_fields(cls) -> tuple[str, ...]:
    return ("values", "scale", "minimum")

  @inlined
  def materialize(self) -> jax.Array:
    return self._dense(self.values, self.scale, self.minimum).astype(self.dtype)

  def columns(self, start: Any, size: int) -> jax.Array:
    cut = [
      None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, x.ndim - 3 - self.axis)
      for x in (self.values, self.scale, self.minimum)
    ]
    return self._dense(*cut)  # type: ignore[arg-type]

  def rows(self, ids: jax.Array) -> jax.Array:
    return self._dense(*(None if x is None else x[ids] for x in (self.values, self.scale, self.minimum)))  # type: ignore

  def sharding_like(self, spec: PartitionSpec) -> FakeQuantArray:
    whole = parts.spec_of_rank(spec, len(self.shape))
    one = self.scale.shape[self.axis] == 1
    few: Any = parts.without(spec, self.axis, len(self.shape)) if one else whole
    return dataclasses.replace(self, values=whole, scale=few, minimum=None if self.minimum is None else few)  # type: ignore

  def codes(self) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """uint8 codes from 0 on, of the shape of `values`; the scale and the minimum as they are used and stored."""
    scale, minimum = self._stored(self.scale), None if self.minimum is None else self.minimum
    minimum = None if minimum is None else minimum.astype(self.scale_dtype).astype(jnp.float32)
    q = jnp.round(self._units(self.values, scale, minimum))
    low, high = self._limits()
    return (jnp.clip(q, low, high) - low).astype(jnp.uint8), scale, minimum

  def _limits(self) -> tuple[int, int]:
    return (0, 2**self.bits - 1) if self.minimum is not None else (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

  def _stored(self, scale: jax.Array) -> jax.Array:
    """float32 and above 0, as the stored form will have it."""
    tiny = float(jnp.finfo(self.scale_dtype).tiny)
    return jnp.maximum(jnp.abs(scale.astype(jnp.float32)), tiny).astype(self.scale_dtype).astype(jnp.float32)

  def _wide(self, x: jax.Array) -> jax.Array:
    """One value a group, repeated for each input."""
    return x if x.shape[self.axis] == 1 else jnp.repeat(x, self.group_size, axis=self.axis)

  def _units(self, values: jax.Array, scale: jax.Array, minimum: jax.Array | None) -> jax.Array:
    shifted = values.astype(jnp.float32) if minimum is None else values.astype(jnp.float32) - self._wide(minimum)
    return shifted / self._wide(scale)

  def _dense(self, values: jax.Array, scale: jax.Array, minimum: jax.Array | None) -> jax.Array:
    low, high = self._limits()
    group = self.shape[self.axis] // self.scale.shape[self.axis]
    damp = 1 / math.sqrt(group * max(high, 1))  # LSQ's gradient scale
    learned = jnp.abs(scale.astype(jnp.float32))
    learned = learned * damp + jax.lax.stop_gradient(learned * (1 - damp))
    s = learned + jax.lax.stop_gradient(self._stored(scale) - learned)
    m = None
    if minimum is not None:
      m = minimum.astype(jnp.float32)
      m = m * damp + jax.lax.stop_gradient(m * (1 - damp))
      m = m + jax.lax.stop_gradient(minimum.astype(self.scale_dtype).astype(jnp.float32) - m)
    units = jnp.clip(self._units(values, s, m), low, high)
    rounded = units + jax.lax.stop_gradient(jnp.round(units) - units)
    dense = rounded * self._wide(s)
    return dense if m is None else dense + self._wide(m)


def fake_quant(
  values: jax.Array,
  scale: jax.Array,
  minimum: jax.Array | None,
  bits: int,
  axis: int,
  scale_dtype: str = "bfloat16",
  dtype: Any = None,
) -> FakeQuantArray:
  """A weight that trains towards codes.

  Args:
    values: floats `[..., in, out]` for axis -2, `[..., vocab, features]` for axis -1.
    scale: floats, one for each group of inputs and output; groups divide the inputs.
    minimum: shaped as the scale, or None.
    bits: 2 to 8.
    axis: the contraction axis.
    scale_dtype: what scales and minimums are rounded to.
    dtype: of the dense value; that of the values if None.

  Raises:
    ValueError: the parts do not fit one another.
  """
  what = f"fake_quant(bits={bits}, axis={axis})"
  if not 2 <= bits <= 8 or axis not in (-2, -1) or values.ndim < 2 or not jnp.issubdtype(values.dtype, jnp.floating):
    raise ValueError(f"{what}: 2 to 8 bits, axis -2 or -1, floats of two axes or more; found {values.dtype}")
  groups, inputs = scale.shape[axis] if scale.ndim == values.ndim else 0, values.shape[axis]
  shape = list(values.shape)
  shape[axis] = groups
  if not groups or inputs % groups or list(scale.shape) != shape:
    raise ValueError(f"{what}: scales {tuple(scale.shape)} do not fit values {tuple(values.shape)}")
  if minimum is not None and minimum.shape != scale.shape:
    raise ValueError(f"{what}: minimums {tuple(minimum.shape)} do not fit scales {tuple(scale.shape)}")
  group_size, name = -1 if groups == 1 else inputs // groups, str(jnp.dtype(values.dtype if dtype is None else dtype))
  return FakeQuantArray(values, scale, minimum, bits, group_size, axis, scale_dtype, name)
