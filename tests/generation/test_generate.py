"""Generation: the cache equals recomputation, batches equal single runs, sampling keeps its promises."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress.generation import PrefixCache, Sampler, decode, first_layers, generate, init_cache
from lmcompress.generation.generate import bucket
from lmcompress.generation.loop import run
from lmcompress.generation.sampling import restrict


class Letters:
  """A tokenizer of 64 characters, one token each."""

  bos_id = None
  stop_ids = frozenset({63})

  def encode(self, text, parse_special=False):
    return [ord(c) % 63 for c in text]

  def decode(self, ids):
    return "".join(chr(48 + i) for i in ids)

  def stream(self):
    outer = self

    class Stream:
      def push(self, token):
        return outer.decode([token])

      def flush(self):
        return ""

    return Stream()


def greedy_by_recomputation(model, params, ids, count):
  """The whole text read anew for each token, in one shape: what stands behind a token does not change its logits."""
  apply = jax.jit(model.apply)
  row, length = np.zeros((1, 32), np.int32), len(ids)
  row[0, :length] = ids
  for n in range(length, length + count):
    row[0, n] = int(jnp.argmax(apply(params, row)[0, n - 1]))
  return row[0, length : length + count].tolist()


def tokens_of(model, params, rows, count, sampler=None, key=None, **options):
  steps = list(decode(model, params, rows, count, sampler or Sampler(), key, **options))
  return [list(row) for row in zip(*steps, strict=True)]


def test_greedy_equals_recomputation_in_a_batch_of_unequal_prompts(tiny):
  model, params = tiny
  rows = [[1, 2, 3], [5], list(range(20))]
  together = tokens_of(model, params, rows, 8)
  for row, found in zip(rows, together, strict=True):
    assert found == greedy_by_recomputation(model, params, row, 8)


def test_cache_logits_equal_full_logits(tiny):
  model, params = tiny
  apply = jax.jit(model.apply)
  tokens = np.random.default_rng(0).integers(0, 64, (2, 9), np.int32)
  cache = init_cache(model, params, 2, 16)
  first, cache = apply(params, tokens[:, :6], cache=cache)
  second, cache = apply(params, tokens[:, 6:], cache=cache)
  full = apply(params, tokens)
  np.testing.assert_allclose(np.concatenate([first, second], axis=1), full, atol=1e-5)
  assert int(cache.length) == 9


def test_rollback_forgets(tiny):
  model, params = tiny
  apply = jax.jit(model.apply)
  tokens = np.arange(8, dtype=np.int32)[None]
  _, cache = apply(params, tokens, cache=init_cache(model, params, 1, 16))
  _, ahead = apply(params, tokens[:, :3], cache=cache)
  a, _ = apply(params, tokens[:, :1], cache=ahead.rollback(3))
  b, _ = apply(params, tokens[:, :1], cache=cache)
  np.testing.assert_allclose(a, b, atol=1e-6)


def test_bfloat16_cache_is_close(tiny):
  model, params = tiny
  apply = jax.jit(model.apply)
  tokens = np.arange(8, dtype=np.int32)[None]
  a, _ = apply(params, tokens, cache=init_cache(model, params, 1, 16, jnp.bfloat16))
  np.testing.assert_allclose(a, apply(params, tokens), atol=0.05)
  with pytest.raises(ValueError, match="float32, bfloat16"):
    init_cache(model, params, 1, 16, jnp.float16)


def test_the_loop_compiles_once_for_any_prompt_in_a_bucket(tiny):
  model, params = tiny
  before = run._cache_size()
  for length in (2, 5, 11, 16):
    tokens_of(model, params, [list(range(length))], 4)
  assert run._cache_size() - before <= 1
  assert [bucket(n) for n in (1, 16, 17, 100)] == [16, 16, 32, 128]


def test_sampling_is_decided_by_the_key(tiny):
  model, params = tiny
  draw = lambda seed: tokens_of(model, params, [[1, 2]], 12, Sampler(1.0), jax.random.key(seed))  # noqa: E731
  assert draw(0) == draw(0)
  assert draw(0) != draw(1)


def test_top_k_and_top_p_keep_the_likeliest():
  logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
  kept = lambda k, p: np.isfinite(restrict(logits, k, p))[0].tolist()  # noqa: E731
  assert kept(2, 1.0) == [True, True, False, False]
  assert kept(0, 0.5) == [True, False, False, False]
  assert kept(0, 0.51) == [True, True, False, False]
  assert kept(0, 1e-9) == [True, False, False, False]
  assert kept(0, 1.0) == [True] * 4


def test_sampled_frequencies_follow_the_distribution():
  p = jnp.asarray([0.1, 0.2, 0.3, 0.4])
  draws = Sampler(1.0)(jnp.broadcast_to(jnp.log(p), (20000, 4)), jax.random.key(0))
  found = np.bincount(np.asarray(draws), minlength=4) / 20000
  np.testing.assert_allclose(found, p, atol=4 * np.sqrt(0.25 / 20000))  # four standard deviations


def test_text_streams_and_stops(tiny):
  model, params = tiny
  pieces = []
  text = generate(model, params, Letters(), "hello", 12, on_text=pieces.append)
  assert "".join(pieces) == text and len(text) >= 1
  cut = text[4]
  stopped = generate(model, params, Letters(), "hello", 12, stop=[cut])
  assert stopped == text[: text.index(cut)]
  assert generate(model, params, Letters(), ["hello", "a"], 12)[0] == text


def test_a_draft_and_a_prefix_cache_leave_the_text_as_it_is(tiny):
  model, params = tiny
  prompts = [f"a system prompt of some length, then {end}" for end in ("this", "something else")]
  plain = [generate(model, params, Letters(), prompt, 12) for prompt in prompts]
  prefixes, found = PrefixCache(), []
  options = {"draft": (model, first_layers(params, 1)), "prefix_cache": prefixes, "on_stats": found.append}
  assert [generate(model, params, Letters(), prompt, 12, **options) for prompt in prompts] == plain
  first, second = found
  assert first.reused_tokens == 0 and second.reused_tokens >= 36 and second.rounds > 0
  assert 0 < second.first_token_s <= second.total_s
  cut = plain[1][4]
  stopped = generate(model, params, Letters(), prompts[1], 12, stop=[cut], **options)
  assert stopped == plain[1][: plain[1].index(cut)]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"max_new_tokens": 0}, "at least 1"),
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": 1.0}, "key"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"max_new_tokens": 10**6}, "context"),
    ({"prompt": ""}, "no tokens"),
    ({"prompt": []}, "no prompt"),
  ],
)
def test_bad_settings(tiny, options, message):
  model, params = tiny
  with pytest.raises(ValueError, match=message):
    generate(model, params, Letters(), **{"prompt": "hi", "max_new_tokens": 4, **options})


def test_the_cache_is_a_tree(tiny):
  model, params = tiny
  cache = init_cache(model, params, 1, 16)
  chex.assert_trees_all_equal(cache, jax.tree.map(lambda x: x, cache))


def test_a_model_that_was_trained_so_sees_where_a_text_begins(tiny):
  """With and without the token that begins a text, said by the tokenizer; a prompt that has it keeps one."""
  model, params = tiny

  class Beginning(Letters):
    bos_id, wants_bos = 5, True

    def encode(self, text, *, parse_special=False):
      return [5, *super().encode(text[1:])] if text.startswith("^") else super().encode(text)

  want = generate(model, params, Letters(), "abc", 6)
  begun, again = (generate(model, params, Beginning(), text, 6) for text in ("abc", "^abc"))
  assert begun == again and begun != want
