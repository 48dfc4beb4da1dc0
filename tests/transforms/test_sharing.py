"""Shared values, shared layers and low rank: optima checked by brute force, references that stay one value."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from lmcompress import load, ops, prepare, save, tree
from lmcompress.arrays import ClusteredArray, LowRankArray, MaskedArray, SharedRef, SumArray, resolve
from lmcompress.calibration import compress
from lmcompress.distributed import make_mesh, shard
from lmcompress.evaluate.size import sizes
from lmcompress.io import checkpoint
from lmcompress.io.leaves import describe
from lmcompress.models import Llama, LlamaConfig, LlamaSizes
from lmcompress.ops.kmeans import linear_seeds, lloyd, nearest, optimal
from lmcompress.transforms import (
  at,
  chain,
  freeze,
  kmeans,
  low_rank_residual,
  magnitude,
  prune_layers,
  prune_neurons,
  quantize_activations,
  round_to_nearest,
  share,
  sparse_gpt,
  tie_layers,
  truncated_svd,
)
from lmcompress.transforms.truncated_svd import allocate_ranks, factor
from lmcompress.types import Evidence, FormatError, WeightError

PATH = "layers/0/mlp/up/kernel"
RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.standard_t(4, size=(64, 24)).astype(np.float32))
X = (RNG.normal(size=(400, 64)) * np.exp(RNG.normal(size=64))).astype(np.float32)
STATISTICS = {
  "hessian": jnp.asarray(2 * X.T @ X / len(X)), "second_moment": jnp.asarray((X * X).mean(0)),
  "mean_abs": jnp.asarray(np.abs(X).mean(0)),
}  # fmt: skip
TOKENS = np.random.default_rng(1).integers(0, 64, (4, 16)).astype(np.int32)


def applied(transform, w=W, **evidence):
  params = tree.unflatten({PATH: w})
  done, _ = transform.apply(params, transform.init(params), Evidence(statistics={PATH: STATISTICS}, **evidence))
  return tree.get(done, PATH)


def dense(leaf):
  return np.asarray(leaf if isinstance(leaf, jax.Array) else leaf.materialize(), np.float64)


def loss(x, weights, centroids):
  return (weights * np.min((x[..., None] - centroids[..., None, :]) ** 2, axis=-1)).sum()


@pytest.mark.parametrize("compiled", [True, False])
def test_optimal_clusters_by_brute_force(compiled):
  """Against every way to cut the sorted values into k runs, in float64."""
  rng = np.random.default_rng(2)
  with ops.use_backend("auto" if compiled else "reference"):
    for n, k in ((3, 2), (9, 1), (12, 4), (14, 5), (4, 4), (2, 5)):
      x, w = rng.normal(size=(4, n)).round(1), rng.random((4, n)) * (rng.random((4, n)) > 0.2) + 1e-9
      found = optimal(x, w, k)
      assert found.shape == (4, k) and (np.diff(found, axis=1) >= 0).all()
      for row in range(4):
        order = np.argsort(x[row])
        v, u = x[row][order], w[row][order]
        best = min(
          sum(
            float((u[a:b] * (v[a:b] - np.average(v[a:b], weights=u[a:b])) ** 2).sum())
            for a, b in itertools.pairwise((0, *cut, n))
          )
          for cut in itertools.combinations(range(1, n), min(k, n) - 1)
        )
        assert loss(x[row], w[row], found[row]) <= best * (1 + 1e-9) + 1e-9


def test_exact_is_never_worse_than_lloyd_nor_scikit_learn():
  x = RNG.standard_t(4, size=(6, 500))
  ones = np.ones_like(x)
  for k in (4, 16):
    exact = optimal(x, ones, k)
    iterated = np.asarray(lloyd(jnp.asarray(x), jnp.asarray(ones), linear_seeds(jnp.asarray(x), k), steps=60))
    peer = [np.sort(KMeans(k, n_init=5, random_state=0).fit(row[:, None]).cluster_centers_.ravel()) for row in x]
    assert loss(x, ones, exact) <= loss(x, ones, iterated) * (1 + 1e-9)
    assert loss(x, ones, exact) <= loss(x, ones, np.stack(peer)) * (1 + 1e-9)


def test_more_distinct_values_than_the_programme_tells_apart():
  x = RNG.standard_t(4, size=(1, 50_000))
  exact, iterated = (
    optimal(x, np.ones_like(x), 16),
    np.asarray(lloyd(jnp.asarray(x), jnp.ones_like(x), linear_seeds(jnp.asarray(x), 16), steps=30)),
  )
  assert loss(x, 1.0, exact) < loss(x, 1.0, iterated)


def test_nearest_is_nearest():
  c = np.sort(RNG.normal(size=(3, 7)), axis=1)
  x = RNG.normal(size=(3, 50))
  np.testing.assert_array_equal(nearest(jnp.asarray(x), jnp.asarray(c)), np.abs(x[..., None] - c[:, None]).argmin(-1))


@pytest.mark.parametrize(("share_", "books"), [("tensor", 1), (8, 3), ("row", 24)])
def test_finer_sharing_is_closer(share_, books):
  leaf = applied(kmeans(8, share_, codebook_dtype="float32"))
  assert isinstance(leaf, ClusteredArray) and leaf.books == books
  assert leaf.nbits == 64 * 24 * 3 + books * 8 * 32
  exact, iterated = (np.linalg.norm(dense(applied(kmeans(8, share_, m))) - W) for m in ("exact", "lloyd"))
  assert exact <= iterated * 1.001  # a bfloat16 codebook rounds either
  for run, block in enumerate(np.split(dense(leaf), books, axis=1)):
    assert len(np.unique(block)) <= 8, run


def test_sensitivity_lowers_the_weighted_error():
  fisher = jnp.asarray(RNG.random((64, 24)).astype(np.float32) ** 8)
  given = {"fisher": tree.unflatten({PATH: fisher})}
  error = lambda leaf: float((np.asarray(fisher) * (dense(leaf) - np.asarray(W)) ** 2).sum())  # noqa: E731
  assert error(applied(kmeans(8, "row", sensitivity="fisher"), **given)) < error(applied(kmeans(8, "row")))
  x = lambda leaf: np.linalg.norm(X @ (dense(leaf) - np.asarray(W)))  # noqa: E731
  assert x(applied(kmeans(8, "row", sensitivity="activation"))) < x(applied(kmeans(8, "row")))


def test_outliers_are_kept_apart():
  leaf = applied(kmeans(8, outlier_fraction=0.05))
  assert isinstance(leaf, SumArray) and leaf.delta.values.shape == (3, 24)
  at_largest = np.argsort(-np.abs(np.asarray(W)), axis=0)[:3]
  np.testing.assert_allclose(*(np.take_along_axis(x, at_largest, 0) for x in (dense(leaf), np.asarray(W))), rtol=0.01)
  assert np.linalg.norm(dense(leaf) - W) < np.linalg.norm(dense(applied(kmeans(8))) - W)


def test_masks_keep_a_value_of_their_own():
  before = applied(magnitude(0.5))
  for make in (kmeans(8), kmeans(8, "row"), kmeans(2)):
    after = applied(make, before)
    assert not dense(after)[dense(before) == 0].any() and isinstance(after, ClusteredArray)


def test_gradients_reach_the_centroids():
  leaf = applied(kmeans(8, "row", codebook_dtype="float32"))
  trainable, frozen = tree.partition({"up": {"kernel": leaf}})
  x = jnp.asarray(X[:5])
  value = lambda t: jnp.sum(ops.linear(x, tree.combine(t, frozen)["up"]["kernel"]) ** 2)  # noqa: E731
  found = jax.grad(value)(trainable)["up"]["kernel"].codebook
  y = np.asarray(x @ leaf.materialize(), np.float64)
  want = np.zeros((24, 8))
  codes = np.asarray(leaf.codes.unpack())
  for o in range(24):
    np.add.at(want[o], codes[:, o], np.asarray(x, np.float64).T @ (2 * y[:, o]))
  np.testing.assert_allclose(found, want, rtol=2e-4, atol=1e-2)


# ------------------------------------------------------------------------------------------ shared by the model


@pytest.fixture(scope="module")
def shared(tiny):
  return compress(*tiny, share(32))[0]


def test_one_set_of_values_for_the_whole_model(tiny, shared):
  """Each weight is the closest value; the values lie once; bits are indices and one codebook."""
  _, params = tiny
  book = np.asarray(shared["shared"]["codebook"], np.float64)
  kernels = {p: leaf for p, leaf in tree.weights(params).items() if p.endswith("kernel")}
  for path, w in kernels.items():
    leaf = tree.get(shared, path)
    assert isinstance(leaf, ClusteredArray) and isinstance(leaf.codebook, SharedRef)
    got = np.asarray(resolve(shared, leaf).materialize())
    flat = np.asarray(w, np.float64).ravel()
    closest = book[np.abs(flat[:, None] - book).argmin(1)]
    np.testing.assert_allclose(np.abs(got.ravel() - flat), np.abs(closest - flat), atol=1e-7)
  found = sizes(shared)["nbits"] - sum(
    tree.leaf_nbits(leaf) for p, leaf in tree.flatten(params).items() if p not in kernels
  )
  assert found == sum(w.size for w in kernels.values()) * 5 + 32 * 32


def test_a_shared_value_is_one_leaf(tiny, shared, tmp_path):
  """Saved, loaded, sharded, prepared and differentiated once."""
  model, _ = tiny
  save(tmp_path / "model", model, shared)
  _, again, _ = load(tmp_path / "model")
  assert checkpoint.tree_hash(again) == checkpoint.tree_hash(shared)
  want = np.asarray(model.apply(shared, TOKENS))
  placed = shard(model, shared, make_mesh(data=1, tensor=2))
  np.testing.assert_allclose(model.apply(placed, TOKENS), want, atol=1e-5)
  np.testing.assert_allclose(model.apply(prepare(shared), TOKENS), want, atol=1e-4)
  trainable, frozen = tree.partition(shared)
  gradient = jax.grad(lambda t: jnp.sum(model.apply(tree.combine(t, frozen), TOKENS) ** 2))(trainable)
  assert np.abs(np.asarray(gradient["shared"]["codebook"])).min() > 0
  step = tree.put(trainable, "shared/codebook", trainable["shared"]["codebook"] + 0.01)
  assert not np.allclose(model.apply(tree.combine(step, frozen), TOKENS), want)


def test_a_threshold_leaves_far_weights_alone(tiny):
  _, params = tiny
  done = compress(*tiny, share(8, threshold=0.02))[0]
  for path, w in tree.weights(params).items():
    if path.endswith("kernel"):
      distance = np.abs(np.asarray(resolve(done, tree.get(done, path)).materialize()) - np.asarray(w))
      assert distance.max() <= 0.02 + 1e-6


def test_the_articles_order_and_others(tiny):
  """Quantize, prune, share; prune, quantize, share; share after nothing: zeros stay zeros."""
  model, params = tiny
  quantize, prune = round_to_nearest(8, 16), magnitude(0.3)
  whole, _ = compress(model, params, chain(quantize_activations(0.05), quantize, magnitude(threshold=0.02), share(64)))
  assert np.isfinite(np.asarray(model.apply(whole, TOKENS))).all()  # both of the article's quantizations first
  for links in ((quantize, prune, share(64)), (prune, quantize, share(64)), (prune, share(64)), (prune, kmeans(16))):
    done, _ = compress(model, params, chain(*links))
    assert np.isfinite(np.asarray(model.apply(done, TOKENS))).all()
    for path, leaf in tree.weights(done).items():
      if path.startswith("layers/"):
        assert isinstance(leaf, ClusteredArray)
        assert (np.asarray(resolve(done, leaf).materialize()) == 0).mean() >= 0.29
  for after in (quantize, prune, kmeans(8)):
    with pytest.raises(WeightError, match=r"already stored as clustered|shared with other weights"):
      compress(model, params, chain(share(64), after))


@pytest.mark.parametrize("change", ["path", "extents", "dtype"])
def test_a_reference_to_nothing_is_refused(tiny, shared, change, tmp_path):
  import dataclasses

  leaf = tree.get(shared, PATH)
  bad = {"path": "shared/none", "extents": (31,), "dtype": "float16"}[change]
  reference = dataclasses.replace(leaf.codebook, **{change: bad})
  broken = tree.put(shared, PATH, dataclasses.replace(leaf, codebook=reference))
  save(tmp_path / "model", tiny[0], broken)
  with pytest.raises(FormatError, match="refers to"):
    load(tmp_path / "model")


def test_tied_layers(tiny, tmp_path):
  """With differences of full rank nothing is lost; with none the layers are one; one gradient for what they share."""
  model, params = tiny
  want = np.asarray(model.apply(params, TOKENS))
  done = compress(model, params, tie_layers([[0, 1]], rank=0))[0]
  assert isinstance(tree.get(done, "layers/1/mlp/up/kernel"), SharedRef)
  assert sizes(done)["nbits"] < sizes(params)["nbits"]
  save(tmp_path / "model", model, done)
  _, again, _ = load(tmp_path / "model")
  np.testing.assert_array_equal(model.apply(again, TOKENS), model.apply(done, TOKENS))
  gradient = jax.grad(lambda p: jnp.sum(model.apply(p, TOKENS) ** 2))(done)
  both = tree.put(params, "layers/1", {**params["layers"]["1"]})
  for path in tree.weights(done):
    if path.startswith("shared/"):
      for layer in "01":
        both = tree.put(both, path.replace("shared/layers/0", f"layers/{layer}"), tree.get(done, path))
  apart = jax.grad(lambda p: jnp.sum(model.apply(p, TOKENS) ** 2))(both)
  for path in tree.weights(done):
    if path.startswith("shared/"):
      parts = [tree.get(apart, path.replace("shared/layers/0", f"layers/{layer}")) for layer in "01"]
      np.testing.assert_allclose(tree.get(gradient, path), parts[0] + parts[1], rtol=2e-3, atol=2e-3)
  near = [np.abs(np.asarray(model.apply(compress(model, params, tie_layers([[0, 1]], rank=r))[0], TOKENS)) - want).max()
          for r in (2, 8, 16)]  # fmt: skip
  assert near == sorted(near, reverse=True)


def test_layers_with_little_left_go_with_what_they_alone_share():
  """The article's rule after its sharing; what no layer refers to any more is not kept."""
  model = Llama(LlamaConfig(head_dim=8), LlamaSizes(vocab=64, embed=32, mlp=32, layers=4, heads=4, kv_heads=4))
  params = model.init(jax.random.key(0))
  sparse = (at(f"layers/{i}", magnitude(0.9)) for i in (1, 2))
  less = compress(model, params, chain(*sparse, freeze(), tie_layers([[1, 2]], rank=0), prune_layers(threshold=0.5)))[0]
  assert set(less["layers"]) == {"0", "3"} and "shared" not in less
  shared = compress(model, params, chain(share(16), prune_layers(threshold=0.5)))[0]
  assert set(shared["layers"]) == set(params["layers"]) and "codebook" in shared["shared"]


