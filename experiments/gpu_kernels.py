"""The Pallas kernels on a GPU: right against NumPy float64, tile sizes searched, and timed beside dense products.

Sections, each of which stands alone: `check` compares every stored form, few rows and many, at odd sizes; `sweep`
times each kernel over tile sizes at real shapes; `time` sets the kernels as they are beside a dense bfloat16 product
and, where torch is installed, beside torch's own int4 product; `decode` times a whole model of random weights.
Weights are changed from call to call, so that none lies in the cache; a line is the median of several rounds, in
which all candidates take turns.

  python experiments/gpu_kernels.py check time decode --out gpu_kernels.json
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.arrays import NMSparseArray, QuantizedArray, nm_mask, nm_sparse
from lmcompress.ops.kernels import gpu, gpu_quantized
from lmcompress.ops.kernels.gpu_tiles import FEW_ROWS, Tiles
from lmcompress.transforms.round_to_nearest import quantize_matrix

RESULTS = Path(__file__).parent / "results"
FORMS: dict[str, dict[str, Any]] = {
  "int8 row": {"bits": 8, "group_size": -1},
  "int8 g32 zero": {"bits": 8, "group_size": 32, "symmetric": False},
  "int4 g128": {"bits": 4, "group_size": 128},
  "int4 g32": {"bits": 4, "group_size": 32},
  "int4 g48 zero": {"bits": 4, "group_size": 48, "symmetric": False},
  "int4 g128 minimum": {"bits": 4, "group_size": 128, "symmetric": False, "zero": "real"},
  "int4 g16 double": {"bits": 4, "group_size": 16, "scale_bits": 8},
  "fp8_e4m3 row": {"grid": "fp8_e4m3", "group_size": -1},
  "fp8_e5m2 g32": {"grid": "fp8_e5m2", "group_size": 32},
  "2:4 bfloat16": {},
  "2:4 int8 row": {"bits": 8, "group_size": -1},
  "2:4 int4 g32": {"bits": 4, "group_size": 32},
}
TIMED = ("int8 row", "int4 g128", "int4 g128 minimum", "int4 g32", "fp8_e4m3 row", "2:4 bfloat16", "2:4 int8 row")
SHAPES = ((4096, 14336), (4096, 4096), (14336, 4096))
"""The linears of a block of Llama-3-8B, up, query and output, down."""
ROWS = (1, 4, 16, 64, 256, 2048)
SWEPT = (("int4 g128", 4, 1), ("int8 row", 8, 1), ("int4 g128", 4, 16), ("int8 row", 8, 16))
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
WEIGHTS_BYTES = 1 << 29
"""Bytes of different weights that a timing goes through, ten times the cache of an H100."""


def normal(seed: int, *shape: int, dtype: str = "float32", scale: float = 0.5) -> jax.Array:
  """Random entries, made on the device."""
  return (jax.random.normal(jax.random.key(seed), shape) * scale).astype(dtype)


def stored(form: str, inputs: int, outputs: int, axis: int = -2, seed: int = 0) -> Any:
  """A random weight in one of `FORMS`, or dense in bfloat16."""
  w = normal(seed, *((inputs, outputs) if axis == -2 else (outputs, inputs)))
  if form == "bfloat16":
    return w.astype(jnp.bfloat16)
  if form == "2:4 bfloat16":
    return nm_sparse(w.astype(jnp.bfloat16), nm_mask(w, 2, 4, -2), 2, 4, -2)
  if form.startswith("2:4"):
    return nm_sparse(w, nm_mask(w, 2, 4, -2), 2, 4, -2, lambda v: quantize_matrix(v, axis=-2, **FORMS[form]))
  return quantize_matrix(w, axis=axis, **FORMS[form])


def nbytes(leaf: Any) -> int:
  """Bytes that a product must read of a weight."""
  return sum(part.nbytes for part in jax.tree.leaves(leaf))


# check


def error(door: str, x: jax.Array, leaf: Any) -> float:
  """The largest error of a product over its bound, which `tests/ops/test_pallas.py` derives."""
  y = np.asarray(jax.jit(getattr(gpu, door))(x, leaf), np.float64)
  dense = np.asarray(leaf.materialize(), np.float64)
  zeros = np.zeros_like(dense)
  if isinstance(leaf, QuantizedArray):
    import dataclasses

    codes = dataclasses.replace(leaf.codes, data=jnp.zeros_like(leaf.codes.data))
    zeros = np.abs(np.asarray(dataclasses.replace(leaf, codes=codes).materialize(), np.float64))
  if door == "attend":
    dense, zeros = dense.T, zeros.T
  exact = np.asarray(x, np.float64)
  want, magnitude, unit = exact @ dense, np.abs(exact), ROUNDOFF[str(x.dtype)]
  sums = magnitude @ (np.abs(dense) + 2 * zeros)
  bound = unit * np.abs(want) + 8 * x.shape[-1] ** 0.5 * 2.0**-24 * sums + 2.0**-24
  if isinstance(leaf, NMSparseArray) or x.shape[0] > FEW_ROWS:
    bound = bound + unit * (magnitude @ np.abs(dense))
    bound = bound + (x.dtype == jnp.float16) * 2.0**-25 * magnitude.sum(-1, keepdims=True)
  if not np.all(np.isfinite(y)):
    return float("inf")
  return float(np.max(np.abs(y - want) / bound))


def check() -> dict[str, Any]:
  """Every form at few rows and many, odd sizes, the three float types and both doors: the worst, and what failed."""
  cases = []
  for form, (rows, dtype), (inputs, outputs) in itertools.product(
    FORMS, ((1, "bfloat16"), (16, "float32"), (3, "float16"), (70, "bfloat16"), (257, "float32")),
    ((960, 131), (4416, 1040)),
  ):  # fmt: skip
    for door in ("linear",) if form.startswith("2:4") else ("linear", "attend"):
      cases.append((form, door, rows, dtype, inputs, outputs))

  def one(case: tuple[Any, ...]) -> dict[str, Any]:
    form, door, rows, dtype, inputs, outputs = case
    leaf = stored(form, inputs, outputs, -2 if door == "linear" else -1)
    x = normal(7, rows, inputs, dtype=dtype)
    row = {"form": form, "door": door, "rows": rows, "dtype": dtype, "shape": [inputs, outputs]}
    if reason := gpu.supports(x, leaf, door):
      return {**row, "left": reason}
    try:
      return {**row, "error_over_bound": error(door, x, leaf)}
    except Exception as failure:
      return {**row, "failed": f"{type(failure).__name__}: {str(failure)[:300]}"}

  with concurrent.futures.ThreadPoolExecutor(12) as pool:
    rows = list(pool.map(one, cases))
  bad = [row for row in rows if not row.get("error_over_bound", 0.0) <= 1.05 or "failed" in row]
  ran = [row["error_over_bound"] for row in rows if "error_over_bound" in row]
  print(f"check: {len(ran)} products within {max(ran, default=0):.2f} of their bounds, {len(bad)} bad")
  for row in bad[:12]:
    print("  bad", row)
  return {"within": max(ran, default=0), "products": len(ran), "failed": bad}


# timing

Product = Callable[[Any, Any], Any]


def compiled(product: Product, xs: Any, weights: list[Any]) -> Callable[[], None]:
  """One program with a product for each weight and each of `xs`, ready to run; returns once the device is done."""
  inner = jax.jit(product)

  def every(xs: Any, weights: list[Any]) -> list[Any]:
    return [inner(x, w) for x in xs for w in weights]

  program = jax.jit(every).lower(xs, weights).compile()
  return lambda: jax.block_until_ready([program(xs, weights) for _ in range(QUEUED)])


QUEUED = 4
"""Runs of a program that wait in the device's queue, so that the host is not what is timed."""


