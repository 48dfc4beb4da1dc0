"""A server of parameters: its bound holds whatever workers do, nothing is lost or applied twice, and it learns."""

from __future__ import annotations

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lmcompress as lmc
from lmcompress import fit, tree
from lmcompress.distributed.parameter_server import Clock, DroppedError, Processes, Shard, parts_of
from lmcompress.errors import FormatError, LmcompressError, WeightError
from lmcompress.models import Llama, LlamaConfig, LlamaSizes
from lmcompress.training import Asynchronous, Distill, Local, Training, fit_async, fit_local
from lmcompress.training.asynchronous import Codec
from lmcompress.transforms import at, chain

SIZES = LlamaSizes(vocab=32, embed=16, mlp=32, layers=1, heads=2, kv_heads=2, tied=False)
MODEL = Llama(LlamaConfig(head_dim=8), SIZES)
PARAMS = MODEL.init(jax.random.key(0))
ROWS = (np.cumsum(np.random.default_rng(0).integers(0, 3, (64, 12)), axis=1) % 32).astype(np.int32)
TRAINING = Training(steps=24, batch=4, learning_rate=1e-2, schedule="constant")


# ---------------------------------------------------------------------------------------- the clock


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_the_bound_holds_over_ten_thousand_updates(staleness):
  """Workers in random turn, each as slow as chance will have it; two are killed, one is silent and comes back."""
  rng, time = np.random.default_rng(staleness), [0.0]
  clock = Clock(10_000, staleness, patience=50.0, now=lambda: time[0])
  state: dict[str, object] = {f"w{i}": None for i in range(4)}
  for worker in state:
    clock.join(worker)
  gaps, batches, kills, silent, born = [], [], {2_000, 6_000}, None, 4
  while True:
    time[0] += float(rng.exponential(0.1))
    names = [w for w in state if w != silent]
    worker = names[int(rng.integers(len(names)))]
    if len(batches) in kills and state[worker] is not None:
      kills.discard(len(batches))
      clock.leave(worker)
      del state[worker]
      clock.join(f"w{born}")
      state[f"w{born}"], born = None, born + 1
      continue
    if len(batches) == 4_000 and silent is None and state[worker] is not None:
      silent, until = worker, time[0] + 100
      continue
    if silent is not None and time[0] > until:
      with pytest.raises(DroppedError, match="silent for over 50 seconds"):
        clock.admit(silent)
      clock.join(silent)
      state[silent], silent, until = None, None, np.inf
    if state[worker] is None:
      turn = clock.turn(worker)
      if turn is not None and turn.number is None:
        break
      state[worker] = turn
    elif rng.random() < 0.5:
      gaps.append(clock.admit(worker))
      batches.append(state[worker].number)
      clock.advance(worker, {"loss": 0.0})
      state[worker] = None
  assert len(batches) == 10_000 and sorted(batches) == list(range(10_000))
  assert max(gaps) <= staleness and not kills and (staleness == 0 or max(gaps) == staleness)


def test_a_clock_goes_on_after_what_it_wrote(tmp_path):
  first = Clock(5, 2, log=tmp_path / "log.jsonl")
  first.join("a")
  for n in range(3):
    assert first.turn("a").number == n
    first.advance("a", {"loss": float(n), "batch": n})
  again = Clock(5, 2, log=tmp_path / "log.jsonl")
  assert [row["loss"] for row in again.told()] == [0.0, 1.0, 2.0]
  again.back_to({0, 2})  # states of shards may lack any of them
  again.join("b")
  assert again.turn("b").number == 1
  again.advance("b", {"loss": 1.5, "batch": 1})
  assert again.turn("b").number == 3
  assert [row["batch"] for row in Clock(5, 2, log=tmp_path / "log.jsonl").told()] == [0, 2, 1]


# ---------------------------------------------------------------------------------------- shards


def arrays():
  rng = np.random.default_rng(1)
  return {"a/kernel": rng.normal(size=(4, 6)).astype(np.float32), "b/kernel": rng.normal(size=(6,)).astype(np.float32)}


