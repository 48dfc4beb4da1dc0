"""Many tasks on one trunk: the weights of each paper in NumPy, heads that learn, a trunk that is compressed once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress import tree
from lmcompress.calibration import compress
from lmcompress.distributed import make_mesh, shard
from lmcompress.io import checkpoint
from lmcompress.models import Bert, BertConfig, BertSizes, Llama, LlamaConfig, LlamaSizes
from lmcompress.training import Distill, Match, Privacy, Task, Training, Weighting, fit_tasks, probabilities
from lmcompress.training.tasks import agreed, balanced, shares, tasks_step, with_heads
from lmcompress.transforms import at, round_to_nearest

MODEL = Llama(LlamaConfig(head_dim=8), LlamaSizes(vocab=32, embed=32, mlp=64, layers=2, heads=4, kv_heads=2))
PARAMS = MODEL.init(jax.random.key(0))
RNG = np.random.default_rng(0)
SHORT = Training(steps=4, batch=12, learning_rate=5e-3, schedule="constant")


def which(n, classes, offset):
  """Rows of noise of different lengths in which one token of a few says the class."""
  tokens = RNG.integers(16, 32, (n, 12)).astype(np.int32)
  labels = RNG.integers(0, classes, n)
  mask = (np.arange(12)[None] < RNG.integers(6, 13, n)[:, None]).astype(np.int32)
  tokens[np.arange(n), RNG.integers(0, 6, n)] = labels + offset
  return Task(tokens * mask, mask, labels, tuple(f"class {i}" for i in range(classes)))


TASKS = {"four": which(96, 4, 0), "two": which(48, 2, 8), "three": which(48, 3, 12)}


def gradients(params, rows):
  """Each task's loss and flat gradients of trunk and head, by its own path: all logits, no remat."""

  def lost(trained, name):
    carry = MODEL.start(trained, rows[name])
    for block in MODEL.blocks(trained):
      carry, _ = MODEL.run(block, trained, carry)
    last = np.asarray(rows[name]["attention_mask"]).sum(1) - 1
    read = MODEL.features(trained, carry)[np.arange(len(last)), last]
    said = jax.nn.log_softmax(read @ trained["tasks"][name]["kernel"] + trained["tasks"][name]["bias"])
    return -jnp.mean(said[np.arange(len(last)), rows[name]["labels"]])

  found = {}
  for name in sorted(rows):
    loss, g = jax.value_and_grad(lost)(params, name)
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves({k: v for k, v in g.items() if k != "tasks"})])
    found[name] = float(loss), flat.astype(np.float64), g["tasks"][name]
  return found


def test_a_head_reads_the_mean_of_an_encoder():
  model = Bert(BertConfig(head_dim=8, max_length=16), BertSizes(vocab=32, embed=32, mlp=32, layers=1, heads=4))
  params = with_heads(model, model.init(jax.random.key(0)), TASKS, jax.random.key(1))
  said, task = probabilities(model, params, "four", TASKS["four"]), TASKS["four"]
  for row in (0, 1):
    n = task.mask[row].sum()
    carry = model.start(params, task.tokens[row : row + 1, :n])
    for block in model.blocks(params):
      carry, _ = model.run(block, params, carry)
    head, mean = params["tasks"]["four"], model.features(params, carry)[0].mean(0)
    np.testing.assert_allclose(said[row], jax.nn.softmax(mean @ head["kernel"] + head["bias"]), atol=1e-5)


def test_an_encoder_learns_a_task():
  model = Bert(BertConfig(head_dim=8, max_length=16), BertSizes(vocab=32, embed=32, mlp=32, layers=1, heads=4))
  training = Training(steps=60, batch=32, learning_rate=1e-2, schedule="constant")
  tree_, _ = fit_tasks(model, model.init(jax.random.key(0)), {"two": TASKS["two"]}, training, seed=0)
  said = probabilities(model, tree_, "two", TASKS["two"]).argmax(1)
  assert np.mean(said == TASKS["two"].labels) > 0.9


def one_step(weighting):
  """Metrics of a step with plain gradient descent, and by how much the trunk and the heads moved."""
  training = Training(steps=4, batch=12, optimizer="sgd", learning_rate=0.1, schedule="constant", clip=None)
  params = with_heads(MODEL, PARAMS, TASKS, jax.random.key(1))
  rows = {
    name: {"tokens": t.tokens[:4], "attention_mask": t.mask[:4], "labels": t.labels[:4]} for name, t in TASKS.items()
  }
  from lmcompress.training.step import start

  state = start(params, training, lambda path: True)
  ones = jnp.ones(3)
  state = state._replace(links={"transform": (), "weights": ones, "first": jnp.copy(ones)})
  moving, kept = state._replace(kept=None), state.kept
  before = jax.tree.map(np.array, state.trained)
  new, metrics = tasks_step(MODEL, moving, kept, rows, training, weighting, None, jax.random.key(0))
  moved = jax.tree.map(lambda a, b: (np.asarray(a, np.float64) - b) / 0.1, before, jax.tree.map(np.array, new.trained))
  flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves({k: v for k, v in moved.items() if k != "tasks"})])
  return metrics, flat, moved["tasks"], gradients(params, rows)


