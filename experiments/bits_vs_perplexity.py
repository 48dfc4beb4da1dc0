"""Bits against perplexity: round to nearest at many widths and group sizes, one model, one table and one plot.

Reproduce the committed result:

  python experiments/bits_vs_perplexity.py --config configs/smollm2/bits_vs_perplexity.yaml
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


def study(path: Path, overrides: list[str]) -> dict[str, Any]:
  """Scores every variant against the original, window by window; returns the study's result."""
  import jax

  from lmcompress import compress, load
  from lmcompress.data.text import load_text, windows
  from lmcompress.environment import device, versions
  from lmcompress.evaluate.perplexity import Score, compare
  from lmcompress.evaluate.size import sizes
  from lmcompress.io.checkpoint import tree_hash
  from lmcompress.io.load import origin
  from lmcompress.recipe import build

  config = load_config(path, overrides)
  if not config.variants:
    raise ConfigError(f"{path.name}: variants are needed, a list of tables such as {{recipe.0.bits: 4}}")
  model, params, tokenizer = load(config.model)
  trees = {"original": params}
  for i, variant in enumerate(variants_of(config)):
    trees[str(i)] = compress(model, params, build(variant.recipe), key=jax.random.key(variant.seed))[0]
  total = {name: dict.fromkeys(config.evaluate.texts, Score(0, 0, 0, 0)) for name in trees}
  for text in config.evaluate.texts:
    tokens = windows(tokenizer, load_text(text), config.evaluate.windows, config.evaluate.length)
    for row, scores in compare(model, params, trees, tokens):
      for name, value in scores.items():
        total[name][text] += value
      print(f"{text}: window {row + 1} of {len(tokens)}", file=sys.stderr, flush=True)
  rows = [
    {
      "overrides": overrides_,
      "recipe": list(variant.recipe) if variant else [],
      "bits_per_weight": sizes({"layers": tree["layers"]})["bits_per_weight"],
      "perplexity": {text: score.perplexity for text, score in total[name].items()},
      "kl": {text: score.summary()["kl"] for text, score in total[name].items()},
      "tree_hash": tree_hash(tree),
    }
    for (name, tree), overrides_, variant in zip(
      trees.items(), [{}, *config.variants], [None, *variants_of(config)], strict=True
    )
  ]
  return {
    "format": 1,
    "name": config.name,
    "config_hash": config.hash,
    "seed": config.seed,
    "model": config.model,
    "original": origin(config.model),
    "versions": versions(),
    "device": device(),
    "texts": list(config.evaluate.texts),
    "windows": config.evaluate.windows,
    "length": config.evaluate.length,
    "variants": rows,
  }


def plot(result: dict[str, Any], path: Path) -> None:
  """Bits per weight of the linears against perplexity, one panel per text."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(5 * len(result["texts"]), 4), layout="constrained")
  for axis, text in zip(figure.subplots(1, len(result["texts"]), squeeze=False)[0], result["texts"], strict=True):
    original, *others = result["variants"]
    axis.axhline(original["perplexity"][text], color="grey", linewidth=1, label=result["original"])
    lines: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for variant in others:
      link = variant["recipe"][0]
      lines.setdefault((str(link["group_size"]), link.get("symmetric", True)), []).append(variant)
    for (group, symmetric), line in sorted(lines.items()):
      axis.plot(
        [v["bits_per_weight"] for v in line],
        [v["perplexity"][text] for v in line],
        marker="o",
        label=f"group {'row' if group == '-1' else group}, {'symmetric' if symmetric else 'asymmetric'}",
      )
    axis.set(title=text, xlabel="bits per weight of the linears", ylabel="perplexity", yscale="log")
    axis.legend(fontsize=7)
  figure.savefig(path, metadata={"Date": None})


def main() -> int:
  """Runs the study and writes its result and plot."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", type=Path, required=True, help="a config with `variants`")
  parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
  parser.add_argument("overrides", nargs="*", help="dotted overrides, e.g. evaluate.windows=2")
  arguments = parser.parse_args()
  try:
    result = study(arguments.config, arguments.overrides)
  except LmcompressError as error:
    print(f"bits_vs_perplexity: {error}", file=sys.stderr)
    return 2
  arguments.results.mkdir(parents=True, exist_ok=True)
  target = arguments.results / f"{result['name']}.json"
  target.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  plot(result, target.with_suffix(".svg"))
  print(target)
  return 0


if __name__ == "__main__":
  sys.exit(main())
