"""Meshes of three axes: what lies where, what is sent, and that every job gives what one device gives."""

from __future__ import annotations

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import lmcompress as lmc
from lmcompress import fit, tree
from lmcompress.distributed import make_mesh, placements, sequence_parallel, shard, spec_of
from lmcompress.distributed.sharding import mesh_of as mesh_on
from lmcompress.distributed.sharding import mesh_sizes, over_data, require_division
from lmcompress.evaluate.perplexity import perplexity
from lmcompress.generation import Sampler
from lmcompress.generation.generate import decode
from lmcompress.models import Llama, LlamaConfig, LlamaSizes
from lmcompress.training import Distill, Match, Task, Training, fit_tasks
from lmcompress.training.step import start, train_step
from lmcompress.training.tasks import tasks_step
from lmcompress.types import ConfigError

SIZES = LlamaSizes(vocab=64, embed=32, mlp=64, layers=2, heads=8, kv_heads=8, tied=False)
MODEL = Llama(LlamaConfig(head_dim=8), SIZES)
PARAMS = MODEL.init(jax.random.key(0))
ROWS = np.random.default_rng(0).integers(0, 64, (16, 16)).astype(np.int32)
LINEARS = 7
"""Of a layer."""

SHAPES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 4, 1), (4, 2, 1), (4, 1, 2), (2, 1, 4), (1, 4, 2), (1, 2, 4), (2, 2, 2),
          (1, 2, 1), (3, 1, 2)]  # fmt: skip
"""Data, fsdp and tensor; not all use every device."""


def mesh_of(shape):
  return make_mesh(data=shape[0], fsdp=shape[1], tensor=shape[2])


def messages(lowered):
  """The collectives of a compiled program: how many of each."""
  kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
  return collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", lowered.compile().as_text()))


# ---------------------------------------------------------------------------------------- what lies where


@pytest.mark.parametrize(("path", "want"), [
  ("layers/0/mlp/up/kernel", P("fsdp", "tensor")),
  ("layers/0/mlp/down/kernel", P("tensor", "fsdp")),
  ("layers/1/attn/q/kernel", P("fsdp", "tensor")),
  ("layers/1/attn_norm/scale", P(None)),
  ("embed/table", P("tensor", "fsdp")),
])
def test_what_splits_an_array(path, want):
  assert spec_of(path, MODEL.axes) == want


def test_an_axis_of_the_mesh_splits_one_axis_of_an_array():
  assert spec_of("w/kernel", {"w/kernel": ("embed", "embed")}) == P("fsdp", None)


def test_rules_say_otherwise():
  assert spec_of("layers/0/mlp/up/kernel", MODEL.axes, {"mlp": "tensor", "embed": None}) == P(None, "tensor")


@pytest.mark.parametrize("shape", SHAPES)
def test_placements_are_what_a_device_holds(shape):
  """Bytes of the first device, path by path, and in all; said without placing anything."""
  mesh = mesh_of(shape)
  small, _ = lmc.compress(MODEL, PARAMS, lmc.at("layers/*/mlp", lmc.round_to_nearest(bits=4, group_size=8)))
  rows = placements(MODEL, jax.eval_shape(lambda: small), mesh.shape)
  placed = tree.flatten(shard(MODEL, small, mesh))
  device = mesh.devices.flat[0]
  held: collections.Counter = collections.Counter()
  for path, leaf in placed.items():
    for x in jax.tree.leaves(leaf):
      held[re.sub(r"/\d+/", "/*/", path)] += sum(s.data.nbytes for s in x.addressable_shards if s.device == device)
  assert {row.path: row.nbytes for row in rows} == held
  assert sum(row.whole for row in rows) == sum(x.nbytes for x in jax.tree.leaves(small))


@pytest.mark.parametrize(("sizes", "message"), [
  ({"tensor": 3}, r"mesh tensor=3 does not divide the axis 'vocab' of embed/table, which has 64 entries; tensor may be "
                  r"2, 4, 8, 16, 32, 64, or keep it whole by mesh.rules.vocab=null"),
  ({"fsdp": 5}, "mesh fsdp=5 does not divide the axis 'embed' of embed/table, which has 32 entries; fsdp may be 2, 4"),
])  # fmt: skip
def test_a_mesh_that_does_not_divide_is_refused(sizes, message):
  with pytest.raises(ConfigError, match=message):
    require_division(MODEL, PARAMS, sizes)


def test_a_rule_of_no_axis_is_refused():
  with pytest.raises(ConfigError, match=r"mesh\.rules\.lenght: no such axis; there are choice, .*length"):
    require_division(MODEL, PARAMS, {"tensor": 2}, {"lenght": "tensor"})


def test_what_rules_keep_whole_need_not_divide():
  require_division(MODEL, PARAMS, {"tensor": 3}, {})


@pytest.mark.parametrize(("sizes", "message"), [
  ({"data": 2, "fsdp": 8}, "data=2, fsdp=8 asks for 16 devices, 8 are there"),
  ({"data": 0}, "sizes are positive"),
  ({"data": -1, "fsdp": -1}, "one at most is -1"),
  ({"data": -1, "tensor": 16}, "asks for 16 devices, 8 are there"),
])
def test_sizes_that_do_not_fit(sizes, message):
  with pytest.raises(ConfigError, match=message):
    mesh_sizes(sizes, 8)


