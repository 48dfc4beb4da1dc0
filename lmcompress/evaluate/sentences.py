"""Vectors of sentences by an encoder, and how near a compressed encoder's are to the original's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.generation.prefill import bucket
from lmcompress.types import Params


def sentence_vectors(
  model: Any, params: Params, tokenizer: Any, texts: Sequence[str], length: int = 256, batch: int = 32
) -> np.ndarray:
  """The mean of the last states over each text's tokens, of length 1 (Reimers & Gurevych 2019, arXiv:1908.10084).

  Texts of about the same length go through the model together, padded to a power of two; the order stays.

  Args:
    texts: a text without tokens gets a vector all the same, of its special tokens.
    length: tokens of a text that are read, its first and last special ones counted.
    batch: texts at once.

  Returns:
    float32 `[texts, embed]`.

  Raises:
    ValueError: no texts, or a length or a batch out of range.
  """
  most = model.config.max_length
  if not texts or not 3 <= length <= most or batch < 1:
    raise ValueError(
      f"sentence_vectors({len(texts)} texts, length={length}, batch={batch}): at least one text, "
      f"a length from 3 to {most}, at least one at once"
    )
  rows = [_cut(tokenizer.encode(text, add_special=True), length) for text in texts]
  order, found = sorted(range(len(rows)), key=lambda i: len(rows[i])), {}
  for first in range(0, len(order), batch):
    some = order[first : first + batch]
    width = min(length, bucket(max(len(rows[i]) for i in some)))
    tokens, mask = np.zeros((batch, width), np.int32), np.zeros((batch, width), bool)
    mask[:, 0] = True  # rows that only fill the batch
    for row, i in enumerate(some):
      tokens[row, : len(rows[i])], mask[row, : len(rows[i])] = rows[i], True
    carry = model.start(params, {"tokens": tokens, "attention_mask": mask})
    for block in model.blocks(params):
      carry, _ = model.run(block, params, carry)
    vectors = np.asarray(_mean(model.features(params, carry), mask))
    found.update(zip(some, vectors[: len(some)], strict=True))
  return np.stack([found[i] for i in range(len(rows))])


def mean_cosine(vectors: np.ndarray, others: np.ndarray) -> float:
  """The mean of the cosines of vectors `[n, embed]` with those of the same texts."""
  a, b = (np.asarray(x, np.float64) for x in (vectors, others))
  if a.shape != b.shape or a.ndim != 2:
    raise ValueError(f"mean_cosine: vectors of shapes {a.shape} and {b.shape}; two of [n, embed] are needed")
  return float(np.mean(np.sum(a * b, axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))))


def _cut(ids: list[int], length: int) -> list[int]:
  """The first tokens, the last special one kept at the end."""
  return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


@jax.jit
def _mean(h: jax.Array, mask: jax.Array) -> jax.Array:
  h = h.astype(jnp.float32) * mask[..., None]
  mean = jnp.sum(h, axis=1) / jnp.sum(mask, axis=1, keepdims=True)
  return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
