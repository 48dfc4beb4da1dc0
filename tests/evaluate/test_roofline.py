"""Bytes and operations of a tiny Llama, counted by hand."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lmcompress import ops, tree
from lmcompress.arrays import low_rank
from lmcompress.evaluate import roofline
from lmcompress.generation.cache import init_cache
from lmcompress.transforms.round_to_nearest import quantize_matrix

# The fixture `tiny`: two layers, embed 32, 4 heads and 2 KV heads of 8, mlp 64, vocab 64, a head of its own.
LINEARS = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)
NORMS = (2 * 2 + 1) * 32
HEAD = 64 * 32
QUERIES = 2 * 32
SLOT = 2 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, head, bytes


def test_a_decode_step_by_hand(tiny):
  _, params = tiny
  work = roofline.decode_work(params, batch=3, depth=10, slot_bytes=SLOT)
  assert work.tokens == 3
  assert work.operations == 2 * 3 * (LINEARS + HEAD + 2 * QUERIES * 10)
  assert work.weight_bytes == 4 * (LINEARS + NORMS + HEAD + 3 * 32)  # an embedding row for each sequence
  assert work.kv_bytes == 3 * SLOT * 11
  assert work.intensity == work.operations / (work.weight_bytes + work.kv_bytes)


def test_a_tied_table_counts_once(tiny):
  _, params = tiny
  tied = {name: value for name, value in params.items() if name != "head"}
  work = roofline.decode_work(tied, batch=1, depth=1, slot_bytes=0)
  assert work.weight_bytes == 4 * (LINEARS + NORMS + HEAD)


def test_prefill_by_hand(tiny):
  _, params = tiny
  work = roofline.prefill_work(params, batch=2, length=10, slot_bytes=SLOT, piece=4)  # 4 + 4 + 2
  assert work.tokens == 20
  assert work.operations == 2 * 2 * (10 * LINEARS + 3 * HEAD + 2 * QUERIES * sum(range(1, 11)))
  assert work.weight_bytes == 4 * (3 * (LINEARS + NORMS + HEAD) + 2 * 10 * 32)
  assert work.kv_bytes == 2 * SLOT * (10 + 4 + 8 + 10)


@pytest.mark.parametrize(
  ("dtype", "head_bytes"), [("float32", 32), ("bfloat16", 16), ("int8", 8 + 4), ("int4", (4 + 1 + 4 + 8) / 2)]
)
def test_a_slot_of_the_cache(tiny, dtype, head_bytes):
  model, params = tiny
  assert roofline.slot_bytes(init_cache(model, params, 3, 7, dtype)) == 2 * 2 * 2 * head_bytes


def test_a_tree_laid_out_reads_its_codes(tiny):
  """int4 with a bfloat16 scale for each 32 inputs; the layout adds nothing to shapes that fit it."""
  _, params = tiny
  small = tree.map_weights(
    lambda p, w: quantize_matrix(w, bits=4, group_size=32, axis=tree.contraction_axis(p)), params
  )
  expected = (LINEARS + HEAD) * (4 + 16 / 32) / 8 + NORMS * 4 + 32 * (4 + 16 / 32) / 8
  plain = roofline.decode_work(small, batch=1, depth=1, slot_bytes=0)
  assert plain.weight_bytes == pytest.approx(expected)
  laid = roofline.decode_work(ops.prepare(small), batch=1, depth=1, slot_bytes=0)
  assert laid.operations == plain.operations and expected <= laid.weight_bytes < 2 * expected


def test_multiply_adds_of_factors_and_sparse_forms():
  rng = np.random.default_rng(0)
  left, right = (jax.numpy.asarray(rng.normal(size=s), "float32") for s in ((32, 4), (4, 48)))
  assert roofline.multiply_adds(low_rank(left, right, -2)) == 4 * (32 + 48)
  from lmcompress.arrays import nm_mask, nm_sparse

  w = jax.numpy.asarray(rng.normal(size=(32, 64)), "float32")
  sparse = nm_sparse(w, nm_mask(w, 2, 4, -2), 2, 4, -2)
  assert roofline.multiply_adds(sparse) == 32 * 64 / 2
  laid = ops.prepare({"a": {"kernel": sparse}})["a"]["kernel"]
  assert roofline.multiply_adds(laid) == 32 * 64 / 2


def test_the_bounds():
  work = roofline.Work(tokens=1, operations=100.0, weight_bytes=30.0, kv_bytes=20.0)
  assert roofline.bound_s(work, bandwidth=10, peak=1000) == 5  # memory: 50 bytes
  assert roofline.bound_s(work, bandwidth=1000, peak=10) == 10  # arithmetic
  assert roofline.attainable(2, 10, 1000) == 20 and roofline.attainable(200, 10, 1000) == 1000
