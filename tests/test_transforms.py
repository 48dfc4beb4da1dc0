"""The conformance table of transforms: one row each, every promise of a transform checked for it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress import tree
from lmcompress.arrays import MaskedArray, QuantizedArray, added, gated, low_rank, masked
from lmcompress.distributed import make_mesh, shard
from lmcompress.io import checkpoint, safetensors
from lmcompress.io.leaves import describe, rebuild
from lmcompress.models import Llama, LlamaConfig
from lmcompress.ops import rounding
from lmcompress.ops.masks import Target
from lmcompress.transforms import (
  METHODS,
  alps,
  any_precision,
  at,
  awq,
  awq_scale,
  chain,
  dora,
  fake_quantize,
  fake_quantize_inputs,
  freeze,
  gptq,
  gradient,
  hqq,
  kmeans,
  l0,
  leafwise,
  learned_rounding,
  llm_int8,
  lora,
  low_rank_residual,
  magnitude,
  merge,
  mixed_precision,
  movement,
  named_chain,
  partition,
  product_quantize,
  prune_gradually,
  quantize_activations,
  quantize_inputs,
  quip_sharp,
  rigl,
  rotate,
  round_to_nearest,
  scheduled,
  sensitivity,
  shrink,
  smooth,
  smooth_quant,
  sparse_code,
  sparse_gpt,
  sparsify_activations,
  truncated_svd,
  wanda,
)
from lmcompress.transforms.magnitude import keep_largest, n_of_m
from lmcompress.transforms.round_to_nearest import quantize_matrix
from lmcompress.transforms.schedules import cubic, every
from lmcompress.transforms.wanda import keep_active
from lmcompress.types import BlockEvidence, Evidence, Transform

freezing = importlib.import_module("lmcompress.transforms.freeze")  # the package's `freeze` is the function


@dataclasses.dataclass(frozen=True)
class Row:
  """One transform.

  Attributes:
    make: the transform.
    matrix: its function of one matrix, jitted; None where a combinator or a step transform has none.
    plain: the same function, not jitted.
    before: applied first, for a transform that acts on what another made.
    step: the training step of a step transform.
    random: draws from the key.
    norms: changes norms too, which a structure names.
    sums: solves or sums over inputs, so that another device layout rounds otherwise.
    meshes: is checked on eight devices; a method made of another row's, which only measures first, or one that differs
      from another row by an argument, need not be.
  """

  name: str
  make: Callable[[], Transform]
  matrix: Callable[[jax.Array], Any] | None = None
  plain: Callable[[jax.Array], Any] | None = None
  before: Callable[[], Transform] | None = None
  step: int | None = None
  random: bool = False
  norms: bool = False
  sums: bool = False
  meshes: bool = True


def rounding_row(name, **options):
  fixed = {"mxfp4": {"group_size": 32}, "nvfp4": {"group_size": 16}}.get(options.get("grid"), {})
  on_matrix = {"group_size": 64, **options, **fixed}
  return Row(
    name, lambda: round_to_nearest(**options),
    functools.partial(quantize_matrix, **on_matrix), functools.partial(rounding.quantize, **on_matrix),
  )


def pruning_row(name, jitted, options, **arguments):
  return Row(
    name, lambda: magnitude(**arguments),
    functools.partial(jitted, **options), functools.partial(jitted.__wrapped__, **options),
  )


def gates():
  """Four on the inputs of each weight."""
  return leafwise(lambda w, *, axis: gated(w, 4, axis), name="gates")


@jax.jit
def _noisy(w, key):
  return w + jax.random.normal(key, w.shape, w.dtype)


def minimums():
  """Codes that cannot say 0, so that a mask stays."""
  return round_to_nearest(group_size=16, symmetric=False, zero="real")


def noise():
  """A method that draws at random: what it gives is decided by the key and the path."""

  def add(w, *, key):
    return _noisy(w, key)

  return leafwise(add, name="noise")


def mask_over_codes():
  """Codes that decode to 0 where the mask removes, and the mask beside them."""

  def wrap(w, *, axis):
    keep = keep_largest(w, w.size // 2)
    return masked(quantize_matrix(jnp.where(keep, w, 0), bits=4, group_size=16, axis=axis), keep, axis)

  return leafwise(wrap, name="mask_over_codes")


def low_rank_of_codes():
  """Codes of two bits and a product of low rank beside them."""

  def wrap(w, *, axis):
    product = low_rank(w[:, :3], jnp.ones((3, w.shape[-1]), w.dtype), axis)
    return added(quantize_matrix(w, bits=2, group_size=16, axis=axis), product, axis)

  return leafwise(wrap, name="low_rank_of_codes")


def halve():
  def half(w, *, axis, path):
    return w / 2

  return leafwise(half, name="halve")


ACTIVITY = jnp.linspace(0.5, 2.0, 64)
ramp = cubic(0.8, start=0, end=10)

ROWS = [
  rounding_row("int4 g16", bits=4, group_size=16),
  rounding_row("int8 row asym", bits=8, group_size=-1, symmetric=False),
  rounding_row("int3 g32 minimum mse", bits=3, group_size=32, symmetric=False, zero="real", clip="mse"),
  rounding_row("int4 tensor signed", bits=4, group_size="tensor", convention="signed"),
  rounding_row("nf4 g16 double", grid="nf4", group_size=16, scale_bits=8),
  rounding_row("fp8", grid="fp8_e4m3", group_size=-1),
  rounding_row("mxfp4", grid="mxfp4"),
  rounding_row("nvfp4", grid="nvfp4"),
  rounding_row("fixed step", bits=8, step=2.0**-4, group_size=-1),
  pruning_row("magnitude", keep_largest, {"removed": 700}, sparsity=0.5),
  pruning_row("magnitude row", keep_largest, {"removed": 10, "axis": -2}, sparsity=0.3, scope="row"),
  pruning_row("magnitude global", keep_largest, {"removed": 900}, sparsity=0.4, scope="global"),
  pruning_row("magnitude threshold", keep_largest, {"removed": 0}, threshold=0.1),
  pruning_row("magnitude 2:4", n_of_m, {"n": 2, "m": 4, "axis": -2}, pattern="2:4"),
  Row("magnitude schedule", lambda: magnitude(ramp), before=lambda: magnitude(0.0), step=4),
  Row("scheduled", lambda: scheduled(magnitude(ramp), every(2)), before=lambda: magnitude(0.0), step=4),
  Row("at schedule", lambda: at("layers/*/mlp", magnitude(ramp)), before=lambda: magnitude(0.0), step=4),
  Row("chain of steps", lambda: chain(magnitude(ramp), magnitude(ramp, scope="row")),
      before=lambda: magnitude(0.0), step=4),
  Row("freeze", freeze, before=lambda: magnitude(0.5)),
  Row("freeze codes", freeze, before=mask_over_codes),
  Row("chain", lambda: chain(magnitude(pattern="2:4"), round_to_nearest(group_size=16), freeze())),
  Row("named_chain", lambda: named_chain(("prune", magnitude(0.2)), ("round", minimums()))),
  Row("at", lambda: at("layers/*/mlp", round_to_nearest(group_size=16))),
  Row("at table", lambda: at("embed", round_to_nearest(bits=8, group_size=-1))),
  Row("partition", lambda: partition(
    {"layers/*/attn": "fine", "layers/*/mlp": "coarse"},
    {"fine": round_to_nearest(bits=8, group_size=-1), "coarse": chain(magnitude(0.5), freeze())},
  )),
  Row("gptq", lambda: gptq(4, 16), sums=True),
  Row("gptq row nf4", lambda: gptq(group_size=-1, grid="nf4", order="activation", clip="none"), sums=True,
      meshes=False),
  Row("gptq propagating", lambda: gptq(3, 16, symmetric=False, zero="real", error_propagation=0.5), sums=True,
      meshes=False),
  Row("awq", lambda: awq(4, 16), norms=True, sums=True),
  Row("awq_scale", lambda: awq_scale(4, 16), norms=True, sums=True),
  Row("hqq", lambda: hqq(3, 16), sums=True),
  Row("mixed_precision", lambda: mixed_precision(4.5, (3, 4, 8), 16), sums=True,
      meshes=False),
  Row("mixed_precision tables", lambda: mixed_precision(5.5, (3, 4, 8), 16, sensitivity="fisher", tables=True),
      sums=True, meshes=False),
  Row("any_precision", lambda: any_precision((3, 4, 8), 16), sums=True),
  Row("learned_rounding", lambda: learned_rounding(3, 16, steps=3, learning_rate=0.1), sums=True),
  Row("llm_int8", lambda: llm_int8(threshold=4.0)),
  Row("llm_int8 fraction", lambda: llm_int8(4, 16, None, 0.1, 8, "none"), sums=True,
      meshes=False),
  Row("quip_sharp", quip_sharp, sums=True),
  Row("quip_sharp g16 propagating", lambda: quip_sharp(16, error_propagation=0.5), sums=True,
      meshes=False),
  Row("rotate", rotate, random=True, norms=True, sums=True),
  Row("smooth", smooth, norms=True),
  Row("smooth_quant", smooth_quant, norms=True),
  Row("quantize_inputs", lambda: quantize_inputs("fp8_per_token")),
  Row("quantize_inputs static", lambda: quantize_inputs("int8_static")),
  Row("quantize_activations", lambda: quantize_activations(0.05)),
  Row("wanda", lambda: wanda(0.5), functools.partial(keep_active, second_moment=ACTIVITY, goal=Target(0.5)),
      functools.partial(keep_active.__wrapped__, second_moment=ACTIVITY, goal=Target(0.5))),
  Row("wanda 2:4", lambda: wanda(pattern="2:4")),
  Row("sparse_gpt", lambda: sparse_gpt(0.5), sums=True),
  Row("sparse_gpt 2:4 int4", lambda: sparse_gpt(
    pattern="2:4", quantize={"bits": 4, "group_size": 16}, error_propagation=0.5), sums=True),
  Row("alps", lambda: alps(0.7, iterations=12), sums=True),
  Row("gradient", lambda: gradient(0.5, score="snip")),
  Row("gradient global", lambda: gradient(0.5, score="taylor", scope="global")),
  Row("sensitivity", lambda: sensitivity(0.5, "output", "wanda"), sums=True,
      meshes=False),
  Row("sensitivity outliers", lambda: sensitivity(0.6, "outliers", "magnitude", spread=0.2), sums=True,
      meshes=False),
  Row("kmeans", lambda: kmeans(16, "row", sensitivity="activation"), sums=True),
  Row("kmeans tensor", lambda: kmeans(8, method="lloyd", sensitivity="fisher", outlier_fraction=0.05), sums=True,
      meshes=False),
  Row("movement", movement),
  Row("freeze scores", freeze, before=movement),
  Row("prune_gradually", lambda: prune_gradually(0.5, 0, 10, 2), before=movement, step=8),
  Row("prune_gradually masks", lambda: prune_gradually(0.5, 0, 10, 2), before=lambda: magnitude(0.0), step=8,
      meshes=False),
  Row("rigl", lambda: rigl(0.3, 10, 2), before=lambda: magnitude(0.5), step=4),
  Row("shrink", lambda: shrink(0.05), step=4),
  Row("shrink inputs", lambda: shrink(0.1, "input"), before=lambda: magnitude(0.5), step=4, meshes=False),
  Row("l0", lambda: l0(0.5, 0, 10), before=gates, step=4, random=True),
  Row("l0 settled", lambda: l0(0.5, 0, 10, "block"), before=gates, step=20, meshes=False),
  Row("fake_quantize_inputs", lambda: fake_quantize_inputs(4), sums=True),
  Row("dora", lambda: dora(4), random=True, sums=True),
  Row("freeze directions", freeze, before=lambda: chain(round_to_nearest(4, 16), dora(4)), sums=True),
  Row("lora", lambda: lora(4), random=True, sums=True),
  Row("merge", merge, before=low_rank_of_codes, sums=True),
  Row("fake_quantize", lambda: fake_quantize(3, 16, symmetric=False)),
  Row("freeze training", freeze, before=lambda: fake_quantize(4, 16)),
  Row("product_quantize", lambda: product_quantize(4, 16, steps=3), random=True, sums=True),
  Row("sparse_code", lambda: sparse_code(8, 16, 2, steps=2), random=True, sums=True),
  Row("sparsify_activations", lambda: sparsify_activations(0.5)),
  Row("truncated_svd", lambda: truncated_svd(0.8), sums=True),
  Row("truncated_svd global", lambda: truncated_svd(0.8, whitening="activation", scope="global"), sums=True,
      meshes=False),
  Row("low_rank_residual", lambda: low_rank_residual(4), before=lambda: round_to_nearest(3, 16), sums=True),
  Row("freeze sparse", lambda: freeze("2:4"), before=lambda: magnitude(pattern="2:4")),
  Row("freeze smallest", lambda: freeze("auto"), before=lambda: magnitude(0.9), meshes=False),
  Row("leafwise", halve),
  Row("leafwise random", noise, random=True),
]


def rows_with(condition):
  found = [row for row in ROWS if condition(row)]
  return pytest.mark.parametrize("row", found, ids=[row.name.replace(" ", "-") for row in found])


each_row = rows_with(lambda row: True)
COMPILED = (quantize_matrix, keep_largest, n_of_m, freezing._apply_mask, freezing._expressed)
"""The jitted functions of the transforms."""


def small_tree(params):
  """A weight of each shape, one in bfloat16, norms, and a table."""
  first, second = params["layers"]["0"], params["layers"]["1"]
  return {
    "embed": params["embed"],
    "layers": {
      "0": {
        "attn": {"q": first["attn"]["q"]},
        "mlp": {"down": first["mlp"]["down"]},
        "mlp_norm": first["mlp_norm"],
      },
      "1": {
        "mlp": {"up": {"kernel": second["mlp"]["up"]["kernel"].astype(jnp.bfloat16)}}, "mlp_norm": second["mlp_norm"],
      },
    },
  }


@pytest.fixture(scope="module")
def params(tiny):
  return small_tree(tiny[1])


@pytest.fixture(scope="module")
def others(tiny):
  """The same form, other values."""
  return small_tree(tiny[0].init(jax.random.key(5)))


@functools.cache
def statistics_of(inputs):
  """What 200 tokens with some large channels would leave, alike for every weight of so many inputs."""
  rng = np.random.default_rng(inputs)
  x = (rng.normal(size=(200, inputs)) * np.exp(rng.normal(size=inputs))).astype(np.float32)
  r = x + 0.1 * rng.normal(size=x.shape).astype(np.float32)
  found = {
    "hessian": x.T @ x / 100, "reference_hessian": x.T @ r / 100, "absmax": np.abs(x).max(0),
    "mean": x.mean(0), "mean_abs": np.abs(x).mean(0), "second_moment": (x * x).mean(0), "histogram": np.ones(960),
  }
  return {name: jnp.asarray(value) for name, value in found.items()}


STRUCTURE = Llama(LlamaConfig(head_dim=8))


def every_kernel(params, x):
  """A block for a method that runs one: each kernel's product with as many inputs."""
  kernels = [leaf for path, leaf in tree.flatten(params).items() if path.endswith("kernel")]
  return [jnp.tanh(x[..., : w.shape[0]] @ w) for w in kernels]


