"""Magnitude pruning removes exactly as many as asked, the smallest, the earlier of equals first."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress import tree
from lmcompress.arrays import MaskedArray, low_rank
from lmcompress.ops import masks
from lmcompress.transforms import at, magnitude, round_to_nearest
from lmcompress.transforms.schedules import cubic
from lmcompress.types import Evidence, WeightError

materialize = jax.jit(MaskedArray.materialize)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tied(*shape, seed=0):
  """Few distinct magnitudes, zeros among them: most of a ranking is ties."""
  return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


def tree_of(**weights):
  return {"layers": {name: {"kernel": jnp.asarray(w)} for name, w in weights.items()}}


def apply(transform, params, **evidence):
  return transform.apply(params, transform.init(params), Evidence(**evidence))[0]


def kept(leaf):
  return np.asarray(leaf.mask.unpack()) != 0


def smallest(score, removed):
  """The reference: the first `removed` of a stable sort."""
  mask = np.zeros(score.size, bool)
  mask[np.argsort(score.ravel(), kind="stable")[:removed]] = True
  return mask.reshape(score.shape)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("make", [normal, tied])
def test_per_weight(make, sparsity):
  w = make(24, 10)
  leaf = apply(magnitude(sparsity), tree_of(up=w))["layers"]["up"]["kernel"]
  want = ~smallest(np.abs(w), round(240 * sparsity))
  np.testing.assert_array_equal(kept(leaf), want)
  np.testing.assert_array_equal(materialize(leaf), np.where(want, w, 0))
  np.testing.assert_array_equal(leaf.values, w)  # what is removed is kept for training


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("make", [normal, tied])
@pytest.mark.parametrize("name", ["kernel", "table"])
def test_per_row(name, make, sparsity):
  """Each output (a kernel's column, a table's row) loses the same number of inputs."""
  w = make(24, 10) if name == "kernel" else make(10, 24)
  params = {"head": {name: jnp.asarray(w)}}
  leaf = apply(at("head", magnitude(sparsity, scope="row")), params)["head"][name]
  rows = np.abs(w.T if name == "kernel" else w)
  want = np.stack([~smallest(row, round(24 * sparsity)) for row in rows])
  np.testing.assert_array_equal(kept(leaf), want.T if name == "kernel" else want)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("make", [normal, tied])
def test_global_is_one_sort_over_all(make, sparsity):
  """Weights in natural order, ties given to the earlier weight and the earlier entry."""
  weights = {"2": make(8, 6) * 2, "10": make(8, 6, seed=1), "1": make(16, 3, seed=2)}
  done = apply(magnitude(sparsity, scope="global"), tree_of(**weights))
  order = ["1", "2", "10"]
  score = np.concatenate([np.abs(weights[name]).ravel() for name in order])
  want = ~smallest(score, round(score.size * sparsity))
  found = np.concatenate([kept(done["layers"][name]["kernel"]).ravel() for name in order])
  np.testing.assert_array_equal(found, want)


def test_global_differs_from_per_weight():
  params = tree_of(small=normal(8, 8) * 0.01, large=1 + np.abs(normal(8, 8)))
  done = apply(magnitude(0.5, scope="global"), params)["layers"]
  assert kept(done["small"]["kernel"]).sum() == 0 and kept(done["large"]["kernel"]).all()


def test_global_over_the_selected_only():
  params = tree_of(a=normal(8, 8) * 0.01, b=normal(8, 8), c=normal(8, 8, seed=1))
  done = apply(at("layers/b", magnitude(0.5, scope="global")), params)["layers"]
  assert isinstance(done["a"]["kernel"], jax.Array) and isinstance(done["c"]["kernel"], jax.Array)
  assert kept(done["b"]["kernel"]).sum() == 32


def test_threshold_is_the_articles_loop():
  w, alpha = normal(24, 10), 0.5
  want = w.copy()
  for i in range(24):
    for j in range(10):
      if abs(want[i, j]) < alpha:
        want[i, j] = 0
  leaf = apply(magnitude(threshold=alpha), tree_of(up=w))["layers"]["up"]["kernel"]
  np.testing.assert_array_equal(materialize(leaf), want)


def test_threshold_keeps_what_equals_it():
  leaf = apply(magnitude(threshold=1.0), tree_of(up=tied(8, 8)))["layers"]["up"]["kernel"]
  np.testing.assert_array_equal(kept(leaf), np.abs(tied(8, 8)) >= 1)
  everything = apply(magnitude(threshold=0.0), tree_of(up=tied(8, 8)))["layers"]["up"]["kernel"]
  assert kept(everything).all()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:4"])
@pytest.mark.parametrize("make", [normal, tied])
@pytest.mark.parametrize("name", ["kernel", "table"])
def test_n_of_m(name, make, pattern):
  """Of each m consecutive inputs the n largest stay, the earlier of equals."""
  n, m = map(int, pattern.split(":"))
  w = make(24, 10) if name == "kernel" else make(10, 24)
  done = apply(at("head", magnitude(pattern=pattern)), {"head": {name: jnp.asarray(w)}})["head"][name]
  rows = np.abs(w.T if name == "kernel" else w).reshape(-1, m)
  want = np.zeros(rows.shape, bool)
  np.put_along_axis(want, np.argsort(-rows, axis=1, kind="stable")[:, :n], True, axis=1)
  want = want.reshape(10, 24)
  np.testing.assert_array_equal(kept(done), want.T if name == "kernel" else want)


def test_removed_entries_are_the_first_to_go_again():
  """Pruning what is pruned keeps the first mask's removals, whatever lies under it."""
  params = tree_of(up=normal(24, 10))
  once = apply(magnitude(0.3), params)
  twice = apply(magnitude(0.6), once)["layers"]["up"]["kernel"]
  direct = apply(magnitude(0.6), params)["layers"]["up"]["kernel"]
  np.testing.assert_array_equal(kept(twice), kept(direct))
  assert not isinstance(twice.values, MaskedArray)