def test_fixed_weights_are_the_mean_over_rows():
  metrics, trunk, heads, found = one_step(Weighting())
  np.testing.assert_allclose(trunk, sum(g for _, g, _ in found.values()) / 3, atol=2e-5)
  for name, (loss, _, head) in found.items():
    assert float(metrics[f"loss/{name}"]) == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(heads[name]["kernel"], np.asarray(head["kernel"]) / 3, atol=2e-5)


def test_surgery_takes_out_what_points_against():
  """PCGrad as the paper writes it, on the vectors themselves, three that conflict."""
  vectors = np.random.default_rng(3).normal(size=(3, 50)) + np.array([[3.0], [-3.0], [0.5]])
  weights, key = np.array([1.0, 0.5, 2.0]), jax.random.key(4)
  mix = agreed(jnp.asarray(vectors @ vectors.T, jnp.float32), jnp.asarray(weights, jnp.float32), key)
  own = vectors * weights[:, None]
  total = np.zeros(50)
  for i in range(3):
    g = own[i].copy()
    for j in np.asarray(jax.random.permutation(jax.random.fold_in(key, i), 3)):
      if j != i and g @ own[j] < 0:
        g -= (g @ own[j]) / (own[j] @ own[j]) * own[j]
    total += g
  np.testing.assert_allclose(np.asarray(mix) @ vectors, total, atol=1e-4)
  alike = np.abs(np.random.default_rng(5).normal(size=(3, 50)))
  np.testing.assert_allclose(agreed(jnp.asarray(alike @ alike.T), jnp.asarray(weights), key), weights, rtol=1e-6)


def test_surgery_moves_the_trunk_and_leaves_the_heads():
  _, trunk, heads, found = one_step(Weighting(surgery=True))
  vectors = np.stack([g for _, g, _ in found.values()])
  key = jax.random.key(0)
  mix = agreed(jnp.asarray(vectors @ vectors.T, jnp.float32), jnp.ones(3) / 3, key)
  np.testing.assert_allclose(trunk, np.asarray(mix) @ vectors, atol=5e-5)
  for name, (_, _, head) in found.items():
    np.testing.assert_allclose(heads[name]["kernel"], np.asarray(head["kernel"]) / 3, atol=2e-5)


def test_uncertainty_descends_on_its_own_formula():
  """d/ds of exp(-s) L + s / 2 at s = 0 is 1/2 - L; the trunk's weights are 1."""
  params = with_heads(MODEL, PARAMS, TASKS, jax.random.key(1))
  training = dataclasses.replace(SHORT, steps=1, optimizer="sgd", learning_rate=0.1, clip=None)
  seen = []
  fit_tasks(MODEL, params, TASKS, dataclasses.replace(training, steps=3), Weighting("uncertainty"),
            on_step=lambda step, metrics: seen.append(metrics))  # fmt: skip
  for name in TASKS:
    assert seen[0][f"weight/{name}"] == 1.0
    assert seen[1][f"weight/{name}"] == pytest.approx(np.exp(-0.1 * (seen[0][f"loss/{name}"] - 0.5)), rel=1e-5)


def test_gradnorm_evens_gradients_out():
  """A task whose gradient is too large for its pace weighs less; weights add up to their number; the aim is a rest."""
  weights, norms = jnp.ones(3), jnp.asarray([4.0, 1.0, 1.0])
  for _ in range(400):
    weights = balanced(weights, jnp.ones(3), norms, alpha=1.5, rate=0.01)
    assert float(jnp.sum(weights)) == pytest.approx(3, rel=1e-5)
  size = np.asarray(weights * norms)
  assert size.max() / size.min() < 1.15
  slow = balanced(jnp.ones(3), jnp.asarray([1.0, 1.0, 0.2]), jnp.ones(3), 1.5, 0.025)
  assert slow[0] == slow[1] > slow[2]


@pytest.mark.parametrize("weighting", [Weighting(), Weighting("uncertainty", surgery=True), Weighting("gradnorm")])
def test_all_tasks_are_learned_and_resume_to_the_bit(weighting, tmp_path):
  training = dataclasses.replace(SHORT, steps=60)
  done, history = fit_tasks(MODEL, PARAMS, TASKS, training, weighting, held_out=TASKS, evaluate_every=60)
  assert sorted(done) == ["embed", "final_norm", "layers", "tasks"]
  assert set(done["tasks"]["two"]) == {"kernel", "bias"}
  for name in TASKS:
    assert history[-1][f"accuracy/{name}"] > 0.9

  def stop(step, metrics):
    if step == 7:
      raise KeyboardInterrupt

  less = dataclasses.replace(SHORT, steps=10)
  whole, _ = fit_tasks(MODEL, PARAMS, TASKS, less, weighting)
  with pytest.raises(KeyboardInterrupt):
    fit_tasks(MODEL, PARAMS, TASKS, less, weighting, folder=tmp_path, on_step=stop)
  again, rows = fit_tasks(MODEL, PARAMS, TASKS, less, weighting, folder=tmp_path)
  assert checkpoint.tree_hash(again) == checkpoint.tree_hash(whole) and len(rows) == 10


