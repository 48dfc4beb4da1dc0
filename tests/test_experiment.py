"""Experiments: a run folder holds what it promises, and a run that was cut off ends with the same numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from small_model import byte_level, random_params

import lmcompress as lmc
from lmcompress import experiment, measuring, run_folder
from lmcompress import recipe as recipes
from lmcompress.config import check, load_config, merge
from lmcompress.data.labelled import Labelled
from lmcompress.data.pairs import Pairs
from lmcompress.data.questions import Question, Questions
from lmcompress.data.tagged import Tagged
from lmcompress.errors import GateError
from lmcompress.io import checkpoint
from lmcompress.io.checkpoint import tree_hash
from lmcompress.io.whole import write_text
from lmcompress.judged_tasks import judged_task
from lmcompress.models import T5, Bert, BertConfig, BertSizes, Llama, LlamaConfig, T5Config, T5Sizes
from lmcompress.stages import Silent
from lmcompress.types import ConfigError, FormatError, LmcompressError

RECIPE = [
  {"name": "magnitude", "at": "layers/*/mlp/down", "sparsity": 0.2},
  {"name": "round_to_nearest", "at": "layers/*/mlp/down", "bits": 4, "group_size": 32, "symmetric": False},
]
STAGES = ["original", "magnitude at layers/*/mlp/down", "round_to_nearest at layers/*/mlp/down"]
KEYS = {"format", "name", "description", "config_hash", "seed", "model", "original", "versions", "device",
        "tree_hash", "command",
        "config", "stages", "weights", "training", "profile", "energy", "histograms", "generation", "explain"}
STAGE_KEYS = {"name", "parameters", "bits_per_weight", "bytes_on_disk", "bytes_in_memory",
              "compression_efficiency", "perplexity",
              "kl", "top1", "accuracy", "tasks", "tokens_per_s", "backend", "seconds", "peak_memory_bytes"}
COMMAND = "lmcompress run tiny.yaml"
WINDOWS = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with a saved model, a text, and a config that points at them."""
  place = tmp_path_factory.mktemp("place")
  lmc.save(place / "base", Llama(LlamaConfig(head_dim=16, max_length=256)), random_params(), byte_level())
  words = np.random.default_rng(0).choice(["green", "eggs", "and", "ham", "I", "do", "not", "like", "them"],
                                          400)
  (place / "text.txt").write_text(" ".join(words))
  table = {
    "name": "tiny", "model": str(place / "base"), "recipe": RECIPE,
    "evaluate": {"texts": [str(place / "text.txt")], "windows": WINDOWS, "length": 32},
    "bench": {"prefill": 16, "decode": 112, "rounds": 1},  # the shapes of generation: compiled once for both
    "generate": {"prompt": "I do", "max_new_tokens": 4},
  }
  (place / "tiny.yaml").write_text(yaml.safe_dump(table))
  return place


@pytest.fixture(scope="module")
def config(place):
  return load_config(place / "tiny.yaml")


@pytest.fixture(scope="module")
def whole(config, place):
  """The folder of a run that nothing broke."""
  experiment.run(config, place / "whole", COMMAND)
  return place / "whole" / config.folder


@pytest.fixture(scope="module")
def result(whole):
  return json.loads((whole / "result.json").read_text())