def test_nothing_removed_is_the_identity_and_all_removed_is_zero():
  w = normal(24, 10)
  none = apply(magnitude(0.0), tree_of(up=w))["layers"]["up"]["kernel"]
  everything = apply(magnitude(1.0), tree_of(up=w))["layers"]["up"]["kernel"]
  np.testing.assert_array_equal(materialize(none), w)
  np.testing.assert_array_equal(materialize(everything), np.zeros_like(w))


@pytest.mark.parametrize("scope", ["weight", "row"])
def test_schedule_under_jit(scope):
  """The mask follows a traced step, and brings back what it removed when the sparsity falls."""
  w = normal(24, 10)
  start = apply(magnitude(0.0), tree_of(up=w))
  transform = magnitude(lambda step: jnp.where(step < 5, step * 0.1, 0.2), scope=scope)
  state = transform.init(start)
  traces = []

  @jax.jit
  def update(params, step):
    traces.append(step)  # jit's own cache may drop an entry when a process has compiled very much
    return transform.apply(params, state, Evidence(step=step))[0]

  params = start
  for step, sparsity in ((0, 0.0), (2, 0.2), (4, 0.4), (9, 0.2)):
    params = update(params, step)
    leaf = params["layers"]["up"]["kernel"]
    fixed = apply(magnitude(sparsity, scope=scope), tree_of(up=w))["layers"]["up"]["kernel"]
    np.testing.assert_array_equal(kept(leaf), kept(fixed))
  assert len(traces) == 1


def test_cubic_schedule():
  """Zhu & Gupta, equation 1, in NumPy."""
  schedule = cubic(0.8, start=10, end=110, initial=0.1)
  for step in (0, 10, 35, 60, 110, 500):
    t = min(max((step - 10) / 100, 0), 1)
    assert float(schedule(jnp.asarray(step))) == pytest.approx(0.8 + (0.1 - 0.8) * (1 - t) ** 3, abs=1e-6)
  with pytest.raises(ValueError, match="the end comes after the start"):
    cubic(0.5, start=3, end=3)


