"""Rescaling channels leaves the model's function as it was; its scales are the papers'."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from lmcompress import tree
from lmcompress.arrays import FixedStep, InputArray, LearnedInputArray, QuantizedArray, SumArray, fetch
from lmcompress.calibration import compress
from lmcompress.io.store import Store
from lmcompress.shapes import stored
from lmcompress.transforms import (
  at,
  awq,
  awq_scale,
  chain,
  fake_quantize_inputs,
  freeze,
  lora,
  magnitude,
  partition,
  prune_neurons,
  prune_width,
  quantize_activations,
  quantize_inputs,
  rotate,
  round_to_nearest,
  share,
  smooth,
  smooth_quant,
)
from lmcompress.transforms.lora import adapters
from lmcompress.types import Evidence, WeightError


@pytest.fixture(scope="module")
def calibration():
  return np.random.default_rng(0).integers(0, 64, (8, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def spiky(tiny):
  """The small Llama with some channels far larger than the rest, as trained ones have."""
  model, params = tiny
  size = jnp.exp(jax.random.normal(jax.random.key(1), (32,)))
  for i in "01":
    for norm in ("attn_norm", "mlp_norm"):
      params = tree.put(params, f"layers/{i}/{norm}/scale", size)
  return model, params


@pytest.mark.parametrize("transform", [awq_scale(4, 16), smooth(0.5, "all"), smooth(0.8, "all")])
def test_the_function_stays(spiky, calibration, transform):
  """Logits within 1e-4: queries share values in threes, and the scales with them."""
  model, params = spiky
  done, _ = compress(model, params, transform, calibration)
  changed = {p for p, leaf in tree.flatten(done).items() if tree.get(params, p) is not leaf}
  assert "layers/0/attn_norm/scale" in changed and "layers/1/attn/v/kernel" in changed
  before, after = (np.asarray(model.apply(p, calibration)) for p in (params, done))
  np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())
  up = lambda p: np.asarray(p["layers"]["0"]["mlp"]["up"]["kernel"])  # noqa: E731
  assert np.abs(up(done) / up(params) - 1).max() > 0.1


def test_the_scales_of_smooth_quant(spiky, calibration):
  """`max |X_j|**a / max |W_j|**(1 - a)` over all weights that read it, in NumPy."""
  model, params = spiky
  done, _ = compress(model, params, smooth(0.7), calibration)
  _, taps = model.run(model.blocks(params)[0], params, model.start(params, calibration), ("gate_up",))
  x = np.abs(np.asarray(taps["gate_up"])).max((0, 1))
  mlp = params["layers"]["0"]["mlp"]
  w = np.maximum(*(np.abs(np.asarray(mlp[n]["kernel"])).max(1) for n in ("gate", "up")))
  scale = np.asarray(params["layers"]["0"]["mlp_norm"]["scale"]) / np.asarray(done["layers"]["0"]["mlp_norm"]["scale"])
  np.testing.assert_allclose(scale, x**0.7 / w**0.3, rtol=1e-4)


def test_awq_beats_rounding(spiky, calibration):
  """On the logits, with the same bits."""
  model, params = spiky
  before = np.asarray(model.apply(params, calibration))
  results = {}
  for name, t in (("awq", awq(3, 16)), ("round", round_to_nearest(3, 16, symmetric=False))):
    done, report = compress(model, params, at("layers/*", t), calibration)
    results[name] = np.linalg.norm(np.asarray(model.apply(done, calibration)) - before)
    assert {row["kind"] for row in report.last().values()} == {"int3 g16 asym"}
  assert results["awq"] < 0.85 * results["round"]


def test_awq_never_does_worse_than_no_scaling(tiny):
  """r = 0 is among the candidates, so the best scale's error is at most that of plain rounding."""
  from lmcompress.ops.rounding import Rounding
  from lmcompress.transforms.awq import best_scale, relative_size

  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(32, 24)), jnp.float32)
  x = rng.normal(size=(100, 32)) * np.exp(rng.normal(size=32))
  h, rounding = jnp.asarray(x.T @ x, jnp.float32), Rounding(3, False)
  s = best_scale(w, h, jnp.asarray(np.abs(x).mean(0), jnp.float32), relative_size(w, 16), rounding, 16)
  from lmcompress.transforms.awq import _rounded

  error = lambda s: np.linalg.norm(x @ np.asarray(_rounded(w * s[:, None], rounding, 16, 1.0) / s[:, None] - w))  # noqa: E731
  assert error(s) < error(jnp.ones(32))


