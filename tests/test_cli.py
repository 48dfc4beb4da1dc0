"""The command line: each verb works on a small model; what a user can mend is one line and exit code 2."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import yaml
from gguf import GGUFWriter
from safetensors.numpy import save_file
from small_model import byte_level, random_params

import lmcompress as lmc
from lmcompress import cli, tree
from lmcompress.models import T5, Llama, LlamaConfig, T5Config, T5Sizes

VERBS = ("run", "resume", "validate", "ls", "cp", "eval", "generate", "bench", "inspect", "report", "compare",
         "export", "env")
PATH = "layers/0/mlp/down/kernel"
RECIPE = [
  {"name": "magnitude", "at": "layers/*/mlp/down", "sparsity": 0.2},
  {"name": "round_to_nearest", "at": "layers/*/mlp/down", "bits": 4, "group_size": 32, "symmetric": False},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder such as a user works in: a model, a text, and configs."""
  home = tmp_path_factory.mktemp("home")
  model = Llama(LlamaConfig(head_dim=16, max_length=256))
  lmc.save(home / "base", model, random_params(), byte_level())
  (home / "text.txt").write_text("Sam I am. I do not like green eggs and ham. " * 300)
  (home / "configs").mkdir()
  (home / "configs" / "common.yaml").write_text(yaml.safe_dump({
    "name": "common", "model": "base", "recipe": [],
    "evaluate": {"texts": ["text.txt"], "windows": 2, "length": 32},
    "bench": {"prefill": 16, "decode": 112, "rounds": 1}, "generate": {"prompt": "I do", "max_new_tokens": 4},
  }))
  (home / "configs" / "tiny.yaml").write_text(
    "# Shows: a small model.\n# Run: lmcompress run configs/tiny.yaml\n" +
    yaml.safe_dump({"extends": "common.yaml", "name": "tiny", "recipe": RECIPE}))
  return home


@pytest.fixture
def lmcompress(home, monkeypatch, capsys):
  """`lmcompress(*arguments) -> (exit code, standard output, standard error)` in the home folder."""
  monkeypatch.chdir(home)

  def call(*arguments):
    monkeypatch.setattr(sys, "argv", ["lmcompress", *map(str, arguments)])
    capsys.readouterr()
    code = 0
    try:
      cli.main()
    except SystemExit as stop:
      code = stop.code or 0
    out, err = capsys.readouterr()
    return code, out, err

  return call


@pytest.fixture(scope="module")
def done(home):
  """The folder of a complete run."""
  here, arguments = os.getcwd(), sys.argv
  os.chdir(home)
  try:
    sys.argv = ["lmcompress", "run", "configs/tiny.yaml"]
    cli.main()
  except SystemExit as stop:
    assert not stop.code
  finally:
    os.chdir(here)
    sys.argv = arguments
  folder, = (home / "results").glob("tiny-*")
  return folder.relative_to(home)


def one_line(found, *words):
  """What an error looks like: exit code 2, one line on standard error, no traceback anywhere."""
  code, out, err = found
  assert code == 2, (out, err)
  assert err.startswith("lmcompress: ") and err.count("\n") == 1 and err.endswith("\n"), err
  assert "Traceback" not in out + err
  for word in words:
    assert re.search(word, err), err


# ----------------------------------------------------------------------------------------------- verbs


def test_run_shows_a_table_and_where_things_are(lmcompress, done):
  """A second run of a complete one shows the same."""
  code, out, err = lmcompress("run", "tiny")
  assert code == 0 and err == "" and "complete already" in out
  for word in ("original", "magnitude", "at layers/*/mlp/down", "prompt: I do", "before:", "after:",
               f"report: {done}/report.html",
               f"model: {done}/model", "repeat: lmcompress run configs/tiny.yaml"):
    assert word in out, out
  result = json.loads(Path(done, "result.json").read_text())
  assert result["command"] == "lmcompress run configs/tiny.yaml" and len(result["stages"]) == 3


