"""Several tasks on one trunk beside a trunk for each: scores of every task, before and after the trunk is compressed.

A variant is a run of its own under `results/`, so that a study that was interrupted goes on where it was.

  python experiments/multitask.py --config configs/small/multitask.yaml
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


def study(path: Path, only: list[str], overrides: list[str]) -> dict[str, Any]:
  """Runs each variant, or takes the result that it left."""
  from lmcompress.environment import device, versions
  from lmcompress.experiment import run

  config, rows = load_config(path, overrides), []
  if not config.tasks or config.train is None or not config.variants:
    raise ConfigError(f"{path.name}: tasks, variants and a train table are needed")
  for variant in variants_of(config):
    if not only or variant.name in only:
      print(variant.name, file=sys.stderr, flush=True)
      result = run(variant, Path("results"), f"experiments/multitask.py --only {variant.name}")
      stages = [
        {"name": stage["name"], "bytes_on_disk": stage["bytes_on_disk"], "tasks": stage["tasks"]}
        for stage in result["stages"]
        if stage["tasks"]
      ]
      last = result["training"]["history"][-1]
      weights = {key.removeprefix("weight/"): value for key, value in last.items() if key.startswith("weight/")}
      rows.append({"name": variant.name, "weights": weights, "stages": stages})
  return {"format": 1, "name": config.name, "model": config.model, "train": config.train.model_dump(mode="json"),
          "versions": versions(), "device": device(), "rows": rows}  # fmt: skip


def main() -> int:
  """Runs the study, writes its result and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", type=Path, required=True, help="a config with `tasks`, `train` and named `variants`")
  parser.add_argument("--only", nargs="+", default=[], help="names of variants")
  parser.add_argument("--out", type=Path, default=RESULTS / "multitask.json", help="result")
  parser.add_argument("overrides", nargs="*", help="dotted overrides, e.g. train.steps=100")
  arguments = parser.parse_args()
  try:
    result = study(arguments.config, arguments.only, arguments.overrides)
  except LmcompressError as error:
    print(f"multitask: {error}", file=sys.stderr)
    return 2
  arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  print(f"{'variant':<18}{'stage':<16}{'MB':>6}  accuracy and F1 by task")
  for row in result["rows"]:
    for stage in row["stages"]:
      found = ", ".join(f"{name} {task['accuracy']:.3f} {task['f1']:.3f}" for name, task in stage["tasks"].items())
      print(f"{row['name']:<18}{stage['name'][:15]:<16}{stage['bytes_on_disk'] / 1e6:>6.1f}  {found}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
