"""Workers around a parameter server, and copies that are averaged, beside synchronous training on the same text.

As many tokens are read each way. Asynchronous workers wait at random and two of them are killed; a server's shard is
killed too where it is a process of its own. What gradients cost, plain and compressed, stands beside the loss.

  python experiments/parameter_server.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from lmcompress.errors import LmcompressError

RESULT = Path(__file__).parent / "results" / "parameter_server.json"
SPAN = 20
"""Updates over which a last loss is a mean."""


class Delay:
  """Waits at random, and lets two workers die."""

  def __init__(self, longest: float, kills: tuple[tuple[str, int], ...] = ()):
    self.longest, self.kills = longest, kills

  def __call__(self, worker: str, clock: int) -> float:
    if (worker, clock) in self.kills:
      raise RuntimeError(f"{worker} was killed")
    return random.random() * self.longest


def study(
  source: str, steps: int, batch: int, length: int, processes: bool, only: list[str]
) -> dict[str, Any]:
  """Each way of training, by name."""
  import jax
  import numpy as np

  from lmcompress import fit, freeze, kmeans, load, magnitude, perplexity, round_to_nearest
  from lmcompress.data.text import load_text, windows
  from lmcompress.distributed.parameter_server import Processes
  from lmcompress.environment import device, versions
  from lmcompress.training import Asynchronous, Local, Training, fit_async, fit_local
  from lmcompress.transforms import at, chain

  model, params, tokenizer = load(source)
  rows = windows(tokenizer, load_text("books+grimm:even+pydoc:even"), None, length)
  held = windows(tokenizer, load_text("grimm:odd"), 64, length)
  training = Training(steps=steps, batch=batch, learning_rate=1e-3, warmup=10)
  everywhere = lambda t: chain(*(at(where, t) for where in ("layers/*", "embed")))  # noqa: E731
  largest = chain(magnitude(sparsity=0.99, scope="row"), freeze("bitmap"))
  plain = Asynchronous(workers=2, staleness=1)
  kinds: dict[str, Any] = {
    "2 workers": (plain, Delay(0.0)),
    "4 workers, bound 0": (dataclasses.replace(plain, workers=4, staleness=0), Delay(0.0)),
    "4 workers, bound 2": (dataclasses.replace(plain, workers=4, staleness=2), Delay(0.0)),
    "4 workers, bound 2, damped": (dataclasses.replace(plain, workers=4, staleness=2, damp=True), Delay(0.0)),
    "2 workers, delays, two kills": (plain, Delay(0.02, (("worker-0", 9), ("worker-1", 17)))),
    "2 workers, 8 bits": (dataclasses.replace(plain, compression=everywhere(round_to_nearest(8, -1))), Delay(0.0)),
    "2 workers, largest 1 %": (
      dataclasses.replace(plain, compression=everywhere(largest)), Delay(0.0)
    ),
    "2 workers, 1 bit": (dataclasses.replace(plain, compression=everywhere(kmeans(clusters=2))), Delay(0.0)),
  }  # fmt: skip
  found: dict[str, Any] = {}

  def record(
    name: str, tree: Any, history: list[Any], begun: float, more: dict[str, Any], beside: str = "synchronous"
  ) -> None:
    row = {
      "loss": float(np.mean([r["loss"] for r in history[-SPAN:]])), "perplexity": float(perplexity(model, tree, held)),
      "seconds": time.perf_counter() - begun, **more,
    }  # fmt: skip
    row["against_synchronous"] = row["loss"] / found[beside]["loss"] if beside in found else 1.0
    found[name] = row
    print(f"{name}: {json.dumps(row)}", file=sys.stderr, flush=True)

  dense = 4 * sum(x.size for x in jax.tree.leaves(params))
  begun = time.perf_counter()
  tree, history = fit(model, params, rows, training)
  record("synchronous", tree, history, begun, {"sent": steps * dense})
  for name, (how, delay) in kinds.items():
    if only and name not in only:
      continue
    begun = time.perf_counter()
    tree, history = fit_async(model, params, rows, training, how, delay=delay)
    record(name, tree, history, begun, _sums(history))
  name = "2 workers in processes, a kill"
  if processes and (not only or name in only):
    begun = time.perf_counter()
    kill = Delay(0.0, (("worker-1", 5),))
    tree, history = fit_async(model, params, rows, training, plain, host=Processes(), delay=kill)
    record(name, tree, history, begun, _sums(history))
  copies = {
    "4 copies, their mean every 5": Local(4, 5), "4 copies, their mean every 10": Local(4, 10),
    "4 copies, Nesterov every 10": Local(4, 10, 0.7, 0.9),
  }  # fmt: skip
  beside, short = "synchronous, 4 at once", dataclasses.replace(training, steps=steps // 4, warmup=5)
  if not only or set(copies) & set(only):  # as many updates, each of four copies' rows
    begun = time.perf_counter()
    tree, history = fit(model, params, rows, dataclasses.replace(short, batch=4 * batch))
    record(beside, tree, history, begun, {"sent": 4 * short.steps * dense}, beside)
  for name, how in copies.items():
    if only and name not in only:
      continue
    begun = time.perf_counter()
    tree, history = fit_local(model, params, rows, short, how)
    sent = how.workers * sum(r["sent"] for r in history)
    record(name, tree, history, begun, {"sent": sent, "share": sent / (4 * short.steps * dense)}, beside)
  return {
    "format": 1, "model": source, "steps": steps, "batch": batch, "length": length, "versions": versions(),
    "device": device(), "runs": found,
  }  # fmt: skip


def _sums(history: list[Any]) -> dict[str, Any]:
  sent, dense = (sum(row[key] for row in history) for key in ("sent", "dense"))
  batches = sorted(row["batch"] for row in history)
  return {
    "sent": sent, "share": sent / dense, "largest_gap": max(row["gap"] for row in history),
    "largest_lag": max(row["lag"] for row in history), "each_batch_once": batches == list(range(len(history))),
  }  # fmt: skip


def main() -> int:
  """Runs the study, writes its result and prints a table."""
  from rich.console import Console
  from rich.table import Table

  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="configs/small/meshes.yml", help="a known name or a path")
  parser.add_argument("--steps", type=int, default=600, help="updates, over all workers")
  parser.add_argument("--batch", type=int, default=8, help="rows of an update")
  parser.add_argument("--length", type=int, default=64, help="tokens of a row")
  parser.add_argument("--only", nargs="+", default=[], help="names of runs beside the synchronous one, from the table")
  parser.add_argument("--threads-only", action="store_true", help="leaves out what needs Ray")
  parser.add_argument("--out", type=Path, default=RESULT, help="result")
  arguments = parser.parse_args()
  try:
    sizes = (arguments.steps, arguments.batch, arguments.length)
    result = study(arguments.model, *sizes, not arguments.threads_only, arguments.only)
  except LmcompressError as error:
    print(f"parameter_server: {error}", file=sys.stderr)
    return 2
  arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  table = Table("training", "loss", "of synchronous", "perplexity", "bytes sent, share", "largest gap", "seconds")
  for name, row in result["runs"].items():
    table.add_row(
      name, f"{row['loss']:.4f}", f"{row['against_synchronous']:.4f}", f"{row['perplexity']:.1f}",
      f"{row.get('share', 1):.4f}", str(row.get("largest_gap", "")), f"{row['seconds']:.1f}",
    )  # fmt: skip
  Console().print(table)
  return 0


if __name__ == "__main__":
  sys.exit(main())
