"""T_single / T_distributed: what a step takes on one process and on several, each with cores of its own.

The rows of a step are the same however many share them (strong scaling), and so are the losses.

  python experiments/speedup.py --config configs/small/speedup.yaml
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lmcompress.config import Config, load_config
from lmcompress.errors import ConfigError, LmcompressError

RESULTS = Path(__file__).parent / "results"
WARM = 4
"""Steps that are not counted: the first compiles."""


def measured(config: Path, overrides: list[str], processes: int, cores: list[int]) -> dict[str, Any]:
  """One run by so many processes on these cores: seconds of a step, of all, and the losses.

  Raises:
    RuntimeError: the run ended with an error.
  """
  with tempfile.TemporaryDirectory() as scratch:
    asked = [str(config), *overrides, "--results", scratch, "--local-processes", str(processes)]
    begun = time.perf_counter()
    pinned = ["taskset", "-c", ",".join(map(str, cores))]
    done = subprocess.run([*pinned, sys.executable, "-m", "lmcompress.cli", "run", *asked], stdout=subprocess.DEVNULL)
    if done.returncode:
      raise RuntimeError(f"{processes} processes ended with code {done.returncode}")
    seconds = time.perf_counter() - begun
    history = json.loads(next(Path(scratch).glob("*/result.json")).read_text("utf-8"))["training"]["history"]
  steps = [row["seconds"] for row in history[WARM:]]
  return {"processes": processes, "cores": len(cores), "step_s": statistics.median(steps),
          "fastest_s": min(steps), "slowest_s": max(steps), "run_s": seconds,
          "losses": [row["loss"] for row in history]}  # fmt: skip


def study(config: Config, path: Path, overrides: list[str], counts: list[int], each: int) -> dict[str, Any]:
  """Every count of processes, the first of them the one that the others are held against."""
  from lmcompress.environment import device, versions

  cores = sorted(os.sched_getaffinity(0))
  if config.train is None or config.train.steps <= WARM:
    raise ConfigError(f"{path.name}: a train table of more than {WARM} steps is needed")
  if max(counts) * each > len(cores):
    raise ConfigError(f"{max(counts)} processes of {each} cores: there are {len(cores)} cores; give fewer of either")
  rows = []
  for count in counts:
    row = measured(path, overrides, count, cores[: count * each])
    first = rows[0] if rows else row
    row["speedup"] = first["step_s"] / row["step_s"]
    row["efficiency"] = row["speedup"] * first["processes"] / count
    row["tokens_per_s"] = config.train.batch * config.train.length / row["step_s"]
    row["losses_apart"] = max(abs(a / b - 1) for a, b in zip(row["losses"], first["losses"], strict=True))
    rows.append(row)
    print(f"{count} processes: {row['step_s']:.3f} s a step", file=sys.stderr, flush=True)
  for row in rows:
    del row["losses"]
  return {"format": 1, "name": config.name, "train": config.train.model_dump(mode="json"), "versions": versions(),
          "device": device(), "rows": rows}  # fmt: skip


def main() -> int:
  """Runs the study, writes its result and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", type=Path, required=True, help="a config with a `train` table and a `mesh`")
  parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="how many, one run each")
  parser.add_argument("--cores", type=int, default=2, help="of each process")
  parser.add_argument("--out", type=Path, help="result; by default the config's name under experiments/results")
  parser.add_argument("overrides", nargs="*", help="dotted overrides, e.g. train.batch=64")
  arguments = parser.parse_args()
  try:
    config = load_config(arguments.config, arguments.overrides)
    result = study(config, arguments.config, arguments.overrides, arguments.processes, arguments.cores)
  except (LmcompressError, RuntimeError) as error:
    print(f"speedup: {error}", file=sys.stderr)
    return 2
  out = arguments.out or RESULTS / f"{config.name}.json"
  out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  print(f"{'processes':>9}{'cores':>7}{'s a step':>10}{'tokens/s':>10}{'speedup':>9}{'efficiency':>12}{'apart':>10}")
  for r in result["rows"]:
    print(f"{r['processes']:>9}{r['cores']:>7}{r['step_s']:>10.3f}{r['tokens_per_s']:>10.0f}{r['speedup']:>9.2f}"
          f"{r['efficiency']:>12.0%}{r['losses_apart']:>10.1e}")  # fmt: skip
  return 0


if __name__ == "__main__":
  sys.exit(main())
