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
from small_run import COMMAND, RECIPE, WINDOWS

import lmcompress as lmc
from lmcompress import experiment, measuring, run_folder
from lmcompress import recipe as recipes
from lmcompress.config import check, load_config
from lmcompress.errors import GateError
from lmcompress.io.checkpoint import tree_hash
from lmcompress.io.whole import write_text
from lmcompress.search import Measure
from lmcompress.stages import Silent
from lmcompress.types import FormatError, LmcompressError

STAGES = ["original", "magnitude at layers/*/mlp/down", "round_to_nearest at layers/*/mlp/down"]
KEYS = {"format", "name", "description", "config_hash", "seed", "model", "original", "versions", "device",
        "tree_hash", "command",
        "config", "stages", "weights", "training", "profile", "energy", "histograms", "generation", "explain"}
STAGE_KEYS = {"name", "parameters", "bits_per_weight", "bytes_on_disk", "bytes_in_memory",
              "compression_efficiency", "perplexity",
              "kl", "top1", "accuracy", "tasks", "tokens_per_s", "backend", "seconds", "peak_memory_bytes"}


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


def test_the_first_token_of_each_row_is_weighed_as_the_config_says(place):
  """In a run and in a search; 1 is no other config than none."""
  text = f"calibration={{text: '{place / 'text.txt'}', windows: 2, length: 32}}"
  plain, told, heavy = (
    load_config(place / "tiny.yaml", [text, *more])
    for more in ([], ["calibration.first_weight=1.0"], ["calibration.first_weight=9.0"])
  )
  assert plain.hash == told.hash != heavy.hash
  model, _, tokenizer = lmc.load(plain.model)
  assert isinstance(experiment._calibration(plain, model, tokenizer, {}), np.ndarray)
  searched = Measure(heavy, [], place / "search", Silent()).calibration
  for given in (experiment._calibration(heavy, model, tokenizer, {}), searched):
    assert isinstance(given, dict)
    np.testing.assert_array_equal(given["weights"], np.where(np.arange(32) == 0, 9.0, 1.0)[None].repeat(2, axis=0))


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