def test_a_shard_makes_optax_updates_once_each():
  values, optimizer = arrays(), optax.adam(0.1)
  shard, want, moments = Shard(values, optimizer), dict(values), optimizer.init(values)
  for n in range(3):
    gradients = {path: np.full_like(x, n + 1) for path, x in values.items()}
    assert shard.push(n, gradients, 1.0) == n + 1
    assert shard.push(n, gradients, 1.0) == n + 1  # a duplicate
    updates, moments = optimizer.update(gradients, moments, want)
    want = optax.apply_updates(want, updates)
  version, found = shard.pull()
  assert version == 3
  for path, x in want.items():
    np.testing.assert_allclose(found[path], x, rtol=1e-6, atol=1e-6)


def test_a_shard_is_read_back_and_a_foreign_one_refused(tmp_path):
  values = arrays()
  gradients = {path: np.ones_like(x) for path, x in values.items()}
  shard = Shard(values, optax.adam(0.1), tmp_path, "s", 2)
  for n in range(3):
    shard.push(n, gradients, 1.0)
  again = Shard(values, optax.adam(0.1), tmp_path, "s", 2)
  assert again.made() == 2 and again.applied() == {0, 1}  # the third was not saved
  again.push(2, gradients, 1.0)
  for path, x in shard.pull()[1].items():
    np.testing.assert_array_equal(again.pull()[1][path], x)
  with pytest.raises(FormatError, match="other arrays"):
    Shard({"a/kernel": np.zeros((2, 2), np.float32)}, optax.sgd(0.1), tmp_path, "s")
  (tmp_path / "s.npz").write_bytes(b"PK no")
  with pytest.raises(FormatError, match="cannot be read"):
    Shard(values, optax.adam(0.1), tmp_path, "s")


def test_parts_have_about_as_many_bytes_each():
  values = {f"x{i}": np.zeros(n) for i, n in enumerate((50, 40, 30, 20, 10))}
  parts = parts_of(values, 2)
  assert sorted(p for part in parts for p in part) == sorted(values)
  assert {sum(values[p].size for p in part) for part in parts} == {70, 80}
  assert len(parts_of(values, 9)) == 5


# ---------------------------------------------------------------------------------------- training


