"""Products whose zero inputs are skipped: by the definition, in gradients, under vmap and over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lmcompress import ops
from lmcompress.arrays import Threshold, with_act
from lmcompress.distributed import make_mesh

LIMIT = 0.7


def case(rows, inputs, outputs, seed=0):
  rng = np.random.default_rng(seed)
  x, w = rng.normal(size=(rows, inputs)).astype(np.float32), rng.normal(size=(inputs, outputs)).astype(np.float32)
  return jnp.asarray(x), with_act(jnp.asarray(w), Threshold(LIMIT), -2), np.where(np.abs(x) < LIMIT, 0, x)


def product(x, leaf):
  with ops.use_backend("native"):
    return ops.linear(x, leaf)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (5, 17), (64, 64), (130, 200), (576, 1536)])
def test_equals_the_definition(rows, inputs, outputs):
  x, leaf, kept = case(rows, inputs, outputs)
  want = kept.astype(np.float64) @ np.asarray(leaf.weight, np.float64)
  np.testing.assert_allclose(product(x, leaf), want, rtol=1e-4, atol=1e-4)
  with ops.use_backend("reference"):
    np.testing.assert_allclose(ops.linear(x, leaf), want, rtol=1e-4, atol=1e-4)


def test_nothing_and_what_is_not_a_number():
  x, leaf, _ = case(1, 64, 48)
  assert not np.asarray(product(x * 0, leaf)).any()
  assert np.isnan(np.asarray(product(x.at[0, 3].set(jnp.nan), leaf))).all()
  broken = with_act(leaf.weight.at[5].set(jnp.nan), Threshold(LIMIT), -2)
  assert np.isfinite(np.asarray(product(x.at[0, 5].set(0.0), broken))).all()  # what a zero meets is not read
  assert product(x[0], leaf).shape == (48,) and product(x[None], leaf).shape == (1, 1, 48)
  assert product(x[:0], leaf).shape == (0, 48)


def test_gradients_and_vmap():
  x, leaf, kept = case(2, 64, 48)
  g = jnp.asarray(np.random.default_rng(1).normal(size=(2, 48)).astype(np.float32))
  with ops.use_backend("native"):
    gx, gw = jax.grad(lambda x, leaf: jnp.sum(g * ops.linear(x, leaf)), (0, 1))(x, leaf)
    mapped = jax.vmap(lambda x: ops.linear(x, leaf))(jnp.stack([x, 2 * x]))
  np.testing.assert_allclose(gw.weight, kept.T @ np.asarray(g), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(gx, np.where(kept == 0, 0, np.asarray(g @ leaf.weight.T)), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(mapped[0], product(x, leaf), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [PartitionSpec(None, "tensor"), PartitionSpec("tensor", None)])
def test_over_a_mesh(spec):
  """Outputs or inputs split: the same sums to rounding."""
  x, leaf, kept = case(1, 64, 48)
  mesh = make_mesh(tensor=8)
  placed = with_act(jax.device_put(leaf.weight, NamedSharding(mesh, spec)), Threshold(LIMIT), -2)
  with ops.use_backend("native"):
    y = jax.jit(ops.linear)(x, placed)
  np.testing.assert_allclose(y, kept @ np.asarray(leaf.weight), rtol=1e-4, atol=1e-4)
