"""The benchmark: prefill and decode at each length and batch, rounds interleaved, held against the machine's bounds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.evaluate import latency, roofline
from lmcompress.evaluate.energy import Meter, meter
from lmcompress.evaluate.memory import above_runtime, peak_bytes, release, reset_peak, runtime_bytes
from lmcompress.evaluate.size import sizes
from lmcompress.generation.cache import CACHE_DTYPES, init_cache
from lmcompress.generation.prefill import PIECE
from lmcompress.ops import backend
from lmcompress.ops.prepare import ACTIVATIONS, prepare
from lmcompress.types import Params


def check(activations: str, cache: str, watts: float | None = None) -> None:
  """Raises ValueError for options that cannot be; before a model is loaded."""
  for what, value, words in (("activations", activations, ACTIVATIONS), ("cache", cache, CACHE_DTYPES)):
    if value not in words:
      raise ValueError(f"{what} {value!r}: one of {', '.join(words)}")
  if activations != "float32" and not backend.runs_native():
    raise ValueError(f"activations {activations!r} are for the native kernels; here {backend.describe()} runs")
  meter(watts)


def bench(
  model: Any,
  params: Params,
  *,
  prefill: Sequence[int] = (512,),
  depth: Sequence[int] = (512,),
  batch: Sequence[int] = (1,),
  decode: int = 32,
  rounds: int = 5,
  activations: str = "float32",
  cache: str = "float32",
  watts: float | None = None,
  consume: bool = False,
  note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
  """Prepares a tree for the kernels and times it at every setting.

  Each round visits every setting once, so that a busy moment of the machine does not fall on one of them alone;
  a round before the first compiles and does not count.

  Args:
    prefill: lengths of prompts that are read into an empty cache.
    depth: tokens in the cache where decoding starts.
    batch: sequences at once; every length is timed with each.
    decode: tokens written in each round.
    activations: see `ops.prepare`.
    cache: dtype of keys and values.
    watts: for a modelled energy, see `energy.meter`.
    consume: empties `params` when they are laid out anew, which saves the memory of a second tree.
    note: told what is done.

  Returns:
    `machine` (backend, threads, bandwidth in bytes/s, peak in operations/s, ...), `model` (sizes), and `rows`: one
    for each phase, length and batch, as `_row` describes.

  Raises:
    ValueError: a size or word that cannot be; says which.
  """
  check(activations, cache, watts)
  latency.check(model, prefill, depth, batch, decode, rounds)
  size = sizes(params)
  note("preparing")
  reset_peak()
  begun = time.perf_counter()
  params = prepare(params, activations=activations, consume=consume)
  jax.block_until_ready(params)
  prepare_s, prepare_peak = time.perf_counter() - begun, peak_bytes()
  release()
  counter = meter(watts, backend.threads(), jax.default_backend())
  settings = [(b, n) for b in dict.fromkeys(batch) for n in sorted({*prefill, *depth})]
  found = {
    (phase, b, n): _Samples()
    for b, n in settings
    for phase, lengths in (("prefill", prefill), ("decode", depth))
    if n in lengths
  }
  for done in range(rounds + 1):
    note(f"round {done} of {rounds}" if done else "compiling")
    for b, n in settings:
      state = latency.begin(model, params, n, b, decode, cache)
      first = found.get(("prefill", b, n), _Samples()) if done else _Samples()
      with first.stretch(counter):
        seconds, state = latency.read(model, params, state)
      first.seconds.append(seconds)
      if ("decode", b, n) in found:
        steps = found["decode", b, n] if done else _Samples()
        with steps.stretch(counter):
          chunks, state = latency.write(model, params, state, decode if done else 1)
        steps.seconds += chunks
      del state
  note("measuring the machine")
  bandwidth, peak = _bandwidth(), _peak()
  slot = roofline.slot_bytes(init_cache(model, params, 1, 1, cache))
  chosen = getattr(model.config, "experts_per_token", 1)
  rows = []
  for (phase, b, n), samples in found.items():
    if phase == "prefill":
      work = roofline.prefill_work(params, batch=b, length=n, slot_bytes=slot, piece=PIECE, chosen=chosen)
    else:
      work = roofline.decode_work(params, batch=b, depth=n + (decode + 1) / 2, slot_bytes=slot, chosen=chosen)
    tokens = work.tokens * rounds * (decode if phase == "decode" else 1)
    rows.append(_row(phase, b, n, samples, work, tokens, counter, bandwidth, peak))
  return {
    "format": 1,
    "model": {
      "parameters": int(size["parameters"]),
      "bits_per_weight": size["bits_per_weight"],
      "bytes_in_memory": sum(roofline.leaf_bytes(x) for x in jax.tree.leaves(params)),
      "prepare_s": prepare_s,
      "prepare_peak_memory_bytes": prepare_peak,
    },
    "machine": {
      "backend": latency.kernels(params),
      "threads": backend.threads(),
      "activations": activations,
      "cache": cache,
      "bandwidth": bandwidth,
      "peak": peak,
      "runtime_memory_bytes": runtime_bytes(),
      "energy": None if counter is None else {"label": counter.label, "source": counter.source},
    },
    "decode": decode,
    "rounds": rounds,
    "rows": rows,
  }


class _Samples:
  """What the rounds of one setting gave."""

  def __init__(self) -> None:
    self.seconds: list[float] = []
    self.joules = 0.0
    self.peak_bytes = 0

  @contextlib.contextmanager
  def stretch(self, counter: Meter | None) -> Iterator[None]:
    """Adds the energy and the peak memory of a `with` block."""
    reset_peak()
    before = counter.read() if counter else 0.0
    yield
    if counter:
      self.joules += counter.read() - before
    self.peak_bytes = max(self.peak_bytes, peak_bytes())


def _row(
  phase: str,
  batch: int,
  length: int,
  samples: _Samples,
  work: roofline.Work,
  tokens: int,
  counter: Meter | None,
  bandwidth: float,
  peak: float,
) -> dict[str, Any]:
  """One line of the benchmark.

  `length` is the prompt's for prefill and the cache's depth for decode. `tokens_per_s` and `seconds` (of a prompt, or
  of a step) have minimum, quartiles and maximum. `bytes_per_token` is what must be read, weights and keys and
  values apart too; `bandwidth_fraction` and `roofline_fraction` compare with what this machine reaches.
  """
  seconds = spread(samples.seconds)
  median = seconds["median"]
  return {
    "phase": phase,
    "batch": batch,
    "length": length,
    "tokens_per_s": spread([work.tokens / s for s in samples.seconds]),
    "seconds": seconds,
    **({"first_token_s": median} if phase == "prefill" else {}),
    "bytes_per_token": work.nbytes / work.tokens,
    "weight_bytes_per_token": work.weight_bytes / work.tokens,
    "kv_bytes_per_token": work.kv_bytes / work.tokens,
    "operations_per_token": work.operations / work.tokens,
    "operations_per_byte": work.intensity,
    "bytes_per_s": work.nbytes / median,
    "operations_per_s": work.operations / median,
    "bandwidth_fraction": work.nbytes / median / bandwidth,
    "roofline_fraction": roofline.bound_s(work, bandwidth, peak) / median,
    "joules_per_token": samples.joules / tokens if counter else None,
    "energy": counter.label if counter else None,
    "peak_memory_bytes": samples.peak_bytes,
    "above_runtime_bytes": above_runtime(samples.peak_bytes),
  }


def spread(values: Sequence[float]) -> dict[str, float]:
  """Minimum, quartiles and maximum."""
  names = ("minimum", "lower_quartile", "median", "upper_quartile", "maximum")
  return dict(zip(names, np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist(), strict=True))


def _bandwidth(nbytes: int = 1 << 29, rounds: int = 5) -> float:
  """Bytes a second that memory gives: to the native kernels' threads, or to an XLA sum where there are none."""
  if jax.default_backend() == "cpu" and backend.native() is not None:
    return backend.read_bandwidth(nbytes, rounds)
  block = jnp.ones(nbytes // 4, jnp.float32)
  return nbytes / _best_s(jax.jit(jnp.sum), block, rounds)


def _peak(n: int = 2048, rounds: int = 5) -> float:
  """Operations a second of a float32 matrix product, the best of `rounds`."""
  x = jnp.ones((n, n), jnp.float32)
  return 2 * n**3 / _best_s(jax.jit(lambda x: x @ x), x, rounds)


def _best_s(f: Callable[[jax.Array], jax.Array], x: jax.Array, rounds: int) -> float:
  jax.block_until_ready(f(x))
  best = float("inf")
  for _ in range(rounds):
    begun = time.perf_counter()
    jax.block_until_ready(f(x))
    best = min(best, time.perf_counter() - begun)
  return best
