"""Pipelines: stages are the tree, the order is 1F1B, and training is that of one device."""

from __future__ import annotations

import collections
import dataclasses

import jax
import numpy as np
import pytest

import lmcompress as lmc
from lmcompress import fit, tree
from lmcompress.distributed import make_mesh, shard
from lmcompress.models import GPT2, GPT2Config, GPT2Sizes, Llama, LlamaConfig, LlamaSizes
from lmcompress.training import (
  Distill,
  Pipeline,
  Privacy,
  Training,
  merge_stages,
  split_stages,
  start,
  store_predictions,
)
from lmcompress.training.pipeline import _even, one_forward_one_backward, stages_of

MODELS = {
  "tied": Llama(LlamaConfig(head_dim=8), LlamaSizes(vocab=32, embed=16, mlp=32, layers=4, heads=2, kv_heads=2)),
  "apart": Llama(
    LlamaConfig(head_dim=8), LlamaSizes(vocab=32, embed=16, mlp=32, layers=3, heads=2, kv_heads=2, tied=False)
  ),
  "gpt2": GPT2(GPT2Config(head_dim=8, max_length=32), GPT2Sizes(vocab=32, embed=16, mlp=32, layers=3, heads=2)),
}
ROWS = np.random.default_rng(0).integers(0, 32, (24, 12)).astype(np.int32)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_stages_are_the_tree(name, count):
  """Apart and together again, bit for bit; every block once, in order."""
  model = MODELS[name]
  params, _ = lmc.compress(
    model, model.init(jax.random.key(0)), lmc.at("layers/0", lmc.round_to_nearest(bits=4, group_size=16))
  )
  parts = split_stages(model, params, count)
  again = merge_stages(parts)
  assert jax.tree.structure(again) == jax.tree.structure(params)
  assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True))
  assert [b.path for part in parts for b in model.blocks(part)] == [b.path for b in model.blocks(params)]
  assert all(model.blocks(part) for part in parts)


@pytest.mark.parametrize(("sizes", "count", "want"), [
  ([1, 1, 1, 1], 2, [0, 0, 1, 1]), ([1, 1, 1, 9], 2, [0, 0, 0, 1]), ([9, 1, 1, 1], 2, [0, 1, 1, 1]),
  ([1, 1, 1], 3, [0, 1, 2]), ([7, 7], 1, [0, 0]),
])  # fmt: skip
def test_stages_have_about_as_many_bytes(sizes, count, want):
  assert _even(sizes, count) == want


@pytest.mark.parametrize(("stages", "count"), [(1, 1), (2, 4), (4, 2), (4, 8)])
def test_the_order_is_one_forward_one_backward(stages, count):
  order = one_forward_one_backward(stages, count)
  assert len(order) == len(set(order)) == 2 * stages * count
  at = {work: i for i, work in enumerate(order)}
  held: collections.Counter = collections.Counter()
  for stage, batch, way in order:
    held[stage] += 1 if way == "forward" else -1
    assert 0 <= held[stage] <= stages - stage
    if way == "forward" and stage:
      assert at[stage - 1, batch, "forward"] < at[stage, batch, "forward"]
    if way == "backward" and stage + 1 < stages:
      assert at[stage + 1, batch, "backward"] < at[stage, batch, "backward"]


