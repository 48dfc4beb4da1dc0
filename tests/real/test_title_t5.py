"""The T5 that writes titles, from its ONNX files: logits and titles as onnxruntime gives them, inputs not rounded."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import lmcompress as lmc
from lmcompress.data.labelled import load_labelled
from lmcompress.errors import FormatError
from lmcompress.generation.seq2seq import rewrite
from lmcompress.io.hub import resolve_model


def session(path, folder):
  """The file's own graph, but for the rounding of activations to 8 bits: integer products become float ones."""
  model = onnx.load(str(path))
  held, nodes = {tensor.name: tensor for tensor in model.graph.initializer}, []
  model.graph.initializer.append(numpy_helper.from_array(np.float32(1), "one"))
  for node in model.graph.node:
    if node.op_type == "DynamicQuantizeLinear":
      nodes += [helper.make_node("Identity", [node.input[0]], [node.output[0]], name=f"{node.name}/x"),
                helper.make_node("Identity", ["one"], [node.output[1]], name=f"{node.name}/scale")]  # fmt: skip
    elif node.op_type == "MatMulInteger":
      codes, zero = (numpy_helper.to_array(held[name]).astype(np.float32) for name in (node.input[1], node.input[3]))
      weight = f"{node.name}/weight"
      model.graph.initializer.append(numpy_helper.from_array(codes - zero, weight))
      nodes.append(helper.make_node("MatMul", [node.input[0], weight], list(node.output), name=node.name))
    else:
      nodes.append(node)
  del model.graph.node[:]
  model.graph.node.extend(nodes)
  onnx.save(model, str(folder / path.name))
  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3
  return onnxruntime.InferenceSession(str(folder / path.name), options)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
  folder, out = resolve_model("title-t5"), tmp_path_factory.mktemp("onnx")
  return tuple(session(folder / f"{side}.onnx", out) for side in ("encoder", "decoder"))


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


def test_a_damaged_file_is_named(tmp_path):
  for name in ("encoder.onnx", "decoder.onnx"):
    (tmp_path / name).write_bytes(b"\x08\x07garbage")
  with pytest.raises(FormatError, match=r"encoder\.onnx"):
    lmc.load(tmp_path)
