"""Distillation beyond predictions in memory: matching what is inside, stored teachers, rows that a model writes."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lmcompress import tree
from lmcompress.io import checkpoint
from lmcompress.models import Llama, LlamaConfig, LlamaSizes
from lmcompress.training import (
  Distill,
  Generated,
  Labels,
  Match,
  Privacy,
  StoredTeacher,
  Training,
  divergence,
  fit,
  store_predictions,
  write_rows,
)
from lmcompress.training.generated import continued
from lmcompress.training.losses import Likeliest, coarse
from lmcompress.training.step import loss_of
from lmcompress.types import FormatError

SIZES = LlamaSizes(vocab=64, embed=32, mlp=64, layers=4, heads=4, kv_heads=2)
TEACHER = Llama(LlamaConfig(head_dim=8), SIZES)
THEIRS = TEACHER.init(jax.random.key(0))
STUDENT = Llama(LlamaConfig(head_dim=8), dataclasses.replace(SIZES, embed=16, mlp=32, layers=2, heads=2, kv_heads=1))
OURS = STUDENT.init(jax.random.key(1))
ROWS = (np.arange(24 * 16).reshape(24, 16) * 7 % 64).astype(np.int32)
SHORT = Training(steps=6, batch=4, learning_rate=1e-2, loss=Distill(), chunk=16)


def inputs(model, params, rows, stage):
  """Numbers `{block: [batch, length, width]}` of one stage, in float64."""
  carry, found = model.start(params, {"tokens": rows}), {}
  for block in model.blocks(params):
    carry, seen = model.run(block, params, carry, (stage,))
    found[block.path] = np.asarray(seen[stage], np.float64)
  return found


def measured(training, ours, model=STUDENT, teacher=(TEACHER, THEIRS), rows=ROWS[:3]):
  trained, kept = tree.partition(ours)
  total, count = loss_of(model, kept, training, teacher, trained, {"tokens": jnp.asarray(rows)})
  return float(total / count)


def fitted(teacher=None, **changed):
  return fit(STUDENT, OURS, ROWS, dataclasses.replace(SHORT, **changed), teacher=teacher)


# ---------------------------------------------------------------------------------------- matching


def test_hidden_states_are_compared_as_the_formula_says():
  """Two blocks against the second and fourth of four, through the projections, in NumPy."""
  match, training = Match(hidden=0.7), dataclasses.replace(SHORT, loss=Labels())
  maps = match.projections(STUDENT, OURS, (TEACHER, THEIRS), 16, jax.random.key(5))
  assert {name: x["kernel"].shape for name, x in maps.items()} == {"layers_0": (16, 32), "layers_1": (16, 32)}
  whole = {**OURS, "projections": maps}
  got = measured(dataclasses.replace(training, match=match), whole) - measured(training, whole)
  h, aims = inputs(STUDENT, OURS, ROWS[:3], "qkv"), inputs(TEACHER, THEIRS, ROWS[:3], "qkv")
  want = 0.0
  for ours, theirs in (("layers/0", "layers/1"), ("layers/1", "layers/3")):
    said = h[ours] @ np.asarray(maps[ours.replace("/", "_")]["kernel"], np.float64)
    want += 0.7 / 2 * np.mean(((said - aims[theirs]) ** 2).mean(-1) / (aims[theirs] ** 2).mean(-1))
  assert got == pytest.approx(want, rel=1e-4)


def test_relations_are_compared_as_torch_does():
  """The last pair's, four heads, widths of 16 and 32."""
  match, training = Match(hidden=0.0, relations=0.5, heads=4), dataclasses.replace(SHORT, loss=Labels())
  assert match.projections(STUDENT, OURS, (TEACHER, THEIRS), 16, jax.random.key(5)) == {}
  got = measured(dataclasses.replace(training, match=match), OURS) - measured(training, OURS)

  def relations(x):
    x = torch.tensor(x).reshape(3, 16, 4, -1).transpose(1, 2)
    return torch.log_softmax(x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5, -1)

  q = relations(inputs(STUDENT, OURS, ROWS[:3], "o")["layers/1"])
  p = relations(inputs(TEACHER, THEIRS, ROWS[:3], "o")["layers/3"])
  want = 0.5 * torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
  assert got == pytest.approx(float(want), rel=1e-4)


