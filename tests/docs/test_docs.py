"""The documentation says what is so: its code runs, its names exist, its tables are complete."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmcompress as lmc
from lmcompress import config as configs
from lmcompress import tree
from lmcompress.models import Llama, LlamaConfig, LlamaSizes
from lmcompress.transforms import METHODS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))])
NOTEBOOKS = sorted((DOCS / "guides").glob("*.ipynb"))
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page, language):
  """The fenced blocks of a page, indentation taken off."""
  return [textwrap.dedent(body) for _, found, body in FENCE.findall(page.read_text("utf-8")) if found == language]


def resolve(name):
  """The object of a dotted path: the longest module, then attributes."""
  parts = name.split(".")
  for cut in range(len(parts), 0, -1):
    try:
      value = importlib.import_module(".".join(parts[:cut]))
    except ModuleNotFoundError:
      continue
    for part in parts[cut:]:
      value = getattr(value, part)
    return value
  raise AssertionError(f"{name}: no such module")


def load_example(name):
  spec = importlib.util.spec_from_file_location(name, DOCS / "examples" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A saved tiny Llama with a tokenizer of bytes, and a text."""
  import tokenizers

  from lmcompress.data.tokenizer import Tokenizer

  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  sizes = LlamaSizes(vocab=256, embed=64, mlp=64, layers=2, heads=4, kv_heads=4)
  model = Llama(LlamaConfig(head_dim=16), sizes)
  folder = tmp_path_factory.mktemp("tiny")
  lmc.save(folder / "model", model, model.init(jax.random.key(0)), Tokenizer(backend))
  (folder / "text.txt").write_text("A fox went out on a chilly night, and prayed for the moon to give him light. " * 60)
  return folder


# ---------------------------------------------------------------------------------------- the code


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
  import nbclient
  import nbformat

  monkeypatch.setenv("TMPDIR", str(tmp_path))
  if path.stem == "quickstart":
    monkeypatch.setenv("XLA_FLAGS", "")  # on the real model, which is worth compiling well
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
  client = nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3",
                                   resources={"metadata": {"path": str(tmp_path)}})
  client.execute()


def test_there_are_three_notebooks():
  assert [path.stem for path in NOTEBOOKS] == ["compose", "explain", "quickstart"]


@each_page
def test_python_blocks_compile(page):
  for block in blocks(page, "python"):
    compile(block, page.name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "docs/add_a_transform.md", "docs/sharding.md"])
def test_python_blocks_run(name, saved, tmp_path, monkeypatch):
  """The pages' code as it stands, on a tiny model and a text of our own."""
  from lmcompress.data import text

  load = lmc.load
  monkeypatch.setattr(lmc, "load", lambda name, mesh=None: load(saved / "model", mesh))
  monkeypatch.setattr(text, "load_text", lambda name: (saved / "text.txt").read_text())
  monkeypatch.syspath_prepend(str(DOCS / "examples"))
  monkeypatch.chdir(tmp_path)
  space = {}
  for block in blocks(ROOT / name, "python"):
    exec(compile(block, name, "exec"), space)
  assert tree.leaf_nbits(space["small"]["layers"]["0"]["mlp"]["up"]["kernel"]) < 64 * 64 * 8


def test_readme_has_the_names_that_users_rely_on():
  block = blocks(ROOT / "README.md", "python")[0]
  for name in ("load", "chain", "at", "magnitude", "round_to_nearest", "compress", "summary", "perplexity", "generate",
               "save"):
    assert f"lmc.{name}(" in block
  assert "calibration=None, key=jax.random.key(0)" in block


@pytest.mark.parametrize("name", ["lmcompress.evaluate.measures", "lmcompress.tree", "lmcompress.transforms.schedules"])
def test_doctests(name):
  failed, tried = doctest.testmod(importlib.import_module(name))
  assert tried and not failed


# ---------------------------------------------------------------------------------------- the names


@each_page
def test_dotted_names_exist(page):
  for name in set(re.findall(r"`(lmcompress(?:\.\w+)+)(?:\([^`]*\))?`", page.read_text("utf-8"))):
    resolve(name)


def test_the_article_names_its_functions():
  page = (DOCS / "article.md").read_text("utf-8")
  assert [int(n) for n in re.findall(r"^## (\d+)\.", page, re.MULTILINE)] == list(range(1, 11))
  names = set(re.findall(r"`(lmcompress(?:\.\w+)+)`", page))
  for measure in ("quantization_error", "pruning_sensitivity", "compression_efficiency", "speedup"):
    assert f"lmcompress.evaluate.{measure}" in names