def test_what_is_left_of_the_devices():
  assert mesh_sizes({"data": -1, "fsdp": 2, "tensor": 2}, 8) == {"data": 2, "fsdp": 2, "tensor": 2}


# ---------------------------------------------------------------------------------------- what is sent


def forward(shape):
  mesh = mesh_of(shape)
  rows = over_data(mesh, jnp.asarray(ROWS), 16)
  with jax.set_mesh(mesh):
    return jax.jit(MODEL.apply).lower(shard(MODEL, PARAMS, mesh), rows)


def step(shape, remat):
  mesh = mesh_of(shape)
  training = Training(steps=1, batch=16, remat=remat)
  with jax.set_mesh(mesh):
    state = start(shard(MODEL, PARAMS, mesh), training, lambda path: True)
    rows = over_data(mesh, {"tokens": jnp.asarray(ROWS)[None]}, 16, axis=1)
    return train_step.lower(
      MODEL, state._replace(kept=None), state.kept, rows, training, None, None, None, jax.random.key(0)
    )


@pytest.mark.parametrize(("shape", "want"), [
  ((8, 1, 1), {}),
  ((1, 1, 8), {"all-reduce": 2 * SIZES.layers + 1}),  # two a block, and one for the embedding
  ((1, 8, 1), {"all-gather": LINEARS * SIZES.layers + 2}),  # one a weight
  ((2, 4, 1), {"all-gather": LINEARS * SIZES.layers + 2}),
  ((2, 2, 2), {"all-gather": LINEARS * SIZES.layers + 2, "all-reduce": 2 * SIZES.layers + 1}),
])
def test_a_forward_pass_sends_what_theory_asks(shape, want):
  assert messages(forward(shape)) == want


@pytest.mark.parametrize("remat", [False, True])
def test_a_step_gathers_each_weight_once_a_pass(remat):
  """Once in a pass, the head once more for its logits are made again, layers once more where they are."""
  passes = 2 if remat else 1
  assert messages(step((1, 8, 1), remat))["all-gather"] == passes * LINEARS * SIZES.layers + 1 + 2


def test_data_parallel_steps_gather_nothing():
  found = messages(step((8, 1, 1), remat=True))
  assert set(found) == {"all-reduce"}


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 1, 4), (2, 2, 2)])
def test_tokens_in_parts_between_products(shape):
  """Each sum of a block has a gather beside it, in both directions; no weight has another; less is held."""
  with sequence_parallel(True):
    ahead, lowered = messages(forward(shape)), step(shape, remat=False)
  whole, plain = messages(forward(shape)), step(shape, remat=False)
  streams = 2 * SIZES.layers  # the first block's input is whole already, the head needs one
  assert ahead - whole == {"all-gather": streams} and not whole - ahead
  both = messages(lowered)
  assert (both - messages(plain))["all-gather"] == 2 * streams + 1  # and the gradient of the embedding's rows
  assert set(both) == {"all-gather", "all-reduce"}
  held = [made.compile().memory_analysis().temp_size_in_bytes for made in (lowered, plain)]
  assert held[0] < held[1]


def test_tokens_in_parts_learn_the_same():
  """Three steps, at 1e-5 relative; a number of tokens that the axis does not divide is left whole."""
  mesh = mesh_of((2, 1, 4))
  training = Training(3, batch=8, learning_rate=1e-2)
  for rows in (ROWS, ROWS[:, :15]):
    want = [row["loss"] for row in fit(MODEL, PARAMS, rows, training)[1]]
    with sequence_parallel(True):
      found = [row["loss"] for row in fit(MODEL, shard(MODEL, PARAMS, mesh), rows, training)[1]]
    np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_a_step_compiles_once(shape):
  """What a step gives lies as what it took."""
  before = train_step._cache_size()
  fit(MODEL, shard(MODEL, PARAMS, mesh_of(shape)), ROWS, Training(3, batch=8, learning_rate=2e-2))
  assert train_step._cache_size() == before + 1


@pytest.mark.parametrize("trainable", [lambda path: True, lambda path: False], ids=["all", "the head"])
def test_a_step_of_tasks_compiles_once(trainable):
  """A head that is new lies on the mesh as the tree does."""
  before, labels = tasks_step._cache_size(), np.arange(16) % 2
  task = Task(ROWS, np.ones_like(ROWS), labels, ("even", "odd"))
  params, training = shard(MODEL, PARAMS, mesh_of((2, 1, 4))), Training(3, batch=8, learning_rate=1e-2)
  done, _ = fit_tasks(MODEL, params, {"parity": task}, training, trainable=trainable)
  assert tasks_step._cache_size() == before + 1
  assert mesh_on(done["tasks"]) == mesh_of((2, 1, 4))


