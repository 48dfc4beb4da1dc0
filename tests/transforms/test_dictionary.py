"""Weights of atoms: k-means of vectors and sparse codes against scikit-learn, sensitivity, bits, what is refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.linear_model import orthogonal_mp_gram

from lmcompress.arrays import DictionaryArray, InputArray, quantized
from lmcompress.calibration import compress
from lmcompress.ops.atoms import learn_dictionary, nearest_atoms, pursue, vector_kmeans
from lmcompress.transforms import (
  chain,
  magnitude,
  product_quantize,
  quantize_inputs,
  round_to_nearest,
  sparse_code,
  sparsify_activations,
)
from lmcompress.transforms.product_quantize import quantize_runs
from lmcompress.transforms.sparse_code import code_matrix
from lmcompress.types import WeightError

KEY = jax.random.key(0)
VECTORS = np.random.default_rng(0).normal(size=(600, 6)).astype(np.float32)
ONES = jnp.ones(VECTORS.shape)
W = jnp.asarray(np.random.default_rng(1).normal(size=(48, 64)).astype(np.float32))
TOKENS = np.random.default_rng(2).integers(0, 64, (8, 32)).astype(np.int32)


def error(x, atoms, importance=ONES):
  return float(jnp.sum(nearest_atoms(x, importance, atoms)[1]))


def test_kmeans_is_as_good_as_scikit_learns():
  """Both are local optima from drawn vectors: within 3 % of the better of ten starts."""
  ours = error(VECTORS, vector_kmeans(VECTORS, ONES, 16, KEY, 50))
  theirs = KMeans(16, init="random", n_init=10, random_state=0).fit(VECTORS).inertia_
  assert theirs * 0.97 < ours < theirs * 1.03


def test_kmeans_never_rises_and_serves_every_atom():
  twice = np.concatenate([VECTORS[:20], np.repeat(VECTORS[20:21], 300, axis=0)])  # most draws are one vector
  ones = jnp.ones(twice.shape)
  errors = [error(twice, vector_kmeans(twice, ones, 16, KEY, steps), ones) for steps in (1, 2, 4, 8, 30)]
  assert all(later <= earlier * 1.00001 for earlier, later in itertools.pairwise(errors))
  index, _ = nearest_atoms(twice, ones, vector_kmeans(twice, ones, 16, KEY, 30))
  assert len(set(np.asarray(index).tolist())) == 16


def test_importance_decides_where_errors_lie():
  """The weighted k-means loses less in the weighted measure, and the plain one in the plain."""
  importance = jnp.broadcast_to(jnp.asarray([100.0, 1, 1, 1, 1, 1]), VECTORS.shape)
  plain, weighted = (vector_kmeans(VECTORS, s, 16, KEY, 30) for s in (ONES, importance))
  assert error(VECTORS, weighted, importance) < error(VECTORS, plain, importance) / 2
  assert error(VECTORS, plain) < error(VECTORS, weighted)


def test_pursuit_is_scikit_learns():
  """The same atoms and coefficients; the hair of ridge costs 1e-5."""
  atoms = np.random.default_rng(3).normal(size=(20, 6))
  atoms = (atoms / np.linalg.norm(atoms, axis=1, keepdims=True)).astype(np.float32)
  codes, values = pursue(VECTORS[:50], ONES[:50], jnp.asarray(atoms), 3)
  ours = np.zeros((50, 20))
  np.put_along_axis(ours, np.asarray(codes), np.asarray(values), axis=1)
  gram = atoms.astype(np.float64) @ atoms.T
  theirs = orthogonal_mp_gram(gram, atoms.astype(np.float64) @ VECTORS[:50].T, n_nonzero_coefs=3).T
  np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_a_dictionary_is_found_again():
  """Vectors made of two of twelve atoms: learning explains them far better than drawn vectors do."""
  rng = np.random.default_rng(4)
  truth = rng.normal(size=(12, 8))
  picks = np.stack([rng.choice(12, 2, replace=False) for _ in range(500)])
  x = np.einsum("nt,ntw->nw", rng.normal(size=(500, 2)) + 2, truth[picks]).astype(np.float32)
  left = []
  for steps in (0, 30):
    atoms, codes, values = learn_dictionary(x, jnp.ones(x.shape), 12, 2, KEY, steps)
    left.append(float(jnp.linalg.norm(x - jnp.einsum("nt,ntw->nw", values, atoms[codes])) / np.linalg.norm(x)))
  np.testing.assert_allclose(np.linalg.norm(np.asarray(atoms), axis=1), 1, atol=1e-5)
  assert left[1] < 0.65 * left[0]


def test_more_is_never_worse():
  """More atoms, more nonzeros: each loses less, and as many nonzeros as inputs lose nothing."""
  lost = lambda leaf: float(jnp.linalg.norm(leaf.materialize() - W))  # noqa: E731
  product = lambda atoms: quantize_runs(W, None, -2, 4, atoms, False, 5, KEY, "float32")  # noqa: E731
  assert lost(product(64)) < lost(product(16))
  coded = lambda nonzeros: code_matrix(W, None, -2, 4, 32, nonzeros, None, 64, 1, KEY)  # noqa: E731
  assert lost(coded(2)) < lost(coded(1))
  assert lost(coded(4)) < 0.01 * float(jnp.linalg.norm(W))  # atoms and coefficients are bfloat16


@pytest.mark.parametrize("axis", [-2, -1])
def test_tables_are_coded_as_kernels_are(axis):
  w = W if axis == -2 else W.T
  for leaf in (
    quantize_runs(w, None, axis, 5, 16, False, 5, KEY),
    quantize_runs(w, None, axis, 5, 16, True, 5, KEY),
    code_matrix(w, None, axis, 5, 16, 2, 4, 16, 2, KEY),
  ):
    assert isinstance(leaf, DictionaryArray) and leaf.shape == w.shape and leaf.axis == axis
    assert float(jnp.linalg.norm(leaf.materialize() - w)) < 0.9 * float(jnp.linalg.norm(w))


def test_bits_are_what_the_page_says():
  product = quantize_runs(W, None, -2, 4, 16, False, 2, KEY)
  assert product.nbits == W.size // 4 * 4 + 16 * 4 * 16
  coded = code_matrix(W, None, -2, 8, 16, 2, 4, 12, 1, KEY)
  assert coded.nbits == 6 * 2 * 64 * (4 + 4) + 64 * 16 + 16 * 8 * 16
  assert isinstance(coded.coefficients, quantized.QuantizedArray)


def test_sensitivity_saves_what_inputs_feel():
  """Half of the inputs are ten times as large: the output's error falls when that counts."""
  moment = jnp.where(jnp.arange(48) < 24, 100.0, 1.0)
  felt = lambda leaf: float(jnp.sum(moment[:, None] * jnp.square(leaf.materialize() - W)))  # noqa: E731
  for make in (
    lambda m: quantize_runs(W, m, -2, 4, 16, False, 10, KEY, "float32"),
    lambda m: code_matrix(W, m, -2, 8, 16, 2, None, 64, 4, KEY),
  ):
    assert felt(make(moment)) < felt(make(None))


