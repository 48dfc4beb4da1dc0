"""Runs that train on a text: stages, resume, meshes, profiles, and what is refused."""

from __future__ import annotations

import json
import weakref

import pytest
from small_run import COMMAND, training

import lmcompress as lmc
from lmcompress import experiment
from lmcompress.config import check
from lmcompress.stages import Silent
from lmcompress.types import LmcompressError


def test_a_config_trains_finishes_and_resumes(place, monkeypatch):
  """Stages before, after training and after `finish`; cut off after a saved state, the tree is the same."""
  config = training(place)
  result = experiment.run(config, place / "straight", COMMAND)
  assert [stage["name"] for stage in result["stages"]] == [
    "original", "fake_quantize at layers/*/mlp", "trained", "freeze"]
  before, trained, frozen = result["stages"][1:]
  text, = config.evaluate.texts
  assert trained["kl"][text] < before["kl"][text]
  assert frozen["kl"][text] == pytest.approx(trained["kl"][text], abs=1e-5)
  assert frozen["bytes_on_disk"] < 0.6 * trained["bytes_on_disk"]
  row = result["training"]
  assert row["tokens"] == 4 * 4 * 16 and len(row["history"]) == 4
  assert row["trained_parameters"] == 2 * (3 * 64 * 128 + 3 * 64 * 128 // 32)
  assert json.loads((place / "straight" / config.folder / "result.json").read_text())["training"] == row

  class Cut:
    def step(self, what, done, total):
      if what.startswith("training") and done == 3:
        raise KeyboardInterrupt

    def note(self, text):
      return

  with pytest.raises(KeyboardInterrupt):
    experiment.run(config, place / "cut", COMMAND, Cut())
  again = experiment.run(config, place / "cut", COMMAND)
  assert again["tree_hash"] == result["tree_hash"]
  assert row["history"][-1]["held_out"] == again["training"]["history"][-1]["held_out"] > 0
  assert [r["loss"] for r in again["training"]["history"]] == [r["loss"] for r in row["history"]]


@pytest.mark.parametrize("teaches", [False, True])
def test_the_original_is_away_while_a_text_trains(place, monkeypatch, teaches):
  """It is in memory then only where it teaches; its scores are those of the model that was read."""
  read, whole = [], experiment.load

  def load(*args, **more):
    model, params, tokenizer = whole(*args, **more)
    read.append(weakref.ref(params["layers"]["0"]["mlp"]["up"]["kernel"]))
    return model, params, tokenizer

  class Looks:
    seen = ()

    def step(self, what, done, total):
      if what.startswith("training"):
        self.seen = (*self.seen, read[0]() is None)

    def note(self, text):
      return

  monkeypatch.setattr(experiment, "load", load)
  loss = {"name": "distill"} if teaches else {"name": "labels"}
  table = training(place, steps=2, warmup=0, loss=loss, trainable=["**/delta"]).model_dump(mode="json")
  recipe = [{"name": "round_to_nearest", "at": "layers/*", "bits": 4, "group_size": 16},
            {"name": "lora", "at": "layers/*", "rank": 2}]  # fmt: skip
  config, looks = check({**table, "recipe": recipe, "finish": []}, "away"), Looks()
  result = experiment.run(config, place / f"away {teaches}", COMMAND, looks)
  assert looks.seen and set(looks.seen) == {not teaches} and len(read) == 2 - teaches
  text, = config.evaluate.texts
  original, = (stage for stage in result["stages"] if stage["name"] == "original")
  plain = experiment.run(check({**config.model_dump(mode="json"), "train": None, "finish": []}, "x"), place, COMMAND)
  assert original["perplexity"] == plain["stages"][0]["perplexity"] and original["kl"][text] == 0


def test_a_run_cut_off_while_it_finishes_goes_on(place):
  """With nothing to do before training: the parts that `finish` has made do not stand in the way."""
  config = training(place, steps=1, warmup=0, loss={"name": "labels"}, trainable=["layers/*"])
  finish = [{"name": "round_to_nearest", "at": "layers/*", "bits": 4, "group_size": 32}]
  config = check({**config.model_dump(mode="json"), "recipe": [], "finish": finish}, "finish")

  class Cut:
    def step(self, what, done, total):
      if what.startswith("round") and done == 3:
        raise KeyboardInterrupt

    def note(self, text):
      return

  with pytest.raises(KeyboardInterrupt):
    experiment.run(config, place / "finish", COMMAND, Cut())
  again, straight = (experiment.run(config, place / name, COMMAND) for name in ("finish", "at once"))
  assert again["tree_hash"] == straight["tree_hash"]
  assert not {"blocks", "finished"} & {p.name for p in (place / "finish" / config.folder).iterdir()}


@pytest.mark.parametrize(("over", "said"), [
  ({"length": 400}, "more than the model's context"), ({"batch": 4000}, "give more rows"),
  ({"trainable": ["layers/*", "**/delta"]}, r"'\*\*/delta' selects none of \d+ arrays that may train; nearest: embed"),
  ({"windows": 9000}, "use windows: 106 or a longer text"),
])  # fmt: skip
def test_training_that_cannot_be(place, over, said):
  with pytest.raises(LmcompressError, match=said):
    experiment.run(training(place, **over), place / "refused", COMMAND)


@pytest.mark.parametrize(("key", "value"), [
  ("loss", {"name": "distil"}), ("warmup", 4), ("accumulate", 3), ("learning_rate", 0), ("schedule", "step"),
  ("trainable", []), ("lr", 1.0), ("during", [{"name": "magnitude", "sparsity": 0.5}]), ("during", [{"name": "x"}]),
])  # fmt: skip
def test_training_tables_are_checked(place, key, value):
  with pytest.raises(LmcompressError, match="train"):
    training(place, **{key: value})


def test_a_profile_is_in_the_report_and_opens_in_tensorboard(place):
  """The operations that took longest, what the step needs, and a trace file of three steps."""
  config = training(place, steps=6)
  result = experiment.run(config, place / "profiled", COMMAND, profile=True)
  folder = place / "profiled" / config.folder
  assert len(list(folder.glob("tensorboard/plugins/profile/*/*.xplane.pb"))) == 1
  assert result["profile"] and 0 < sum(row["share"] for row in result["profile"]) <= 1 + 1e-9
  assert [row["ms"] for row in result["profile"]] == sorted((row["ms"] for row in result["profile"]), reverse=True)
  needs = result["training"]["needs"]
  assert needs["flops"] > 0 and needs["peak_bytes"] > needs["temporaries"] > 0
  page = (folder / "report.html").read_text("utf-8")
  assert "<h2>Profile</h2>" in page and "MB at once" in page
  spent = result["energy"]
  assert spent is None or (spent["label"] in ("measured", "modelled") and spent["joules"] > 0 and "energy, kJ" in page)


def test_a_profile_without_training_is_of_decoding(place):
  config = training(place)
  config = config.model_copy(update={"train": None, "finish": (), "name": "untrained"})
  with pytest.raises(lmc.ConfigError, match="context of 256"):
    experiment.run(config, place / "profiled", COMMAND, profile=True)
  config = config.model_copy(update={"bench": config.bench.model_copy(update={"prefill": 16, "decode": 4})})
  result = experiment.run(config, place / "profiled", COMMAND, profile=True)
  assert result["profile"] and result["training"] is None


@pytest.mark.parametrize("over", [
  {"match": {"hidden": 1.0, "relations": 0.5, "heads": 4}},
  {"teacher_top_k": 8},
  {"generated": {"by": "student", "share": 0.5, "prompt": 8}, "loss": {"name": "distill", "kind": "reverse"}},
  {"written": {"rows": 8, "batch": 4}},
])  # fmt: skip
def test_other_ways_to_distill_run_from_a_config(place, over):
  config = training(place, **over)
  result = experiment.run(config, place / "ways", COMMAND)
  assert (place / "ways" / config.folder / "training" / "written").is_dir() == ("written" in over)
  text = next(iter(result["stages"][0]["kl"]))
  before, trained = result["stages"][1:3]
  assert trained["kl"][text] < before["kl"][text]


class Notes(Silent):
  """What a run says."""

  def __init__(self):
    self.notes = []

  def note(self, text):
    self.notes.append(text)


@pytest.mark.parametrize("axis", ["fsdp", "pipe"])
def test_a_config_trains_over_a_mesh(axis, place):
  """The same config plus a `mesh` table: the same losses, and scores to rounding."""
  config = training(place, optimizer="sgd", learning_rate=0.1)
  sizes = {"data": 2, axis: 2, "tensor": 2, "rules": {"vocab": None}}
  spread, told = check({**config.model_dump(mode="json"), "mesh": sizes}, "spread"), Notes()
  alone, result = (experiment.run(c, place / "spread", COMMAND, told) for c in (config, spread))
  assert any(note.startswith("each of 8 devices (data=2, fsdp=2, tensor=2) holds") for note in told.notes)
  assert any("layers/*/mlp/up/kernel  [" in note for note in told.notes)
  text = next(iter(alone["stages"][0]["kl"]))
  for a, b in zip(alone["training"]["history"], result["training"]["history"], strict=True):
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
  assert result["stages"][-1]["kl"][text] == pytest.approx(alone["stages"][-1]["kl"][text], rel=1e-2)
