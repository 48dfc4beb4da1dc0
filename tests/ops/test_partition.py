"""The CPU kernels on a mesh: each shard works on its part, and no weight is ever gathered."""

from __future__ import annotations

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lmcompress as lmc
from lmcompress import ops, tree
from lmcompress.arrays import nm_mask, nm_sparse
from lmcompress.distributed import make_mesh, shard
from lmcompress.generation.cache import init_cache
from lmcompress.models import Llama, LlamaConfig, LlamaSizes
from lmcompress.ops import backend
from lmcompress.ops.kernels import cpu
from lmcompress.transforms.round_to_nearest import quantize_matrix
from lmcompress.types import Evidence

pytestmark = pytest.mark.skipif(backend.native() is None, reason="without a compiler no kernel is there to place")

P = PartitionSpec
FORMS = {
  "int4 g32": dict(bits=4, group_size=32),
  "int4 g16 zero": dict(bits=4, group_size=16, symmetric=False),
  "int4 g64 minimum": dict(bits=4, group_size=64, symmetric=False, zero="real"),
  "int8 row": dict(bits=8, group_size=-1),
  "int3 tensor": dict(bits=3, group_size="tensor"),
  "int4 double": dict(bits=4, group_size=32, scale_bits=8),
  "nf4": dict(grid="nf4", group_size=32),
  "fp8": dict(grid="fp8_e4m3", group_size=-1),
  "mxfp4": dict(grid="mxfp4", group_size=32),
  "nvfp4": dict(grid="nvfp4", group_size=16),
  "bfloat16": None,
  "2:4": None,
  "w4a8": dict(bits=4, group_size=32),
}
ONE_SUM = {"all-reduce": 1}


@functools.cache
def tiled(form, axis=-2, inputs=512, outputs=256):
  shape = (inputs, outputs) if axis == -2 else (outputs, inputs)
  dense = jnp.asarray(np.random.default_rng(0).normal(0, 0.5, shape), jnp.float32)
  if form == "bfloat16":
    leaf = dense.astype(jnp.bfloat16)
  elif form == "2:4":
    leaf = nm_sparse(dense, nm_mask(dense, 2, 4, axis), 2, 4, axis, None)
  else:
    leaf = quantize_matrix(dense, axis=axis, **FORMS[form])
  name = "kernel" if axis == -2 else "table"
  prepared = lmc.prepare({"w": {name: leaf}}, activations="int8" if form == "w4a8" else "float32")
  return prepared["w"][name]


def placed(w, spec, mesh):
  put = lambda s, x: jax.device_put(x, NamedSharding(mesh, s))  # noqa: E731
  return jax.tree.map(put, w.sharding_like(spec), w, is_leaf=lambda s: isinstance(s, P))


def collectives(program) -> dict[str, int]:
  """How often each kind of message occurs in the compiled program."""
  kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
  found = re.findall(rf"= .*? ({kinds})(?:-start)?\(", program)
  return {name: found.count(name) for name in set(found)}


def run(f, *args):
  compiled = jax.jit(f).lower(*args).compile()
  return compiled(*args), collectives(compiled.as_text())


def inputs(rows=8, width=512):
  return jnp.asarray(np.random.default_rng(1).normal(size=(rows, width)), jnp.float32)


@pytest.mark.parametrize("form", FORMS)
def test_split_by_outputs_needs_no_message(form):
  w, x, mesh = tiled(form, outputs=1024), inputs(), make_mesh(data=2, tensor=4)  # scales of scales serve 256 outputs
  y, messages = run(ops.linear, jax.device_put(x, NamedSharding(mesh, P("data"))), placed(w, P(None, "tensor"), mesh))
  assert messages == {} and y.sharding.spec == P("data", "tensor")
  chex.assert_trees_all_equal(np.asarray(y), np.asarray(ops.linear(x, w)))


@pytest.mark.parametrize("form", FORMS)
def test_split_by_inputs_needs_one_sum(form):
  w, x, mesh = tiled(form), inputs(), make_mesh(data=2, tensor=4)
  put = jax.device_put(x, NamedSharding(mesh, P("data", "tensor")))
  y, messages = run(ops.linear, put, placed(w, P("tensor", None), mesh))
  assert messages == ONE_SUM and y.sharding.spec == P("data")
  chex.assert_trees_all_close(np.asarray(y), np.asarray(ops.linear(x, w)), atol=1e-4)  # sums in another order


def test_a_group_that_a_shard_would_cut_moves_no_shard_wrongly():
  w, x, mesh = tiled("int4 g64 minimum", inputs=192), inputs(width=192), make_mesh(data=1, tensor=2)
  assert w.parts == (3, 16)
  y = jax.jit(ops.linear)(x, placed(w, P(None, "tensor"), mesh))
  chex.assert_trees_all_equal(np.asarray(y), np.asarray(ops.linear(x, w)))


@pytest.mark.parametrize("form", ["int4 g32", "int8 row", "bfloat16"])
def test_a_table_split_by_rows(form):
  w, x, mesh = tiled(form, axis=-1), inputs(), make_mesh(data=2, tensor=4)
  spread = placed(w, P("tensor", None), mesh)
  ids = jnp.asarray([[0, 255, 64, -1], [63, 300, 128, 192]])
  rows, messages = run(ops.embed, jax.device_put(ids, NamedSharding(mesh, P("data"))), spread)
  assert messages == ONE_SUM
  chex.assert_trees_all_equal(np.asarray(rows), np.asarray(ops.embed(ids, w)))
  logits, messages = run(ops.attend, jax.device_put(x, NamedSharding(mesh, P("data"))), spread)
  assert messages == {} and logits.sharding.spec == P("data", "tensor")
  chex.assert_trees_all_equal(np.asarray(logits), np.asarray(ops.attend(x, w)))


