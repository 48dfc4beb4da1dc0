"""Prefill: prompts are read in pieces padded to a few widths, each layer compiled once a width."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.generation.cache import KVCache
from lmcompress.generation.sampling import Sampler
from lmcompress.types import Params

PIECE = 512
"""Tokens of each prompt that are read at once, at most."""
_SMALLEST = 16


def bucket(length: int) -> int:
  """The power of two, at least 16, that a length is padded to: few shapes, few compilations."""
  return max(_SMALLEST, 1 << (length - 1).bit_length())


def padded(length: int) -> int:
  """The width that prompts of up to `length` tokens are padded to: full pieces, and a bucket for what is left."""
  full, rest = divmod(length, PIECE)
  return full * PIECE + (bucket(rest) if rest else 0)


def pad(rows: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
  """Rows padded on the right: tokens int32 and mask bool, `[batch, width]`."""
  tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
  for i, row in enumerate(rows):
    tokens[i, : len(row)], mask[i, : len(row)] = row, True
  return tokens, mask


def read(model: Any, params: Params, tokens: Any, mask: Any, cache: KVCache) -> tuple[jax.Array, KVCache]:
  """Reads the prompts, layer by compiled layer.

  Args:
    tokens, mask: `[batch, width]`; the mask is True for real tokens, at least one in each row.
    cache: has `width` free slots; all of them are filled.

  Returns:
    The logits `[batch, vocab]` after each row's last real token, and the cache.
  """
  mask = np.asarray(mask)
  width = mask.shape[1]
  last = width - 1 - np.argmax(mask[:, ::-1], axis=1)
  logits = None
  for begin in range(0, width, PIECE):
    end = min(begin + PIECE, width)
    inputs = {"tokens": tokens[:, begin:end], "attention_mask": mask[:, begin:end], "cache": cache}
    carry = model.start(params, inputs)
    for block in model.blocks(params):
      carry, _ = model.run(block, params, carry)
    at = np.clip(last - begin, 0, end - begin - 1)
    found, cache = model.finish(params, {**carry, "h": _pick(carry["h"], at)})
    cache = cache.advance(end - begin - 1)
    here = (last >= begin)[:, None]
    logits = found[:, -1] if logits is None else jnp.where(here, found[:, -1], logits)
  assert logits is not None
  return logits, cache


@jax.jit
def _pick(h: jax.Array, at: jax.Array) -> jax.Array:
  """`[batch, 1, embed]` of `h: [batch, length, embed]` at `at: [batch]`: only these meet the head."""
  return jnp.take_along_axis(h, at[:, None, None], axis=1)


def prefill(
  model: Any, sampler: Sampler, params: Params, tokens: Any, mask: Any, cache: KVCache, key: jax.Array
) -> tuple[jax.Array, KVCache, jax.Array]:
  """Reads the prompts (see `read`) and draws the first token of each, `[batch]` int32; also the cache and the key."""
  logits, cache = read(model, params, tokens, mask, cache)
  token, key = draw(sampler, logits, key)
  return token, cache, key


@functools.partial(jax.jit, static_argnames=("sampler",))
def draw(sampler: Sampler, logits: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Splits the key and draws a token of each row of `logits: [batch, vocab]`."""
  key, one = jax.random.split(key)
  return sampler(logits, one), key