def lines(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(result):
  """What must not depend on how often a run was cut off; seconds and speeds are measured anew."""
  kept = ("name", "parameters", "bits_per_weight", "bytes_on_disk", "bytes_in_memory", "perplexity", "kl",
          "top1")
  return [{key: stage[key] for key in kept}
          for stage in result["stages"]], result["tree_hash"], result["generation"]


# ----------------------------------------------------------------------------------- what a run leaves


def test_the_result_has_the_keys_of_the_contract(result, config):
  assert set(result) == KEYS and result["format"] == 1
  assert (result["name"], result["config_hash"], result["seed"], result["command"]) == ("tiny", config.hash,
                                                                                        0, COMMAND)
  assert {"jax", "jaxlib", "numpy", "python", "lmcompress"} <= set(result["versions"])
  assert {"platform", "name", "devices", "cores"} <= set(result["device"])
  assert check(result["config"], "result") == config
  assert result["original"] == "as saved"
  assert set(result["generation"]) == {"prompt", "before",
                                       "after"} and result["generation"]["prompt"] == "I do"


def test_a_stage_for_the_original_and_each_link(result, config):
  text, = config.evaluate.texts
  assert [stage["name"] for stage in result["stages"]] == STAGES
  for stage in result["stages"]:
    assert set(stage) == STAGE_KEYS
    assert set(stage["perplexity"]) == set(stage["kl"]) == set(stage["top1"]) == {text}
    assert set(stage["tokens_per_s"]) == {"prefill", "decode"} and min(stage["tokens_per_s"].values()) > 0
    assert stage["perplexity"][text] > 1 and stage["seconds"] >= 0
    assert stage["peak_memory_bytes"] > 0 and stage["backend"]
  first, pruned, last = result["stages"]
  assert first["bits_per_weight"] == 32 and first["kl"][text] == 0 and first["top1"][text] == 1
  assert first["compression_efficiency"] == 0 and last["compression_efficiency"] > 0.1
  assert pruned["kl"][text] > 0 and last["kl"][text] > pruned["kl"][text]
  assert last["bits_per_weight"] < 28 and len({stage["parameters"] for stage in result["stages"]}) == 1


def test_the_folder_holds_model_report_config_and_records(whole, config, result):
  assert {p.name for p in whole.iterdir()} == {"config.yaml", "metrics.jsonl", "model", "report.html",
                                               "result.json", "tensorboard"}
  assert load_config(whole / "config.yaml") == run_folder.read_run(whole) == config
  model, params, _ = lmc.load(whole / "model")
  assert tree_hash(params) == result["tree_hash"]
  assert (whole / "model" / "weights.safetensors").stat().st_size == result["stages"][-1]["bytes_on_disk"]
  assert json.loads((whole / "model" / "manifest.json").read_text())["body"]["recipe"] == RECIPE
  assert result["config_hash"] in (whole / "report.html").read_text()
  assert any((whole / "tensorboard").iterdir())
  assert model.config.head_dim == 16


def test_the_weights_table_has_a_row_for_each_weight_and_link(result):
  rows = {(row["link"], row["path"]) for row in result["weights"]}
  assert len(rows) == len(result["weights"]) == 2 + 2
  assert {link for link, _ in rows} == set(STAGES[1:])
  assert all(len(h["edges"]) == len(h["before"]) + 1 == len(h["after"]) + 1
             for h in result["histograms"].values())


def test_the_perplexities_are_those_of_the_public_function(whole, place, result, config):
  """The same windows through `lmc.perplexity`: both sum float32 over 31 tokens a window, so 1e-5 is wide."""
  from lmcompress.data.text import load_text, windows

  text, = config.evaluate.texts
  for folder, stage in ((place / "base", result["stages"][0]), (whole / "model", result["stages"][-1])):
    model, params, tokenizer = lmc.load(folder)
    tokens = windows(tokenizer, load_text(text), config.evaluate.windows, config.evaluate.length)
    assert lmc.perplexity(model, params, tokens) == pytest.approx(stage["perplexity"][text], rel=1e-5)


def test_metrics_have_a_line_for_each_window_and_stage(whole, config, result):
  rows = lines(whole)
  assert [row["kind"] for row in rows] == ["tree"] + ["score"] * WINDOWS + ["latency"] * len(STAGES)
  assert [row["window"] for row in rows if row["kind"] == "score"] == list(range(WINDOWS))
  assert rows[0]["tree_hash"] == result["tree_hash"]


def test_a_complete_run_is_shown_and_not_run_again(whole, config, place, result, monkeypatch):
  monkeypatch.setattr(experiment, "load", lambda *_: pytest.fail("the model was loaded"))
  assert experiment.run(config, place / "whole", "another command") == result


def test_a_run_without_a_recipe_bench_or_generation(place, tmp_path):
  config = load_config(place / "tiny.yaml",
                       ["recipe=[]", "bench.rounds=0", "generate=null", "evaluate.windows=1"])
  result = experiment.run(config, tmp_path, COMMAND)
  assert [stage["name"] for stage in result["stages"]] == ["original"] and result["generation"] is None
  assert result["stages"][0]["tokens_per_s"] == {} and result["weights"] == []
  assert tree_hash(lmc.load(tmp_path / config.folder / "model")[1]) == result["tree_hash"]


# ------------------------------------------------------------------------- the seed decides everything


@pytest.mark.slow
def test_two_processes_give_the_same_tree(whole, place, result, tmp_path):
  """A third process, this one, agrees: of the same bits in the file, not only in the hash."""
  arguments = ["run", str(place / "tiny.yaml"), "bench.rounds=0", "generate=null", "evaluate.windows=1"]
  started = [
    subprocess.Popen([sys.executable, "-m", "lmcompress.cli", *arguments, "--results", str(tmp_path / name)],
                     cwd=tmp_path,
                     env={**os.environ, "PYTHONHASHSEED": name}, stdout=subprocess.PIPE,
                     stderr=subprocess.PIPE, text=True)
    for name in ("1", "2")
  ]
  hashes, weights = [], Path("model", "weights.safetensors")
  for process, name in zip(started, ("1", "2"), strict=True):
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    folder, = (tmp_path / name).iterdir()
    hashes.append(json.loads((folder / "result.json").read_text())["tree_hash"])
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()
  assert hashes == [result["tree_hash"]] * 2


def test_another_seed_changes_only_what_is_drawn(place, result):
  """This recipe draws nothing; a method that asks for a key must change with it."""
  model, params, _ = lmc.load(place / "base")
  link = recipes.build(RECIPE)
  assert "key" not in link.needs
  one, two = (tree_hash(lmc.compress(model, params, link, key=jax.random.key(seed))[0]) for seed in (0, 1))
  assert one == two == result["tree_hash"]

  def jitter(w, *, key):
    return w + jax.random.normal(key, w.shape)

  noise = lmc.at("layers/0/attn/k", lmc.leafwise(jitter))
  one, again, two = (tree_hash(lmc.compress(model, params, noise, key=jax.random.key(seed))[0])
                     for seed in (0, 0, 1))
  assert one == again != two


# ------------------------------------------------------------------------------- runs that are cut off


class Stop:
  """A watcher that interrupts after so many windows."""

  def __init__(self, after):
    self.after = after

  def step(self, what, done, total):
    if what.startswith("perplexity"):
      self.after -= 1
      if self.after == 0:
        raise KeyboardInterrupt

  def note(self, text):
    return


def finish(config, results, result, counted):
  """Resumes, and checks that nothing is scored twice and the numbers are those of the unbroken run."""
  scored, compare = [], measuring.compare

  def spy(*args):
    for window, scores in compare(*args):
      scored.append(window)
      yield window, scores

  measuring.compare = spy
  try:
    found = experiment.run(config, results, COMMAND)
  finally:
    measuring.compare = compare
  rows = lines(results / config.folder)
  windows = [row["window"] for row in rows if row["kind"] == "score"]
  assert sorted(windows) == list(range(WINDOWS)) and scored == counted
  assert len([row for row in rows if row["kind"] == "tree"]) == 1
  assert [row["stage"] for row in rows if row["kind"] == "latency"] == [f"{i}:{name}" for i,
                                                                        name in enumerate(STAGES)]
  assert numbers(found) == numbers(result)


@pytest.mark.parametrize("after", [1, 3])
def test_a_run_cut_off_between_windows_goes_on(config, result, tmp_path, after):
  with pytest.raises(KeyboardInterrupt):
    experiment.run(config, tmp_path, COMMAND, Stop(after))
  assert not (tmp_path / config.folder / "result.json").exists()
  assert len(lines(tmp_path / config.folder)) == 1 + after
  finish(config, tmp_path, result, list(range(after, WINDOWS)))


def test_a_run_cut_off_while_timing_goes_on(config, result, tmp_path, monkeypatch):
  calls, latency = [], measuring.latency

  def stop(*args, **options):
    calls.append(args)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return latency(*args, **options)

  monkeypatch.setattr(measuring, "latency", stop)
  with pytest.raises(KeyboardInterrupt):
    experiment.run(config, tmp_path, COMMAND)
  before = lines(tmp_path / config.folder)
  finish(config, tmp_path, result, [])
  assert lines(tmp_path / config.folder)[:len(before)] == before and len(calls) == 4


def test_a_run_cut_off_while_saving_goes_on(config, result, tmp_path, monkeypatch):
  def stop(*_, **__):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(experiment.checkpoint, "save", stop)
    with pytest.raises(KeyboardInterrupt):
      experiment.run(config, tmp_path, COMMAND)
  finish(config, tmp_path, result, list(range(WINDOWS)))


@pytest.mark.parametrize("torn", [b'{"kind": "sco',
                                  b'{"kind": "score", "text": "t", "window": 3, "scores": {}}', b"\0\0\0",
                                  b"\xff"])
def test_a_torn_last_line_is_dropped(config, result, tmp_path, torn):
  """Only a line with its end is whole, even if what stands there parses."""
  with pytest.raises(KeyboardInterrupt):
    experiment.run(config, tmp_path, COMMAND, Stop(2))
  with (tmp_path / config.folder / "metrics.jsonl").open("ab") as file:
    file.write(torn)
  finish(config, tmp_path, result, [2, 3])


def records(config, folder, content):
  """A run folder with nothing but a config and these records."""
  path = folder / config.folder
  path.mkdir(parents=True)
  (path / "metrics.jsonl").write_bytes(content)
  return path


@pytest.mark.parametrize("content", [
  b"nothing\n", b"\xff\n", b"\0\n", b"1\n", b"[]\n", b"null\n", b'{"kind": "tree"}\n', b'{"kind": "score"}\n',
  b'{"kind": "score", "text": "t", "window": 0}\n',
])
def test_damaged_records_are_named(config, tmp_path, content):
  path = records(config, tmp_path, content)
  with pytest.raises(FormatError, match=r"metrics\.jsonl"):
    experiment.run(config, tmp_path, COMMAND)
  assert (path / "metrics.jsonl").read_bytes() == content and not (path / "result.json").exists()


def test_records_of_another_tree_are_refused(config, tmp_path):
  records(config, tmp_path, b'{"kind": "tree", "tree_hash": "00"}\n')
  with pytest.raises(FormatError, match=r"metrics\.jsonl: it was written for another tree; remove"):
    experiment.run(config, tmp_path, COMMAND)


def test_records_of_more_processes_are_taken_anew(config, result, tmp_path):
  """Other sums, another tree: what was measured then is forgotten, and the rest is as without it."""
  old = b'{"kind": "tree", "tree_hash": "00", "processes": 4}\n'
  score = b'{"kind": "score", "text": "t", "window": 0, "scores": {}}\n'
  path = records(config, tmp_path, old + score)
  found = experiment.run(config, tmp_path, COMMAND)
  assert found["tree_hash"] == result["tree_hash"]
  assert [stage["perplexity"] for stage in found["stages"]] == [stage["perplexity"] for stage in result["stages"]]
  rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
  assert rows[0] == {"kind": "tree", "tree_hash": result["tree_hash"], "processes": 1}
  assert all(row.get("text") != "t" for row in rows)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '{"name": "x"}', '{"stages": []}', "\x00"])
