"""The decode engine: prompts as ids in, new tokens out as they come; plain or speculative, with prefixes reused."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.calibration.token_loss import require_causal
from lmcompress.generation import loop, speculative
from lmcompress.generation.cache import KVCache, init_cache
from lmcompress.generation.prefill import draw, pad, padded, read
from lmcompress.generation.prefix import Match, PrefixCache
from lmcompress.generation.sampling import Sampler
from lmcompress.generation.slots import pack, slot_axes
from lmcompress.generation.windowed import GROUP
from lmcompress.types import Params

_SLOTS = 128
"""Cache sizes are multiples of this."""


@dataclasses.dataclass
class Stats:
  """What a generation took.

  Attributes:
    prompt_tokens: tokens of all prompts.
    reused_tokens: those copied from a prefix cache instead of read.
    tokens: tokens written, over all sequences, those that stopped them included.
    rounds: speculative rounds, summed over the sequences that took part in them; 0 for plain decoding.
    drafted: tokens that the draft proposed in them.
    accepted: proposals that were kept.
    first_token_s: seconds to the first token.
    total_s: seconds to the last token, the first included.
    sequences: how many prompts.
  """

  prompt_tokens: int = 0
  reused_tokens: int = 0
  tokens: int = 0
  rounds: int = 0
  drafted: int = 0
  accepted: int = 0
  first_token_s: float = 0.0
  total_s: float = 0.0
  sequences: int = 0

  @property
  def acceptance_rate(self) -> float:
    """Share of the drafted tokens that were kept; NaN without a draft."""
    return self.accepted / self.drafted if self.drafted else float("nan")

  @property
  def tokens_per_round(self) -> float:
    """Tokens that a round gives a sequence: the kept drafts and one more; NaN without a draft."""
    return (self.accepted + self.rounds) / self.rounds if self.rounds else float("nan")

  @property
  def tokens_per_s(self) -> float:
    """Tokens a second after the first of each sequence; NaN if there are none."""
    later, seconds = self.tokens - self.sequences, self.total_s - self.first_token_s
    return later / seconds if later and seconds > 0 else float("nan")

  def __str__(self) -> str:
    text = f"{self.tokens} tokens, the first after {self.first_token_s:.2f} s"
    if self.tokens > self.sequences:
      text += f", then {self.tokens_per_s:.1f} tokens/s"
    text += f"; prompt of {self.prompt_tokens} tokens, {self.reused_tokens} of them reused"
    if self.rounds:
      kept, size = f"{self.acceptance_rate:.1%} of {self.drafted}", f"{self.tokens_per_round:.2f}"
      text += f"; draft: {kept} proposals accepted, {size} tokens a round"
    return f"{text}; compilation included"


@dataclasses.dataclass
class _Chunk:
  """What the device was asked to write: tokens `[batch, some]`, -1 where there is none, and what goes with them."""

  tokens: jax.Array
  done: jax.Array | None = None
  written: speculative.Written | None = None


class Engine:
  """Decodes prompts with one model, its settings fixed; `stats` tells of the latest `stream`.

  Args:
    sampler: how tokens are drawn.
    cache_dtype: what `init_cache` takes.
    draft: `(model, params)` with the same vocabulary, for speculative decoding (`speculative.py`).
    draft_tokens: how many tokens the draft proposes in a round.
    prefix_cache: prompts that begin like one in it read only the rest.
    ahead: whether the next chunk runs while the caller looks at the last one's tokens. It loses nothing where only
      stop tokens and `max_new_tokens` end a text; leave it off where the caller may end it for another reason.

  Raises:
    ValueError: a setting out of range, or a draft that does not fit the model.
  """

  def __init__(
    self,
    model: Any,
    params: Params,
    sampler: Sampler | None = None,
    *,
    cache_dtype: Any = jnp.float32,
    draft: tuple[Any, Params] | None = None,
    draft_tokens: int = 4,
    prefix_cache: PrefixCache | None = None,
    ahead: bool = True,
  ):
    self.sampler = Sampler() if sampler is None else sampler
    self.sampler.check()
    self.model, self.params, self.cache_dtype = model, params, cache_dtype
    self.draft, self.draft_tokens, self.prefix_cache, self.ahead = draft, draft_tokens, prefix_cache, ahead
    self.stats = Stats()
    require_causal(model, "generation")
    if draft is not None:
      if any(hasattr(each, "states") for each in (model, draft[0])):
        raise ValueError("a recurrent model takes back no tokens that a draft proposed: generate without a draft")
      if draft_tokens < 1:
        raise ValueError(f"draft_tokens={draft_tokens}: a draft proposes at least 1 token a round; 4 is usual")
      if cache_dtype == "int4" and draft_tokens >= GROUP:
        raise ValueError(f"draft_tokens={draft_tokens}: an int4 cache takes back fewer than {GROUP} tokens at a time")
      theirs, ours = _vocab(draft[1]), _vocab(params)
      if theirs != ours:
        raise ValueError(
          f"the draft has a vocabulary of {theirs} tokens and the model one of {ours}; a draft must share the "
          "model's tokenizer: take a smaller or compressed model of its family, or its own first layers"
        )

  def stream(
    self,
    ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    key: jax.Array | None = None,
    stop_ids: Sequence[int] | frozenset[int] = (),
  ) -> Iterator[list[list[int]]]:
    """Yields the new tokens of every sequence as they come: `[[...], ...]`, some of them empty, the first soon.

    A sequence ends with a token of `stop_ids`, which is yielded, or at `max_new_tokens`.

    Args:
      ids: the prompts, each at least one token.
      key: decides the draw; needed when the temperature is positive.

    Raises:
      ValueError: see `generate`; raised at once, not at the first token.
    """
    if max_new_tokens < 1:
      raise ValueError(f"max_new_tokens={max_new_tokens}: at least 1")
    if self.sampler.temperature > 0 and key is None:
      raise ValueError("a temperature above 0 draws at random: pass key=jax.random.key(seed)")
    if not ids or not all(len(row) for row in ids):
      raise ValueError("every prompt needs at least one token")
    longest = max(len(row) for row in ids)
    for who, model in (("model", self.model), ("draft", self.draft[0] if self.draft else self.model)):
      limit = model.config.max_length
      if longest + max_new_tokens > limit:
        raise ValueError(
          f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than the {who}'s context of {limit}"
        )
    if (self.draft is not None and len(ids) > 1) or self.prefix_cache is not None:
      slot_axes(self.model, self.params, self.cache_dtype)  # raises where slots cannot be moved
    key = jax.random.key(0) if key is None else key
    return self._stream(ids, max_new_tokens, key, loop.stop_array(stop_ids))

  def _stream(
    self, ids: Sequence[Sequence[int]], max_new_tokens: int, key: jax.Array, stops: np.ndarray
  ) -> Iterator[list[list[int]]]:
    begun = time.perf_counter()
    self.stats = stats = Stats(prompt_tokens=sum(map(len, ids)), sequences=len(ids))
    logits, cache = self._read(self.model, self.params, ids, max_new_tokens, stats)
    tokens, key = draw(self.sampler, logits, key)
    if self.draft is None:
      launch, settle = self._plain(tokens, cache, key, max_new_tokens, stops)
    else:
      draft_cache = self._read(*self.draft, ids, max_new_tokens)[1]
      launch, settle = self._speculative(tokens, cache, draft_cache, key, max_new_tokens, stops)
    chunk: _Chunk | None = _Chunk(tokens[:, None])
    first = True
    while chunk is not None:
      following = launch() if self.ahead and not first else None  # the first token waits for no compiler
      rows = [[t for t in row if t != loop.NOTHING] for row in np.asarray(chunk.tokens).tolist()]
      stats.tokens += sum(map(len, rows))
      stats.total_s = time.perf_counter() - begun
      if first:
        stats.first_token_s, first = stats.total_s, False
        over = max_new_tokens == 1 or bool(np.isin(np.asarray(chunk.tokens), stops).all())
      else:
        over = bool(np.all(chunk.done))
        settle(chunk)
      if any(rows):
        yield rows
      if over:
        return
      chunk = following if following is not None else launch()

  def _plain(
    self, tokens: jax.Array, cache: KVCache, key: jax.Array, max_new_tokens: int, stops: np.ndarray
  ) -> tuple[Callable[[], _Chunk | None], Callable[[_Chunk], None]]:
    left, size = max_new_tokens - 1, 1
    state = tokens, cache, key, jnp.zeros(tokens.shape, bool)

    def launch() -> _Chunk | None:
      nonlocal left, size, state
      n = min(left, size)
      if n == 0:
        return None
      left, size = left - n, min(2 * size, loop.CHUNK)
      written, *state = loop.run(self.model, self.sampler, self.params, *state, np.int32(n), stops)
      return _Chunk(written, state[-1])

    return launch, lambda chunk: None

  def _speculative(
    self, tokens: jax.Array, cache: KVCache, draft_cache: KVCache, key: jax.Array, max_new_tokens: int,
    stops: np.ndarray,
  ) -> tuple[Callable[[], _Chunk | None], Callable[[_Chunk], None]]:  # fmt: skip
    assert self.draft is not None
    (drafter, draft_params), k, batch = self.draft, self.draft_tokens, tokens.shape[0]
    none = jnp.zeros(batch, bool)
    state = speculative.Speculation(tokens, tokens, none, key, none, jnp.ones(batch, jnp.int32))
    size = 1

    def launch() -> _Chunk | None:
      nonlocal size, state, cache, draft_cache
      written, state, cache, draft_cache = speculative.run_rounds(
        self.model, drafter, self.sampler, k, self.params, draft_params, state, cache, draft_cache,
        np.int32(size), np.int32(max_new_tokens), stops,
      )  # fmt: skip
      size = min(2 * size, speculative.ROUNDS)
      return _Chunk(written.tokens, written.done, written)

    def settle(chunk: _Chunk) -> None:
      """Counts what was kept; where rounds ended for want of slots, packs the caches."""
      nonlocal cache, draft_cache
      written = chunk.written
      assert written is not None
      self.stats.rounds += int(written.seen)
      self.stats.drafted += int(written.seen) * k
      self.stats.accepted += int(written.accepted)
      if int(written.rounds) == 0 and not np.all(chunk.done):
        cache = pack(cache, slot_axes(self.model, self.params, self.cache_dtype))
        draft_cache = pack(draft_cache, slot_axes(drafter, draft_params, self.cache_dtype))

    return launch, settle

  def _read(
    self, model: Any, params: Params, ids: Sequence[Sequence[int]], max_new_tokens: int, stats: Stats | None = None
  ) -> tuple[jax.Array, KVCache]:
    """Reads the prompts, or what no prefix of the prefix cache holds of them, into a cache with room for the rest."""
    known, prefixes = [Match() for _ in ids], self.prefix_cache
    form, axes = (), ()
    if prefixes is not None:
      axes = slot_axes(model, params, self.cache_dtype)
      shapes = jax.eval_shape(lambda: init_cache(model, params, 1, _SLOTS, self.cache_dtype)).layers
      form = (jax.tree.structure(shapes), *((s.shape, str(s.dtype)) for s in jax.tree.leaves(shapes)))
      found = [prefixes.find(params, form, row) for row in ids]
      left = max(len(row) - match.tokens for row, match in zip(ids, found, strict=True))
      if padded(left) < padded(max(map(len, ids))):  # else reading it all is as quick
        known = found
    rest = [row[match.tokens :] for row, match in zip(ids, known, strict=True)]
    begin, longest = max(match.slots for match in known), max(map(len, rest))
    width = padded(longest)
    ahead = self.draft_tokens + 1 if self.draft else 0
    slots = _rounded(begin + max(width, longest + max_new_tokens + ahead))
    cache = init_cache(model, params, len(ids), slots, self.cache_dtype)
    if prefixes is not None and begin:
      for i, match in enumerate(known):
        cache = prefixes.load(cache, i, match, min(padded(begin), slots), axes)
      cache = cache.advance(begin)
    tokens, mask = pad(rest, width)
    logits, cache = read(model, params, tokens, mask, cache)
    cache = cache.rollback(width - longest)
    if prefixes is not None:
      prefixes.read_tokens += sum(map(len, rest))
      prefixes.reused_tokens += sum(match.tokens for match in known)
      if stats is not None:
        stats.reused_tokens = sum(match.tokens for match in known)
      for i, row in enumerate(ids):
        prefixes.store(params, form, row, cache, i, min(padded(begin + len(rest[i])), slots), axes)
    return logits, cache


def _rounded(slots: int) -> int:
  return _SLOTS * -(-slots // _SLOTS)


def _vocab(params: Params) -> int:
  return params["embed"]["table"].shape[-2]
