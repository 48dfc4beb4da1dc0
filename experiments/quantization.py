r"""Calibrated quantization or pruning beside llm-compressor: perplexity, bits, seconds and memory, over seeds.

Each run of a method is a process of its own, and leaves a file in `results/quantization/`; a file that is there is not
made again, so that an interrupted study goes on where it was. Reproduce the committed result:

  python -m venv PEER && PEER/bin/pip install -r experiments/quantization-requirements.txt
  python experiments/quantization.py --config configs/smollm2/quantization.yaml --peer PEER/bin/python
  python experiments/quantization.py --config configs/smollm2/pruning.yaml --peer PEER/bin/python \
    --out experiments/results/pruning.json

One of ours alone:

  python experiments/quantization.py --config configs/smollm2/quantization.yaml --only gptq4 --seeds 0
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from lmcompress.config import load_config, variants_of
from lmcompress.errors import ConfigError, LmcompressError

RESULTS = Path(__file__).parent / "results"
WORKER = Path(__file__).parent / "peers" / "llmcompressor_worker.py"
PEERS = {
  "quantization": ("gptq4", "awq4", "gptq3", "awq3"),
  "pruning": ("wanda50", "wanda-2of4", "sparsegpt50", "sparsegpt-2of4", "sparsegpt60", "sparsegpt70"),
}
"""What the peer is asked for beside a config of that name."""

FIGURES = ("ratio", "zeros", "perplexity", "kl", "bits_per_weight", "nbytes", "output_error", "seconds", "peak_bytes")
_SHIFT = 4096
"""Tokens by which the calibration text of one seed starts after that of another."""


def tokens_of(config: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Calibration rows of a seed, and the held-out rows."""
  from lmcompress import load
  from lmcompress.data.text import load_text, windows

  tokenizer, c, e = load(config.model)[2], config.calibration, config.evaluate
  calibration = windows(tokenizer, load_text(c.text), c.windows, c.length, offset=seed * _SHIFT)
  return calibration, windows(tokenizer, load_text(e.texts[0]), e.windows, e.length)


def ours(config: Any, name: str, seed: int, scratch: Path) -> dict[str, Any]:
  """One variant, compressed and scored; with `stream: true` its weights stay in the model's file."""
  import resource

  import jax

  from lmcompress import compress, load
  from lmcompress.calibration import weigh_first
  from lmcompress.calibration.sequential import Streamed
  from lmcompress.evaluate.perplexity import compare
  from lmcompress.evaluate.size import sizes
  from lmcompress.io.store import Store
  from lmcompress.recipe import build

  variant: Any = next(v for v in variants_of(config) if v.name == name)
  calibration, held_out = tokens_of(config, seed)
  calibration = weigh_first(calibration, variant.calibration.first_weight)
  model, params, _ = load(config.model, lazy=variant.stream)
  about = {"recipe": variant.recipe, "seed": seed, "calibration": variant.calibration.model_dump()}
  store = Store(scratch / f"{name}-{seed}", about, mapped=True) if variant.stream else None
  begun = time.perf_counter()
  done, report = compress(model, params, build(variant.recipe), calibration, jax.random.key(seed), store=store)
  seconds, peak = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  total: dict[str, Any] = {}
  scored = Streamed(model) if variant.stream else model
  for _, scores in compare(scored, params, {"float32": params, "done": done}, held_out):
    for key, value in scores.items():
      total[key] = value if key not in total else total[key] + value
  before, after = total["float32"].perplexity, total["done"].perplexity
  return {
    "method": name, "recipe": list(variant.recipe), "float32": before, "perplexity": after, "ratio": after / before,
    "kl": total["done"].summary()["kl"], "bits_per_weight": sizes({"layers": done["layers"]})["bits_per_weight"],
    "nbytes": sizes(done)["nbits"] // 8,
    "output_error": float(np.mean([e for row in report.rows if (e := row["output_error"]) is not None] or [0])),
    "seconds": seconds, "peak_bytes": peak,
  }  # fmt: skip