def test_a_damaged_result_is_named(tmp_path, text):
  (tmp_path / "result.json").write_text(text)
  with pytest.raises(FormatError, match=r"result\.json: not a result; remove it and resume the run"):
    run_folder.read_result(tmp_path)


def test_a_run_that_is_not_complete_says_how_to_go_on(config, tmp_path):
  with pytest.raises(lmc.SourceError, match=r"has no result\.json; it is no run folder"):
    run_folder.read_result(tmp_path)
  folder = run_folder.prepare(config, tmp_path)
  with pytest.raises(lmc.SourceError, match=f"`lmcompress resume {folder}` continues it"):
    run_folder.read_result(folder)
  with pytest.raises(lmc.SourceError, match=r"has no config\.yaml; resume takes a run folder"):
    run_folder.read_run(tmp_path)
  assert list(run_folder.run_folders(tmp_path)) == [folder]
  assert list(run_folder.run_folders(tmp_path / "none")) == []


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / "x.json"
  write_text(path, "old")

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="No space left"):
    write_text(path, "new")
  assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("overrides", [["evaluate.length=300", "evaluate.windows=1"], ["bench.prefill=300"]],
                         ids=["evaluate", "bench"])
def test_more_tokens_than_the_context_are_refused_before_anything_is_written(place, tmp_path, overrides):
  """At the door: not after the model was compressed and saved and the text scored."""
  config = load_config(place / "tiny.yaml", overrides)
  with pytest.raises(LmcompressError, match="context of 256"):
    experiment.run(config, tmp_path, COMMAND)
  assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------- gates


