"""DictionaryArray: runs of inputs, each written as a few atoms of one dictionary."""

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


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("atoms", "codes", "coefficients"),
  meta_fields=("terms", "pad", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class DictionaryArray(CompressedArray):
  """`run == sum over terms of coefficient * atoms[code]`, for each run of `width` inputs of an output.

  One term without a coefficient is product quantization; several with coefficients are a sparse code.

  Attributes:
    atoms: `[..., spaces, count, width]`, any float dtype; spaces is 1, or the number of runs, each with its own atoms.
    codes: packed `[..., runs * terms, out]` for axis -2 (`[..., vocab, runs * terms]` for -1), the terms of a run
      side by side.
    coefficients: shaped as the codes, dense or compressed along the same axis; None for 1.
    terms: atoms of a run.
    pad: inputs at the end that are not part of the weight.
    dtype: name of the dtype of the dense value.
  """

  atoms: jax.Array
  codes: Packed
  coefficients: Any
  terms: int
  pad: int
  dtype: str

  @property
  def axis(self) -> int:
    """The contraction axis."""
    return self.codes.axis

  @property
  def width(self) -> int:
    """Inputs of a run."""
    return self.atoms.shape[-1]

  @property
  def shape(self) -> tuple[int, ...]:
    shape = list(self.codes.shape)
    shape[self.axis] = shape[self.axis] // self.terms * self.width - self.pad
    return tuple(shape)

  @property
  def nbits(self) -> int:
    given = [self.atoms, self.codes, *([] if self.coefficients is None else [self.coefficients])]
    return sum(parts.nbits(part) for part in given)

  @property
  def kind(self) -> str:
    spaces, count, width = self.atoms.shape[-3:]
    if self.coefficients is None:
      return f"product {count} of {width}{' each' if spaces > 1 else ''}"
    return f"{self.terms} of {count} atoms of {width}"

  @classmethod
  def trainable_fields(cls) -> tuple[str, ...]:
    return ("atoms", "coefficients")

  @inlined
  def materialize(self) -> jax.Array:
    coefficients = None if self.coefficients is None else parts.materialize(self.coefficients)
    return self._decode(self.codes.unpack(), coefficients).astype(self.dtype)

  def columns(self, start: Any, size: int) -> jax.Array:
    given = None if self.coefficients is None else parts.columns(self.coefficients, start, size, self.axis)
    return self._decode(self.codes.columns(start, size).unpack(), given)

  def rows(self, ids: jax.Array) -> jax.Array:
    flat = ids.reshape(-1)
    given = None if self.coefficients is None else parts.rows(self.coefficients, flat)
    return self._decode(self.codes.rows(flat).unpack(), given).reshape(*ids.shape, self.shape[-1])

  def sharding_like(self, spec: PartitionSpec) -> DictionaryArray:
    """Runs are split as the inputs are; atoms stay whole."""
    lead = parts.spec_of_rank(spec, len(self.shape))[:-2]
    given = None if self.coefficients is None else parts.sharding_like(self.coefficients, spec)
    atoms: Any = PartitionSpec(*lead, None, None, None)
    return dataclasses.replace(self, atoms=atoms, codes=self.codes.sharding_like(spec), coefficients=given)

  def _decode(self, codes: jax.Array, coefficients: jax.Array | None) -> jax.Array:
    """float32 of unpacked codes, whose outputs may be some of the weight's."""
    one = functools.partial(_sum_of_atoms, terms=self.terms, axis=self.axis)
    for _ in range(codes.ndim - 2):
      one = jax.vmap(one, in_axes=(0, 0, None if coefficients is None else 0))
    dense = one(self.atoms.astype(jnp.float32), codes.astype(jnp.int32), coefficients)
    return jax.lax.slice_in_dim(dense, 0, dense.shape[self.axis] - self.pad, axis=self.axis)


def _sum_of_atoms(
  atoms: jax.Array, codes: jax.Array, coefficients: jax.Array | None, terms: int, axis: int
) -> jax.Array:
  """`[in, out]` of codes `[runs * terms, out]`, or `[out, in]` of `[out, runs * terms]`."""
  by_run = codes if axis == -2 else codes.T  # [runs * terms, out]
  runs, outputs = by_run.shape[0] // terms, by_run.shape[1]
  spaces = jnp.arange(runs)[:, None, None] if atoms.shape[0] > 1 else 0
  at = atoms.at[spaces, by_run.reshape(runs, terms, outputs)]  # [runs, terms, out, width]
  found = at.get(mode="fill", fill_value=jnp.nan)  # a code beyond the atoms reads as NaN
  if coefficients is not None:
    weights = (coefficients if axis == -2 else coefficients.T).astype(jnp.float32)
    found = found * weights.reshape(runs, terms, outputs)[..., None]
  dense = jnp.sum(found, axis=1)  # [runs, out, width]
  if axis == -2:
    return jnp.swapaxes(dense, 1, 2).reshape(runs * dense.shape[-1], outputs)
  return jnp.swapaxes(dense, 0, 1).reshape(outputs, runs * dense.shape[-1])


def dictionary(
  atoms: jax.Array, codes: jax.Array, coefficients: Any, inputs: int, axis: int, dtype: Any = None
) -> DictionaryArray:
  """A weight of atoms.

  Args:
    atoms: `[..., spaces, count, width]` floats, 2 to 256 atoms; one space, or one for each run.
    codes: `[..., runs * terms, out]` for axis -2, `[..., vocab, runs * terms]` for -1; integers below count, the terms
      of a run side by side.
    coefficients: shaped as the codes, dense or compressed along `axis`; None for 1.
    inputs: extent of the contraction axis; the last run may be longer than what is left of it.
    axis: the contraction axis.
    dtype: of the dense value; the atoms' if None.

  Raises:
    ValueError: the parts do not fit one another.
  """
  what = f"dictionary(inputs={inputs}, axis={axis})"
  if axis not in (-2, -1) or codes.ndim < 2 or atoms.ndim != codes.ndim + 1:
    raise ValueError(f"{what}: atoms {tuple(atoms.shape)} [..., spaces, count, width], codes {tuple(codes.shape)}")
  if not jnp.issubdtype(codes.dtype, jnp.integer) or not jnp.issubdtype(atoms.dtype, jnp.floating):
    raise ValueError(f"{what}: integer codes and float atoms are needed, found {codes.dtype} and {atoms.dtype}")
  spaces, count, width = atoms.shape[-3:]
  if not 2 <= count <= 256 or width < 1 or inputs < 1:
    raise ValueError(f"{what}: {count} atoms of {width}; 2 to 256 atoms of at least 1 input")
  runs = -(-inputs // width)
  terms = codes.shape[axis] // runs
  if not terms or codes.shape[axis] % runs or spaces not in (1, runs) or atoms.shape[:-3] != codes.shape[:-2]:
    raise ValueError(f"{what}: codes {tuple(codes.shape)} and {spaces} spaces do not fit {runs} runs of {width} inputs")
  if coefficients is None and terms > 1:
    raise ValueError(f"{what}: {terms} terms need coefficients")
  if coefficients is not None and (
    tuple(coefficients.shape) != tuple(codes.shape) or getattr(coefficients, "axis", axis) != axis
  ):
    raise ValueError(f"{what}: coefficients {tuple(coefficients.shape)} do not fit codes {tuple(codes.shape)}")
  if not isinstance(codes, jax.core.Tracer) and codes.size:
    low, high = int(jnp.min(codes)), int(jnp.max(codes))
    if low < 0 or high >= count:
      raise ValueError(f"{what}: codes from {low} to {high} point outside {count} atoms")
  bits = (count - 1).bit_length()
  packed = pack(codes, bits, axis, choose_block(codes.shape[axis], -1, bits))
  return DictionaryArray(
    atoms, packed, coefficients, terms, runs * width - inputs, str(jnp.dtype(atoms.dtype if dtype is None else dtype))
  )
