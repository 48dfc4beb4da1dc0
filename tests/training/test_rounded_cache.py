"""Training with keys and values as a cache of fewer bits will hold them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_training import MODEL, PARAMS, ROWS

from lmcompress import fit
from lmcompress.generation.cache import init_cache
from lmcompress.models import LSTM, LSTMSizes
from lmcompress.training import Distill, Privacy, Task, Training, fit_tasks
from lmcompress.training.step import loss_of

LONG = (np.arange(4 * 80).reshape(4, 80) * 7 % 64).astype(np.int32)
"""Rows that are longer than what a cache of 4 bits keeps as it is."""

NOTHING = jax.tree.map(lambda _: None, PARAMS)


def nats(params, tokens, dtype):
  """The cross entropy of a pass over an empty cache, by what generation runs."""
  logits, _ = jax.jit(MODEL.apply)(params, tokens, cache=init_cache(MODEL, params, *tokens.shape, dtype))
  said = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
  return -float(jnp.mean(jnp.take_along_axis(said, tokens[:, 1:, None], -1)))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_the_loss_is_that_of_a_model_that_generates(dtype):
  training = Training(1, batch=4, cache=dtype)
  total, count = loss_of(MODEL, NOTHING, training, None, PARAMS, {"tokens": LONG})
  assert float(total / count) == pytest.approx(nats(PARAMS, LONG, dtype), rel=1e-5)
  plain, _ = loss_of(MODEL, NOTHING, dataclasses.replace(training, cache=None), None, PARAMS, {"tokens": LONG})
  assert float(total) != float(plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_weights_in_bfloat16_generate_and_train(dtype):
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
  assert nats(half, LONG, dtype) == pytest.approx(nats(PARAMS, LONG, dtype), rel=0.05)
  training = Training(2, batch=4, cache=dtype, compute="bfloat16", chunk=16)
  assert np.isfinite(fit(MODEL, PARAMS, LONG, training)[1][-1]["loss"])


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_gradients_pass_straight_through(dtype):
  """Finite, near those of the unrounded loss, and of keys and values what the attention to rounded ones says."""
  lost = lambda cache, params: loss_of(MODEL, NOTHING, Training(1, cache=cache), None, params, {"tokens": LONG})[0]  # noqa: E731
  got, plain = (jax.jit(jax.grad(functools.partial(lost, cache)))(PARAMS) for cache in (dtype, None))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(plain), strict=True):
    assert jnp.linalg.norm(a - b) < 0.2 * jnp.linalg.norm(b)
  layer = init_cache(MODEL, PARAMS, 1, 64, dtype).layers["layers/0"]
  rng = np.random.default_rng(0)
  k, v = (jnp.asarray(rng.normal(size=(1, 2, 64, 8)), jnp.float32) for _ in range(2))
  q = jnp.asarray(rng.normal(size=(1, 64, 2, 2, 8)), jnp.float32)
  view = MODEL.start(PARAMS, {"tokens": LONG[:1, :64]})["view"]
  held = dataclasses.replace(layer.attend(q, k, v, view, 1.0)[1])
  rounded = np.asarray(held.values(), np.float64)
  weigh = jnp.asarray(rng.normal(size=(1, 64, 32)), jnp.float32)
  by_v = jax.grad(lambda v: jnp.sum(weigh * layer.attend(q, k, v, view, 1.0)[0]))(v)
  # values enter linearly: what goes back to one is the attention that it gets, whatever it was rounded to
  again = jax.grad(lambda v: jnp.sum(weigh * layer.attend(q, k, v, view, 1.0)[0]))(jnp.asarray(rounded, jnp.float32))
  np.testing.assert_allclose(by_v, again, rtol=2e-2, atol=2e-2)
  assert float(jnp.abs(by_v).min()) > 0


def test_weights_learn_to_live_with_few_bits():
  """What trains is what is scored: the held-out loss of the last step is that of a pass over such a cache."""
  training = Training(30, batch=4, learning_rate=1e-2, chunk=16, cache="int4")
  done, history = fit(MODEL, PARAMS, LONG, training, held_out=LONG)
  assert history[-1]["held_out"] == pytest.approx(nats(done, LONG, "int4"), rel=1e-4)
  assert history[-1]["held_out"] < history[0]["loss"] - 1


def test_it_goes_with_other_ways_of_training():
  """Teachers see all as it is; private rows and pieces of a batch work; others say that they do not."""
  training = Training(2, batch=8, cache="int8")
  fit(MODEL, PARAMS, ROWS, dataclasses.replace(training, loss=Distill(), accumulate=2), teacher=(MODEL, PARAMS))
  fit(MODEL, PARAMS, ROWS, dataclasses.replace(training, privacy=Privacy(1.0)))
  with pytest.raises(ValueError, match="no cache"):
    task = Task(ROWS[:, :4], np.ones((24, 4), bool), np.zeros(24, np.int64), ("a", "b"))
    fit_tasks(MODEL, PARAMS, {"t": task}, training)
  with pytest.raises(ValueError, match="bfloat16, int8, int4"):
    Training(2, cache="int2")
  model = LSTM(sizes=LSTMSizes(vocab=64, embed=16, units=16, layers=1))
  with pytest.raises(ValueError, match="a LSTM keeps no such cache"):
    fit(model, model.init(jax.random.key(0)), ROWS, training)