def test_a_run_that_loses_too_much_fails_and_names_the_worst(place, tmp_path):
  """The result is written all the same, and a second look at it fails too; a generous gate lets it through."""
  small = ["recipe=[{name: gptq, bits: 2, group_size: 16}]", "bench.rounds=0", "generate=null",
           f"calibration={{text: '{place / 'text.txt'}', windows: 2, length: 32}}"]
  config = load_config(place / "tiny.yaml", [*small, "gates={max_kl: 1.0e-6, max_perplexity_ratio: 100.0}"])
  for _ in range(2):
    with pytest.raises(GateError, match=r"max_kl is .* on .*text.txt, 1e-06 is allowed; .* layers/\d") as caught:
      experiment.run(config, tmp_path, COMMAND)
  assert "max_perplexity_ratio" not in str(caught.value)
  written = json.loads((tmp_path / config.folder / "result.json").read_text())
  rows = sorted(written["weights"], key=lambda row: -row["output_error"])
  assert [str(caught.value).count(row["path"]) for row in rows[:4]] == [1, 1, 1, 0]
  assert "Output error by layer" in (tmp_path / config.folder / "report.html").read_text()
  passed = load_config(place / "tiny.yaml", [*small, "gates={max_kl: 100.0}"])
  assert experiment.run(passed, tmp_path, COMMAND)["stages"][-1]["kl"]
  assert load_config(place / "tiny.yaml", [*small, "gates=null"]).hash == load_config(place / "tiny.yaml", small).hash