def test_api_has_the_public_face():
  page = (DOCS / "api.md").read_text("utf-8")
  for name in lmc.__all__:
    assert re.search(rf"^\.\. auto\w+:: lmcompress\.{name}$", page, re.MULTILINE), name


@each_page
def test_links_lead_somewhere(page):
  for target in re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
    assert (page.parent / target).exists(), f"{page.name} -> {target}"


@pytest.mark.slow
def test_docs_build_without_a_warning(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path / "html")],
    capture_output=True, text=True, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0, done.stderr
  api = (tmp_path / "html" / "api.html").read_text("utf-8")
  for name in ("lmcompress.round_to_nearest", "lmcompress.arrays.quantized.QuantizedArray", "lmcompress.tree.select"):
    assert f'id="{name}"' in api


# ---------------------------------------------------------------------------------------- the contracts


def commands():
  """`(page, words)` of every `lmcompress` line in a shell block."""
  for page in PAGES:
    for block in blocks(page, "bash"):
      for line in block.splitlines():
        found = re.search(r"(?:^|\| *)(lmcompress .*)", line)
        if found:
          yield page.name, shlex.split(found[1], comments=True)[1:]


def verbs():
  import typer

  from lmcompress.cli import app

  return typer.main.get_command(app).commands


def test_every_verb_is_on_its_page():
  page = (DOCS / "cli.md").read_text("utf-8")
  shown = {words[0] for name, words in commands() if name == "cli.md"}
  for verb in verbs():
    assert f"\n## {verb}\n" in page and verb in shown, verb
    assert f"`{verb}`" in (ROOT / "README.md").read_text("utf-8"), verb


def test_commands_parse():
  known = verbs()
  for _, (verb, *rest) in commands():
    context = known[verb].make_context(verb, list(rest))
    if verb in ("run", "validate") and (ROOT / rest[0]).is_file():
      configs.load_config(ROOT / rest[0], context.params["overrides"] or [])


def test_every_config_key_is_on_its_page():
  page = (DOCS / "configs.md").read_text("utf-8")
  sections = {"evaluate": configs.Evaluate, "calibration": configs.Tokens, "bench": configs.Bench,
              "generate": configs.Generate, "mesh": configs.MeshSizes, "gates": configs.Gates, "search": configs.Search}
  for key in configs.Config.model_fields:
    assert f"| `{key}` |" in page, key
  for name, table in sections.items():
    section = page.partition(f"\n### {name}\n")[2].partition("\n#")[0]
    for key in table.model_fields:
      assert f"| `{key}` |" in section, f"{name}.{key}"


def test_every_method_is_on_the_config_page():
  page = (DOCS / "configs.md").read_text("utf-8")
  for name, factory in METHODS.items():
    row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
    for key in inspect.signature(factory).parameters:
      assert f"`{key}`" in row, f"{name}: {key}"


def test_yaml_blocks_are_configs(tmp_path, monkeypatch):
  monkeypatch.setitem(METHODS, "wanda", load_example("wanda").wanda)
  folder = shutil.copytree(ROOT / "configs" / "smollm2", tmp_path / "smollm2")
  checked = 0
  for page in PAGES:
    for block in blocks(page, "yaml"):
      path = folder / "block.yaml"
      if "recipe:" not in block:  # a few keys to add to a config
        block = f"extends: quickstart.yaml\n{block}"
      path.write_text(block, "utf-8")
      assert configs.load_config(path).recipe
      checked += 1
  assert checked >= 4


def keys_of(value):
  """Every key of a table that is part of the contract: not the texts, paths and stages that are data."""
  data = {"perplexity", "kl", "top1", "accuracy", "config", "detail", "scores"}
  if isinstance(value, list):
    return set().union(*(keys_of(item) for item in value)) if value else set()
  if not isinstance(value, dict):
    return set()
  out = set(value)
  for key, inner in value.items():
    if key == "histograms":
      out |= set().union(*(set(row) for row in inner.values()))
    elif key not in data:
      out |= keys_of(inner)
  return out