@pytest.fixture(scope="module")
def model_and_params(tiny):
  return tiny


def test_activations_are_as_sparse_as_asked(model_and_params):
  """Of the calibration text's inputs that share lies below the threshold, to a bin; masks and codes stay below it."""
  model, params = model_and_params
  done, _ = compress(model, params, chain(round_to_nearest(8, -1), sparsify_activations(0.5)), TOKENS, KEY)
  leaf = done["layers"]["1"]["mlp"]["down"]["kernel"]
  assert isinstance(leaf, InputArray) and isinstance(leaf.weight, quantized.QuantizedArray)
  carry = model.start(params, {"tokens": TOKENS})
  for block in model.blocks(params):
    carry, taps = model.run(block, params, carry, taps=("down",))
  zeros = float(jnp.mean(leaf.act(taps["down"]) == 0))
  assert 0.47 < zeros < 0.53
  want, got = (np.asarray(model.apply(p, TOKENS)) for p in (params, done))
  assert 0.01 < np.abs(got - want).mean() / np.abs(want).mean() < 1
  whole, _ = compress(model, params, sparsify_activations(0.0), TOKENS, KEY)
  np.testing.assert_allclose(model.apply(whole, TOKENS), want, atol=1e-5)


@pytest.mark.parametrize(
  "make",
  [
    lambda: product_quantize(0), lambda: product_quantize(atoms=1), lambda: product_quantize(atoms=300),
    lambda: product_quantize(steps=0), lambda: product_quantize(spaces="two"),
    lambda: product_quantize(sensitivity="fisher"), lambda: sparse_code(1), lambda: sparse_code(atoms=1),
    lambda: sparse_code(width=4, nonzeros=5), lambda: sparse_code(nonzeros=0), lambda: sparse_code(bits=1),
    lambda: sparse_code(group_size=0), lambda: sparse_code(sensitivity="kl"), lambda: sparsify_activations(1.0),
    lambda: sparsify_activations(-0.1), lambda: sparsify_activations(float("nan")),
  ],
)  # fmt: skip
def test_arguments_out_of_range(make):
  with pytest.raises(ValueError, match=r"^(product_quantize|sparse_code|sparsify_activations)\("):
    make()


@pytest.mark.parametrize(
  ("recipe", "said"),
  [
    (product_quantize(64, 256), "serves 16 runs of 64; use fewer atoms"),
    (sparse_code(64, 256), "serves 16 runs of 64; use fewer atoms"),
    (chain(magnitude(0.5), product_quantize(4, 8)), "vectors keep no zeros"),
    (chain(round_to_nearest(4, 16), sparse_code(4, 8, 2)), "already stored as int4"),
    (chain(quantize_inputs(), sparsify_activations()), "acted on already"),
  ],
)
def test_weights_that_do_not_fit(model_and_params, recipe, said):
  model, params = model_and_params
  with pytest.raises(WeightError, match=said):
    compress(model, params, recipe, TOKENS, KEY)