def test_a_student_comes_to_see_what_its_teacher_sees():
  """The projections learn beside it and are gone from the result; without matching it does not come near."""
  training = dataclasses.replace(SHORT, steps=30, loss=Labels(), match=Match(hidden=5.0, relations=1.0, heads=4))
  done, history = fit(STUDENT, OURS, ROWS, training, teacher=(TEACHER, THEIRS))
  plain, _ = fit(STUDENT, OURS, ROWS, dataclasses.replace(training, match=None))
  assert jax.tree.structure(done) == jax.tree.structure(OURS)
  assert history[-1]["loss"] < history[0]["loss"] - 1.0

  def unexplained(params):
    """Of the teacher's last hidden states, by the best linear map of the student's."""
    x, y = inputs(STUDENT, params, ROWS, "qkv")["layers/1"], inputs(TEACHER, THEIRS, ROWS, "qkv")["layers/3"]
    x, y = x.reshape(-1, 16), y.reshape(-1, 32)
    return np.sum((x @ np.linalg.lstsq(x, y, rcond=None)[0] - y) ** 2) / np.sum(y**2)

  assert unexplained(done) < unexplained(plain)


def test_blocks_by_name_are_the_teachers_own():
  less = {**THEIRS, "layers": {name: THEIRS["layers"][name] for name in ("0", "3")}}
  pairs = Match(layers="name").pairs(TEACHER, less, (TEACHER, THEIRS))
  assert [(a.path, b.path) for a, b in pairs] == [("layers/0", "layers/0"), ("layers/3", "layers/3")]
  with pytest.raises(ValueError, match="the teacher has no layers/1; layers='uniform'"):
    Match(layers="name").pairs(TEACHER, THEIRS, (TEACHER, less))
  with pytest.raises(ValueError, match="widths of 16 and 32 are no multiples of it"):
    Match(hidden=0, relations=1, heads=3).projections(STUDENT, OURS, (TEACHER, THEIRS), 16, jax.random.key(0))


# ---------------------------------------------------------------------------------------- stored teachers


def test_a_stored_teacher_of_all_tokens_is_the_teacher(tmp_path):
  """k = the vocabulary: the same training to a few last bits; the files hold what the model says."""
  stored = store_predictions(TEACHER, THEIRS, ROWS, tmp_path / "t", k=64, batch=5)
  said = jax.nn.log_softmax(TEACHER.apply(THEIRS, ROWS[3:5]), axis=-1)
  found = stored[np.array([3, 4])]
  again = np.take_along_axis(np.asarray(said), found["teacher_ids"], axis=-1)
  np.testing.assert_allclose(found["teacher_logprobs"][:, :-1], again[:, :-1], atol=1e-5)
  live, a = fit(STUDENT, OURS, ROWS, SHORT, teacher=(TEACHER, THEIRS))
  kept, b = fit(STUDENT, OURS, ROWS, SHORT, teacher=stored)
  np.testing.assert_allclose([x["loss"] for x in a], [x["loss"] for x in b], rtol=1e-4)
  for x, y in zip(jax.tree.leaves(live), jax.tree.leaves(kept), strict=True):
    np.testing.assert_allclose(x, y, atol=2e-3)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen_shannon", "skewed"])
