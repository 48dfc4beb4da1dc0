"""Heads of tasks in folders of BERT and its kin: what they tell, against transformers, and folders it reads back."""

from __future__ import annotations

import csv
import json
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import lmcompress as lmc
from lmcompress import classes, tree
from lmcompress.cli import app
from lmcompress.evaluate.spans import likeliest
from lmcompress.io.huggingface import load_folder, save_folder
from lmcompress.io.load import read_tasks
from lmcompress.judged_tasks import Judged, require_heads
from lmcompress.training import probabilities
from lmcompress.training.heads import Task, said
from lmcompress.types import ConfigError, FormatError

COMMON = {"vocab_size": 97, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 1}
BERT = {**COMMON, "hidden_size": 42, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6}
KINDS = {
  "Bert": BERT, "Roberta": BERT,
  "DistilBert": {**COMMON, "dim": 42, "hidden_dim": 70, "n_layers": 2, "n_heads": 6},
}  # fmt: skip
HEADS = {"SequenceClassification": "labels", "TokenClassification": "tags", "QuestionAnswering": "spans"}
MOODS = ["bad", "neither", "good"]
WORDS = ["[UNK]", "[PAD]", "the", "a", "wolf", "sheep", "grass", "ate", "saw", "and", "ran"]
TOKENS = np.random.default_rng(0).integers(2, 97, (2, 30)).astype(np.int32)
MASK = (np.arange(30) < np.asarray([[30], [21]])).astype(np.int32)


def built(stem, head, **more):
  """A random model of transformers, its biases off 0."""
  torch.manual_seed(0)
  cls = getattr(transformers, f"{stem}For{head}")
  named = {} if head == "QuestionAnswering" else {"id2label": dict(enumerate(MOODS))}
  net = cls._from_config(cls.config_class(**KINDS[stem], **named, **more), attn_implementation="eager").eval()
  with torch.no_grad():
    for name, parameter in net.named_parameters():
      if name.endswith("bias"):
        parameter += 0.1 * torch.randn_like(parameter)
  return net


def expected(net):
  """`[batch, ..., classes]` as `said` has it."""
  with torch.no_grad():
    given = net(torch.tensor(TOKENS).long(), attention_mask=torch.tensor(MASK))
  if hasattr(given, "start_logits"):
    return np.stack([given.start_logits, given.end_logits], 1)
  return given.logits.numpy()


def output(model, params, name, kind):
  return np.asarray(said(model, params, name, {"tokens": TOKENS, "attention_mask": MASK}, kind))


@pytest.fixture(scope="module", params=[(stem, head) for stem in KINDS for head in HEADS], ids="-".join)
def loaded(request, tmp_path_factory):
  """`(net, its folder, what its head tells)`."""
  net, folder = built(*request.param), tmp_path_factory.mktemp("model")
  net.save_pretrained(folder)
  return net, folder, HEADS[request.param[1]]


def real(values, kind):
  """What is said of real tokens."""
  where = {"labels": np.ones((1, 1)), "tags": MASK[..., None], "spans": MASK[:, None]}[kind]
  return values[np.broadcast_to(where, values.shape) != 0]


def test_what_a_head_tells_equals_transformers(loaded):
  """Float32 against float32; 1e-4 leaves room for another order of summation."""
  net, folder, kind = loaded
  model, params, _ = lmc.load(folder)
  wanted = real(expected(net), kind)
  assert np.abs(wanted).max() > 0.5
  np.testing.assert_allclose(real(output(model, params, kind, kind), kind), wanted, atol=1e-4)
  named = ["start", "end"] if kind == "spans" else MOODS
  assert read_tasks(folder) == {kind: {"kind": kind, "classes": named, "length": model.config.max_length}}


