"""What compression costs and what training wins back: every variant of a config, before and after its training.

A variant is a run of its own under `results/`, so that a study that was interrupted goes on where it was.

  python experiments/recovery.py --config configs/smollm2/prune_finetune.yaml
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


def row(name: str, result: dict[str, Any]) -> dict[str, Any]:
  """The stages of one run: what was removed, what it cost, how much of the KL came back."""
  first, last = result["stages"][0], result["stages"][-1]
  before = result["stages"][[stage["name"] for stage in result["stages"]].index("trained") - 1]
  removed = (first["parameters"] - last["parameters"]) / 1e6
  texts = {}
  for text, kl in before["kl"].items():
    whole, cut, after = (stage["perplexity"][text] for stage in (first, before, last))
    texts[text] = {
      "float32": whole, "compressed": cut, "trained": after, "kl": kl, "kl_trained": last["kl"][text],
      "recovered": 1 - last["kl"][text] / kl if kl else None,
      "ratio_per_million": (cut / whole - 1) / removed if removed else None,
      "ratio_per_million_trained": (after / whole - 1) / removed if removed else None,
    }  # fmt: skip
  trained = next(stage for stage in result["stages"] if stage["name"] == "trained")
  return {"name": name, "recipe": result["config"]["recipe"], "parameters": last["parameters"],
          "parameters_ratio": last["parameters"] / first["parameters"], "tokens": result["training"]["tokens"],
          "seconds": trained["seconds"], "peak_memory_bytes": trained["peak_memory_bytes"], "texts": texts}  # fmt: skip


def study(path: Path, only: list[str], overrides: list[str]) -> dict[str, Any]:
  """Runs each variant, or takes the result that it left."""
  from lmcompress.environment import device, versions
  from lmcompress.experiment import run

  config = load_config(path, overrides)
  if config.train is None or not config.variants:
    raise ConfigError(f"{path.name}: variants and a train table are needed")
  rows = []
  for variant in variants_of(config):
    if not only or variant.name in only:
      print(variant.name, file=sys.stderr, flush=True)
      rows.append(row(variant.name, run(variant, Path("results"), f"experiments/recovery.py --only {variant.name}")))
  return {"format": 1, "name": config.name, "model": config.model, "train": config.train.model_dump(mode="json"),
          "versions": versions(), "device": device(), "rows": rows}  # fmt: skip


def main() -> int:
  """Runs the study, writes its result and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", type=Path, required=True, help="a config with named `variants` and `train`")
  parser.add_argument("--only", nargs="+", default=[], help="names of variants")
  parser.add_argument("--out", type=Path, help="result; by default the config's name under experiments/results")
  parser.add_argument("overrides", nargs="*", help="dotted overrides, e.g. train.steps=40")
  arguments = parser.parse_args()
  try:
    result = study(arguments.config, arguments.only, arguments.overrides)
  except LmcompressError as error:
    print(f"recovery: {error}", file=sys.stderr)
    return 2
  out = arguments.out or RESULTS / f"{result['name']}.json"
  out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  print(f"{'variant':<16}{'parameters':>11}  {'text':<12}{'ratio':>9}{'trained':>9}{'KL':>8}{'trained':>9}{'back':>7}")
  for r in result["rows"]:
    for text, t in r["texts"].items():
      ratios = [t[key] / t["float32"] for key in ("compressed", "trained")]
      back = "" if t["recovered"] is None else f"{t['recovered']:.0%}"  # what cost nothing before training
      print(f"{r['name']:<16}{r['parameters_ratio']:>11.3f}  {text:<12}{ratios[0]:>9.3f}{ratios[1]:>9.3f}"
            f"{t['kl']:>8.3f}{t['kl_trained']:>9.3f}{back:>7}")  # fmt: skip
  return 0


if __name__ == "__main__":
  sys.exit(main())
