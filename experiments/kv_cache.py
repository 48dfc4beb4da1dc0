"""The forms of the KV cache: teacher-forced perplexity through each, its bytes, and the time of a decode step over it.

Every token of a window is scored with all before it in the cache, read in pieces of 256. Reproduce the result:

  python experiments/kv_cache.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

RESULT = Path(__file__).parent / "results" / "kv_cache.json"
_PIECE = 256
_STEPS = 16


def perplexity(model: Any, params: Any, windows: np.ndarray, dtype: str) -> tuple[float, int]:
  """Perplexity of the windows' tokens after the first, and the bytes of the cache that held one."""
  import jax
  import jax.numpy as jnp

  from lmcompress.generation import init_cache

  read = jax.jit(lambda p, x, c: model.apply(p, x, cache=c))
  lost, count, nbytes = 0.0, 0, 0
  for row in windows:
    cache = init_cache(model, params, 1, len(row), dtype)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(cache.layers))
    for i in range(0, len(row), _PIECE):
      logits, cache = read(params, row[None, i : i + _PIECE], cache)
      want = row[i + 1 : i + _PIECE + 1]
      logp = jax.nn.log_softmax(logits[0, : len(want)])
      lost -= float(jnp.sum(jnp.take_along_axis(logp, want[:, None], axis=1)))
      count += len(want)
  return float(np.exp(lost / count)), nbytes


def step_ms(model: Any, params: Any, depth: int, slots: int, rounds: int) -> dict[str, float]:
  """Milliseconds of a decode step after `depth` tokens, the median of rounds in which the forms take turns."""
  import jax
  import jax.numpy as jnp

  from lmcompress.generation import Sampler, init_cache
  from lmcompress.generation.cache import CACHE_DTYPES
  from lmcompress.generation.loop import run, stop_array

  read = jax.jit(lambda p, x, c: model.apply(p, x, cache=c)[1])
  tokens = np.random.default_rng(0).integers(0, 1000, (1, depth)).astype(np.int32)
  states = {}
  for dtype in CACHE_DTYPES:
    cache = read(params, tokens, init_cache(model, params, 1, slots, dtype))
    states[dtype] = [jnp.zeros(1, jnp.int32), cache, jax.random.key(0), jnp.zeros(1, bool)]
  taken: dict[str, list[float]] = {dtype: [] for dtype in CACHE_DTYPES}
  for n in range(rounds + 1):
    for dtype, state in states.items():
      begun = time.perf_counter()
      written, *after = run(model, Sampler(), params, *state, np.int32(_STEPS), stop_array([]))
      jax.block_until_ready(written)
      if n:  # the first compiles
        taken[dtype].append((time.perf_counter() - begun) / _STEPS * 1e3)
      after[1] = after[1].rollback(_STEPS)
      states[dtype] = after
  return {dtype: statistics.median(values) for dtype, values in taken.items()}


def main() -> int:
  """Measures, prints the table and writes the result."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="smollm2-135m", help="a known name or a path")
  parser.add_argument("--text", default="pydoc:even", help="a known text or a path")
  parser.add_argument("--windows", type=int, default=2, help="windows that are scored")
  parser.add_argument("--length", type=int, default=2048, help="tokens of a window, a multiple of 256")
  parser.add_argument("--depths", type=int, nargs="+", default=[128, 1024, 1900], help="tokens before a timed step")
  parser.add_argument("--rounds", type=int, default=6, help="timed rounds; 0 leaves the timing out")
  parser.add_argument("--out", type=Path, default=RESULT, help="result")
  arguments = parser.parse_args()

  import lmcompress as lmc
  from lmcompress.data.text import load_text, windows
  from lmcompress.environment import device, versions
  from lmcompress.generation.cache import CACHE_DTYPES

  model, params, tokenizer = lmc.load(arguments.model)
  rows = np.asarray(windows(tokenizer, load_text(arguments.text), arguments.windows, arguments.length))
  forms: dict[str, dict[str, Any]] = {}
  for dtype in CACHE_DTYPES:
    value, nbytes = perplexity(model, params, rows, dtype)
    forms[dtype] = {"perplexity": value, "bytes": nbytes}
  first = forms["float32"]
  for dtype, form in forms.items():
    form["ratio"], form["size"] = form["perplexity"] / first["perplexity"], form["bytes"] / first["bytes"]
    print(f"{dtype:<10}{form['perplexity']:>9.3f}{form['ratio']:>8.4f}{form['bytes']:>12}{form['size']:>7.3f}")
  timed = {}
  if arguments.rounds:
    recipe = lmc.chain(
      lmc.at("layers/*", lmc.round_to_nearest(4, 32)), lmc.at("embed", lmc.round_to_nearest(8, 32))
    )
    small = lmc.prepare(lmc.compress(model, params, recipe)[0], activations="int8")
    for depth in arguments.depths:
      timed[str(depth)] = step_ms(model, small, depth, arguments.length, arguments.rounds)
      print(f"after {depth:>5}: " + ", ".join(f"{dtype} {ms:.2f} ms" for dtype, ms in timed[str(depth)].items()))
  result = {"format": 1, "model": arguments.model, "text": arguments.text, "windows": arguments.windows,
            "length": arguments.length, "versions": versions(), "device": device(), "forms": forms, "step_ms": timed}
  arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  return 0


if __name__ == "__main__":
  sys.exit(main())