def test_many_ties_across_the_cut():
  """A constant weight: exactly as many as asked, from the front."""
  w = np.ones((20, 10), np.float32)
  leaf = apply(magnitude(0.37), tree_of(up=w))["layers"]["up"]["kernel"]
  np.testing.assert_array_equal(kept(leaf).ravel(), np.arange(200) >= 74)


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1e30])
def test_ranks_at_any_magnitude(scale):
  """Float32 is ranked by its bits, denormals too."""
  w = (np.arange(1, 65).reshape(8, 8) * np.float32(scale)).astype(np.float32)
  found = jax.jit(lambda score: masks.smallest(score, 20))(w)
  np.testing.assert_array_equal(found, smallest(w, 20))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_keeps_its_dtype(dtype):
  w = jnp.asarray(normal(24, 10)).astype(dtype)
  leaf = apply(magnitude(0.5), tree_of(up=w))["layers"]["up"]["kernel"]
  assert leaf.dtype == dtype and materialize(leaf).dtype == dtype and kept(leaf).sum() == 120


@pytest.mark.parametrize("arguments, message", [
  ({}, "exactly one of sparsity, threshold and pattern; found none"),
  ({"sparsity": 0.5, "threshold": 1.0}, r"found \['sparsity', 'threshold'\]"),
  ({"sparsity": 1.5}, "a fraction from 0 to 1"), ({"sparsity": -0.1}, "a fraction from 0 to 1"),
  ({"sparsity": float("nan")}, "a fraction from 0 to 1"),
  ({"threshold": -1.0}, "not negative"), ({"threshold": float("nan")}, "not negative"),
  ({"pattern": "4:2"}, "write n:m with 0 < n < m"), ({"pattern": "two:4"}, "write n:m"),
  ({"pattern": "0:4"}, "write n:m"), ({"pattern": ""}, "write n:m"),
  ({"sparsity": 0.5, "scope": "layer"}, "scopes are weight, row, global"),
  ({"sparsity": lambda step: 0.5, "scope": "global"}, "schedules are per weight or per row"),
  ({"pattern": "2:4", "scope": "global"}, "scope"), ({"threshold": 0.1, "scope": "row"}, "scope"),
], ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_arguments_are_checked_at_once(arguments, message):
  with pytest.raises(ValueError, match=message):
    magnitude(**arguments)


def test_refusals_name_the_weight():
  with pytest.raises(WeightError, match=r"2:4'\) at layers/up/kernel: 22 inputs are not a multiple of 4"):
    apply(magnitude(pattern="2:4"), tree_of(up=normal(22, 10)))
  for scope in ("weight", "row", "global"):
    bad = normal(24, 10)
    bad[3, 3] = np.nan
    with pytest.raises(WeightError, match="magnitude at layers/up/kernel: the weight holds NaN or infinity"):
      apply(magnitude(0.5, scope=scope), tree_of(up=bad))
  codes = apply(round_to_nearest(group_size=24), tree_of(up=normal(24, 10)))
  factors = tree.put(codes, "layers/up/kernel", low_rank(jnp.ones((24, 2)), jnp.ones((2, 10)), -2))
  with pytest.raises(WeightError, match="at layers/up/kernel: the weight is already stored as low rank 2"):
    apply(magnitude(0.5), factors)
  with pytest.raises(WeightError, match="make the weight a MaskedArray first, with magnitude"):
    apply(magnitude(lambda step: 0.5), tree_of(up=normal(24, 10)), step=0)


def test_tables_only_when_named():
  params = {"embed": {"table": jnp.asarray(normal(16, 8))}, **tree_of(up=normal(8, 8))}
  done = apply(magnitude(0.5), params)
  assert isinstance(done["embed"]["table"], jax.Array)
  named = apply(at("embed", magnitude(0.5)), params)
  assert isinstance(named["embed"]["table"], MaskedArray)
  assert tree.get(named, "layers/up/kernel") is tree.get(params, "layers/up/kernel")
