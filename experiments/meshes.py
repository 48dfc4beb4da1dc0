"""Every job over sixteen meshes of eight devices beside the same on one: what comes out, what is sent, what it takes.

A mixture (`--model configs/small/mixture.yml`) goes over six meshes that split its experts. With `pipe` a pipeline
trains, and all else takes its devices as more of `fsdp`.

Trains a small model for some steps, compresses it block by block by GPTQ, scores and continues a text, and saves.
Where sums fall in another order, a code on the edge between two may fall to the other, and all that GPTQ rounds after
it to codes of its own: then codes are apart, and what counts is whether the errors of the outputs are as small. On a
machine without eight devices they are virtual, share its cores, and the speedup says what a mesh costs, not what it
gives.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 python experiments/meshes.py
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from lmcompress.errors import LmcompressError

RESULT = Path(__file__).parent / "results" / "meshes.json"
SHAPES = [
  {"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"data": 2, "fsdp": 4}, {"data": 4, "fsdp": 2}, {"data": 4, "tensor": 2},
  {"data": 2, "tensor": 4}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2},
  {"fsdp": 2}, {"data": 3, "tensor": 2},
  {"pipe": 2}, {"data": 4, "pipe": 2}, {"fsdp": 4, "pipe": 2}, {"data": 2, "tensor": 2, "pipe": 2},
]  # fmt: skip
MIXTURE = [
  {"expert": 8}, {"data": 2, "expert": 4}, {"fsdp": 2, "expert": 4}, {"expert": 4, "tensor": 2},
  {"fsdp": 2, "expert": 2, "tensor": 2}, {"expert": 2, "tensor": 2, "pipe": 2},
]  # fmt: skip


def sent(lowered: Any) -> dict[str, int]:
  """How many collectives of each kind a compiled program holds."""
  kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
  return dict(collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", lowered.compile().as_text())))


def placed(sizes: dict[str, int]) -> Any:
  """The mesh, stages taken as more of `fsdp`."""
  from lmcompress.distributed import make_mesh

  rest = {axis: n for axis, n in sizes.items() if axis != "pipe"}
  return make_mesh(**{**rest, "fsdp": sizes.get("fsdp", 1) * sizes.get("pipe", 1)})


def jobs(model: Any, params: Any, rows: Any, steps: int, batch: int, stages: int = 1) -> dict[str, Any]:
  """What training, compression, scoring and generation give for a tree, wherever it lies."""
  import jax
  import numpy as np

  from lmcompress import at, compress, fit, gptq, perplexity, round_to_nearest, tree
  from lmcompress.distributed.sharding import data_mesh, on_mesh_of, over_data
  from lmcompress.generation import Sampler
  from lmcompress.generation.generate import decode
  from lmcompress.io.checkpoint import tree_hash
  from lmcompress.training import Training
  from lmcompress.training.step import start, train_step

  training = Training(steps=steps, batch=batch, accumulate=stages)
  trained, history = fit(model, params, rows, training, stages=stages)
  small, report = compress(model, trained, at("layers/*", gptq(bits=4, group_size=32)), rows[:batch])
  rounded, _ = compress(model, params, at("layers/*", round_to_nearest(bits=4, group_size=32)))
  leaves = jax.tree.leaves(params)
  with on_mesh_of(params):
    pieces = over_data(data_mesh(params), {"tokens": np.asarray(rows[None, :batch])}, batch, axis=1)
    found = {"forward": sent(jax.jit(model.apply).lower(params, pieces["tokens"][0]))}
    if stages == 1:  # a pipeline is many programs
      state = start(params, training, lambda path: True)
      moving, key = state._replace(kept=None), jax.random.key(0)
      found["step"] = sent(train_step.lower(model, moving, state.kept, pieces, training, None, None, None, key))
  return {
    "losses": [row["loss"] for row in history],
    "errors": np.array([row["output_error"] for row in report.rows]),
    "rounded": tree_hash(tree.unstack_experts(rounded)),
    "codes": np.concatenate([np.asarray(x.codes.unpack()).ravel()
                             for x in tree.weights(tree.unstack_experts(small)).values() if hasattr(x, "codes")]),
    "perplexity": float(perplexity(model, small, rows[-batch:], batch=batch)),
    "tokens": list(decode(model, small, rows[:2, :8].tolist(), 16, Sampler())),
    "seconds": statistics.median(row["seconds"] for row in history[2:]),
    "bytes_per_device": sum(x.addressable_shards[0].data.nbytes for x in leaves),
    "sent": found,
    "tree": small,
  }  # fmt: skip


def study(source: str, steps: int, batch: int, length: int) -> dict[str, Any]:
  """One device, then each mesh beside it."""
  import jax
  import numpy as np

  from lmcompress import load, save, tree
  from lmcompress.data.text import load_text, windows
  from lmcompress.distributed import shard
  from lmcompress.environment import device, versions
  from lmcompress.io.checkpoint import tree_hash

  model, params, tokenizer = load(source)
  rows = windows(tokenizer, load_text("books"), 4 * batch, length)
  shapes = MIXTURE if any(map(tree.in_mixture, tree.flatten(params))) else SHAPES
  alone = jobs(model, params, rows, steps, batch)
  result: dict[str, Any] = {
    "format": 1, "model": source, "steps": steps, "batch": batch, "length": length, "devices": jax.device_count(),
    "versions": versions(), "device": device(), "loss": alone["losses"][-1], "perplexity": alone["perplexity"],
    "seconds": alone["seconds"], "bytes": alone["bytes_per_device"], "meshes": [],
  }  # fmt: skip
  hashes = []
  with tempfile.TemporaryDirectory() as folder:
    for n, sizes in enumerate(shapes):
      found = jobs(model, shard(model, params, placed(sizes)), rows, steps, batch, sizes.get("pipe", 1))
      save(Path(folder) / str(n), model, found["tree"])
      hashes.append(tree_hash(tree.unstack_experts(found["tree"])))
      used = int(np.prod(list(sizes.values())))
      losses = [abs(a / b - 1) for a, b in zip(found["losses"], alone["losses"], strict=True)]
      row = {
        "mesh": sizes, "loss_apart": max(losses), "codes_apart": float(np.mean(found["codes"] != alone["codes"])),
        "output_error_apart": float(np.max(np.abs(found["errors"] / alone["errors"] - 1))),
        "rounded_alike": found["rounded"] == alone["rounded"],
        "perplexity_apart": abs(found["perplexity"] / alone["perplexity"] - 1),
        "same_tokens": found["tokens"] == alone["tokens"], "bytes_per_device": found["bytes_per_device"],
        "sent": found["sent"], "seconds": found["seconds"], "speedup": alone["seconds"] / found["seconds"],
        "efficiency": alone["seconds"] / found["seconds"] / used,
      }  # fmt: skip
      result["meshes"].append(row)
      print(json.dumps(row), file=sys.stderr, flush=True)
    pairs = [(a, b) for a in range(len(shapes)) for b in range(len(shapes))]
    read = lambda a, b: tree.unstack_experts(load(Path(folder) / str(a), placed(shapes[b]))[1])  # noqa: E731
    back = [tree_hash(read(a, b)) == hashes[a] for a, b in pairs]
  return result | {"restored": sum(back), "pairs": len(pairs)}


def main() -> int:
  """Runs the study, writes its result and prints a table."""
  from rich.console import Console
  from rich.table import Table

  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="configs/small/meshes.yml", help="a known name or a path")
  parser.add_argument("--steps", type=int, default=20, help="of training")
  parser.add_argument("--batch", type=int, default=24, help="rows of a step; the meshes split them")
  parser.add_argument("--length", type=int, default=64, help="tokens of a row")
  parser.add_argument("--out", type=Path, default=RESULT, help="result")
  arguments = parser.parse_args()
  try:
    result = study(arguments.model, arguments.steps, arguments.batch, arguments.length)
  except LmcompressError as error:
    print(f"meshes: {error}", file=sys.stderr)
    return 2
  arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  apart = [f"{what} apart" for what in ("loss", "codes", "errors", "perplexity")]
  table = Table("mesh", *apart, "same text", "MiB a device", "s a step", "speedup")
  for row in result["meshes"]:
    table.add_row(
      ", ".join(f"{a}={n}" for a, n in row["mesh"].items()), f"{row['loss_apart']:.1e}", f"{row['codes_apart']:.2%}",
      f"{row['output_error_apart']:.1e}",
      f"{row['perplexity_apart']:.1e}", str(row["same_tokens"]), f"{row['bytes_per_device'] / 2**20:.2f}",
      f"{row['seconds']:.2f}", f"{row['speedup']:.2f}",
    )  # fmt: skip
  Console().print(table)
  print(f"{result['restored']} of {result['pairs']} saved trees read back bit for bit on another mesh")
  return 0


if __name__ == "__main__":
  sys.exit(main())
