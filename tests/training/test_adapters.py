"""Adapters, codes and inputs that learn: what they start from, learn and become; what does not fit is refused."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from small_training import MODEL, PARAMS, ROWS, deltas, same

from lmcompress import tree
from lmcompress.arrays import (
  FakeQuantArray,
  InputArray,
  LearnedInputArray,
  QuantizedArray,
  StaticStep,
  SumArray,
  learned_input,
)
from lmcompress.calibration import compress
from lmcompress.training import (
  Distill,
  Training,
  fit,
)
from lmcompress.transforms import (
  adapted,
  adapters,
  chain,
  dora,
  fake_quantize,
  fake_quantize_inputs,
  freeze,
  lora,
  low_rank_residual,
  magnitude,
  merge,
  movement,
  quantize_inputs,
  round_to_nearest,
)
from lmcompress.types import WeightError


def test_adapters_train_alone_merge_and_are_exchanged():
  """Over 4 bits: the base keeps its bits, the product learns; merged it computes the same; two share one base."""
  base, _ = compress(MODEL, PARAMS, round_to_nearest(4, 16), None, None)
  start, _ = compress(MODEL, base, lora(4), None, jax.random.key(1))
  tokens = ROWS[:2]
  np.testing.assert_allclose(MODEL.apply(start, tokens), MODEL.apply(base, tokens), atol=1e-5)
  done, history = fit(MODEL, start, ROWS, Training(20, batch=8, learning_rate=2e-2), trainable=deltas)
  assert history[-1]["loss"] < 0.8 * history[0]["loss"]
  for path, leaf in tree.weights(done).items():
    old = tree.get(start, path)
    if isinstance(leaf, SumArray):
      assert isinstance(leaf.base, QuantizedArray) and same({"kernel": leaf.base}, {"kernel": old.base})
    else:
      assert same({"table": leaf}, {"table": old})
  merged, _ = compress(MODEL, done, merge(), None, None)
  assert isinstance(merged["layers"]["0"]["mlp"]["up"]["kernel"], jax.Array)
  np.testing.assert_allclose(MODEL.apply(merged, tokens), MODEL.apply(done, tokens), atol=1e-4)
  mine = adapters(done)
  assert len(mine) == 14
  np.testing.assert_array_equal(MODEL.apply(adapted(base, mine), tokens), MODEL.apply(done, tokens))
  assert same(adapted(done, adapters(start)), start)  # the other user's adapters over the same base
  with pytest.raises(WeightError, match=r"adapted at layers/9/x/kernel: .* over nothing"):
    adapted(base, {"layers/9/x/kernel": mine["layers/0/mlp/up/kernel"]})


def test_what_compression_lost_is_a_start():
  """A residual of low rank trains as an adapter does, and starts nearer than none."""
  tokens = ROWS[:4]
  start, _ = compress(MODEL, PARAMS, chain(round_to_nearest(2, 16), low_rank_residual(8, "none")), tokens)
  _, history = fit(
    MODEL, start, ROWS, Training(10, batch=8, learning_rate=5e-3, loss=Distill()), trainable=deltas,
    teacher=(MODEL, PARAMS),
  )  # fmt: skip
  assert history[-1]["loss"] < 0.7 * history[0]["loss"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_train_and_freeze_to_the_same_outputs(symmetric):
  """LSQ: fewer bits are learned back, and the packed form computes what the training form did, within 1e-5.

  Where the rounding of an input is a tie, another order of sums may decide it otherwise, for few tokens and by a step.
  """
  recipe = chain(quantize_inputs(), fake_quantize(3, 16, symmetric))
  start, _ = compress(MODEL, PARAMS, recipe, None, None)
  leaf = start["layers"]["0"]["mlp"]["up"]["kernel"]
  assert isinstance(leaf, InputArray) and isinstance(leaf.weight, FakeQuantArray)
  training = Training(15, batch=8, learning_rate=3e-3, loss=Distill())
  done, history = fit(MODEL, start, ROWS, training, teacher=(MODEL, PARAMS))
  assert history[-1]["loss"] < 0.85 * history[0]["loss"]
  frozen, _ = compress(MODEL, done, freeze(), None, None)
  packed = frozen["layers"]["0"]["mlp"]["up"]["kernel"].weight
  assert isinstance(packed, QuantizedArray) and packed.nbits < packed.size * (3 + 2.1)
  apart = np.abs(np.asarray(MODEL.apply(frozen, ROWS[:2])) - np.asarray(MODEL.apply(done, ROWS[:2]))).max(-1)
  assert (apart < 1e-5).mean() > 0.9 and apart.max() < 0.05
  old = compress(MODEL, start, freeze(), None, None)[0]["layers"]["0"]["mlp"]["up"]["kernel"].weight
  assert not np.array_equal(old.scale, packed.scale) and not np.array_equal(old.codes.data, packed.codes.data)


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"symmetric": False, "zero": "real"}])
def test_codes_go_on_from_where_a_quantizer_left_them(options):
  """The same values to the rounding of a minimum, and the very same codes where there is none."""
  first = compress(MODEL, PARAMS, round_to_nearest(3, 16, scale_dtype="float32", **options), None, None)[0]
  start = compress(MODEL, first, fake_quantize(3, scale_dtype="float32"), None, None)[0]
  np.testing.assert_allclose(MODEL.apply(start, ROWS[:2]), MODEL.apply(first, ROWS[:2]), atol=1e-4)
  if not options:
    assert same(compress(MODEL, start, freeze(), None, None)[0], first)


def test_gradients_of_a_step_size_are_lsqs():
  """The paper's equation 3, times its gradient scale, in NumPy."""
  w = np.random.default_rng(3).normal(size=(8, 5)).astype(np.float32)
  s = np.full((2, 5), 0.4, np.float32)
  leaf = FakeQuantArray(jnp.asarray(w), jnp.asarray(s), None, 3, 4, -2, "float32", "float32")
  g = np.random.default_rng(4).normal(size=w.shape).astype(np.float32)
  found = jax.grad(lambda leaf: jnp.sum(g * leaf.materialize()))(leaf)
  v = w / np.repeat(s, 4, 0)
  inside = (v > -4) & (v < 3)
  each = np.where(inside, np.round(v) - v, np.clip(v, -4, 3)) * g / np.sqrt(4 * 3)
  np.testing.assert_allclose(found.scale, each.reshape(2, 4, 5).sum(1), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found.values, np.where(inside, g, 0), rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize(("recipe", "said"), [
  (lora(33), "full rank is"), (chain(lora(2), lora(2)), "of rank 2 already"), (fake_quantize(4, 24), "not a multiple"),
  (chain(round_to_nearest(4, 16), fake_quantize(3)), "the weight is int4 g16; give the bits"),
  (chain(round_to_nearest(grid="nf4", group_size=16), fake_quantize(4)), "the weight is nf4"),
  (chain(magnitude(0.5), fake_quantize(4, 16)), "freeze it first"),
  (chain(round_to_nearest(4, 16), movement()), "already stored as int4"),
])  # fmt: skip
def test_weights_that_do_not_fit(recipe, said):
  with pytest.raises(WeightError, match=said):
    compress(MODEL, PARAMS, recipe, None, jax.random.key(0))


def test_the_step_of_inputs_has_the_gradient_of_its_paper():
  """LSQ, equation 3 with its gradient scale, in NumPy; the input's own passes inside the range and not outside it."""
  x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
  leaf = learned_input(jnp.eye(6), 0.3, 3, -2)
  g = np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)
  dx, ds = jax.grad(lambda x, step: jnp.sum(g * dataclasses.replace(leaf, step=step).rounded(x)), (0, 1))(x, leaf.step)
  units = x / 0.3
  inside = np.abs(units) <= 3
  np.testing.assert_allclose(dx, g * inside, atol=1e-6)
  slope = np.where(inside, np.round(units) - units, np.sign(units) * 3)
  np.testing.assert_allclose(ds[0, 0], np.sum(g * slope) / np.sqrt(30 * 3), rtol=1e-4)


