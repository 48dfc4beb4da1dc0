"""Several processes as one run: what they share, how they end together, and what they refuse."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import yaml
from small_model import byte_level
from typer.testing import CliRunner

import lmcompress as lmc
from lmcompress import experiment
from lmcompress.cli import app
from lmcompress.config import check
from lmcompress.distributed import make_mesh, processes, shard
from lmcompress.errors import ConfigError
from lmcompress.launch import cores_of, launch
from lmcompress.models import Llama, LlamaConfig, LlamaSizes


def test_one_process_is_whole_first_and_alone():
  tree = shard(Llama(LlamaConfig(head_dim=8)), {"embed": {"table": np.ones((8, 8), np.float32)}}, make_mesh(tensor=8))
  assert processes.count() == 1 and processes.first() and processes.whole(tree) is tree
  processes.agree(config="a")
  processes.meet("here")


@pytest.mark.parametrize(("arguments", "message"), [
  (("nowhere", 0, 2), "write HOST:PORT"),
  (("host:port", 0, 2), "write HOST:PORT"),
  (("host:99999", 0, 2), "write HOST:PORT"),
  (("host:9999", 2, 2), "say how many there are and which this is"),
  (("host:9999", 0, None), "say how many there are and which this is"),
])
def test_what_does_not_fit_together(arguments, message):
  with pytest.raises(ConfigError, match=message):
    processes.start(*arguments)


def test_a_coordinator_that_does_not_answer():
  """A line within the time limit, in a process of its own, for JAX cannot take the attempt back."""
  program = "from lmcompress.distributed import processes; processes.start('127.0.0.1:9', 1, 2, patience=2)"
  begun = time.perf_counter()
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
  assert done.returncode == 1 and time.perf_counter() - begun < 30
  said = "lmcompress: the processes did not find one another at 127.0.0.1:9 within 2 seconds"
  assert done.stderr.startswith(said) and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_processes_that_differ_are_told_on_each():
  """Another config in one, other versions in the other: each says which, and none waits for ever."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  program = (
    "import sys; from lmcompress.distributed import processes; from lmcompress.errors import ConfigError\n"
    "n = int(sys.argv[1]); processes.start(sys.argv[2], n, 2)\n"
    "processes.agree(config='same', versions='same')\n"
    "for what in ('config', 'versions'):\n"
    "  try: processes.agree(**{'config': 'same', 'versions': 'same', what: str(n)})\n"
    "  except ConfigError as error: print(error)\n"
  )
  running = [
    subprocess.Popen([sys.executable, "-c", program, str(n), address], stdout=subprocess.PIPE, text=True)
    for n in range(2)
  ]
  for n, one in enumerate(running):
    lines = [line for line in one.communicate(timeout=60)[0].splitlines() if line.startswith("process")]
    for what, line in zip(("config", "versions"), lines, strict=True):
      assert line == f"process 1 has another {what} than process 0; all need the same (here, process {n}: {n})"


# ---------------------------------------------------------------------------------------- started together

SCRIPT = """
import os, signal, sys, time
number = int(sys.argv[sys.argv.index("--process") + 1])
print("process", number, flush=True)
if "dies" in sys.argv and number == 1:
  os.kill(os.getpid(), signal.SIGKILL)
if "fails" in sys.argv and number == 2:
  sys.exit(3)
time.sleep(60 if {"dies", "fails"} & set(sys.argv) else 0)
"""


@pytest.mark.parametrize(("word", "code", "said"), [
  ("dies", 137, "process 1 of 3 was killed by signal 9"), ("fails", 3, "process 2 of 3 ended with code 3"),
])  # fmt: skip
def test_all_end_with_one(word, code, said, tmp_path):
  told, begun = [], time.perf_counter()
  assert launch(3, [word], tmp_path / "run", told.append, (sys.executable, "-c", SCRIPT)) == code
  assert time.perf_counter() - begun < 20
  assert len(told) == 1 and said in told[0] and f"lmcompress resume {tmp_path / 'run'}" in told[0]
  assert (tmp_path / "run" / "process-2.log").read_text() == "process 2\n"


def test_processes_share_cores_and_few_cores_are_nobodys_own(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 6, 9, 11})
  assert [cores_of(n, 2) for n in range(2)] == [[3, 5], [6, 9, 11]]
  assert [cores_of(n, 5) for n in range(5)] == [[3], [5], [6], [9], [11]]
  assert cores_of(0, 6) == []


def test_all_that_go_well_end_well(tmp_path):
  assert launch(2, ["works"], tmp_path, pytest.fail, (sys.executable, "-c", SCRIPT)) == 0
  assert (tmp_path / "process-1.log").read_text() == "process 1\n"