def test_a_step_with_projections_compiles_once():
  wide = Llama(MODEL.config, dataclasses.replace(SIZES, embed=48))
  training = Training(3, batch=8, learning_rate=1e-2, loss=Distill(), match=Match(hidden=1.0))
  before = train_step._cache_size()
  params = shard(MODEL, PARAMS, mesh_of((2, 1, 4)))
  fit(MODEL, params, ROWS, training, teacher=(wide, shard(wide, wide.init(jax.random.key(1)), mesh_of((2, 1, 4)))))
  assert train_step._cache_size() == before + 1


def test_compressed_weights_are_gathered_as_they_are_stored():
  """Codes travel packed, never as floats: no gathered float has as many entries as a weight."""
  mesh = mesh_of((1, 4, 1))
  by_groups = lmc.round_to_nearest(bits=4, group_size=8)
  small, _ = lmc.compress(MODEL, PARAMS, [lmc.at(name, by_groups) for name in ("layers/*", "embed", "head")])
  with jax.set_mesh(mesh):
    rows = over_data(mesh, jnp.asarray(ROWS), 16)
    text = jax.jit(MODEL.apply).lower(shard(MODEL, small, mesh), rows).compile().as_text()
  gathered = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", text)
  sizes = {kind: {int(np.prod([int(n) for n in dims.split(",")])) for k, dims in gathered if k == kind}
           for kind, _ in gathered}  # fmt: skip
  assert max(sizes["u8"]) == 32 * 64 // 2  # two codes a byte
  assert max(sizes["f32"]) <= 32 * 64 // 8  # scales


# ---------------------------------------------------------------------------------------- every job


def jobs(params):
  """Ten losses, weights rounded to nearest, errors by GPTQ, a perplexity and a greedy continuation."""
  training = Training(steps=10, batch=12, learning_rate=0.3, optimizer="sgd", chunk=16)
  trained, history = fit(MODEL, params, ROWS, training)
  rounded, _ = lmc.compress(MODEL, params, lmc.at("layers/*", lmc.round_to_nearest(bits=4, group_size=16)))
  small, report = lmc.compress(MODEL, trained, lmc.at("layers/*", lmc.gptq(bits=4, group_size=16)), ROWS[:12])
  errors = [row["output_error"] for row in report.rows]
  said = perplexity(MODEL, small, ROWS[:12], batch=12)
  tokens = list(decode(MODEL, trained, ROWS[:2, :4].tolist(), 8, Sampler()))
  return [row["loss"] for row in history], rounded, errors, said, tokens, small


@pytest.fixture(scope="module")
def alone():
  return jobs(PARAMS)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2)])
def test_every_job_gives_what_one_device_gives(shape, alone, tmp_path):
  """Losses to 1e-5, what is rounded without training to the bit, GPTQ's errors of outputs to 5 %, the same text.

  GPTQ's codes may differ: a sum in another order lets a weight on an edge fall to the other code, and what is rounded
  after it follows. What was compressed on the mesh and saved is read back, bit for bit, without a mesh and on others.
  """
  losses, rounded, errors, said, tokens, small = jobs(shard(MODEL, PARAMS, mesh_of(shape)))
  np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(alone[1]), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  np.testing.assert_allclose(errors, alone[2], rtol=0.05)
  np.testing.assert_allclose(said, alone[3], rtol=0.01)
  assert tokens == alone[4]
  lmc.save(tmp_path / "m", MODEL, small)
  want = [np.asarray(x) for x in jax.tree.leaves(small)]
  for other in (None, (8, 1, 1), (1, 8, 1), (1, 2, 4), (3, 1, 2)):
    back = lmc.load(tmp_path / "m", None if other is None else mesh_of(other))[1]
    for a, b in zip(jax.tree.leaves(back), want, strict=True):
      np.testing.assert_array_equal(np.asarray(a), b)



def test_a_single_block_stays_whole():
  """Rows of one block of 32 inputs and two groups: neither is cut, for the kernel would read beyond its part."""
  model = Llama(LlamaConfig(head_dim=8), LlamaSizes(vocab=48, embed=32, mlp=32, layers=1, heads=4, kv_heads=4))
  small, _ = lmc.compress(model, model.init(jax.random.key(0)), lmc.at("layers/*", lmc.round_to_nearest(4, 16)))
  ready = lmc.prepare(small)
  placed = shard(model, ready, make_mesh(tensor=2))
  tokens = np.random.default_rng(0).integers(0, 48, (2, 8)).astype(np.int32)
  np.testing.assert_allclose(model.apply(placed, tokens), model.apply(ready, tokens), atol=2e-5)


@pytest.mark.parametrize("link", [lmc.tie_layers(groups=[[0, 1]], rank=2), lmc.at("layers/*", lmc.share(values=8))])
def test_shared_values_lie_where_their_own_path_says(link):
  """A layer that two places read, and values of the whole model, over weights that are split both ways."""
  small, _ = lmc.compress(MODEL, PARAMS, link)
  placed = shard(MODEL, small, make_mesh(fsdp=2, tensor=2))
  np.testing.assert_allclose(MODEL.apply(placed, ROWS), MODEL.apply(small, ROWS), atol=2e-5)