def test_w8a8(spiky, calibration):
  """Weights and inputs in 8 bits: close to the original, and both really are integers."""
  model, params = spiky
  done, _ = compress(model, params, smooth_quant(0.5, activations="int8_per_token"), calibration)
  leaf = done["layers"]["0"]["mlp"]["up"]["kernel"]
  assert isinstance(leaf, InputArray) and leaf.act.name == "int8 per token"
  assert isinstance(leaf.weight, QuantizedArray) and leaf.weight.grid.bits == 8
  before, after = (np.asarray(model.apply(p, calibration)) for p in (params, done))
  assert np.linalg.norm(after - before) < 0.05 * np.linalg.norm(before)


@pytest.mark.parametrize("name", ["int8_per_token", "int8_per_group", "fp8_per_token"])
def test_inputs_are_rounded(tiny, name):
  _, params = tiny
  done, _ = compress(tiny[0], params, quantize_inputs(name))
  act = done["layers"]["0"]["mlp"]["up"]["kernel"].act
  x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 70)), jnp.float32).at[0, 3].set(1000.0)
  y = np.asarray(act(x))
  error = np.abs(y - np.asarray(x))
  size = 32 if name == "int8_per_group" else 70
  parts = [np.abs(np.asarray(x)[:, i : i + size]).max(1, keepdims=True) for i in range(0, 70, size)]
  largest = np.concatenate([np.broadcast_to(part, (5, size)) for part in parts], 1)[:, :70]
  step = np.abs(np.asarray(x)) * 2**-4 + largest / 448 * 2**-9 if name == "fp8_per_token" else largest / 127 / 2
  assert (error <= step * (1 + 1e-5)).all()
  np.testing.assert_array_equal(np.asarray(act(jnp.zeros((2, 70)))), 0)


def test_the_range_of_a_tensor_as_onnxruntime(tiny):
  """DynamicQuantizeLinear and back: inputs of both signs, of one, zeros, and ties of rounding."""
  model, params = tiny
  graph = helper.make_graph(
    [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
     helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"])],
    "rounding", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])],
  )  # fmt: skip
  file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
  session = onnxruntime.InferenceSession(file.SerializeToString())
  done, _ = compress(model, params, quantize_inputs("uint8_per_tensor"))
  act = done["layers"]["0"]["mlp"]["up"]["kernel"].act
  normal = np.random.default_rng(0).normal(size=(5, 70)).astype(np.float32)
  halves = np.linspace(0, 255, 511, dtype=np.float32)[None]
  for x in (normal, np.abs(normal) + 3, -np.abs(normal), normal * 1e-4, np.zeros((2, 3), np.float32), halves):
    (want,) = session.run(None, {"x": x})
    np.testing.assert_allclose(act(jnp.asarray(x)), want, rtol=1e-6, atol=1e-6 * np.abs(x).max())
  grads = jax.grad(lambda x: jnp.sum(act(x) * x))(jnp.asarray(normal))
  np.testing.assert_allclose(grads, np.asarray(act(jnp.asarray(normal))) + normal, rtol=1e-6)
  assert np.isnan(np.asarray(act(jnp.asarray(normal).at[0, 0].set(jnp.nan)))).all()


