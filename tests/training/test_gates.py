"""Gates that learn to close: the price that they pay, the share that closes, and what is removed in the end."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_training import MODEL, PARAMS, ROWS, same

from lmcompress import chain, compress, fit, hard_concrete, l0, load, magnitude, remove_closed, save, tree
from lmcompress.arrays import GatedArray
from lmcompress.config import check
from lmcompress.training import Training, start
from lmcompress.training.step import advance
from lmcompress.types import ConfigError, Evidence, WeightError

NEURONS = compress(MODEL, PARAMS, hard_concrete(), None, None)[0]
TRAINING = Training(60, batch=8, learning_rate=3e-3, chunk=16)


def gates_of(params):
  return {path: leaf for path, leaf in tree.weights(params).items() if isinstance(leaf, GatedArray)}


@functools.cache
def trained(scope):
  return fit(MODEL, NEURONS, ROWS, TRAINING, transform=l0(0.5, 0, 40, scope))


def test_open_gates_change_next_to_nothing():
  np.testing.assert_allclose(MODEL.apply(NEURONS, ROWS[:2]), MODEL.apply(PARAMS, ROWS[:2]), atol=1e-5)
  both = compress(MODEL, PARAMS, chain(hard_concrete(), hard_concrete("heads")), None, None)[0]
  assert {path.split("/")[-2]: leaf.openness.size for path, leaf in gates_of(both).items()} == {"down": 64, "o": 2}


def test_the_price_is_a_gradient_of_the_expected_number_of_open_gates():
  """Louizos et al., equation 12, by finite differences in float64; it reaches the gates before the optimizer."""
  leaf = gates_of(NEURONS)["layers/0/mlp/down/kernel"]
  logs = np.linspace(-4, 4, 64)
  openness = jnp.asarray(logs.reshape(64, 1) / leaf.rate, jnp.float32)
  leaf = dataclasses.replace(leaf, openness=openness, price=jnp.full((1, 1), 3.0))
  chance = lambda a: 1 / (1 + np.exp(-(a - 2 / 3 * np.log(0.1 / 1.1))))  # noqa: E731
  want = 3.0 * (chance(logs + 1e-6) - chance(logs - 1e-6)) / 2e-6
  np.testing.assert_allclose(leaf.pressure()[:, 0], want, rtol=1e-4)
  params = tree.put(NEURONS, "layers/0/mlp/down/kernel", leaf)
  plain = Training(1, optimizer="sgd", learning_rate=1.0, clip=None)
  state = start(params, plain, lambda path: path.endswith("openness"))
  none = jax.tree.map(jnp.zeros_like, state.trained)
  after, _ = advance(state, state.kept, none, jnp.zeros(()), plain, None, None)
  moved = tree.get(after.trained, "layers/0/mlp/down/kernel").openness - leaf.openness
  np.testing.assert_allclose(moved[:, 0], -want, rtol=1e-4)


def test_draws_are_hard_concrete():
  """Of many draws as many are 0, and 1, as the distribution says."""
  leaf = gates_of(NEURONS)["layers/0/mlp/down/kernel"]
  wide = dataclasses.replace(leaf, openness=jnp.full((50_000, 1), 0.5 / leaf.rate), noise=jnp.zeros((50_000, 1)))
  link = l0(0.5, 0, 10)
  params = {"mlp": {"down": {"kernel": wide}}}
  evidence = Evidence(step=jnp.int32(3), key=jax.random.key(4))
  drawn = link.apply(params, [jnp.zeros(())], evidence)[0]["mlp"]["down"]["kernel"]
  gates = np.asarray(drawn.gates())
  assert np.mean(gates > 0) == pytest.approx(float(wide.open_chance()[0, 0]), abs=0.01)
  one = 1 / (1 + np.exp(-(0.5 - 2 / 3 * np.log(1.1 / 0.1))))  # chance of s >= (1 - low) / (high - low)
  assert np.mean(gates == 1) == pytest.approx(one, abs=0.01)


@pytest.mark.parametrize("scope", ["global", "block"])
def test_the_share_that_was_asked_is_closed_and_removed(scope):
  done, history = trained(scope)
  open_ = {path: int(jnp.sum(leaf.gates() > 0)) for path, leaf in gates_of(done).items()}
  assert sum(open_.values()) == 64 and (scope == "global" or set(open_.values()) == {32})
  assert history[-1]["loss"] < history[0]["loss"] - 1
  small = compress(MODEL, done, remove_closed(), None, None)[0]
  for name, layer in small["layers"].items():
    n = open_[f"layers/{name}/mlp/down/kernel"]
    assert {part: leaf["kernel"].shape for part, leaf in layer["mlp"].items()} == {
      "gate": (32, n), "up": (32, n), "down": (n, 32),
    }  # fmt: skip
    assert not any(isinstance(leaf, GatedArray) for leaf in jax.tree.leaves(layer))
  np.testing.assert_allclose(MODEL.apply(small, ROWS[:2]), MODEL.apply(done, ROWS[:2]), atol=1e-5)


def test_what_was_cut_off_goes_on_to_the_bit(tmp_path):
  """Draws depend on the seed and the step, and what is owed is part of the state."""

  def stop(step, metrics):
    if step == 25:
      raise KeyboardInterrupt

  run = functools.partial(fit, MODEL, NEURONS, ROWS, TRAINING, transform=l0(0.5, 0, 40), folder=tmp_path, save_every=10)
  with pytest.raises(KeyboardInterrupt):
    run(on_step=stop)
  assert same(run()[0], trained("global")[0])


def test_heads_and_neurons_close_together_and_are_saved(tmp_path):
  """At most the share that was asked, whole heads, one of each weight staying; under an average and in bfloat16."""
  both = compress(MODEL, PARAMS, chain(hard_concrete(), hard_concrete("heads")), None, None)[0]
  training = dataclasses.replace(TRAINING, steps=30, average=0.99, compute="bfloat16", accumulate=2)
  done, _ = fit(MODEL, both, ROWS, training, transform=l0(0.5, 0, 20))
  save(tmp_path / "m", MODEL, done)
  again = load(tmp_path / "m")[1]
  assert same(again, done)
  closed = sum(int(jnp.sum(x.gates() == 0)) * (x.shape[-2] // x.openness.size) for x in gates_of(again).values())
  assert 80 <= closed <= 96 and all(float(x.gates().max()) > 0 for x in gates_of(again).values())
  small = compress(MODEL, again, remove_closed(), None, None)[0]
  np.testing.assert_allclose(MODEL.apply(small, ROWS[:2]), MODEL.apply(again, ROWS[:2]), atol=1e-5)


def test_what_would_close_nothing_is_refused():
  heads = compress(MODEL, PARAMS, hard_concrete("heads"), None, None)[0]
  with pytest.raises(WeightError, match=r"none would close; give a share from 0\.5"):
    l0(0.25, scope="block").init(heads)
  with pytest.raises(ValueError, match=r"select them too, with the pattern \*\*/openness"):
    fit(MODEL, NEURONS, ROWS, TRAINING, trainable=lambda path: path.endswith("values"), transform=l0())
  with pytest.raises(ConfigError, match="l0 closes gates at step 100, and training has 100"):
    check({"name": "x", "model": "m", "recipe": [], "train": {"text": "grimm", "during": [{"name": "l0"}]}}, "x")


@pytest.mark.parametrize(("make", "said"), [
  (lambda: hard_concrete("layers"), "neurons or heads"), (lambda: hard_concrete(rate=0), "a rate above 0"),
  (lambda: l0(1.0), "a share between 0 and 1"), (lambda: l0(0.5, 10, 10), "0 <= start < end"),
  (lambda: l0(0.5, gain=0), "a gain above 0"),
])  # fmt: skip
def test_arguments_out_of_range(make, said):
  with pytest.raises(ValueError, match=said):
    make()


def test_what_cannot_be_gated_or_removed_is_named():
  half = fit(MODEL, NEURONS, ROWS, dataclasses.replace(TRAINING, steps=3), transform=l0(0.5, 0, 40))[0]
  codes = compress(MODEL, PARAMS, magnitude(0.5), None, None)[0]
  assert gates_of(compress(MODEL, codes, hard_concrete(), None, None)[0])  # a mask may lie below
  for params, link, said in (
    (PARAMS, remove_closed(), "no selected weight has gates"),
    (half, remove_closed(), "still being drawn; train for more steps than l0's end"),
    (NEURONS, hard_concrete(), "layers/0/mlp/down/kernel"),
    (PARAMS, hard_concrete(axis="cheese"), "its own axes are"),
  ):
    with pytest.raises(WeightError, match=said):
      compress(MODEL, params, link, None, None)
  with pytest.raises(WeightError, match="make them with hard_concrete"):
    l0().init(PARAMS)
