"""MiniLM's real weights: vectors of BBC sentences as transformers gives them, and what compression does to them."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import transformers

import lmcompress as lmc
from lmcompress.data.labelled import load_labelled
from lmcompress.evaluate.sentences import mean_cosine, sentence_vectors
from lmcompress.io.hub import resolve_model


@pytest.fixture(scope="module")
def bbc():
  """Headlines and beginnings of articles, and rows of tokens of others."""
  data, tokenizer = load_labelled("bbc"), lmc.load("minilm-l6")[2]
  texts = [text[:n] for text in data.test[0][:20] for n in (40, 200)]
  ids = [tokenizer.encode(text[:600], add_special=True)[:64] for text in data.train[0][:60]]
  return texts, np.asarray([row for row in ids if len(row) == 64], np.int32)


@pytest.fixture(scope="module")
def minilm():
  return lmc.load("minilm-l6")


@pytest.fixture(scope="module")
def vectors(minilm, bbc):
  model, params, tokenizer = minilm
  return sentence_vectors(model, params, tokenizer, bbc[0], length=64)


def test_vectors_equal_transformers(bbc, vectors):
  folder = resolve_model("minilm-l6")
  net = transformers.AutoModel.from_pretrained(folder).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  for text, ours in zip(bbc[0], vectors, strict=True):
    given = tokenizer([text], return_tensors="pt", truncation=True, max_length=64)
    with torch.no_grad():
      theirs = net(**given).last_hidden_state.mean(1)[0].numpy()
    np.testing.assert_allclose(ours, theirs / np.linalg.norm(theirs), atol=1e-5)


@pytest.mark.parametrize(("transform", "least"), [
  (lmc.round_to_nearest(bits=8, group_size=-1), 0.999),
  (lmc.gptq(bits=4, group_size=32, symmetric=False), 0.98),
], ids=["int8", "int4"])  # fmt: skip
def test_vectors_stay_near(minilm, bbc, vectors, transform, least):
  model, params, tokenizer = minilm
  small, _ = lmc.compress(model, params, lmc.at("layers/*", transform), bbc[1], jax.random.key(0))
  assert least < mean_cosine(vectors, sentence_vectors(model, small, tokenizer, bbc[0], length=64)) < 1
