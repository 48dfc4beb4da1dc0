"""Latency: prefill and decode in tokens per second, after a warm-up, as medians."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.arrays.tiled import TiledArray
from lmcompress.calibration.token_loss import require_causal
from lmcompress.generation import loop
from lmcompress.generation.cache import KVCache, init_cache
from lmcompress.generation.prefill import prefill as read_prompt
from lmcompress.generation.sampling import Sampler
from lmcompress.ops import backend
from lmcompress.types import CompressedArray, Params

_NEVER = loop.stop_array(())
_GREEDY = Sampler()


def latency(
  model: Any,
  params: Params,
  *,
  prefill: int = 512,
  decode: int = 32,
  batch: int = 1,
  rounds: int = 3,
  cache_dtype: Any = jnp.float32,
  depth: int | None = None,
) -> dict[str, Any]:
  """Times reading a prompt and writing tokens after it.

  Args:
    params: as they run; `ops.prepare` lays them out for the kernels.
    prefill: tokens of the prompt.
    decode: tokens written in each round.
    batch: sequences at once.
    rounds: rounds that count, after one that does not.
    depth: tokens in the cache where decoding starts; None is `prefill`. Another one is read as a prompt of its own.

  Returns:
    `prefill` and `decode` in tokens per second over the batch (medians), `prefill_s` (median, the time to the
    first token) and `decode_ms` with the `minimum`, `median` and `maximum` of a step (steps run on the device in
    chunks of up to 16; each chunk gives one mean), `backend`, and the setting.

  Raises:
    ValueError: a size is not positive, or the model's context is shorter.
  """
  depth = prefill if depth is None else depth
  check(model, [prefill], [depth], [batch], decode, rounds)
  prefill_s, step_s = [], []
  for n in range(rounds + 1):
    for length in dict.fromkeys((prefill, depth)):
      first_s, state = read(model, params, begin(model, params, length, batch, decode, cache_dtype))
      if n and length == prefill:
        prefill_s.append(first_s)
      if length == depth:
        steps, _ = write(model, params, state, decode if n else 1)
        step_s += steps if n else []
  step = statistics.median(step_s)
  return {
    "prefill": batch * prefill / statistics.median(prefill_s),
    "decode": batch / step,
    "prefill_s": statistics.median(prefill_s),
    "decode_ms": {"minimum": min(step_s) * 1e3, "median": step * 1e3, "maximum": max(step_s) * 1e3},
    "depth": depth,
    "batch": batch,
    "rounds": rounds,
    "cache_dtype": str(jnp.dtype(cache_dtype)),
    "backend": kernels(params),
  }


def check(model: Any, prefills: Any, depths: Any, batches: Any, decode: int, rounds: int) -> None:
  """Raises ValueError for sizes that cannot be timed."""
  require_causal(model, "latency")
  for what, values, least in (
    ("prefill", prefills, 1),
    ("depth", depths, 0),
    ("batch", batches, 1),
    ("decode", [decode], 1),
    ("rounds", [rounds], 1),
  ):
    for value in values:
      if value < least:
        raise ValueError(f"latency({what}={value}): at least {least}")
  longest, most = max((*depths, *prefills)), model.config.max_length
  if longest + decode > most:
    raise ValueError(
      f"{'depth' if longest in depths else 'prefill'} {longest} + decode {decode} are more than the model's context "
      f"of {most}"
    )


class State(NamedTuple):
  """A conversation that is timed: the prompt, the token to read next, and the cache (given away at each call)."""

  prompt: np.ndarray
  current: jax.Array
  cache: KVCache
  key: jax.Array


def begin(model: Any, params: Params, length: int, batch: int, decode: int, cache_dtype: Any = jnp.float32) -> State:
  """A prompt of `length` random tokens for each sequence and an empty cache that holds them and `decode` more."""
  vocab = params["embed"]["table"].shape[0]
  prompt = np.random.default_rng(0).integers(0, vocab, (batch, length), np.int32)
  cache = init_cache(model, params, batch, length + decode, cache_dtype)
  return State(prompt, *jax.block_until_ready((jnp.zeros(batch, jnp.int32), cache, jax.random.key(0))))


def read(model: Any, params: Params, state: State) -> tuple[float, State]:
  """Seconds to read the prompt and draw the first token of each sequence (prefill, head and sampling)."""
  prompt = state.prompt
  if not prompt.shape[1]:
    return 0.0, state
  mask = np.ones(prompt.shape, bool)
  begun = time.perf_counter()
  done = jax.block_until_ready(read_prompt(model, _GREEDY, params, prompt, mask, state.cache, state.key))
  return time.perf_counter() - begun, State(prompt, *done)


def write(model: Any, params: Params, state: State, decode: int) -> tuple[list[float], State]:
  """Seconds a step of writing `decode` tokens: the mean of each chunk that the device runs."""
  current, cache, key = state[1:]
  done = jnp.zeros(len(state.prompt), bool)
  step_s = []
  for left in range(decode, 0, -loop.CHUNK):
    steps = min(left, loop.CHUNK)
    begun = time.perf_counter()
    _, current, cache, key, done = jax.block_until_ready(
      loop.run(model, _GREEDY, params, current, cache, key, done, np.int32(steps), _NEVER)
    )
    step_s.append((time.perf_counter() - begun) / steps)
  return step_s, State(state.prompt, current, cache, key)


def kernels(params: Params) -> str:
  """What multiplies the weights of a tree here: the backend, and where it does not, what does instead."""
  weights = tree.weights(params).values()
  here = backend.describe()
  if not backend.runs_native() or any(isinstance(x, TiledArray) for leaf in weights for x in _nodes(leaf)):
    return here
  compressed = any(isinstance(leaf, CompressedArray) for leaf in weights)
  return f"{here}; {'weights on the reference' if compressed else 'dense weights by XLA'}"


def _nodes(leaf: Any) -> list[Any]:
  return jax.tree.leaves(leaf, is_leaf=lambda x: isinstance(x, TiledArray))
