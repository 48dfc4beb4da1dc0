"""What `lmcompress plan` says that a training step holds, beside what XLA says of the compiled step, over meshes.

Nothing is run: the step of the whole model is compiled for each mesh of eight virtual devices, and the bytes of its
arguments and temporaries on one device are held against the plan's, which has compiled two and four blocks. XLA's usual
schedule for CPUs runs ahead what can run at once, as the gathers of other blocks, and holds more for it; its other one
goes in order. The plan is made with the latter, and both are held against it.

  python experiments/planned.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lmcompress.errors import LmcompressError

RESULT = Path(__file__).parent / "results" / "planned.json"
SHAPES = [
  {}, {"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "tensor": 4},
  {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2},
]  # fmt: skip
OTHERS: list[dict[str, Any]] = [{"accumulate": 2}, {"remat": False}, {"compute": "bfloat16"}, {"optimizer": "sgd"}]
CASES = [(sizes, {}) for sizes in SHAPES] + [(sizes, over) for over in OTHERS for sizes in (SHAPES[2], SHAPES[5])]
DEVICES, IN_ORDER = "--xla_force_host_platform_device_count=8", "--xla_cpu_enable_concurrency_optimized_scheduler=false"
SCHEDULES = {"in order": f"{DEVICES} {IN_ORDER}", "at once": DEVICES}


def study(name: str, layers: int, batch: int, length: int, plans: bool) -> list[dict[str, Any]]:
  """A row for each case, with the plan where it `plans`."""
  import jax

  from lmcompress import load
  from lmcompress.distributed import make_mesh, shard
  from lmcompress.planner import train_plan
  from lmcompress.shapes import shapes_of
  from lmcompress.training import Training, compiled_step

  model = load(name)[0]
  model = dataclasses.replace(model, sizes=dataclasses.replace(model.sizes, layers=layers))
  params = model.init(jax.random.key(0))
  found = []
  for sizes, over in CASES:
    training = Training(steps=1, batch=batch, **over)
    whole = shard(model, params, make_mesh(**sizes)) if sizes else params
    memory: Any = compiled_step(model, whole, training, length, lambda path: True).memory_analysis()
    row = {"mesh": sizes, "settings": over, "compiled": memory.argument_size_in_bytes + memory.temp_size_in_bytes}
    if plans:
      plan = train_plan(model, shapes_of(model), training, length, sizes)
      row |= {"planned": plan.total, "parts": plan.nbytes}
    print(row, file=sys.stderr, flush=True)
    found.append(row)
  return found


def both(command: list[str]) -> list[dict[str, Any]]:
  """The rows of both schedules, each made in a process of its own, beside the plan of the first."""
  made = {}
  for schedule, flags in SCHEDULES.items():
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    env = os.environ | {"XLA_FLAGS": flags}
    asked = [*command, "--worker", *([] if made else ["--plans"])]
    done = subprocess.run(asked, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
      raise LmcompressError(f"compiling {schedule} failed")
    made[schedule] = json.loads(done.stdout.splitlines()[-1])
  first, second = made.values()
  for row, other in zip(first, second, strict=True):
    row["compiled"] = {"in order": row["compiled"], "at once": other["compiled"]}
    row["ratio"] = {schedule: row["planned"] / held for schedule, held in row["compiled"].items()}
  return first


def main() -> int:
  """Runs the study, writes its result and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="configs/small/meshes.yml", help="a known name or a file of sizes")
  parser.add_argument("--layers", type=int, default=8, help="blocks")
  parser.add_argument("--batch", type=int, default=16, help="rows of a step")
  parser.add_argument("--length", type=int, default=128, help="tokens of a row")
  parser.add_argument("--out", type=Path, default=RESULT, help="result")
  parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
  parser.add_argument("--plans", action="store_true", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  given = (arguments.model, arguments.layers, arguments.batch, arguments.length)
  try:
    if arguments.worker:
      print(json.dumps(study(*given, arguments.plans)))
      return 0
    rows = both([sys.executable, *sys.argv])
  except LmcompressError as error:
    print(f"planned: {error}", file=sys.stderr)
    return 2
  from lmcompress.environment import device, versions

  settings = dict(zip(("model", "layers", "batch", "length"), given, strict=True))
  result = {"format": 1, **settings, "versions": versions(), "device": device(), "meshes": rows}
  arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  for row in rows:
    mesh = ", ".join(f"{axis}={n}" for axis, n in (row["mesh"] | row["settings"]).items()) or "one device"
    ratios = "".join(f"{row['ratio'][schedule]:>10.3f} {schedule}" for schedule in SCHEDULES)
    print(f"{mesh:<38}{row['planned'] / 2**20:>9.1f} MiB planned{ratios}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
