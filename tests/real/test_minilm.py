"""MiniLM's real weights: vectors of BBC sentences as transformers gives them, and what compression does to them."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch
import transformers

import lmcompress as lmc
from lmcompress.data.labelled import load_labelled
from lmcompress.data.tokenizer import Tokenizer
from lmcompress.errors import FormatError
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


def test_its_vocabulary_in_gguf_gives_the_same_tokens(minilm, bbc):
  """What llama.cpp's converter writes of a BERT: pieces that begin a word have a space, the others no ##."""
  told = json.loads(minilm[2].backend.to_str())
  pieces = sorted(told["model"]["vocab"], key=told["model"]["vocab"].get)
  special = {token["content"]: token["id"] for token in told["added_tokens"]}
  written = [piece if piece in special else piece[2:] if piece.startswith("##") else f"▁{piece}" for piece in pieces]
  metadata = {
    "tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": written,
    "tokenizer.ggml.token_type": np.asarray([3 if piece in special else 1 for piece in pieces], np.int32),
    **{f"tokenizer.ggml.{key}_token_id": special[token] for key, token in (
      ("cls", "[CLS]"), ("seperator", "[SEP]"), ("mask", "[MASK]"), ("unknown", "[UNK]"), ("padding", "[PAD]"))},
  }  # fmt: skip
  tokenizer = Tokenizer.from_gguf(metadata)
  for text in [*bbc[0], "Unaffable naïve e\u0301 中文, don't!", ""]:
    ids = tokenizer.encode(text, add_special=True)
    assert ids == minilm[2].encode(text, add_special=True) and (ids[0], ids[-1]) == (101, 102)
    assert tokenizer.decode(ids) == minilm[2].decode(ids)
  with pytest.raises(FormatError, match="of 30522 pieces of words 1 are alike"):
    Tokenizer.from_gguf({**metadata, "tokenizer.ggml.tokens": [*written[:-2], "▁[one]", "[one]"]})