def test_activations_at_a_fixed_step(tiny):
  model, params = tiny
  done, report = compress(model, params, quantize_activations(0.25))
  leaf = done["layers"]["0"]["mlp"]["up"]["kernel"]
  np.testing.assert_array_equal(leaf.act(jnp.asarray([0.3, -0.4, 1.0])), [0.25, -0.5, 1.0])
  assert report.last()["layers/0/mlp/up/kernel"]["kind"] == "step 0.25 x float32"
  with pytest.raises(WeightError, match="acted on already"):
    compress(model, done, quantize_inputs())


@pytest.mark.parametrize("method", [
  lambda: round_to_nearest(4, 16), lambda: magnitude(0.5), lambda: share(16), lambda: lora(2),
  lambda: prune_neurons(0.5),
], ids=["round_to_nearest", "magnitude", "share", "lora", "prune_neurons"])  # fmt: skip
def test_what_is_done_to_inputs_stays_where_it_is(tiny, calibration, method):
  """A method after it acts on the weight beneath: both orders give one tree, where statistics do not differ."""
  model, params = tiny
  key = jax.random.key(0)
  alone = compress(model, params, method(), calibration, key)[0]
  done = compress(model, params, chain(quantize_activations(0.25), method()), calibration, jax.random.key(0))[0]
  for path, leaf in tree.flatten(done).items():
    if path.startswith("layers/") and tree.is_weight(path):
      assert isinstance(leaf, InputArray) and leaf.act == FixedStep(0.25)
      assert jax.tree.structure(leaf.weight) == jax.tree.structure(tree.get(alone, path))
  if method().name in ("round_to_nearest", "magnitude", "share"):
    first = compress(model, params, chain(method(), quantize_activations(0.25)), calibration, key)[0]
    assert jax.tree.structure(first) == jax.tree.structure(done)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(done), strict=True))


@pytest.mark.parametrize("make", [
  lambda: rotate(), lambda: smooth(), lambda: awq_scale(4, 16), lambda: prune_width(0.25),
], ids=["rotate", "smooth", "awq_scale", "prune_width"])  # fmt: skip
def test_what_changes_inputs_comes_before_steps_for_them(tiny, calibration, make):
  model, params = tiny
  stepped = compress(model, params, quantize_inputs("int8_static"), calibration)[0]
  with pytest.raises(WeightError, match="already stored as int8 static x float32"):
    compress(model, stepped, make(), calibration, jax.random.key(0))


def test_parts_and_chains_by_hand_see_what_they_must(tiny, calibration):
  """A partition hands each part what it would see alone; so does a chain without `compress`."""
  model, params = tiny
  labels = {"layers/*/attn": "a", "layers/*/mlp": "b"}
  twice = partition(labels, {"a": quantize_inputs(), "b": round_to_nearest(4, 16)})
  with pytest.raises(WeightError, match="quantize_inputs at layers/0/attn/k/kernel: its input is acted on already"):
    compress(model, params, chain(quantize_activations(0.25), twice))
  done, _ = compress(model, params, chain(fake_quantize_inputs(), partition(labels, {"a": freeze(), "b": lora(2)})),
                     calibration, jax.random.key(0))  # fmt: skip
  attn, mlp = (tree.get(done, f"layers/0/{path}/kernel") for path in ("attn/q", "mlp/up"))
  assert attn.kind == "int8 static x float32"
  assert isinstance(mlp, LearnedInputArray) and isinstance(mlp.weight, SumArray)
  assert set(adapters(done)) == {p for p in tree.default_selection(params) if "/mlp/" in p}
  by_hand = chain(quantize_activations(0.25), lora(2))
  evidence = Evidence(key=jax.random.key(0), structure=model)
  found = by_hand.apply(params, by_hand.init(params), evidence)[0]
  assert isinstance(tree.get(found, "layers/0/mlp/up/kernel").weight, SumArray)


