"""Search: the least KL within a budget, found among all choices; nothing measured twice; errors by name."""

from __future__ import annotations

import itertools
import json

import pytest
from small_model import byte_level, random_params
from typer.testing import CliRunner

from lmcompress import save
from lmcompress.cli import app
from lmcompress.config import load_config
from lmcompress.errors import ConfigError
from lmcompress.models import Llama, LlamaConfig
from lmcompress.search import pareto, search, space

TEXT = "The rain in Spain stays mainly in the plain, and the fox goes out on a chilly night. " * 20


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp("search")
  save(folder / "model", Llama(LlamaConfig(head_dim=16)), random_params(), byte_level())
  (folder / "text.txt").write_text(TEXT)
  rounded = [{"name": "round_to_nearest", "bits": bits, "group_size": 16} for bits in (8, 3)]
  table = {
    "name": "s", "model": str(folder / "model"), "recipe": [], "evaluate": {"texts": [str(folder / "text.txt")],
    "windows": 2, "length": 32}, "generate": None, "bench": {"prefill": 8, "decode": 4, "rounds": 1},
    "search": {"budget": {"mib": 0.35}, "groups": [
      {"at": "layers/*/attn", "candidates": rounded},
      {"at": "layers/*/mlp", "candidates": rounded},
      {"at": "embed", "candidates": [{"name": "round_to_nearest", "bits": 8, "group_size": -1}]},
    ]},
  }  # fmt: skip
  path = folder / "s.yaml"
  path.write_text(json.dumps(table))
  return folder, path


def test_greedy_finds_the_least_of_all(made):
  """Of 18 choices, what a search over everything finds; every choice measured once, and none again by the next."""
  folder, path = made
  config = load_config(path)
  result = search(config, folder / "results")
  trials = {tuple(t["choice"]): t for t in result["trials"]}
  assert len(trials) == len(result["trials"]) <= 5 + 1 + 3 * 2
  limit = config.search.budget.limit
  assert result["best"]["nbytes"] <= limit
  whole = load_config(path, ["search.method=optuna", "search.trials=30"])
  more = search(whole, folder / "results")
  best = min(t["kl"] for t in more["trials"] if t["nbytes"] <= limit)
  assert more["best"]["kl"] == best <= result["best"]["kl"] <= 2 * best
  lines = (folder / "results" / config.folder / "trials.jsonl").read_text().splitlines()
  again = search(config, folder / "results")
  assert again["best"] == result["best"]
  assert (folder / "results" / config.folder / "trials.jsonl").read_text().splitlines() == lines


def test_the_best_recipe_runs(made):
  folder, path = made
  config = load_config(path)
  result = search(config, folder / "results")
  best = load_config(folder / "results" / config.folder / "best.yaml")
  assert list(best.recipe) == result["best"]["recipe"] and best.search is None
  assert (folder / "results" / config.folder / "pareto.svg").read_text().startswith("<svg")


def test_a_candidate_may_be_a_chain(made):
  folder, path = made
  chain = "[{name: magnitude, sparsity: 0.3}, {name: round_to_nearest, bits: 4, group_size: 16}]"
  only = f"search.groups=[{{at: layers/*/attn, candidates: [{chain}]}}]"
  sizes = [t["nbytes"] for t in search(load_config(path, [only]), folder / "results")["trials"]]
  assert len(sizes) == 2 and sizes[1] < sizes[0]
  config = load_config(path, [only, f"search.budget.mib={sum(sizes) / 2 / 2**20}"])
  result = search(config, folder / "results")
  assert result["best"]["recipe"][:2] == [
    {"name": "magnitude", "sparsity": 0.3, "at": "layers/*/attn"},
    {"name": "round_to_nearest", "bits": 4, "group_size": 16, "at": "layers/*/attn"},
  ]
  told = next(t["recipe"] for t in result["trials"] if t["choice"][0] == 0)
  assert told.startswith("layers/*/attn: magnitude sparsity 0.3 then round_to_nearest bits 4, group_size 16")
  assert load_config(folder / "results" / config.folder / "best.yaml").recipe == tuple(result["best"]["recipe"])


def test_latency_is_a_budget(made):
  folder, path = made
  config = load_config(path, ["search.budget={ms_per_token: 1000}"])
  result = search(config, folder / "results")
  assert result["best"]["ms_per_token"] > 0 and result["best"]["choice"] == (-1, -1, -1)
  plots = [(folder / "results" / config.folder / name).read_text() for name in ("pareto.svg", "latency.svg")]
  assert "MB on disk" in plots[0] and "ms per token" in plots[1]


def test_the_command(made):
  folder, path = made
  done = CliRunner().invoke(app, ["search", str(path), "--results", str(folder / "results")])
  assert done.exit_code == 0, done.output
  assert "perplexity" in done.output and "best.yaml" in done.output


@pytest.mark.parametrize(("override", "message"), [
  ("search.budget.mib=0.01", "meets the budget"), ("search=null", "nothing to search"),
  ("search.budget={}", "exactly one of mib"), ("search.budget.mib=-1", "greater than 0"), 
  ("search.groups=[]", "at least 1"),
  ("search.groups.0.candidates=[[]]", "found '.*'"), ("search.groups.0.candidates.0.bits=9", "bits are 2 to 8"),
  ("search.groups.0.at=layers/9", "selects no weight"),
])  # fmt: skip
def test_what_cannot_be_searched(made, override, message):
  folder, path = made
  with pytest.raises((ConfigError, ValueError), match=message):
    config = load_config(path, [override])
    space(config)
    search(config, folder / "results")


def test_a_damaged_record_is_named(made):
  folder, path = made
  config = load_config(path, ["seed=5"])
  (folder / "results" / config.folder).mkdir(parents=True)
  (folder / "results" / config.folder / "trials.jsonl").write_text('{"choice": 3}\n')
  with pytest.raises(ValueError, match="not JSON lines of trials"):
    search(config, folder / "results")


def test_the_front_is_what_nothing_beats():
  points = [(3.0, 1.0), (1.0, 5.0), (2.0, 4.0), (2.5, 4.5), (2.0, 6.0), (4.0, 1.0)]
  front = pareto(points)
  assert front == [1, 2, 0]
  for i, j in itertools.product(range(6), front):
    assert not (points[i][0] <= points[j][0] and points[i][1] < points[j][1])
