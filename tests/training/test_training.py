"""Losses and the step: against PyTorch, masks and frozen arrays left alone, over a mesh as on one device."""

from __future__ import annotations

import dataclasses
import functools
import shutil

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from small_training import MODEL, PARAMS, ROWS, loss_of, same

from lmcompress import tree
from lmcompress.arrays import (
  MaskedArray,
  scored,
)
from lmcompress.calibration import compress
from lmcompress.distributed import make_mesh, shard
from lmcompress.distributed.sharding import over_data
from lmcompress.models import Llama, LlamaConfig, LlamaSizes
from lmcompress.training import (
  DIVERGENCES,
  Distill,
  Labels,
  Privacy,
  Training,
  batches,
  divergence,
  fit,
  mean_loss,
  start,
  train_step,
)
from lmcompress.training.step import loss_of as training_loss
from lmcompress.transforms import (
  at,
  fake_quantize,
  freeze,
  lora,
  magnitude,
  movement,
  prune_gradually,
  prune_neurons,
  rigl,
  shrink,
)
from lmcompress.transforms.schedules import cubic
from lmcompress.types import Evidence

RNG = np.random.default_rng(0)
TEACHER, STUDENT = (jax.nn.log_softmax(jnp.asarray(RNG.normal(size=(5, 11)) * 2, jnp.float32)) for _ in range(2))

# ---------------------------------------------------------------------------------------- losses


def test_divergences_are_torchs():
  """Each formula with torch's own `kl_div` in float64."""
  p, q = (torch.tensor(np.asarray(x), dtype=torch.float64) for x in (TEACHER, STUDENT))
  kl = lambda a, b: torch.nn.functional.kl_div(b, a, log_target=True, reduction="none").sum(-1)  # noqa: E731
  mixed = lambda a, b, w: torch.log(w * a.exp() + (1 - w) * b.exp())  # noqa: E731
  m = mixed(p, q, 0.3)
  want = {
    "forward": kl(p, q), "reverse": kl(q, p), "skewed": kl(p, m), "skewed_reverse": kl(q, mixed(q, p, 0.3)),
    "jensen_shannon": 0.3 * kl(p, m) + 0.7 * kl(q, m),
  }  # fmt: skip
  assert set(want) == set(DIVERGENCES)
  for kind, value in want.items():
    np.testing.assert_allclose(divergence(TEACHER, STUDENT, kind, 0.3), value, rtol=1e-5, atol=1e-6)
    assert float(jnp.max(jnp.abs(divergence(TEACHER, TEACHER, kind, 0.3)))) < 1e-6


def test_a_distillation_is_its_parts():
  targets = jnp.arange(5)
  both = Distill("reverse", temperature=2.0, labels=0.25)(STUDENT, targets, TEACHER)
  softened = [jax.nn.log_softmax(x / 2) for x in (TEACHER, STUDENT)]
  want = 0.75 * 4 * divergence(*softened, "reverse") + 0.25 * Labels()(STUDENT, targets)
  np.testing.assert_allclose(both, want, rtol=1e-6)
  np.testing.assert_allclose(
    Labels()(STUDENT, targets),
    torch.nn.functional.cross_entropy(
      torch.tensor(np.asarray(STUDENT)), torch.arange(5), reduction="none"
    ),
    rtol=1e-6,
  )  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 4, 6, 15, 64])
