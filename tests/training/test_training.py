"""The step, the loop and resuming: against PyTorch, bitwise after a cut, masks and frozen arrays left alone."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from scipy import special

from lmcompress import tree
from lmcompress.arrays import (
  FakeQuantArray,
  InputArray,
  LearnedInputArray,
  MaskedArray,
  QuantizedArray,
  StaticStep,
  SumArray,
  learned_input,
  scored,
)
from lmcompress.calibration import compress
from lmcompress.distributed import make_mesh, shard
from lmcompress.distributed.sharding import over_data
from lmcompress.io import checkpoint
from lmcompress.models import Llama, LlamaConfig, LlamaSizes
from lmcompress.training import (
  DIVERGENCES,
  Distill,
  Labels,
  Privacy,
  Training,
  batches,
  divergence,
  epsilon,
  fit,
  mean_loss,
  start,
  train_step,
)
from lmcompress.training.privacy import Poisson, clipped
from lmcompress.training.step import loss_of as training_loss
from lmcompress.transforms import (
  adapted,
  adapters,
  at,
  chain,
  dora,
  fake_quantize,
  fake_quantize_inputs,
  freeze,
  lora,
  low_rank_residual,
  magnitude,
  merge,
  movement,
  prune_gradually,
  prune_neurons,
  quantize_inputs,
  rigl,
  round_to_nearest,
  shrink,
)
from lmcompress.transforms.schedules import cubic
from lmcompress.types import Evidence, FormatError, SourceError, WeightError

SIZES = LlamaSizes(vocab=64, embed=32, mlp=64, layers=2, heads=4, kv_heads=2)
MODEL = Llama(LlamaConfig(head_dim=8), SIZES)
PARAMS = MODEL.init(jax.random.key(0))
ROWS = (np.arange(24 * 16).reshape(24, 16) * 7 % 64).astype(np.int32)
"""A text that can be learned: each token is the one before it plus 7."""
RNG = np.random.default_rng(0)
TEACHER, STUDENT = (jax.nn.log_softmax(jnp.asarray(RNG.normal(size=(5, 11)) * 2, jnp.float32)) for _ in range(2))
DELTAS = lambda path: tree.matches("**/delta", path)  # noqa: E731


def same(a, b):
  return checkpoint.tree_hash(a) == checkpoint.tree_hash(b)


def loss_of(params, rows=ROWS):
  total, count = mean_loss(MODEL, params, {"tokens": rows}, Labels())
  return float(total / count)


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


# ---------------------------------------------------------------------------------------- adapters and codes


def test_adapters_train_alone_merge_and_are_exchanged():
  """Over 4 bits: the base keeps its bits, the product learns; merged it computes the same; two share one base."""
  base, _ = compress(MODEL, PARAMS, round_to_nearest(4, 16), None, None)
  start, _ = compress(MODEL, base, lora(4), None, jax.random.key(1))
  tokens = ROWS[:2]
  np.testing.assert_allclose(MODEL.apply(start, tokens), MODEL.apply(base, tokens), atol=1e-5)
  done, history = fit(MODEL, start, ROWS, Training(20, batch=8, learning_rate=2e-2), trainable=DELTAS)
  assert history[-1]["loss"] < 0.8 * history[0]["loss"]
  for path, leaf in tree.weights(done).items():
    old = tree.get(start, path)
    if isinstance(leaf, SumArray):
      assert isinstance(leaf.base, QuantizedArray) and same({"kernel": leaf.base}, {"kernel": old.base})
    else:
      assert same({"table": leaf}, {"table": old})
  merged, _ = compress(MODEL, done, merge(), None, None)
  assert isinstance(merged["layers"]["0"]["mlp"]["up"]["kernel"], jax.Array)
  np.testing.assert_allclose(MODEL.apply(merged, tokens), MODEL.apply(done, tokens), atol=1e-4)
  mine = adapters(done)
  assert len(mine) == 14
  np.testing.assert_array_equal(MODEL.apply(adapted(base, mine), tokens), MODEL.apply(done, tokens))
  assert same(adapted(done, adapters(start)), start)  # the other user's adapters over the same base
  with pytest.raises(WeightError, match=r"adapted at layers/9/x/kernel: .* over nothing"):
    adapted(base, {"layers/9/x/kernel": mine["layers/0/mlp/up/kernel"]})


def test_what_compression_lost_is_a_start():
  """A residual of low rank trains as an adapter does, and starts nearer than none."""
  tokens = ROWS[:4]
  start, _ = compress(MODEL, PARAMS, chain(round_to_nearest(2, 16), low_rank_residual(8, "none")), tokens)
  _, history = fit(
    MODEL, start, ROWS, Training(10, batch=8, learning_rate=5e-3, loss=Distill()), trainable=DELTAS,
    teacher=(MODEL, PARAMS),
  )  # fmt: skip
  assert history[-1]["loss"] < 0.7 * history[0]["loss"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_train_and_freeze_to_the_same_outputs(symmetric):
  """LSQ: fewer bits are learned back, and the packed form computes what the training form did, within 1e-5.

  Where the rounding of an input is a tie, another order of sums may decide it otherwise, for few tokens and by a step.
  """
  recipe = chain(quantize_inputs(), fake_quantize(3, 16, symmetric))
  start, _ = compress(MODEL, PARAMS, recipe, None, None)
  leaf = start["layers"]["0"]["mlp"]["up"]["kernel"]
  assert isinstance(leaf, InputArray) and isinstance(leaf.weight, FakeQuantArray)
  training = Training(15, batch=8, learning_rate=3e-3, loss=Distill())
  done, history = fit(MODEL, start, ROWS, training, teacher=(MODEL, PARAMS))
  assert history[-1]["loss"] < 0.85 * history[0]["loss"]
  frozen, _ = compress(MODEL, done, freeze(), None, None)
  packed = frozen["layers"]["0"]["mlp"]["up"]["kernel"].weight
  assert isinstance(packed, QuantizedArray) and packed.nbits < packed.size * (3 + 2.1)
  apart = np.abs(np.asarray(MODEL.apply(frozen, ROWS[:2])) - np.asarray(MODEL.apply(done, ROWS[:2]))).max(-1)
  assert (apart < 1e-5).mean() > 0.9 and apart.max() < 0.05
  old = compress(MODEL, start, freeze(), None, None)[0]["layers"]["0"]["mlp"]["up"]["kernel"].weight
  assert not np.array_equal(old.scale, packed.scale) and not np.array_equal(old.codes.data, packed.codes.data)


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"symmetric": False, "zero": "real"}])
def test_codes_go_on_from_where_a_quantizer_left_them(options):
  """The same values to the rounding of a minimum, and the very same codes where there is none."""
  first = compress(MODEL, PARAMS, round_to_nearest(3, 16, scale_dtype="float32", **options), None, None)[0]
  start = compress(MODEL, first, fake_quantize(3, scale_dtype="float32"), None, None)[0]
  np.testing.assert_allclose(MODEL.apply(start, ROWS[:2]), MODEL.apply(first, ROWS[:2]), atol=1e-4)
  if not options:
    assert same(compress(MODEL, start, freeze(), None, None)[0], first)


def test_gradients_of_a_step_size_are_lsqs():
  """The paper's equation 3, times its gradient scale, in NumPy."""
  w = np.random.default_rng(3).normal(size=(8, 5)).astype(np.float32)
  s = np.full((2, 5), 0.4, np.float32)
  leaf = FakeQuantArray(jnp.asarray(w), jnp.asarray(s), None, 3, 4, -2, "float32", "float32")
  g = np.random.default_rng(4).normal(size=w.shape).astype(np.float32)
  found = jax.grad(lambda leaf: jnp.sum(g * leaf.materialize()))(leaf)
  v = w / np.repeat(s, 4, 0)
  inside = (v > -4) & (v < 3)
  each = np.where(inside, np.round(v) - v, np.clip(v, -4, 3)) * g / np.sqrt(4 * 3)
  np.testing.assert_allclose(found.scale, each.reshape(2, 4, 5).sum(1), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found.values, np.where(inside, g, 0), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------- the loop


def test_batches_by_position():
  source = batches(ROWS, 8, seed=3)
  epoch = np.concatenate([source[i] for i in range(3)])
  assert sorted(map(tuple, epoch)) == sorted(map(tuple, ROWS))
  np.testing.assert_array_equal(batches(ROWS, 8, seed=3)[7], source[7])
  assert not np.array_equal(batches(ROWS, 8, seed=4)[0], source[0])


CUT = """
import pickle, sys, os
sys.path.insert(0, {tests!r})
import conftest
from training.test_training import *
folder, stop = Path(sys.argv[1]), int(sys.argv[2])
def on_step(step, metrics):
  if step == stop:
    os.kill(os.getpid(), 9)
kind = KINDS[sys.argv[3]]
done, history = fit(MODEL, kind[0](), ROWS, kind[1], folder=folder, save_every=2, on_step=on_step, **kind[2])
print(checkpoint.tree_hash(done), [row["loss"] for row in history])
"""
KINDS = {
  "adapters": (
    lambda: compress(MODEL, PARAMS, chain(round_to_nearest(4, 16), lora(2)), None, jax.random.key(0))[0],
    Training(6, batch=8, learning_rate=1e-2, loss=Distill("reverse")),
    {"trainable": DELTAS, "teacher": (MODEL, PARAMS)},
  ),
  "schedule": (
    lambda: compress(MODEL, PARAMS, magnitude(0.0), None, None)[0],
    Training(6, batch=8, learning_rate=1e-2, average=0.9), {"transform": magnitude(cubic(0.75, start=0, end=4))},
  ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_anywhere_it_resumes_to_the_bit(kind, tmp_path):
  """`kill -9` after step 5 of 6, one after the last state: the tree and every loss are those of a run never cut."""
  script = CUT.format(tests=str(Path(__file__).parents[1]))

  def attempt(folder, stop):
    return subprocess.run(
      [sys.executable, "-c", script, str(folder), str(stop), kind], capture_output=True, text=True, env=os.environ
    )

  assert attempt(tmp_path / "cut", 5).returncode == -signal.SIGKILL
  resumed, straight = attempt(tmp_path / "cut", 0), attempt(tmp_path / "straight", 0)
  assert resumed.returncode == 0, resumed.stderr[-2000:]
  assert resumed.stdout == straight.stdout and resumed.stdout.strip()
  logs = [
    [json.loads(line)["loss"] for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
    for name in ("cut", "straight")
  ]
  assert logs[0] == logs[1] and len(logs[0]) == 6


def test_saved_states_are_checked(tmp_path):
  """Another run's, and a damaged one, are refused by name; nothing is overwritten."""
  training = Training(2, batch=8, learning_rate=1e-2)
  fit(MODEL, PARAMS, ROWS, training, folder=tmp_path, save_every=1)
  with pytest.raises(FormatError, match="a state of another run"):
    fit(MODEL, PARAMS, ROWS, training, seed=1, folder=tmp_path)
  files = sorted((p for p in (tmp_path / "states" / "2").rglob("*") if p.is_file()), key=lambda p: -p.stat().st_size)
  data = bytearray(files[0].read_bytes())
  data[len(data) // 2] ^= 4
  files[0].write_bytes(data)
  before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  with pytest.raises(FormatError, match="states/2"):
    fit(MODEL, PARAMS, ROWS, training, folder=tmp_path)
  assert all(p.read_bytes() == data for p, data in before.items())


def test_what_cannot_be_trained(tmp_path):
  small = Llama(LlamaConfig(head_dim=8), LlamaSizes(vocab=32, embed=32, mlp=64, layers=1, heads=4, kv_heads=2))
  ok = Training(2, batch=8)
  distilling = Training(2, batch=8, loss=Distill())
  for make, said in (
    (lambda: fit(MODEL, PARAMS, ROWS, distilling), "needs a teacher"),
    (lambda: fit(MODEL, PARAMS, ROWS, distilling, teacher=(small, small.init(jax.random.key(0)))), "32 entries"),
    (lambda: fit(MODEL, PARAMS, ROWS[:4], ok), "a batch of 8 rows"),
    (lambda: fit(MODEL, PARAMS, ROWS[:0], ok), "token ids"),
    (lambda: fit(MODEL, PARAMS, ROWS[:, :1], ok), "two or more in a row"),
    (lambda: fit(MODEL, PARAMS, ROWS + 60, ok), "tokens from 60 to 123 are outside the vocabulary of 64"),
    (lambda: fit(MODEL, PARAMS, ROWS - 1, ok), "tokens from -1"), (lambda: fit(MODEL, PARAMS, ROWS * 0.5, ok), "float"),
    (lambda: fit(MODEL, PARAMS, ROWS, ok, held_out=ROWS + 60), "held_out: tokens from 60"),
    (lambda: fit(MODEL, PARAMS, ROWS, ok, save_every=0), "save_every=0"),
    (lambda: fit(MODEL, PARAMS, ROWS, ok, trainable=DELTAS), "nothing trains"),
    (lambda: fit(MODEL, PARAMS, ROWS, ok, transform=magnitude(0.5)), "of phase 'once'"),
    (lambda: fit(MODEL, PARAMS, ROWS, ok, transform=rigl()), "the weight is dense float32; make it a mask"),
    (lambda: fit(MODEL, PARAMS, ROWS, Training(2, privacy=Privacy(1.0)), transform=rigl()), "rigl reads them"),
  ):
    with pytest.raises(ValueError, match=said):
      make()
  wild = Training(40, batch=8, learning_rate=1e30, optimizer="sgd", clip=None, schedule="constant")
  with pytest.raises(WeightError, match=r"step \d+: .* at [a-z_/0-9]+; lower the learning rate \(1e\+30\).*kept in"):
    fit(MODEL, PARAMS, ROWS, wild, folder=tmp_path)


def test_a_state_that_cannot_be_written(tmp_path, monkeypatch):
  """A full disk: the error says where and how much is free, the state before it is whole, and the run goes on."""
  import orbax.checkpoint as ocp

  training, save = Training(4, batch=8, learning_rate=1e-2), ocp.CheckpointManager.save
  straight, _ = fit(MODEL, PARAMS, ROWS, training)

  def full(self, step, **arguments):
    if step > 2:
      raise OSError(28, "No space left on device")
    return save(self, step, **arguments)

  monkeypatch.setattr(ocp.CheckpointManager, "save", full)
  with pytest.raises(SourceError, match=r"states: the state of step 3.* No space left on device\); \d+ bytes are free"):
    fit(MODEL, PARAMS, ROWS, training, folder=tmp_path, save_every=1)
  monkeypatch.undo()
  seen = []
  done, history = fit(MODEL, PARAMS, ROWS, training, folder=tmp_path, on_step=lambda step, _: seen.append(step))
  assert seen == [3, 4] and len(history) == 4 and same(done, straight)


def test_an_interrupt_keeps_what_is_done(tmp_path):
  training, seen = Training(4, batch=8, learning_rate=1e-2), []

  def interrupted(step, metrics):
    if step == 3:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    fit(MODEL, PARAMS, ROWS, training, folder=tmp_path, save_every=50, on_step=interrupted)
  done, _ = fit(MODEL, PARAMS, ROWS, training, folder=tmp_path, on_step=lambda step, _: seen.append(step))
  assert seen == [4] and same(done, fit(MODEL, PARAMS, ROWS, training)[0])


# ---------------------------------------------------------------------------------------- privacy


@pytest.mark.parametrize(("noise", "epochs", "published"), [(1.3, 15, 1.18), (1.1, 60, 3.01), (0.7, 45, 7.10)])
def test_epsilon_of_a_published_setting(noise, epochs, published):
  """TensorFlow Privacy's tutorial on MNIST: 60,000 rows, batches of 256, delta 1e-5.

  The moments by Mironov et al. 2019 (arXiv:1908.10530, equation 3) in NumPy: with the conversion of 2017 they give the
  printed epsilon, with the tighter one of 2020 (arXiv:2004.00010) the stated one; 2 %, for orders that are not whole.
  """
  steps, q = epochs * 60_000 // 256, 256 / 60_000
  old, new = np.inf, np.inf
  for order in range(2, 257):
    k = np.arange(order + 1)
    logs = special.gammaln(order + 1) - special.gammaln(k + 1) - special.gammaln(order - k + 1)
    logs += (order - k) * np.log1p(-q) + k * np.log(q) + (k * k - k) / (2 * noise**2)
    moment = steps * special.logsumexp(logs) / (order - 1)
    old = min(old, moment + np.log(1e5) / (order - 1))
    new = min(new, moment + np.log1p(-1 / order) - np.log(1e-5 * order) / (order - 1))
  stated = epsilon(Training(steps, batch=256, privacy=Privacy(noise)), 60_000)
  assert old == pytest.approx(published, rel=0.03) and stated == pytest.approx(new, rel=0.02)
  assert stated < published


@hypothesis.given(
  hypothesis.strategies.lists(
    hypothesis.strategies.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=6
  ),
  hypothesis.strategies.floats(0.01, 10),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_no_row_counts_for_more(values, most):
  """Whatever a row's gradient is, infinite or NaN too, what is added has the norm `clip` at most."""
  whole = np.asarray(values, np.float32)
  found = np.concatenate([np.ravel(x) for x in jax.tree.leaves(clipped({"a": whole, "b": whole[:1]}, most))])
  assert np.isfinite(found).all() and np.linalg.norm(found.astype(np.float64)) <= most * 1.0001


def test_a_private_update_is_clipped_rows_and_noise():
  """With hardly any noise: the sum of clipped gradients, row by row, over the mean batch; noise has its deviation."""
  training = Training(1, batch=24, learning_rate=1.0, optimizer="sgd", schedule="constant", clip=None,
                      privacy=Privacy(1e-9, clip=0.3))  # fmt: skip
  done, _ = fit(MODEL, PARAMS, ROWS, training)
  want = jax.tree.map(jnp.zeros_like, PARAMS)
  grad = jax.jit(jax.grad(lambda p, row: mean_loss(MODEL, p, {"tokens": row}, Labels())[0] / 15))
  for row in ROWS:
    g = grad(PARAMS, row[None])
    want = jax.tree.map(lambda a, b: a + b * min(1.0, 0.3 / float(optax.global_norm(g))) / 24, want, g)  # noqa: B023
  for a, b, c in zip(*map(jax.tree.leaves, (PARAMS, done, want)), strict=True):
    np.testing.assert_allclose(a - b, c, atol=2e-5)
  noisy, _ = fit(MODEL, PARAMS, ROWS, dataclasses.replace(training, privacy=Privacy(5.0, clip=0.3)))
  drawn = np.concatenate([np.ravel((a - b) * 24) for a, b in zip(*map(jax.tree.leaves, (done, noisy)), strict=True)])
  assert np.std(drawn) == pytest.approx(1.5, rel=0.05)


def test_rows_are_drawn_one_by_one():
  source = Poisson(ROWS, 6, seed=0)
  sizes = [len(source[i]) for i in range(400)]
  assert np.mean(sizes) == pytest.approx(6, rel=0.1) and np.var(sizes) == pytest.approx(6 * 0.75, rel=0.25)
  np.testing.assert_array_equal(Poisson(ROWS, 6, seed=0)[7], source[7])
  with pytest.raises(ValueError, match="take fewer"):
    Poisson(ROWS, 25, seed=0)
  with pytest.raises(ValueError, match="no privacy"):
    epsilon(Training(2), 24)


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


@pytest.mark.parametrize(("recipe", "said"), [
  (lora(33), "full rank is"), (chain(lora(2), lora(2)), "of rank 2 already"), (fake_quantize(4, 24), "not a multiple"),
  (chain(round_to_nearest(4, 16), fake_quantize(3)), "the weight is int4 g16; give the bits"),
  (chain(round_to_nearest(grid="nf4", group_size=16), fake_quantize(4)), "the weight is nf4"),
  (chain(magnitude(0.5), fake_quantize(4, 16)), "freeze it first"),
  (chain(round_to_nearest(4, 16), movement()), "already stored as int4"),
])  # fmt: skip
def test_weights_that_do_not_fit(recipe, said):
  with pytest.raises(WeightError, match=said):
    compress(MODEL, PARAMS, recipe, None, jax.random.key(0))


def test_the_step_of_inputs_has_the_gradient_of_its_paper():
  """LSQ, equation 3 with its gradient scale, in NumPy; the input's own passes inside the range and not outside it."""
  x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
  leaf = learned_input(jnp.eye(6), 0.3, 3, -2)
  g = np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)
  dx, ds = jax.grad(lambda x, step: jnp.sum(g * dataclasses.replace(leaf, step=step).rounded(x)), (0, 1))(x, leaf.step)
  units = x / 0.3
  inside = np.abs(units) <= 3
  np.testing.assert_allclose(dx, g * inside, atol=1e-6)
  slope = np.where(inside, np.round(units) - units, np.sign(units) * 3)
  np.testing.assert_allclose(ds[0, 0], np.sum(g * slope) / np.sqrt(30 * 3), rtol=1e-4)


def test_inputs_learn_their_range_and_are_fixed():
  """Four bits of inputs and weights: training wins back, and the frozen model says what the trained one said."""
  both = chain(fake_quantize_inputs(4, percentile=100.0), fake_quantize(4, 16))
  ready = compress(MODEL, PARAMS, both, ROWS, jax.random.key(0))[0]
  leaf = ready["layers"]["1"]["mlp"]["up"]["kernel"]
  assert isinstance(leaf, LearnedInputArray) and isinstance(leaf.weight, FakeQuantArray)
  training = Training(steps=30, batch=8, learning_rate=1e-2, chunk=16, loss=Distill())
  trains = functools.partial(tree.matches, "layers/*")
  done, history = fit(MODEL, ready, ROWS, training, trainable=trains, teacher=(MODEL, PARAMS))
  assert history[-1]["loss"] < 0.7 * history[0]["loss"]
  after = done["layers"]["1"]["mlp"]["up"]["kernel"]
  assert float(after.step[0, 0]) != float(leaf.step[0, 0])
  small = compress(MODEL, done, freeze())[0]
  kept = small["layers"]["1"]["mlp"]["up"]["kernel"]
  assert isinstance(kept, InputArray) and kept.act == StaticStep(float(after.step[0, 0]), 4)
  assert isinstance(kept.weight, QuantizedArray) and kept.weight.codes.bits == 4
  np.testing.assert_allclose(MODEL.apply(small, ROWS[:2]), MODEL.apply(done, ROWS[:2]), atol=2e-4)
  with pytest.raises(WeightError, match="already rounded"):
    compress(MODEL, ready, fake_quantize_inputs(8), ROWS)
  with pytest.raises(ValueError, match="from 2 to 8"):
    fake_quantize_inputs(9)


def test_lengths_learn_apart_from_directions():
  """DoRA over four bits: nothing changes before it learns; codes stay; freeze keeps the codes and the outputs."""
  base = compress(MODEL, PARAMS, round_to_nearest(4, 16))[0]
  ready = compress(MODEL, base, dora(2), key=jax.random.key(1))[0]
  np.testing.assert_allclose(MODEL.apply(ready, ROWS[:2]), MODEL.apply(base, ROWS[:2]), atol=1e-4)
  trains = lambda path: tree.matches("**/delta", path) or tree.matches("**/magnitude", path)  # noqa: E731
  done, history = fit(MODEL, ready, ROWS, Training(steps=30, batch=8, learning_rate=1e-2, chunk=16), trainable=trains)
  assert history[-1]["loss"] < history[0]["loss"] - 0.5
  leaf, before = (p["layers"]["0"]["mlp"]["up"]["kernel"] for p in (done, ready))
  np.testing.assert_array_equal(leaf.weight.base.codes.data, before.weight.base.codes.data)
  assert not np.allclose(leaf.magnitude, before.magnitude)
  v = np.asarray(leaf.weight.materialize(), np.float64)
  want = np.asarray(leaf.magnitude) * v / np.linalg.norm(v, axis=0)
  np.testing.assert_allclose(leaf.materialize(), want, atol=1e-5)
  small = compress(MODEL, done, freeze())[0]
  kept = small["layers"]["0"]["mlp"]["up"]["kernel"]
  assert isinstance(kept, SumArray) and isinstance(kept.base, QuantizedArray) and kept.base.codes.bits == 4
  said = MODEL.apply(done, ROWS[:2])
  np.testing.assert_allclose(MODEL.apply(small, ROWS[:2]), said, atol=2e-4)
  np.testing.assert_allclose(MODEL.apply(compress(MODEL, done, merge())[0], ROWS[:2]), said, atol=2e-4)
  doubly = compress(MODEL, PARAMS, chain(round_to_nearest(4, 16, scale_bits=8), dora(2)), key=jax.random.key(1))[0]
  with pytest.raises(WeightError, match="merge"):
    compress(MODEL, doubly, freeze())


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
