"""Trainings killed at random moments: each resumes to the bits of the run that was never cut.

Five kinds of training of a small model: all weights on labels, adapters over 4 bits distilled, codes that learn,
movement pruning, and private. Each is started, killed by SIGKILL at a random moment of its training (saves go on in the
background every three steps), started again, and so on, four times; then it runs to its end.

  python experiments/kill.py --out experiments/results/kill.json
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

RESULTS = Path(__file__).parent / "results"
KINDS = ("labels", "adapters", "codes", "movement", "private")
_STEPS = 60
_LONGEST_DELAY_S = 0.3
"""After the step at whose end a training is to die: saves take about as long."""


def train(kind: str, folder: Path) -> None:
  """One training, from its last state on; prints each step, and at its end the tree's hash and the losses'."""
  import jax
  import numpy as np

  from lmcompress import compress, fit, tree
  from lmcompress import transforms as t
  from lmcompress.io.checkpoint import tree_hash
  from lmcompress.models import Llama, LlamaConfig, LlamaSizes
  from lmcompress.training import Distill, Labels, Privacy, Training

  model = Llama(LlamaConfig(head_dim=16), LlamaSizes(vocab=256, embed=64, mlp=128, layers=2, heads=4, kv_heads=2))
  params = model.init(jax.random.key(0))
  rows = np.random.default_rng(0).integers(0, 256, (40, 32)).astype(np.int32)
  recipes = {
    "adapters": t.chain(t.round_to_nearest(4, 16), t.lora(4)), "codes": t.fake_quantize(3, 16),
    "movement": t.movement(),
  }  # fmt: skip
  start = compress(model, params, recipes[kind], None, jax.random.key(0))[0] if kind in recipes else params
  distils = kind in ("adapters", "codes")
  training = Training(
    _STEPS, batch=8, learning_rate=1e-3, average=0.9 if kind == "labels" else None,
    privacy=Privacy(1.0) if kind == "private" else None, loss=Distill("jensen_shannon") if distils else Labels(),
  )  # fmt: skip
  done, history = fit(
    model, start, rows, training,
    trainable=lambda path: kind != "adapters" or tree.matches("**/delta", path),
    teacher=(model, params) if distils else None,
    transform=t.prune_gradually(0.5, 0, 40, 5) if kind == "movement" else None,
    folder=folder, save_every=3, on_step=lambda step, _: print(f"step {step}", flush=True),
  )  # fmt: skip
  print("end", tree_hash(done), json.dumps([row["loss"] for row in history]), flush=True)


def attempt(kind: str, folder: Path, die_after: int | None, delay_s: float) -> tuple[str | None, int]:
  """The last line of a training that ran to its end, None of one that was killed; and the last step that was seen.

  Args:
    die_after: steps of this attempt.
  """
  seen = 0
  command = [sys.executable, __file__, "--train", kind, "--folder", str(folder)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout is not None
    for line in process.stdout:
      if line.startswith("end"):
        return line, _STEPS
      seen, die_after = int(line.split()[1]), None if die_after is None else die_after - 1
      if die_after == 0:
        time.sleep(delay_s)
        os.kill(process.pid, signal.SIGKILL)
  if process.returncode != -signal.SIGKILL:
    raise RuntimeError(f"{kind}: the training ended with {process.returncode}")
  return None, seen


def study(kills: int, seed: int) -> dict[str, Any]:
  """A row for each kind: the steps after which it was killed, where it went on, and whether the bits are the same."""
  draw, rows = random.Random(seed), []
  for kind in KINDS:
    with tempfile.TemporaryDirectory() as place:
      cut, moments = Path(place) / "cut", []
      for _ in range(kills):
        die_after, delay = draw.randrange(1, _STEPS // kills), draw.uniform(0, _LONGEST_DELAY_S)
        end, step = attempt(kind, cut, die_after, delay)
        if end is None:
          moments.append({"step": step, "delay_s": round(delay, 3)})
      resumed = attempt(kind, cut, None, 0.0)[0]
      straight = attempt(kind, Path(place) / "straight", None, 0.0)[0]
      rows.append({"kind": kind, "killed": moments, "same": resumed == straight})
      print(f"{kind}: killed {len(moments)} times, {'the same' if resumed == straight else 'NOT the same'}", flush=True)
  from lmcompress.environment import device, versions

  return {"format": 1, "name": "kill", "steps": _STEPS, "versions": versions(), "device": device(), "rows": rows}


def main() -> int:
  """Runs the study; fails where bits differ."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--kills", type=int, default=4, help="of each kind")
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  parser.add_argument("--out", type=Path, default=RESULTS / "kill.json", help="result")
  parser.add_argument("--train", choices=KINDS, help=argparse.SUPPRESS)
  parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.train:
    train(arguments.train, arguments.folder)
    return 0
  result = study(arguments.kills, arguments.seed)
  arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  return 0 if all(row["same"] for row in result["rows"]) else 1


if __name__ == "__main__":
  sys.exit(main())