@pytest.mark.parametrize(("options", "message"), [
  (["--process", "1"], "go with --coordinator"),
  (["--local-processes", "0"], "from 1 to 64"),
  (["--local-processes", "2", "--profile"], "several processes are not profiled"),
  (["--coordinator", "x"], "write HOST:PORT"),
])
def test_options_that_do_not_fit(options, message, tmp_path):
  table = {"name": "x", "model": "smollm2-135m", "recipe": []}
  (tmp_path / "c.yaml").write_text(yaml.safe_dump(table))
  result = CliRunner().invoke(app, ["run", str(tmp_path / "c.yaml"), *options])
  assert result.exit_code and re.search(message, str(result.exception))


@pytest.mark.parametrize(("over", "message"), [
  ({"mesh": {"data": 2}}, "the mesh has 2 devices, the 2 processes have 8"),
  ({"mesh": None}, "2 processes share a mesh, and x has none"),
  ({"stream": True}, "do not run stream yet"),
  ({"mesh": {"data": 4, "pipe": 2}, "train": {"text": "grimm"}}, r"do not run mesh\.pipe yet"),
])
def test_what_several_processes_do_not_run(over, message, tmp_path, monkeypatch):
  monkeypatch.setattr(processes, "count", lambda: 2)
  monkeypatch.setattr(processes, "agree", lambda **said: None)
  config = check({"name": "x", "model": "m", "recipe": [], "mesh": {"data": 8}, **over}, "x")
  with pytest.raises(ConfigError, match=message):
    experiment.run(config, tmp_path, "x")


# ---------------------------------------------------------------------------------------- one run


def two_and_one(table, place, axis):
  """Results of a config by two processes of one device each on an axis, and by this one without a mesh."""
  (place / "c.yaml").write_text(yaml.safe_dump({**table, "mesh": {axis: -1}}))
  command = [sys.executable, "-m", "lmcompress.cli", "run", str(place / "c.yaml")]
  command += ["--results", str(place / "two"), "--local-processes", "2"]
  quick = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}
  done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=quick)
  assert done.returncode == 0, done.stdout + done.stderr
  two = json.loads(next((place / "two").glob("*/result.json")).read_text())
  one = experiment.run(check(table, "one"), place / "one", "x")
  for a, b in zip(one["training"]["history"], two["training"]["history"], strict=True):
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
  return two, one


@pytest.fixture
def saved(tmp_path):
  """What each table says of the model and of what is not measured."""
  model = Llama(LlamaConfig(head_dim=8), LlamaSizes(vocab=264, embed=16, mlp=32, layers=1, heads=2, kv_heads=2))
  lmc.save(tmp_path / "m", model, model.init(jax.random.key(0)), byte_level())
  return {"name": "two", "model": str(tmp_path / "m"), "recipe": [], "bench": {"rounds": 0}, "generate": None}


@pytest.mark.slow
def test_two_processes_give_what_one_gives(saved, tmp_path):
  """Training on a text and on rows that the model writes, GPTQ and scores: one's losses, its perplexity to 1 %."""
  (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
  text = str(tmp_path / "text.txt")
  two, one = two_and_one({
    **saved,
    "train": {"text": text, "length": 16, "batch": 4, "steps": 4, "save_every": 2, "optimizer": "sgd",
              "written": {"rows": 4, "batch": 2}},
    "calibration": {"text": text, "windows": 4, "length": 16},
    "finish": [{"name": "gptq", "at": "layers/*", "bits": 4, "group_size": 16}],
    "evaluate": {"texts": [text], "windows": 2, "length": 16},
  }, tmp_path, "data")  # fmt: skip
  assert one["training"]["rows"] == two["training"]["rows"]
  assert one["stages"][-1]["perplexity"][text] == pytest.approx(two["stages"][-1]["perplexity"][text], rel=1e-2)


@pytest.mark.slow
def test_two_processes_learn_a_task(saved, tmp_path):
  """Losses of one process, and its accuracy."""
  two, one = two_and_one({
    **saved, "tasks": [{"name": "digits", "data": "digits", "length": 64, "rows": 40}], "evaluate": {"texts": []},
    "train": {"batch": 4, "steps": 3, "save_every": 3, "evaluate_every": 3},
  }, tmp_path, "fsdp")  # fmt: skip
  for a, b in zip(one["stages"], two["stages"], strict=True):
    assert {name: row["accuracy"] for name, row in a["tasks"].items()} == pytest.approx(
      {name: row["accuracy"] for name, row in b["tasks"].items()}, abs=0.01
    )
