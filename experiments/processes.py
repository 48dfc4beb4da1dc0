"""One run by four processes: killed at a random step, ended by the rest, and resumed on two.

Trains, compresses by GPTQ, scores and saves; the numbers stand beside those of one process and of four undisturbed.

  python experiments/processes.py
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "processes.json"
CONFIG = Path("configs/small/processes.yaml")


def command(results: Path, processes: int, resume: Path | None = None) -> list[str]:
  """A run, or what continues it."""
  what = ["run", str(CONFIG), "--results", str(results)] if resume is None else ["resume", str(resume)]
  return [sys.executable, "-m", "lmcompress.cli", *what, "--local-processes", str(processes)]


def summary(folder: Path) -> dict[str, Any]:
  """Losses by step, and what the last stage has."""
  result = json.loads((folder / "result.json").read_text("utf-8"))
  last = result["stages"][-1]
  history = [row["loss"] for row in result["training"]["history"]]
  return {"losses": history, "perplexity": last["perplexity"], "bytes": last["bytes_on_disk"]}


def folder_of(results: Path) -> Path:
  """The run's folder."""
  return next(p for p in results.iterdir() if (p / "config.yaml").is_file())


def killed(results: Path, processes: int, after: int) -> float:
  """Kills one process after so many steps; seconds until all had ended.

  Raises:
    RuntimeError: the run ended before it could be killed.
  """
  running = subprocess.Popen(command(results, processes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  log: Path | None = None
  while log is None or not log.is_file() or len(log.read_text("utf-8").splitlines()) < after:
    if running.poll() is not None:
      raise RuntimeError("the run ended before it was killed")
    log = next(iter(results.glob("*/training/train.jsonl")), None)
    time.sleep(0.05)
  victims = [int(p) for p in children(running.pid)]
  victim = random.choice(victims)
  os.kill(victim, signal.SIGKILL)
  begun = time.perf_counter()
  running.wait()
  while any(Path(f"/proc/{pid}").exists() for pid in victims):
    time.sleep(0.05)
  return time.perf_counter() - begun


def children(pid: int) -> list[str]:
  """Processes that a process has started."""
  return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def study(steps: tuple[int, ...]) -> dict[str, Any]:
  """Undisturbed on one and on four, then killed after each number of steps."""
  from lmcompress.environment import device, versions

  def apart(found: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(found["losses"], other["losses"], strict=True)
    text = next(iter(other["perplexity"]))
    return {
      "loss_apart": max(abs(a / b - 1) for a, b in pairs), "steps": len(found["losses"]),
      "perplexity": found["perplexity"][text],
      "perplexity_apart": abs(found["perplexity"][text] / other["perplexity"][text] - 1),
    }  # fmt: skip

  result: dict[str, Any] = {"format": 1, "versions": versions(), "device": device(), "killed": []}
  with tempfile.TemporaryDirectory() as scratch:
    runs = {}
    for n in (1, 4):
      begun = time.perf_counter()
      subprocess.run(command(Path(scratch) / f"alone-{n}", n), check=True, stdout=subprocess.DEVNULL)
      runs[n] = summary(folder_of(Path(scratch) / f"alone-{n}"))
      runs[n]["seconds"] = time.perf_counter() - begun
    result["four_beside_one"] = apart(runs[4], runs[1]) | {"seconds": {str(n): runs[n]["seconds"] for n in runs}}
    for after in steps:
      place = Path(scratch) / f"killed-{after}"
      place.mkdir()
      seconds = killed(place, 4, after)
      folder = folder_of(place)
      subprocess.run(command(place, 2, folder), check=True, stdout=subprocess.DEVNULL)
      row = {"after": after, "seconds_to_end": seconds, **apart(summary(folder), runs[4])}
      result["killed"].append(row)
      print(json.dumps(row), file=sys.stderr, flush=True)
  return result


def main() -> int:
  """Runs the study, writes its result and prints it."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--after", type=int, nargs="+", default=[3, 12, 21], help="steps before a process is killed")
  parser.add_argument("--out", type=Path, default=RESULT, help="result")
  arguments = parser.parse_args()
  result = study(tuple(arguments.after))
  arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  four = result["four_beside_one"]
  print(f"four beside one: losses {four['loss_apart']:.1e} apart, perplexity {four['perplexity_apart']:.1e}")
  for row in result["killed"]:
    print(
      f"killed after {row['after']} steps: all ended in {row['seconds_to_end']:.1f} s; resumed on two: losses "
      f"{row['loss_apart']:.1e} apart, perplexity {row['perplexity_apart']:.1e}"
    )
  return 0


if __name__ == "__main__":
  sys.exit(main())
