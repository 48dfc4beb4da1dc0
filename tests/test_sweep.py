"""Sweeps: the runs that a grid says, each once, several at a time; failures do not end the rest."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import jax
import pytest
import yaml
from small_model import byte_level
from typer.testing import CliRunner

import lmcompress as lmc
from lmcompress.cli import app
from lmcompress.config import check
from lmcompress.errors import ConfigError
from lmcompress.models import Llama, LlamaConfig, LlamaSizes
from lmcompress.places import Here, OnRay
from lmcompress.stages import Silent
from lmcompress.sweep import sweep, trials_of

BASE = {
  "name": "s", "model": "smollm2-135m",
  "recipe": [{"name": "round_to_nearest", "bits": 4}], "bench": {"rounds": 0}, "generate": None,
}  # fmt: skip


def test_a_grid_is_a_product(tmp_path):
  found = trials_of(check(BASE, "x"), ["recipe.0.bits=[2, 3, 4]", "seed=[0, 1]"], tmp_path)
  assert [(t.config.recipe[0]["bits"], t.config.seed) for t in found] == [(b, s) for b in (2, 3, 4) for s in (0, 1)]
  assert len({t.folder for t in found}) == 6 and found[0].choice == {"recipe.0.bits": 2, "seed": 0}


def test_variants_are_trials(tmp_path):
  variants = [{"name": "a", "recipe.0.bits": 3}, {"name": "b", "recipe.0.bits": 5}]
  found = trials_of(check({**BASE, "variants": variants}, "x"), ["seed=[0, 1]"], tmp_path)
  assert [t.choice for t in found] == [{"variant": v, "seed": s} for v in "ab" for s in (0, 1)]


@pytest.mark.parametrize(("grid", "message"), [
  ([], "nothing varies"),
  (["seed"], "a key and a list of values"),
  (["seed=3"], "a key and a list of values"),
  (["seed=[]"], "a key and a list of values"),
  (["seed=[0]", "seed=[1]"], "given twice"),
  (["seed=[0, 0]"], "the same run"),
  (["seeds=[0, 1]"], "no key 'seeds'"),
  (["recipe.0.bits=[4, 99]"], "bits are 2 to 8"),
  (["seed=[" + ",".join(map(str, range(1001))) + "]"], "at most 1000"),
])
def test_a_grid_that_does_not_fit(grid, message, tmp_path):
  with pytest.raises(ConfigError, match=message):
    trials_of(check(BASE, "x"), grid, tmp_path)


PROGRAM = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[-1])
text = (folder / "config.yaml").read_text()
if "seed: 1" in text:
  (folder / "config.yaml").unlink()
  folder.rmdir()  # as a run does that could not begin
  sys.exit("lmcompress: no memory")
stage = {"bits_per_weight": 4.0, "bytes_on_disk": 10, "perplexity": {"t": 2.0}, "kl": {"t": 0.1}, "tasks": {},
         "seconds": 1.0}
(folder / "result.json").write_text(json.dumps({"stages": [stage]}))
(folder / "count").write_text(str(int((folder / "count").read_text()) + 1 if (folder / "count").exists() else 1))
"""


@pytest.fixture(params=["here", "ray"])
def place(request):
  """Where trials run."""
  made = Here() if request.param == "here" else OnRay("local", cpus=0.5)
  yield made
  made.close()


def test_failures_do_not_end_the_rest_and_nothing_runs_twice(tmp_path, monkeypatch, place):
  monkeypatch.setattr("lmcompress.sweep.read_result", lambda folder: json.loads((folder / "result.json").read_text()))
  config, program = check(BASE, "x"), (sys.executable, "-c", PROGRAM)
  for _ in range(2):
    folder, rows = sweep(config, ["seed=[0, 1, 2]"], tmp_path, 2, Silent(), program, place)
    assert [row["error"] for row in rows] == ["", "lmcompress: no memory", ""]
    assert json.loads((folder / "sweep.json").read_text())["trials"] == rows and (folder / "pareto.svg").is_file()
  counts = [(tmp_path / row["folder"] / "count").read_text() for row in rows if not row["error"]]
  assert counts == ["1", "1"]
  log, mark = tmp_path / "log", tmp_path / "mark"
  sleeps = f"import pathlib, time; pathlib.Path({str(mark)!r}).write_text('begun'); time.sleep(120)"
  run = place.start((sys.executable, "-c", sleeps), log)
  deadline = time.monotonic() + 60
  while not mark.exists() and time.monotonic() < deadline:
    time.sleep(0.05)
  assert run.ended() is None
  run.stop()
  assert run.ended() is not None and time.monotonic() < deadline + 30
  found = subprocess.run(["pgrep", "-f", str(mark)], capture_output=True, text=True)
  assert not found.stdout.strip()


@pytest.mark.parametrize(("asked", "said"), [
  ({"address": "127.0.0.1:1"}, "--ray 127.0.0.1:1: no cluster answers there"),
  ({"address": "not an address"}, "--ray not an address: no cluster answers there"),
  ({"address": "local", "gpus": 7}, "--gpus 7: machines"),
  ({"address": "local", "cpus": 0}, "takes some of one"),
])  # fmt: skip
def test_a_cluster_that_cannot_run_them(asked, said):
  with pytest.raises(ConfigError, match=said):
    OnRay(**asked)


def test_a_gate_that_was_broken_stays_broken(tmp_path, monkeypatch):
  """Of trials that are complete from before, too."""
  result = {"stages": [{"perplexity": {"t": 1.0}, "kl": {"t": 0.0}}], "weights": []}
  read = lambda folder: {**(last := json.loads((folder / "result.json").read_text())),  # noqa: E731
                         "stages": result["stages"] + last["stages"], "weights": []}  # fmt: skip
  monkeypatch.setattr("lmcompress.sweep.read_result", read)
  config = check({**BASE, "gates": {"max_kl": 0.05}}, "x")
  for _ in range(2):
    _, rows = sweep(config, ["seed=[0, 2]"], tmp_path, 2, Silent(), (sys.executable, "-c", PROGRAM))
    assert all("max_kl is 0.1 on t, 0.05 is allowed" in row["error"] for row in rows)


@pytest.mark.slow
def test_the_command_runs_every_trial(tmp_path):
  model = Llama(LlamaConfig(head_dim=8), LlamaSizes(vocab=264, embed=16, mlp=32, layers=1, heads=2, kv_heads=2))
  lmc.save(tmp_path / "m", model, model.init(jax.random.key(0)), byte_level())
  (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
  evaluate = {"texts": [str(tmp_path / "text.txt")], "windows": 1, "length": 16}
  table = {**BASE, "model": str(tmp_path / "m"), "evaluate": evaluate}
  table["recipe"] = [{"name": "round_to_nearest", "bits": 4, "group_size": 16}]
  (tmp_path / "c.yaml").write_text(yaml.safe_dump(table))
  arguments = ["sweep", str(tmp_path / "c.yaml"), "-g", "recipe.0.bits=[3, 8]", "-p", "2", "--results", str(tmp_path)]
  result = CliRunner().invoke(app, arguments)
  assert result.exit_code == 0, result.output
  rows = json.loads((tmp_path / "s-sweep" / "sweep.json").read_text())["trials"]
  assert rows[0]["bits_per_weight"] < rows[1]["bits_per_weight"] and "recipe.0.bits=3" in result.output