def test_overrides_are_part_of_the_command_and_the_folder(lmcompress, tmp_path):
  code, out, _ = lmcompress("run", "tiny", "recipe=[]", "bench.rounds=0", "generate=null",
                            "evaluate.windows=1", "--results", tmp_path)
  folder, = tmp_path.iterdir()
  assert code == 0 and "lmcompress run configs/tiny.yaml 'recipe=[]' bench.rounds=0" in out
  assert json.loads((folder / "result.json").read_text())["config"]["evaluate"]["windows"] == 1


def test_resume_of_a_complete_run(lmcompress, done):
  code, out, _ = lmcompress("resume", done)
  assert code == 0 and "complete already" in out


def test_resume_goes_on(lmcompress, done, tmp_path):
  folder = tmp_path / done.name
  shutil.copytree(done, folder)
  (folder / "result.json").unlink()
  before = (folder / "metrics.jsonl").read_bytes()
  assert lmcompress("resume", folder)[0] == 0 and (folder / "metrics.jsonl").read_bytes() == before
  ours, theirs = (json.loads(Path(f, "result.json").read_text()) for f in (folder, done))
  for key in ("tree_hash", "generation", "config_hash"):
    assert ours[key] == theirs[key]
  assert [s["perplexity"] for s in ours["stages"]] == [s["perplexity"] for s in theirs["stages"]]


def test_validate_prints_the_resolved_config(lmcompress):
  code, out, _ = lmcompress("validate", "configs/tiny.yaml", "recipe.1.bits=3")
  resolved = yaml.safe_load(out)
  assert code == 0 and resolved["recipe"][1]["bits"] == 3
  assert resolved["model"] == "base" and "extends" not in resolved
  assert re.search(r"# valid; runs in results/tiny-[0-9a-f]{8}\n$", out)


def test_ls_lists_configs_models_texts_and_runs(lmcompress, done):
  code, out, _ = lmcompress("ls")
  assert "tweets" in out and "bible-en-es" in out
  assert code == 0
  for word in ("configs/tiny.yaml", "Shows: a small model.", "smollm2-135m", "pydoc", "grimm", str(done),
               "complete"):
    assert word in out, out


def test_cp_gives_a_config_that_runs_the_same(lmcompress, home, tmp_path):
  target = tmp_path / "new" / "mine.yaml"
  code, out, _ = lmcompress("cp", "tiny", target)
  assert code == 0 and str(target) in out.replace("\n", "")
  assert target.read_text().startswith("# Shows: a small model.\n")
  _, ours, _ = lmcompress("validate", target)
  _, theirs, _ = lmcompress("validate", "tiny")
  assert ours == theirs
  one_line(lmcompress("cp", "tiny", target), "exists already; it is not overwritten")


def test_eval_measures_and_compares(lmcompress, done):
  result = json.loads(Path(done, "result.json").read_text())
  code, out, _ = lmcompress("eval", done / "model", "--text", "text.txt", "--windows", "2", "--length", "32")
  shown = re.search(r"text\.txt\W+(\d+\.\d+)", out)
  assert code == 0 and float(shown[1]) == pytest.approx(result["stages"][-1]["perplexity"]["text.txt"],
                                                        rel=1e-5)
  code, out, _ = lmcompress("eval", done / "model", "--against", "base", "--text", "text.txt", "--windows",
                            "2", "--length", "32")
  shown = re.search(r"text\.txt\W+(\d+\.\d+)\W+(\d+\.\d+)", out)
  assert code == 0 and "KL" in out
  assert float(shown[2]) == pytest.approx(result["stages"][-1]["kl"]["text.txt"], abs=1e-5)


def test_generate_streams_a_continuation(lmcompress, done, monkeypatch):
  result = json.loads(Path(done, "result.json").read_text())
  code, out, _ = lmcompress("generate", done / "model", "I do", "-n", "4")
  assert code == 0 and out == result["generation"]["after"] + "\n"
  _, sampled, _ = lmcompress("generate", done / "model", "I do", "-n", "4", "--temperature", "1", "--seed",
                             "1")
  _, again, _ = lmcompress("generate", done / "model", "I do", "-n", "4", "--temperature", "1", "--seed", "1")
  assert sampled == again