@pytest.mark.parametrize("stem", KINDS)
def test_of_two_texts_the_second_has_the_answer(stem):
  """Types of tokens for BERT alone, RoBERTa's tokenizers give 0 for both texts; no answer outside the passage."""
  net = built(stem, "QuestionAnswering", **({} if stem == "DistilBert" else {"type_vocab_size": 2}))
  with tempfile.TemporaryDirectory() as folder:
    net.save_pretrained(folder)
    model, params, _ = lmc.load(folder)
  second = np.asarray([[9, 28], [5, 19]])  # of which the last real token ends the row
  places = np.arange(TOKENS.shape[1])
  types = (places >= second[:, :1]) & (MASK != 0)
  more = {"token_type_ids": torch.tensor(types).long()} if stem == "Bert" else {}
  with torch.no_grad():
    given = net(torch.tensor(TOKENS).long(), attention_mask=torch.tensor(MASK), **more)
  wanted = np.stack([given.start_logits, given.end_logits], 1)
  task = Task(TOKENS, MASK, second, ("start", "end"), "spans", second)
  told = np.asarray(said(model, params, "spans", task.batch(np.arange(2)), "spans"))
  inside = np.broadcast_to((types & (places <= second[:, 1:]))[:, None], told.shape)
  np.testing.assert_allclose(told[inside], wanted[inside], atol=1e-4)
  assert (told[~inside] < -1e8).all()
  best = likeliest(probabilities(model, params, "spans", task))
  assert (best >= second[:, :1]).all() and (best <= second[:, 1:]).all()


def test_a_saved_folder_tells_the_same_in_transformers(loaded, tmp_path):
  """By way of a checkpoint and the head under another name; the folder that comes of it has every tensor and class."""
  net, folder, kind = loaded
  model, params, _ = lmc.load(folder)
  tasks = {"mood": read_tasks(folder)[kind]}
  lmc.save(tmp_path / "own", model, {**params, "tasks": {"mood": params["tasks"][kind]}}, tasks=tasks)
  assert read_tasks(tmp_path / "own") == tasks
  result = CliRunner().invoke(app, ["export", str(tmp_path / "own"), str(tmp_path / "out")])
  assert result.exit_code == 0, result.output
  again = type(net).from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
  np.testing.assert_allclose(expected(again), expected(net), atol=1e-5)
  assert again.config.id2label == net.config.id2label and again.config.architectures == [type(net).__name__]
  _, back, _ = load_folder(tmp_path / "out")
  assert tree.flatten(back).keys() == tree.flatten(params).keys()
  for path, leaf in tree.flatten(params).items():
    np.testing.assert_array_equal(leaf, tree.get(back, path))


def test_heads_stay_through_compression_and_training(tmp_path):
  """Eight bits of all, the head too, tell nearly the same; training the task goes on with the head and its layer."""
  from lmcompress.training import Training, fit_tasks

  built("DistilBert", "SequenceClassification").save_pretrained(tmp_path / "in")
  model, params, _ = lmc.load(tmp_path / "in")
  small, _ = lmc.compress(model, params, lmc.round_to_nearest(8, 14), None, jax.random.key(0))
  before = output(model, params, "labels", "labels")
  after = output(model, small, "labels", "labels")
  assert not np.array_equal(after, before) and np.linalg.norm(after - before) < 0.1 * np.linalg.norm(before)
  task = Task(np.tile(TOKENS, (4, 1)), np.tile(MASK, (4, 1)), np.arange(8) % 2, tuple(MOODS))
  training = Training(6, batch=8, learning_rate=1e-2)
  done, history = fit_tasks(model, params, {"labels": task}, training, trainable=lambda _: False)
  assert history[-1]["loss"] < history[0]["loss"] / 2
  assert not np.array_equal(done["tasks"]["labels"]["dense"]["kernel"], params["tasks"]["labels"]["dense"]["kernel"])


