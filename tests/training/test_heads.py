"""What tasks teach: losses of tags, spans and texts in NumPy, and heads that learn them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress.models import T5, Bert, BertConfig, BertSizes, T5Config, T5Sizes
from lmcompress.training import Distill, Task, Training, Weighting, fit_tasks, probabilities
from lmcompress.training.heads import checked_task, loss, with_start
from lmcompress.training.tasks import held_out_loss, with_heads

RNG = np.random.default_rng(0)
BERT = Bert(BertConfig(head_dim=8, max_length=16), BertSizes(vocab=32, embed=32, mlp=32, layers=1, heads=4))
T5_SIZES = T5Sizes(vocab=32, embed=32, mlp=32, layers=1, decoder_layers=1, heads=2, gated=True)
WRITER = T5(T5Config(head_dim=16, start=3, max_length=16), T5_SIZES)


def rows(n):
  mask = (np.arange(12)[None] < RNG.integers(6, 13, n)[:, None]).astype(np.int32)
  return RNG.integers(8, 32, (n, 12)).astype(np.int32) * mask, mask


def tags(n):
  """A token of 8 to 15 is of class 1, the one after it of class 2; every third place has no tag."""
  tokens, mask = rows(n)
  said = np.where((tokens >= 8) & (tokens < 16), 1, 0)
  said[:, 1:] = np.where((said[:, :-1] == 1) & (said[:, 1:] == 0), 2, said[:, 1:])
  said = np.where((mask == 0) | (np.arange(12) % 3 == 2), -1, said)
  return Task(tokens, mask, said.astype(np.int32), ("O", "B-x", "I-x"), "tags")


def spans(n):
  """The span lies between the only 4 and the only 5."""
  tokens, mask = rows(n)
  first = RNG.integers(0, 3, n)
  last = first + RNG.integers(0, 3, n)
  tokens[np.arange(n), first], tokens[np.arange(n), last] = 4, 5
  return Task(tokens, mask, np.stack([first, last], 1).astype(np.int32), ("start", "end"), "spans")


def texts(n):
  """The row's first four tokens in turn, and the end, 1."""
  tokens, mask = rows(n)
  said = np.concatenate([tokens[:, 3::-1], np.full((n, 1), 1), np.full((n, 2), -1)], axis=1).astype(np.int32)
  return Task(tokens, mask, said, (), "texts")


def states(model, params, batch):
  carry = model.start(params, batch)
  for block in model.blocks(params):
    carry, _ = model.run(block, params, carry)
  return carry


def log_softmax(x):
  x = np.asarray(x, np.float64)
  return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def test_the_loss_of_tags_counts_those_that_are_there():
  task = tags(5)
  params = with_heads(BERT, BERT.init(jax.random.key(0)), {"it": task}, jax.random.key(1))
  batch = task.batch(np.arange(5))
  head = params["tasks"]["it"]
  h = BERT.features(params, states(BERT, params, {name: batch[name] for name in ("tokens", "attention_mask")}))
  said = log_softmax(np.asarray(h, np.float64) @ np.asarray(head["kernel"]) + np.asarray(head["bias"]))
  where = np.argwhere(task.labels >= 0)
  want = -np.mean([said[i, j, task.labels[i, j]] for i, j in where])
  assert float(loss(BERT, params, "it", batch)) == pytest.approx(want, abs=1e-5)
  assert held_out_loss(BERT, params, "it", task, 2) == pytest.approx(want, abs=1e-5)
  np.testing.assert_allclose(probabilities(BERT, params, "it", task, 2), np.exp(said), atol=1e-5)


def test_the_loss_of_spans_knows_real_tokens_alone():
  task = spans(5)
  params = with_heads(BERT, BERT.init(jax.random.key(0)), {"it": task}, jax.random.key(1))
  batch, total = task.batch(np.arange(5)), 0.0
  found = probabilities(BERT, params, "it", task, 2)
  for i in range(5):
    n = int(task.mask[i].sum())
    h = BERT.features(params, states(BERT, params, task.tokens[i : i + 1, :n]))[0]
    said = log_softmax((np.asarray(h, np.float64) @ np.asarray(params["tasks"]["it"]["kernel"])).T)
    total -= (said[0, task.labels[i, 0]] + said[1, task.labels[i, 1]]) / 2
    np.testing.assert_allclose(found[i, :, :n], np.exp(said), atol=1e-5)
    assert not found[i, :, n:].any()
  assert float(loss(BERT, params, "it", batch)) == pytest.approx(total / 5, abs=1e-5)


def test_the_loss_of_texts_is_that_of_each_of_their_tokens():
  task, params = texts(4), WRITER.init(jax.random.key(0))
  batch = task.batch(np.arange(4))
  given = with_start(WRITER, task.labels)
  assert given["tokens"][:, 0].tolist() == [3] * 4 and given["attention_mask"].sum() == 4 * 6
  logits = WRITER.apply(params, task.tokens, attention_mask=task.mask, decoder_input_ids=given["tokens"][:, :-1])
  said = log_softmax(logits)
  want = -np.mean([said[i, j, task.labels[i, j]] for i, j in np.argwhere(task.labels >= 0)])
  for chunk in (3, 64):
    assert float(loss(WRITER, params, "it", batch, chunk=chunk)) == pytest.approx(want, abs=1e-4)
  assert held_out_loss(WRITER, params, "it", task, 3) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize(("model", "make", "steps"), [(BERT, tags, 60), (BERT, spans, 80), (WRITER, texts, 120)])