def test_bench_prints_a_table_and_writes_json_and_a_plot(lmcompress, tmp_path, quick_machine):
  arguments = ("bench", "base", "--bits", "4", "--group-size", "32", "--prefill", "16", "--depth", "16", "--depth", "0",
               "--batch", "1", "--batch", "2", "--decode", "3", "--rounds", "2", "--watts", "7")
  code, out, err = lmcompress(*arguments, "--json", tmp_path / "b.json", "--plot", tmp_path / "b.svg")
  assert code == 0 and err == ""
  for word in ("base at 4 bits in groups of 32", "prefill 16", "decode 3 at depth 0", "backend", "float32 activations",
               "float32 keys and values", "b.json", "b.svg"):
    assert word in out.replace("\n", ""), out
  found = json.loads((tmp_path / "b.json").read_text())
  rows = {(row["phase"], row["batch"], row["length"]): row for row in found["rows"]}
  assert set(rows) == {("prefill", b, 16) for b in (1, 2)} | {("decode", b, n) for b in (1, 2) for n in (0, 16)}
  for row in rows.values():
    rate = row["tokens_per_s"]
    assert 0 < rate["minimum"] <= rate["lower_quartile"] <= rate["median"] <= rate["maximum"]
    assert row["peak_memory_bytes"] > row["above_runtime_bytes"] >= 0 and row["bytes_per_token"] > 0
    assert row["energy"] in ("measured", "modelled") and row["joules_per_token"] > 0
  assert rows["prefill", 1, 16]["first_token_s"] == rows["prefill", 1, 16]["seconds"]["median"]
  assert rows["decode", 1, 16]["kv_bytes_per_token"] > rows["decode", 1, 0]["kv_bytes_per_token"]
  assert rows["decode", 2, 0]["weight_bytes_per_token"] == pytest.approx(
    rows["decode", 1, 0]["weight_bytes_per_token"] / 2)
  svg = (tmp_path / "b.svg").read_text()
  assert "<svg" in svg and "decode, batch 2" in svg and "GFLOP/s" in svg


def test_bench_prints_json_of_a_recipe(lmcompress, quick_machine):
  code, out, _ = lmcompress("bench", "base", "--recipe", "tiny", "--prefill", "16", "--depth", "16", "--decode", "2",
                            "--rounds", "1", "--cache", "int8", "--backend", "reference", "--json", "-")
  found = json.loads(out)
  assert code == 0 and found["machine"]["backend"] == "reference (XLA cpu)" and found["machine"]["cache"] == "int8"
  assert [link["name"] for link in found["recipe"]] == ["magnitude", "round_to_nearest"]
  assert found["model"]["bits_per_weight"] < 32 and len(found["rows"]) == 2


@pytest.fixture
def quick_machine(monkeypatch):
  """Bounds of the machine that are not measured."""
  from lmcompress.evaluate import bench

  monkeypatch.setattr(bench, "_bandwidth", lambda: 1e10)
  monkeypatch.setattr(bench, "_peak", lambda: 1e11)


def test_env_shows_what_runs_each_form(lmcompress):
  code, out, _ = lmcompress("env", "--kernels")
  assert code == 0
  for row in lmc.backends():
    assert row["form"].split(" ")[0] in out, out


def test_inspect_shows_the_tree_and_its_errors(lmcompress, done):
  code, out, _ = lmcompress("inspect", done / "model")
  row = next(line for line in out.splitlines() if PATH in line)
  assert code == 0 and "int4 g32 asym" in row and "128x64" in row and re.search(r"0\.\d{4}\s*$", row)
  assert "layers/1..1" in out and "bits per weight" in out
  code, out, _ = lmcompress("inspect", "base", "--all")
  assert code == 0 and "layers/1/mlp/down/kernel" in out and "float32" in out


def test_report_writes_the_page_again(lmcompress, done):
  page = Path(done, "report.html")
  text = page.read_text()
  page.unlink()
  code, out, _ = lmcompress("report", done)
  assert code == 0 and "original" in out and str(page) in out and page.read_text() == text