@pytest.fixture(scope="module")
def finished(saved):
  from lmcompress import experiment

  config = configs.check({
    "name": "tiny", "model": str(saved / "model"),
    "recipe": [{"name": "round_to_nearest", "at": "layers/*", "bits": 4}],
    "evaluate": {"texts": [str(saved / "text.txt")], "windows": 1, "length": 16},
    "bench": {"prefill": 8, "decode": 2, "rounds": 1}, "generate": {"max_new_tokens": 2},
  }, "test")
  return experiment.run(config, saved / "results", "test"), saved / "results" / config.folder


@pytest.mark.slow
def test_every_key_of_a_result_is_on_its_page(finished):
  result, folder = finished
  page = (DOCS / "results.md").read_text("utf-8")
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert {line["kind"] for line in lines} == {"tree", "score", "latency"}
  detail = next(line["detail"] for line in lines if line["kind"] == "latency")
  for key in sorted(keys_of(result) | keys_of(lines) | set(detail) | set(detail["decode_ms"])):
    assert f"`{key}`" in page, key
  for kind in ("tree", "score", "latency"):
    assert f"| `{kind}` |" in page


@pytest.mark.slow
def test_every_file_of_a_run_is_on_its_page(finished):
  _, folder = finished
  page = (DOCS / "results.md").read_text("utf-8")
  for path in folder.iterdir():
    assert f"| `{path.name}{'/' if path.is_dir() else ''}` |" in page, path.name
  for path in (folder / "model").iterdir():
    assert f"`{path.name}`" in page, path.name
  for key in json.loads((folder / "model" / "manifest.json").read_text())["body"]:
    assert f"| `{key}` |" in page, key


@pytest.mark.slow
def test_result_types_are_as_the_page_says(finished):
  result, _ = finished
  kinds = {"text": str, "integer": int, "number": (int, float), "table": dict, "list": list}
  page = (DOCS / "results.md").read_text("utf-8")
  tables = {"result.json": [result], "stages": result["stages"], "weights": result["weights"]}
  for title, rows in tables.items():
    section = re.split(r"\n##+ ", page.partition(f" {title}\n")[2])[0]
    cells = re.findall(r"^\| `(\w+)` \| (\w+)", section, re.MULTILINE)
    assert {key for key, _ in cells} == set(rows[0]), title
    for row in rows:
      for key, kind in cells:
        assert row[key] is None or isinstance(row[key], kinds[kind]), f"{title}: {key}"


# ---------------------------------------------------------------------------------------- the example


def test_example_is_short_and_shown():
  source = (DOCS / "examples" / "wanda.py").read_text("utf-8")
  assert len(source.splitlines()) < 80
  assert "{literalinclude} examples/wanda.py" in (DOCS / "add_a_transform.md").read_text("utf-8")


@pytest.mark.slow
def test_example_runs_with_calibration(tiny):
  model, params = tiny
  tokens = np.random.default_rng(0).integers(0, 64, (3, 12), np.int32)
  recipe = lmc.at("layers/*/mlp", load_example("wanda").wanda(sparsity=0.25))
  with pytest.raises(lmc.WeightError, match="calibration"):
    lmc.compress(model, params, recipe)
  small, report = lmc.compress(model, params, recipe, calibration=tokens)
  assert len(report.rows) == 6
  for path, leaf in tree.weights(small).items():
    if "/mlp/" in path:  # a quarter of the inputs of every output
      assert (np.asarray(leaf.mask.unpack()) == 0).sum(axis=0).tolist() == [leaf.shape[0] // 4] * leaf.shape[1]
    else:
      assert leaf is tree.get(params, path)


def test_example_is_the_paper():
  """Equal to a float64 reference; and better than magnitude on `x @ w`, though worse on `w`."""
  wanda = load_example("wanda")
  rng = np.random.default_rng(0)
  x = rng.normal(size=(200, 32)) * np.exp(rng.normal(size=32))
  w = rng.normal(size=(32, 12)).astype(np.float32)
  second_moment = (x * x).mean(axis=0)
  mask = np.asarray(wanda.wanda_mask(jnp.asarray(w), jnp.asarray(second_moment, jnp.float32), 16))
  score = np.abs(w.astype(np.float64)) * np.linalg.norm(x, axis=0)[:, None]
  np.testing.assert_array_equal(mask, score.argsort(axis=0).argsort(axis=0) >= 16)
  by_size = np.abs(w).argsort(axis=0).argsort(axis=0) >= 16

  def error(keep, inputs):
    return np.linalg.norm(inputs @ (w * ~keep))

  assert error(mask, x) < error(by_size, x)
  assert error(mask, np.eye(32)) > error(by_size, np.eye(32))