def test_a_pattern_says_which_layers_share():
  model = Llama(LlamaConfig(head_dim=8), LlamaSizes(vocab=64, embed=32, mlp=32, layers=16, heads=4, kv_heads=4))
  done = compress(model, model.init(jax.random.key(0)), at("layers/1*", tie_layers(rank=0)))[0]
  assert set(done["shared"]["layers"]) == {"11", "13"}


def test_ties_that_cannot_be(tiny):
  model, params = tiny
  for make, message in (
    (lambda: tie_layers([[0, 5]]), "no layer 5 among 2"), (lambda: tie_layers(rank=2), "no run of 2 layers"),
    (lambda: at("layers/1", tie_layers([[0, 1]], rank=2)), "no weight is selected in all of layers/0, layers/1"),
    (lambda: tie_layers([[0, 1]], rank=99), "full rank is"),
  ):  # fmt: skip
    with pytest.raises(WeightError, match=message):
      compress(model, params, make())
  with pytest.raises(WeightError, match="of one shape"):
    half = at("layers/0", prune_neurons(0.5, score="magnitude", compensate=False))
    compress(model, params, chain(half, tie_layers([[0, 1]], rank=0)))


# ------------------------------------------------------------------------------------------ low rank


def test_full_rank_is_exact():
  for whitening in ("hessian", "activation", "none"):
    leaf = applied(truncated_svd(rank=24, whitening=whitening))
    assert isinstance(leaf, LowRankArray)
    np.testing.assert_allclose(dense(leaf), W, atol=2e-5)


