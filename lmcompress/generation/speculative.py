"""Speculative decoding: a cheap draft proposes tokens, the model reads them at once and keeps what it agrees with.

Leviathan et al. 2023 (arXiv:2211.17192), Chen et al. 2023 (arXiv:2302.01318). In the papers' letters `p` is what the
model would draw from, `q` what the draft drew from, both after temperature, top k and top p; a draft `x ~ q` is kept
with probability `min(1, p(x) / q(x))`, and the first one refused is replaced by a draw from `max(0, p - q)`,
normalized. The text then follows `p` exactly, whatever `q` is.

Greedy, a draft is kept while it is the model's own argmax, so the text is the model's. One caveat of arithmetic: the
model scores `k + 1` tokens in one product here and one token in plain decoding; sums in another order differ in
the last bits, and where two logits are that close the argmax may be the other one. In exact arithmetic it is the same.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.generation.cache import KVCache
from lmcompress.generation.loop import NOTHING
from lmcompress.generation.sampling import Sampler, restrict
from lmcompress.generation.slots import keep
from lmcompress.types import Params

ROUNDS = 4
"""Rounds between two looks of the host, at most."""


def first_layers(params: Params, n: int) -> Params:
  """A draft made of the model's first `n` layers with its own norm and head; shares every array, copies none.

  Skipping layers drafts without a second model (Zhang et al. 2023, arXiv:2309.08168, who choose which to skip).

  Raises:
    ValueError: the tree has no layers, or not that many.
  """
  if "layers" not in params:
    raise ValueError(f"first_layers: a tree with 'layers' is needed; found {', '.join(sorted(params))}")
  names = sorted(params["layers"], key=int)
  if not 1 <= n <= len(names):
    raise ValueError(f"first_layers(n={n}): the model has {len(names)} layers; use 1 to {len(names)}")
  return {**params, "layers": {name: params["layers"][name] for name in names[:n]}}


def probabilities(sampler: Sampler, logits: jax.Array) -> jax.Array:
  """What the sampler draws from, `[..., vocab]` float32, of `logits: [..., vocab]`."""
  flat = logits.astype(jnp.float32).reshape(-1, logits.shape[-1])
  if sampler.temperature == 0:
    return jax.nn.one_hot(jnp.argmax(flat, axis=-1), flat.shape[-1]).reshape(logits.shape)
  kept = restrict(flat / sampler.temperature, sampler.top_k, sampler.top_p)
  return jax.nn.softmax(kept, axis=-1).reshape(logits.shape)


def acceptance(p: jax.Array, q: jax.Array) -> jax.Array:
  """The probability `min(1, p / q)` with which each token is kept if drafted; 0 where `q` is, which drafts none."""
  return jnp.where(q > 0, jnp.minimum(1.0, p / jnp.where(q > 0, q, 1.0)), 0.0)


def residual(p: jax.Array, q: jax.Array) -> jax.Array:
  """What replaces a refused token is drawn from: `max(0, p - q)`, normalized over the last axis.

  Where `q == p` nothing is refused, save by rounding; `p` itself stands there.
  """
  rest = jnp.maximum(p - q, 0.0)
  total = jnp.sum(rest, axis=-1, keepdims=True)
  return jnp.where(total > 0, rest / jnp.where(total > 0, total, 1.0), p)


def accept(p: jax.Array, q: jax.Array, drafts: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Modified rejection sampling.

  Args:
    p: `[batch, k + 1, vocab]`, the model's distribution for each draft and for the token after the last.
    q: `[batch, k, vocab]`, the distributions that the drafts were drawn from.
    drafts: `[batch, k]` int32.

  Returns:
    How many drafts are kept, `[batch]` from 0 to k, and the token that follows them, `[batch]` int32.
  """
  coin, draw = jax.random.split(key)
  at = drafts[..., None]
  chance = jnp.take_along_axis(acceptance(p[:, :-1], q), at, axis=-1)[..., 0]
  kept = jax.random.uniform(coin, drafts.shape) < chance
  count = jnp.sum(jnp.cumprod(kept, axis=1), axis=1)
  q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))  # after k kept drafts nothing was drafted: the residual is p
  there = count[:, None, None]
  rest = residual(jnp.take_along_axis(p, there, axis=1)[:, 0], jnp.take_along_axis(q, there, axis=1)[:, 0])
  return count, jax.random.categorical(draw, jnp.log(rest), axis=-1).astype(jnp.int32)


