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

from lmcompress.config import check, override, read
from lmcompress.errors import ConfigError, LmcompressError

RESULTS = Path(__file__).parent / "results"


def variants(table: dict[str, Any]) -> list[dict[str, Any]]:
  """The settings under `variants`, each the keywords of the study's one transform."""
  found = table.pop("variants", None)
  if not isinstance(found, list) or not all(isinstance(v, dict) for v in found) or not found:
    raise ConfigError("variants: a list of tables such as {bits: 4, group_size: 64} is needed")
  return found


def study(path: Path, overrides: list[str]) -> dict[str, Any]:
  """Scores every variant against the original, window by window; returns the study's result."""
  import jax

  from lmcompress import compress, load
  from lmcompress.data.text import load_text, windows
  from lmcompress.evaluate.perplexity import Score, log_probabilities, checked, score
  from lmcompress.evaluate.size import sizes
  from lmcompress.experiment import device, versions
  from lmcompress.io.checkpoint import tree_hash
  from lmcompress.io.load import origin
  from lmcompress.recipe import build

  table = override(read(path), overrides)
  settings = variants(table)
  config = check(table, path.name)
  model, params, tokenizer = load(config.model)
  rows = []
  for setting in [{}, *settings]:
    links = [{"name": "round_to_nearest", "at": "layers/*", **setting}] if setting else []
    tree = compress(model, params, build(links), key=jax.random.key(config.seed))[0] if links else params
    total = {}
    for name in config.evaluate.texts:
      tokens, masks = checked(windows(tokenizer, load_text(name), config.evaluate.windows, config.evaluate.length))
      total[name] = Score(0, 0, 0, 0)
      for i in range(len(tokens)):
        t, m = tokens[i : i + 1], masks[i : i + 1]
        reference = log_probabilities(model, params, t, m)
        total[name] += score(model, tree, t, m, reference)
    rows.append({
      "setting": setting, "bits_per_weight": sizes({"layers": tree["layers"]})["bits_per_weight"],
      "perplexity": {k: v.perplexity for k, v in total.items()}, "kl": {k: v.summary()["kl"] for k, v in total.items()},
      "tree_hash": tree_hash(tree),
    })
    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
  return {
    "format": 1, "name": config.name, "config_hash": config.hash, "seed": config.seed, "model": config.model,
    "original": origin(config.model), "versions": versions(), "device": device(),
    "texts": list(config.evaluate.texts), "windows": config.evaluate.windows, "length": config.evaluate.length,
    "variants": rows,
  }


def plot(result: dict[str, Any], path: Path) -> None:
  """Bits per weight of the linears against perplexity, one panel per text."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(5 * len(result["texts"]), 4), layout="constrained")
  for axis, text in zip(figure.subplots(1, len(result["texts"]), squeeze=False)[0], result["texts"], strict=True):
    original, *others = result["variants"]
    axis.axhline(original["perplexity"][text], color="grey", linewidth=1, label=result["original"])
    groups = sorted({(str(v["setting"].get("group_size")), v["setting"].get("symmetric", True)) for v in others})
    for group, symmetric in groups:
      line = [v for v in others if (str(v["setting"].get("group_size")), v["setting"].get("symmetric", True)) == (group, symmetric)]
      axis.plot([v["bits_per_weight"] for v in line], [v["perplexity"][text] for v in line], marker="o",
                label=f"group {'row' if group == '-1' else group}, {'symmetric' if symmetric else 'asymmetric'}")
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
