"""freeze: a mask is dropped where what is under it is 0 already, applied to dense values, and kept elsewhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.arrays import Int8PerToken, MaskedArray, clustered, low_rank, masked, nm_mask, nm_sparse, with_act
from lmcompress.transforms import freeze
from lmcompress.types import Evidence

W = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32))
KEEP = nm_mask(W, 2, 4, -2)


def frozen(leaf):
  transform = freeze()
  return transform.apply({"up": {"kernel": leaf}}, transform.init({}), Evidence())[0]["up"]["kernel"]


def test_a_mask_that_positions_say_already_is_dropped():
  sparse = nm_sparse(W, KEEP, 2, 4, -2)
  assert frozen(masked(sparse, KEEP, -2)) is sparse


def test_a_mask_over_a_form_without_zeros_stays_and_nothing_goes_dense():
  for values in (clustered((W > 0).astype(int), jnp.float32([-1, 1]), 1, -2), low_rank(W[:, :2], W[:2], -2)):
    leaf = frozen(masked(values, KEEP, -2))
    assert isinstance(leaf, MaskedArray) and leaf.values is values


def test_masks_within_an_act_and_in_factors_are_frozen():
  acted = frozen(with_act(masked(W, KEEP, -2), Int8PerToken()))
  assert isinstance(acted.weight, jax.Array) and acted.act == Int8PerToken()
  np.testing.assert_array_equal(acted.weight, np.where(KEEP, W, 0))
  factors = frozen(low_rank(masked(W, KEEP, -2), W[:6], -2))
  assert isinstance(factors.left, jax.Array) and factors.right is not None