def accept_greedy(logits: jax.Array, drafts: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`accept` at temperature 0, of `logits: [batch, k + 1, vocab]`: drafts are kept while they are the argmax."""
  best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  count = jnp.sum(jnp.cumprod(best[:, :-1] == drafts, axis=1), axis=1)
  return count, jnp.take_along_axis(best, count[:, None], axis=1)[:, 0]


class Speculation(NamedTuple):
  """What a round hands to the next, beside the two caches.

  Attributes:
    last: `[batch]` int32, the newest token, which neither model has read.
    before: `[batch]` int32, the token before it.
    behind: bool `[batch]`, whether the draft has not read that one either (it was the last of k kept drafts).
    key: split anew each round.
    done: bool `[batch]`, sequences that have stopped.
    emitted: `[batch]` int32, tokens written so far.
  """

  last: jax.Array
  before: jax.Array
  behind: jax.Array
  key: jax.Array
  done: jax.Array
  emitted: jax.Array


class Written(NamedTuple):
  """What rounds wrote.

  Attributes:
    tokens: `[batch, ROUNDS * (k + 1)]` int32, each sequence's from the left, -1 after them.
    done: bool `[batch]`.
    rounds: how many were run, int32.
    seen: rounds that a sequence which had not stopped took part in, summed over sequences, int32.
    accepted: drafts kept in them, int32.
  """

  tokens: jax.Array
  done: jax.Array
  rounds: jax.Array
  seen: jax.Array
  accepted: jax.Array


@functools.partial(
  jax.jit, static_argnames=("model", "drafter", "sampler", "k"), donate_argnames=("cache", "draft_cache")
)
def run_rounds(
  model: Any,
  drafter: Any,
  sampler: Sampler,
  k: int,
  params: Params,
  draft_params: Params,
  state: Speculation,
  cache: KVCache,
  draft_cache: KVCache,
  n: jax.Array | int,
  limit: jax.Array | int,
  stops: jax.Array | np.ndarray,
) -> tuple[Written, Speculation, KVCache, KVCache]:
  """Up to `n` rounds: draft `k` tokens, read them all with the model, keep some, draw one more, roll back.

  Fewer rounds are run when every sequence has stopped, or when a cache has no slots left for a round (k + 1; see
  `slots.pack`). Sequences of a batch keep different counts, so their caches have slots that are not real. Compiled
  once whatever `n`, `limit` and the stop tokens.

  Args:
    k: drafts a round.
    cache: the model's, holding everything before `state.last`. Donated.
    draft_cache: the draft's, the same less `state.before` where it is behind. Donated.
    n: at most `ROUNDS`.
    limit: tokens after which a sequence ends, counted by `state.emitted`.
    stops: int32, padded with -1.
  """
  width = ROUNDS * (k + 1)

  def more(loop: tuple[Written, Speculation, KVCache, KVCache]) -> jax.Array:
    written, state, cache, draft_cache = loop
    room = [c.length + k + 1 <= c.real.shape[1] for c in (cache, draft_cache)]
    return (written.rounds < n) & ~jnp.all(state.done) & room[0] & room[1]

  def body(
    loop: tuple[Written, Speculation, KVCache, KVCache],
  ) -> tuple[Written, Speculation, KVCache, KVCache]:
    written, state, cache, draft_cache = loop
    live = ~state.done
    key, draft_key, accept_key = jax.random.split(state.key, 3)
    drafts, q, draft_cache = _draft(drafter, sampler, k, draft_params, state, draft_cache, draft_key)

    tokens = jnp.concatenate([state.last[:, None], drafts], axis=1)
    mask = jnp.broadcast_to(live[:, None], tokens.shape)
    logits, cache = model.apply(params, tokens, attention_mask=mask, cache=cache)
    if q is None:
      count, token = accept_greedy(logits, drafts)
    else:
      count, token = accept(probabilities(sampler, logits), q, drafts, accept_key)
    cache = keep(cache, k + 1, jnp.where(live, count + 1, 0))
    draft_cache = keep(draft_cache, k - 1, jnp.where(live, jnp.minimum(count, k - 1), 0))

    at = jnp.arange(k + 1)
    said = jnp.where(at < count[:, None], jnp.pad(drafts, ((0, 0), (0, 1))), token[:, None])
    ends = jnp.isin(said, stops) & (at <= count[:, None])
    size = jnp.minimum(jnp.where(ends.any(axis=1), jnp.argmax(ends, axis=1), count) + 1, limit - state.emitted)
    size = jnp.where(live, size, 0)
    done = state.done | (ends & (at < size[:, None])).any(axis=1) | (state.emitted + size >= limit)

    filled = jnp.sum(written.tokens != NOTHING, axis=1)[:, None]
    where = jnp.where(at < size[:, None], filled + at, width)  # past the end: dropped
    buffer = written.tokens.at[jnp.arange(said.shape[0])[:, None], where].set(said, mode="drop")
    seen, accepted = jnp.sum(live, dtype=jnp.int32), jnp.sum(jnp.where(live, count, 0), dtype=jnp.int32)
    written = Written(buffer, done, written.rounds + 1, written.seen + seen, written.accepted + accepted)
    state = Speculation(token, drafts[:, -1], count == k, key, done, state.emitted + size)
    return written, state, cache, draft_cache

  done = state.done | jnp.isin(state.last, stops) | (state.emitted >= limit)
  zero = jnp.int32(0)
  tokens = jnp.full((state.last.shape[0], width), NOTHING, jnp.int32)
  start = Written(tokens, done, zero, zero, zero), state._replace(done=done), cache, draft_cache
  return jax.lax.while_loop(more, body, start)


def _draft(
  drafter: Any,
  sampler: Sampler,
  k: int,
  params: Params,
  state: Speculation,
  cache: KVCache,
  key: jax.Array,
) -> tuple[jax.Array, jax.Array | None, KVCache]:
  """Drafts `[batch, k]`, the distributions they are from (none if greedy), and the cache, which lacks the last draft.

  The first read takes two tokens where the draft is behind: one read of two instead of a round's (k + 1)th of one.
  """
  live, behind = ~state.done, state.behind
  pair = jnp.where(
    behind[:, None], jnp.stack([state.before, state.last], axis=1), jnp.stack([state.last, state.last], axis=1)
  )
  logits, cache = drafter.apply(params, pair, attention_mask=jnp.stack([live, live & behind], axis=1), cache=cache)
  cache = keep(cache, 2, jnp.where(live, 1 + behind.astype(jnp.int32), 0))
  logits = jnp.take_along_axis(logits, behind.astype(jnp.int32)[:, None, None], axis=1)[:, 0]

  def draw(logits: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    return sampler(logits, key), None if sampler.temperature == 0 else probabilities(sampler, logits)

  def following(carry: tuple[jax.Array, KVCache], key: jax.Array) -> tuple[tuple[jax.Array, KVCache], Any]:
    token, cache = carry
    logits, cache = drafter.apply(params, token[:, None], attention_mask=live[:, None], cache=cache)
    token, q = draw(logits[:, -1], key)
    return (token, cache), (token, q)

  keys = jax.random.split(key, k)
  first, q_first = draw(logits, keys[0])
  (_, cache), (rest, q_rest) = jax.lax.scan(following, (first, cache), keys[1:])
  drafts = jnp.concatenate([first[None], rest]).swapaxes(0, 1)
  if q_first is None:
    return drafts, None, cache
  return drafts, jnp.concatenate([q_first[None], q_rest]).swapaxes(0, 1), cache
