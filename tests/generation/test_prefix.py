"""Prefix reuse: what was read before is copied, and the text is what reading it all would give."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress.generation import Engine, PrefixCache, first_layers
from lmcompress.generation.slots import cut, paste

RNG = np.random.default_rng(0)
COMMON = RNG.integers(0, 64, 40).tolist()
A, B, C = (COMMON + RNG.integers(0, 64, n).tolist() for n in (5, 9, 12))


def tokens_of(engine, rows, count=10):
  found = [[] for _ in rows]
  for new in engine.stream(rows, count):
    for row, more in zip(found, new, strict=True):
      row += more
  return found


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_shared_prefix_is_copied(tiny, dtype):
  model, params = tiny
  prefixes = PrefixCache()
  plain = Engine(model, params, cache_dtype=dtype)
  engine = Engine(model, params, cache_dtype=dtype, prefix_cache=prefixes)
  assert tokens_of(engine, [A]) == tokens_of(plain, [A])
  assert (prefixes.read_tokens, prefixes.reused_tokens, len(prefixes)) == (45, 0, 1)
  assert tokens_of(engine, [B]) == tokens_of(plain, [B])
  assert (prefixes.read_tokens, prefixes.reused_tokens, len(prefixes)) == (54, 40, 2)
  assert engine.stats.reused_tokens == 40
  assert tokens_of(engine, [A]) == tokens_of(plain, [A])  # known whole: one token is read for its logits
  assert (prefixes.read_tokens, prefixes.reused_tokens, len(prefixes)) == (55, 84, 2)
  longer = A + COMMON
  assert tokens_of(engine, [longer]) == tokens_of(plain, [longer])
  assert len(prefixes) == 2  # the longer one took the place of its beginning


def test_sequences_of_a_batch_have_their_own_prefixes(tiny):
  model, params = tiny
  prefixes, plain = PrefixCache(), Engine(model, params)
  engine = Engine(model, params, prefix_cache=prefixes)
  other = RNG.integers(0, 64, 50).tolist()
  tokens_of(engine, [A]), tokens_of(engine, [other])
  rows = [B, [*other, 1, 2], C, [*other[:33], 5]]
  assert tokens_of(engine, rows) == tokens_of(plain, rows)
  assert engine.stats.reused_tokens == 40 + 50 + 40 + 33
  again = [[*B, 3], [*C, 4, 5]]  # stored with holes in their slots
  assert tokens_of(engine, again) == tokens_of(plain, again)
  assert engine.stats.reused_tokens == len(B) + len(C)


def test_a_draft_reuses_its_own(tiny):
  model, params = tiny
  prefixes, draft = PrefixCache(), (model, first_layers(params, 1))
  engine = Engine(model, params, prefix_cache=prefixes, draft=draft)
  plain = Engine(model, params)
  tokens_of(engine, [A])
  assert len(prefixes) == 2
  assert tokens_of(engine, [B]) == tokens_of(plain, [B])
  assert prefixes.reused_tokens == 80 and engine.stats.reused_tokens == 40


def test_short_prompts_are_read(tiny):
  """Where the rest would be padded to the same width, copying saves nothing."""
  model, params = tiny
  prefixes = PrefixCache()
  engine = Engine(model, params, prefix_cache=prefixes)
  tokens_of(engine, [[1, 2, 3]]), tokens_of(engine, [[1, 2, 4]])
  assert prefixes.reused_tokens == 0


def test_the_least_recently_used_goes_first_and_bytes_are_bounded(tiny):
  model, params = tiny
  one = 2 * 2 * 2 * 64 * 8 * 4  # layers, keys and values, heads, slots, head, float32
  prefixes = PrefixCache(max_nbytes=2 * one)
  engine = Engine(model, params, prefix_cache=prefixes)
  first, second, third = ([n, *COMMON] for n in (1, 2, 3))
  tokens_of(engine, [first]), tokens_of(engine, [second])
  assert prefixes.nbytes == 2 * one
  tokens_of(engine, [first])
  tokens_of(engine, [third])
  assert prefixes.nbytes == 2 * one and len(prefixes) == 2
  reused = []
  for row in (first, third, second):
    tokens_of(engine, [row])
    reused.append(engine.stats.reused_tokens)
  assert reused == [40, 40, 0]
  prefixes.clear()
  assert (len(prefixes), prefixes.nbytes) == (0, 0)
  small = PrefixCache(max_nbytes=one - 1)
  tokens_of(Engine(model, params, prefix_cache=small), [first])
  assert len(small) == 0
  with pytest.raises(ValueError, match="positive number of bytes"):
    PrefixCache(0)


def test_other_parameters_and_other_dtypes_share_nothing(tiny):
  model, params = tiny
  prefixes = PrefixCache()
  tokens_of(Engine(model, params, prefix_cache=prefixes), [A])
  for engine in (Engine(model, {**params}, prefix_cache=prefixes),
                 Engine(model, params, prefix_cache=prefixes, cache_dtype=jnp.bfloat16)):
    tokens_of(engine, [B])
    assert engine.stats.reused_tokens == 0


def test_copies_compile_once(tiny):
  model, params = tiny
  engine = Engine(model, params, prefix_cache=PrefixCache())
  for row in (A, B):
    tokens_of(engine, [row])
  before = cut._cache_size(), paste._cache_size()
  tokens_of(engine, [C]), tokens_of(engine, [C[:-1]])
  assert (cut._cache_size(), paste._cache_size()) == before


def test_what_cannot_be_moved_is_refused(tiny):
  """Slots of a windowed cache share scales: no prefix is copied out of one, no holes of a batch are packed."""
  model, params = tiny
  with pytest.raises(ValueError, match=r"cache dtype int4.*int8 cache"):
    Engine(model, params, cache_dtype="int4", prefix_cache=PrefixCache()).stream([A], 4)
  draft = (model, first_layers(params, 1))
  with pytest.raises(ValueError, match="cache dtype int4"):
    Engine(model, params, cache_dtype="int4", draft=draft).stream([A, B], 4)
  with pytest.raises(ValueError, match="fewer than 32"):
    Engine(model, params, cache_dtype="int4", draft=draft, draft_tokens=32)
  assert tokens_of(Engine(model, params, cache_dtype="int4", draft=draft), [A], 40)[0][0] >= 0
