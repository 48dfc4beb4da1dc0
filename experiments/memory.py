"""The most memory that reading a prompt and writing after it takes, beside weights, cache and an empty JAX process.

Each measurement is a process of its own: an empty one, one that starts with no compiled programs kept, and one that
finds those of the run before. Peaks are the kernel's, of resident memory, with file pages that are mapped. The time to
the first text begins where Python has started.

Reproduce the committed result (a minute on 2 cores):

  python experiments/memory.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "memory.json"
ALLOWED = 1.25
"""Of weights, cache and an empty process, so much is asked for."""


def empty() -> dict[str, int]:
  """What a process holds that has run one operation."""
  import jax

  from lmcompress.evaluate.memory import peak_bytes

  jax.block_until_ready(jax.numpy.zeros(8) + 1)
  return {"peak": peak_bytes()}


def generating(folder: str, prompt: int, tokens: int, cache: str) -> dict[str, Any]:
  """Loads a saved model, writes `tokens` after `prompt` and tells the peak after each part."""
  import time

  begun = time.perf_counter()
  import jax

  from lmcompress import generate, load, prepare, tree
  from lmcompress.data.text import load_text
  from lmcompress.environment import keep_programs
  from lmcompress.evaluate.memory import peak_bytes
  from lmcompress.generation import init_cache

  keep_programs()
  peaks = {"imports": peak_bytes()}
  model, params, tokenizer = load(folder)
  peaks["load"] = peak_bytes()
  params = prepare(params, consume=True)
  weights = sum(tree.leaf_nbits(leaf) // 8 for leaf in tree.flatten(params).values())
  peaks["prepare"] = peak_bytes()
  text = tokenizer.decode(tokenizer.encode(load_text("pydoc:even")[:8000])[:prompt])
  first: list[float] = []
  heard = lambda _: first.append(time.perf_counter() - begun)  # noqa: E731
  generate(model, params, tokenizer, text, tokens, cache_dtype=cache, on_text=heard)
  kv = jax.eval_shape(lambda: init_cache(model, params, 1, prompt + tokens, cache))
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kv))
  return {"peak": peak_bytes(), "peaks": peaks, "weights": weights, "cache": held, "first_text_s": first[0],
          "seconds": time.perf_counter() - begun}


def child(*what: str, **environment: str) -> dict[str, Any]:
  command = [sys.executable, __file__, "--child", *what]
  done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
  if done.returncode:
    raise SystemExit(f"memory: {' '.join(what)}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
  return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> int:
  """Compresses once, measures each process, and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="smollm2-135m", help="a known name or a folder (default: %(default)s)")
  parser.add_argument("--bits", type=int, default=4, help="of the linears; the table has 8 (default: %(default)s)")
  parser.add_argument("--prompt", type=int, default=512, help="tokens that are read (default: %(default)s)")
  parser.add_argument("--tokens", type=int, default=64, help="tokens that are written (default: %(default)s)")
  parser.add_argument("--cache", default="bfloat16", help="dtype of keys and values (default: %(default)s)")
  parser.add_argument("--out", type=Path, default=RESULT, help="result (default: %(default)s)")
  parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.child:
    name, *rest = args.child
    found = empty() if name == "empty" else generating(rest[0], int(rest[1]), int(rest[2]), rest[3])
    print(json.dumps(found))
    return 0
  import lmcompress as lmc
  from lmcompress.environment import device, versions

  with tempfile.TemporaryDirectory() as scratch:
    folder, programs = str(Path(scratch) / "model"), str(Path(scratch) / "programs")
    model, params, tokenizer = lmc.load(args.model)
    recipe = lmc.chain(
      lmc.at("layers/*", lmc.round_to_nearest(bits=args.bits, group_size=32)),
      lmc.at("embed", lmc.round_to_nearest(bits=8, group_size=32)),
    )
    small, _ = lmc.compress(model, params, recipe)
    lmc.save(folder, model, small, tokenizer)
    del params, small
    what = ("generate", folder, str(args.prompt), str(args.tokens), args.cache)
    bare = child("empty")["peak"]
    rows = {
      "nothing kept": child(*what, JAX_ENABLE_COMPILATION_CACHE="false"),
      "first start": child(*what, LMCOMPRESS_CACHE=programs),
      "second start": child(*what, LMCOMPRESS_CACHE=programs),
    }
  print(f"{'':<22}{'MiB':>6}{'ratio':>7}{'first text, s':>15}   after imports, load, prepare")
  for name, row in rows.items():
    row["ratio"] = row["peak"] / (bare + row["weights"] + row["cache"])
    parts = ", ".join(f"{value >> 20}" for value in row["peaks"].values())
    print(f"{name:<22}{row['peak'] >> 20:>6}{row['ratio']:>7.2f}{row['first_text_s']:>15.1f}   {parts}")
  first = next(iter(rows.values()))
  print(f"an empty process {bare >> 20} MiB, weights {first['weights'] >> 20}, cache {first['cache'] >> 20}; "
        f"asked for: at most {ALLOWED}")
  setting = {name: getattr(args, name) for name in ("model", "bits", "prompt", "tokens", "cache")}
  result = {"format": 1, **setting, "asked_for_at_most": ALLOWED, "empty": bare, "rows": rows, "versions": versions(),
            "device": device()}
  args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  return 0


if __name__ == "__main__":
  sys.exit(main())
