"""The loop on the device: chunks of any size write what single steps write, and nothing after a stop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress.generation import Engine, Sampler, init_cache, loop
from lmcompress.generation import prefill as reading
from lmcompress.generation.loop import CHUNK, NOTHING, run, step, stop_array
from lmcompress.generation.prefill import pad, prefill

ROWS = [[1, 2, 3], [5], list(range(14))]


def read(tiny, rows, sampler):
  model, params = tiny
  cache = init_cache(model, params, len(rows), 64)
  return prefill(model, sampler, params, *pad(rows, 16), cache, jax.random.key(7))


def run_chunks(tiny, rows, sizes, sampler, stops=()):
  model, params = tiny
  state = (*read(tiny, rows, sampler), jnp.zeros(len(rows), bool))
  written = [np.asarray(state[0])[:, None]]
  for n in sizes:
    buffer, *state = run(model, sampler, params, *state, np.int32(n), stop_array(stops))
    assert (np.asarray(buffer)[:, n:] == NOTHING).all()
    written.append(np.asarray(buffer)[:, :n])
  return np.concatenate(written, axis=1), state


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(1.0, top_k=20)], ids=["greedy", "sampled"])
def test_chunks_of_any_size_equal_single_steps(tiny, sampler):
  model, params = tiny
  state = read(tiny, ROWS, sampler)
  singly = [np.asarray(state[0])]
  for _ in range(16):
    state = step(model, sampler, params, *state)
    singly.append(np.asarray(state[0]))
  for sizes in ((16,), (1, 2, 4, 9), (7, 0, 9)):
    np.testing.assert_array_equal(run_chunks(tiny, ROWS, sizes, sampler)[0], np.stack(singly, axis=1))


def test_a_chunk_compiles_once_for_any_count_stop_and_prompt(tiny):
  before = run._cache_size()
  for row, sizes, stops in (([1], (3,), ()), ([1, 2], (16, 1), (5,)), (list(range(9)), (2,), (1, 2, 3))):
    run_chunks(tiny, [row], sizes, Sampler(), stops)
  assert run._cache_size() - before <= 1


def test_a_stopped_sequence_writes_nothing_more_and_the_loop_ends_with_the_last(tiny):
  free, _ = run_chunks(tiny, ROWS, (16,), Sampler())
  stops = {int(free[0, 2]), int(free[1, 5]), int(free[2, 4])}
  found, (_, cache, _, done) = run_chunks(tiny, ROWS, (16,), Sampler(), stops)
  ends = [next(i for i, t in enumerate(row) if t in stops) for row in free.tolist()]
  for row, whole, end in zip(found.tolist(), free.tolist(), ends, strict=True):
    assert row == whole[: end + 1] + [NOTHING] * (len(row) - end - 1)
  assert np.asarray(done).all() and int(cache.length) == 16 + max(ends)  # as many steps as the longest needed


def test_stop_arrays_have_one_shape():
  assert stop_array(()).tolist() == [-1] * 8
  assert stop_array({3, 1}).tolist() == [1, 3] + [-1] * 6
  assert len(stop_array(range(8))) == 8 and len(stop_array(range(9))) == 16


def test_chunks_begin_short(tiny):
  model, params = tiny
  for ahead in (True, False):
    chunks = [len(rows[0]) for rows in Engine(model, params, ahead=ahead).stream([[1, 2]], 40)]
    assert chunks == [1, 1, 2, 4, 8, CHUNK, 8]


def test_batches_equal_single_prompts_though_some_stop_early(tiny):
  model, params = tiny
  engine = Engine(model, params)

  def tokens(rows, stops):
    found = [[] for _ in rows]
    for new in engine.stream(rows, 20, stop_ids=stops):
      for row, more in zip(found, new, strict=True):
        row += more
    return found

  stops = {tokens(ROWS, ())[1][3]}
  together = tokens(ROWS, stops)
  assert engine.stats.tokens == sum(map(len, together)) and engine.stats.prompt_tokens == 18
  assert together == [tokens([row], stops)[0] for row in ROWS]
  assert together[1][-1] in stops and not stops & set(together[1][:-1])


def test_nothing_runs_once_all_have_stopped(tiny, monkeypatch):
  model, params = tiny
  engine = Engine(model, params, ahead=False)
  stop = next(engine.stream([[1, 2]], 30))[0][0]
  calls = []
  monkeypatch.setattr(loop, "run", lambda *a: calls.append(a))
  assert list(engine.stream([[1, 2]], 30, stop_ids={stop})) == [[[stop]]] and not calls


def test_prompts_are_read_in_pieces(tiny, monkeypatch):
  model, params = tiny
  monkeypatch.setattr(reading, "PIECE", 16)
  rng = np.random.default_rng(0)
  rows = [rng.integers(0, 64, n).tolist() for n in (3, 37, 16, 17)]
  assert [reading.padded(n) for n in (1, 16, 17, 37)] == [16, 16, 32, 48]
  cache = init_cache(model, params, len(rows), 48)
  logits, cache = reading.read(model, params, *pad(rows, 48), cache)
  assert int(cache.length) == 48 and np.asarray(cache.real).sum(axis=1).tolist() == [3, 37, 16, 17]
  for row, found in zip(rows, logits, strict=True):
    tokens, mask = pad([row], 48)
    expected = jax.jit(model.apply)(params, tokens, attention_mask=mask)[0, len(row) - 1]
    np.testing.assert_allclose(found, expected, atol=1e-5)  # float32 sums of a few dozen terms
