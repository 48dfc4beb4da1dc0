"""Learned rounding lowers what a block loses, starts from GPTQ's own codes, and never ends worse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress import tree
from lmcompress.arrays import QuantizedArray
from lmcompress.calibration import compress
from lmcompress.ops.rounding import Rounding
from lmcompress.transforms import at, chain, gptq, learned_rounding, magnitude, round_to_nearest
from lmcompress.transforms.learned_rounding import _loss
from lmcompress.types import Evidence, WeightError

RNG = np.random.default_rng(0)
CALIBRATION = RNG.integers(0, 64, (24, 16)).astype(np.int32)
KEY = jax.random.key(0)


def lost(model, params, done):
  """The relative error of the hidden stream after the blocks, on the calibration rows."""

  def hidden(p):
    carry = model.start(p, CALIBRATION)
    for block in model.blocks(p):
      carry, _ = model.run(block, p, carry)
    return np.asarray(carry["h"], np.float64)

  a, b = hidden(params), hidden(done)
  return np.linalg.norm(a - b) / np.linalg.norm(a)


def test_it_beats_what_it_starts_from(tiny, symmetric=True):
  """At 3 bits, on the blocks' outputs: nearest codes improved a lot, GPTQ's still further."""
  model, params = tiny
  learned = lambda **options: compress(  # noqa: E731
    model, params, learned_rounding(3, 16, symmetric, steps=60, learning_rate=0.02, **options), CALIBRATION, KEY
  )[0]
  plain = compress(model, params, round_to_nearest(3, 16, symmetric, clip="mse"))[0]
  solved = compress(model, params, gptq(3, 16, symmetric, sweeps=1), CALIBRATION)[0]
  best = learned()
  assert lost(model, params, learned(start="nearest")) < 0.9 * lost(model, params, plain)
  assert lost(model, params, best) < lost(model, params, solved)
  leaf = best["layers"]["1"]["mlp"]["down"]["kernel"]
  assert isinstance(leaf, QuantizedArray) and leaf.grid.bits == 3


def test_a_rate_of_almost_nothing_gives_the_start(tiny):
  """The first block's weights are GPTQ's, code by code."""
  model, params = tiny
  done = compress(model, params, learned_rounding(4, 16, steps=1, learning_rate=1e-6), CALIBRATION, KEY)[0]
  first = "layers/0/attn/q/kernel"  # later stages of a block are calibrated on the block as it was
  want = tree.get(compress(model, params, gptq(4, 16, symmetric=False), CALIBRATION)[0], first)
  np.testing.assert_array_equal(tree.get(done, first).codes.unpack(), want.codes.unpack())


def test_a_rate_that_ruins_is_taken_back(tiny):
  model, params = tiny
  wild, calm = (
    compress(model, params, at("layers/0", learned_rounding(4, 16, steps=1, learning_rate=r)), CALIBRATION, KEY)[0]
    for r in (1.0, 1e-6)
  )
  assert lost(model, params, wild) <= lost(model, params, calm) * 1.0001


def test_padding_does_not_count(tiny):
  """Rows behind the mask change nothing of the loss."""
  h = jnp.asarray(RNG.normal(size=(2, 4, 8)), jnp.float32)
  mask = jnp.asarray([[True, True, False, False], [True, True, True, True]])
  options = {"run": _same, "rounding": Rounding(), "group_size": 16}
  loss = lambda x, target: float(_loss({}, {}, {}, {"h": x}, {"h": target}, mask, **options))  # noqa: E731
  assert loss(h, h) == 0
  assert loss(h.at[0, 3].add(9.0), h) == 0 and loss(h.at[1, 3].add(9.0), h) > 0


def _same(params, carry):
  return carry


def test_the_seed_decides(tiny):
  model, params = tiny
  run = lambda seed: compress(  # noqa: E731
    model, params, learned_rounding(3, 16, steps=8, learning_rate=0.05), CALIBRATION, jax.random.key(seed)
  )[0]
  leaf = lambda p: np.asarray(p["layers"]["0"]["mlp"]["up"]["kernel"].codes.data)  # noqa: E731
  np.testing.assert_array_equal(leaf(run(0)), leaf(run(0)))


def test_what_is_refused(tiny):
  model, params = tiny
  for options in ({"bits": 1}, {"group_size": 8}, {"steps": 0}, {"learning_rate": 0.0}, {"start": "random"}):
    with pytest.raises(ValueError, match="learned_rounding"):
      learned_rounding(**options)
  with pytest.raises(WeightError, match="masked"):
    compress(model, params, chain(magnitude(0.5), learned_rounding(group_size=16)), CALIBRATION, KEY)
  with pytest.raises(WeightError, match="pass calibration"):
    compress(model, params, learned_rounding(group_size=16), key=KEY)
  with pytest.raises(WeightError, match="draws at random"):
    compress(model, params, learned_rounding(group_size=16), CALIBRATION)
  transform = at("layers/0/attn/q", learned_rounding(group_size=16))
  hessian = {"layers/0/attn/q/kernel": {"hessian": jnp.eye(32)}}
  with pytest.raises(WeightError, match="use compress"):
    transform.apply(params, transform.init(params), Evidence(statistics=hessian, structure=model))
