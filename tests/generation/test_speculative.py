"""Speculative decoding: the text is the original's, whatever the draft proposes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as statistics

import lmcompress as lmc
from lmcompress.generation import Engine, Sampler, first_layers, init_cache
from lmcompress.generation import engine as engines
from lmcompress.generation.slots import keep, pack, slot_axes
from lmcompress.generation.speculative import accept, accept_greedy, acceptance, probabilities, residual, run_rounds
from lmcompress.models import Llama, LlamaConfig, LlamaSizes

PAIRS = {
  "apart": ([0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]),
  "equal": ([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]),
  "disjoint": ([0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.9, 0.1]),
  "top k of both": ([0.7, 0.3, 0.0, 0.0], [0.0, 0.6, 0.4, 0.0]),
  "certain draft": ([0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]),
  "certain model": ([0.0, 0.0, 1.0, 0.0], [0.3, 0.3, 0.2, 0.2]),
}


@pytest.fixture(scope="module")
def drafts(tiny):
  """Drafts of the small model by name, from useless to perfect."""
  model, params = tiny
  crude, _ = lmc.compress(model, params, lmc.at("layers/*", lmc.round_to_nearest(bits=4, group_size=32)))
  return {"4 bits": crude, "first layer": first_layers(params, 1), "all layers": first_layers(params, 2)}


def tokens_of(engine, rows, count, key=None, stops=()):
  found = [[] for _ in rows]
  for new in engine.stream(rows, count, key, stops):
    for row, more in zip(found, new, strict=True):
      row += more
  return found


@pytest.mark.parametrize("p, q", PAIRS.values(), ids=PAIRS)
def test_a_token_is_emitted_as_often_as_the_model_would(p, q):
  """By enumeration of the draft: kept, or refused and replaced."""
  p, q = jnp.asarray(p), jnp.asarray(q)
  kept = q * acceptance(p, q)
  emitted = kept + (1 - kept.sum()) * residual(p, q)
  np.testing.assert_allclose(emitted, p, atol=1e-6)
  np.testing.assert_allclose(kept, np.minimum(p, q), atol=1e-7)  # Leviathan et al.: the rate is sum(min(p, q))


@pytest.mark.parametrize("p, q", PAIRS.values(), ids=PAIRS)
def test_drawing_follows_the_kernel(p, q):
  n = 20000
  p, q = np.asarray(p, np.float32), np.asarray(q, np.float32)
  drafts = np.random.default_rng(0).choice(4, (n, 1), p=q / q.sum()).astype(np.int32)
  after = np.asarray([0.6, 0.4, 0.0, 0.0], np.float32)
  count, token = accept(
    jnp.broadcast_to(jnp.stack([p, after]), (n, 2, 4)), jnp.broadcast_to(q, (n, 1, 4)), drafts, jax.random.key(0)
  )
  count, token = np.asarray(count), np.asarray(token)
  first = np.where(count == 1, drafts[:, 0], token)
  np.testing.assert_allclose(np.bincount(first, minlength=4) / n, p, atol=0.015)  # four standard deviations
  assert abs(count.mean() - np.minimum(p, q).sum()) < 0.015
  if (count == 1).sum() > 1000:
    second = np.bincount(token[count == 1], minlength=4) / (count == 1).sum()
    np.testing.assert_allclose(second, after, atol=4 * np.sqrt(0.25 / (count == 1).sum()))


def test_greedy_keeps_while_the_argmax_agrees():
  logits = jax.nn.one_hot(jnp.asarray([[3, 1, 2], [3, 1, 2], [3, 1, 2]]), 4)
  count, token = accept_greedy(logits, jnp.asarray([[3, 1], [3, 0], [0, 1]]))
  assert count.tolist() == [2, 1, 0] and token.tolist() == [2, 1, 3]


def test_probabilities_are_those_of_the_sampler():
  logits = jnp.log(jnp.asarray([[[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]]))
  np.testing.assert_allclose(probabilities(Sampler(1.0, top_k=2), logits)[0, 0], [0.625, 0.375, 0, 0], atol=1e-6)
  np.testing.assert_allclose(probabilities(Sampler(1.0, top_p=0.5), logits)[0, 1], [0, 0, 0, 1], atol=1e-6)
  square = np.square([0.5, 0.3, 0.15, 0.05])
  np.testing.assert_allclose(probabilities(Sampler(0.5), logits)[0, 0], square / square.sum(), atol=1e-6)
  assert probabilities(Sampler(), logits)[0].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("name", ["4 bits", "first layer", "all layers"])
def test_greedy_text_is_the_originals(tiny, drafts, name, monkeypatch):
  """Sequences that accept different counts leave holes; 115 tokens barely fit in 128 slots, so caches get packed."""
  model, params = tiny
  packed = []
  monkeypatch.setattr(engines, "pack", lambda *a: packed.append(1) or pack(*a))
  rng = np.random.default_rng(1)
  rows = [rng.integers(0, 64, n).tolist() for n in (1, 1, 2, 3, 3, 5, 8, 8)]
  expected = tokens_of(Engine(model, params), rows, 115)
  engine = Engine(model, params, draft=(model, drafts[name]), draft_tokens=3)
  assert tokens_of(engine, rows, 115) == expected
  found = engine.stats
  assert found.drafted == 3 * found.rounds and 0 <= found.accepted <= found.drafted
  assert found.tokens == 8 * 115 and 1 <= found.tokens_per_round <= 4
  assert (found.acceptance_rate == 1.0) == (name == "all layers") == (not packed)


def test_sequences_end_at_their_stop_in_the_middle_of_a_round(tiny, drafts):
  model, params = tiny
  rows = [[1, 2, 3], [5], [9, 9]]
  plain, engine = Engine(model, params), Engine(model, params, draft=(model, drafts["all layers"]), draft_tokens=3)
  free = tokens_of(plain, rows, 30)
  for stops in ({free[0][2]}, {free[1][7], free[0][9]}, {row[0] for row in free}):
    assert tokens_of(engine, rows, 30, stops=stops) == tokens_of(plain, rows, 30, stops=stops)
  for count in (1, 2, 3, 6):
    assert tokens_of(engine, rows, count) == [row[:count] for row in free]


def test_packing_changes_no_logits(tiny):
  model, params = tiny
  apply = jax.jit(model.apply)
  tokens = np.random.default_rng(0).integers(0, 64, (3, 6), np.int32)
  _, cache = apply(params, tokens, cache=init_cache(model, params, 3, 16))
  cache = keep(cache, 4, jnp.asarray([1, 3, 0]))
  assert int(cache.length) == 5 and cache.real.sum(axis=1).tolist() == [3, 5, 2]
  _, cache = apply(params, tokens[:, :2], cache=cache)
  before, _ = apply(params, tokens[:, :3], cache=cache)
  small = pack(jax.tree.map(jnp.copy, cache), slot_axes(model, params, jnp.float32))
  after, _ = apply(params, tokens[:, :3], cache=small)
  assert int(small.length) == 7 and small.real.sum(axis=1).tolist() == [5, 7, 4]
  np.testing.assert_allclose(before, after, atol=1e-5)  # sums in another order


@pytest.mark.parametrize("sampler", [Sampler(1.0), Sampler(0.8, top_k=5, top_p=0.9)], ids=["plain", "restricted"])
def test_sampled_text_follows_the_originals_distribution(sampler):
  """Every pair of neighbours among four tokens of a vocabulary of six, against all 6^4 texts weighed exactly."""
  model = Llama(LlamaConfig(head_dim=8), LlamaSizes(vocab=6, embed=16, mlp=16, layers=2, heads=2, kv_heads=1))
  params = jax.jit(model.init)(jax.random.key(3))
  vocab, n, prompt = 6, 2048, [1, 4]
  texts = np.stack(np.meshgrid(*[np.arange(vocab)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
  whole = np.concatenate([np.broadcast_to(prompt, (len(texts), 2)), texts], axis=1).astype(np.int32)
  p = np.asarray(probabilities(sampler, model.apply(params, whole)[:, 1:]))
  weight = np.prod([np.take_along_axis(p[:, i], texts[:, i, None], axis=1)[:, 0] for i in range(3)], axis=0)
  exact = (weight[:, None] * p[:, 3]).reshape((vocab,) * 4)
  assert abs(exact.sum() - 1) < 1e-5

  engine = Engine(model, params, sampler, draft=(model, first_layers(params, 1)), draft_tokens=2)
  drawn = np.asarray(tokens_of(engine, [prompt] * n, 4, jax.random.key(0)))
  assert 0.2 < engine.stats.acceptance_rate < 0.99
  for i in range(3):
    expected = exact.sum(axis=tuple(j for j in range(4) if j not in (i, i + 1))).ravel() * n
    observed = np.bincount(drawn[:, i] * vocab + drawn[:, i + 1], minlength=vocab**2)
    assert observed[expected == 0].sum() == 0
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    observed = np.append(observed[~rare], observed[rare].sum())
    kept = expected > 1e-9
    expected = expected[kept].astype(np.float64)
    expected *= n / expected.sum()  # float32 probabilities sum to 1 but for 1e-6
    assert statistics.chisquare(observed[kept], expected).pvalue > 1e-3


def test_the_key_decides_and_rounds_compile_once(tiny, drafts):
  model, params = tiny
  engine = Engine(model, params, Sampler(1.0), draft=(model, drafts["first layer"]), draft_tokens=2)
  first = tokens_of(engine, [[1, 2]], 20, jax.random.key(0))
  before = run_rounds._cache_size()
  assert tokens_of(engine, [[1, 2]], 20, jax.random.key(0)) == first
  assert tokens_of(engine, [[7, 8, 9]], 17, jax.random.key(1), {3, 4}) != first
  assert run_rounds._cache_size() == before


def test_first_layers_share_their_arrays(tiny):
  _, params = tiny
  draft = first_layers(params, 1)
  assert list(draft["layers"]) == ["0"] and draft["embed"] is params["embed"]
  assert all(a is b for a, b in zip(jax.tree.leaves(draft["layers"]["0"]), jax.tree.leaves(params["layers"]["0"]),
                                    strict=True))
  for n in (0, 3):
    with pytest.raises(ValueError, match=f"n={n}.*has 2 layers; use 1 to 2"):
      first_layers(params, n)
  with pytest.raises(ValueError, match="'layers' is needed; found embed"):
    first_layers({"embed": params["embed"]}, 1)


def test_drafts_that_do_not_fit(tiny):
  model, params = tiny
  with pytest.raises(ValueError, match="at least 1 token a round"):
    Engine(model, params, draft=(model, params), draft_tokens=0)
  foreign = {"embed": {"table": np.zeros((8, 16), np.float32)}}
  with pytest.raises(ValueError, match="vocabulary of 8 tokens and the model one of 64"):
    Engine(model, params, draft=(model, foreign))
  short = Llama(LlamaConfig(head_dim=8, max_length=16))
  with pytest.raises(ValueError, match="more than the draft's context of 16"):
    Engine(model, params, draft=(short, params)).stream([[1]], 20)