def test_one_worker_is_training():
  """The updates of `fit`, one after the other: the same losses and weights."""
  done, history = fit_async(MODEL, PARAMS, ROWS, TRAINING, Asynchronous(workers=1, shards=3))
  want, told = fit(MODEL, PARAMS, ROWS, TRAINING)
  np.testing.assert_allclose([row["loss"] for row in history], [row["loss"] for row in told], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(done), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_workers_die_and_nothing_is_missing():
  kills = {("worker-0", 2), ("worker-2", 4)}

  def delay(worker, clock):
    if (worker, clock) in kills:
      raise RuntimeError("killed")
    return 0.003 * (hash((worker, clock)) % 5)

  how = Asynchronous(workers=3, staleness=1)
  _, history = fit_async(MODEL, PARAMS, ROWS, TRAINING, how, delay=delay)
  assert sorted(row["batch"] for row in history) == list(range(TRAINING.steps))
  assert max(row["gap"] for row in history) <= 1
  assert np.mean([row["loss"] for row in history[-5:]]) < np.mean([row["loss"] for row in history[:5]]) - 0.2


def test_workers_that_only_die_end_the_run():
  def delay(worker, clock):
    raise RuntimeError("no memory")

  with pytest.raises(LmcompressError, match="workers died, the last of: RuntimeError: no memory"):
    fit_async(MODEL, PARAMS, ROWS, TRAINING, Asynchronous(workers=2), delay=delay)


def test_a_run_that_was_cut_off_goes_on(tmp_path):
  def stop(step, metrics):
    if step >= 12:
      raise KeyboardInterrupt

  how = Asynchronous(workers=2, save_every=5)
  slow = {"delay": lambda worker, clock: 0.05, "folder": tmp_path}
  with pytest.raises(KeyboardInterrupt):
    fit_async(MODEL, PARAMS, ROWS, TRAINING, how, on_step=stop, **slow)
  told = []
  _, history = fit_async(MODEL, PARAMS, ROWS, TRAINING, how, on_step=lambda n, _: told.append(n), folder=tmp_path)
  assert len(history) == TRAINING.steps and min(told) >= 8  # of 12, those after the last saved states are made again
  assert sorted(row["batch"] for row in history) == list(range(TRAINING.steps))
  with pytest.raises(FormatError, match="holds another run"):
    fit_async(MODEL, PARAMS, ROWS, TRAINING, how, seed=1, folder=tmp_path)
  with pytest.raises(FormatError, match="holds another run"):
    fit_async(MODEL, MODEL.init(jax.random.key(1)), ROWS, TRAINING, how, folder=tmp_path)


def test_states_of_different_ages_come_to_have_every_batch_once(tmp_path):
  """One shard's state is of before the other's: what it lacks is learned again, and applied to it alone."""
  how = Asynchronous(workers=1, shards=2, save_every=4)
  half = dataclasses.replace(TRAINING, schedule="constant")
  fit_async(MODEL, PARAMS, ROWS, half, how, folder=tmp_path)
  with np.load(tmp_path / "shard-1.npz") as file:
    old = {**file, "batches": file["batches"][:-3]}
  np.savez(tmp_path / "shard-1.npz", **old)
  _, history = fit_async(MODEL, PARAMS, ROWS, half, how, folder=tmp_path)
  assert sorted(row["batch"] for row in history) == list(range(half.steps))
  for i in range(2):
    with np.load(tmp_path / f"shard-{i}.npz") as file:
      assert file["batches"].tolist() == list(range(half.steps))


@pytest.mark.parametrize("train", [fit_async, fit_local])
def test_losses_that_are_not_finite_end_the_run(train):
  broken = {**PARAMS, "final_norm": {"scale": PARAMS["final_norm"]["scale"] * np.nan}}
  with pytest.raises(WeightError, match=r"(batch \d+|step 0 of copy \d+): the loss is nan.*lower the learning rate"):
    train(MODEL, broken, ROWS, TRAINING)


@pytest.mark.parametrize(("compression", "most"), [
  (lmc.round_to_nearest(bits=8, group_size=-1), 0.35),
  (chain(lmc.magnitude(sparsity=0.9), lmc.freeze("bitmap")), 0.3),
  (lmc.kmeans(clusters=2), 0.25),
])  # fmt: skip
def test_what_compression_loses_comes_later(compression, most):
  """Sent and still kept are together what was given, and far fewer bytes."""
  codec, rng = Codec(at("layers/*", compression)), np.random.default_rng(0)
  path = "layers/0/mlp/up/kernel"
  given = [jnp.asarray(rng.normal(size=(32, 64)), jnp.float32) for _ in range(3)]
  sent = [codec.encode({path: g})[path] for g in given]
  total = sum(np.asarray(x.materialize()) for x in sent) + np.asarray(codec._lost[path])
  np.testing.assert_allclose(total, sum(given), atol=1e-4)
  assert sum(x.nbytes for x in jax.tree.leaves(sent[0])) < most * 4 * 32 * 64


@pytest.mark.parametrize("over", [{"loss": Distill()}, {"average": 0.9}, {"accumulate": 2}])
def test_settings_that_workers_do_not_have(over):
  training = Training(steps=2, batch=4, **over)
  for run in (fit_async, fit_local):
    with pytest.raises(ValueError, match=f"leave out {next(iter(over))}"):
      run(MODEL, PARAMS, ROWS, training)


def test_settings_out_of_range():
  for wrong in ({"workers": 0}, {"staleness": -1}, {"patience": 0.0}):
    with pytest.raises(ValueError, match="Asynchronous"):
      Asynchronous(**wrong)
  with pytest.raises(ValueError, match="Local"):
    Local(momentum=1.0)


@pytest.mark.slow
def test_the_same_in_processes():
  """Ray's actors and tasks instead of threads."""
  short = Training(steps=6, batch=4, learning_rate=1e-2, schedule="constant")
  done, history = fit_async(MODEL, PARAMS, ROWS, short, Asynchronous(workers=1, shards=2), host=Processes())
  want, told = fit(MODEL, PARAMS, ROWS, short)
  np.testing.assert_allclose([row["loss"] for row in history], [row["loss"] for row in told], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(done), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


# ---------------------------------------------------------------------------------------- copies


def test_one_copy_is_training():
  done, history = fit_local(MODEL, PARAMS, ROWS, TRAINING, Local(workers=1, inner=4))
  want, told = fit(MODEL, PARAMS, ROWS, TRAINING)
  np.testing.assert_allclose([row["loss"] for row in history], [row["loss"] for row in told], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(done), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
  nbytes = sum(x.nbytes for x in jax.tree.leaves(PARAMS))
  assert [row["sent"] for row in history] == [nbytes if (n + 1) % 4 == 0 else 0 for n in range(24)]


def test_copies_meet_in_their_mean():
  """Of two copies after one plain update each: the mean of what each would have alone."""
  sgd = Training(steps=1, batch=4, optimizer="sgd", learning_rate=0.5, schedule="constant", clip=None)
  done, _ = fit_local(MODEL, PARAMS, ROWS, sgd, Local(workers=2, inner=1))
  from lmcompress.training import batches

  chosen = np.asarray(batches(np.arange(len(ROWS))[:, None], 8, 0)[0])[:, 0].reshape(2, 4)
  alone = [fit(MODEL, PARAMS, ROWS[some], sgd)[0] for some in chosen]
  for path, x in tree.flatten(done).items():
    np.testing.assert_allclose(x, (tree.get(alone[0], path) + tree.get(alone[1], path)) / 2, atol=1e-6)


def test_an_outer_step_has_momentum():
  slow = Training(steps=8, batch=4, learning_rate=1e-3, schedule="constant")
  plain, _ = fit_local(MODEL, PARAMS, ROWS, slow, Local(workers=2, inner=2))
  fast, _ = fit_local(MODEL, PARAMS, ROWS, slow, Local(workers=2, inner=2, momentum=0.9))
  moved = [sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(PARAMS), strict=True))
           for x in (plain, fast)]  # fmt: skip
  assert moved[1] > 2 * moved[0]


def test_nobody_works_on_after_the_end():
  """A worker that is under way when a run ends is refused, and what it had is not recorded."""
  clock = Clock(10, 2)
  clock.join("a")
  assert clock.turn("a").number == 0
  clock.end()
  for call in (lambda: clock.admit("a"), lambda: clock.advance("a", {"loss": 0.0})):
    with pytest.raises(DroppedError):
      call()
  clock.join("a")
  assert clock.turn("a").number is None and clock.told() == []


def test_an_interrupt_leaves_no_worker_behind():
  begun = threading.active_count()

  def stop(step, metrics):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    fit_async(MODEL, PARAMS, ROWS, TRAINING, Asynchronous(workers=3), on_step=stop, delay=lambda worker, clock: 0.05)
  assert threading.active_count() <= begun


def test_a_worker_that_comes_back_is_counted_and_applied():
  """Its clock is that of the slowest again; its batches are new, and a shard applies each."""
  time = [0.0]
  clock, shard = Clock(8, 3, patience=1.0, now=lambda: time[0]), Shard(arrays(), optax.sgd(0.1))
  gradients = {path: np.ones_like(x) for path, x in arrays().items()}

  def update(worker):
    turn = clock.turn(worker)
    shard.push(turn.number, gradients, 1.0)
    return clock.advance(worker, {"loss": 0.0})

  clock.join("a")
  clock.join("b")
  for worker in ("a", "a", "a", "b"):
    update(worker)
  time[0] = 5.0
  clock.join("b")
  with pytest.raises(DroppedError):
    clock.turn("b") and clock.turn("a")
  clock.join("a")
  assert update("a") == 5 == shard.made()
