"""What structured pruning takes away: parameters, and latency beside the whole model and beside what arithmetic says.

Prefill and decode of every variant are timed in turns within one process, so that a busy machine hits all alike.
Decoding one sequence reads every weight once, so its time should fall as the bytes do.

  python experiments/structured.py --config configs/smollm2/pruning.yaml --only layers3 layers6 neurons25 kv1of3 width12
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from lmcompress.config import load_config, variants_of
from lmcompress.errors import ConfigError, LmcompressError

RESULT = Path(__file__).parent / "results" / "structured.json"


def study(path: Path, only: list[str], rounds: int, windows: int) -> dict[str, Any]:
  """Compresses each variant and times all of them in turns."""
  import jax

  from lmcompress import compress, load
  from lmcompress.calibration import weigh_first
  from lmcompress.data import text
  from lmcompress.environment import device, versions
  from lmcompress.evaluate import latency
  from lmcompress.evaluate.size import sizes
  from lmcompress.recipe import build

  config = load_config(path, [])
  model, params, tokenizer = load(config.model)
  b, c = config.bench, config.calibration
  if c is None:
    raise ConfigError(f"{path.name}: calibration is needed, such as {{text: 'pydoc:odd', windows: 32, length: 512}}")
  tokens = weigh_first(text.windows(tokenizer, text.load_text(c.text), windows, c.length), c.first_weight)
  trees = {"original": params}
  for variant in variants_of(config):
    if variant.name in only:
      print(f"compressing: {variant.name}", file=sys.stderr, flush=True)
      trees[variant.name] = compress(model, params, build(variant.recipe), tokens, jax.random.key(0))[0]
  times: dict[str, list[tuple[float, float]]] = {name: [] for name in trees}
  for n in range(rounds + 1):
    for name, tree in trees.items():
      start = latency.begin(model, tree, b.prefill, 1, b.decode)
      prefill, state = latency.read(model, tree, start)
      steps, _ = latency.write(model, tree, state, b.decode)
      if n:
        times[name].append((prefill, statistics.median(steps)))
  whole = [statistics.median(t[i] for t in times["original"]) for i in (0, 1)]
  rows = []
  for name, tree in trees.items():
    prefill, decode = (statistics.median(t[i] for t in times[name]) for i in (0, 1))
    share = sizes(tree)["parameters"] / sizes(params)["parameters"]
    rows.append({"name": name, "parameters": sizes(tree)["parameters"], "parameters_ratio": share,
                 "prefill_s": prefill, "prefill_ratio": prefill / whole[0], "decode_s": decode,
                 "decode_ratio": decode / whole[1]})  # fmt: skip
  about = {"model": config.model, "rounds": rounds, "versions": versions(), "device": device()}
  return {"format": 1, **about, "rows": rows}


def main() -> int:
  """Runs the study, writes its result and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", type=Path, required=True, help="a config with named `variants`")
  parser.add_argument("--only", nargs="+", required=True, help="names of variants")
  parser.add_argument("--rounds", type=int, default=7, help="rounds that count, after a warm-up")
  parser.add_argument("--windows", type=int, default=4, help="calibration rows: what is removed matters little here")
  parser.add_argument("--out", type=Path, default=RESULT, help="result")
  arguments = parser.parse_args()
  try:
    result = study(arguments.config, arguments.only, arguments.rounds, arguments.windows)
  except LmcompressError as error:
    print(f"structured: {error}", file=sys.stderr)
    return 2
  arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  print(f"{'variant':<12}{'parameters':>12}{'ratio':>8}{'prefill':>10}{'ratio':>8}{'decode':>10}{'ratio':>8}")
  for r in result["rows"]:
    print(f"{r['name']:<12}{r['parameters']:>12}{r['parameters_ratio']:>8.3f}{r['prefill_s'] * 1e3:>8.0f} ms"
          f"{r['prefill_ratio']:>8.3f}{r['decode_s'] * 1e3:>7.2f} ms{r['decode_ratio']:>8.3f}")  # fmt: skip
  return 0


if __name__ == "__main__":
  sys.exit(main())
