"""The decode loop: steps run on the device until every sequence has met a token that stops it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.generation.cache import KVCache
from lmcompress.generation.sampling import Sampler
from lmcompress.types import Params

CHUNK = 16
"""Steps between two looks of the host, at most."""
NOTHING = -1
"""Stands in a buffer of tokens where no token was written."""
_STOPS = 8


def stop_array(stop_ids: Iterable[int]) -> np.ndarray:
  """Stop tokens as int32, padded with -1 to a multiple of 8: one shape for nearly every tokenizer."""
  ids = sorted(set(stop_ids))
  return np.asarray(ids + [NOTHING] * (-len(ids) % _STOPS or (0 if ids else _STOPS)), np.int32)


@functools.partial(jax.jit, static_argnames=("model", "sampler"), donate_argnames=("cache",))
def step(
  model: Any, sampler: Sampler, params: Params, tokens: jax.Array, cache: KVCache, key: jax.Array
) -> tuple[jax.Array, KVCache, jax.Array]:
  """Reads one token of each sequence and draws the next: `tokens: [batch]` in, `[batch]` out."""
  return _step(model, sampler, params, tokens, cache, key, None)


def _step(
  model: Any,
  sampler: Sampler,
  params: Params,
  tokens: jax.Array,
  cache: KVCache,
  key: jax.Array,
  live: jax.Array | None,
) -> tuple[jax.Array, KVCache, jax.Array]:
  mask = None if live is None else live[:, None]
  logits, cache = model.apply(params, tokens[:, None], attention_mask=mask, cache=cache)
  key, draw = jax.random.split(key)
  return sampler(logits[:, -1], draw), cache, key


class _Loop(NamedTuple):
  n: jax.Array
  written: jax.Array
  tokens: jax.Array
  cache: KVCache
  key: jax.Array
  done: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "sampler"), donate_argnames=("cache",))
def run(
  model: Any,
  sampler: Sampler,
  params: Params,
  tokens: jax.Array,
  cache: KVCache,
  key: jax.Array,
  done: jax.Array,
  n: jax.Array | int,
  stops: jax.Array | np.ndarray,
) -> tuple[jax.Array, jax.Array, KVCache, jax.Array, jax.Array]:
  """Up to `n` steps, fewer when every sequence has stopped; compiled once whatever `n` and the stop tokens.

  Args:
    tokens: `[batch]`, drawn and not read yet; those that stop their sequence end it here.
    cache: everything before `tokens`; it must have `n` free slots. Donated.
    key: split once a step, so that chunks of any sizes draw the same.
    done: bool `[batch]`, sequences that have stopped.
    n: at most `CHUNK`.
    stops: int32, padded with -1 (`stop_array`).

  Returns:
    `(written, tokens, cache, key, done)`; `written: [batch, CHUNK]` holds the new tokens, the one that stopped a
    sequence included, and -1 where there is none.
  """

  def more(loop: _Loop) -> jax.Array:
    return (loop.n < n) & ~jnp.all(loop.done)

  def body(loop: _Loop) -> _Loop:
    drawn, cache, key = _step(model, sampler, params, loop.tokens, loop.cache, loop.key, ~loop.done)
    column = jnp.where(loop.done, NOTHING, drawn)[:, None]
    written = jax.lax.dynamic_update_slice_in_dim(loop.written, column, loop.n, axis=1)
    tokens = jnp.where(loop.done, loop.tokens, drawn)
    return _Loop(loop.n + 1, written, tokens, cache, key, loop.done | jnp.isin(tokens, stops))

  written = jnp.full((tokens.shape[0], CHUNK), NOTHING, jnp.int32)
  start = _Loop(jnp.int32(0), written, tokens, cache, key, done | jnp.isin(tokens, stops))
  end = jax.lax.while_loop(more, body, start)
  return end.written, end.tokens, end.cache, end.key, end.done