@pytest.mark.parametrize("recipe", [
  lambda: chain(quantize_inputs(), round_to_nearest(4, 16)), lambda: chain(quantize_inputs(), lora(2)),
], ids=["round_to_nearest", "lora"])  # fmt: skip
def test_plans_and_files_see_the_weight_beneath_too(tiny, recipe, tmp_path):
  model, params = tiny
  done, _ = compress(model, params, recipe(), key=jax.random.key(0))
  planned = stored(jax.eval_shape(lambda: params), recipe(), jnp.float32, model)
  assert jax.tree.structure(planned) == jax.tree.structure(done)
  assert [x.shape for x in jax.tree.leaves(planned)] == [x.shape for x in jax.tree.leaves(done)]
  kept = Store(tmp_path / "store", {}, mapped=True)
  filed, _ = compress(model, params, recipe(), key=jax.random.key(0), store=kept)
  filed = tree.map_leaves(lambda _, leaf: fetch(leaf), filed)
  assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(filed), jax.tree.leaves(done), strict=True))


def test_what_is_coupled_must_be_selected(tiny, calibration):
  model, params = tiny
  with pytest.raises(WeightError, match=r"layers/0/mlp/up/kernel reads the same input and is not selected"):
    compress(model, params, at("layers/*/mlp/gate", smooth()), calibration)
  with pytest.raises(WeightError, match=r"attn/v/kernel, which feeds it, is not selected"):
    compress(model, params, at("layers/*/attn/o", smooth(sources="all")), calibration)
  with pytest.raises(WeightError, match="rescales inputs of blocks' linears"):
    compress(model, params, at("embed", smooth()), calibration)
  with pytest.raises(WeightError, match="masked; rescale first"):
    compress(model, compress(model, params, magnitude(0.5))[0], awq_scale(4, 16), calibration)
  quantized = compress(model, params, round_to_nearest(8, -1))[0]
  with pytest.raises(WeightError, match="already stored as int8"):
    compress(model, quantized, awq(4, 16), calibration)


def test_a_structure_that_does_not_tell(tiny, calibration):
  """Without the extent of a head nobody knows which values an output reads."""
  model, params = tiny

  @dataclasses.dataclass(frozen=True)
  class Silent(type(model)):
    def extents(self, params):
      return {}

  with pytest.raises(WeightError, match=r"attn/o/kernel: its input .* does not tell which outputs"):
    compress(Silent(model.config, model.sizes), params, smooth(sources="all"), calibration)


@pytest.mark.parametrize("make, message", [
  (lambda: smooth(2.0), "0 to 1"), (lambda: awq(9), "bits are 2 to 8"), (lambda: awq_scale(4, 0), "at least 1"),
  (lambda: quantize_inputs("int4"), "one of int8_per_token"), (lambda: quantize_activations(0.0), "positive number"),
])
def test_arguments_out_of_range(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize("observer", ["absmax", "percentile", "mse"])
def test_static_scales_of_inputs(spiky, calibration, observer, tmp_path):
  """One scale for all tokens, in the act and in the count of bits; kept by a checkpoint."""
  from lmcompress.io.checkpoint import save
  from lmcompress.io.load import load

  model, params = spiky
  done, _ = compress(model, params, quantize_inputs("int8_static", observer), calibration)
  leaf = done["layers"]["0"]["mlp"]["up"]["kernel"]
  assert isinstance(leaf, InputArray) and leaf.nbits == leaf.size * 32 + 32
  assert leaf.act == done["layers"]["0"]["mlp"]["gate"]["kernel"].act
  x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 32)), jnp.float32)
  want = np.clip(np.round(np.asarray(x) / leaf.act.step), -127, 127) * leaf.act.step
  np.testing.assert_allclose(leaf.act(x), want, rtol=1e-6)
  before, after = (np.asarray(model.apply(p, calibration), np.float64) for p in (params, done))
  assert np.linalg.norm(after - before) < 0.2 * np.linalg.norm(before)
  save(tmp_path / "m", model, done)
  again = load(tmp_path / "m")[1]
  np.testing.assert_allclose(model.apply(again, calibration), after, rtol=1e-5, atol=1e-5)
  with pytest.raises(ValueError, match="observer='median'"):
    quantize_inputs("int8_static", "median")