# ---------------------------------------------------------------------------------------------- meshes


@pytest.mark.slow
def test_a_mesh_of_eight_devices_gives_the_same_tree_and_perplexity(place, whole, config, result, tmp_path):
  """Codes to the bit; perplexity within 1e-4 relative, as sums over a split axis add in another order."""
  over = ["mesh={data: 2, tensor: 4, rules: {kv: null}}"]
  spread = load_config(place / "tiny.yaml", [*over, "bench.rounds=0", "generate=null"])
  found = experiment.run(spread, tmp_path, COMMAND)
  assert found["tree_hash"] == result["tree_hash"] and spread.hash != config.hash
  text, = config.evaluate.texts
  for ours, local in zip(found["stages"], result["stages"], strict=True):
    assert ours["perplexity"][text] == pytest.approx(local["perplexity"][text], rel=1e-4)
    assert ours["bits_per_weight"] == local["bits_per_weight"]
  ours, local = (folder / "model" / "weights.safetensors" for folder in (tmp_path / spread.folder, whole))
  assert ours.read_bytes() == local.read_bytes()


def test_a_mesh_larger_than_the_machine_is_refused(place, tmp_path):
  for mesh in ("{data: 4, tensor: 4}", "{data: 0}", "{data: -1, tensor: -1}"):
    with pytest.raises(lmc.ConfigError, match="mesh data="):
      experiment.run(load_config(place / "tiny.yaml", [f"mesh={mesh}"]), tmp_path, COMMAND)
  assert list(tmp_path.iterdir()) == []