def test_compare_puts_runs_side_by_side(lmcompress, done):
  code, out, _ = lmcompress("compare", done, done)
  assert code == 0 and out.count(done.name) == 2


def test_env_shows_versions_and_devices(lmcompress):
  code, out, _ = lmcompress("env")
  assert code == 0
  for word in ("lmcompress", "jax", "devices", "8 x cpu", "compiler", "isa", "cuda", "cudnn"):
    assert word in out, out


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_shows_an_example(lmcompress, verb):
  code, out, _ = lmcompress(*filter(None, [verb, "--help"]))
  assert code == 0 and "lmcompress" in out
  assert all(name in out for name in VERBS) if not verb else f"lmcompress {verb}" in out


# -------------------------------------------------------------------------------- what a user can mend


def run_is_refused(lmcompress, tmp_path, *words, overrides=(), config="tiny"):
  """One line, and no run folder, not even an empty one."""
  results = tmp_path / "results"
  one_line(lmcompress("run", config, *overrides, "--results", results), *words)
  assert not results.exists() or list(results.iterdir()) == []


@pytest.mark.parametrize(("overrides", "words"), [
  (["recipe.0.at=layer/*/mlp"], ["'layer/\\*/mlp' selects no weight", "nearest paths: layers/"]),
  (["recipe.1.at=head"], ["'head' selects no weight", "nearest paths"]),
  (["recipe.1.group_size=256"], ["group_size=256", PATH, "a row has 128 inputs; use at most 128, or -1"]),
  (["recipe.0={name: magnitude, pattern: '3:7'}"], ["128 inputs|64 inputs", "not a multiple of 7"]),
  (["recipe.0.name=round_to_nearest"], ["sparsity", "it takes at, bits"]),
  (["recipe=[{name: round_to_nearest}, {name: round_to_nearest}]"],
   ["round_to_nearest at layers", "already stored as"]),
  (["evaluate.widnows=3"], ["evaluate.widnows"]),
  (["evalaute.windows=3"], ["no key 'evalaute'; keys are extends, name"]),
  (["evaluate.windows"], ["write key.path=value"]),
  (["model=nothing-here"], ["'nothing-here'", "no model has this name", "smollm2-135m"]),
  (["model=smollm2"], ["'smollm2'", "did you mean smollm2-135m"]),
  (["evaluate.texts=[nothing.txt]"], ["'nothing.txt'", "no file can be read there", "pydoc, grimm"]),
  (["evaluate.length=200", "evaluate.windows=100"],
   ["need 20000 tokens and the text has 13200", "use windows: 66 or length: 132"]),
  (["evaluate.length=300", "evaluate.windows=1"], ["300 tokens", "context of 256"]),
  (["bench.prefill=300"], ["prefill 300", "context of 256"]),
  (["calibration={text: text.txt, windows: 1000, length: 32}"], ["need 32000 tokens"]),
  (["mesh={data: 3, tensor: 3}"], ["asks for 9 devices, 8 are there"]),
], ids=range(17))
def test_a_run_that_cannot_be(lmcompress, tmp_path, overrides, words):
  run_is_refused(lmcompress, tmp_path, *words, overrides=overrides)


def test_a_text_shorter_than_a_window(lmcompress, tmp_path):
  (tmp_path / "short.txt").write_text("Sam")
  words = ("the text has 3", "use length: 3 or a longer text")
  run_is_refused(lmcompress, tmp_path, *words,
                 overrides=[f"evaluate.texts=[{tmp_path}/short.txt]", "evaluate.windows=1"])
  one_line(lmcompress("eval", "base", "--text", tmp_path / "short.txt", "--windows", "1", "--length", "32"),
           *words)


def small_gguf(path):
  """A file that is a GGUF's first part: header and metadata, and less data than it promises."""
  writer = GGUFWriter(path, "llama")
  writer.add_block_count(1)
  writer.add_tensor("token_embd.weight", np.ones((64, 32), np.float32),
                    raw_dtype=gguf.GGMLQuantizationType.F32)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  whole = path.read_bytes()
  path.write_bytes(whole[:-100])
  return path