@pytest.mark.parametrize(("name", "stages"), [("tied", 4), ("apart", 2), ("gpt2", 3)])
def test_a_pipeline_is_training(name, stages):
  """Losses, norms and weights of `fit`; moments of a table that is in two stages stay alike."""
  model = MODELS[name]
  params = model.init(jax.random.key(0))
  training = Training(steps=4, batch=8, accumulate=4, learning_rate=0.3, optimizer="sgd", chunk=4)
  want, told = fit(model, params, ROWS, training)
  done, found = fit(model, params, ROWS, training, stages=stages)
  np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in told], rtol=1e-5)
  np.testing.assert_allclose([r["grad_norm"] for r in found], [r["grad_norm"] for r in told], rtol=1e-4)
  for a, b in zip(jax.tree.leaves(done), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
  assert max(r["held"] for r in found) == min(stages, 4)


@pytest.mark.parametrize("layer", ["layers/3", "layers/0"])
def test_adapters_over_codes_train_in_stages(layer):
  """What stays lies with its stage; a stage in which nothing trains only passes on."""
  model = MODELS["tied"]
  by_groups = lmc.round_to_nearest(bits=4, group_size=16)
  base, _ = lmc.compress(model, model.init(jax.random.key(0)), [lmc.at(w, by_groups) for w in ("layers/*", "embed")])
  params, _ = lmc.compress(model, base, lmc.at(layer, lmc.lora(2)), key=jax.random.key(1))
  trains = lambda path: tree.matches("**/delta", path)  # noqa: E731
  training = Training(steps=3, batch=4, accumulate=2, learning_rate=1e-2, chunk=4)
  want, told = fit(model, params, ROWS, training, trainable=trains)
  done, found = fit(model, params, ROWS, training, stages=2, trainable=trains)
  np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in told], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(done), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-4)


PLAIN = Training(steps=4, batch=8, accumulate=2, learning_rate=0.3, optimizer="sgd", chunk=4)


@pytest.mark.parametrize(("sizes", "stages"), [
  ({"fsdp": 4}, 2), ({"data": 2, "fsdp": 4}, 2), ({"fsdp": 2, "tensor": 2}, 2), ({"fsdp": 4, "tensor": 2}, 4),
])  # fmt: skip
def test_stages_share_the_devices_that_split_weights(sizes, stages):
  """The rest of the mesh splits each stage; the tree comes back to where it was."""
  model = MODELS["tied"]
  params = model.init(jax.random.key(0))
  want, told = fit(model, params, ROWS, PLAIN)
  placed = shard(model, params, make_mesh(**sizes))
  done, found = fit(model, placed, ROWS, PLAIN, stages=stages)
  np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in told], rtol=1e-5)
  for a, b, c in zip(*map(jax.tree.leaves, (done, want, placed)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
    assert a.sharding == c.sharding


def test_a_stage_holds_its_own_alone():
  """Arrays and moments of a state lie with their stages, split by what is left of the mesh."""
  model = MODELS["apart"]
  placed = shard(model, model.init(jax.random.key(0)), make_mesh(fsdp=4))
  pipeline = Pipeline(model, placed, Training(steps=1, batch=4), 2)
  state = pipeline.spread(start(placed, Training(steps=1, batch=4), lambda path: True))
  homes = stages_of(model, placed, 2)
  groups = [set(jax.devices()[:2]), set(jax.devices()[2:4])]
  for path, leaf in tree.flatten(state.trained).items():
    assert leaf.sharding.device_set == groups[homes[path]], path
  adam = next(part for part in state.moments if hasattr(part, "mu"))
  assert adam.mu["layers"]["2"]["mlp"]["up"]["kernel"].sharding.device_set == groups[1]
  up = state.trained["layers"]["0"]["mlp"]["up"]["kernel"]
  assert up.addressable_shards[0].data.size == up.size // 2


@pytest.mark.parametrize("loss", ["teacher", "stored"])
def test_a_pipeline_distills(loss, tmp_path):
  """From a teacher that is cut into stages of its own, or from predictions on disk; scores on the way are `fit`'s."""
  model, teacher = MODELS["tied"], MODELS["apart"]
  params, theirs = model.init(jax.random.key(0)), teacher.init(jax.random.key(1))
  guide = (teacher, theirs) if loss == "teacher" else store_predictions(teacher, theirs, ROWS, tmp_path, k=8)
  training = dataclasses.replace(PLAIN, loss=Distill(), average=0.5)
  given = {"teacher": guide, "held_out": ROWS[:5], "evaluate_every": 2}
  want, told = fit(model, params, ROWS, training, **given)
  done, found = fit(model, params, ROWS, training, stages=3, **given)
  for name in ("loss", "held_out"):
    pairs = [(a[name], b[name]) for a, b in zip(found, told, strict=True) if name in b]
    np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-5)
  for a, b in zip(jax.tree.leaves(done), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_state_goes_on_with_and_without_a_pipeline(tmp_path):
  """Cut off in a pipeline of two, then of four, then without one: the losses of one device."""
  model = MODELS["tied"]
  params = model.init(jax.random.key(0))
  training = dataclasses.replace(PLAIN, steps=6, optimizer="adamw", learning_rate=1e-3, average=0.5)
  want, told = fit(model, params, ROWS, training)

  def stop(at):
    def on_step(step, metrics):
      if step == at:
        raise KeyboardInterrupt

    return on_step

  for stages, last in ((2, 2), (4, 4)):
    with pytest.raises(KeyboardInterrupt):
      fit(model, params, ROWS, training, stages=stages, folder=tmp_path, on_step=stop(last))
  done, found = fit(model, params, ROWS, training, folder=tmp_path)
  np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in told], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(done), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("sizes", "given", "message"), [
  ({}, {"stages": 5}, "5 stages of 4 blocks"),
  ({}, {"stages": 9}, "9 stages on 8 devices"), ({}, {"stages": 0}, "stages=0: one, or as many"),
  ({"data": 2}, {"stages": 2}, "a mesh with fsdp=1"),
  ({}, {"stages": 2, "transform": lmc.prune_gradually(0.5)}, "sees a whole tree"),
  ({}, {"stages": 2, "training": dataclasses.replace(PLAIN, privacy=Privacy(1.0), accumulate=1)}, "leave out privacy"),
])  # fmt: skip
def test_what_a_pipeline_does_not_take(sizes, given, message):
  model = MODELS["tied"]
  params = model.init(jax.random.key(0))
  params = shard(model, params, make_mesh(**sizes)) if sizes else params
  with pytest.raises(ValueError, match=message):
    fit(model, params, ROWS, **{"training": PLAIN, **given})


