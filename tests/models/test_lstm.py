"""The LSTM against torch's, its state against reading all at once, and generation from it."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from small_model import byte_level

import lmcompress as lmc
from lmcompress import tree
from lmcompress.generation.cache import init_cache
from lmcompress.io import checkpoint
from lmcompress.io.names import check_shapes
from lmcompress.models import LSTM, LSTMSizes
from lmcompress.types import FormatError, Model

SIZES = LSTMSizes(vocab=61, embed=9, units=7, layers=3)


@pytest.fixture(scope="module")
def small():
  model = LSTM(sizes=SIZES)
  return model, model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
  return np.random.default_rng(0).integers(0, 61, (2, 12)).astype(np.int32)


def test_the_articles_sizes_have_its_parameters():
  params = jax.eval_shape(LSTM(sizes=LSTMSizes()).init, jax.random.key(0))
  assert sum(leaf.size for leaf in tree.flatten(params).values()) == 4_178_704


def test_logits_equal_torch(small, tokens):
  """Torch's gates stand in the same order; of its two biases one is 0 here."""
  model, params = small
  params = tree.map_leaves(lambda p, x: x + 0.3 if p.endswith("bias") else x, params)
  net = torch.nn.LSTM(9, 7, 3, batch_first=True)
  with torch.no_grad():
    for i in range(3):
      layer = jax.tree.map(np.asarray, params["layers"][str(i)])
      for theirs, ours in (
        ("weight_ih", layer["input"]["kernel"].T), ("weight_hh", layer["recurrent"]["kernel"].T),
        ("bias_ih", layer["input"]["bias"]), ("bias_hh", np.zeros(28, np.float32)),
      ):  # fmt: skip
        getattr(net, f"{theirs}_l{i}").copy_(torch.tensor(ours))
    hidden = net(torch.tensor(np.asarray(params["embed"]["table"])[tokens]))[0].numpy()
  head = jax.tree.map(np.asarray, params["head"])
  np.testing.assert_allclose(model.apply(params, tokens), hidden @ head["table"].T + head["bias"], atol=1e-5)


def test_is_a_model_and_taps_are_inputs(small, tokens):
  model, params = small
  assert isinstance(model, Model)
  check_shapes(model, params, "here")
  carry = model.start(params, tokens)
  for block in model.blocks(params):
    before = carry["h"]
    carry, taps = model.run(block, params, carry, ("input", "recurrent"))
    np.testing.assert_array_equal(taps["input"], before)
    np.testing.assert_allclose(taps["recurrent"][:, 1:], carry["h"][:, :-1], atol=1e-6)
    assert not taps["recurrent"][:, 0].any()


def test_the_state_continues_and_padding_leaves_it(small, tokens):
  model, params = small
  whole, cache = np.asarray(model.apply(params, tokens)), init_cache(model, params, 2, 32)
  mask = np.ones((2, 8), bool)
  mask[:, 5:] = False
  first, cache = model.apply(params, np.where(mask, tokens[:, :8], 0), attention_mask=mask, cache=cache)
  rest, cache = model.apply(params, tokens[:, 5:], cache=cache.rollback(3))
  np.testing.assert_allclose(np.concatenate([first[:, :5], rest], axis=1), whole, atol=1e-5)
  assert int(cache.length) == 12


def test_it_generates_what_greedy_choice_says(small):
  model = LSTM(sizes=LSTMSizes(vocab=264, embed=16, units=12, layers=2))
  params, tokenizer = model.init(jax.random.key(1)), byte_level()
  from lmcompress.generation.generate import decode
  from lmcompress.generation.sampling import Sampler

  ids = [tokenizer.encode("A wolf"), tokenizer.encode("came here once")]
  made = [list(row) for row in decode(model, params, ids, 6, Sampler())]
  for n, prompt in enumerate(ids):
    row = list(prompt)
    for step in range(6):
      row.append(int(np.argmax(np.asarray(model.apply(params, np.asarray([row], np.int32)))[0, -1])))
      assert made[step][n] == row[-1]
  with pytest.raises(ValueError, match="without a draft"):
    lmc.generate(model, params, tokenizer, "A wolf", 6, draft=(model, params))


def test_saved_and_read_again(small, tokens, tmp_path):
  model, params = small
  small_, _ = lmc.compress(model, params, lmc.round_to_nearest(8, group_size=-1))
  checkpoint.save(tmp_path / "m", model, small_)
  back, read, _ = lmc.load(tmp_path / "m")
  np.testing.assert_array_equal(back.apply(read, tokens), model.apply(small_, tokens))


def test_layers_that_do_not_fit_are_named(small):
  model, params = small
  narrow = tree.put(params, "layers/1/input/kernel", params["layers"]["1"]["input"]["kernel"][:6])
  with pytest.raises(FormatError, match="here: layers/1/input/kernel has 6 inputs, 7 expected"):
    check_shapes(model, narrow, "here")
  with pytest.raises(ValueError, match="from 1 to 16"):
    LSTM(sizes=LSTMSizes(layers=17)).init(jax.random.key(0))
