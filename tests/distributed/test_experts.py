"""Mixtures of experts: what each row gets, and the same over meshes that split experts."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lmcompress as lmc
from lmcompress import ops, tree
from lmcompress.calibration import compress
from lmcompress.distributed import make_mesh, placements, shard
from lmcompress.distributed.sharding import on_mesh_of, require_division
from lmcompress.io import checkpoint
from lmcompress.models import Llama, LlamaConfig, LlamaSizes
from lmcompress.ops.experts import chosen, mixture
from lmcompress.training import Training, fit
from lmcompress.transforms.round_to_nearest import quantize_matrix
from lmcompress.types import ConfigError, WeightError

MODEL = Llama(
  LlamaConfig(head_dim=8), LlamaSizes(vocab=48, embed=32, mlp=32, layers=2, heads=4, kv_heads=4, experts=8, shared=16)
)
TOKENS = np.random.default_rng(0).integers(0, 48, (8, 16)).astype(np.int32)
EXPERTS = "layers/*/mlp/experts/**"


@pytest.fixture(scope="module")
def params():
  return MODEL.init(jax.random.key(0))


def times(leaves, x):
  return x @ leaves["w"]


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(rows=st.integers(1, 40), experts=st.integers(1, 6), count=st.integers(1, 3), skew=st.booleans())
def test_every_row_gets_the_sum_over_its_experts(rows, experts, count, skew):
  """As NumPy adds them up in float64: any number of rows, all of them to one expert or not; apart and stacked."""
  count, rng = min(count, experts), np.random.default_rng(rows)
  w, x = rng.normal(size=(experts, 5, 3)).astype(np.float32), rng.normal(size=(rows, 5)).astype(np.float32)
  logits = rng.normal(size=(rows, experts)) + (skew * 50.0) * (np.arange(experts) == experts - 1)
  ids, weights = chosen(jnp.asarray(logits, jnp.float32), count, True)
  np.testing.assert_allclose(np.asarray(weights).sum(-1), 1, rtol=1e-6)
  want = sum(
    np.asarray(weights, np.float64)[:, k, None] * np.einsum("ni,nio->no", x, w[np.asarray(ids)[:, k]].astype(float))
    for k in range(count)
  )
  for leaves in ({"w": jnp.asarray(w)}, {str(e): {"w": jnp.asarray(w[e])} for e in range(experts)}):
    got = jax.jit(mixture, static_argnums=(0, 4))(times, leaves, x, jnp.asarray(logits, jnp.float32), count)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_step_reads_the_experts_that_it_goes_to():
  """A token of two experts of 64: no array as large as all their weights is made of packed codes."""
  alone = {str(e): {"kernel": quantize_matrix(jnp.ones((64, 64)), bits=4, group_size=32)} for e in range(64)}
  experts = tree.stack_experts({"experts": alone})["experts"]
  run = jax.jit(lambda *given: mixture(lambda leaves, x: ops.linear(x, leaves["kernel"]), *given, 2))
  given = (experts, jnp.ones((1, 64)), jnp.arange(64.0)[None])
  assert run.lower(*given).compile().memory_analysis().temp_size_in_bytes < 64 * 64 * 4 * 8


def test_stacked_is_apart(params, tmp_path):
  """Outputs, what is saved, what compression makes, and the way back."""
  stacked = tree.stack_experts(params)
  assert tree.get(stacked, "layers/0/mlp/experts/up/kernel").shape == (8, 32, 32)
  for path, leaf in tree.flatten(tree.unstack_experts(stacked)).items():
    np.testing.assert_array_equal(leaf, tree.get(params, path))
  np.testing.assert_allclose(MODEL.apply(stacked, TOKENS), MODEL.apply(params, TOKENS), atol=1e-5)
  recipe = lmc.at("layers/*", lmc.gptq(4, 16))
  one, two = (compress(MODEL, p, recipe, TOKENS)[0] for p in (params, stacked))
  assert tree.get(two, "layers/0/mlp/experts/up/kernel").shape == (8, 32, 32)
  apart = tree.unstack_experts(two)
  for path, leaf in tree.flatten(one).items():
    jax.tree.map(np.testing.assert_array_equal, leaf, tree.get(apart, path))
  np.testing.assert_allclose(MODEL.apply(two, TOKENS), MODEL.apply(one, TOKENS), atol=1e-5)
  checkpoint.save(tmp_path / "m", MODEL, two)
  _, back, _ = checkpoint.load_checkpoint(tmp_path / "m")
  np.testing.assert_array_equal(MODEL.apply(back, TOKENS), MODEL.apply(one, TOKENS))


def test_experts_that_differ_stay_apart(params):
  mixed = compress(MODEL, params, lmc.at("layers/1/mlp/experts/3", lmc.round_to_nearest(4, 16)))[0]
  np.testing.assert_allclose(MODEL.apply(mixed, TOKENS), MODEL.apply(params, TOKENS), atol=1.0)
  with pytest.raises(WeightError, match="layers/1/mlp/experts/3 differs from layers/1/mlp/experts/0"):
    tree.stack_experts(mixed)


def test_an_expert_that_no_token_goes_to_is_solved_too():
  """By what it would have got: not set to zero as inputs that never occur are, and as near as others are."""
  params = MODEL.init(jax.random.key(0))
  router = params["layers"]["0"]["mlp"]["router"]["kernel"]
  quiet = jnp.asarray(router).at[:, 5].set(0) - 100 * (jnp.arange(8) == 5)
  table = jnp.abs(params["embed"]["table"])  # so that what the router sees adds up to more than nothing
  params = tree.put(tree.put(params, "layers/0/mlp/router/kernel", quiet), "embed/table", table)
  done, report = compress(MODEL, params, lmc.at("layers/0/mlp/experts", lmc.gptq(4, 16)), TOKENS)
  errors = {row["path"]: row["output_error"] for row in report.rows}
  mine = [e for path, e in errors.items() if "/5/" in path]
  assert len(mine) == 3 and all(0 < e < 0.3 for e in mine), errors
  assert np.abs(np.asarray(tree.get(done, "layers/0/mlp/experts/5/up/kernel").materialize())).max() > 0.1


def test_what_a_mixture_is_not(params, tmp_path):
  """A head of a task called experts stays as it is; values that the model shares are refused in a stack."""
  head = {"kernel": jnp.ones((32, 3)), "bias": jnp.zeros(3)}
  told = {**params, "tasks": {"experts": head}}
  assert not tree.has_stacked_experts(told) and "0" in tree.unstack_experts(told)["layers"]["0"]["mlp"]["experts"]
  assert tree.unstack_experts(tree.stack_experts(told))["tasks"]["experts"].keys() == head.keys()
  shared = compress(MODEL, params, lmc.at("layers/*/mlp/experts", lmc.share(16)))[0]
  for act in (tree.stack_experts, lambda p: shard(MODEL, p, make_mesh(expert=2))):
    with pytest.raises(WeightError, match="refers to values that the whole model shares"):
      act(shared)


SHAPES = [{"expert": 8}, {"expert": 4, "data": 2}, {"expert": 2, "fsdp": 2, "tensor": 2}, {"data": 8}]


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_over_a_mesh(params, sizes):
  """Outputs, and two steps of training: as on one device."""
  placed = shard(MODEL, params, make_mesh(**sizes))
  leaf = tree.get(placed, "layers/0/mlp/experts/up/kernel")
  if "expert" in sizes:
    assert leaf.sharding.shard_shape(leaf.shape)[0] == 8 // sizes["expert"]
  np.testing.assert_allclose(MODEL.apply(placed, TOKENS), MODEL.apply(params, TOKENS), atol=2e-5)
  training = Training(steps=2, batch=8, learning_rate=1e-3)
  (_, history), (_, alone) = (fit(MODEL, p, TOKENS, training) for p in (placed, params))
  for got, want in zip(history, alone, strict=True):
    np.testing.assert_allclose([got["loss"], got["grad_norm"]], [want["loss"], want["grad_norm"]], rtol=2e-5)


@pytest.mark.parametrize("sizes", [{"expert": 4, "data": 2}, {"expert": 4, "tensor": 2}], ids=str)
def test_codes_over_a_mesh(params, sizes):
  """Packed experts: the same outputs, one sum over experts in each mixture, and no expert's codes are gathered."""
  small = compress(MODEL, params, lmc.at(EXPERTS, lmc.round_to_nearest(4, 16)))[0]
  placed = shard(MODEL, small, make_mesh(**sizes))
  np.testing.assert_allclose(MODEL.apply(placed, TOKENS), MODEL.apply(small, TOKENS), atol=2e-5)
  with on_mesh_of(placed):
    text = jax.jit(lambda p: MODEL.apply(p, TOKENS)).lower(placed).compile().as_text()
  assert not re.search(r"u8\[[\d,]*\]\S* all-gather", text)
  assert not re.search(r"u8\[[\d,]*\]\S* all-to-all", text)
  if "tensor" not in sizes:
    assert " all-gather(" not in text and len(re.findall(r" all-reduce(?:-start)?\(", text)) == 2


def test_what_a_mesh_cannot_split_is_refused(params, tiny):
  with pytest.raises(ConfigError, match="expert=3 does not divide the axis 'expert' of layers/\\*/mlp/experts/down"):
    require_division(MODEL, params, {"expert": 3})
  with pytest.raises(ConfigError, match="expert=2 splits the experts of mixtures, and the model has none"):
    shard(*tiny, make_mesh(expert=2))
  rows = placements(MODEL, params, {"expert": 4})
  row = next(row for row in rows if row.path == "layers/*/mlp/experts/up/kernel")
  assert row.shape == (8, 32, 32) and row.split[0] == "expert" and row.nbytes * 4 == row.whole
