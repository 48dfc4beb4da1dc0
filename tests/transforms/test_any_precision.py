"""One set of codes in several widths: each is a weight of its own, and as good as one solved alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress import ops, tree
from lmcompress.arrays import NestedArray, QuantizedArray, nested
from lmcompress.calibration import compress
from lmcompress.io.checkpoint import save
from lmcompress.io.load import load
from lmcompress.transforms import any_precision, at_precision, chain, gptq, magnitude, round_to_nearest
from lmcompress.types import WeightError

CALIBRATION = np.random.default_rng(0).integers(0, 64, (16, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def done(tiny):
  model, params = tiny
  return compress(model, params, any_precision((3, 4, 8), 16), CALIBRATION)[0]


def logits(model, params):
  return np.asarray(model.apply(params, CALIBRATION[:2]), np.float64)


def test_each_width_is_nearer(tiny, done):
  """Eight bits hold four and three; every step towards eight is nearer to the original, and shares its arrays."""
  model, params = tiny
  want = logits(model, params)
  errors = [np.linalg.norm(logits(model, at_precision(done, bits)) - want) for bits in (3, 4, 8)]
  assert errors[0] > 1.5 * errors[1] > 1.5 * 4 * errors[2]
  leaf = done["layers"]["0"]["mlp"]["up"]["kernel"]
  assert isinstance(leaf, NestedArray) and leaf.widths == (3, 4, 8) and leaf.kind == "int8 g16 min of 3/4/8"
  three, four = leaf.at(3), leaf.at(4)
  assert isinstance(three, QuantizedArray) and three is leaf.base.base and four is leaf.base and leaf.at(8) is leaf
  np.testing.assert_array_equal(four.quantized().codes.unpack() >> 1, three.codes.unpack())
  np.testing.assert_array_equal(leaf.quantized().codes.unpack() >> 4, four.quantized().codes.unpack())
  assert leaf.nbits == leaf.size * 8 + 2 * 16 * leaf.size // 16


def test_as_good_as_solved_alone(tiny, done):
  """At four bits logits nearly as near as with four solved for themselves; a seed by GPTQ is GPTQ's own."""
  model, params = tiny
  options = {"symmetric": False, "zero": "real", "clip": "none", "sweeps": 0}
  alone, four = (compress(model, params, gptq(b, 16, **options), CALIBRATION)[0] for b in (3, 4))
  first = "layers/0/attn/q/kernel"  # later stages are calibrated with what came before
  want = logits(model, params)
  mine, theirs = (np.linalg.norm(logits(model, p) - want) for p in (at_precision(done, 4), four))
  assert mine < 1.3 * theirs
  absorbed = compress(model, params, any_precision((3, 4), 16, seed="gptq"), CALIBRATION)[0]
  three = tree.get(at_precision(absorbed, 3), first)
  np.testing.assert_array_equal(three.codes.unpack(), tree.get(alone, first).codes.unpack())


def test_saved_once_read_at_any(tiny, done, tmp_path):
  model, _ = tiny
  save(tmp_path / "m", model, done)
  whole, four = load(tmp_path / "m")[1], load(tmp_path / "m", bits=4)[1]
  np.testing.assert_allclose(logits(model, whole), logits(model, done), rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(logits(model, four), logits(model, at_precision(done, 4)), rtol=1e-6, atol=1e-6)
  with pytest.raises(WeightError, match=r"at_precision\(5\) at layers/0/attn/k/kernel: it has 3, 4, 8 bits"):
    load(tmp_path / "m", bits=5)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_prepared(tiny, done, bits):
  model, _ = tiny
  some = at_precision(done, bits)
  with ops.use_backend("native"):
    found = logits(model, ops.prepare(some))
  want = logits(model, some)
  np.testing.assert_allclose(found, want, atol=2e-4 * np.abs(want).max())


def test_what_is_refused(tiny):
  model, params = tiny
  for bits in ((4,), (4, 3), (1, 4), (4, 4), (4, 9)):
    with pytest.raises(ValueError, match="two widths or more"):
      any_precision(bits)
  with pytest.raises(ValueError, match="at least 16"):
    any_precision(group_size=8)
  with pytest.raises(WeightError, match="masked"):
    compress(model, params, chain(magnitude(0.5), any_precision(group_size=16)), CALIBRATION)
  with pytest.raises(WeightError, match="no weight holds several"):
    at_precision(params, 4)
  w = jnp.ones((16, 4))
  codes = jnp.zeros((16, 4), jnp.uint8)
  affine = compress(model, params, round_to_nearest(4, 16, False, zero="real"))[0]["layers"]["0"]["mlp"]["up"]["kernel"]
  with pytest.raises(ValueError, match="real minimums"):
    nested(compress(model, params, round_to_nearest(4, 16))[0]["layers"]["0"]["mlp"]["up"]["kernel"], codes, 2)
  with pytest.raises(ValueError, match="takes 4 more at most"):
    nested(affine, jnp.zeros(affine.shape, jnp.uint8), 5)
  with pytest.raises(ValueError, match="do not fit"):
    nested(affine, codes, 2)
  assert w.shape == codes.shape
  with pytest.raises(ValueError, match="3, 4 bits"):
    three = compress(model, params, round_to_nearest(3, 16, False, zero="real"))[0]["layers"]["0"]["mlp"]["up"]
    nested(three["kernel"], jnp.zeros(affine.shape, jnp.uint8), 1).at(8)
  assert jax.tree.leaves(affine)