def study(
  path: Path, seeds: list[int], peer: str | None, only: list[str], folder: Path, gather: bool, earlier: list[Any]
) -> dict[str, Any]:
  """Runs what has left no file yet (nothing with `gather`), and gathers the medians.

  Rows of an `earlier` result stay, and get the ratios of more seeds; the other figures are then those of the files.
  """
  config = load_config(path, [])
  if config.calibration is None:
    raise ConfigError(f"{path.name}: calibration is needed, such as {{text: 'pydoc:odd', windows: 32, length: 512}}")
  folder.mkdir(parents=True, exist_ok=True)
  jobs = [("ours", v.name) for v in variants_of(config) if not only or v.name in only]
  jobs += [("peer", name) for name in PEERS.get(config.name, ()) if not only or f"peer-{name}" in only]
  for seed in seeds:
    for who, name in jobs:
      target = folder / f"{who}-{name}-{seed}.json"
      if gather or target.exists() or (who == "peer" and peer is None):
        continue
      print(f"{who} {name}, calibration {seed}", file=sys.stderr, flush=True)
      if who == "ours":
        command = [sys.executable, __file__, "--config", str(path), "--worker", name, "--seeds", str(seed)]
        command += ["--scratch", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
          raise LmcompressError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        target.write_text(done.stdout.strip().splitlines()[-1] + "\n", "utf-8")
      else:
        from lmcompress.io.hub import resolve_model

        for kind, rows in zip(("calibration", "evaluation"), tokens_of(config, seed), strict=True):
          np.save(folder / f"{kind}-{seed}.npy", rows)
        files = [str(folder / f"{kind}-{seed}.npy") for kind in ("calibration", "evaluation")]
        what = [str(resolve_model(config.model)), *files, name, str(target)]
        with (folder / f"peer-{name}.log").open("w") as log:
          subprocess.run([str(peer), str(WORKER), *what], check=True, stdout=log, stderr=log)
  from lmcompress.environment import device, versions

  weights = {v.name: v.calibration.first_weight for v in variants_of(config) if v.calibration is not None}
  rows, known = [], {(row["who"], row["name"]): row for row in earlier}
  for who, name in dict.fromkeys([*known, *jobs]):
    files = [folder / f"{who}-{name}-{seed}.json" for seed in seeds]
    old = known.get((who, name))
    ratios = dict(zip(old.get("texts", range(old["seeds"])), old["ratios"], strict=True)) if old else {}
    found = {s: json.loads(f.read_text("utf-8")) for s, f in zip(seeds, files, strict=True) if f.exists()}
    if not found and old:
      rows.append(old)
    elif found:
      ratios, first = ratios | {seed: row["ratio"] for seed, row in found.items()}, next(iter(found.values()))
      middle = {k: statistics.median(f[k] for f in found.values()) for k in FIGURES if k in first}
      middle["ratio"] = statistics.median(ratios.values())
      middle["perplexity"] = middle["ratio"] * first["float32"]
      rows.append({"who": who, "name": name, "seeds": len(ratios), "float32": first["float32"], **middle,
                   "texts": sorted(ratios), "ratios": [ratio for _, ratio in sorted(ratios.items())],
                   "recipe": first.get("recipe"), "first_weight": weights[name] if who == "ours" else 1.0})
  return {"format": 1, "name": config.name, "model": config.model, "calibration": config.calibration.model_dump(),
          "evaluate": config.evaluate.model_dump(mode="json"), "versions": versions(), "device": device(), "rows": rows}


def plot(result: dict[str, Any], path: Path) -> None:
  """Bytes of the whole model against the ratio of perplexities, a line for names that differ in their number alone."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(6, 4), layout="constrained")
  axis, lines = figure.subplots(), {}
  for row in sorted(result["rows"], key=lambda row: row["nbytes"]):
    lines.setdefault(row["name"].rstrip("0123456789."), []).append(row)
  for name, line in sorted(lines.items()):
    axis.plot([row["nbytes"] / 1e6 for row in line], [row["ratio"] for row in line], marker="o", label=name)
  axis.set(xlabel="MB of all weights", ylabel="perplexity over float32's", yscale="log", title=result["model"])
  axis.legend()
  figure.savefig(path, metadata={"Date": None})


def main() -> int:
  """Runs the study and writes its result; prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", type=Path, required=True, help="a config with named `variants`")
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="calibration texts")
  parser.add_argument("--only", nargs="+", default=[], help="names of variants, or peer-gptq4 and so on")
  parser.add_argument("--gather", action="store_true", help="run nothing: the medians of what there is")
  parser.add_argument("--extend", type=Path, help="an earlier result of the first seeds, to be added to")
  parser.add_argument("--peer", help="the Python of quantization-requirements.txt")
  parser.add_argument("--out", type=Path, default=RESULTS / "quantization.json", help="result")
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  try:
    if arguments.worker:
      config = load_config(arguments.config, [])
      print(json.dumps(ours(config, arguments.worker, arguments.seeds[0], arguments.scratch)))
      return 0
    result = study(
      arguments.config, arguments.seeds, arguments.peer, arguments.only, Path("results") / "quantization",
      arguments.gather, json.loads(arguments.extend.read_text("utf-8"))["rows"] if arguments.extend else [],
    )
  except LmcompressError as error:
    print(f"quantization: {error}", file=sys.stderr)
    return 2
  arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  if all("nbytes" in row for row in result["rows"]):
    plot(result, arguments.out.with_suffix(".svg"))
  print(f"{'who':<6}{'method':<14}{'ratio':>8}{'bits':>8}{'seconds':>9}{'MiB':>7}")
  for row in result["rows"]:
    bits = f"{row['bits_per_weight']:.3f}" if "bits_per_weight" in row else ""
    memory = int(row["peak_bytes"]) >> 20
    print(f"{row['who']:<6}{row['name']:<14}{row['ratio']:>8.4f}{bits:>8}{row['seconds']:>9.0f}{memory:>7}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
