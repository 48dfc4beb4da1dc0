"""A report shows every stage and text, needs nothing outside itself, and survives results with holes."""

from __future__ import annotations

import copy
import io
import math
import re
import struct

import numpy as np
import pytest
from rich.console import Console

from lmcompress import report

TEXTS = ("pydoc", "grimm")
LINEARS = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
STAGES = (
  ("original", 32.0, 538.1e6, 0.0, (8.91, 15.37)),
  ("magnitude at layers/*/mlp", 32.0, 538.1e6, 0.0, (9.88, 17.02)),
  ("round_to_nearest at layers/*", 11.04, 185.6e6, 0.655, (11.2, 19.9)),
  ("round_to_nearest at embed", 4.91, 82.6e6, 0.846, (11.21, 19.93)),
)


@pytest.fixture(scope="module")
def result():
  rng = np.random.default_rng(0)
  weights, paths = [], [f"layers/{n}/{linear}/kernel" for n in range(30) for linear in LINEARS]
  chosen = ([path for path in paths if "mlp" in path], paths, ["embed/kernel"])
  for (link, *_), touched, error in zip(STAGES[1:], chosen, (0.03, 0.09, 0.006), strict=True):
    weights += [{
      "link": link, "path": path, "kind": "int4 g64 asym", "shape": [576, 576], "bits": 4.5, "sparsity": 0.2,
      "weight_error": error + 0.01 * rng.random(), "seconds": 0.01,
    } for path in touched]
  histograms = {}
  for path in (paths[0], paths[-1]):
    w = rng.normal(size=20_000) * 0.1
    edges = np.linspace(-0.5, 0.5, 101)
    histograms[path] = {"edges": edges.tolist(), "before": np.histogram(w, edges)[0].tolist(),
                        "after": np.histogram(np.round(w / 0.04) * 0.04, edges)[0].tolist()}
  return {
    "format": 1, "name": "quickstart", "config_hash": "3f9a1c2e77b0", "seed": 0, "model": "smollm2-135m",
    "original": "float32, dequantized from Q4_1", "versions": {"lmcompress": "0.1.0", "jax": "0.10.2"},
    "device": {"platform": "cpu", "name": "Some CPU", "cores": 2}, "tree_hash": "9c1d",
    "command": "lmcompress run configs/smollm2/quickstart.yaml",
    "description": "Pruning and 4-bit rounding in a minute.",
    "config": {"recipe": [{"name": "magnitude", "at": "layers/*/mlp", "sparsity": 0.2}]},
    "stages": [{
      "name": name, "parameters": 134_515_008, "bits_per_weight": bits, "bytes_on_disk": int(size),
      "bytes_in_memory": int(size), "compression_efficiency": efficiency,
      "perplexity": dict(zip(TEXTS, perplexity, strict=True)), "kl": {text: 0.0123 * n for text in TEXTS},
      "top1": {text: 1 - 0.05 * n for text in TEXTS}, "tokens_per_s": {"prefill": 412.3, "decode": 14.2 + n},
      "backend": "reference (XLA cpu)", "seconds": 3.2 * n, "peak_memory_bytes": 1_830_000_000,
    } for n, (name, bits, size, efficiency, perplexity) in enumerate(STAGES)],
    "weights": weights, "histograms": histograms,
    "generation": {"prompt": "Once <script>alert(1)</script>", "before": " time & place", "after": " day"},
  }


@pytest.fixture(scope="module")
def page(result):
  return report.html(result)


def shown(table, width=120):
  console = Console(file=io.StringIO(), width=width)
  console.print(table)
  return console.file.getvalue()


def broken(result):
  """The same result with holes and numbers that are not finite."""
  result = copy.deepcopy(result)
  result["generation"] = None
  result["histograms"] = {"embed/kernel": {"edges": [0, 1], "before": [], "after": []}}
  first, second, third, last = result["stages"]
  first.update(perplexity={}, kl={}, tokens_per_s={}, peak_memory_bytes=None)
  second.update(perplexity={"pydoc": math.nan, "grimm": math.inf}, bits_per_weight=math.nan, backend=None)
  third.update(perplexity={"pydoc": 1e304, "grimm": 0.0}, kl={"pydoc": math.inf}, seconds=-math.inf)
  for key in ("compression_efficiency", "top1", "kl", "seconds", "backend"):
    del last[key]
  for row in result["weights"][::2]:
    row["weight_error"] = math.nan
  return result


