"""One model compressed in several ways: a run for each variant of a config, all in one table and one plot.

A variant is a run of its own under `results/`, so that a study that was interrupted goes on where it was. Of a config
with `tasks` or `samples` the rows are judged by those, classes of texts beside a logistic regression on TF-IDF of the
whole texts (scikit-learn).

  python experiments/variants.py --config configs/article/lstm_compress.yaml
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lmcompress.config import load_config, variants_of
from lmcompress.errors import ConfigError, LmcompressError

RESULTS = Path(__file__).parent / "results"
KEPT = (
  "parameters", "bits_per_weight", "bytes_on_disk", "perplexity", "kl", "top1", "accuracy", "tokens_per_s", "tasks",
)  # fmt: skip


def baseline(names: dict[str, str]) -> dict[str, Any]:
  """Scores of a logistic regression on TF-IDF of words and pairs of them, for data sets of texts by task."""
  import numpy as np
  from sklearn.feature_extraction.text import TfidfVectorizer
  from sklearn.linear_model import LogisticRegression

  from lmcompress.data.labelled import DATASETS, load_labelled
  from lmcompress.evaluate.classification import scores

  found = {}
  for task, name in names.items():
    if name not in DATASETS or isinstance((data := load_labelled(name)).train[0], np.ndarray):
      continue  # other tasks, and images
    texts = [list(part[0]) for part in (data.train, data.test)]
    vectors = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2).fit(texts[0])
    model = LogisticRegression(C=10, max_iter=2000).fit(vectors.transform(texts[0]), data.train[1])
    found[task] = scores(data.test[1], np.asarray(model.predict_proba(vectors.transform(texts[1]))), data.classes)
  return found


def study(path: Path, only: list[str], overrides: list[str]) -> dict[str, Any]:
  """Runs each variant, or takes the result that it left; the first row is the model before."""
  from lmcompress.environment import device, versions
  from lmcompress.experiment import run

  config = load_config(path, overrides)
  if not config.variants:
    raise ConfigError(f"{path.name}: variants are needed")
  rows: list[dict[str, Any]] = []
  for variant in variants_of(config):
    if only and variant.name not in only:
      continue
    print(variant.name, file=sys.stderr, flush=True)
    result = run(variant, Path("results"), f"experiments/variants.py --only {variant.name}")
    first, last = result["stages"][0], result["stages"][-1]
    rows = rows or [{"name": "original", "recipe": [], **{key: first[key] for key in KEPT}}]
    seconds = sum(stage["seconds"] for stage in result["stages"][1:])
    methods = [*result["config"]["recipe"], *result["config"]["finish"]]
    row = {"name": variant.name, "recipe": methods, "seconds": seconds, **{key: last[key] for key in KEPT}}
    rows.append(row | ({"training": variant.train.model_dump(mode="json")} if variant.train else {}))
  others = baseline({table.name: table.data for table in config.tasks}) if config.tasks else {}
  return {
    "format": 1, "name": config.name, "model": config.model, "texts": list(config.evaluate.texts),
    "tasks": list(dict.fromkeys(task for row in rows for task in row["tasks"])), "tf-idf": others,
    "versions": versions(), "device": device(), "rows": rows,
  }  # fmt: skip


def measure_of(result: dict[str, Any], task: str) -> str:
  """The score that says most of a task."""
  return next(row["tasks"][task].get("measure", "accuracy") for row in result["rows"] if task in row["tasks"])


def shown(value: Any) -> str:
  """A score in a column; BLEU and rates have larger numbers."""
  return "-" if value is None else f"{value:.1f}" if value >= 2 else f"{value:.3f}"


def plot(result: dict[str, Any], path: Path) -> None:
  """Megabytes on disk against perplexity or accuracy, a point for each variant, one panel a text or task."""
  from matplotlib.figure import Figure

  panels = [(text, "perplexity") for text in result["texts"]]
  panels += [(task, measure_of(result, task)) for task in result["tasks"]]
  figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
  for axes, (of, measure) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
    for row in result["rows"]:
      if of not in row["perplexity" if measure == "perplexity" else "tasks"]:
        continue  # a model before its head
      x = row["bytes_on_disk"] / 1e6
      y = row[measure][of] if measure == "perplexity" else row["tasks"][of][measure]
      axes.plot(x, y, "o", color="black" if row["name"] == "original" else "tab:blue")
      axes.annotate(row["name"], (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    if of in result["tf-idf"]:
      axes.axhline(result["tf-idf"][of][measure], color="gray", linestyle=":", label="TF-IDF")
      axes.legend(fontsize=8)
    axes.set(xlabel="MB on disk", ylabel=measure, title=of, xscale="log")
  figure.savefig(path)


def main() -> int:
  """Runs the study, writes its result and plot, and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", type=Path, required=True, help="a config with named `variants`")
  parser.add_argument("--only", nargs="+", default=[], help="names of variants")
  parser.add_argument("--out", type=Path, help="result; by default the config's name under experiments/results")
  parser.add_argument("overrides", nargs="*", help="dotted overrides, e.g. evaluate.windows=4")
  arguments = parser.parse_args()
  try:
    result = study(arguments.config, arguments.only, arguments.overrides)
  except LmcompressError as error:
    print(f"variants: {error}", file=sys.stderr)
    return 2
  out = arguments.out or RESULTS / f"{result['name']}.json"
  out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  plot(result, out.with_suffix(".svg"))
  for task in result["tasks"]:
    measure = measure_of(result, task)
    first = next(row["tasks"][task] for row in result["rows"] if task in row["tasks"])
    others = [key for key, value in first.items() if key != measure and (value is None or isinstance(value, float))]
    heads = "".join(f"{key:>12}" for key in others)
    print(f"{task:<18}{'bits':>6}{'MB':>8}{measure:>12}  {'95 % of resamples':<18}{heads}")
    for row in [*result["rows"], {"name": "TF-IDF", "tasks": result["tf-idf"]}]:
      if task not in row["tasks"]:
        continue
      t, (low, high) = row["tasks"][task], row["tasks"][task]["interval"][measure]
      size = f"{row['bits_per_weight']:>6.2f}{row['bytes_on_disk'] / 1e6:>8.2f}" if "bytes_on_disk" in row else " " * 14
      around, rest = f"{shown(low)} to {shown(high)}", "".join(f"{shown(t.get(key)):>12}" for key in others)
      print(f"{row['name']:<18}{size}{shown(t[measure]):>12}  {around:<18}{rest}")
  if not result["texts"]:
    return 0
  print(f"{'variant':<14}{'bits':>6}{'MB':>8}  {'text':<12}{'ppl':>8}{'KL':>8}{'right':>7}{'decode':>8}")
  for row in result["rows"]:
    for text in result["texts"]:
      speed = row["tokens_per_s"].get("decode")
      print(f"{row['name']:<14}{row['bits_per_weight']:>6.2f}{row['bytes_on_disk'] / 1e6:>8.2f}  {text:<12}"
            f"{row['perplexity'][text]:>8.2f}{row['kl'][text]:>8.4f}{row['accuracy'][text]:>7.3f}"
            + ("" if speed is None else f"{speed:>8.0f}"))  # fmt: skip
  return 0


if __name__ == "__main__":
  sys.exit(main())
