"""lmcompress as its users run it: a recipe, `ops.prepare` for the kernels, and the library's own `latency`.

Options: `recipe` (links as in a config, may be empty), `activations` and `cache` (dtypes); without a recipe, weights
are cast to the dtype of the activations.
"""

from __future__ import annotations

from typing import Any

from protocol import BATCHES, CONTINUATION, Answer, Setting, serve

_FEW = 2
"""`latency` writes tokens in every round, and this many in its warm-up."""


def build(setting: Setting) -> tuple[dict[str, Any], dict[str, Any]]:
  import jax
  import jax.numpy as jnp
  import numpy as np

  import lmcompress
  from lmcompress import compress, load, ops, tree
  from lmcompress.evaluate.latency import latency
  from lmcompress.generation import decode
  from lmcompress.generation.sampling import Sampler
  from lmcompress.ops import backend
  from lmcompress.recipe import build as build_recipe

  options = setting.options
  model, params, _ = load(setting.source)
  if options["recipe"]:
    params, _ = compress(model, params, build_recipe(options["recipe"]))
  else:
    params = tree.map_weights(lambda path, w: w.astype(options["activations"]), params)
  weight_bytes = sum(tree.leaf_nbits(leaf) for leaf in tree.weights(params).values()) // 8
  params = ops.prepare(params, activations=options["activations"])
  jax.block_until_ready(params)
  shapes = model.cache_shapes(params).values()
  itemsize, scale = jnp.dtype(options["cache"]).itemsize, 4 if options["cache"] == "int8" else 0
  about = {
    "versions": {"lmcompress": lmcompress.__version__, "jax": jax.__version__},
    "weight_bytes": weight_bytes,
    "cache_bytes": sum(2 * kv * (head * itemsize + scale) for kv, head in shapes),
    "notes": backend.describe(),
  }

  def measure(batch: int, tokens: int) -> dict[str, Any]:
    sizes = {"prefill": setting.prefill, "decode": tokens, "batch": batch}
    return latency(model, params, **sizes, rounds=1, cache_dtype=options["cache"])

  def prefill() -> Answer:
    found = measure(1, _FEW)
    seconds = found["prefill_s"]
    return {"rate": found["prefill"], "step_s": {"minimum": seconds, "median": seconds, "maximum": seconds}}

  def decode_round(batch: int) -> Answer:
    found = measure(batch, setting.decode)
    return {"rate": found["decode"], "step_s": {name: ms / 1e3 for name, ms in found["decode_ms"].items()}}

  def greedy(prompt: list[int]) -> Answer:
    steps = decode(model, params, [prompt], CONTINUATION, Sampler(), cache_dtype=options["cache"])
    return {"tokens": [int(np.asarray(row)[0]) for row in steps]}

  table = {name: lambda n=n: decode_round(n) for name, n in BATCHES.items()}
  return about, {"prefill": prefill, "greedy": greedy, **table}


if __name__ == "__main__":
  serve(build)
