"""Codes survive packing, take the bits they should, and lie in the bytes where kernels look for them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcompress.arrays import packing
from lmcompress.arrays.packing import choose_block, fields, multiple

WIDTHS = range(1, 9)

pack = jax.jit(packing.pack, static_argnums=(1, 2, 3))
unpack = jax.jit(packing.Packed.unpack)
round_trip = jax.jit(lambda codes, *form: packing.pack(codes, *form).unpack(), static_argnums=(1, 2, 3))


def codes_of(bits, shape, seed=0):
  return np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint8)


def naive_bytes(block, bits):
  """Bytes of one block of codes, written from the layout's description: planes of fields, low bits first."""
  planes = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}[bits]
  out, shift = [], 0
  for width in planes:
    plane, per_byte = [(int(c) >> shift) % 2**width for c in block], 8 // width
    part = len(block) // per_byte
    out += [sum(plane[k * part + i] << (k * width) for k in range(per_byte)) for i in range(part)]
    shift += width
  return np.array(out, np.uint8)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
  bits=st.integers(1, 8), axis=st.sampled_from([-2, -1]), inputs=st.integers(1, 70),
  outputs=st.integers(1, 5), units=st.integers(1, 9), seed=st.integers(0, 9),
  lead=st.sampled_from([(), (2,)]),
)
def test_codes_survive(bits, axis, inputs, outputs, lead, units, seed):
  shape = (*lead, inputs, outputs) if axis == -2 else (*lead, outputs, inputs)
  codes = codes_of(bits, shape, seed)
  np.testing.assert_array_equal(round_trip(codes, bits, axis, units * multiple(bits)), codes)


@pytest.mark.parametrize("axis, inputs", [(-2, 64), (-2, 576), (-2, 577), (-1, 577)])
@pytest.mark.parametrize("bits", WIDTHS)
def test_exact_bits(bits, inputs, axis):
  """Padding is less than what fills whole bytes, and none where the row fills them itself."""
  padded = -(-inputs // multiple(bits)) * multiple(bits)
  codes = codes_of(bits, (inputs, 3) if axis == -2 else (3, inputs))
  packed = pack(codes, bits, axis, choose_block(inputs, -1, bits))
  assert packed.nbits == 3 * padded * bits == packed.data.size * 8
  assert packed.pad == padded - inputs
  np.testing.assert_array_equal(unpack(packed), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_layout_is_as_described(bits):
  block = 2 * multiple(bits)
  codes = codes_of(bits, (3 * block, 2))
  data = np.asarray(pack(codes, bits, -2, block).data)
  for b in range(3):
    for out in range(2):
      want = naive_bytes(codes[b * block : (b + 1) * block, out], bits)
      np.testing.assert_array_equal(data[b, :, out], want)


def test_four_bits_are_two_halves():
  codes = codes_of(4, (64, 3))
  packed = pack(codes, 4, -2, 32)
  first, second = fields(packed.data, 4, -2)
  blocks = codes.reshape(2, 32, 3)
  np.testing.assert_array_equal(first, blocks[:, :16])
  np.testing.assert_array_equal(second, blocks[:, 16:])
  np.testing.assert_array_equal(packed.data & 15, blocks[:, :16])
  np.testing.assert_array_equal(packed.data >> 4, blocks[:, 16:])


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("bits", WIDTHS)
def test_fields_are_consecutive_parts(bits, axis):
  codes = codes_of(bits, (48, 4) if axis == -2 else (4, 48))
  packed = pack(codes, bits, axis, 24)
  parts = jax.jit(lambda p: fields(p.data, bits, axis))(packed)
  assert len({part.shape for part in parts}) == 1
  blocks = codes.reshape(2, 24, 4) if axis == -2 else codes.reshape(4, 2, 24)
  np.testing.assert_array_equal(np.concatenate(parts, axis=axis), blocks)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_block_boundary_splits_no_byte(bits):
  """Half of the blocks, alone, hold half of the codes: what a shard sees needs nothing from its neighbour."""
  codes = codes_of(bits, (64, 5))
  packed = pack(codes, bits, -2, 16)
  for b in range(packed.blocks):
    alone = type(packed)(packed.data[b : b + 1], bits, -2, 0)
    np.testing.assert_array_equal(unpack(alone), codes[16 * b : 16 * (b + 1)])


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("bits", WIDTHS)
def test_columns_are_slices(bits, axis):
  codes = codes_of(bits, (20, 30) if axis == -2 else (30, 20))
  packed = pack(codes, bits, axis, multiple(bits))
  cut = jax.jit(lambda p, start: p.columns(start, 11).unpack())(packed, 7)
  np.testing.assert_array_equal(cut, codes[:, 7:18] if axis == -2 else codes[7:18])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
  inputs=st.integers(1, 5000), bits=st.integers(1, 8), group=st.one_of(st.just(-1), st.integers(1, 512)),
)
def test_a_chosen_block_wastes_little(inputs, bits, group):
  block = choose_block(inputs, group, bits)
  assert block % multiple(bits) == 0
  assert -inputs % block < multiple(bits)


@pytest.mark.parametrize("inputs, group", [(512, 32), (512, 128), (4096, -1), (576, 64), (48, 32), (960, 96)])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_chosen_block_divides_row_and_group(bits, inputs, group):
  block = choose_block(inputs, group, bits)
  assert inputs % block == 0 and (group == -1 or group % block == 0)


def test_a_block_that_does_not_fill_bytes_raises():
  with pytest.raises(ValueError, match=r"pack\(bits=3\): a block of 12 codes is not a multiple of 8"):
    pack(jnp.zeros((24, 2), jnp.uint8), 3, -2, 12)