def changed(folder, config=None, arrays=None):
  """The folder with other settings and tensors."""
  path = folder / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
  if arrays is not None:
    save_file(arrays(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
  ("config", "arrays", "said"),
  [
    ({}, lambda x: {k: v for k, v in x.items() if k != "classifier.weight"}, "'classifier.weight' is missing"),
    ({}, lambda x: {k: v for k, v in x.items() if "pooler" not in k}, "'bert.pooler.dense.weight' is missing"),
    ({}, lambda x: {**x, "classifier.bias": x["classifier.bias"][:2]}, "tasks/labels/bias has shape"),
    ({}, lambda x: {**x, "classifier.weight": x["classifier.weight"][:, :40].copy()}, "40 inputs, 42 expected"),
    ({"id2label": {"0": "bad", "1": "good"}}, None, "names 2 classes, and the head tells 3 apart"),
    ({"id2label": {"0": "bad", "1": "bad", "2": "good"}}, None, "id2label does not name the classes"),
    ({"id2label": {"0": "bad", "2": "good"}}, None, "id2label does not name the classes"),
    ({"id2label": 3}, None, "id2label does not name the classes"),
    ({"id2label": {"0": "how much"}}, None, "one class gives a number"),
    ({"problem_type": "multi_label_classification"}, None, "'multi_label_classification' is not known here"),
    ({"architectures": ["BertForTokenClassification"]}, lambda x: {k: v for k, v in x.items() if k[:5] == "bert."},
     "'classifier.weight' is missing"),
    ({"architectures": ["BertForMultipleChoice"]}, None, "has no place in this architecture"),
  ],
)  # fmt: skip
def test_damaged_heads_are_named(config, arrays, said, tmp_path):
  built("Bert", "SequenceClassification").save_pretrained(tmp_path / "in")
  changed(tmp_path / "in", config, arrays)
  with pytest.raises(FormatError, match=said):
    lmc.load(tmp_path / "in")


def test_heads_that_a_folder_cannot_keep(tmp_path):
  built("Bert", "SequenceClassification").save_pretrained(tmp_path / "in")
  model, params, _ = lmc.load(tmp_path / "in")
  tasks, head = read_tasks(tmp_path / "in"), params["tasks"]["labels"]
  bare = {"kernel": head["kernel"], "bias": head["bias"]}
  for heads, told, what in (
    ({"labels": head}, {}, "a head labels, of which nothing is said"),
    ({"labels": head, "b": bare}, tasks, "heads of b, labels; a Hugging Face folder has one"),
    ({"labels": bare}, tasks, "reads the mean of all tokens"),
  ):
    with pytest.raises(FormatError, match=what):
      save_folder(model, {**params, "tasks": heads}, tmp_path / "out", tasks=told)
  pooled = {"kernel": jnp.zeros((42, 42)), "bias": jnp.zeros(42)}
  with pytest.raises(FormatError, match="pooler/bias has no place"):
    save_folder(model, {**params, "pooler": pooled}, tmp_path / "out", tasks=tasks)


def test_a_data_set_of_other_classes_is_refused(tmp_path):
  built("Bert", "SequenceClassification").save_pretrained(tmp_path / "in")
  task = Task(TOKENS, MASK, np.asarray([0, 1]), ("fresh", "rotten"))
  with pytest.raises(ConfigError, match="tells labels bad, neither, good; the data labels fresh, rotten"):
    require_heads(str(tmp_path / "in"), {"labels": Judged(task, task)})


def test_classify_reads_a_folder(tmp_path):
  """The command tells of texts in a file what transformers' own pipeline tells of them."""
  net, folder = built("DistilBert", "SequenceClassification"), tmp_path / "in"
  net.save_pretrained(folder)
  words = {word: i for i, word in enumerate(WORDS)}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.save(str(folder / "tokenizer.json"))
  texts = ["the wolf ate the sheep", "a sheep saw grass and ate", "and the wolf ran and ran and ran"]
  (tmp_path / "texts.txt").write_text("\n".join(texts))
  out = tmp_path / "out.csv"
  result = CliRunner().invoke(app, ["classify", str(folder), str(tmp_path / "texts.txt"), "--out", str(out)])
  assert result.exit_code == 0, result.output
  with out.open(newline="") as file:
    rows = list(csv.DictReader(file))
  reader = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")
  wanted = transformers.pipeline("text-classification", model=net, tokenizer=reader)(texts)
  assert [row["labels"] for row in rows] == [one["label"] for one in wanted]
  scores = [float(row["labels_probability"]) for row in rows]
  np.testing.assert_allclose(scores, [one["score"] for one in wanted], atol=1e-4)
  shutil.rmtree(folder)
  with pytest.raises(lmc.SourceError):
    classes.heads_of(folder, {}, None)