def test_each_kind_is_learned(model, make, steps):
  task = make(64)
  training = Training(steps=steps, batch=32, learning_rate=1e-2, schedule="constant")
  before = model.init(jax.random.key(0))
  tree, history = fit_tasks(model, before, {"it": task}, training, held_out={"it": task}, evaluate_every=steps)
  assert history[-1]["held_out/it"] < 0.4 * history[0]["loss/it"] and ("tasks" in tree) == task.has_head


@pytest.mark.parametrize(("model", "make"), [(BERT, tags), (BERT, spans), (WRITER, texts)])
def test_a_student_learns_from_a_teacher_what_no_label_says(model, make):
  """Labels are all alike for the student: what it learns of the task it has from the teacher."""
  task = make(64)
  fast = Training(steps=80, batch=32, learning_rate=1e-2, schedule="constant")
  teacher, _ = fit_tasks(model, model.init(jax.random.key(0)), {"it": task}, fast)
  alike = {"tags": np.where(task.labels >= 0, 0, -1), "spans": np.zeros_like(task.labels)}
  wrong = with_(task, labels=alike.get(task.kind, task.labels))  # a decoder has to read the right text
  guided = dataclasses.replace(fast, loss=Distill(temperature=2.0))
  student, _ = fit_tasks(model, model.init(jax.random.key(1)), {"it": wrong}, guided, teacher=(model, teacher))
  losses = [held_out_loss(model, params, "it", task) for params in (teacher, student)]
  assert losses[1] < 0.3 + 1.5 * losses[0]


def test_a_teacher_has_what_it_teaches():
  guided, params = Training(steps=2, batch=4, loss=Distill()), BERT.init(jax.random.key(0))
  small = Bert(BERT.config, dataclasses.replace(BERT.sizes, vocab=31)).init(jax.random.key(0))
  other = T5(dataclasses.replace(WRITER.config, start=2), T5_SIZES)
  with pytest.raises(ValueError, match="begins with token 2, the student's with 3"):
    fit_tasks(WRITER, WRITER.init(jax.random.key(0)), {"it": texts(8)}, guided, teacher=(other, params))
  for teacher, message in ((None, "needs a teacher"), ((BERT, params), "no head for task it"),
                           ((BERT, small), "31 entries, the student's 32")):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      fit_tasks(BERT, params, {"it": tags(8)}, guided, teacher=teacher)


def test_two_kinds_share_a_trunk():
  training = Training(steps=3, batch=12, schedule="constant")
  tree, history = fit_tasks(BERT, BERT.init(jax.random.key(0)), {"a": tags(24), "b": spans(24)}, training)
  assert set(tree["tasks"]) == {"a", "b"} and {"loss/a", "loss/b"} <= set(history[0])


def with_(task, **changes):
  return Task(**{**{name: getattr(task, name) for name in ("tokens", "mask", "labels", "classes", "kind")}, **changes})


@pytest.mark.parametrize(("model", "task", "message"), [
  (BERT, texts(4), "a Bert has no decoder beside an encoder"),
  (WRITER, tags(4), "a T5 learns to write texts"),
  (WRITER, with_(texts(4), labels=np.full((4, 7), -1)), "a text to write has no token"),
  (WRITER, with_(texts(4), labels=np.full((4, 7), 32)), "outside the vocabulary of 32"),
  (BERT, with_(spans(4), labels=np.asarray([[2, 1]] * 4)), "ends before it begins"),
  (BERT, with_(spans(4), labels=np.asarray([[2, 12]] * 4)), "outside the row's tokens"),
  (BERT, with_(spans(4), labels=np.asarray([[1, 2]] * 4), second=np.asarray([[2, 3]] * 4)),
   "a span outside the row's second text"),
  (BERT, with_(spans(4), second=np.asarray([[6, 5]] * 4)), "the first and the last token of the second text"),
  (BERT, with_(spans(4), second=np.asarray([5, 6])), r"second \[2\]: the first"),
  (BERT, with_(tags(4), labels=np.full((4, 12), 3)), "tags from 3 to 3 of 3 classes"),
  (BERT, with_(tags(4), labels=np.full((4, 12), -1)), "tags from -1 to -1"),
  (BERT, with_(tags(4), labels=np.zeros(4)), "a real token in each row and tags for it"),
])  # fmt: skip
def test_rows_that_do_not_fit_are_refused(model, task, message):
  with pytest.raises(ValueError, match=message):
    checked_task("it", task, model, model.init(jax.random.key(0)))


def test_texts_have_no_head_whose_weight_could_be_learned():
  with pytest.raises(ValueError, match="beside heads, and it has none"):
    fit_tasks(WRITER, WRITER.init(jax.random.key(0)), {"it": texts(8)}, Training(steps=2), Weighting("uncertainty"))
  assert jnp.isfinite(loss(WRITER, WRITER.init(jax.random.key(0)), "it", texts(2).batch(np.arange(2))))