def test_one_compressed_trunk_serves_every_head():
  done, _ = fit_tasks(MODEL, PARAMS, TASKS, dataclasses.replace(SHORT, steps=60))
  small = compress(MODEL, done, at("layers/*", round_to_nearest(8, 16)))[0]
  assert small["tasks"] is done["tasks"] or isinstance(small["tasks"]["two"]["kernel"], jax.Array)
  for name, task in TASKS.items():
    said, was = probabilities(MODEL, small, name, task), probabilities(MODEL, done, name, task)
    assert said.shape == (len(task.labels), len(task.classes))
    np.testing.assert_allclose(said, was, atol=0.05)


def test_a_trunk_that_stays_learns_heads_alone():
  done, _ = fit_tasks(MODEL, PARAMS, TASKS, SHORT, trainable=lambda path: False)
  before = {path: x for path, x in tree.flatten(PARAMS).items()}
  for path, x in tree.flatten({k: v for k, v in done.items() if k != "tasks"}).items():
    np.testing.assert_array_equal(x, before[path])


def test_shares_follow_sizes_and_temperature():
  assert shares({"a": 900, "b": 100}, 10, 1.0) == {"a": 9, "b": 1}
  assert shares({"a": 900, "b": 100}, 10, 1e9) == {"a": 5, "b": 5}
  assert shares({"a": 10**6, "b": 1}, 8, 1.0) == {"a": 8, "b": 1}


def changed(**what):
  return {**TASKS, "two": dataclasses.replace(TASKS["two"], **what)}


@pytest.mark.parametrize(
  ("run", "said"),
  [
    (lambda: fit_tasks(MODEL, PARAMS, {}, SHORT), "no task"),
    (lambda: fit_tasks(MODEL, PARAMS, TASKS, dataclasses.replace(SHORT, loss=Distill())), "needs a teacher"),
    (lambda: fit_tasks(MODEL, PARAMS, TASKS, dataclasses.replace(SHORT, match=Match())), "no match"),
    (lambda: fit_tasks(MODEL, PARAMS, TASKS, dataclasses.replace(SHORT, privacy=Privacy(1.0))), "no privacy"),
    (lambda: fit_tasks(MODEL, PARAMS, TASKS, dataclasses.replace(SHORT, accumulate=2)), "accumulate=2"),
    (lambda: fit_tasks(MODEL, PARAMS, TASKS, dataclasses.replace(SHORT, batch=900)), "a batch takes"),
    (lambda: fit_tasks(MODEL, PARAMS, changed(labels=np.arange(48)), SHORT), "task two: labels from 0 to 47 of 2"),
    (lambda: fit_tasks(MODEL, PARAMS, changed(labels=np.zeros(3, int)), SHORT), "labels for it"),
    (lambda: fit_tasks(MODEL, PARAMS, changed(mask=np.zeros((48, 12))), SHORT), "a real token in each row"),
    (lambda: fit_tasks(MODEL, PARAMS, changed(tokens=np.full((48, 12), 99)), SHORT), "task two.*the vocabulary"),
    (lambda: probabilities(MODEL, PARAMS, "two", TASKS["two"]), "no head for task two"),
    (lambda: fit_tasks(MODEL, with_heads(MODEL, PARAMS, {"two": TASKS["four"]}, jax.random.key(0)), TASKS, SHORT),
     "its head tells 4 classes apart, the data has 2"),
    (lambda: probabilities(MODEL, with_heads(MODEL, PARAMS, {"two": TASKS["four"]}, jax.random.key(0)), "two",
                           TASKS["two"]), "its head tells 4 classes apart"),
    (lambda: Weighting("loud"), "uncertainty or gradnorm"),
    (lambda: Weighting(temperature=0), "above 0"),
  ],
)  # fmt: skip
def test_what_cannot_be_is_said(run, said):
  with pytest.raises(ValueError, match=said):
    run()


def test_tasks_train_over_a_mesh():
  """Rows of each task split over data: the losses of one device."""
  training = dataclasses.replace(SHORT, batch=24, optimizer="sgd", learning_rate=0.1)
  even = Weighting(temperature=1e9)  # eight rows of each
  _, alone = fit_tasks(MODEL, PARAMS, TASKS, training, even)
  _, spread = fit_tasks(MODEL, shard(MODEL, PARAMS, make_mesh(4, 2)), TASKS, training, even)
  for a, b in zip(alone, spread, strict=True):
    assert all(b[f"loss/{name}"] == pytest.approx(a[f"loss/{name}"], rel=1e-4) for name in TASKS)
