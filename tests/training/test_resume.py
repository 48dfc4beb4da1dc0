"""The loop: batches by position, states, and a run cut off anywhere that goes on to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.extend
import numpy as np
import pytest
from small_training import MODEL, PARAMS, ROWS, deltas, same

from lmcompress.calibration import compress
from lmcompress.io import checkpoint
from lmcompress.models import Llama, LlamaConfig, LlamaSizes
from lmcompress.training import (
  Distill,
  Privacy,
  Training,
  batches,
  fit,
)
from lmcompress.transforms import (
  chain,
  lora,
  magnitude,
  rigl,
  round_to_nearest,
)
from lmcompress.transforms.schedules import cubic
from lmcompress.types import FormatError, SourceError, WeightError


def test_batches_by_position():
  source = batches(ROWS, 8, seed=3)
  epoch = np.concatenate([source[i] for i in range(3)])
  assert sorted(map(tuple, epoch)) == sorted(map(tuple, ROWS))
  np.testing.assert_array_equal(batches(ROWS, 8, seed=3)[7], source[7])
  assert not np.array_equal(batches(ROWS, 8, seed=4)[0], source[0])


CUT = """
import os, sys
sys.path.insert(0, {tests!r})
import conftest
from training.test_resume import begun, trained
print(begun(sys.argv[3]), flush=True)
def on_step(step, metrics):
  if step == int(sys.argv[2]):
    os.kill(os.getpid(), 9)
print(*trained(sys.argv[3], sys.argv[1], on_step))
"""
KINDS = {
  "adapters": (
    lambda: compress(MODEL, PARAMS, chain(round_to_nearest(4, 16), lora(2)), None, jax.random.key(0))[0],
    Training(6, batch=8, learning_rate=1e-2, loss=Distill("reverse")),
    {"trainable": deltas, "teacher": (MODEL, PARAMS)},
  ),
  "schedule": (
    lambda: compress(MODEL, PARAMS, magnitude(0.0), None, None)[0],
    Training(6, batch=8, learning_rate=1e-2, average=0.9), {"transform": magnitude(cubic(0.75, start=0, end=4))},
  ),
}  # fmt: skip


def begun(kind):
  """The hash of the tree that a kind of training starts from."""
  return checkpoint.tree_hash(KINDS[kind][0]())


def trained(kind, folder, on_step=None):
  """The tree's hash and the losses of a kind of training, with states every two steps."""
  make, training, more = KINDS[kind]
  done, history = fit(MODEL, make(), ROWS, training, folder=Path(folder), save_every=2, on_step=on_step, **more)
  return checkpoint.tree_hash(done), [row["loss"] for row in history]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_anywhere_it_resumes_to_the_bit(kind, tmp_path):
  """`kill -9` after step 5 of 6, one after the last state: the tree and every loss are those of a run never cut."""
  script = CUT.format(tests=str(Path(__file__).parents[1]))
  command = [sys.executable, "-c", script, str(tmp_path / "cut"), "5", kind]
  cut = subprocess.run(command, capture_output=True, env=os.environ, text=True)
  assert cut.returncode == -signal.SIGKILL, cut.stderr
  assert cut.stdout.split() == [begun(kind)]
  assert trained(kind, tmp_path / "cut") == trained(kind, tmp_path / "straight")
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
    (lambda: fit(MODEL, PARAMS, ROWS, ok, trainable=deltas), "nothing trains"),
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
