"""Every pair of families in both orders: it runs, or says by name why not; `docs/pruning.md` holds the table."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from lmcompress.calibration import compress
from lmcompress.transforms import (
  chain,
  kmeans,
  low_rank_residual,
  magnitude,
  prune_layers,
  prune_neurons,
  quantize_activations,
  round_to_nearest,
  share,
  sparse_code,
  tie_layers,
  truncated_svd,
)
from lmcompress.types import WeightError

PAGE = Path(__file__).parents[2] / "docs" / "pruning.md"
TOKENS = np.random.default_rng(0).integers(0, 64, (4, 16)).astype(np.int32)
METHODS = {  # one of a kind; those that calibrate compose as these do, and their own tests show it
  "magnitude": lambda: magnitude(0.5),
  "prune_neurons": lambda: prune_neurons(0.25, score="magnitude", compensate=False),
  "prune_layers": lambda: prune_layers(1, ends=True),
  "round_to_nearest": lambda: round_to_nearest(4, 16),
  "kmeans": lambda: kmeans(8),
  "sparse_code": lambda: sparse_code(atoms=8, nonzeros=2, group_size=16, steps=2),
  "share": lambda: share(16),
  "tie_layers": lambda: tie_layers([[0, 1]], rank=2),
  "truncated_svd": lambda: truncated_svd(0.8, whitening="none"),
  "low_rank_residual": lambda: low_rank_residual(2, "none"),
  "quantize_activations": lambda: quantize_activations(0.05),
}
REASONS = {
  "already stored as": "stored",
  "masked": "masked",
  "a mask removed": "masked",
  "layers that share are dense": "masked",
  "is dense, nothing is lost": "dense",
  "shared with other weights": "shared",
  "is there already": "twice",
  "acted on already": "twice",
}
"""A word for the table, by what the error says."""


@functools.cache
def outcome(first, second):
  """`yes`, or in a word why the pair is refused."""
  from lmcompress.models import Llama, LlamaConfig, LlamaSizes

  model = Llama(LlamaConfig(head_dim=8), LlamaSizes(vocab=64, embed=32, mlp=32, layers=3, heads=4, kv_heads=4))
  try:
    done, _ = compress(model, _params(model), chain(METHODS[first](), METHODS[second]()), TOKENS, jax.random.key(0))
  except WeightError as error:
    assert re.match(r"[a-z_]+(\(.*\))? at layers/\d|[a-z_]+: ", str(error)), error
    return next(word for text, word in REASONS.items() if text in str(error))
  assert np.isfinite(np.asarray(model.apply(done, TOKENS[:1]))).all()
  return "yes"


@functools.cache
def _params(model):
  return model.init(jax.random.key(0))


def table():
  lines = ["| first, then | " + " | ".join(f"`{name}`" for name in METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
  lines += [f"| `{first}` | " + " | ".join(outcome(first, second) for second in METHODS) + " |" for first in METHODS]
  return "\n".join(lines)


@pytest.mark.parametrize("first", METHODS)
def test_pairs(first):
  """Only what cannot have a meaning is refused."""
  found = {second: outcome(first, second) for second in METHODS}
  if first in ("magnitude", "prune_neurons", "prune_layers", "quantize_activations"):
    assert {found[m] for m in ("round_to_nearest", "kmeans", "share")} == {"yes"}
  if first in ("round_to_nearest", "kmeans"):
    assert found["magnitude"] == found["low_rank_residual"] == "yes"
  if first == "low_rank_residual":
    assert set(found.values()) == {"dense"}
  else:
    assert found["prune_layers"] == "yes"
    assert found["quantize_activations"] == ("twice" if first == "quantize_activations" else "yes")


def test_the_page_holds_the_table():
  """Written anew with LMCOMPRESS_WRITE_DOCS=1."""
  text, whole = PAGE.read_text("utf-8"), table()
  assert "<!-- pairs -->\n\n" in text and "\n\n<!-- end of pairs -->" in text
  block = re.compile(r"(<!-- pairs -->\n\n).*?(\n\n<!-- end of pairs -->)", re.DOTALL)
  new = block.sub(lambda m: m[1] + whole + m[2], text)
  if os.environ.get("LMCOMPRESS_WRITE_DOCS"):
    PAGE.write_text(new, "utf-8")
  assert new == text or os.environ.get("LMCOMPRESS_WRITE_DOCS")
