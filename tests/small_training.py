"""A model that learns a text in a few steps, for the tests of training."""

from __future__ import annotations

import jax
import numpy as np

from lmcompress import tree
from lmcompress.io import checkpoint
from lmcompress.models import Llama, LlamaConfig, LlamaSizes
from lmcompress.training import Labels, mean_loss

SIZES = LlamaSizes(vocab=64, embed=32, mlp=64, layers=2, heads=4, kv_heads=2)
MODEL = Llama(LlamaConfig(head_dim=8), SIZES)
PARAMS = MODEL.init(jax.random.key(0))
ROWS = (np.arange(24 * 16).reshape(24, 16) * 7 % 64).astype(np.int32)
"""A text that can be learned: each token is the one before it plus 7."""


def deltas(path):
  """Whether a path is that of an adapter's products."""
  return tree.matches("**/delta", path)


def same(a, b):
  """Whether two trees are equal to the bit."""
  return checkpoint.tree_hash(a) == checkpoint.tree_hash(b)


def loss_of(params, rows=ROWS):
  """Nats a token of rows."""
  total, count = mean_loss(MODEL, params, {"tokens": rows}, Labels())
  return float(total / count)
