"""Grids: what a code means, as a frozen value that encodes and decodes."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Grid(Protocol):
  """Maps values in grid units (weight / scale) to codes and back.

  Attributes:
    bits: width of a code.
    name: short word for tables.
    largest: the value that a group's largest magnitude is scaled to.
  """

  @property
  def bits(self) -> int: ...

  @property
  def name(self) -> str: ...

  @property
  def largest(self) -> float: ...

  def encode(self, x: jax.Array) -> jax.Array:
    """Nearest codes, uint8, of float32 `x`; values outside the grid go to its ends."""
    ...

  def decode(self, codes: jax.Array) -> jax.Array:
    """float32 values of uint8 `codes`."""
    ...


@dataclasses.dataclass(frozen=True)
class Integer:
  """Evenly spaced integers: `value == code - offset`, codes from `lowest` to `2**bits - 1`.

  Symmetric grids have `offset = 2**(bits-1)`; with a zero point or a minimum the offset is 0.
  """

  bits: int
  offset: int = 0
  lowest: int = 0

  @property
  def name(self) -> str:
    return f"int{self.bits}"

  @property
  def largest(self) -> float:
    return float(2**self.bits - 1 - self.offset)

  def encode(self, x: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(x) + self.offset, self.lowest, 2**self.bits - 1).astype(jnp.uint8)

  def decode(self, codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.float32) - self.offset if self.offset else codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Table:
  """An ascending table of at most 256 values; a code is an index into it."""

  name: str
  values: tuple[float, ...]

  @property
  def bits(self) -> int:
    return max(1, (len(self.values) - 1).bit_length())

  @property
  def largest(self) -> float:
    return max(abs(v) for v in self.values)

  def encode(self, x: jax.Array) -> jax.Array:
    values = np.asarray(self.values, np.float32)
    midpoints = (values[1:] + values[:-1]) / 2
    return jnp.searchsorted(jnp.asarray(midpoints), x, side="left", method="compare_all").astype(jnp.uint8)

  def decode(self, codes: jax.Array) -> jax.Array:
    return jnp.asarray(np.asarray(self.values, np.float32))[codes]


@dataclasses.dataclass(frozen=True)
class Float8:
  """An 8-bit float; a code is its bit pattern. Values are clamped first, since e4m3fn has no infinity."""

  name: str

  bits: int = dataclasses.field(default=8, init=False)

  @property
  def _dtype(self) -> Any:
    return {"fp8_e4m3": jnp.float8_e4m3fn, "fp8_e5m2": jnp.float8_e5m2}[self.name]

  @property
  def largest(self) -> float:
    return float(jnp.finfo(self._dtype).max)

  def encode(self, x: jax.Array) -> jax.Array:
    clamped = jnp.clip(x, -self.largest, self.largest)
    return jax.lax.bitcast_convert_type(clamped.astype(self._dtype), jnp.uint8)

  def decode(self, codes: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(codes, self._dtype).astype(jnp.float32)


NF4 = Table(
  "nf4",
  (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
  ),
)
"""Quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314, appendix E)."""

E2M1 = Table("fp4", (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
"""The 4-bit float of MXFP4 and NVFP4 (OCP Microscaling Formats 1.0, section 5.3.3); its two zeros are one code."""

FP8_E4M3 = Float8("fp8_e4m3")
FP8_E5M2 = Float8("fp8_e5m2")

TABLES: dict[str, Grid] = {"nf4": NF4, "fp8_e4m3": FP8_E4M3, "fp8_e5m2": FP8_E5M2, "mxfp4": E2M1, "nvfp4": E2M1}
"""Grids by the name that a recipe gives them; integers are made from `bits`."""
