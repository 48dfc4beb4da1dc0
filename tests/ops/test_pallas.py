"""The Pallas kernels of GPUs and TPUs against the reference: values in interpret mode, and that they lower."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmcompress import ops
from lmcompress.arrays import NMSparseArray, QuantizedArray, masked, nm_mask, nm_sparse
from lmcompress.distributed import make_mesh
from lmcompress.ops.kernels import gpu, gpu_tiles, tpu
from lmcompress.transforms.round_to_nearest import quantize_matrix

KERNELS = {"gpu": gpu, "tpu": tpu}
PLATFORM = {"gpu": "cuda", "tpu": "tpu"}
F32 = {"scale_dtype": "float32"}
FORMS: dict[str, dict[str, Any]] = {
  "int8 row": {"bits": 8, "group_size": -1},
  "int8 tensor": {"bits": 8, "group_size": "tensor"},
  "int8 g32 zero": {"bits": 8, "group_size": 32, "symmetric": False},
  "int4 g32": {"bits": 4, "group_size": 32, **F32},
  "int4 g48 zero": {"bits": 4, "group_size": 48, "symmetric": False},
  "int4 row minimum": {"bits": 4, "group_size": -1, "symmetric": False, "zero": "real", **F32},
  "int4 tensor zero": {"bits": 4, "group_size": "tensor", "symmetric": False},
  "int4 g16 double": {"bits": 4, "group_size": 16, "scale_bits": 8},
  "fp8_e4m3 row": {"grid": "fp8_e4m3", "group_size": -1},
  "fp8_e5m2 g32": {"grid": "fp8_e5m2", "group_size": 32},
}
DTYPES = ["float32", "bfloat16", "float16"]
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}

quiet = functools.partial(settings, phases=[Phase.generate], deadline=None, derandomize=True, database=None)
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def normal(seed, *shape, dtype="float32"):
  return jnp.asarray(np.random.default_rng(seed).normal(0, 0.5, shape), dtype)


def quantized(form, inputs, outputs, axis=-2, seed=0):
  return quantize_matrix(
    normal(seed, *((inputs, outputs) if axis == -2 else (outputs, inputs))), axis=axis, **FORMS[form]
  )


def two_of_four(form, inputs, outputs, seed=0):
  w = normal(seed, inputs, outputs)
  if form in FORMS:
    return nm_sparse(w, nm_mask(w, 2, 4, -2), 2, 4, -2, lambda v: quantize_matrix(v, axis=-2, **FORMS[form]))
  return nm_sparse(w.astype(form), nm_mask(w, 2, 4, -2), 2, 4, -2)


def call(kernel, door, x, leaf):
  assert KERNELS[kernel].supports(x, leaf, door) == ""
  return getattr(KERNELS[kernel], door)(x, leaf, interpret=True)


def shifts(leaf):
  """Magnitude of what the zero of each entry moves it by: the value of code 0."""
  if not isinstance(leaf, QuantizedArray):
    return jnp.float32(0)
  codes = dataclasses.replace(leaf.codes, data=jnp.zeros_like(leaf.codes.data))
  return jnp.abs(dataclasses.replace(leaf, codes=codes).materialize())


@functools.partial(jax.jit, static_argnums=0)
def facts(door, x, leaf):
  """The reference in float32, magnitudes of the dense weight and of what its zeros move."""
  return getattr(ops, door)(x.astype(jnp.float32), leaf), jnp.abs(leaf.materialize()), shifts(leaf)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(kernel, door, x, leaf):
  return call(kernel, door, x, leaf)


def check(kernel, door, x, leaf):
  """Within the sum of what each rounding can do.

  The output is rounded once to the dtype of x. Both sides sum n products in float32: n roundings of up to the sum of
  magnitudes, a random walk of sqrt(n), times 8 for its tail and the two sides. A zero is taken from codes or from
  partial sums, so magnitudes are those before it cancels (`|w| + 2 |value of code 0|`). Where the tile is decoded
  before the product (2:4; many rows on a GPU) each weight is rounded to the dtype of x, in float16 to no less than a
  step of its subnormals. On a TPU float16 is computed in float32.
  """
  y = run(kernel, door, x, leaf)
  assert y.shape == (*x.shape[:-1], leaf.shape[1 if door == "linear" else 0]) and y.dtype == x.dtype
  want, dense, zeros = (np.asarray(fact, np.float64) for fact in facts(door, x, leaf))
  magnitude, scale = np.abs(np.asarray(x, np.float64)), dense + 2 * zeros
  dense, scale = (dense, scale) if door == "linear" else (dense.T, scale.T)
  unit = ROUNDOFF[str(x.dtype)]
  bound = unit * np.abs(want) + 8 * x.shape[-1] ** 0.5 * 2.0**-24 * (magnitude @ scale) + 2.0**-24
  decoded = isinstance(leaf, NMSparseArray) or (kernel == "gpu" and x.shape[0] > gpu.FEW_ROWS)
  if decoded and not (kernel == "tpu" and x.dtype == jnp.float16):
    bound = bound + unit * (magnitude @ dense) + (x.dtype == jnp.float16) * 2.0**-25 * magnitude.sum(-1, keepdims=True)
  error = np.abs(np.asarray(y, np.float64) - want)
  assert np.all(error <= 1.05 * bound), float(np.max(error / bound))  # 5 %: products of roundings


@each_kernel
@quiet(max_examples=6)
@given(
  form=st.sampled_from(sorted(FORMS)),
  door=st.sampled_from(["linear", "attend"]),
  rows=st.sampled_from([1, 3, 16, 17, 70]),
  blocks=st.integers(1, 3),
  outputs=st.sampled_from([1, 7, 50, 131, 300]),
  dtype=st.sampled_from(DTYPES),
)
def test_products(kernel, form, door, rows, blocks, outputs, dtype):
  """Any form, either door, sizes that no tile divides; the last group is ragged, rows packed with padding too."""
  group = FORMS[form]["group_size"]
  inputs = 61 * blocks if group in (-1, "tensor") else group * blocks + group // 2
  leaf = quantized(form, inputs, outputs, -2 if door == "linear" else -1)
  x = normal(7, rows, inputs, dtype=dtype)
  if KERNELS[kernel].supports(x, leaf, door) == "":
    check(kernel, door, x, leaf)
  else:  # blocks that neither fills a tile with
    assert "packing blocks of" in KERNELS[kernel].supports(x, leaf, door)


@each_kernel
@pytest.mark.parametrize(
  "form, door, rows, dtype",
  [
    ("int4 g48 zero", "linear", 3, "bfloat16"),
    ("int4 row minimum", "attend", 20, "float32"),
    ("int8 g32 zero", "attend", 2, "float16"),
    ("fp8_e4m3 row", "linear", 17, "bfloat16"),
  ],
)
def test_a_form_of_each_kind(kernel, form, door, rows, dtype):
  leaf = quantized(form, 192, 37, -2 if door == "linear" else -1)
  check(kernel, door, normal(7, rows, 192, dtype=dtype), leaf)


@pytest.mark.parametrize("slab_bytes", [1 << 28, 60 * 192 * 2])
@pytest.mark.parametrize("form, door", [("int4 g48 zero", "linear"), ("int8 row", "attend"), ("int8 row", "2:4")])
def test_many_rows_multiply_slabs(monkeypatch, slab_bytes, form, door):
  """Whole weights, and slabs of 60 outputs with a rest; the kernels are not called."""
  monkeypatch.setattr(gpu, "SLAB_BYTES", slab_bytes)
  monkeypatch.setattr(gpu.gpu_quantized, "product", None)
  gpu._door.cache_clear()
  run.clear_cache()
  if door == "2:4":
    leaf, door = two_of_four(form, 192, 131), "linear"
  else:
    leaf = quantized(form, 192, 131, -2 if door == "linear" else -1)
  check("gpu", door, normal(7, gpu.FEW_ROWS + 1, 192, dtype="bfloat16"), leaf)
  gpu._door.cache_clear()


@each_kernel
def test_many_steps(kernel):
  """More blocks than a step or a split holds: on a GPU partial sums of several programs, on a TPU an accumulator."""
  check(kernel, "linear", normal(7, 2, 2080), quantized("int4 g32", 2080, 5))


@each_kernel
@pytest.mark.parametrize(
  "form, inputs, rows, dtype",
  [("float32", 132, 3, "bfloat16"), ("int8 row", 128, 18, "float32"), ("int4 g32", 320, 1, "float16"),
   ("int4 g48 zero", 384, 20, "bfloat16")],
)  # fmt: skip
def test_two_of_four(kernel, form, inputs, rows, dtype):
  leaf = two_of_four(form, inputs, 37)
  x = normal(7, rows, inputs, dtype=dtype)
  if inputs == 132 and kernel == "tpu":
    assert "packing blocks of" in tpu.supports(x, leaf, "linear")
    leaf, x = two_of_four(form, 192, 37), normal(7, rows, 192, dtype=dtype)
  check(kernel, "linear", x, leaf)


@pytest.mark.parametrize("name, dtype", [("fp8_e4m3", jnp.float8_e4m3fn), ("fp8_e5m2", jnp.float8_e5m2)])
def test_every_code_of_the_8_bit_floats(name, dtype):
  """Bit arithmetic and hardware cast agree on all 256, NaN and infinities included."""
  codes = np.arange(256, dtype=np.uint8)
  want = codes.view(dtype).astype(np.float32)
  grid = quantized("fp8_e4m3 row" if name == "fp8_e4m3" else "fp8_e5m2 g32", 32, 1).grid
  ours = gpu_tiles.decoded(jnp.asarray(codes), grid, jnp.float32)
  for got in (tpu.float8(jnp.asarray(codes, jnp.int32), name), ours):
    np.testing.assert_array_equal(np.asarray(got), want)


@each_kernel
def test_jit_vmap_and_empty(kernel):
  """jit equals eager, a mapped x is more rows, a mapped weight one call each, no rows give none."""
  leaves = [quantized("int4 g32", 64, 9, seed=seed) for seed in (0, 1)]
  leaf, x = leaves[0], normal(7, 2, 3, 64)
  product = functools.partial(call, kernel, "linear")
  eager = product(x, leaf)
  traces = jax.jit(lambda x, leaf: (product(x, leaf), jax.vmap(jax.vmap(product, (0, None)), (0, None))(x, leaf)))
  for y in traces(x, leaf):
    np.testing.assert_allclose(y, eager, rtol=1e-6, atol=1e-6)
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *leaves)
  mapped = jax.vmap(functools.partial(KERNELS[kernel].linear, interpret=True))(x, stacked)
  np.testing.assert_allclose(mapped[0], eager[0], rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(mapped[1], product(x[1], leaves[1]), rtol=1e-6, atol=1e-6)
  for lead in ((0,), (2, 0)):
    assert product(jnp.zeros((*lead, 64), jnp.bfloat16), leaf).shape == (*lead, 9)
  assert product(x[0, 0], leaf).shape == (9,)


@each_kernel
@pytest.mark.parametrize("door", ["linear", "attend"])
def test_gradients(kernel, door):
  """Those of the reference, to x and to the scales."""
  leaf = quantized("int4 g32", 64, 9, -2 if door == "linear" else -1)
  x, g = normal(7, 3, 64), normal(8, 3, 9)

  def gradients(product):
    return jax.jit(jax.grad(lambda x, scale: jnp.sum(g * product(x, dataclasses.replace(leaf, scale=scale))), (0, 1)))

  got = gradients(functools.partial(call, kernel, door))(x, leaf.scale)
  for a, b in zip(got, gradients(getattr(ops, door))(x, leaf.scale), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # sums of 64 products in another order


@each_kernel
def test_the_backward_pass_holds_no_dense_weight(kernel):
  leaf = quantized("int4 g32", 256, 2048)
  backward = jax.jit(lambda x, g: jax.vjp(functools.partial(call, kernel, "linear", leaf=leaf), x)[1](g))
  compiled = backward.lower(jnp.ones((4, 256)), jnp.ones((4, 2048))).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 256 * 2048 * 4


@each_kernel
@pytest.mark.parametrize("form", FORMS)
def test_lowers(kernel, form):
  """To Triton's IR and to Mosaic's, with no such device: few rows and many, both doors, real and odd sizes."""
  many = most_rows(kernel)
  for door, rows, inputs, outputs, dtype in (
    ("linear", 1, 768, 640, "bfloat16"),
    ("linear", many, 96, 1, "float16"),
    ("attend", 1, 96, 1, "bfloat16"),
    ("attend", many, 768, 640, "float32"),
  ):
    leaf = jax.eval_shape(functools.partial(quantized, form, inputs, outputs, -2 if door == "linear" else -1))
    lower(kernel, door, jax.ShapeDtypeStruct((rows, inputs), jnp.dtype(dtype)), leaf)


@each_kernel
@pytest.mark.parametrize("form", ["bfloat16", "int4 g48 zero", "fp8_e4m3 row"])
def test_two_of_four_lowers(kernel, form):
  leaf = two_of_four(form, 768, 200)
  for rows, dtype in ((1, "bfloat16"), (most_rows(kernel), "float32")):
    lower(kernel, "linear", jax.ShapeDtypeStruct((rows, 768), jnp.dtype(dtype)), leaf)


def most_rows(kernel):
  """Rows that a kernel takes; on a GPU more of them multiply slabs."""
  return gpu.FEW_ROWS if kernel == "gpu" else 100


DEVICE = jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu")  # newer JAX lowers for a device that it knows


def lower(kernel, door, x, leaf):
  product = getattr(KERNELS[kernel], door)
  assert KERNELS[kernel].supports(x, leaf, door) == ""
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=DEVICE)):
    text = jax.jit(product).trace(x, leaf).lower(lowering_platforms=(PLATFORM[kernel],)).as_text()
  assert ("xla.gpu.triton" if kernel == "gpu" else "tpu_custom_call") in text


@each_kernel
def test_what_is_left_to_the_reference(kernel):
  supports, x = KERNELS[kernel].supports, jnp.ones((2, 64))
  w = normal(0, 64, 8)
  leaf = quantized("int4 g32", 64, 8)
  sparse = nm_sparse(w, nm_mask(w, 1, 4, -2), 1, 4, -2)
  for door, value, leaf_, reason in (
    ("linear", x, w, "a ArrayImpl"),
    ("linear", x, masked(leaf, jnp.ones((64, 8), bool), -2), "a MaskedArray"),
    ("linear", x.astype(jnp.int32), leaf, "x is int32, not one of float32, bfloat16, float16"),
    ("attend", x, leaf, "a kernel where a table is read"),
    ("linear", x, quantized("int4 g32", 64, 8, -1), "a table where a kernel is read"),
    ("linear", x, quantize_matrix(w, bits=3, group_size=32), "3-bit codes"),
    ("linear", x, quantize_matrix(w, grid="nf4", group_size=32), "the grid nf4"),
    ("linear", x, quantize_matrix(jnp.stack([w, w]), bits=4, group_size=32), "a stack of 1 leading axes"),
    ("linear", x, quantize_matrix(w, bits=4, group_size=7), "groups of 7 cut packing blocks of 2"),
    ("linear", x, sparse, "1:4 sparsity"),
    ("attend", x, sparse, "a 2:4 table"),
  ):
    assert supports(value, leaf_, door) == reason
  table = quantized("int4 g32", 64, 8, -1)
  assert supports(jnp.arange(3), table, "embed") == ""
  np.testing.assert_array_equal(KERNELS[kernel].embed(jnp.arange(3), table), ops.embed(jnp.arange(3), table))


# ---------------------------------------------------------------------------------------------- on a mesh


def collectives(f, *args):
  """The value of a compiled function and the kinds of messages in its program."""
  compiled = jax.jit(f).lower(*args).compile()
  kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
  return compiled(*args), re.findall(rf"= .*? ({kinds})(?:-start)?\(", compiled.as_text())


def placed(leaf, spec, mesh):
  put = lambda s, part: jax.device_put(part, NamedSharding(mesh, s))  # noqa: E731
  return jax.tree.map(put, leaf.sharding_like(spec), leaf, is_leaf=lambda s: isinstance(s, P))


ON_MESHES = [  # form, door, rows, dtype
  ("int8 row", "linear", 4, "float32"), ("int8 g32 zero", "linear", 4, "float32"),
  ("int4 g32", "linear", 4, "bfloat16"), ("int4 g16 double", "linear", 4, "float32"),
  ("fp8_e5m2 g32", "linear", 18, "float32"),
  ("int4 tensor zero", "linear", 4, "float32"), ("2:4 int8 row", "linear", 4, "float32"),
  ("2:4 bfloat16", "linear", 18, "float32"), ("int8 g32 zero", "attend", 4, "float32"),
  ("int4 row minimum", "attend", 18, "float32"),
]  # fmt: skip


@each_kernel
@pytest.mark.parametrize(("form", "door", "rows", "dtype"), ON_MESHES)
def test_each_shard_multiplies_its_part(kernel, form, door, rows, dtype):
  """No message where outputs are split, one sum where inputs are; the products are those of one device.

  In bfloat16 each partial result is rounded once more: 2**-8 of up to the sum of magnitudes.
  """
  axis, name = (-2, form.removeprefix("2:4 ")) if door == "linear" else (-1, form)
  leaf = two_of_four(name, 1024, 1024) if form.startswith("2:4 ") else quantized(name, 1024, 1024, axis)
  x = normal(1, rows, 1024, dtype=dtype)
  product = functools.partial(call, kernel, door)
  mesh, want = make_mesh(data=2, tensor=4), np.asarray(product(x, leaf), np.float32)
  dense = np.abs(np.asarray(leaf.materialize(), np.float32))
  magnitude = np.abs(np.asarray(x, np.float32)) @ (dense if axis == -2 else dense.T)
  bound = 1e-5 + (2.0**-8 if dtype == "bfloat16" else 1e-6) * magnitude
  for inputs, outputs, messages in ((None, "tensor", []), ("tensor", None, ["all-reduce"])):
    spec = P(inputs, outputs) if axis == -2 else P(outputs, inputs)
    put = jax.device_put(x, NamedSharding(mesh, P("data", inputs)))
    y, found = collectives(product, put, placed(leaf, spec, mesh))
    assert found == messages and y.dtype == x.dtype
    assert y.sharding.spec == (P("data", "tensor") if outputs else P("data"))
    assert np.all(np.abs(np.asarray(y, np.float32) - want) <= bound)


def test_what_ends_within_a_group_stays_whole():
  """25 blocks and 5 groups, the last of which is cut short: five parts would each begin within a group."""
  leaf, x = quantize_matrix(normal(0, 400, 24), axis=-2, bits=4, group_size=96), normal(1, 4, 400)
  assert (leaf.codes.blocks, leaf.scale.shape[0]) == (25, 5)
  mesh = Mesh(np.array(jax.devices()[:5]), ("tensor",))
  put = jax.device_put(x, NamedSharding(mesh, P(None, "tensor")))
  y = jax.jit(functools.partial(call, "gpu", "linear"))(put, placed(leaf, P(), mesh))
  np.testing.assert_allclose(np.asarray(y), call("gpu", "linear", x, leaf), rtol=1e-4, atol=1e-4)