def block_of(params):
  x = jax.random.normal(jax.random.key(9), (2, 3, 64))
  inside = params["layers"]
  return BlockEvidence("layers", every_kernel, [x], [every_kernel(inside, x)], [jnp.ones((2, 3), bool)])


def dense_like(params, need):
  """Gradients, their squares or a weight before compression: any values of the same shapes."""

  def values(path, leaf):
    x = np.random.default_rng(len(path)).normal(size=leaf.shape).astype(np.float32)
    return jnp.asarray(x * x if need == "fisher" else x)

  return tree.map_weights(values, params)


def run(row, params, seed=0):
  if row.before is not None:
    params = apply(row.before(), params)
  return apply(row.make(), params, seed, row.step)


def apply(transform, params, seed=0, step=None):
  inside = {path: leaf.shape[-2] for path, leaf in tree.weights(params).items() if path.startswith("layers/")}
  statistics = {path: statistics_of(inputs) for path, inputs in inside.items()}
  evidence = Evidence(
    key=jax.random.key(seed), step=step, statistics=statistics, structure=STRUCTURE,
    **{need: dense_like(params, need) for need in transform.needs & {"grads", "fisher", "reference"}},
  )  # fmt: skip
  if "block" in transform.needs:
    evidence = dataclasses.replace(evidence, block=block_of(params))
  done, state = transform.apply(params, transform.init(params), evidence)
  return done if transform.plan is None else apply(transform.plan(state), done, seed, step)  # it measured first


