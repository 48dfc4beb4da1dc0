"""Latency: prefill and decode in tokens per second, after a warm-up, as medians."""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.generation.cache import init_cache
from lmcompress.generation import loop
from lmcompress.generation.prefill import prefill as read_prompt
from lmcompress.generation.sampling import Sampler
from lmcompress.ops import backend
from lmcompress.types import Params

_NEVER = loop.stop_array(())


def latency(
  model: Any,
  params: Params,
  *,
  prefill: int = 512,
  decode: int = 32,
  batch: int = 1,
  rounds: int = 3,
  cache_dtype: Any = jnp.float32,
) -> dict[str, Any]:
  """Times reading a prompt and writing tokens after it.

  Args:
    prefill: tokens of the prompt; decoding starts at this depth.
    decode: tokens written in each round.
    batch: sequences at once.
    rounds: rounds that count, after one that does not.

  Returns:
    `prefill` and `decode` in tokens per second over the batch (medians), `prefill_s` (median, the time to the
    first token) and `decode_ms` with the `minimum`, `median` and `maximum` of a step (steps run on the device in
    chunks of up to 16; each chunk gives one mean), `backend`, and the setting.

  Raises:
    ValueError: a size is not positive, or the model's context is shorter.
  """
  if min(prefill, decode, batch, rounds) < 1:
    raise ValueError(f"latency(prefill={prefill}, decode={decode}, batch={batch}, rounds={rounds}): at least 1 each")
  if prefill + decode > model.config.max_length:
    raise ValueError(
      f"prefill {prefill} + decode {decode} are more than the model's context of {model.config.max_length}"
    )
  vocab = params["embed"]["table"].shape[0]
  tokens = np.random.default_rng(0).integers(0, vocab, (batch, prefill), np.int32)
  mask, greedy, key = np.ones(tokens.shape, bool), Sampler(), jax.random.key(0)
  prefill_s, step_s = [], []
  for n in range(rounds + 1):
    cache = init_cache(model, params, batch, prefill + decode, cache_dtype)
    jax.block_until_ready(cache)
    begun = time.perf_counter()
    current, cache, key = jax.block_until_ready(read_prompt(model, greedy, params, tokens, mask, cache, key))
    if n:
      prefill_s.append(time.perf_counter() - begun)
    done = jnp.zeros(batch, bool)
    for left in range(decode, 0, -loop.CHUNK) if n else (2,):
      steps = min(left, loop.CHUNK)
      begun = time.perf_counter()
      _, current, cache, key, done = jax.block_until_ready(
        loop.run(model, greedy, params, current, cache, key, done, np.int32(steps), _NEVER)
      )
      if n:
        step_s.append((time.perf_counter() - begun) / steps)
  step = statistics.median(step_s)
  return {
    "prefill": batch * prefill / statistics.median(prefill_s),
    "decode": batch / step,
    "prefill_s": statistics.median(prefill_s),
    "decode_ms": {"minimum": min(step_s) * 1e3, "median": step * 1e3, "maximum": max(step_s) * 1e3},
    "depth": prefill,
    "batch": batch,
    "rounds": rounds,
    "cache_dtype": str(jnp.dtype(cache_dtype)),
    "backend": backend.describe(),
  }
