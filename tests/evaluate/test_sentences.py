"""Vectors of sentences: the order and the batch do not matter, and bad input is named."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from small_model import byte_level

from lmcompress.errors import WeightError
from lmcompress.evaluate import perplexity
from lmcompress.evaluate.sentences import mean_cosine, sentence_vectors
from lmcompress.generation.engine import Engine
from lmcompress.models import Bert, BertConfig, BertSizes

TEXTS = ["a wolf", "", "the king had three sons and the youngest of them was called Dummling", "wolf", "sons"]


@pytest.fixture(scope="module")
def encoder():
  model = Bert(BertConfig(head_dim=8, max_length=64), BertSizes(vocab=264, embed=32, mlp=32, layers=2, heads=4))
  return model, model.init(jax.random.key(0))


def test_each_text_alone_gives_the_same_vector(encoder):
  """Padding and neighbours leave no trace; 1e-5 for another order of sums."""
  model, params = encoder
  texts = [text for text in TEXTS if text]
  together = sentence_vectors(model, params, byte_level(), texts, length=64, batch=3)
  np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
  for text, vector in zip(texts, together, strict=True):
    ids = np.asarray([byte_level().encode(text)[:63] + byte_level().encode(text)[-1:]], np.int32)
    ids = ids if len(text) > 64 else np.asarray([byte_level().encode(text)], np.int32)
    mean = np.asarray(model.apply(params, ids).hidden[0]).mean(0)
    np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


def test_mean_cosine():
  a = np.random.default_rng(0).normal(size=(3, 5))
  assert mean_cosine(a, 2 * a) == pytest.approx(1) and mean_cosine(a, -a) == pytest.approx(-1)
  with pytest.raises(ValueError, match="shapes"):
    mean_cosine(a, a[:2])


@pytest.mark.parametrize("given", [{"texts": []}, {"length": 2}, {"length": 65}, {"batch": 0}])
def test_what_cannot_be_is_named(encoder, given):
  with pytest.raises(ValueError, match="sentence_vectors"):
    sentence_vectors(*encoder, byte_level(), **{"texts": TEXTS, **given})


def test_an_encoder_is_asked_for_no_next_token(encoder):
  """Where a next token is asked for, the error says that there is none."""
  model, params = encoder
  for ask in (
    lambda: perplexity(model, params, np.zeros((1, 8), np.int32)),
    lambda: Engine(model, params),
  ):
    with pytest.raises(WeightError, match="predicts no next token"):
      ask()


def test_inputs_that_an_encoder_does_not_take(encoder):
  model, params = encoder
  tokens = np.zeros((1, 8), np.int32)
  for given, said in (
    ({"cache": object()}, "Bert takes no cache"),
    ({"token_type_ids": tokens + 2}, "outside the vocabulary of 2"),
    ({"token_type_ids": tokens[:, :4]}, "differ"),
  ):
    with pytest.raises(ValueError, match=said):
      model.apply(params, tokens, **given)
  with pytest.raises(ValueError, match="65 tokens are longer"):
    model.apply(params, np.zeros((1, 65), np.int32))