@pytest.fixture(scope="module")
def results(params):
  """Each row applied once, for the tests to compare with."""
  return functools.cache(lambda row: run(row, params))


WHOLE = {
  "prune_neurons", "prune_heads", "prune_width", "prune_layers", "share", "tie_layers", "hard_concrete",
  "remove_closed",
}  # fmt: skip
"""Methods of whole models, on which test_structured.py, test_sharing.py and test_gates.py check them."""


def same_tree(a, b):
  assert checkpoint.tree_hash(a) == checkpoint.tree_hash(b)


def test_every_method_has_a_row():
  names = {row.make().name for row in ROWS}
  assert set(METHODS) <= names | WHOLE


@each_row
def test_the_seed_decides_everything(row, params, results):
  same_tree(run(row, params), results(row))
  if row.random:
    assert checkpoint.tree_hash(run(row, params, seed=1)) != checkpoint.tree_hash(results(row))


@each_row
def test_acts_and_keeps_shape_and_dtype(row, params, results):
  """Something changes; no shape, no dtype, no norm and no path does."""
  before, after = tree.flatten(params), tree.flatten(results(row))
  assert list(before) == list(after)
  for path, leaf in before.items():
    assert after[path].shape == leaf.shape and jnp.dtype(after[path].dtype) == leaf.dtype
    assert tree.is_weight(path) or after[path] is leaf or row.norms
  assert any(after[path] is not leaf for path, leaf in before.items())