def test_blocks_of_another_model_or_text_are_not_used(place, config, tmp_path):
  """What decides a compression names the model's files and the calibration tokens, not their paths alone."""
  tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
  first = experiment._decides(config, tokens)
  assert first == experiment._decides(config, tokens.copy())
  assert first != experiment._decides(config, tokens[::-1])
  weights = place / "base" / "weights.safetensors"
  before = weights.stat()
  os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
  assert first != experiment._decides(config, tokens)
  os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


# ----------------------------------------------------------------------------------- training


def training(place, **over):
  text = str(place / "text.txt")
  table = yaml.safe_load((place / "tiny.yaml").read_text())
  train = {"text": text, "length": 16, "steps": 4, "batch": 4, "learning_rate": 1e-3, "save_every": 2,
           "loss": {"name": "distill"}, "trainable": ["layers/*/mlp"],
           "held_out": {"text": text, "windows": 4, "length": 16}, **over}
  recipe = [{"name": "fake_quantize", "at": "layers/*/mlp", "bits": 3, "group_size": 32}]
  return check({**table, "name": "trained", "recipe": recipe, "train": train, "finish": [{"name": "freeze"}],
                "bench": {"rounds": 0}, "generate": None}, "trained")


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
  ({"mesh": {"pipe": 2}}, "tasks are learned without a pipeline"),
])  # fmt: skip
def test_tables_of_tasks_are_checked(over, said):
  table = {"name": "t", "model": "m", "recipe": [], "train": {"steps": 2}, "tasks": [{"name": "a", "data": "bbc"}]}
  with pytest.raises(lmc.ConfigError, match=said):
    check(merge(table, over), "tasks")


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


# encoders


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


def test_a_report_explains_what_matters_and_what_changed(place):
  table = load_config(place / "tiny.yaml").model_dump(mode="json") | {
    "name": "explained", "explain": {"text": str(place / "text.txt"), "windows": 2, "length": 16}, "generate": None,
    "bench": {"rounds": 0}, "evaluate": {"texts": []},
  }  # fmt: skip
  config = check(table, "explained.yaml")
  result = experiment.run(config, place / "explained", "lmcompress run explained.yaml")
  found = result["explain"]
  assert list(found["layers"]) == ["layers/0", "layers/1"] and len(found["tokens"]) == 2
  assert {row["block"] for row in found["drift"]} == {"layers/0", "layers/1"}
  assert max(row["change"] for row in found["drift"]) > 0
  page = (place / "explained" / config.folder / "report.html").read_text()
  for words in ("What matters, and what changed", "a layer is left out", "what matters along mlp", "after each token"):
    assert words in page


def test_what_comes_last_is_checked_first(place):
  """Nothing is compressed before it is known that the samples can be drawn and the text that explains is there."""
  table = load_config(place / "tiny.yaml").model_dump(mode="json") | {"name": "early"}
  for over, message in (
    ({"samples": {"judge": "tunes", "count": 10}}, "samples.judge: tunes: a sample has up to"),
    ({"explain": {"text": "grim"}}, "did you mean grimm"),
  ):
    config = check({**table, **over}, "early.yaml")
    with pytest.raises(LmcompressError, match=message):
      experiment.run(config, place / "early", "lmcompress run early.yaml")
    assert not (place / "early" / config.folder).exists()


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
