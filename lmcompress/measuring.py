"""What a run measures of each stage: trees for the kernels, scores, speeds, sizes, continuations, histograms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmcompress import ops, tree
from lmcompress.arrays import resolve
from lmcompress.config import Config, rules_of
from lmcompress.distributed.sharding import shard
from lmcompress.evaluate.latency import kernels, latency
from lmcompress.evaluate.measures import compression_efficiency
from lmcompress.evaluate.perplexity import Score, compare
from lmcompress.evaluate.size import sizes
from lmcompress.generation import generate
from lmcompress.io import checkpoint
from lmcompress.run_folder import Records
from lmcompress.stages import Stage, Watcher, key
from lmcompress.types import Params

_HISTOGRAM_BINS = 80


def prepared(config: Config, model: Any, stages: list[Stage], mesh: Any) -> list[Params]:
  """Each stage's tree laid out for the kernels; a weight that stages share is laid out once.

  Scores, speeds and texts come from the same kernels that `generate`, `bench` and `eval` run. (Scoring a window of
  512 tokens is no slower on them than on the reference; a choice by the clock would make results differ from run to
  run in their last bits.)
  """
  made: dict[tuple[str, int], Any] = {}
  trees = []
  for stage in stages:
    leaves = tree.flatten(stage.params)
    new = {path: leaf for path, leaf in leaves.items() if (path, id(leaf)) not in made}
    done = ops.prepare(tree.unflatten(new))
    done = tree.flatten(done if mesh is None else shard(model, done, mesh, rules_of(config)))
    found = {path: leaf for path, leaf in done.items() if path not in leaves}  # stacks of experts, which none shares
    made |= {(path, id(leaf)): done[path] for path, leaf in new.items() if path in done}
    found |= {path: made[path, id(leaf)] for path, leaf in leaves.items() if (path, id(leaf)) in made}
    trees.append(tree.unflatten(found))
  return trees


def scores(
  model: Any,
  stages: list[Stage],
  ready: list[Params],
  texts: dict[str, np.ndarray],
  records: Records,
  watcher: Watcher,
) -> dict[str, dict[str, Score]]:
  """Per stage and text; every window is one record, and windows on record are not scored again."""
  trees = {key(stages, i): params for i, params in enumerate(ready)}
  total = {name: dict.fromkeys(texts, Score(0, 0, 0, 0)) for name in trees}
  for text, tokens in texts.items():
    done = {row["window"]: row["scores"] for row in records.found("score") if row["text"] == text}
    for scores in done.values():
      for name, values in scores.items():
        total[name][text] += Score(*values)
    count = len(done)
    for window, scores in compare(model, ready[0], trees, tokens, done):
      records.add({"kind": "score", "text": text, "window": window, "scores": scores})
      for name, value in scores.items():
        total[name][text] += value
      count += 1
      watcher.step(f"perplexity on {Path(text).name}", count, len(tokens))
  return total


def speeds(
  config: Config, model: Any, stages: list[Stage], ready: list[Params], records: Records, watcher: Watcher
) -> dict[str, dict[str, float]]:
  found = {row["stage"]: row["tokens_per_s"] for row in records.found("latency")}
  b = config.bench
  for i, params in enumerate(ready):
    name = key(stages, i)
    if b.rounds and name not in found:
      watcher.step("latency", i, len(stages))
      measured = latency(model, params, prefill=b.prefill, decode=b.decode, rounds=b.rounds)
      found[name] = {"prefill": measured["prefill"], "decode": measured["decode"]}
      records.add({"kind": "latency", "stage": name, "tokens_per_s": found[name], "detail": measured})
      watcher.step("latency", i + 1, len(stages))
  return found


def continuations(config: Config, model: Any, ready: list[Params], tokenizer: Any, watcher: Watcher) -> dict | None:
  if config.generate is None or tokenizer is None:
    return None
  g = config.generate
  watcher.note("generating")
  before, after = (
    generate(model, params, tokenizer, g.prompt, g.max_new_tokens, chat=g.chat) for params in (ready[0], ready[-1])
  )
  return {"prompt": g.prompt, "before": before, "after": after}


def stage_row(
  stage: Stage, original: Stage, ready: Params, scores: dict[str, Score], speed: dict[str, float]
) -> dict[str, Any]:
  size = sizes(stage.params)
  disk = checkpoint.weights_size(stage.params)
  summaries = {text: score.summary() for text, score in scores.items()}
  return {
    "name": stage.name,
    "parameters": int(size["parameters"]),
    "bits_per_weight": size["bits_per_weight"],
    "bytes_on_disk": disk,
    "bytes_in_memory": int(size["bytes_in_memory"]),
    "compression_efficiency": compression_efficiency(checkpoint.weights_size(original.params), disk),
    "perplexity": {text: s["perplexity"] for text, s in summaries.items()},
    "kl": {text: s["kl"] for text, s in summaries.items()},
    "top1": {text: s["top1"] for text, s in summaries.items()},
    "accuracy": {text: s["accuracy"] for text, s in summaries.items()},
    "tokens_per_s": speed,
    "backend": kernels(ready),
    "seconds": stage.seconds,
    "peak_memory_bytes": stage.peak_memory_bytes,
  }


def histograms(before: Params, after: Params, count: int = 4) -> dict[str, Any]:
  """Histograms of a few weights that changed, spread over the depth."""
  old, new = tree.weights(before), tree.weights(after)
  changed = [
    p for p in new if p in old and new[p] is not old[p] and new[p].shape == old[p].shape and p.endswith("kernel")
  ]
  chosen = changed[:: max(1, len(changed) // count)][:count]
  found = {}
  for path in chosen:
    w0, w1 = (
      np.asarray(x if isinstance(x, jax.Array) else x.materialize(), np.float32).ravel()
      for x in (resolve(before, old[path]), resolve(after, new[path]))
    )
    reach = float(np.quantile(np.abs(w0), 0.999)) or 1.0
    edges = np.linspace(-reach, reach, _HISTOGRAM_BINS + 1)
    found[path] = {
      "edges": [round(float(e), 6) for e in edges],
      "before": np.histogram(w0, edges)[0].tolist(),
      "after": np.histogram(w1, edges)[0].tolist(),
    }
  return found
