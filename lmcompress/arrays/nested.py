"""NestedArray: codes that serve several precisions, each adding bits to the one before it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmcompress.arrays.grids import Integer
from lmcompress.arrays.packing import Packed, choose_block, inlined, pack
from lmcompress.arrays.quantized import QuantizedArray
from lmcompress.types import CompressedArray


@functools.partial(jax.tree_util.register_dataclass, data_fields=("base", "extra"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class NestedArray(CompressedArray):
  """A quantized weight and more bits of each code: `code == (base code << extra bits) | extra`.

  An interval of the base is cut in equal parts, so the finer scale and minimum follow from the base's: with e more bits
  `scale == base scale / 2**e` and `minimum == base minimum - (base scale - scale) / 2`. Leaving `extra` out leaves the
  base, a whole weight of fewer bits (Park et al. 2024, Any-Precision LLM, arXiv:2402.10517).

  Attributes:
    base: a `QuantizedArray` of integer codes with real minimums, or a `NestedArray`.
    extra: the bits that the base lacks, packed, of its shape.
  """

  base: Any
  extra: Packed

  @property
  def shape(self) -> tuple[int, ...]:
    return self.extra.shape

  @property
  def dtype(self) -> Any:
    return self.base.dtype

  @property
  def axis(self) -> int:
    """The contraction axis."""
    return self.extra.axis

  @property
  def bits(self) -> int:
    """Bits of a code, all of them."""
    return self.widths[-1]

  @property
  def widths(self) -> tuple[int, ...]:
    """The bits of each precision, ascending."""
    below = self.base.widths if isinstance(self.base, NestedArray) else (self.base.codes.bits,)
    return (*below, below[-1] + self.extra.bits)

  @property
  def nbits(self) -> int:
    return self.base.nbits + self.extra.nbits

  @property
  def kind(self) -> str:
    return f"{self.quantized_kind} of {'/'.join(map(str, self.widths))}"

  @property
  def quantized_kind(self) -> str:
    seed = self.base
    while isinstance(seed, NestedArray):
      seed = seed.base
    return seed.kind.replace(f"int{seed.codes.bits}", f"int{self.bits}")

  @classmethod
  def trainable_fields(cls) -> tuple[str, ...]:
    return ("base",)

  def at(self, bits: int) -> Any:
    """The weight at one of its precisions: this very leaf, or a base of it.

    Raises:
      ValueError: it has no such precision.
    """
    if bits not in self.widths:
      raise ValueError(f"at({bits}): this weight has {', '.join(map(str, self.widths))} bits")
    return self if bits == self.bits else self.base if bits == self.widths[-2] else self.base.at(bits)

  def quantized(self) -> QuantizedArray:
    """The same weight as one `QuantizedArray`; its codes are packed anew."""
    codes, scale, minimum = self._parts()
    seed = self.seed
    packed = pack(codes, self.bits, self.axis, choose_block(self.shape[self.axis], seed.group_size, self.bits))
    return QuantizedArray(packed, scale, None, minimum, Integer(self.bits), seed.group_size, str(self.dtype))

  @property
  def seed(self) -> QuantizedArray:
    """The weight of the fewest bits."""
    return self.base.seed if isinstance(self.base, NestedArray) else self.base

  @inlined
  def materialize(self) -> jax.Array:
    return self.quantized().materialize()

  def columns(self, start: Any, size: int) -> jax.Array:
    where = -3 - self.axis
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, x.ndim + where)  # noqa: E731
    return self._map(lambda codes: codes.columns(start, size), cut).quantized().materialize().astype(jnp.float32)

  def rows(self, ids: jax.Array) -> jax.Array:
    some = self._map(lambda codes: codes.rows(ids.reshape(-1)), lambda x: x[ids.reshape(-1)])
    return some.quantized().materialize().astype(jnp.float32).reshape(*ids.shape, self.shape[-1])

  def sharding_like(self, spec: PartitionSpec) -> NestedArray:
    return NestedArray(self.base.sharding_like(spec), self.extra.sharding_like(spec))

  def _map(self, of_codes: Any, of_scales: Any) -> NestedArray:
    """The same with each part replaced by some of its outputs."""
    base = self.base
    if isinstance(base, NestedArray):
      base = base._map(of_codes, of_scales)
    else:
      scale, minimum = of_scales(base.scale), of_scales(base.minimum)
      base = dataclasses.replace(base, codes=of_codes(base.codes), scale=scale, minimum=minimum)
    return NestedArray(base, of_codes(self.extra))

  def _parts(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes uint8, scale and minimum in float32."""
    if isinstance(self.base, NestedArray):
      codes, scale, minimum = self.base._parts()
    else:
      assert self.base.minimum is not None
      codes, scale, minimum = self.base.codes.unpack(), self.base.scales(), self.base.minimum.astype(jnp.float32)
    finer = scale / 2**self.extra.bits
    return codes << self.extra.bits | self.extra.unpack(), finer, minimum - (scale - finer) / 2


def nested(base: Any, extra: jax.Array, bits: int) -> NestedArray:
  """Adds bits to a weight.

  Args:
    base: a `QuantizedArray` of integer codes with a real minimum for each group, or a `NestedArray`.
    extra: integers below `2**bits`, of its shape.
    bits: how many bits are added; a code has eight at most.

  Raises:
    ValueError: the parts do not fit one another.
  """
  seed = base.seed if isinstance(base, NestedArray) else base
  if not isinstance(seed, QuantizedArray) or not isinstance(seed.grid, Integer) or seed.minimum is None:
    raise ValueError(f"nested: the base holds integer codes with real minimums; found {seed.kind}")
  scale = seed.scale
  if isinstance(scale, CompressedArray) or scale.shape != seed.minimum.shape or scale.shape[-2:] == (1, 1):
    raise ValueError("nested: the base has a plain scale and a minimum for each group")
  have = base.bits if isinstance(base, NestedArray) else base.codes.bits
  if bits < 1 or have + bits > 8:
    raise ValueError(f"nested(bits={bits}): a code of {have} bits takes {8 - have} more at most, and one at least")
  if tuple(extra.shape) != tuple(base.shape):
    raise ValueError(f"nested: bits of shape {tuple(extra.shape)} do not fit a weight of shape {tuple(base.shape)}")
  return NestedArray(base, pack(extra, bits, base.axis, choose_block(base.shape[base.axis], seed.group_size, bits)))