def interleaved(runs: dict[str, Callable[[], None]], products: int, rounds: int = 7) -> dict[str, list[float]]:
  """Seconds of a product, for each candidate in each round."""
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for n in range(rounds + 1):
    for name, run in runs.items():
      begun = time.perf_counter()
      run()
      if n:
        seconds[name].append((time.perf_counter() - begun) / (products * QUEUED))
  return seconds


def weights_of(form: str, inputs: int, outputs: int, rows: int) -> tuple[list[Any], list[jax.Array]]:
  """Different weights, and different inputs for each."""
  leaf = stored(form, inputs, outputs)
  few = rows <= 128
  count = int(max(2, min(24, WEIGHTS_BYTES // nbytes(leaf)))) if few else 2
  # copies by hand: other bytes at other places are all that the cache must not know
  weights = [leaf, *(jax.tree.map(jnp.copy, leaf) for _ in range(count - 1))]
  xs = [normal(100 + i, rows, inputs, dtype="bfloat16", scale=1.0) for i in range(2 if few else 1)]
  return weights, xs


def dense_product(x: jax.Array, w: jax.Array) -> jax.Array:
  """What a model without compression does."""
  return x @ w


def torch_int4(inputs: int, outputs: int, rows: int, count: int) -> Callable[[], None] | None:
  """torch's own product of bfloat16 and int4 in groups of 128 (tinygemm), in a CUDA graph."""
  try:
    import torch

    codes = torch.randint(0, 255, (outputs, inputs // 2), dtype=torch.uint8, device="cuda")
    packed = torch._convert_weight_to_int4pack(codes, 8)  # pyright: ignore[reportPrivateImportUsage]
    weights = [packed.clone() for _ in range(count)]
    affine = torch.rand(inputs // 128, outputs, 2, dtype=torch.bfloat16, device="cuda")
    xs = [torch.randn(rows, inputs, dtype=torch.bfloat16, device="cuda") for _ in range(2)]

    def every() -> None:
      for x in xs:
        for w in weights:
          torch._weight_int4pack_mm(x, w, 128, affine)  # pyright: ignore[reportPrivateImportUsage]

    every()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
      every()

    def run() -> None:
      for _ in range(QUEUED):
        graph.replay()
      torch.cuda.synchronize()

    return run
  except Exception as failure:
    print(f"torch int4: {type(failure).__name__}: {str(failure)[:200]}")
    return None


def timed(
  rows_of: Any, tuned: dict[tuple[str, int], Tiles], lines: list[dict[str, Any]], keep: Callable[[], Any]
) -> None:
  """The kernels beside the dense product, rounds interleaved; adds a line for each and keeps those found so far."""
  for inputs, outputs, rows in ((*shape, rows) for shape in SHAPES for rows in rows_of):
    runs: dict[str, Callable[[], None]] = {}
    sizes, counts, waiting = {}, {}, {}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      for form in ("bfloat16", *TIMED):
        weights, xs = weights_of(form, inputs, outputs, rows)
        sizes[form], counts[form] = nbytes(weights[0]), len(weights) * len(xs)
        bits = weights[0].codes.bits if isinstance(weights[0], QuantizedArray) else 0
        tiles = tuned.get((gpu_quantized.kind_of(rows), bits)) if rows <= FEW_ROWS else None
        product = functools.partial(gpu.linear, tiles=tiles)
        waiting[form] = pool.submit(compiled, dense_product if form == "bfloat16" else product, xs, weights)
      for form, future in waiting.items():
        try:
          runs[form] = future.result()
        except Exception as failure:
          print(f"time {form} {inputs}x{outputs} rows {rows}: {type(failure).__name__}: {str(failure)[:300]}")
    if rows <= 128 and (run := torch_int4(inputs, outputs, rows, 24)) is not None:
      runs["torch int4 g128"], counts["torch int4 g128"] = run, 48
      sizes["torch int4 g128"] = inputs * outputs // 2 + inputs // 128 * outputs * 4
    seconds = {name: [s / counts[name] for s in found] for name, found in interleaved(runs, 1).items()}
    dense = statistics.median(seconds["bfloat16"])
    for form, found in seconds.items():
      median = statistics.median(found)
      lines.append({
        "form": form, "shape": [inputs, outputs], "rows": rows, "seconds": median, "least": min(found),
        "most": max(found), "nbytes": sizes[form], "bytes_per_s": sizes[form] / median,
        "operations_per_s": 2 * rows * inputs * outputs / median, "speedup": dense / median,
      })  # fmt: skip
      print(f"{inputs:>6}x{outputs:<6} rows {rows:<5} {form:<25} {median * 1e6:9.1f} us "
            f"{sizes[form] / median / 1e12:6.2f} TB/s {lines[-1]['operations_per_s'] / 1e12:7.1f} Tflop/s "
            f"{dense / median:6.2f}x", flush=True)  # fmt: skip
    keep()


CHOICES = {
  "vector": ((1,), (128, 256, 512), (8, 16, 32, 64), (2, 4, 8), (2,), (264, 528, 1056, 2112)),
  "few": ((16,), (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4), (264, 528, 1056)),
}
"""Tile sizes that are tried, in the order of the fields of `Tiles`."""


def sweep(form: str, rows: int, until: float) -> tuple[dict[str, Any], Tiles | None]:
  """Tile sizes of a kernel at one shape, the fastest first, in a random order for as long as there is time."""
  shape = (4096, 14336)
  choices = [Tiles(*choice) for choice in itertools.product(*CHOICES[gpu_quantized.kind_of(rows)])]
  order = np.random.default_rng(0).permutation(len(choices))
  weights, xs = weights_of(form, *shape, rows)
  weights, xs = weights[:8], xs[:1]
  found, failed = [], []

  def build(tiles: Tiles) -> Any:
    try:
      return compiled(functools.partial(gpu.linear, tiles=tiles), xs, weights)
    except Exception as failure:
      return f"{tuple(tiles)}: {type(failure).__name__}: {str(failure)[:120]}"

  with concurrent.futures.ThreadPoolExecutor(12) as pool:
    for start in range(0, len(order), 16):
      if time.perf_counter() > until:
        break
      batch = [choices[i] for i in order[start : start + 16]]
      built = dict(zip(batch, pool.map(build, batch), strict=True))
      failed += [run for run in built.values() if isinstance(run, str)]
      runs: dict[str, Any] = {str(tuple(tiles)): run for tiles, run in built.items() if callable(run)}
      for name, seconds in interleaved(runs, len(weights) * len(xs), 3).items():
        found.append((statistics.median(seconds), name))
  found.sort()
  print(f"sweep {form} {shape} rows {rows}: {len(found)} of {len(choices)}, {len(failed)} failed", *failed[:1])
  for seconds, name in [*found[:5], *found[-1:]]:
    print(f"   {seconds * 1e6:9.1f} us {nbytes(weights[0]) / seconds / 1e12:5.2f} TB/s {name}", flush=True)
  row = {"form": form, "shape": list(shape), "rows": rows,
         "found": [{"seconds": s, "tiles": name} for s, name in found]}  # fmt: skip
  best = found[0][1].strip("()").split(", ") if found else None
  return row, best and Tiles(*map(int, best))


# decode


def decode(forms: tuple[str, ...]) -> list[dict[str, Any]]:
  """A model of the size of Llama-3.2-1B with random weights: prefill and decode, dense and compressed."""
  from lmcompress import tree
  from lmcompress.evaluate.latency import latency
  from lmcompress.models import Llama, LlamaConfig, LlamaSizes

  sizes = LlamaSizes(vocab=128256, embed=2048, mlp=8192, layers=16, heads=32, kv_heads=8, tied=True)
  model = Llama(LlamaConfig(head_dim=64, max_length=4096), sizes)
  dense = model.init(jax.random.key(0))
  norms = jax.tree.map(lambda v: v.astype(jnp.bfloat16), dense)
  lines = []
  for form in ("float32", "bfloat16", *forms):

    def leaf(path: str, value: Any, form: str = form) -> Any:
      if form in ("float32", "bfloat16"):
        return value.astype(form)
      w = value.astype(jnp.bfloat16)
      if path.startswith("embed"):
        return quantize_matrix(w, bits=8, group_size=-1, axis=-1)
      if form.startswith("2:4"):
        return nm_sparse(w, nm_mask(w, 2, 4, -2), 2, 4, -2, lambda v: quantize_matrix(v, axis=-2, **FORMS[form]))
      return quantize_matrix(w, axis=-2, **FORMS[form])

    try:
      params = tree.map_weights(leaf, dense if form == "float32" else norms)
      found = latency(model, params, prefill=512, decode=32, rounds=3, cache_dtype=jnp.bfloat16)
      weights = sum(part.nbytes for part in jax.tree.leaves(params))
      lines.append({"form": form, "nbytes": weights, **found})
      print(f"decode {form:<16} {weights / 1e9:5.2f} GB prefill {found['prefill']:9.0f} decode {found['decode']:8.1f} "
            f"tokens/s, {weights * found['decode'] / 1e12:5.2f} TB/s, {found['backend']}", flush=True)  # fmt: skip
    except Exception as failure:
      print(f"decode {form}: {type(failure).__name__}: {str(failure)[:400]}")
      traceback.print_exc(limit=-3)
  return lines


def ceilings() -> dict[str, float]:
  """What this device reaches: bytes of a copy, counted read and written, and bfloat16 operations of a dense product."""
  copy = jax.jit(lambda x: x + 1)
  block = jnp.zeros((1 << 30,), jnp.uint8)
  w = normal(0, 8192, 8192, dtype="bfloat16")
  square = jax.jit(lambda a, b: a @ b)
  best = {"bytes_per_s": 0.0, "operations_per_s": 0.0}
  for _ in range(4):
    begun = time.perf_counter()
    jax.block_until_ready([copy(block) for _ in range(4)])
    best["bytes_per_s"] = max(best["bytes_per_s"], 8 * block.nbytes / (time.perf_counter() - begun))
    begun = time.perf_counter()
    jax.block_until_ready([square(w, w) for _ in range(8)])
    best["operations_per_s"] = max(best["operations_per_s"], 8 * 2 * 8192**3 / (time.perf_counter() - begun))
  print(f"ceilings: {best['bytes_per_s'] / 1e12:.2f} TB/s, {best['operations_per_s'] / 1e12:.0f} Tflop/s", flush=True)
  return best


def main() -> int:
  """Runs the sections that were asked for and writes what was found."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("sections", nargs="+", choices=("check", "sweep", "time", "decode"))
  parser.add_argument("--out", type=Path, default=RESULTS / "gpu_kernels.json")
  parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
  parser.add_argument("--seconds", type=float, default=100.0, help="for the sweep, all in all")
  arguments = parser.parse_args()
  if jax.default_backend() != "gpu":
    print(f"gpu_kernels: a GPU is needed; this is a {jax.default_backend()}", file=sys.stderr)
    return 2
  jax.config.update("jax_default_matmul_precision", "float32")
  result: dict[str, Any] = {"format": 1, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
  result["ceilings"] = ceilings()
  tuned: dict[tuple[str, int], Tiles] = {}
  keep = lambda: arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")  # noqa: E731
  good = True
  for section in arguments.sections:
    begun = time.perf_counter()
    try:
      if section == "check":
        result["check"] = check()
        good = good and not result["check"]["failed"]
      elif section == "sweep":
        result["sweep"] = []
        for n, (form, bits, rows) in enumerate(SWEPT):
          until = begun + arguments.seconds * (n + 1) / len(SWEPT)
          row, best = sweep(form, rows, until)
          result["sweep"].append(row)
          if best is not None:
            tuned[gpu_quantized.kind_of(rows), bits] = best
      elif section == "time":
        timed(arguments.rows, tuned, result.setdefault("time", []), keep)
      else:
        result["decode"] = decode(("int8 row", "int4 g128", "fp8_e4m3 row", "2:4 int8 row"))
    except Exception:
      traceback.print_exc(limit=-4)
      good = False
    print(f"{section}: {time.perf_counter() - begun:.0f} s", flush=True)
    keep()
  return 0 if good else 1


if __name__ == "__main__":
  sys.exit(main())