@each_row
def test_input_is_left_alone(row, params, results):
  before = checkpoint.tree_hash(params)
  run(row, params)
  assert checkpoint.tree_hash(params) == before


@rows_with(lambda row: row.matrix)
def test_jit_equals_eager_on_a_matrix(row, params):
  w = params["layers"]["0"]["mlp"]["down"]["kernel"]
  jitted, eager = row.matrix(w), row.plain(w)
  assert jax.tree.structure(jitted) == jax.tree.structure(eager)
  for a, b in zip(jax.tree.leaves(jitted), jax.tree.leaves(eager), strict=True):
    if jnp.issubdtype(a.dtype, jnp.floating):  # fused or not, a scale is a product or two in float32
      np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=3e-7)
    else:
      np.testing.assert_array_equal(a, b)


@rows_with(lambda row: row.matrix)
def test_one_trace_for_two_matrices(row, params, others):
  chex.clear_trace_counter()
  traced = jax.jit(chex.assert_max_traces(lambda w: row.plain(w), n=1))
  for each in (params, others):
    traced(each["layers"]["0"]["mlp"]["down"]["kernel"])


@rows_with(lambda row: row.step is not None)
def test_a_step_transform_jits(row, params, results):
  """Inside a training step: state is an argument, the step is traced, one trace serves all steps."""
  transform, start = row.make(), params if row.before is None else apply(row.before(), params)
  assert transform.phase == "step" and "step" in transform.needs
  state = transform.init(start)
  chex.clear_trace_counter()

  @jax.jit
  @functools.partial(chex.assert_max_traces, n=1)
  def update(params, state, step):
    grads = dense_like(params, "grads") if "grads" in transform.needs else None
    return transform.apply(params, state, Evidence(step=step, grads=grads, key=jax.random.key(0)))

  done, new = update(start, state, row.step)
  same_tree(done, results(row))
  assert jax.tree.structure(done) == jax.tree.structure(start)
  assert jax.tree.structure(new) == jax.tree.structure(state)
  update(done, new, row.step + 1)


