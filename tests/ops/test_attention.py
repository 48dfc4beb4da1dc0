"""Fused attention beside its reference: caches of every form, holes, grouped queries, gradients, refusals."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress import ops
from lmcompress.generation.cache import LayerCache
from lmcompress.generation.windowed import empty_windowed
from lmcompress.ops import backend

pytestmark = [
  pytest.mark.skipif(backend.native() is None, reason="no compiler built the kernels"),
]

CACHES = ("float32", "bfloat16", "int8", "int4")


def empty(dtype, batch, kv, slots, head):
  if dtype == "int4":
    return empty_windowed(batch, kv, slots, head)
  codes = [jnp.zeros((batch, kv, slots, head), dtype) for _ in range(2)]
  return LayerCache(*codes, *(jnp.zeros((batch, kv, slots, 1), jnp.float32) for _ in range(2) if dtype == "int8"))


def filled_with(cache, past, batch, head):
  """The cache after `past` random tokens, read at once by the reference."""
  if not past:
    return cache
  q, k, v, view = case(1, batch, past, 2, 1, head, cache.k.shape[2], 0)
  with ops.use_backend("reference"):
    return ops.attention(q, k, v, view, head, cache)[1]


def case(seed, batch, length, kv, group, head, slots, slot, holes=()):
  rng = np.random.default_rng(seed)
  q, k, v = (
    jnp.asarray(rng.normal(size=(batch, length, n * head)).astype(np.float32)) for n in (kv * group, kv, kv)
  )
  angles = jnp.asarray(rng.uniform(0, 6, (batch, length, head // 2)).astype(np.float32))
  real = np.zeros((batch, slots), bool)
  real[:, : slot + length] = True
  for hole in holes:
    real[hole] = False
  return q, k, v, ops.View(jnp.asarray(real), jnp.int32(slot), jnp.cos(angles), jnp.sin(angles))


def both(run):
  with ops.use_backend("native"):
    fused = run()
  with ops.use_backend("reference"):
    return fused, run()


def close(a, b, tolerance):
  np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize(
  "length, group, head, slot, holes",
  [
    (1, 3, 64, 70, ()),
    (1, 1, 32, 0, ()),
    (1, 4, 128, 200, ((0, slice(0, 130)),)),  # left padding longer than a block of keys
    (2, 9, 32, 63, ((1, 5), (0, 64))),
    (37, 3, 64, 0, ((0, slice(30, 37)),)),  # right padding
    (66, 2, 96, 10, ((1, slice(0, 4)),)),
  ],
)
def test_equals_the_reference(dtype, length, group, head, slot, holes):
  """Two passes over the same values in float32: rounding of sums. Codes of equal inputs may differ by one at a tie,
  which a bfloat16 or int8 cache turns into one step of a few entries."""
  q, k, v, view = case(0, 2, length, 2, group, head, 256, slot, holes)
  filled = filled_with(empty(dtype, 2, 2, 256, head), slot, 2, head)
  (a, cache_a), (b, cache_b) = both(lambda: ops.attention(q, k, v, view, head, filled))
  mask = np.asarray(view.real)[:, slot : slot + length]
  tolerance = {"float32": 2e-5, "bfloat16": 2e-2, "int8": 2e-2, "int4": 5e-2}[dtype]
  assert a.shape == b.shape == q.shape and np.isfinite(a).all()
  close(np.asarray(a)[mask], np.asarray(b)[mask], tolerance)
  if dtype == "int4":
    alike(cache_a, cache_b, np.asarray(view.real).any(0))
    return
  close(cache_a.keys(), cache_b.keys(), {"float32": 1e-6, "bfloat16": 2**-6, "int8": 0.05}[dtype])
  np.testing.assert_array_equal(cache_a.values()[:, :, slot + length :], cache_b.values()[:, :, slot + length :])


def alike(a, b, real):
  """Two windowed caches: scales to a rounding of the rotation and of bfloat16, codes but for ties, the same ring."""
  for name in ("k_scale", "v_scale", "k_recent", "v_recent"):
    x, y = (np.asarray(getattr(c, name), np.float32) for c in (a, b))
    if name == "v_scale":
      x, y = x[:, :, real], y[:, :, real]
    np.testing.assert_allclose(x, y, rtol=0.01, atol=1e-3)
  for x, y in ((a.k, b.k), (a.v, b.v)):
    assert np.mean(np.asarray(x)[:, :, real] != np.asarray(y)[:, :, real]) < 0.01


@pytest.mark.parametrize("length", [1, 5, 40])
def test_without_a_cache(length):
  q, k, v, view = case(2, 2, length, 3, 3, 64, length, 0, ((1, 0),) if length > 1 else ())
  (a, none), (b, _) = both(lambda: ops.attention(q, k, v, view, 64))
  mask = np.asarray(view.real)
  assert none is None
  close(np.asarray(a)[mask], np.asarray(b)[mask], 2e-5)


def test_against_float64():
  """Ten tokens after twenty, by the definition."""
  q, k, v, view = case(3, 1, 10, 1, 2, 32, 32, 20)
  filled = empty("float32", 1, 1, 32, 32)
  rng = np.random.default_rng(4)
  past = [rng.normal(size=(1, 1, 20, 32)).astype(np.float32) for _ in range(2)]
  with ops.use_backend("native"):
    mixed, after = ops.attention(q, k, v, view, 32, filled.update(*map(jnp.asarray, past), 0))
  keys, values = (np.asarray(x, np.float64)[0, 0] for x in (after.keys(), after.values()))
  cos, sin = (np.asarray(x, np.float64)[0] for x in (view.cos, view.sin))
  for t in range(10):
    for h in range(2):
      x = np.asarray(q, np.float64)[0, t, 32 * h : 32 * h + 32]
      a, b = x[:16], x[16:]
      turned = np.concatenate([a * cos[t] - b * sin[t], b * cos[t] + a * sin[t]])
      scores = keys[: 21 + t] @ turned / np.sqrt(32)
      weights = np.exp(scores - scores.max())
      want = weights / weights.sum() @ values[: 21 + t]
      np.testing.assert_allclose(mixed[0, t, 32 * h : 32 * h + 32], want, rtol=1e-5, atol=1e-5)


def test_gradients_jit_and_vmap():
  q, k, v, view = case(5, 1, 6, 2, 2, 32, 6, 0)
  loss = lambda q, k, v: jnp.sum(jnp.sin(ops.attention(q, k, v, view, 32)[0]))  # noqa: E731
  a, b = both(lambda: jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v))
  for x, y in zip(a, b, strict=True):
    close(x, y, 1e-4)
  stacked = [jnp.stack([x, 2 * x]) for x in (q, k, v)]
  mapped, want = both(lambda: jax.vmap(lambda q, k, v: ops.attention(q, k, v, view, 32)[0])(*stacked))
  close(mapped, want, 2e-5)


def test_the_old_cache_survives_where_it_is_not_given_up():
  q, k, v, view = case(6, 1, 1, 1, 1, 32, 16, 3)
  old = empty("float32", 1, 1, 16, 32).update(jnp.ones((1, 1, 3, 32)), jnp.ones((1, 1, 3, 32)), 0)
  before = np.asarray(old.k)
  with ops.use_backend("native"):
    _, new = jax.jit(lambda c: ops.attention(q, k, v, view, 32, c))(old)
    np.testing.assert_array_equal(old.k, before)
    assert not np.array_equal(new.k, before)
    given = jax.jit(lambda c: ops.attention(q, k, v, view, 32, c), donate_argnums=0)(old)[1]
    np.testing.assert_array_equal(given.k, new.k)


def test_nan_stays_with_its_query():
  q, k, v, view = case(7, 2, 3, 1, 2, 32, 3, 0)
  q = q.at[0, 1, 0].set(jnp.nan)
  with ops.use_backend("native"):
    mixed = np.asarray(ops.attention(q, k, v, view, 32)[0])
  assert np.isnan(mixed[0, 1, :32]).all()
  assert np.isfinite(np.delete(mixed.reshape(-1, 32), 2, axis=0)).all()


def refused(q, k, v, view, buffers, head=32):
  from lmcompress.ops.kernels import cpu

  backend.native()
  with pytest.raises(Exception, match="lmc_attention"):
    jax.block_until_ready(cpu.attention(q, k, v, view.cos, view.sin, view.real, view.slot, buffers, head, 1.0))


def test_malformed_operands_are_refused():
  q, k, v, view = case(8, 1, 2, 1, 2, 32, 8, 4)
  good = empty("float32", 1, 1, 8, 32).buffers
  refused(q, k, v, dataclasses.replace(view, slot=7), good)  # past the end
  refused(q, k, v, dataclasses.replace(view, slot=-1), good)
  refused(q, k, v, view, ())  # slots without a cache
  refused(q, k, v, view, good[:1])
  refused(q, k, v, view, tuple(x[..., :16] for x in good))
  refused(q, k, v, view, tuple(x.astype(jnp.float16) for x in good))
  refused(q, k, v, view, empty("int8", 1, 1, 8, 32).buffers[:2])  # codes without scales
  refused(q, k, v, view, (*good, *good))
  window = empty_windowed(1, 1, 32, 32).buffers
  wide = dataclasses.replace(view, real=jnp.zeros((1, 32), bool))
  refused(q, k, v, wide, (*window[:5], window[5][:, :, :64]))
  refused(q, k, v, wide, (window[0], window[1], window[2][..., :16], *window[3:]))
  refused(q, k, v, wide, (*window[:2], window[2].astype(jnp.float32), *window[3:]))
  refused(q, k, v, view, window)  # slots that no group divides
  refused(q, k, v[:, :1], view, good)
  refused(q[..., :48], k, v, view, good)
  refused(q, k, v, view, good, head=24)
  refused(q, k, v, dataclasses.replace(view, cos=view.cos[..., :8]), good)
  refused(q, k, v, dataclasses.replace(view, real=view.real.astype(jnp.int32)), good)


def read_in(pieces, q, k, v, view, head, cache):
  """The tokens read some at a time."""
  mixed, at = [], 0
  for n in pieces:
    part = slice(at, at + n)
    here = ops.View(
      view.real & (jnp.arange(view.real.shape[1]) < at + n), jnp.int32(at), view.cos[:, part], view.sin[:, part]
    )
    out, cache = ops.attention(q[:, part], k[:, part], v[:, part], here, head, cache)
    mixed.append(out)
    at += n
  return jnp.concatenate(mixed, axis=1), cache


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_a_windowed_cache_does_not_depend_on_the_pieces(kernels):
  """What a token sees in codes depends on its slot alone: at once, in pieces and one by one give the same."""
  q, k, v, view = case(9, 2, 200, 2, 2, 32, 224, 0)
  with ops.use_backend(kernels):
    read = jax.jit(read_in, static_argnums=(0, 5))
    at_once, whole = read((200,), q, k, v, view, 32, empty_windowed(2, 2, 224, 32))
    for pieces in ((96, 104), (31, 1, 32, 65, 71), (150, *(1,) * 12, 38)):
      mixed, cache = read(pieces, q, k, v, view, 32, empty_windowed(2, 2, 224, 32))
      close(mixed, at_once, 2e-4)
      alike(cache, whole, np.asarray(view.real).any(0) & (np.arange(224) < 160))


def test_a_windowed_cache_against_the_definition():
  """Old keys by channel over 32 tokens, old values by token, the recent ones in bfloat16: in NumPy, float64."""
  q, k, v, view = case(10, 1, 130, 1, 1, 32, 160, 0)
  with ops.use_backend("reference"):
    mixed, _ = ops.attention(q, k, v, view, 32, empty_windowed(1, 1, 160, 32))
  cos, sin = (np.asarray(x, np.float64)[0] for x in (view.cos, view.sin))

  def turned(x):
    a, b = np.split(np.asarray(x, np.float64)[0], 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

  bf16 = lambda x: np.asarray(jnp.asarray(x, jnp.float32).astype(jnp.bfloat16), np.float64)  # noqa: E731
  keys, values, queries = bf16(turned(k)), bf16(np.asarray(v[0])), turned(q)

  def in_codes(x, axis, store):
    low = store(x.min(axis, keepdims=True))
    scale = store((x.max(axis, keepdims=True) - low) / 15)
    return np.clip(np.round((x - low) / scale), 0, 15) * scale + low

  old_keys = in_codes(keys[:128].reshape(4, 32, 32), 1, bf16).reshape(128, 32)
  old_values = in_codes(values, 1, lambda x: x)
  for t in (31, 63, 64, 95, 96, 129):
    coded = max(0, t // 32 * 32 - 32)
    k_t = np.concatenate([old_keys[:coded], keys[coded : t + 1]])
    v_t = np.concatenate([old_values[:coded], values[coded : t + 1]])
    scores = k_t @ queries[t] / np.sqrt(32)
    weights = np.exp(scores - scores.max())
    np.testing.assert_allclose(mixed[0, t], weights / weights.sum() @ v_t, atol=0.02)


def test_a_windowed_cache_takes_back():
  """Up to a group exactly; more, with what left the window in codes; padding pushes nothing out."""
  q, k, v, view = case(11, 1, 300, 1, 1, 32, 320, 0)
  read = jax.jit(read_in, static_argnums=(0, 5))
  part = lambda n: (x[:, :n] for x in (q, k, v))  # noqa: E731
  short = read((200,), *part(200), view, 32, empty_windowed(1, 1, 320, 32))[1]
  longer = read((200, 20), *part(220), view, 32, empty_windowed(1, 1, 320, 32))[1]
  far = read((200, 100), *part(300), view, 32, empty_windowed(1, 1, 320, 32))[1]
  one = [x[:, 200:201] for x in (q, k, v)]
  now = ops.View(jnp.arange(320)[None] <= 200, jnp.int32(200), view.cos[:, 200:201], view.sin[:, 200:201])
  want = ops.attention(*one, now, 32, short)[0]
  close(ops.attention(*one, now, 32, longer.rollback(200, 220))[0], want, 1e-5)
  back = ops.attention(*one, now, 32, far.rollback(200, 300))[0]
  assert 0 < float(jnp.max(jnp.abs(back - want))) < 0.15
  padded = dataclasses.replace(view, real=view.real & (jnp.arange(320) < 200))
  pads = read((300,), q, k, v, padded, 32, empty_windowed(1, 1, 320, 32))[1]
  close(ops.attention(*one, now, 32, pads.rollback(200, 200))[0], want, 1e-5)