def test_runs_of_tokens_add_up_to_the_whole(chunk):
  """Padding counts nothing; values and gradients equal those of all logits at once."""
  rows, mask = ROWS[:3], np.ones((3, 16), np.int32)
  mask[1, 10:], mask[2, :4] = 0, 0

  def whole(params):
    said = jax.nn.log_softmax(MODEL.apply(params, rows, attention_mask=mask), axis=-1)
    each = -jnp.take_along_axis(said[:, :-1], rows[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(each * (mask[:, 1:] * mask[:, :-1]))

  def in_runs(params):
    return mean_loss(MODEL, params, {"tokens": rows, "attention_mask": mask}, Labels(), chunk=chunk)

  (total, count), grads = jax.value_and_grad(in_runs, has_aux=True)(PARAMS)
  want, wanted = jax.value_and_grad(whole)(PARAMS)
  assert int(count) == 15 + 9 + 11
  assert float(total) == pytest.approx(float(want), rel=1e-5)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_no_array_is_as_large_as_all_logits():
  """Of a vocabulary of 4,096 the compiled step's temporaries stay under the logits of the batch."""
  model = Llama(LlamaConfig(head_dim=8), LlamaSizes(vocab=4096, embed=16, mlp=16, layers=1, heads=2, kv_heads=1))
  params, rows = model.init(jax.random.key(0)), np.zeros((4, 128), np.int32)

  def lost(params, chunk):
    return mean_loss(model, params, {"tokens": rows}, Distill(), (model, params), chunk=chunk)[0]

  used = [
    jax.jit(jax.grad(lost), static_argnums=1).lower(params, chunk).compile().memory_analysis().temp_size_in_bytes
    for chunk in (8, 128)
  ]
  logits = 4 * 128 * 4096 * 4
  assert used[0] < logits < used[1]


# ---------------------------------------------------------------------------------------- the step


def test_updates_are_torchs():
  """AdamW with clipping on the same gradients: the weights after three steps agree to 1e-5."""
  training = Training(3, batch=4, learning_rate=1e-2, schedule="linear", weight_decay=0.1, clip=0.5)
  trained, history = fit(MODEL, PARAMS, ROWS[:4], training)
  leaves, treedef = jax.tree.flatten(PARAMS)
  weights = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in leaves]
  groups = [{"params": [w for w in weights if w.ndim > 1], "weight_decay": 0.1},
            {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0}]
  optimizer = torch.optim.AdamW(groups, lr=1e-2)
  for step in range(3):
    now = treedef.unflatten([jnp.asarray(w.detach().numpy()) for w in weights])
    loss, grads = jax.value_and_grad(lambda p: mean_loss(MODEL, p, {"tokens": ROWS[:4]}, Labels())[0] / 60)(now)
    assert history[step]["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert history[step]["grad_norm"] == pytest.approx(float(optax.global_norm(grads)), rel=1e-4)
    for w, g in zip(weights, jax.tree.leaves(grads), strict=True):
      w.grad = torch.tensor(np.asarray(g))
    torch.nn.utils.clip_grad_norm_(weights, 0.5)
    for group in optimizer.param_groups:
      group["lr"] = history[step]["learning_rate"]
    optimizer.step()
  for a, w in zip(jax.tree.leaves(trained), weights, strict=True):
    np.testing.assert_allclose(a, w.detach().numpy(), atol=1e-5)


def test_it_learns_and_pieces_are_the_batch():
  """The loss falls; a batch in pieces gives the same updates, to rounding."""
  whole, history = fit(MODEL, PARAMS, ROWS, Training(20, batch=8, learning_rate=1e-2))
  assert history[-1]["loss"] < 0.5 * history[0]["loss"] and loss_of(whole) < 0.5 * loss_of(PARAMS)
  _, other = fit(MODEL, PARAMS, ROWS, Training(20, batch=8, learning_rate=1e-2, accumulate=4))
  assert other[-1]["loss"] == pytest.approx(history[-1]["loss"], rel=1e-2)
  assert loss_of(PARAMS) == pytest.approx(history[0]["loss"], rel=0.05)  # what was given is left alone


def test_rates():
  rates = [float(Training(10, learning_rate=1.0, warmup=4, schedule="linear").rate(i)) for i in range(10)]
  np.testing.assert_allclose(rates, [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6], atol=1e-6)
  cosine = [float(Training(8, learning_rate=1.0).rate(i)) for i in range(8)]
  np.testing.assert_allclose(cosine, [(1 + np.cos(np.pi * i / 8)) / 2 for i in range(8)], atol=1e-6)


def test_held_out_rows_are_scored_on_the_way():
  """Every third step and at the last; the last score is of the tree that comes back, whatever the loss."""
  training = Training(7, batch=8, learning_rate=1e-2, loss=Distill())
  done, history = fit(
    MODEL, PARAMS, ROWS[:16], training, teacher=(MODEL, PARAMS), held_out=ROWS[16:], evaluate_every=3,
  )  # fmt: skip
  assert [i for i, row in enumerate(history, 1) if "held_out" in row] == [3, 6, 7]
  assert history[-1]["held_out"] == pytest.approx(loss_of(done, ROWS[16:]), rel=1e-5)


def test_the_average_and_bfloat16():
  kept, _ = fit(MODEL, PARAMS, ROWS, Training(1, batch=8, learning_rate=1e-2, schedule="constant", average=0.75))
  last, _ = fit(MODEL, PARAMS, ROWS, Training(1, batch=8, learning_rate=1e-2, schedule="constant"))
  for a, b, c in zip(*map(jax.tree.leaves, (kept, last, PARAMS)), strict=True):
    np.testing.assert_allclose(a, 0.75 * np.asarray(c) + 0.25 * np.asarray(b), atol=1e-6)
  half, history = fit(MODEL, PARAMS, ROWS, Training(5, batch=8, learning_rate=1e-2, compute="bfloat16"))
  assert history[-1]["loss"] < history[0]["loss"] and half["final_norm"]["scale"].dtype == jnp.float32


def products(jaxpr):
  """Dtypes of the operands of every product of a program."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      yield tuple(str(operand.aval.dtype) for operand in equation.invars)
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from products(inner)


@pytest.mark.parametrize(("link", "where"), [
  (None, "layers/*"), (fake_quantize(3, 16), "layers/*"), (fake_quantize(3, 16), "embed"),
], ids=["dense", "codes", "codes of the embedding"])  # fmt: skip
def test_bfloat16_means_every_product_and_gradients_stay_close(link, where):
  """Forward, back and in the teacher; against the gradients of float32, entries of a weight together."""
  params = PARAMS if link is None else compress(MODEL, PARAMS, at(where, link), None, None)[0]
  trained, kept = tree.partition(params, lambda path: tree.matches(where, path))
  found = {}
  for dtype in ("float32", "bfloat16"):
    settings = Training(2, batch=8, loss=Distill(labels=0.5), compute=dtype, chunk=8)
    lost = functools.partial(training_loss, MODEL, kept, settings, (MODEL, PARAMS), rows={"tokens": ROWS[:8]})
    program = jax.grad(lambda x, lost=lost: lost(trained=x)[0])
    found[dtype] = program(trained)
    assert set(products(jax.make_jaxpr(program)(trained).jaxpr)) == {(dtype, dtype)}
  for a, b in zip(*map(jax.tree.leaves, found.values()), strict=True):
    assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(a) + 1e-6


def test_masks_hold_and_a_schedule_moves_them():
  """Zeros stay zeros after every step; with a schedule sparsity is at its end what it says."""
  pruned, _ = compress(MODEL, PARAMS, magnitude(0.5), None, None)
  done, _ = fit(MODEL, pruned, ROWS, Training(4, batch=8, learning_rate=1e-2, weight_decay=0.1))
  for path, leaf in tree.weights(done).items():
    if isinstance(leaf, MaskedArray):
      was = np.asarray(tree.get(pruned, path).materialize())
      now = np.asarray(leaf.materialize())
      assert (now[was == 0] == 0).all() and (now[was != 0] != was[was != 0]).all()
  start = compress(MODEL, PARAMS, magnitude(0.0), None, None)[0]
  ramp = magnitude(cubic(0.75, start=0, end=4))
  done, _ = fit(MODEL, start, ROWS, Training(6, batch=8, learning_rate=1e-3), transform=ramp)
  frozen = compress(MODEL, done, freeze(), None, None)[0]
  down = np.asarray(frozen["layers"]["0"]["mlp"]["down"]["kernel"])
  assert np.mean(down == 0) == 0.75


@pytest.mark.parametrize("form", [movement, lambda: magnitude(0.0)], ids=["movement", "magnitude"])
def test_pruning_gradually(form):
  """Sparsity follows the cubic schedule to its end, to the entry; freezing changes nothing; the rest learns."""
  start, _ = compress(MODEL, PARAMS, form(), None, None)
  seen = []
  training = Training(9, batch=8, learning_rate=1e-2, schedule="constant")
  plan = prune_gradually(0.75, start=0, end=6, interval=2)
  done, history = fit(
    MODEL, start, ROWS, training, transform=plan, trainable=lambda path: path.startswith("layers"),
    on_step=lambda step, metrics: seen.append(metrics["loss"]),
  )  # fmt: skip
  frozen, _ = compress(MODEL, done, freeze(), None, None)
  for path, leaf in tree.weights(frozen).items():
    if path.startswith("layers"):
      assert isinstance(leaf, jax.Array) and float(jnp.mean(leaf == 0)) == pytest.approx(0.75, abs=1 / leaf.size)
  np.testing.assert_allclose(MODEL.apply(frozen, ROWS[:2]), MODEL.apply(done, ROWS[:2]), atol=1e-5)
  assert seen == [row["loss"] for row in history] and seen[-1] < seen[0]


def test_rigl_moves_masks_to_where_gradients_are():
  """Sparsity stays to the entry; at a change the smallest go and the largest gradients come, from 0; then no more."""
  start, _ = compress(MODEL, PARAMS, magnitude(0.75), None, None)
  kernel = lambda params: params["layers"]["0"]["mlp"]["up"]["kernel"]  # noqa: E731
  kept = lambda params: np.asarray(kernel(params).mask.unpack() != 0)  # noqa: E731
  training = Training(9, batch=8, learning_rate=1e-2, schedule="constant")
  states = {}
  for steps in (2, 3, 9):
    cut = dataclasses.replace(training, steps=steps)
    states[steps], history = fit(MODEL, start, ROWS, cut, transform=rigl(0.4, end=6, interval=2))
    assert kept(states[steps]).sum() == kept(start).sum() == kernel(start).size // 4
  assert (kept(states[2]) == kept(start)).all()  # the first change comes after step 2
  before, after = states[2], states[3]
  count = (kept(before) & ~kept(after)).sum()
  most = round(0.2 * (1 + np.cos(np.pi * 2 / 6)) * kept(before).sum())
  assert 0 < count <= most
  grown = kept(after) & ~kept(before)
  assert not np.asarray(kernel(after).values)[grown].any()  # they start at 0, and learn from the next step on
  rows = batches(ROWS, 8, 0)[2]
  dense = compress(MODEL, before, freeze(), None, None)[0]
  grads = jax.grad(lambda p: mean_loss(MODEL, p, {"tokens": rows}, Labels())[0])(dense)
  size = np.abs(np.asarray(kernel(grads)))
  assert size[grown].min() >= np.quantile(size[~kept(after) & ~kept(before)], 0.99)
  assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize("group", ["entry", "input", "output"])
def test_weights_shrink_to_zero_as_the_proximal_step_says(group):
  """One step in NumPy float64; over many of them of a loss with an optimum of its own, exact zeros stay."""
  w = np.random.default_rng(0).normal(size=(6, 5)) * 0.1
  found, _ = shrink(0.05, group).apply({"up": {"kernel": jnp.asarray(w, jnp.float32)}}, (), Evidence(step=jnp.int32(0)))
  if group == "entry":
    want = np.sign(w) * np.maximum(np.abs(w) - 0.05, 0)
  else:
    axis = 1 if group == "input" else 0
    norm = np.linalg.norm(w, axis=axis, keepdims=True)
    want = w * np.maximum(1 - 0.05 * np.sqrt(w.shape[axis]) / norm, 0)
  np.testing.assert_allclose(found["up"]["kernel"], want, atol=1e-7)


def test_training_with_shrinking_leaves_neurons_that_pruning_removes_for_nothing():
  training = Training(steps=40, batch=8, learning_rate=3e-3, chunk=16)
  less = at("layers/*/mlp/down", shrink(4e-3, "input"))
  done, history = fit(MODEL, PARAMS, ROWS, training, transform=less)
  dead = [
    int(np.sum(~np.any(np.asarray(layer["mlp"]["down"]["kernel"]), axis=1))) for layer in done["layers"].values()
  ]
  assert history[-1]["loss"] < history[0]["loss"] - 1 and min(dead) >= 2
  smaller = compress(MODEL, done, prune_neurons(count=min(dead), compensate=False), ROWS)[0]
  assert smaller["layers"]["0"]["mlp"]["down"]["kernel"].shape == (64 - min(dead), 32)
  np.testing.assert_allclose(MODEL.apply(smaller, ROWS[:2]), MODEL.apply(done, ROWS[:2]), atol=1e-4)


def test_scores_follow_the_movement():
  """The paper's equation: a score learns the gradient times the weight, kept or not; a weight only if kept."""
  rng = np.random.default_rng(5)
  w, s, g = (rng.normal(size=(6, 4)).astype(np.float32) for _ in range(3))
  leaf = dataclasses.replace(scored(jnp.asarray(w), jnp.asarray(s), -2), threshold=jnp.zeros((1, 1)))
  found = jax.grad(lambda leaf: jnp.sum(g * leaf.materialize()))(leaf)
  np.testing.assert_allclose(found.scores, g * w, rtol=1e-6)
  np.testing.assert_allclose(found.values, np.where(s >= 0, g, 0), rtol=1e-6)

@pytest.mark.parametrize("arguments", [
  {"steps": 0}, {"batch": 0}, {"batch": 4, "accumulate": 3}, {"learning_rate": 0.0}, {"learning_rate": float("nan")},
  {"warmup": 2}, {"clip": 0.0}, {"average": 1.0}, {"weight_decay": -1.0}, {"chunk": 0},
])  # fmt: skip
def test_arguments_out_of_range(arguments):
  with pytest.raises(ValueError, match="Training"):
    Training(**{"steps": 2, **arguments})


@pytest.mark.parametrize(("make", "said"), [
  (lambda: Privacy(0.0), "noise, clip above 0"), (lambda: Privacy(1.0, delta=1.0), "delta between"),
  (lambda: Training(2, accumulate=2, privacy=Privacy(1.0)), "leave accumulate at 1"),
  (lambda: lora(0), "a rank from 1"), (lambda: fake_quantize(1), "2 to 8"), (lambda: fake_quantize(4, 1), "groups"),
  (lambda: prune_gradually(1.0), "between 0 and 1"), (lambda: prune_gradually(0.5, 5, 5), "start < end"),
  (lambda: rigl(0.0), "above 0 to 1"), (lambda: prune_gradually(0.5, interval=0), "interval from 1"),
  (lambda: Distill("sideways"), "kind is one of"),
  (lambda: Distill(temperature=0.0), "temperature above 0"),
  (lambda: Distill(mix=1.0), "mix between"), (lambda: Distill(labels=2.0), "labels from 0"),
])  # fmt: skip
def test_methods_out_of_range(make, said):
  with pytest.raises(ValueError, match=said):
    make()

# ---------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize(("data", "tensor"), [(4, 2), (8, 1), (1, 2)])
def test_training_over_a_mesh_is_training(data, tensor, tmp_path):
  """Losses and weights of the run on one device, to rounding; parameters and moments stay split; a cut run goes on."""
  training = Training(steps=5, batch=8, optimizer="sgd", learning_rate=0.3, loss=Distill(labels=0.5), chunk=16)
  alone, want = fit(MODEL, PARAMS, ROWS, training, teacher=(MODEL, PARAMS), trainable=lambda path: "mlp" in path)
  mesh = make_mesh(data, tensor)
  spread = shard(MODEL, PARAMS, mesh)

  def trained(**over):
    given = {"teacher": (MODEL, spread), "trainable": lambda path: "mlp" in path, **over}
    return fit(MODEL, spread, ROWS, training, **given)

  done, found = trained()
  np.testing.assert_allclose([row["loss"] for row in found], [row["loss"] for row in want], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(done), jax.tree.leaves(alone), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
  kernel = done["layers"]["0"]["mlp"]["up"]["kernel"]
  assert kernel.sharding.mesh.shape == mesh.shape and kernel.addressable_shards[0].data.shape == (32, 64 // tensor)

  def stop(step, metrics):
    if step == 3:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    trained(folder=tmp_path, on_step=stop)
  again, _ = trained(folder=tmp_path)
  assert same(again, done)
  states = tmp_path / "states"
  for step in states.iterdir():  # the last state of the cut run is of step 3
    if step.name == "5":
      shutil.rmtree(step)
  here, _ = fit(
    MODEL, PARAMS, ROWS, training, teacher=(MODEL, PARAMS), trainable=lambda path: "mlp" in path, folder=tmp_path
  )
  for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(alone), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_mesh_splits_the_rows_and_the_moments():
  """The compiled step holds an all-reduce over data, and each device the moments of its part alone."""
  mesh = make_mesh(4, 2)
  spread = shard(MODEL, PARAMS, mesh)
  state = start(spread, Training(steps=1, batch=8), lambda path: True)
  moments = [x for x in jax.tree.leaves(state.moments) if x.shape == (32, 64)]
  assert moments and {x.addressable_shards[0].data.shape for x in moments} == {(32, 32)}
  rows = over_data(mesh, {"tokens": jnp.asarray(ROWS[:8])[None]}, 8, axis=1)
  assert rows["tokens"].addressable_shards[0].data.shape == (1, 2, 16)
  args = (state._replace(kept=None), state.kept, rows, Training(steps=1, batch=8))
  text = train_step.lower(MODEL, *args, None, None, None, jax.random.key(0)).compile().as_text()
  assert "all-reduce" in text