def test_inputs_learn_their_range_and_are_fixed():
  """Four bits of inputs and weights: training wins back, and the frozen model says what the trained one said."""
  both = chain(fake_quantize_inputs(4, percentile=100.0), fake_quantize(4, 16))
  ready = compress(MODEL, PARAMS, both, ROWS, jax.random.key(0))[0]
  leaf = ready["layers"]["1"]["mlp"]["up"]["kernel"]
  assert isinstance(leaf, LearnedInputArray) and isinstance(leaf.weight, FakeQuantArray)
  training = Training(steps=30, batch=8, learning_rate=1e-2, chunk=16, loss=Distill())
  trains = functools.partial(tree.matches, "layers/*")
  done, history = fit(MODEL, ready, ROWS, training, trainable=trains, teacher=(MODEL, PARAMS))
  assert history[-1]["loss"] < 0.7 * history[0]["loss"]
  after = done["layers"]["1"]["mlp"]["up"]["kernel"]
  assert float(after.step[0, 0]) != float(leaf.step[0, 0])
  small = compress(MODEL, done, freeze())[0]
  kept = small["layers"]["1"]["mlp"]["up"]["kernel"]
  assert isinstance(kept, InputArray) and kept.act == StaticStep(float(after.step[0, 0]), 4)
  assert isinstance(kept.weight, QuantizedArray) and kept.weight.codes.bits == 4
  np.testing.assert_allclose(MODEL.apply(small, ROWS[:2]), MODEL.apply(done, ROWS[:2]), atol=2e-4)
  with pytest.raises(WeightError, match="acted on already"):
    compress(MODEL, ready, fake_quantize_inputs(8), ROWS)
  with pytest.raises(ValueError, match="from 2 to 8"):
    fake_quantize_inputs(9)


