"""ClusteredArray: a weight whose every entry is one of a few shared values."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmcompress.arrays import parts
from lmcompress.arrays.packing import Packed, choose_block, inlined, pack
from lmcompress.types import CompressedArray


@functools.partial(jax.tree_util.register_dataclass, data_fields=("codes", "codebook"), meta_fields=("dtype",))
@dataclasses.dataclass(frozen=True)
class ClusteredArray(CompressedArray):
  """`dense == codebook[codes]`. A code is an index, so a mask over it needs a codebook that holds 0.

  Attributes:
    codes: packed codes of the logical shape `[..., in, out]` (or `[..., vocab, features]` for axis -1).
    codebook: `[..., entries]`, any float dtype, one for each matrix; or `[..., books, entries]`, one for each of as
      many runs of consecutive outputs; at most `2**bits` entries.
    dtype: name of the dtype of the dense value.
  """

  codes: Packed
  codebook: jax.Array
  dtype: str

  @property
  def shape(self) -> tuple[int, ...]:
    return self.codes.shape

  @property
  def axis(self) -> int:
    """The contraction axis."""
    return self.codes.axis

  @property
  def nbits(self) -> int:
    return self.codes.nbits + parts.nbits(self.codebook)

  @property
  def kind(self) -> str:
    books = "" if self.books == 1 else " row" if self.books == self.outputs else f" x{self.books}"
    return f"clustered {self.codebook.shape[-1]}{books}"

  @property
  def outputs(self) -> int:
    return self.shape[-3 - self.axis]

  @property
  def books(self) -> int:
    """Codebooks of a matrix."""
    return self.codebook.shape[-2] if self.codebook.ndim == len(self.shape) else 1

  @classmethod
  def trainable_fields(cls) -> tuple[str, ...]:
    return ("codebook",)

  @inlined
  def materialize(self) -> jax.Array:
    return self._decode(self.codes, self.shape[:-2], jnp.arange(self.outputs)).astype(self.dtype)

  def columns(self, start: Any, size: int) -> jax.Array:
    return self._decode(self.codes.columns(start, size), self.shape[:-2], start + jnp.arange(size))

  def rows(self, ids: jax.Array) -> jax.Array:
    return self._decode(self.codes.rows(ids), (), ids)

  def sharding_like(self, spec: PartitionSpec) -> ClusteredArray:
    lead = parts.spec_of_rank(spec, len(self.shape))[:-2]
    return dataclasses.replace(
      self,
      codes=self.codes.sharding_like(spec),
      codebook=PartitionSpec(*lead, *self._books_spec(spec), None),  # type: ignore
    )

  def _books_spec(self, spec: PartitionSpec) -> tuple[Any, ...]:
    """One for each output is split as they are; fewer stay whole."""
    if self.codebook.ndim != len(self.shape):
      return ()
    return (parts.spec_of_rank(spec, len(self.shape))[-3 - self.axis] if self.books == self.outputs else None,)

  def _decode(self, codes: Packed, lead: tuple[int, ...], outputs: jax.Array) -> jax.Array:
    """float32, a codebook for each of `lead`; a code beyond the codebook reads as NaN.

    Args:
      outputs: which the codes are of, where runs of them have their own codebook.
    """
    indices = codes.unpack().astype(jnp.int32)
    if self.codebook.ndim == len(self.shape):
      books = jnp.take(self.codebook.astype(jnp.float32), outputs * self.books // self.outputs, axis=-2)
      by_output = jnp.swapaxes(indices, -1, -2) if self.axis == -2 else indices
      values = jnp.take_along_axis(books, by_output, axis=-1)
      return jnp.swapaxes(values, -1, -2) if self.axis == -2 else values
    flat = indices.reshape(*lead, -1)
    return jnp.take_along_axis(self.codebook.astype(jnp.float32), flat, axis=-1).reshape(indices.shape)


def clustered(codes: jax.Array, codebook: jax.Array, bits: int, axis: int, dtype: Any = None) -> ClusteredArray:
  """Packs integer `codes` into `codebook`.

  Args:
    codes: `[..., in, out]` for axis -2, `[..., vocab, features]` for axis -1; integers below the entries.
    codebook: `[..., entries]` floats, or `[..., books, entries]` with books a divisor of the outputs.
    bits: width of a code, 1 to 8.
    axis: the contraction axis.
    dtype: of the dense value; the codebook's if None.

  Raises:
    ValueError: the parts do not fit one another.
  """
  what = f"clustered(bits={bits}, axis={axis})"
  if not 1 <= bits <= 8 or axis not in (-2, -1):
    raise ValueError(f"{what}: bits are 1 to 8, axis is -2 (kernel) or -1 (table)")
  if not jnp.issubdtype(codes.dtype, jnp.integer) or not jnp.issubdtype(codebook.dtype, jnp.floating):
    raise ValueError(f"{what}: integer codes and a float codebook are needed, found {codes.dtype}, {codebook.dtype}")
  several = codebook.ndim == codes.ndim
  lead = codebook.shape[:-2] if several else codebook.shape[:-1]
  if codes.ndim < 2 or tuple(lead) != tuple(codes.shape[:-2]) or codebook.ndim not in (codes.ndim - 1, codes.ndim):
    raise ValueError(f"{what}: a codebook {codebook.shape} does not fit codes {codes.shape}; one row for each matrix")
  if several and (not codebook.shape[-2] or codes.shape[-3 - axis] % codebook.shape[-2]):
    raise ValueError(f"{what}: {codebook.shape[-2]} codebooks do not divide {codes.shape[-3 - axis]} outputs")
  entries = codebook.shape[-1]
  if not 1 <= entries <= 2**bits:
    raise ValueError(f"{what}: {entries} entries in the codebook; {bits} bits reach 1 to {2**bits}")
  if not isinstance(codes, jax.core.Tracer) and codes.size:
    low, high = int(jnp.min(codes)), int(jnp.max(codes))
    if low < 0 or high >= entries:
      raise ValueError(f"{what}: codes from {low} to {high} point outside a codebook of {entries} entries")
  packed = pack(codes, bits, axis, choose_block(codes.shape[axis], -1, bits))
  return ClusteredArray(packed, jnp.asarray(codebook), str(jnp.dtype(codebook.dtype if dtype is None else dtype)))
