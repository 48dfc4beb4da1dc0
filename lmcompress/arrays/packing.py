"""Packed codes: integers of 1 to 8 bits without a wasted bit, laid out so that unpacking needs no shuffle."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

inlined = functools.partial(jax.jit, inline=True)
"""One program where it is called by hand, a part of the caller's where that is compiled."""

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
_LARGEST_BLOCK = 128


def multiple(bits: int) -> int:
  """The number of codes that a block must be a multiple of, for each bit plane to fill whole bytes."""
  return 8 // min(PLANES[bits])


def choose_block(inputs: int, group_size: int, bits: int) -> int:
  """Codes packed together: within one scale group where that wastes no more than a byte's worth of padding.

  A block that divides both the group and the row needs no padding; a row that no block divides (577 inputs)
  is padded to the next multiple that planes need.
  """
  m = multiple(bits)
  group = inputs if group_size == -1 else min(group_size, inputs)
  divisors = [b for b in range(min(group, _LARGEST_BLOCK), 0, -1) if group % b == 0 and b % m == 0]
  exact = [b for b in divisors if inputs % b == 0]
  if exact and exact[0] >= min(16, group):
    return exact[0]
  if group_size == -1 or group >= inputs:
    return m * math.ceil(inputs / m)
  frugal = [b for b in divisors if -inputs % b < m]
  return frugal[0] if frugal else m


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
  """Codes of `bits` bits along the contraction axis, `shape` derived from `data`.

  The contraction axis is cut into blocks. A block's codes are split into bit planes (3 bits are a plane of 2
  and a plane of 1), and field k of the bytes of a plane holds the k-th part of the block: at 4 bits, low
  nibbles are the first half and high nibbles the second. So `fields` yields slices that need no interleaving,
  no code straddles a byte, and a shard boundary between blocks never splits one.

  Attributes:
    data: uint8 `[..., blocks, bytes, out]` for axis -2, `[..., blocks, bytes]` for axis -1.
    bits: width of a code.
    axis: the contraction axis of the logical array.
    pad: codes at the end that are not part of the logical array.
  """

  data: jax.Array
  bits: int = dataclasses.field(metadata={"static": True})
  axis: int = dataclasses.field(metadata={"static": True})
  pad: int = dataclasses.field(metadata={"static": True})

  @property
  def block(self) -> int:
    return self.data.shape[self.axis] * 8 // self.bits

  @property
  def blocks(self) -> int:
    return self.data.shape[self.axis - 1]

  @property
  def shape(self) -> tuple[int, ...]:
    inputs = self.blocks * self.block - self.pad
    lead = self.data.shape[: self.data.ndim + self.axis - 1]
    return (*lead, inputs, self.data.shape[-1]) if self.axis == -2 else (*lead, inputs)

  @property
  def nbits(self) -> int:
    return self.data.size * 8

  @inlined
  def unpack(self) -> jax.Array:
    """The codes as uint8, `[...shape]`."""
    codes = jnp.concatenate(fields(self.data, self.bits, self.axis), axis=self.axis)
    return merge_blocks(codes, self.axis, self.pad)

  def columns(self, start: Any, size: int) -> Packed:
    """The codes of `size` outputs (table rows for axis -1) from `start` on, still packed."""
    where = self.data.ndim - 1 if self.axis == -2 else self.data.ndim - 3
    return dataclasses.replace(self, data=jax.lax.dynamic_slice_in_dim(self.data, start, size, where))

  def rows(self, ids: jax.Array) -> Packed:
    """The codes of the rows `ids` of a table, still packed."""
    return dataclasses.replace(self, data=self.data[ids])

  def sharding_like(self, spec: PartitionSpec) -> Packed:
    """Blocks are split as the contraction axis is; bytes never."""
    parts = _pad_spec(spec, len(self.shape))
    if self.axis == -2:
      return dataclasses.replace(self, data=PartitionSpec(*parts[:-2], parts[-2], None, parts[-1]))  # type: ignore
    return dataclasses.replace(self, data=PartitionSpec(*parts[:-1], parts[-1], None))  # type: ignore


def _pad_spec(spec: PartitionSpec, ndim: int) -> tuple:
  return (*spec, *([None] * (ndim - len(spec))))


def split_blocks(x: jax.Array, axis: int, block: int) -> jax.Array:
  """Pads the contraction axis to whole blocks and splits it in `[blocks, block]`."""
  inputs = x.shape[axis]
  pad = -inputs % block
  if pad:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, pad)
    x = jnp.pad(x, widths)
  where = x.ndim + axis
  return x.reshape(*x.shape[:where], (inputs + pad) // block, block, *x.shape[where + 1 :])


def merge_blocks(x: jax.Array, axis: int, pad: int) -> jax.Array:
  """Undoes `split_blocks`."""
  where = x.ndim + axis
  x = x.reshape(*x.shape[: where - 1], x.shape[where - 1] * x.shape[where], *x.shape[where + 1 :])
  return jax.lax.slice_in_dim(x, 0, x.shape[axis] - pad, axis=axis) if pad else x


@functools.partial(inlined, static_argnames=("bits", "axis", "block"))
def pack(codes: jax.Array, bits: int, axis: int, block: int) -> Packed:
  """Packs integer `codes` in `[0, 2**bits)`; `block` is a multiple of `multiple(bits)`."""
  if block % multiple(bits):
    raise ValueError(f"pack(bits={bits}): a block of {block} codes is not a multiple of {multiple(bits)}")
  blocks = split_blocks(codes.astype(jnp.uint8), axis, block)
  planes, shift = [], 0
  for width in PLANES[bits]:
    per_byte, part = 8 // width, block * width // 8
    plane = (blocks >> shift) & (2**width - 1)
    byte = jnp.zeros((), jnp.uint8)
    for k in range(per_byte):
      byte = byte | (jax.lax.slice_in_dim(plane, k * part, (k + 1) * part, axis=axis) << (k * width))
    planes.append(byte)
    shift += width
  return Packed(jnp.concatenate(planes, axis=axis), bits, axis, -codes.shape[axis] % block)


def fields(data: jax.Array, bits: int, axis: int) -> list[jax.Array]:
  """The codes of each block in equal consecutive parts, uint8, along the byte axis `axis` of `data`.

  At 4 bits: `[first half, second half]`. Products over the parts need no concatenation.
  """
  block = data.shape[axis] * 8 // bits
  parts = multiple(bits)
  part = block // parts
  out = []
  for j in range(parts):
    code, shift, offset = None, 0, 0
    for width in PLANES[bits]:
      plane = block * width // 8
      field, within = divmod(j * part, plane)
      byte = jax.lax.slice_in_dim(data, offset + within, offset + within + part, axis=axis)
      bits_here = byte if width == 8 else ((byte >> (field * width)) & (2**width - 1)) << shift
      code = bits_here if code is None else code | bits_here
      shift, offset = shift + width, offset + plane
    out.append(code)
  return out
