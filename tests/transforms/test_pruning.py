"""Wanda, SparseGPT, ALPS and gradient scores: exact sparsity, and outputs that say which is better."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress import tree
from lmcompress.arrays import BitmapArray, MaskedArray, NMSparseArray, QuantizedArray
from lmcompress.calibration import compress
from lmcompress.ops.masks import Target
from lmcompress.ops.removal import Removal, refit, remove_in_turn
from lmcompress.ops.second_order import inverse_factor, solve
from lmcompress.transforms import (
  alps,
  chain,
  freeze,
  gptq,
  gradient,
  kmeans,
  magnitude,
  round_to_nearest,
  sensitivity,
  sparse_gpt,
  truncated_svd,
  wanda,
)
from lmcompress.transforms.alps import solve_support
from lmcompress.transforms.wanda import keep_active
from lmcompress.types import Evidence, WeightError

PATH = "layers/0/mlp/up/kernel"
RNG = np.random.default_rng(0)
X = (RNG.normal(size=(400, 64)) @ RNG.normal(size=(64, 64)) * np.exp(RNG.normal(size=64))).astype(np.float32)
W = jnp.asarray(RNG.normal(size=(64, 24)).astype(np.float32))
HESSIAN = jnp.asarray(2 * X.T @ X / len(X))
STATISTICS = {"hessian": HESSIAN, "reference_hessian": HESSIAN, "second_moment": jnp.asarray((X * X).mean(0))}


def applied(transform, w=W, statistics=STATISTICS, **evidence):
  params = tree.unflatten({PATH: w})
  done, _ = transform.apply(params, transform.init(params), Evidence(statistics={PATH: statistics}, **evidence))
  return tree.get(done, PATH)


def dense(leaf):
  return np.asarray(leaf if isinstance(leaf, jax.Array) else leaf.materialize(), np.float64)


def error(leaf):
  """Relative, of the outputs on the calibration tokens."""
  x, w = X.astype(np.float64), np.asarray(W, np.float64)
  return np.linalg.norm(x @ (dense(leaf) - w)) / np.linalg.norm(x @ w)


METHODS = {
  "wanda": wanda, "sparse_gpt": sparse_gpt, "alps": alps,
  "sparse_gpt int4": lambda *a, **k: sparse_gpt(*a, **k, quantize={"bits": 4, "group_size": 16}),
}  # fmt: skip
each_method = pytest.mark.parametrize("method", METHODS)


@each_method
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 0.9, 1.0])
def test_sparsity_is_exact(method, sparsity):
  leaf = applied(METHODS[method](sparsity))
  removed = round(64 * sparsity) * 24 if method == "wanda" else round(64 * 24 * sparsity)
  if isinstance(leaf, MaskedArray):
    assert int(jnp.sum(leaf.mask.unpack() == 0)) == removed
  else:
    assert (dense(leaf) == 0).sum() >= removed
  if sparsity == 1:
    assert not dense(leaf).any()
  if sparsity == 0 and "int4" not in method:
    np.testing.assert_allclose(dense(leaf), W, atol=1e-5)


@pytest.mark.parametrize(("method", "compiled"), [(sparse_gpt, solve), (alps, solve_support)])
def test_one_program_serves_every_sparsity(method, compiled):
  applied(method(0.41))
  before = compiled._cache_size()
  for sparsity in (0.42, 0.43, 0.77):
    applied(method(sparsity))
  assert compiled._cache_size() == before


@each_method
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_patterns_are_exact(method, pattern):
  n, m = map(int, pattern.split(":"))
  kept = (dense(applied(METHODS[method](pattern=pattern))).T.reshape(24, -1, m) != 0).sum(-1)
  assert (kept <= n).all() and ((kept == n).all() or "int4" in method)


def test_wanda_is_its_formula():
  score = np.abs(np.asarray(W, np.float64)) * np.sqrt((X.astype(np.float64) ** 2).mean(0))[:, None]
  rank = np.argsort(np.argsort(score, axis=0), axis=0)
  np.testing.assert_array_equal(keep_active(W, STATISTICS["second_moment"], Target(0.5)), rank >= 32)
  equal = keep_active(jnp.ones((8, 2)), jnp.ones(8), Target(0.5))
  np.testing.assert_array_equal(equal[:, 0], np.arange(8) >= 4)  # ties: the earlier goes


def test_each_is_better_than_the_one_before():
  """On outputs: magnitude, Wanda, SparseGPT, ALPS; the last two also for a pattern."""
  for options in ({"sparsity": 0.6}, {"pattern": "2:4"}):
    errors = [error(applied(f(**options))) for f in (magnitude, wanda, sparse_gpt, alps)]
    assert errors == sorted(errors, reverse=True), errors
  bare = sparse_gpt(0.6, refit=0, order="none")
  assert error(applied(sparse_gpt(0.6))) < error(applied(bare)) < error(applied(wanda(0.6)))


def reference_sparse_gpt(w, hessian, sparsity, block, damping=0.01):
  """Frantar and Alistarh 2023, algorithm 1, in NumPy float64; `w: [in, out]`."""
  w, h = np.asarray(w, np.float64).T.copy(), np.asarray(hessian, np.float64)
  h = h + np.eye(len(h)) * damping * np.diag(h).mean()
  upper = np.linalg.cholesky(np.linalg.inv(h)).T
  keep = np.ones(w.shape, bool)
  for i1 in range(0, w.shape[1], block):
    score = w[:, i1 : i1 + block] ** 2 / np.diag(upper)[i1 : i1 + block] ** 2
    cut = np.argsort(score.T.ravel(), kind="stable")[: round(score.size * sparsity)]
    mask = np.ones(score.size, bool)
    mask[cut] = False
    keep[:, i1 : i1 + block] = mask.reshape(block, -1).T
    for i in range(i1, i1 + block):
      e = np.where(keep[:, i], 0, w[:, i]) / upper[i, i]
      w[:, i:] -= np.outer(e, upper[i, i:])
  return (w * keep).T


def test_sparse_gpt_is_its_reference():
  upper = inverse_factor(HESSIAN, 0.01).upper
  values, keep = remove_in_turn(W, upper, None, Removal.of(Target(0.5), 64, (24,)), 32, jnp.ones(64, bool))
  want = reference_sparse_gpt(W, HESSIAN, 0.5, 32)
  assert (np.asarray(keep) == (want != 0)).mean() > 0.995  # float32 may turn a near tie
  same = np.asarray(keep) == (want != 0)
  assert np.linalg.norm((np.asarray(values) - want)[same.all(1)]) < 1e-2 * np.linalg.norm(want)


def test_refit_is_the_least_squares_solution():
  keep = RNG.random((64, 24)) > 0.5
  found = np.asarray(refit(W, HESSIAN, W, jnp.asarray(keep), 200), np.float64)
  for o in range(3):
    best = np.linalg.lstsq(X[:, keep[:, o]].astype(np.float64), X.astype(np.float64) @ np.asarray(W)[:, o], rcond=None)
    np.testing.assert_allclose(found[keep[:, o], o], best[0], rtol=0.02, atol=0.02)
  assert not found[~keep].any()


def test_removing_and_rounding_together_beats_one_after_the_other():
  together = sparse_gpt(pattern="2:4", quantize={"bits": 4, "group_size": 16})
  pruned = applied(sparse_gpt(pattern="2:4"))
  apart = applied(gptq(4, 16), pruned)
  leaf = applied(together)
  assert isinstance(leaf, QuantizedArray) and leaf.nbits == apart.nbits
  assert error(leaf) < error(apart)


@each_method
def test_what_was_removed_stays_removed(method):
  before = applied(magnitude(0.5))
  after = dense(applied(METHODS[method](0.6), before))
  assert not after[dense(before) == 0].any() and (after == 0).sum() >= 24 * round(64 * 0.6)


def test_gptq_after_wanda_keeps_zeros():
  pruned = applied(wanda(0.5))
  assert not dense(applied(gptq(4, 16), pruned))[dense(pruned) == 0].any()


def test_masks_over_codes():
  """Prune what is quantized: codes stay, and removed ones read as 0."""
  for make in (round_to_nearest(4, 16), kmeans(8)):
    codes = applied(make)
    for prune in (magnitude(0.5), wanda(0.5), magnitude(threshold=0.1)):
      leaf = applied(prune, codes)
      assert isinstance(leaf, MaskedArray) and leaf.values is codes
      kept = dense(leaf) != 0
      np.testing.assert_array_equal(dense(leaf)[kept], dense(codes)[kept])
  for refused in (sparse_gpt(0.5), alps(0.5), truncated_svd(0.5)):
    with pytest.raises(WeightError, match="already stored as int4"):
      applied(refused, applied(round_to_nearest(4, 16)))


@pytest.mark.parametrize(("method", "form"), [
  (wanda(pattern="2:4"), NMSparseArray), (wanda(pattern="1:4"), NMSparseArray), (wanda(0.8), BitmapArray),
  (sparse_gpt(pattern="2:4", quantize={"bits": 4, "group_size": 16}), NMSparseArray),
  (sparse_gpt(0.2, quantize={"bits": 4, "group_size": 16}), QuantizedArray),
])  # fmt: skip
def test_the_smallest_form(method, form):
  before = applied(method)
  after = applied(freeze("auto"), before)
  assert isinstance(after, form)
  np.testing.assert_array_equal(dense(after), dense(before))


def test_sparse_codes_take_half_and_a_position():
  leaf = applied(sparse_gpt(pattern="2:4", quantize={"bits": 4, "group_size": 16}))
  sparse = applied(freeze("2:4"), leaf)
  assert sparse.nbits == 64 * 24 // 2 * (4 + 2) + 64 // 16 * 24 * 16
  for bad, message in (("1:4", "of a group of 4"), ("bitmap", "would tear apart")):
    with pytest.raises(WeightError, match=message):
      applied(freeze(bad), leaf)


def test_gradient_scores(tiny):
  """`grads` and `fisher` are those of a loss written out here, and the masks follow their formulas."""
  model, params = tiny
  tokens = np.random.default_rng(1).integers(0, 64, (3, 10)).astype(np.int32)

  def loss(params, row):
    said = jax.nn.log_softmax(model.apply(params, row[None, :])[0, :-1])
    return -jnp.mean(said[jnp.arange(9), row[1:]])

  each = [jax.grad(loss)(params, jnp.asarray(row)) for row in tokens]
  w = tree.get(params, PATH)
  rows = np.stack([np.asarray(tree.get(g, PATH), np.float64) for g in each])
  scores = {
    "snip": np.abs(rows.mean(0) * w), "fisher": (rows**2).mean(0) * np.asarray(w) ** 2 / 2,
    "taylor": np.abs((rows**2).mean(0) * np.asarray(w) ** 2 / 2 - rows.mean(0) * w),
  }  # fmt: skip
  for score, values in scores.items():
    done, _ = compress(model, params, gradient(0.5, score=score), tokens)
    keep = np.asarray(tree.get(done, PATH).mask.unpack()) != 0
    order = np.argsort(values.ravel(), kind="stable")
    assert keep.sum() == keep.size // 2
    assert (keep.ravel()[order[keep.size // 2 :]]).mean() > 0.995  # near ties in float32
  done, _ = compress(model, params, gradient(0.5, scope="global"), tokens)
  zeros = [int((np.asarray(leaf.mask.unpack()) == 0).sum()) for leaf in tree.weights(done).values()
           if isinstance(leaf, MaskedArray)]  # fmt: skip
  assert sum(zeros) == round(0.5 * sum(w.size for p, w in tree.weights(params).items() if p.endswith("kernel")))
  assert len(set(zeros)) > 2


@pytest.mark.parametrize("make", [
  lambda: wanda(), lambda: wanda(0.5, "2:4"), lambda: wanda(-0.1), lambda: wanda(1.1), lambda: wanda(float("nan")),
  lambda: wanda(pattern="4:2"), lambda: wanda(0.5, scope="tree"), lambda: sparse_gpt(2.0), lambda: sparse_gpt("2:4"),
  lambda: sparse_gpt(0.5, refit=-1), lambda: sparse_gpt(0.5, block_size=8), lambda: sparse_gpt(0.5, damping=0.0),
  lambda: sparse_gpt(0.5, quantize={"width": 4}), lambda: sparse_gpt(0.5, quantize={"bits": 9}),
  lambda: sparse_gpt(0.5, quantize={"grid": "fp8_e4m3"}), lambda: sparse_gpt(0.5, quantize={"symmetric": "no"}),
  lambda: sparse_gpt(0.5, quantize={"grid": "nf4", "bits": 3}), lambda: sparse_gpt(0.5, quantize="int4"),  # type: ignore[arg-type]
  lambda: sparse_gpt(pattern="2:7", quantize={"group_size": 32}), lambda: sparse_gpt(0.5, order="last"),
  lambda: alps(0.5, iterations=0), lambda: alps(pattern="2"), lambda: gradient(0.5, score="none"),
  lambda: gradient(pattern="2:4", scope="global"), lambda: freeze("3"),
])  # fmt: skip
def test_arguments_out_of_range(make):
  with pytest.raises((ValueError, TypeError)):
    make()


def test_rows_that_m_does_not_divide_and_weights_that_are_not_finite():
  for make in (wanda, sparse_gpt, alps, gradient):
    with pytest.raises(WeightError, match="62 inputs are not a multiple of 4"):
      make(pattern="2:4").init(tree.unflatten({PATH: W[:62]}))
    with pytest.raises(WeightError, match="NaN or infinity"):
      make(0.5).init(tree.unflatten({PATH: W.at[3, 3].set(jnp.nan)}))


def test_a_chain_counts_its_zeros(tiny):
  tokens = np.random.default_rng(1).integers(0, 64, (4, 16)).astype(np.int32)
  _, report = compress(*tiny, chain(sparse_gpt(pattern="2:4"), gptq(4, 16), freeze("2:4")), tokens)
  last = report.last()
  assert all(row["kind"].startswith("2:4 int4") and row["sparsity"] >= 0.5 for row in last.values())


def test_almost_all_is_allotted(tiny):
  """Above 99 % too, the weights that lose least may go whole."""
  model, params = tiny
  done = compress(model, params, sensitivity(0.995, "weight", method="magnitude"), None)[0]
  masks = [leaf for leaf in tree.weights(done).values() if isinstance(leaf, MaskedArray)]
  zeros = sum(int(jnp.sum(leaf.materialize() == 0)) for leaf in masks)
  assert 0.995 * sum(leaf.size for leaf in masks) <= zeros < sum(leaf.size for leaf in masks)