@each_row
def test_nothing_is_compiled_twice(row, params, others, results):
  """The same form with other values reuses every compiled function."""
  results(row)
  before = [f._cache_size() for f in COMPILED]
  run(row, others)
  assert [f._cache_size() for f in COMPILED] == before


@each_row
def test_round_trip_through_a_checkpoint(row, results, tmp_path):
  done = results(row)
  descriptions, arrays = describe(done)
  safetensors.write(tmp_path / "weights.safetensors", arrays)
  file = safetensors.open_file(tmp_path / "weights.safetensors")
  again = tree.unflatten({
    path: rebuild(d, file.read, path, Path("manifest.json")) for path, d in descriptions.items()
  })
  same_tree(again, done)
  assert jax.tree.structure(again) == jax.tree.structure(done)


@rows_with(lambda row: row.meshes)
def test_sharded_equals_local(row, tiny, params, results):
  """On eight devices, to the bit: codes, scales, masks and values; where a method sums, but for some codes."""
  done = run(row, shard(tiny[0], params, make_mesh(data=1, tensor=8)))
  if not row.sums:
    same_tree(done, results(row))
  for path, leaf in tree.weights(results(row)).items():
    a, b = (np.asarray(x if isinstance(x, jax.Array) else x.materialize(), np.float64)
            for x in (leaf, tree.get(done, path)))
    assert np.linalg.norm(a - b) <= 0.02 * np.linalg.norm(a)


@pytest.mark.parametrize("name", ["int4 g16", "magnitude row"])
def test_sharded_over_two_axes(name, tiny, params, results):
  row = next(row for row in ROWS if row.name == name)
  same_tree(run(row, shard(tiny[0], params, make_mesh(data=2, tensor=4))), results(row))


def test_rows_store_what_they_say(results):
  """A look at one leaf of the rows that others stand on."""
  by_name = {row.name: row for row in ROWS}
  down = lambda name: results(by_name[name])["layers"]["0"]["mlp"]["down"]["kernel"]  # noqa: E731
  assert isinstance(down("int4 g16"), QuantizedArray) and isinstance(down("magnitude"), MaskedArray)
  assert isinstance(down("freeze"), jax.Array) and float(jnp.mean(down("freeze") == 0)) == 0.5
  assert isinstance(down("freeze codes"), QuantizedArray) and isinstance(down("chain"), QuantizedArray)
  assert isinstance(down("named_chain").values, QuantizedArray)
