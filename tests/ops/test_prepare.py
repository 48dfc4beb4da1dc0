"""Preparing a tree, and choosing what runs."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress import arrays, ops, tree
from lmcompress.arrays.tiled import TiledArray
from lmcompress.ops import backend
from lmcompress.transforms.round_to_nearest import quantize_matrix
from lmcompress.types import WeightError

native = pytest.mark.skipif(backend.native() is None, reason="no compiler built the kernels")


def weight(inputs=64, outputs=48, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(inputs, outputs)).astype(np.float32))


def small(leaf):
  return {"embed": {"table": weight(48, 64)}, "layers": {"0": {"mlp": {"up": {"kernel": leaf}}}}}


def leaf_of(params):
  return params["layers"]["0"]["mlp"]["up"]["kernel"]


@native
def test_what_is_prepared_and_what_stays():
  quantized = quantize_matrix(weight(), axis=-2, bits=4, group_size=32)
  prepared = ops.prepare(small(quantized))
  assert isinstance(leaf_of(prepared), TiledArray)
  assert prepared["embed"]["table"].dtype == jnp.float32 and isinstance(prepared["embed"]["table"], jax.Array)
  with ops.use_backend("reference"):
    assert leaf_of(ops.prepare(small(quantized))) is quantized
  assert leaf_of(ops.prepare(prepared, activations="int8")).activations == "int8"


@native
def test_consume_empties_the_first_tree():
  params = small(quantize_matrix(weight(), axis=-2, bits=4, group_size=32))
  seen = []
  prepared = ops.prepare(params, consume=True, progress=lambda what, done, total: seen.append((done, total)))
  assert params == {} and seen == [(1, 2), (2, 2)] and isinstance(leaf_of(prepared), TiledArray)


@native
def test_nested_forms():
  """Factors of a low-rank weight are prepared; an act of int8 per token is fused where codes are integers."""
  x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32))
  q = lambda w: quantize_matrix(w, axis=-2, bits=8, group_size=-1)  # noqa: E731
  factored = arrays.low_rank(q(weight(64, 8)), q(weight(8, 48, 1)), -2)
  fast = leaf_of(ops.prepare(small(factored)))
  assert isinstance(fast.left, TiledArray) and isinstance(fast.right, TiledArray)
  np.testing.assert_allclose(ops.linear(x, fast), ops.linear(x, factored), rtol=1e-4, atol=1e-3)
  acted = arrays.with_act(q(weight()), arrays.Int8PerToken())
  fused = leaf_of(ops.prepare(small(acted)))
  assert isinstance(fused, TiledArray) and fused.activations == "int8_token"
  sizes = 10.0 ** np.arange(-4, 5)[:, None]
  many = jnp.asarray(sizes * np.random.default_rng(2).normal(size=(9, 64)), jnp.float32)
  with ops.use_backend("reference"):
    want = ops.linear(many, acted)
  np.testing.assert_allclose(ops.linear(many, fused) / sizes, want / sizes, rtol=1e-4, atol=1e-3)
  kept = leaf_of(ops.prepare(small(arrays.with_act(weight().astype(jnp.bfloat16), arrays.Int8PerToken(), -2))))
  assert isinstance(kept.weight, TiledArray) and kept.weight.activations == "float32"


@native
def test_a_form_without_a_fast_path_says_so_once():
  odd = arrays.nm_sparse(weight(60), arrays.nm_mask(weight(60), 2, 5, -2), 2, 5, -2)
  backend._said.clear()
  with pytest.warns(RuntimeWarning, match="no fast CPU kernel for 2:5 float32"):
    assert leaf_of(ops.prepare(small(odd))) is odd
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    ops.prepare(small(odd))


@native
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_scale_that_is_not_finite_is_refused_by_name(bad):
  import dataclasses

  leaf = quantize_matrix(weight(), axis=-2, bits=4, group_size=32)
  broken = dataclasses.replace(leaf, scale=leaf.scale.at[0, 0].set(bad))
  with pytest.raises(WeightError, match="layers/0/mlp/up/kernel: a scale is NaN or infinite"):
    ops.prepare(small(broken))
  book = arrays.clustered(jnp.zeros((64, 48), jnp.uint8), jnp.asarray([bad, 1.0]), 1, -2)
  with pytest.raises(WeightError, match="codebook"):
    ops.prepare(small(book))


def test_words_that_are_not_known():
  with pytest.raises(ValueError, match="one of float32, bfloat16, int8"):
    ops.prepare({}, activations="int4")
  with pytest.raises(ValueError, match="one of auto, native, pallas, reference"), ops.use_backend("cuda"):
    pass


@native
def test_a_choice_retraces():
  """The same jitted function runs both, with the same numbers."""
  leaf = leaf_of(ops.prepare(small(quantize_matrix(weight(), axis=-2, bits=4, group_size=32))))
  x, traces = jnp.ones((2, 64)), []

  @jax.jit
  def product(x, w):
    traces.append(backend.chosen())
    return ops.linear(x, w)

  fast = product(x, leaf)
  with ops.use_backend("reference"):
    slow = product(x, leaf)
  assert traces == ["auto", "reference"]
  np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=1e-4)


def test_pallas_is_chosen_by_name():
  """On a CPU it is interpreted; what it does not take says so once and runs on the reference."""
  x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32))
  taken, left = (quantize_matrix(weight(), axis=-2, bits=bits, group_size=32) for bits in (4, 3))
  backend._said.clear()
  with ops.use_backend("pallas"):
    assert "pallas_call" in str(jax.make_jaxpr(ops.linear)(x, taken))
    fast = ops.linear(x, taken)
    with pytest.warns(RuntimeWarning, match="no Pallas kernel for int3 g32"):
      slow = ops.linear(x, left)
  np.testing.assert_allclose(fast, ops.linear(x, taken), rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(slow, ops.linear(x, left), rtol=1e-5, atol=1e-4)


def test_the_table_of_backends():
  rows = ops.backends()
  assert all(set(row) == {"form", "cpu", "gpu", "tpu"} for row in rows)
  assert any(row["form"].startswith("masked") and row["cpu"] == "reference" for row in rows)


SCRIPT = """
import sys
if {missing}: sys.modules["lmcompress._native"] = None
import warnings
import numpy as np, jax, jax.numpy as jnp
from lmcompress import ops
from lmcompress.arrays import nm_mask, nm_sparse
from lmcompress.ops import backend
from lmcompress.transforms.round_to_nearest import quantize_matrix as q
with warnings.catch_warnings(record=True) as said:
  warnings.simplefilter("always")
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(96, 33)).astype(np.float32))
  forms = dict(int8=q(w, axis=-2, bits=8, group_size=32), int4=q(w, axis=-2, bits=4, group_size=16, symmetric=False),
    nf4=q(w, axis=-2, grid="nf4", group_size=32), fp8=q(w, axis=-2, grid="fp8_e4m3", group_size=-1),
    bf16=w.astype(jnp.bfloat16), half=nm_sparse(w, nm_mask(w, 2, 4, -2), 2, 4, -2))
  for name, leaf in forms.items():
    dense = np.asarray(leaf.materialize() if hasattr(leaf, "materialize") else leaf, np.float64)
    for activations in ("float32", "int8", "int8_token"):
      prepared = ops.prepare({{"kernel": leaf}}, activations=activations)["kernel"]
      for rows in (1, 3, 20):
        x = rng.normal(size=(rows, 96)).astype(np.float32)
        error = np.abs(np.asarray(ops.linear(jnp.asarray(x), prepared), np.float64) - x @ dense)
        bound = np.abs(x) @ np.abs(dense) * (2e-2 if activations.startswith("int8") or name == "bf16" else 1e-5)
        assert (error <= bound).all(), (name, activations, rows, (error / bound).max())
  view = ops.View(jnp.ones((1, 9), bool), jnp.int32(0), jnp.ones((1, 9, 16)), jnp.zeros((1, 9, 16)))
  k = jnp.asarray(rng.normal(size=(1, 9, 32)).astype(np.float32))
  mixed = ops.attention(k, k, k, view, 32)[0]
  with ops.use_backend("reference"):
    np.testing.assert_allclose(mixed, ops.attention(k, k, k, view, 32)[0], rtol=1e-5, atol=1e-5)
print(backend.native().isa() if backend.native() else "none", sum("not built" in str(s.message) for s in said))
"""


@pytest.mark.parametrize("isa, expected", [("avx2", "avx2 0"), ("portable", "portable 0"), ("", "none 1")])
def test_lesser_instruction_sets_and_none(isa, expected):
  """The paths that this CPU would not choose; without a module one warning and the reference."""
  if isa and (backend.native() is None or (isa == "avx2" and backend.native().isa() == "portable")):
    pytest.skip("this machine has no such kernels")
  environment = {**os.environ, "LMCOMPRESS_ISA": isa, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  script = SCRIPT.format(missing=not isa)
  done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.split() == expected.split()


def test_tiled_leaves_are_weights_of_a_tree():
  if backend.native() is None:
    pytest.skip("no compiler built the kernels")
  prepared = ops.prepare(small(quantize_matrix(weight(), axis=-2, bits=4, group_size=32)))
  assert set(tree.weights(prepared)) == {"embed/table", "layers/0/mlp/up/kernel"}
  assert leaf_of(prepared).kind == "int4 g32 tiled" and leaf_of(prepared).shape == (64, 48)
