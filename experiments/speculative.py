"""Speculative decoding: compressed copies of a model, and its first layers, draft for it. Greedy, on many prompts.

For each draft: whether every text is the model's own token for token, how many proposals are accepted, and how much
faster the text comes. The model is the float32 original; drafts are laid out for the kernels with int8 activations.

Reproduce the committed result (about five minutes and 4 GB on 2 cores):

  python experiments/speculative.py

Quickly:

  python experiments/speculative.py --prompts 4 --tokens 16 --out results/speculative.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from lmcompress import ops, tree
from lmcompress.data.text import load_text, windows
from lmcompress.generation.engine import Engine
from lmcompress.generation.speculative import first_layers
from lmcompress.io.load import load
from lmcompress.ops import backend
from lmcompress.transforms.round_to_nearest import quantize_matrix

PROMPT_TOKENS = 48


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="smollm2-135m", help="a known name or a folder (default: %(default)s)")
  parser.add_argument("--prompts", type=int, default=50, help="half of each text (default: %(default)s)")
  parser.add_argument("--tokens", type=int, default=32, help="written for each prompt (default: %(default)s)")
  parser.add_argument("--draft-tokens", type=int, default=4, help="proposed in a round (default: %(default)s)")
  parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speculative.json")
  args = parser.parse_args()
  if min(args.prompts, args.tokens - 1, args.draft_tokens) < 1:
    parser.error("at least 1 prompt, 2 tokens and 1 draft token")
  model, params, tokenizer = load(args.model)
  half = -(-args.prompts // 2)
  prompts = [
    [int(t) for t in row]
    for text in ("pydoc", "grimm")
    for row in windows(tokenizer, load_text(text), half, PROMPT_TOKENS)
  ][: args.prompts]

  def rounded(bits: int, group_size: int) -> Any:
    def quantize(path: str, w: Any) -> Any:
      return quantize_matrix(w, axis=tree.contraction_axis(path), bits=bits, group_size=group_size)

    return ops.prepare(tree.map_weights(quantize, params), activations="int8")

  layers = len(params["layers"])
  int8 = rounded(8, 32)
  drafts = {
    "int8 g32": int8,
    "int4 g32": rounded(4, 32),
    f"first {layers * 2 // 3} layers, int8 g32": first_layers(int8, layers * 2 // 3),
  }
  engines = {"none": Engine(model, params)}
  for name, draft in drafts.items():
    engines[name] = Engine(model, params, draft=(model, draft), draft_tokens=args.draft_tokens)

  def write(engine: Engine, prompt: list[int]) -> tuple[list[int], float]:
    tokens = [t for rows in engine.stream([prompt], args.tokens) for t in rows[0]]
    return tokens, engine.stats.tokens_per_s

  for engine in engines.values():
    write(engine, prompts[0])  # compiles
  rows: dict[str, dict[str, Any]] = {
    name: {"draft": name, "identical": 0, "tokens_per_s": [], "accepted": 0, "drafted": 0, "rounds": 0}
    for name in engines
  }
  for n, prompt in enumerate(prompts, 1):  # a prompt is written by all, one after another
    want: list[int] = []
    for name, engine in engines.items():
      tokens, speed = write(engine, prompt)
      want = want or tokens
      row, stats = rows[name], engine.stats
      row["identical"] += tokens == want
      row["tokens_per_s"].append(speed)
      for key in ("accepted", "drafted", "rounds"):
        row[key] += getattr(stats, key)
    if n % 10 == 0:
      print(f"{n} of {len(prompts)} prompts", flush=True)
  base = statistics.median(rows["none"]["tokens_per_s"])
  for row in rows.values():
    row["speedup"] = statistics.median(row["tokens_per_s"]) / base
    row["acceptance"] = row["accepted"] / row["drafted"] if row["drafted"] else None
  result = {
    "model": args.model,
    "prompts": len(prompts),
    "tokens": args.tokens,
    "draft_tokens": args.draft_tokens,
    "backend": backend.describe(),
    "drafts": list(rows.values()),
  }
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  show(result)


def show(result: dict[str, Any]) -> None:
  from rich.console import Console
  from rich.table import Table

  table = Table(title=f"{result['model']}: {result['prompts']} prompts, {result['draft_tokens']} draft tokens a round")
  for column in ("draft", "identical texts", "accepted", "tokens/s", "speedup"):
    table.add_column(column, justify="left" if column == "draft" else "right")
  for row in result["drafts"]:
    accepted = "" if row["acceptance"] is None else f"{row['acceptance']:.1%}"
    speed = f"{statistics.median(row['tokens_per_s']):.1f}"
    table.add_row(row["draft"], f"{row['identical']}/{result['prompts']}", accepted, speed, f"{row['speedup']:.2f}")
  console = Console()
  console.width = max(console.width, 100)
  console.print(table)


if __name__ == "__main__":
  main()
