"""Runs that learn tasks and draw samples: classes, tags, answers and texts, scored at every stage."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from small_model import byte_level
from small_run import COMMAND, RECIPE, training

import lmcompress as lmc
from lmcompress import experiment
from lmcompress.config import check, load_config, merge
from lmcompress.data.labelled import Labelled
from lmcompress.data.pairs import Pairs
from lmcompress.data.questions import Question, Questions
from lmcompress.data.tagged import Tagged
from lmcompress.io import checkpoint
from lmcompress.judged_tasks import judged_task
from lmcompress.models import T5, Bert, BertConfig, BertSizes, T5Config, T5Sizes
from lmcompress.types import ConfigError, LmcompressError


def test_tasks_are_learned_compressed_and_scored(place):
  """Images of digits by a head over a tiny trunk, then codes; the saved model gives the scores that the result says."""
  over = {"text": None, "steps": 80, "batch": 16, "learning_rate": 3e-3, "loss": {"name": "labels"}, "held_out": None,
          "weighting": {"kind": "uncertainty"}, "trainable": ["**"]}  # fmt: skip
  table = training(place).model_dump(mode="json")
  table |= {"train": {**table["train"], **over}, "recipe": [],
            "tasks": [{"name": "digits", "data": "digits", "length": 64, "rows": 500}],
            "finish": [{"name": "round_to_nearest", "at": "layers/*", "bits": 8, "group_size": 32}]}
  config = check({k: v for k, v in table.items() if v is not None}, "tasks")
  result = experiment.run(config, place / "tasks", COMMAND)
  original, trained, small = result["stages"]
  assert original["tasks"] == {} and [stage["name"] for stage in result["stages"]][1] == "trained"
  found = trained["tasks"]["digits"]
  assert found["n"] == 360 and found["accuracy"] > 0.25 and np.sum(found["confusion"]) == 360
  assert small["tasks"]["digits"]["accuracy"] == pytest.approx(found["accuracy"], abs=0.1)
  assert "loss/digits" in result["training"]["history"][0]
  page = (place / "tasks" / config.folder / "report.html").read_text("utf-8")
  assert "what was taken for what" in page
  model, params, tokenizer = lmc.load(place / "tasks" / config.folder / "model")
  from lmcompress.training import probabilities

  held = judged_task(config.tasks[0], model, tokenizer).test
  said = probabilities(model, params, "digits", held).argmax(1)
  assert np.mean(said == held.labels) == pytest.approx(small["tasks"]["digits"]["accuracy"], abs=0.01)


@pytest.mark.parametrize(("over", "said"), [
  ({"train": {"text": "pydoc"}}, "give a text or written rows"),
  ({"train": {"match": {"hidden": 1.0}}}, "no match"),
  ({"train": {"accumulate": 2}}, "no accumulate but 1"),
  ({"tasks": []}, "give a text or written rows"),
  ({"tasks": [{"name": "a", "data": "bbc"}, {"name": "a", "data": "digits"}]}, "two have the name a"),
  ({"tasks": [{"name": "a/b", "data": "bbc"}]}, "tasks"),
  ({"tasks": [{"name": "digits", "data": "digits"}], "samples": {"judge": "digits"}}, "two have the name digits"),
  ({"train": {"text": "pydoc", "weighting": {}}, "tasks": []}, "there are none"),
  ({"mesh": {"pipe": 2}}, "a pipeline has no tasks; say fsdp"),
])  # fmt: skip
def test_tables_of_tasks_are_checked(over, said):
  table = {"name": "t", "model": "m", "recipe": [], "train": {"steps": 2}, "tasks": [{"name": "a", "data": "bbc"}]}
  with pytest.raises(lmc.ConfigError, match=said):
    check(merge(table, over), "tasks")


@pytest.fixture(scope="module")
def encoder(place):
  """A table for a saved encoder that tells two kinds of text apart."""
  model = Bert(BertConfig(head_dim=16, max_length=64), BertSizes(vocab=264, embed=32, mlp=32, layers=1, heads=2))
  lmc.save(place / "encoder", model, model.init(jax.random.key(0)), byte_level())
  return {
    "name": "enc", "model": str(place / "encoder"), "recipe": [],
    "tasks": [{"name": "kind", "data": "bbc", "length": 16}], "evaluate": {"texts": []}, "bench": {"rounds": 0},
    "generate": None, "train": {"steps": 2, "batch": 4, "save_every": 2},
    "finish": [{"name": "round_to_nearest", "at": "layers/*", "bits": 8, "group_size": -1}],
  }  # fmt: skip


def test_an_encoder_is_trained_and_judged_by_its_tasks(encoder, place, monkeypatch):
  rows = (["a wolf", "kings", "bread", "sons"] * 3, np.arange(12) % 2)
  monkeypatch.setattr("lmcompress.judged_tasks.load_labelled", lambda name: Labelled(("x", "y"), rows, rows))
  config = check(encoder, "enc.yaml")
  result = experiment.run(config, place / "encoders", "lmcompress run enc.yaml")
  assert [stage["name"] for stage in result["stages"]] == ["original", "trained", "round_to_nearest at layers/*"]
  assert result["stages"][0]["tasks"] == {} and result["stages"][0]["perplexity"] == {}
  assert result["stages"][2]["tasks"]["kind"]["n"] == 12
  folder = place / "encoders" / config.folder
  assert checkpoint.read_tasks(folder / "model") == {
    "kind": {"classes": ["x", "y"], "length": 16, "kind": "labels"}
  }
  again = check({**encoder, "name": "again", "model": str(folder / "model"), "train": None, "finish": [],
                 "recipe": [{"name": "magnitude", "at": "layers/*", "sparsity": 0.5}]}, "again.yaml")  # fmt: skip
  other = {**encoder["tasks"][0], "name": "other"}
  monkeypatch.setattr("lmcompress.judged_tasks.load_labelled", lambda name: Labelled(("x", "y"), rows, rows))
  with pytest.raises(ConfigError, match="train, since the model has no head for other"):
    experiment.run(check({**again.model_dump(mode="json"), "tasks": [other]}, "o"), place / "encoders", "o")
  experiment.run(again, place / "encoders", "lmcompress run again.yaml")
  assert checkpoint.read_tasks(place / "encoders" / again.folder / "model")["kind"]["classes"] == ["x", "y"]
  page = (folder / "report.html").read_text()
  assert "kind" in page and experiment.run(config, place / "encoders", "again")["tree_hash"] == result["tree_hash"]


@pytest.mark.parametrize("change, message", [
  ({"tasks": []}, "is an encoder, which predicts no next token; its run needs tasks, by which it is scored"),
  ({"bench": {"rounds": 1}}, "needs bench.rounds: 0"), ({"generate": {"prompt": "x"}}, "needs generate: null"),
  ({"evaluate": {"texts": ["grimm"]}}, r"needs evaluate.texts: \[\]"),
])  # fmt: skip
def test_what_an_encoder_cannot_give_is_refused(encoder, place, change, message):
  table = {**encoder, **change}
  if not table["tasks"]:
    table["train"] = None
  with pytest.raises(ConfigError, match=message):
    experiment.run(check(table, "enc.yaml"), place / "encoders", "lmcompress run enc.yaml")


PAIRS = Pairs(*[(["a wolf", "kings", "bread", "sons"] * 3, ["lobo", "reyes", "pan", "hijos"] * 3)] * 2, "bleu", "es")


@pytest.fixture(scope="module")
def writer(place, encoder):
  """A table for a saved encoder-decoder that learns to write four words."""
  sizes = T5Sizes(vocab=264, embed=32, mlp=32, layers=1, decoder_layers=1, heads=2, gated=True)
  model = T5(T5Config(head_dim=16, max_length=32), sizes)
  lmc.save(place / "writer", model, model.init(jax.random.key(0)), byte_level())
  train = {"steps": 60, "batch": 12, "learning_rate": 1e-2, "save_every": 60, "evaluate_every": 30}
  tasks = [{"name": "es", "data": "bible-en-es", "length": 12}]
  return {**encoder, "name": "writer", "model": str(place / "writer"), "tasks": tasks, "train": train}


def test_an_encoder_decoder_learns_to_write(writer, place, monkeypatch):
  """Pairs are learned by heart, then compressed with statistics of them; the report shows what was written."""
  monkeypatch.setattr("lmcompress.judged_tasks.load_pairs", lambda name: PAIRS)
  finish = [{"name": "gptq", "at": "**/layers/*", "bits": 8, "group_size": 32}]
  table = {**writer, "finish": finish, "calibration": {"text": "es", "windows": 4, "length": 12}}
  config = check(table, "writer.yaml")
  result = experiment.run(config, place / "writers", "lmcompress run writer.yaml")
  before, trained, small = (stage["tasks"]["es"] for stage in result["stages"])
  assert before["chrf"] < 20 and trained["chrf"] > 95 and small["chrf"] > 95 and trained["measure"] == "bleu"
  assert trained["examples"][0] == ["lobo", "lobo"]
  history = result["training"]["history"]
  assert history[-1]["held_out/es"] == pytest.approx(history[-1]["loss"], abs=0.05) and history[-1]["loss"] < 0.3
  page = (place / "writers" / config.folder / "report.html").read_text()
  assert "what was written" in page and "<pre>lobo</pre>" in page and "held out es" in page


@pytest.mark.parametrize(("change", "message"), [
  ({"tasks": []}, "is an encoder-decoder, which writes texts; its run needs tasks"),
  ({"tasks": [{"name": "a", "data": "bbc", "length": 8}]}, "and the model writes texts; give one of bible-en-es"),
  ({"calibration": {"text": "grimm", "windows": 1, "length": 8}}, "calibrated on one of its tasks: es"),
  ({"calibration": {"text": "es", "windows": 13, "length": 8}}, "13 of 12 rows of task es"),
  ({"tasks": [{"name": "es", "data": "bible-en-es", "length": 32}]}, r"tasks.length \+ 1: 33 tokens are more"),
  ({"tasks": [{"name": "es", "data": "bible-en-es", "length": 3}]}, "task es: length 3: no pair of bible-en-es"),
])  # fmt: skip
def test_what_an_encoder_decoder_cannot_do_is_refused(writer, place, monkeypatch, change, message):
  monkeypatch.setattr("lmcompress.judged_tasks.load_pairs", lambda name: PAIRS)
  table = {**writer, **change}
  if not table["tasks"]:
    table["train"] = None
  with pytest.raises(ConfigError, match=message):
    experiment.run(check(table, "writer.yaml"), place / "writers", "again")


def test_an_encoder_writes_no_texts_and_a_data_set_has_a_name(encoder, place):
  for data, message in (("headlines", "has no decoder beside an encoder"), ("tweet", "did you mean tweets")):
    table = {**encoder, "tasks": [{"name": "t", "data": data, "length": 16}]}
    with pytest.raises(LmcompressError, match=message):
      experiment.run(check(table, "enc.yaml"), place / "encoders", "again")


@pytest.mark.parametrize("data", ["tweets", "gaps"])
def test_an_encoder_tags_words_and_finds_answers(encoder, place, monkeypatch, data):
  words = (["the", "wolf", "of", "Rome"], [0, 0, 0, 1])
  tagged = Tagged(("O", "B-place", "I-place"), [words] * 8, [words] * 4)
  asked = Questions([Question("who ate", "the wolf ate", 4, 8)] * 8, [Question("who ate", "the wolf ate", 4, 8)] * 4)
  monkeypatch.setattr("lmcompress.judged_tasks.load_tagged", lambda name: tagged)
  monkeypatch.setattr("lmcompress.judged_tasks.load_questions", lambda name: asked)
  table = {**encoder, "name": data, "tasks": [{"name": "it", "data": data, "length": 32}],
           "train": {"steps": 30, "batch": 8, "learning_rate": 1e-2, "save_every": 30}}  # fmt: skip
  result = experiment.run(check(table, "enc.yaml"), place / "encoders", "lmcompress run enc.yaml")
  found = result["stages"][2]["tasks"]["it"]
  assert found[found["measure"]] == 1 and found["n"] == 4 and result["stages"][0]["tasks"] == {}


def test_a_head_is_not_taken_for_another(encoder, place, monkeypatch):
  rows = (["a wolf", "kings"] * 4, np.arange(8) % 2)
  monkeypatch.setattr("lmcompress.judged_tasks.load_labelled", lambda name: Labelled(("x", "y"), rows, rows))
  config = check({**encoder, "name": "first"}, "enc.yaml")
  experiment.run(config, place / "heads", "lmcompress run enc.yaml")
  model = str(place / "heads" / config.folder / "model")
  monkeypatch.setattr("lmcompress.judged_tasks.load_labelled", lambda name: Labelled(("x", "z"), rows, rows))
  distil = {**encoder["train"], "teacher": model, "loss": {"name": "distill"}}
  for over in ({"model": model}, {"train": distil}):
    with pytest.raises(ConfigError, match=r"the head of that name in .* tells labels x, y; the data labels x, z"):
      experiment.run(check({**encoder, "name": "second", **over}, "enc.yaml"), place / "heads", "again")


def test_samples_are_drawn_and_judged_at_each_stage(place, monkeypatch):
  """A model that has never seen an image; the judge says so, and the table names what it judged."""
  monkeypatch.setattr("lmcompress.evaluate.samples.load_text", lambda name: "\n\n".join(
    f"{digit}{'ABCDEFGHIJKLMNOPQ'[digit] * 64}" for digit in range(10)))  # fmt: skip
  table = load_config(place / "tiny.yaml").model_dump(mode="json") | {
    "name": "drawn", "samples": {"judge": "digits", "count": 12}, "generate": None, "bench": {"rounds": 0},
    "evaluate": {"texts": []}, "recipe": RECIPE[:1],
  }  # fmt: skip
  config = check(table, "drawn.yaml")
  result = experiment.run(config, place / "drawn", "lmcompress run drawn.yaml")
  for stage in result["stages"]:
    assert stage["tasks"]["digits"]["n"] == 12 and stage["tasks"]["digits"]["recognised"] == 0
  assert "images that the model drew" in (place / "drawn" / config.folder / "report.html").read_text()