def test_page_is_self_contained(page):
  assert set(re.findall(r'\w+://[^"\s<)]*', page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
  assert not re.search(r"<script|<link|<img|<iframe|\bsrc=|@import", page)
  assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
  assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_page_shows_the_run(page, result):
  for name, *_ in STAGES:
    assert name in page
  for words in (*TEXTS, *LINEARS, "quickstart-3f9a1c2e", result["command"], result["description"],
                "sparsity: 0.2", "Some CPU", "jax 0.10.2", "layers/29/mlp/down/kernel", "time &amp; place"):
    assert words in page, words
  assert page.count("<svg") == 3


def test_page_escapes(page):
  assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_names_of_files_and_texts_are_escaped_in_plots(result):
  hostile = copy.deepcopy({**result, "weights": [], "histograms": {}})
  for stage in hostile["stages"]:
    stage["perplexity"] = {"</svg><script>$x": 3.0, "$\\frac{$": 4.0}
  assert "<script" not in report.html(hostile)


def test_page_is_deterministic(page, result):
  assert report.html(copy.deepcopy(result)) == page


def test_ids_in_the_page_are_unique(page):
  ids = re.findall(r'\bid="([^"]*)"', page)
  assert len(ids) == len(set(ids))


def test_holes_do_not_crash(result):
  page = report.html(broken(result))
  assert "nan" in page and "inf" in page and "1.0e+304" in page
  assert "1 (pydoc), 2 (pydoc), 1 (grimm), 2 (grimm)" in page
  assert "nan" in shown(report.table(broken(result)))
  assert "<svg" not in report.html({})
  assert "-" in report.html({"name": "x", "stages": [{"name": "original"}]})
  shown(report.table({}))


def test_a_training_is_drawn_and_reads_back(result, page, tmp_path):
  """A curve of the loss and what was trained, here and in TensorBoard; a hole in the history is left out."""
  history = [{"loss": 2.0 / n, "grad_norm": 1.0, "learning_rate": 1e-3, "seconds": 1.0} for n in range(1, 6)]
  history[2]["loss"], history[4]["held_out"] = math.nan, 0.6
  training = {"rows": 40, "tokens": 5120, "trained_parameters": 1234567, "history": history}
  trained = report.html({**result, "training": training})
  assert "5 steps, 5,120 tokens, 40 rows, 1,234,567 numbers that trained" in trained
  assert trained.count("<svg") == page.count("<svg") + 1 and "Training" not in page
  report.write_tensorboard({**result, "training": training}, tmp_path)
  np.testing.assert_allclose(scalars(tmp_path)["training/loss"], [2.0, 1.0, 0.5, 0.4], rtol=1e-6)
  assert len(scalars(tmp_path)["training/learning_rate"]) == 5 and "held out" in trained
  np.testing.assert_allclose(scalars(tmp_path)["training/held_out"], [0.6], rtol=1e-6)


def test_privacy_energy_profile_and_tasks_are_shown(result, page):
  """Each where the result has it, in the table or on the page, and nowhere else."""
  scores = {"n": 9, "accuracy": 0.75, "precision": 0.7, "recall": 0.6, "f1": 0.65, "auc": None, "confusion": [[4, 1],
            [2, 2]], "classes": ["<good>", "bad"], "roc": [[0.0, 0.5, 1.0], [0.2, 0.9, 1.0]],
            "interval": {"accuracy": [0.6, 0.9], "f1": [0.5, 0.8]}}  # fmt: skip
  more = {
    **result,
    "config": {**result["config"], "train": {"privacy": {"delta": 1e-5}}},
    "training": {"history": [], "epsilon": 3.25, "needs": {"flops": 2e9, "temporaries": 5e6, "peak_bytes": 9e6}},
    "energy": {"label": "modelled", "source": "2 threads at 5 W", "joules": 2500.0},
    "profile": [{"operation": "dot.7", "calls": 3, "ms": 1.5, "share": 0.4}],
    "stages": [*result["stages"][:-1], {**result["stages"][-1], "tasks": {"mood": scores}}],
  }
  made, table = report.html(more), shown(report.table(more), 200)
  said = ("epsilon 3.25 at delta 1e-05", "modelled: 2 threads at 5 W", "dot.7", "2.0 GFLOP",
          "0.750 (0.600 to 0.900)", "&lt;good&gt;", "false positive rate")  # fmt: skip
  for text in said:
    assert text in made and text not in page, text
  assert "epsilon 3.25" in table and "0.750" in table and "mood" in table


def test_table_has_a_row_per_stage_and_fits(result):
  table = report.table(result)
  assert table.row_count == len(STAGES)
  for width in (100, 120):
    text = shown(table, width)
    assert "…" not in text and "pydoc" in text
    assert "dequantized from Q4_1" in text and "reference (XLA cpu)" in text
    for number in ("32.00", "82.6", "0.846", "15.37", "19.93", "0.0369", "412.3", "17.2", "1830"):
      assert number in text, (width, number)


def test_table_takes_names_literally(result):
  named = {**result, "stages": [{**result["stages"][0], "name": "magnitude at layers/[0-3]/[bold]"}]}
  assert "layers/[0-3]/[bold]" in shown(report.table(named)).replace("\n", "")


def test_compare_table_keeps_common_texts(result):
  other = copy.deepcopy(result)
  other["name"] = "other"
  del other["stages"][-1]["perplexity"]["grimm"]
  table = report.compare_table([result, other])
  text = shown(table)
  assert table.row_count == 2 and "quickstart-3f9a1c2e" in text and "other-3f9a1c2e" in text
  assert "11.21" in text and "19.93" not in text and "not in every run: grimm" in text
  assert shown(report.compare_table([result, {}])) and shown(report.compare_table([]))


def test_compare_table_warns_of_different_machines(result):
  other = {**result, "device": {"name": "Another CPU"}}
  assert "not comparable" in shown(report.compare_table([result, other]))
  assert "not comparable" not in shown(report.compare_table([result, result]))


def test_write_html_replaces_whole_files(result, page, tmp_path, monkeypatch):
  monkeypatch.setattr(report, "html", lambda result: page if result else "")
  path = tmp_path / "new" / "report.html"
  report.write_html(result, path)
  assert path.read_text(encoding="utf-8") == page

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr(report.os, "replace", fail)
  with pytest.raises(OSError, match="disk full"):
    report.write_html({}, path)
  assert path.read_text(encoding="utf-8") == page and list(path.parent.iterdir()) == [path]


def events(folder):
  """The values of the folder's one event file, read record by record."""
  from tensorboardX.proto.event_pb2 import Event

  (path,) = folder.iterdir()
  data, at = path.read_bytes(), 0
  while at < len(data):
    (length,) = struct.unpack_from("<Q", data, at)
    yield from Event.FromString(data[at + 12: at + 12 + length]).summary.value
    at += 16 + length


def scalars(folder):
  values = {}
  for value in events(folder):
    values.setdefault(value.tag, []).append(value.simple_value)
  return values


def test_tensorboard_reads_back(result, tmp_path):
  report.write_tensorboard(result, tmp_path)
  values = scalars(tmp_path)
  np.testing.assert_allclose(values["bits_per_weight"], [bits for _, bits, *_ in STAGES], rtol=1e-6)
  for n, text in enumerate(TEXTS):
    np.testing.assert_allclose(values[f"perplexity/{text}"], [stage[-1][n] for stage in STAGES], rtol=1e-6)
    assert len(values[f"kl/{text}"]) == len(STAGES)
  assert len(values["tokens_per_s/prefill"]) == len(values["tokens_per_s/decode"]) == len(STAGES)
  for linear in LINEARS:
    errors = values[f"weight_error/{linear}"]
    assert len(errors) == 30 and min(errors) > 0.08  # the last link's, not the first's
  assert len(values["weight_error/embed"]) == 1
  (config,) = [value for value in events(tmp_path) if value.tag.startswith("config")]
  assert b"sparsity: 0.2" in config.tensor.string_val[0]


def test_tensorboard_skips_holes(result, tmp_path):
  report.write_tensorboard(broken(result), tmp_path)
  values = scalars(tmp_path)
  assert len(values["bits_per_weight"]) == 3 and len(values["perplexity/pydoc"]) == 2
  assert not any(map(math.isnan, (value for values in values.values() for value in values)))
