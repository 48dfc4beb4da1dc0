"""Mixed precision: the allocation is the best there is, and the budget holds on a model."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from lmcompress import tree
from lmcompress.calibration import compress
from lmcompress.calibration.gradients import gradients
from lmcompress.calibration.sequential import batches_of
from lmcompress.transforms import at, chain, gptq, mixed_precision, round_to_nearest
from lmcompress.transforms.mixed_precision import allocate, divergences
from lmcompress.transforms.round_to_nearest import quantize_matrix
from lmcompress.types import Evidence, WeightError


@pytest.mark.parametrize("seed", range(8))
def test_the_allocation_is_the_best_of_all(seed):
  rng = np.random.default_rng(seed)
  sizes = rng.integers(1, 30, (5, 3)) * 4
  losses = rng.random((5, 3))
  budget = int(rng.integers(sizes.min(1).sum(), sizes.max(1).sum() + 1))
  choice = allocate(losses.tolist(), sizes.tolist(), budget)
  pick = lambda table, choice: sum(row[i] for row, i in zip(table, choice, strict=True))  # noqa: E731
  assert pick(sizes, choice) <= budget
  every = [c for c in itertools.product(range(3), repeat=5) if pick(sizes, c) <= budget]
  assert pick(losses, choice) == pytest.approx(min(pick(losses, c) for c in every))


def test_a_budget_too_small_is_refused():
  with pytest.raises(ValueError, match="the smallest choices take 6"):
    allocate([[1.0, 0.5]] * 2, [[3, 5]] * 2, 5)


def test_sizes_beyond_the_table_keep_the_budget():
  sizes = [[1_000_003, 2_000_029, 4_000_037]] * 9
  choice = allocate([[3.0, 1.0, 0.1 * i] for i in range(9)], sizes, 21_000_001)
  assert sum(row[i] for row, i in zip(sizes, choice, strict=True)) <= 21_000_001


@pytest.fixture(scope="module")
def calibration():
  return np.random.default_rng(0).integers(0, 64, (8, 16)).astype(np.int32)


def test_the_budget_holds_and_is_used(tiny, calibration):
  """Linears of a stage share a width; what is stored stays below the budget and close to it."""
  model, params = tiny
  done, report = compress(model, params, mixed_precision(4.5, group_size=16), calibration)
  leaves = {p: leaf for p, leaf in tree.weights(done).items() if p.startswith("layers/")}
  used = sum(leaf.nbits for leaf in leaves.values()) / sum(leaf.size for leaf in leaves.values())
  assert 4.2 < used <= 4.5
  widths = {p: leaf.grid.bits for p, leaf in leaves.items()}
  assert len(set(widths.values())) > 1
  for layer in "01":
    assert len({widths[f"layers/{layer}/attn/{n}/kernel"] for n in "qkv"}) == 1
    assert len({widths[f"layers/{layer}/mlp/{n}/kernel"] for n in ("gate", "up")}) == 1
  assert {row["path"] for row in report.rows} == set(leaves)


def test_it_loses_no_more_than_one_width(tiny, calibration):
  """By the measure that it minimizes, at the size of uniform 4 bits."""
  model, params = tiny
  spy = {}

  def total(t):
    _, report = compress(model, params, at("layers/*", t), calibration)
    spy[t.name] = report
    return sum(row["output_error"] ** 2 for row in report.rows if row["output_error"] is not None)

  assert total(mixed_precision(4 + 20 / 16, group_size=16)) <= 1.02 * total(gptq(4, 16, symmetric=False))


@pytest.mark.parametrize("options, message", [
  ({"bits": 2.0}, "narrowest candidate takes 2.281 bits"), ({"candidates": (1, 4)}, "widths are 2 to 8"),
  ({"candidates": ()}, "widths are 2 to 8"), ({"tables": True}, "tables go with fisher or kl"),
  ({"sensitivity": "hessian"}, "output, fisher or kl"),
])
def test_arguments_out_of_range(options, message):
  with pytest.raises(ValueError, match=message):
    mixed_precision(**options)


def test_only_linears_of_blocks(tiny, calibration):
  with pytest.raises(WeightError, match="compress collects for the linears of blocks"):
    compress(tiny[0], tiny[1], at("embed", mixed_precision(4.0, group_size=16)), calibration)


def test_sensitivity_by_divergence(tiny, calibration):
  """Measured one group at a time: equal to the KL of the model with that group alone rounded, in NumPy."""
  model, params = tiny
  chosen = tree.default_selection(params) | {"head/table", "embed/table"}

  def rounded_to(path, w, bits):
    axis = tree.contraction_axis(path)
    return quantize_matrix(w, bits=bits, group_size=16, symmetric=False, clip="mse", axis=axis).materialize()

  found = divergences(model, params, chosen, calibration[:2], (3, 4, 8), rounded_to)
  assert len(found) == 2 * 4 + 2 and ("embed/table",) in found
  size, losses = found["layers/1/mlp/gate/kernel", "layers/1/mlp/up/kernel"]
  assert size == 2 * 32 * 64 and losses[0] > losses[1] > losses[2] > 0
  rounded = compress(
    model, params, chain(*(at(f"layers/1/mlp/{n}", round_to_nearest(3, 16, False, clip="mse")) for n in ("gate", "up")))
  )[0]
  log = lambda p: np.asarray(jax.nn.log_softmax(model.apply(p, calibration[:2])), np.float64)  # noqa: E731
  a, b = log(params), log(rounded)
  assert losses[0] == pytest.approx(np.mean(np.sum(np.exp(a) * (a - b), -1)), rel=1e-3)


def test_sensitivity_by_fisher(tiny, calibration):
  """The sum in NumPy of each row's squared gradient times the squared change of the weight, rounded by itself."""
  model, params = tiny
  transform = mixed_precision(4.5, (3, 8), 16, sensitivity="fisher", tables=True)
  fisher = gradients(model, params, batches_of(calibration), frozenset({"fisher"}))["fisher"]
  _, state = transform.apply(params, transform.init(params), Evidence(structure=model, fisher=fisher))
  assert len(state) == 2 * 4 + 2 and ("embed/table",) in state and ("head/table",) in state

  def loss(params, row):
    logits = jax.nn.log_softmax(model.apply(params, row[None])[0, :-1])
    return -np.float32(1 / (len(row) - 1)) * logits[np.arange(len(row) - 1), row[1:]].sum()

  paths = ("layers/1/attn/q/kernel", "layers/1/attn/k/kernel", "layers/1/attn/v/kernel")
  slopes = [jax.grad(loss)(params, row) for row in calibration]
  want = 0.0
  for path in paths:
    done = compress(model, params, at(path, round_to_nearest(3, 16, False, clip="mse")))[0]
    change = np.asarray(tree.get(done, path).materialize(), np.float64) - np.asarray(tree.get(params, path), np.float64)
    mean = np.mean([np.asarray(tree.get(s, path), np.float64) ** 2 for s in slopes], axis=0)
    want += 0.5 * np.sum(mean * change**2)
  size, losses = state[paths]
  assert size == sum(tree.get(params, path).size for path in paths)
  assert losses[0] == pytest.approx(want, rel=1e-4) and losses[0] > losses[1] > 0


@pytest.mark.parametrize("sensitivity", ["kl", "fisher"])
def test_tables_are_candidates(tiny, calibration, sensitivity):
  model, params = tiny
  recipe = mixed_precision(6.0, (3, 4, 8), 16, sensitivity=sensitivity, tokens=32, tables=True)
  done, report = compress(model, params, recipe, calibration)
  leaves = tree.weights(done)
  assert set(report.last()) == set(leaves) and {"embed/table", "head/table"} <= set(leaves)
  used = sum(leaf.nbits for leaf in leaves.values()) / sum(leaf.size for leaf in leaves.values())
  assert 5.0 < used <= 6.0 and len({leaf.grid.bits for leaf in leaves.values()}) > 1
  with pytest.raises(WeightError, match=r"needs (tokens|fisher): pass calibration"):
    compress(model, params, recipe)