def test_the_likeliest_tokens_bound_a_divergence_from_below(kind):
  rng = np.random.default_rng(0)
  p, q = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=(9, 40)) * 2, jnp.float32)) for _ in range(2))
  whole, last = divergence(p, q, kind, 0.3), None
  for k in (1, 8, 39, 40):
    logprobs, ids = jax.lax.top_k(p, k)
    a, b = coarse(Likeliest(ids, logprobs), q)
    np.testing.assert_allclose(np.exp(a).sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(np.exp(b).sum(-1), 1, atol=1e-5)
    found = divergence(a, b, kind, 0.3)
    assert np.all(found <= whole + 1e-4) and (last is None or np.all(found >= last - 1e-4))
    last = found
  np.testing.assert_allclose(last, whole, atol=1e-4)


def test_predictions_go_on_where_they_were_cut_off(tmp_path):
  whole = store_predictions(TEACHER, THEIRS, ROWS, tmp_path / "a", k=8)

  def stop(done, total):
    if done >= 8:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    store_predictions(TEACHER, THEIRS, ROWS, tmp_path / "b", k=8, on_rows=stop)
  with pytest.raises(FormatError, match="8 of 24 rows"):
    StoredTeacher(tmp_path / "b")
  calls = []
  again = store_predictions(TEACHER, THEIRS, ROWS, tmp_path / "b", k=8, on_rows=lambda *x: calls.append(x))
  assert calls[0] == (12, 24)
  for name in ("teacher_ids", "teacher_logprobs"):
    np.testing.assert_array_equal(whole[np.arange(24)][name], again[np.arange(24)][name])


def test_a_stored_teacher_is_refused_where_it_does_not_fit(tmp_path):
  stored = store_predictions(TEACHER, THEIRS, ROWS, tmp_path / "t", k=4)
  with pytest.raises(ValueError, match="of other rows"):
    fit(STUDENT, OURS, ROWS[::-1].copy(), SHORT, teacher=stored)
  for changed in ({"match": Match()}, {"generated": Generated(prompt=4)}, {"privacy": Privacy(1.0)}):
    with pytest.raises(ValueError, match="a stored teacher has predictions of its rows alone"):
      fit(STUDENT, OURS, ROWS, dataclasses.replace(SHORT, **changed), teacher=stored)
  with pytest.raises(ValueError, match="temperature 1 is needed"):
    fit(STUDENT, OURS, ROWS, dataclasses.replace(SHORT, loss=Distill(temperature=2.0)), teacher=stored)
  with pytest.raises(FormatError, match="of other rows or another k"):
    store_predictions(TEACHER, THEIRS, ROWS, tmp_path / "t", k=5)
  with pytest.raises(ValueError, match="k=65"):
    store_predictions(TEACHER, THEIRS, ROWS, tmp_path / "u", k=65)
  (tmp_path / "t" / "record.json").write_text("{", "utf-8")
  with pytest.raises(FormatError, match="not the record"):
    StoredTeacher(tmp_path / "t")


# ---------------------------------------------------------------------------------------- rows that a model writes


def test_a_written_row_is_what_the_model_would_say():
  """Greedy: each token after the prompt is the likeliest after those before it; only those count."""
  rows, counted = continued(TEACHER, THEIRS, ROWS[:3], Generated(prompt=5, temperature=0.0), jax.random.key(0))
  np.testing.assert_array_equal(rows[:, :5], ROWS[:3, :5])
  np.testing.assert_array_equal(counted, np.arange(16)[None].repeat(3, 0) >= 5)
  said = np.argmax(TEACHER.apply(THEIRS, rows), axis=-1)
  np.testing.assert_array_equal(rows[:, 5:], said[:, 4:-1])


def test_only_what_was_written_counts():
  """The loss of a row with its prompt masked is that of its other tokens."""
  mask = (np.arange(16)[None].repeat(2, 0) >= 5).astype(np.int32)
  trained, kept = tree.partition(OURS)
  training = dataclasses.replace(SHORT, loss=Labels())
  total, count = loss_of(STUDENT, kept, training, None, trained, {"tokens": ROWS[:2], "counted": mask})
  said = jax.nn.log_softmax(STUDENT.apply(OURS, ROWS[:2]), axis=-1)
  each = -np.take_along_axis(np.asarray(said)[:, :-1], ROWS[:2, 1:, None], axis=-1)[..., 0]
  assert int(count) == 22
  assert float(total) == pytest.approx(float(each[:, 4:].sum()), rel=1e-5)


@pytest.mark.parametrize("by", ["student", "teacher"])
def test_training_on_written_rows_resumes_to_the_bit(by, tmp_path):
  loss = Distill("reverse") if by == "student" else Labels()
  training = dataclasses.replace(SHORT, loss=loss, generated=Generated(by, share=0.7, prompt=6))
  given = {"teacher": (TEACHER, THEIRS), "seed": 3, "save_every": 2}
  whole, history = fit(STUDENT, OURS, ROWS, training, **given)
  text, _ = fit(STUDENT, OURS, ROWS, dataclasses.replace(training, generated=None), **given)

  def stop(step, metrics):
    if step == 3:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    fit(STUDENT, OURS, ROWS, training, **given, folder=tmp_path, on_step=stop)
  again, logged = fit(STUDENT, OURS, ROWS, training, **given, folder=tmp_path)
  assert checkpoint.tree_hash(again) == checkpoint.tree_hash(whole) != checkpoint.tree_hash(text)
  assert [row["loss"] for row in logged] == [row["loss"] for row in history]


def test_rows_from_nothing_go_on_where_they_were_cut_off(tmp_path):
  """Nearly greedy they are what the model would say; cut off or not, they are the same; drawn, no two are."""
  sure = write_rows(TEACHER, THEIRS, 3, 2, 9, tmp_path / "sure", temperature=1e-4)
  said = np.argmax(TEACHER.apply(THEIRS, sure), axis=-1)
  np.testing.assert_array_equal(sure[:, 1:], said[:, :-1])
  assert (sure[:, 0] == 3).all()
  given = {"batch": 2, "seed": 5}
  whole = write_rows(TEACHER, THEIRS, 3, 5, 9, tmp_path / "whole", **given)

  def stop(done, of):
    if done == 4:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write_rows(TEACHER, THEIRS, 3, 5, 9, tmp_path / "cut", **given, on_rows=stop)
  told = []
  again = write_rows(TEACHER, THEIRS, 3, 5, 9, tmp_path / "cut", **given, on_rows=lambda *at: told.append(at))
  np.testing.assert_array_equal(again, whole)
  assert told == [(5, 5)] and len({row.tobytes() for row in whole}) == 5
  with pytest.raises(FormatError, match="written otherwise"):
    write_rows(TEACHER, THEIRS, 3, 5, 9, tmp_path / "cut", batch=2, seed=6)
  for damage, message in ((b"no array", "cannot be read"), (None, "cannot be read")):
    (tmp_path / "cut" / "rows.npy").unlink() if damage is None else (tmp_path / "cut" / "rows.npy").write_bytes(damage)
    with pytest.raises(FormatError, match=message):
      write_rows(TEACHER, THEIRS, 3, 5, 9, tmp_path / "cut", **given)
  np.save(tmp_path / "cut" / "rows.npy", whole[:2])
  with pytest.raises(FormatError, match=r"int32\[2, 9\], and int32\[5, 9\] is needed"):
    write_rows(TEACHER, THEIRS, 3, 5, 9, tmp_path / "cut", **given)
  (tmp_path / "cut" / "record.json").write_text("[]")
  with pytest.raises(FormatError, match="not the record"):
    write_rows(TEACHER, THEIRS, 3, 5, 9, tmp_path / "cut", **given)


@pytest.mark.parametrize(
  ("make", "said"),
  [
    (lambda: write_rows(TEACHER, THEIRS, 3, 0, 9, Path("never")), "rows and a batch from 1"),
    (lambda: write_rows(TEACHER, THEIRS, 3, 1, 9, Path("never"), temperature=0.0), "a temperature above 0"),
    (lambda: Match(hidden=-1), "weights from 0"),
    (lambda: Match(hidden=0, relations=0), "one of them above it"),
    (lambda: Match(layers="deep"), "uniform or name"),
    (lambda: Generated(by="nobody"), "student or teacher"),
    (lambda: Generated(share=0), "a share above 0"),
    (lambda: Training(steps=1, privacy=Privacy(1.0), generated=Generated()), "leave one out"),
    (lambda: fitted(generated=Generated(prompt=16), teacher=(TEACHER, THEIRS)), "rows have 16 tokens"),
    (lambda: fitted(loss=Labels(), match=Match()), "Match needs a teacher"),
    (lambda: fitted(loss=Labels(), generated=Generated("teacher", prompt=4)), "Generated needs a teacher"),
  ],
)
def test_what_cannot_be_is_said(make, said):
  with pytest.raises(ValueError, match=said):
    make()