def test_shared_values_and_a_shallow_teacher_are_refused():
  model, teacher = MODELS["tied"], MODELS["apart"]
  params = model.init(jax.random.key(0))
  shared, _ = lmc.compress(model, params, lmc.at("layers/*", lmc.share(values=4)))
  with pytest.raises(ValueError, match="the tree has values that the whole model shares"):
    fit(model, shared, ROWS, PLAIN, stages=2)
  with pytest.raises(ValueError, match="the teacher: 4 stages of 3 blocks"):
    guide = teacher, teacher.init(jax.random.key(1))
    fit(model, params, ROWS, dataclasses.replace(PLAIN, loss=Distill()), stages=4, teacher=guide)


def test_a_stage_is_split_as_the_tree_was_and_numpy_comes_back():
  """Rules of one's own hold within stages; a tree that lies nowhere yet is trained all the same."""
  model = MODELS["tied"]
  placed = shard(model, model.init(jax.random.key(0)), make_mesh(fsdp=2, tensor=2), {"mlp": None, "embed": None})
  pipeline = Pipeline(model, placed, PLAIN, 2)
  for leaf in jax.tree.leaves(pipeline.spread(start(placed, PLAIN, lambda path: True)).trained):
    assert "tensor" not in leaf.sharding.spec and leaf.sharding.num_devices == 2
  plain = jax.tree.map(np.asarray, placed)
  done, _ = fit(model, plain, ROWS, dataclasses.replace(PLAIN, steps=1), stages=2)
  assert jax.tree.structure(done) == jax.tree.structure(plain)


def test_a_loss_that_is_not_finite_is_refused():
  model = MODELS["tied"]
  params = model.init(jax.random.key(0))
  params["layers"]["0"]["mlp"]["up"]["kernel"] = np.full((16, 32), np.nan, np.float32)
  with pytest.raises(lmc.WeightError, match="step 0: the loss is nan"):
    fit(model, params, ROWS, Training(steps=1, batch=4, accumulate=2, chunk=4), stages=2)