def corrupt_folder(path):
  """A Hugging Face folder whose weights were cut."""
  path.mkdir()
  (path / "config.json").write_text(json.dumps({
    "model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}))
  save_file({"model.embed_tokens.weight": np.ones((64, 32), np.float32)}, path / "model.safetensors")
  whole = (path / "model.safetensors").read_bytes()
  (path / "model.safetensors").write_bytes(whole[:-1])
  return path


def flipped_checkpoint(path):
  """A saved folder with one byte changed in an array."""
  shutil.copytree("base", path)
  with (path / "weights.safetensors").open("r+b") as file:
    file.seek(-5, os.SEEK_END)
    byte = file.read(1)[0]
    file.seek(-5, os.SEEK_END)
    file.write(bytes([byte ^ 1]))
  return path


def empty_folder(path):
  path.mkdir()
  return path


def text_file(path):
  path.write_text("once")
  return path


@pytest.mark.parametrize(("make", "words"), [
  (small_gguf, ["bad: |bad\\b", "token_embd.weight|bytes|cut|truncated|ends"]),
  (corrupt_folder, ["bad/model.safetensors", "cut or damaged"]),
  (flipped_checkpoint, ["bad/weights.safetensors", "array 'layers/1/mlp_norm/scale' is damaged"]),
  (empty_folder, ["bad/config.json: missing"]),
  (text_file, ["bad: starts with b'once'"]),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_model(lmcompress, tmp_path, make, words):
  """The same line from every verb that loads one."""
  path = make(tmp_path / "bad")
  run_is_refused(lmcompress, tmp_path, *words, overrides=[f"model={path}"])
  for verb in (["eval", path, "--text", "text.txt"], ["generate", path, "x"], ["bench", path],
               ["inspect", path]):
    one_line(lmcompress(*verb), *words)


@pytest.mark.parametrize("verb", [["eval"], ["generate", "x"], ["bench"], ["inspect"]],
                         ids=lambda verb: verb[0])
def test_a_missing_model(lmcompress, verb):
  one_line(lmcompress(verb[0], "nothing-here", *verb[1:]), "model 'nothing-here': no such path",
           "smollm2-135m")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(lmcompress, tmp_path, value):
  model, params, tokenizer = lmc.load("base")
  bad = np.array(tree.get(params, PATH))
  bad[3, 4] = value
  lmc.save(tmp_path / "bad", model, tree.put(params, PATH, bad), tokenizer)
  run_is_refused(lmcompress, tmp_path, f"magnitude at {PATH}",
                 "the weight holds NaN or infinity; repair or exclude it",
                 overrides=[f"model={tmp_path}/bad"])


def test_a_model_without_a_tokenizer(lmcompress, tmp_path):
  """It can be benched and inspected; what needs text says so."""
  model, params, _ = lmc.load("base")
  path = lmc.save(tmp_path / "mute", model, params)
  run_is_refused(lmcompress, tmp_path, "tokenizer", overrides=[f"model={path}"])
  one_line(lmcompress("eval", path, "--text", "text.txt", "--windows", "1", "--length", "32"), "tokenizer")
  one_line(lmcompress("generate", path, "x"), "tokenizer")
  assert lmcompress("inspect", path)[0] == 0


@pytest.mark.parametrize(("text", "words"), [
  ("name: x\nmodle: base\n", ["bad.yaml: no key 'modle'; keys are"]),
  ("name: x\nmodel: base\n", ["bad.yaml: recipe: Field required"]),
  ("- a\n", ["a config is a table"]),
  ("a: [\n", ["bad.yaml: line 2: not valid YAML"]),
  ("a: &x [*x]\n", ["bad.yaml: line 1: anchors"]),
  ("extends: nowhere.yaml\n", ["nowhere.yaml: no such config file"]),
  ("name: ../x\nmodel: base\nrecipe: []\n", ["name: "]),
], ids=range(7))
@pytest.mark.parametrize("verb", ["run", "validate", "cp"])
def test_a_config_that_cannot_be(lmcompress, tmp_path, verb, text, words):
  path = tmp_path / "bad.yaml"
  path.write_text(text)
  one_line(lmcompress(verb, path, *([tmp_path / "copy.yaml"] if verb == "cp" else [])), *words)
  assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]


@pytest.mark.parametrize("name", ["nothing", "/nothing/here.yaml", "../nothing", "", "**", "configs",
                                  "a" * 5000],
                         ids=lambda name: name[:12])
@pytest.mark.parametrize("verb", ["run", "validate"])
def test_a_config_that_is_nowhere(lmcompress, verb, name):
  one_line(lmcompress(verb, name), "no such config file; `lmcompress ls` lists")


@pytest.mark.parametrize("verb", ["resume", "report", "compare"])
def test_a_folder_that_is_no_run(lmcompress, tmp_path, verb):
  one_line(lmcompress(verb, tmp_path), "no run folder|takes a run folder")
  one_line(lmcompress(verb, tmp_path / "nowhere"), "no run folder|takes a run folder")
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["report", "compare"])
def test_a_run_that_is_not_complete(lmcompress, done, tmp_path, verb):
  shutil.copy(done / "config.yaml", tmp_path)
  one_line(lmcompress(verb, tmp_path), f"`lmcompress resume {tmp_path}` continues it")


@pytest.mark.parametrize("arguments", [
  ["generate", "base", ""], ["generate", "base", "x", "-n", "0"], ["generate", "base", "x", "-n", "5000"],
  ["generate", "base", "x", "--temperature", "-1"], ["generate", "base", "x", "--top-p", "7"],
  ["generate", "base", "x", "--chat"],
  ["bench", "base", "--prefill", "0"], ["bench", "base", "--decode", "5000"], ["bench", "base", "--depth", "-1"],
  ["bench", "base", "--batch", "0"], ["bench", "base", "--rounds", "0"], ["bench", "base", "--watts", "0"],
  ["bench", "base", "--activations", "int3"], ["bench", "base", "--cache", "float64"],
  ["bench", "base", "--backend", "fast"], ["bench", "base", "--bits", "77"], ["bench", "base", "--recipe", "nowhere"],
  ["bench", "base", "--recipe", "tiny", "--bits", "4"], ["bench", "base", "--plot", "roofline.png"],
  ["bench", "base", "--json", "nowhere/bench.json"],
  ["bench", "base", "--backend", "reference", "--activations", "int8"],
  ["eval", "base", "--text", "text.txt", "--windows", "0"],
  ["eval", "base", "--text", "text.txt", "--length", "1"],
], ids=" ".join)
def test_an_option_out_of_range(lmcompress, arguments):
  one_line(lmcompress(*arguments))


def test_a_full_disk_is_one_line(lmcompress, tmp_path, monkeypatch):
  from lmcompress.io import checkpoint

  def full(*_):
    raise OSError(28, os.strerror(28))

  monkeypatch.setattr(checkpoint.safetensors, "write", full)
  code, _, err = lmcompress("run", "tiny", "recipe=[]", "bench.rounds=0", "generate=null", "--results",
                            tmp_path)
  assert code == 2 and err.count("\n") == 1
  assert re.search(r"saving .*model failed: No space left on device; \d+ bytes are free", err)
  assert not list(tmp_path.glob("*/model")) and not list(tmp_path.glob("*/.model*"))


# ---------------------------------------------------------------------------------------- as a process


def process(home, *arguments, **options):
  command = [sys.executable, "-m", "lmcompress.cli", *map(str, arguments)]
  return subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          **options)


@pytest.mark.slow
def test_an_error_is_one_line_in_a_process_too(home):
  found = process(home, "eval", "nothing-here")
  out, err = found.communicate(timeout=120)
  one_line((found.returncode, out, err), "nothing-here")
  assert out == ""


@pytest.mark.slow
def test_an_interrupted_run_exits_with_130_and_resumes(home, lmcompress, tmp_path):
  """SIGINT once it has scored a few of many windows; what was measured stays, and `resume` ends the run."""
  overrides = ["evaluate.windows=300", "bench.rounds=0", "generate=null"]
  found = process(home, "run", "tiny", *overrides, "--results", tmp_path)
  deadline = time.monotonic() + 120
  while found.poll() is None and time.monotonic() < deadline:
    records = list(tmp_path.glob("*/metrics.jsonl"))
    if records and records[0].read_bytes().count(b"\n") >= 3:
      break
    time.sleep(0.02)
  found.send_signal(signal.SIGINT)
  out, err = found.communicate(timeout=60)
  assert found.returncode == 130, (out, err)
  assert "Traceback" not in out + err
  folder, = tmp_path.iterdir()
  assert f"lmcompress resume {folder}" in out.replace("\n", " ").replace("  ", " ") or \
    f"lmcompress resume {folder}" in out.replace("\n", "")
  assert not (folder / "result.json").exists()
  kept = [line for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1] if line]
  assert 3 <= len(kept) < 300
  code, out, _ = lmcompress("resume", folder)
  after = (folder / "metrics.jsonl").read_text().splitlines()
  windows = [row["window"] for row in map(json.loads, after) if row["kind"] == "score"]
  assert code == 0 and after[:len(kept)] == kept and windows == list(range(300))
  assert len(json.loads((folder / "result.json").read_text())["stages"]) == 3


def test_importing_the_package_imports_nothing_heavy():
  """Names come from their homes at first use; the command line shows its help without JAX."""
  heavy = ("flax", "orbax", "pydantic", "tokenizers", "matplotlib", "transformers", "torch", "chex", "optax",
           "tensorboardX")
  code = "import sys, {0}; dir({0}); print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
  for module, names in (("lmcompress", heavy), ("lmcompress.cli", (*heavy, "jax"))):
    done = subprocess.run([sys.executable, "-c", code.format(module)], capture_output=True, text=True,
                          timeout=60, check=True)
    assert not set(names) & set(done.stdout.split())


def test_export_writes_a_folder_that_is_the_model(lmcompress, done, tmp_path):
  """The weights that the codes stand for, read again from safetensors."""
  code, out, err = lmcompress("export", done / "model", tmp_path / "out")
  assert code == 0 and out == f"written: {tmp_path / 'out'}\n" and not err
  model, params, tokenizer = lmc.load(done / "model")
  back, dense, again = lmc.load(tmp_path / "out")
  tokens = np.asarray([tokenizer.encode("I do not know")], np.int32)
  np.testing.assert_allclose(back.apply(dense, tokens), model.apply(params, tokens), atol=1e-4)
  assert again.encode("I do") == tokenizer.encode("I do")
  code, _, err = lmcompress("export", done / "model", tmp_path / "out")
  assert code == 2 and "has files already" in err


def test_generate_searches_with_an_encoder_decoder(lmcompress, tmp_path):
  model = T5(T5Config(head_dim=8), T5Sizes(vocab=264, embed=16, mlp=16, layers=1, decoder_layers=1, heads=2))
  lmc.save(tmp_path / "t5", model, model.init(jax.random.key(0)), byte_level())
  code, out, _ = lmcompress("generate", tmp_path / "t5", "a wolf", "-n", "4", "--beams", "2")
  assert code == 0 and out.endswith("\n")
  code, _, err = lmcompress("generate", tmp_path / "t5", "a wolf", "--temperature", "1")
  assert code == 2 and "--temperature" in err and "encoder-decoder" in err
  code, _, err = lmcompress("generate", tmp_path / "t5", "a wolf", "--draft-layers", "1")
  assert code == 2 and "--draft-layers" in err and "encoder-decoder" in err


def test_beams_of_a_decoder_are_refused(lmcompress, done):
  code, _, err = lmcompress("generate", done / "model", "I do", "--beams", "3")
  assert code == 2 and "no encoder-decoder" in err