def test_whitening_is_the_best_of_its_rank():
  """The error on outputs is that of the cut singular values of X W (Eckart and Young), and others have more."""
  x, w = X.astype(np.float64), np.asarray(W, np.float64)
  singular = np.linalg.svd(x @ w, compute_uv=False)
  error = lambda leaf: np.linalg.norm(x @ (dense(leaf) - w))  # noqa: E731
  best = error(applied(truncated_svd(rank=8, damping=1e-6)))
  np.testing.assert_allclose(best, np.sqrt((singular[8:] ** 2).sum()), rtol=1e-3)
  plain, scaled = (error(applied(truncated_svd(rank=8, whitening=w))) for w in ("none", "activation"))
  assert best < scaled < plain


def test_ratio_and_energy_say_the_rank():
  assert applied(truncated_svd(0.5)).rank == int(0.5 * 64 * 24 / 88)
  squares = np.linalg.svd(np.asarray(W, np.float64), compute_uv=False) ** 2
  leaf = applied(truncated_svd(energy=0.8, whitening="none"))
  assert leaf.rank == np.searchsorted(np.cumsum(squares) / squares.sum(), 0.8) + 1
  assert applied(truncated_svd(energy=1.0, whitening="none")).rank == 24
  quantized = applied(truncated_svd(rank=16, bits=8, group_size=16))
  assert quantized.nbits == (64 + 24) * 16 * 8 + (64 // 16) * 16 * 16 + 24 * 16


def test_a_global_budget_goes_where_energy_is():
  ranks = allocate_ranks({"steep": ((10, 10), np.array([100.0, 1, 0.1])), "flat": ((10, 10), np.ones(10))}, 0.6)
  assert ranks == {"steep": 1, "flat": 5} and sum(20 * r for r in ranks.values()) <= 0.6 * 200


def test_a_residual_takes_back_what_was_lost(tiny):
  model, params = tiny
  lossy = compress(model, params, round_to_nearest(2, 16))[0]
  whole = chain(round_to_nearest(2, 16), low_rank_residual(8))
  done, report = compress(model, params, whole, TOKENS)
  leaf = tree.get(done, PATH)
  assert isinstance(leaf, SumArray) and "low rank 8" in leaf.kind
  want = np.asarray(model.apply(params, TOKENS))
  error = lambda p: np.linalg.norm(np.asarray(model.apply(p, TOKENS)) - want)  # noqa: E731
  assert error(done) < 0.8 * error(lossy)
  left, singular, right = factor(W, None, None, 0.0)
  np.testing.assert_allclose(left * singular @ right, W, atol=1e-5)
  with pytest.raises(WeightError, match="the weight is dense"):
    compress(model, params, low_rank_residual(2), TOKENS)
  assert report.last()[PATH]["bits"] == pytest.approx(leaf.nbits / leaf.size)


def test_four_families_on_one_tree(tiny, tmp_path):
  """The bytes on disk are the sum of what the report says of each weight, the rest of the tree, and the header."""
  model, params = tiny
  recipe = chain(
    prune_neurons(0.25), sparse_gpt(pattern="2:4"), round_to_nearest(4, 16, scale_bits=8), freeze("2:4"),
    low_rank_residual(4),
  )  # fmt: skip
  done, report = compress(model, params, recipe, TOKENS)
  assert np.isfinite(np.asarray(model.apply(done, TOKENS))).all()
  rows = {p: row["bits"] * np.prod(row["shape"]) for p, row in report.last().items()}
  rest = sum(tree.leaf_nbits(leaf) for p, leaf in tree.flatten(done).items() if p not in rows)
  arrays = describe(done)[1]
  total = sum(x.size * np.dtype(x.dtype).itemsize for x in arrays.values())
  assert (sum(rows.values()) + rest) / 8 == total
  size = checkpoint.weights_size(done)
  assert size - total - 64 * len(arrays) * 4 >= 0 or size >= total
  save(tmp_path / "m", model, done)
  assert (tmp_path / "m" / "weights.safetensors").stat().st_size == size


@pytest.mark.parametrize("make", [
  lambda: kmeans(1), lambda: kmeans(257), lambda: kmeans(8, "column"), lambda: kmeans(8, 0),
  lambda: kmeans(8, method="x"), lambda: kmeans(8, sensitivity="x"), lambda: kmeans(8, outlier_fraction=1.0),
  lambda: share(1), lambda: share(257),
  lambda: share(8, threshold=-1.0), lambda: share(8, threshold=float("nan")),
  lambda: tie_layers([[0]]), lambda: tie_layers([]),
  lambda: tie_layers([[0, 1], [1, 2]]), lambda: tie_layers(rank=-1), lambda: tie_layers(size=1),
  lambda: truncated_svd(), lambda: truncated_svd(0.5, 3), lambda: truncated_svd(0.0), lambda: truncated_svd(rank=0),
  lambda: truncated_svd(energy=1.1),
  lambda: truncated_svd(0.5, whitening="x"), lambda: truncated_svd(rank=2, scope="global"),
  lambda: truncated_svd(0.5, bits=9), lambda: truncated_svd(0.5, whitening="none", error_propagation=0.5),
  lambda: low_rank_residual(0), lambda: low_rank_residual(2, bits=1),
])  # fmt: skip
def test_arguments_out_of_range(make):
  with pytest.raises(ValueError):
    make()


def test_what_cannot_be_shared_or_factored():
  for make, w, message in (
    (kmeans(8), W.at[0, 0].set(jnp.inf), "NaN or infinity"), (kmeans(256, "row"), W, "serves 64 weights"),
    (kmeans(8, 7), W, "24 outputs are no multiple"), (truncated_svd(rank=25), W, "full rank is 24"),
    (truncated_svd(0.5), applied(magnitude(0.5)), "factor first"), (low_rank_residual(25), W, "full rank is 24"),
  ):  # fmt: skip
    with pytest.raises(WeightError, match=message):
      make.init(tree.unflatten({PATH: w}))
  constant = applied(kmeans(16), jnp.full((64, 24), 0.5))
  np.testing.assert_array_equal(dense(constant), 0.5)
  nothing = applied(magnitude(1.0))
  assert isinstance(nothing, MaskedArray) and not dense(applied(kmeans(4), nothing)).any()