def test_lengths_learn_apart_from_directions():
  """DoRA over four bits: nothing changes before it learns; codes stay; freeze keeps the codes and the outputs."""
  base = compress(MODEL, PARAMS, round_to_nearest(4, 16))[0]
  ready = compress(MODEL, base, dora(2), key=jax.random.key(1))[0]
  np.testing.assert_allclose(MODEL.apply(ready, ROWS[:2]), MODEL.apply(base, ROWS[:2]), atol=1e-4)
  trains = lambda path: tree.matches("**/delta", path) or tree.matches("**/magnitude", path)  # noqa: E731
  done, history = fit(MODEL, ready, ROWS, Training(steps=30, batch=8, learning_rate=1e-2, chunk=16), trainable=trains)
  assert history[-1]["loss"] < history[0]["loss"] - 0.5
  leaf, before = (p["layers"]["0"]["mlp"]["up"]["kernel"] for p in (done, ready))
  np.testing.assert_array_equal(leaf.weight.base.codes.data, before.weight.base.codes.data)
  assert not np.allclose(leaf.magnitude, before.magnitude)
  v = np.asarray(leaf.weight.materialize(), np.float64)
  want = np.asarray(leaf.magnitude) * v / np.linalg.norm(v, axis=0)
  np.testing.assert_allclose(leaf.materialize(), want, atol=1e-5)
  small = compress(MODEL, done, freeze())[0]
  kept = small["layers"]["0"]["mlp"]["up"]["kernel"]
  assert isinstance(kept, SumArray) and isinstance(kept.base, QuantizedArray) and kept.base.codes.bits == 4
  said = MODEL.apply(done, ROWS[:2])
  np.testing.assert_allclose(MODEL.apply(small, ROWS[:2]), said, atol=2e-4)
  np.testing.assert_allclose(MODEL.apply(compress(MODEL, done, merge())[0], ROWS[:2]), said, atol=2e-4)
  doubly = compress(MODEL, PARAMS, chain(round_to_nearest(4, 16, scale_bits=8), dora(2)), key=jax.random.key(1))[0]
  with pytest.raises(WeightError, match="merge"):
    compress(MODEL, doubly, freeze())