def test_several_weights_in_one_call():
  ws, x, mesh = [tiled("int4 g32"), tiled("int4 g64 minimum"), tiled("int8 row")], inputs(), make_mesh(tensor=4)
  y, messages = run(ops.linears, x, [placed(w, P(None, "tensor"), mesh) for w in ws])
  assert messages == {}
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, y), jax.tree.map(np.asarray, ops.linears(x, ws)))
  y, messages = run(ops.linears, x, [placed(w, P("tensor", None), mesh) for w in ws])
  assert messages["all-reduce"] in (1, 3) and messages.keys() == {"all-reduce"}  # XLA may join them
  chex.assert_trees_all_close(jax.tree.map(np.asarray, y), jax.tree.map(np.asarray, ops.linears(x, ws)), atol=1e-4)


@pytest.mark.parametrize("spec", [P(None, "tensor"), P("tensor", None)])
def test_under_vmap_scan_and_gradients(spec):
  w, mesh = tiled("int4 g32"), make_mesh(data=2, tensor=4)
  xs, spread = inputs(24).reshape(3, 8, 512), placed(w, spec, mesh)
  want = np.asarray(ops.linear(xs, w))
  for way in (jax.vmap(lambda x: ops.linear(x, spread)),
              lambda xs: jax.lax.map(lambda x: ops.linear(x, spread), xs)):
    y, messages = run(way, xs)
    assert "all-gather" not in messages
    chex.assert_trees_all_close(np.asarray(y), want, atol=1e-4)
  loss = lambda x, w: (ops.linear(x, w) ** 2).sum()  # noqa: E731
  chex.assert_trees_all_close(
    np.asarray(jax.jit(jax.grad(loss))(xs, spread)), np.asarray(jax.grad(loss)(xs, w)), rtol=1e-4, atol=1e-2
  )


def test_under_shard_map():
  w, x, mesh = tiled("int4 g32"), inputs(), make_mesh(data=2, tensor=4)
  specs = w.sharding_like(P(None, "tensor"))
  y = jax.jit(jax.shard_map(
    ops.linear, mesh=mesh, in_specs=(P("data"), specs), out_specs=P("data", "tensor"), check_vma=False
  ))(x, placed(w, P(None, "tensor"), mesh))
  chex.assert_trees_all_equal(np.asarray(y), np.asarray(ops.linear(x, w)))


def test_what_stands_around_products():
  x, mesh = inputs(), make_mesh(data=2, tensor=4)
  rows, wide = (jax.device_put(x, NamedSharding(mesh, s)) for s in (P("data"), P("data", "tensor")))
  scale = jnp.linspace(0.5, 1.5, 512)
  for f, args, whole in (
    (lambda x, scale: ops.rms_norm(x, scale, 1e-5), (rows, scale), (x, scale)),
    (ops.gated_silu, (wide, wide), (x, x)),
    (ops.argmax, (rows,), (x,)),
  ):
    y, messages = run(f, *args)
    assert messages == {} and y.sharding.spec[0] == "data"
    chex.assert_trees_all_equal(np.asarray(y), np.asarray(f(*whole)))


@functools.cache
def small():
  """A Llama whose heads and widths a mesh of two divides, its linears in int4 and its tables in int8."""
  sizes = LlamaSizes(vocab=128, embed=64, mlp=128, layers=2, heads=4, kv_heads=2, tied=True)
  model = Llama(LlamaConfig(head_dim=32), sizes)
  params = model.init(jax.random.key(0))
  for t in (lmc.round_to_nearest(bits=4, group_size=32), lmc.at("embed", lmc.round_to_nearest(bits=8))):
    params, _ = t.apply(params, t.init(params), Evidence())
  return model, lmc.prepare(params)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_a_model_reads_and_writes_its_cache_in_parts(dtype):
  model, params = small()
  mesh = make_mesh(data=2, tensor=2)
  tokens = np.random.default_rng(0).integers(0, 128, (2, 8))

  def step(params, tokens, cache):
    return model.apply(params, tokens, cache=cache)

  whole = jax.jit(step)(params, tokens, init_cache(model, params, 2, 16, dtype))
  cache = init_cache(model, params, 2, 16, dtype)
  by_head = lambda x: NamedSharding(mesh, P("data", "tensor") if x.ndim == 4 else P())  # noqa: E731
  cache = jax.device_put(cache, jax.tree.map(by_head, cache))
  (logits, after), messages = run(step, shard(model, params, mesh), jnp.asarray(tokens), cache)
  # where an entry of the cache is rounded, sums in another order can tip it to the next step
  chex.assert_trees_all_close(np.asarray(logits), np.asarray(whole[0]), atol=1e-4 if dtype == "float32" else 5e-3)
  assert after.layers["layers/0"].k.sharding.spec[:2] == ("data", "tensor")
  assert messages == {"all-reduce": 5}  # the embedding, and two a layer
  kinds = {type(leaf).__name__ for path, leaf in tree.flatten(params).items() if tree.is_weight(path)}
  assert kinds == {"TiledArray"}


def test_one_device_calls_the_kernel_itself():
  w = tiled("int4 g32")
  text = jax.jit(ops.linear).lower(inputs(), w).as_text()
  assert "lmc_linear" in text and "CustomSPMDPartitioning" not in text
  assert cpu.products(inputs(), [w])[0].shape == (8, 256)
