"""Every deployment form beside float32: how fast a token is written and a prompt read, how small the weights are.

Weights are rounded, clustered or pruned without data, so this compares speed and size, not quality (a perplexity stands
beside each form all the same). Rounds of all forms alternate, so compare within one run. The threads are all cores.

Reproduce the committed result (a quarter of an hour and 8 GB on 2 cores):

  python experiments/forms.py

A few of them, quickly:

  python experiments/forms.py --forms 'int4*' float32 --rounds 2 --windows 0 --out results/forms.json
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress import arrays, ops, tree
from lmcompress.data.text import load_text, windows
from lmcompress.evaluate.latency import latency
from lmcompress.evaluate.perplexity import perplexity
from lmcompress.io.load import load
from lmcompress.ops import backend
from lmcompress.transforms.round_to_nearest import quantize_matrix

Form = tuple[Callable[[jax.Array, int], Any], str]
"""`(weight, contraction axis) -> leaf`, and what activations are rounded to."""

_CLUSTER_SAMPLE = 1 << 14


def rounded(**options: Any) -> Callable[[jax.Array, int], Any]:
  return lambda w, axis: quantize_matrix(w, axis=axis, **options)


def int8_rows(axis: int) -> Callable[[jax.Array], Any]:
  """What quantizes the values that a sparse form keeps."""
  return functools.partial(quantize_matrix, axis=axis, bits=8, group_size=-1)


def clustered(bits: int) -> Callable[[jax.Array, int], Any]:
  """Codebooks at the quantiles of a sample: quick, and as large as a fitted one."""

  def of(w: jax.Array, axis: int) -> Any:
    sample = jnp.sort(w.reshape(-1)[:: max(1, w.size // _CLUSTER_SAMPLE)])
    where = (jnp.arange(2**bits) + 0.5) / 2**bits * sample.size
    codebook = sample[where.astype(jnp.int32)]
    codes = jnp.searchsorted((codebook[1:] + codebook[:-1]) / 2, w).astype(jnp.uint8)
    return arrays.clustered(codes, codebook, bits, axis, "float32")

  return of


def sparse(n: int, m: int, int8: bool, dtype: Any = jnp.float32) -> Callable[[jax.Array, int], Any]:
  def of(w: jax.Array, axis: int) -> Any:
    quantize = int8_rows(axis) if int8 else None
    return arrays.nm_sparse(w.astype(dtype), arrays.nm_mask(w, n, m, axis), n, m, axis, quantize=quantize)

  return of


def bitmapped(keep: float, int8: bool) -> Callable[[jax.Array, int], Any]:
  def of(w: jax.Array, axis: int) -> Any:
    quantize = int8_rows(axis) if int8 else None
    return arrays.bitmap(w, jnp.abs(w) >= jnp.quantile(jnp.abs(w), 1 - keep), axis, quantize=quantize)

  return of


def low_rank(fraction: float) -> Callable[[jax.Array, int], Any]:
  """Truncated SVD; the factors in bfloat16."""

  def of(w: jax.Array, axis: int) -> Any:
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    rank = max(1, int(fraction * s.size))
    left, right = u[:, :rank] * s[:rank], v[:rank]
    return arrays.low_rank(left.astype(jnp.bfloat16), right.astype(jnp.bfloat16), axis)

  return of


INT4 = {"bits": 4, "group_size": 32, "convention": "signed", "scale_dtype": "float16"}
INT8 = {"bits": 8, "group_size": 32, "convention": "narrow", "scale_dtype": "float16"}
FORMS: dict[str, Form] = {
  "float32": (lambda w, axis: w, "float32"),
  "bfloat16": (lambda w, axis: w.astype(jnp.bfloat16), "bfloat16"),
  "int8 g32, int8 activations": (rounded(**INT8), "int8"),
  "int8 g32": (rounded(**INT8), "float32"),
  "int8 row, int8 activations": (rounded(bits=8, group_size=-1), "int8"),
  "int6 g32": (rounded(bits=6, group_size=32), "float32"),
  "int5 g32": (rounded(bits=5, group_size=32), "float32"),
  "int4 g32, int8 activations": (rounded(**INT4), "int8"),
  "int4 g32": (rounded(**INT4), "float32"),
  "int4 g64 zero": (rounded(bits=4, group_size=64, symmetric=False), "float32"),
  "int4 g64 double": (rounded(bits=4, group_size=64, scale_bits=8), "float32"),
  "int3 g32": (rounded(bits=3, group_size=32), "float32"),
  "int2 g32": (rounded(bits=2, group_size=32), "float32"),
  "nf4 g64": (rounded(grid="nf4", group_size=64), "float32"),
  "mxfp4": (rounded(grid="mxfp4"), "float32"),
  "nvfp4": (rounded(grid="nvfp4"), "float32"),
  "fp8 e4m3 row": (rounded(grid="fp8_e4m3", group_size=-1), "float32"),
  "clustered 4 bits": (clustered(4), "float32"),
  "clustered 8 bits": (clustered(8), "float32"),
  "2:4 int8": (sparse(2, 4, True), "float32"),
  "2:4 bfloat16": (sparse(2, 4, False, jnp.bfloat16), "float32"),
  "bitmap 50 % int8": (bitmapped(0.5, True), "float32"),
  "bitmap 30 % float32": (bitmapped(0.3, False), "float32"),
  "low rank 1/4 bfloat16": (low_rank(0.25), "float32"),
}
"""The embedding takes the form too, but for low-rank and bitmap forms, where it is int8."""


def build(name: str, params: Any) -> Any:
  """The canonical tree of a form."""
  make, _ = FORMS[name]

  def leaf(path: str, w: jax.Array) -> Any:
    axis = tree.contraction_axis(path)
    table = path.endswith("table") and name.startswith(("low rank", "bitmap"))
    return rounded(**INT8)(w, axis) if table else make(w, axis)

  return tree.map_weights(leaf, params)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="smollm2-135m", help="a known name or a folder (default: %(default)s)")
  parser.add_argument("--forms", nargs="+", default=["*"], metavar="PATTERN", help="of the names of forms")
  parser.add_argument("--depth", type=int, default=512, help="tokens before those written (default: %(default)s)")
  parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
  parser.add_argument("--windows", type=int, default=2, help="of 512 tokens, for the perplexity (default: %(default)s)")
  parser.add_argument("--cache", default="bfloat16", help="dtype of keys and values (default: %(default)s)")
  parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "forms.json")
  args = parser.parse_args()
  chosen = [name for name in FORMS if any(fnmatch.fnmatchcase(name, pattern) for pattern in args.forms)]
  if not chosen or args.rounds < 1:
    parser.error(f"no form matches, or no rounds; forms are: {', '.join(FORMS)}")

  model, params, tokenizer = load(args.model)
  tokens = windows(tokenizer, load_text("pydoc"), args.windows, 512) if args.windows else None
  rows: dict[str, dict[str, Any]] = {}
  trees = {}
  for name in chosen:
    canonical = build(name, params)
    bits = sum(tree.leaf_nbits(w) for w in tree.weights(canonical).values())
    trees[name] = ops.prepare(canonical, activations=FORMS[name][1])
    rows[name] = {
      "form": name,
      "activations": FORMS[name][1],
      "megabytes": bits / 8e6,
      "megabytes_prepared": sum(tree.leaf_nbits(w) for w in tree.weights(trees[name]).values()) / 8e6,
      "perplexity": None if tokens is None else perplexity(model, trees[name], tokens),
      "decode": [],
      "prefill": [],
    }
    print(f"{name}: {bits / 8e6:.0f} MB, perplexity {rows[name]['perplexity']}", flush=True)
  setting = {"prefill": args.depth, "decode": 16, "rounds": 1, "cache_dtype": args.cache}
  for n in range(args.rounds):
    for name in chosen[n % len(chosen) :] + chosen[: n % len(chosen)]:
      found = latency(model, trees[name], **setting)
      rows[name]["decode"].append(found["decode"])
      rows[name]["prefill"].append(found["prefill"])
    print(f"round {n + 1} of {args.rounds}", flush=True)
  base = statistics.median(rows[chosen[0]]["decode"])
  for row in rows.values():
    row["speedup"] = statistics.median(row["decode"]) / base
  result = {
    "model": args.model,
    "depth": args.depth,
    "cache": args.cache,
    "backend": backend.describe(),
    "against": chosen[0],
    "forms": list(rows.values()),
  }
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  show(result)


def show(result: dict[str, Any]) -> None:
  from rich.console import Console
  from rich.table import Table

  table = Table(title=f"{result['model']}, depth {result['depth']}, {result['cache']} cache, {result['backend']}")
  for column in ("form", "MB", "perplexity", "decode tok/s", f"x {result['against']}", "prefill tok/s"):
    table.add_column(column, justify="left" if column == "form" else "right")
  for row in result["forms"]:
    decode, prefill = statistics.median(row["decode"]), statistics.median(row["prefill"])
    score = "" if row["perplexity"] is None else f"{row['perplexity']:.4g}"
    table.add_row(
      row["form"], f"{row['megabytes']:.0f}", score, f"{decode:.1f}", f"{row['speedup']:.2f}", f"{prefill:.0f}"
    )
  console = Console()
  console.width = max(console.width, 110)
  console.print(table)


if __name__ == "__main__":
  main()
