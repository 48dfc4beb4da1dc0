"""The T5 that writes titles, from its ONNX files: logits and titles as onnxruntime gives them, inputs not rounded."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import lmcompress as lmc
from lmcompress.data.labelled import load_labelled
from lmcompress.data.tokenizer import Tokenizer
from lmcompress.errors import FormatError
from lmcompress.generation.seq2seq import rewrite
from lmcompress.io.hub import resolve_model


def study():
  """The study of titles, which runs the graph with the inputs of integer products left as they are."""
  path = Path(__file__).parents[2] / "experiments" / "titles.py"
  spec = importlib.util.spec_from_file_location("titles", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def sessions():
  folder, floating = resolve_model("title-t5"), study().floating
  return tuple(
    onnxruntime.InferenceSession(floating(folder / f"{side}.onnx").SerializeToString())
    for side in ("encoder", "decoder")
  )


@pytest.fixture(scope="module")
def title():
  return lmc.load("title-t5")


@pytest.fixture(scope="module")
def articles():
  return [text.split("\n", 1)[1][:400] for text in load_labelled("bbc").test[0][:200:20]]


def decoded(sessions, ids, written):
  """Logits `[length, vocab]` by onnxruntime."""
  mask = np.ones_like(ids)
  (hidden,) = sessions[0].run(None, {"input_ids": ids, "attention_mask": mask})
  given = {"input_ids": written, "encoder_hidden_states": hidden, "encoder_attention_mask": mask}
  return sessions[1].run(None, given)[0][0]


def test_logits_equal_onnxruntime(title, sessions, articles):
  model, params, tokenizer = title
  ids, written = np.asarray([tokenizer.encode(articles[0], add_special=True)]), np.array([[0, 5, 9, 71]])
  expected = decoded(sessions, ids, written)
  assert np.abs(expected).max() > 10
  ours = model.apply(params, ids.astype(np.int32), decoder_input_ids=written.astype(np.int32))
  np.testing.assert_allclose(np.asarray(ours)[0], expected, atol=1e-3)


def test_titles_equal_onnxruntime(title, sessions, articles):
  model, params, tokenizer = title
  for text, ours in zip(articles, rewrite(model, params, tokenizer, articles, 10), strict=True):
    ids, written = np.asarray([tokenizer.encode(text, add_special=True)]), [0]
    while len(written) < 11 and written[-1] != 1:
      written.append(int(decoded(sessions, ids, np.asarray([written]))[-1].argmax()))
    assert ours == tokenizer.decode([t for t in written if t > 1])


def test_eight_bits_write_the_same_and_are_saved(title, articles, tmp_path):
  model, params, tokenizer = title
  small, _ = lmc.compress(model, params, lmc.at("**/layers/*", lmc.round_to_nearest(bits=8, group_size=32)))
  lmc.save(tmp_path / "small", model, small, tokenizer)
  back, read, tokens = lmc.load(tmp_path / "small")
  both = [rewrite(*given, articles[:4], 6) for given in ((model, small, tokenizer), (back, read, tokens))]
  assert both[0] == both[1]


def test_its_vocabulary_in_gguf_gives_the_same_tokens(title, articles):
  """What llama.cpp's converter writes of a T5: pieces, scores and the table of characters."""
  told = json.loads(title[2].backend.to_str())
  pieces, scores = zip(*told["model"]["vocab"], strict=True)
  special = {token["content"] for token in told["added_tokens"]}
  steps = told["normalizer"].get("normalizers", [told["normalizer"]])
  table = next(step["precompiled_charsmap"] for step in steps if step["type"] == "Precompiled")
  metadata = {
    "tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": list(pieces),
    "tokenizer.ggml.scores": np.asarray(scores, np.float32),
    "tokenizer.ggml.token_type": np.asarray([3 if piece in special else 1 for piece in pieces], np.int32),
    "tokenizer.ggml.precompiled_charsmap": np.frombuffer(base64.b64decode(table), np.uint8),
    "tokenizer.ggml.unknown_token_id": told["model"]["unk_id"], "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.add_eos_token": True,
  }  # fmt: skip
  tokenizer = Tokenizer.from_gguf(metadata)
  for text in [*map(str.rstrip, articles), "  two  spaces, ½ and ﬁ; naïve e\u0301 中文"]:  # a last space is left out
    ids = tokenizer.encode(text, add_special=True)
    assert ids == title[2].encode(text, add_special=True) and ids[-1] == 1
    assert tokenizer.decode(ids) == title[2].decode(ids)
  assert tokenizer.stop_ids == {1}


def test_a_damaged_file_is_named(tmp_path):
  for name in ("encoder.onnx", "decoder.onnx"):
    (tmp_path / name).write_bytes(b"\x08\x07garbage")
  with pytest.raises(FormatError, match=r"encoder\.onnx"):
    lmc.load(tmp_path)
