"""Rounding against plain NumPy in float64, code for code, and what becomes of hard weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lmcompress.arrays import MaskedArray, Packed, QuantizedArray
from lmcompress.transforms import magnitude, round_to_nearest
from lmcompress.transforms.round_to_nearest import quantize_matrix
from lmcompress.types import Evidence, WeightError

SCHEMES = {
  "full": {"symmetric": True, "convention": "full"},
  "narrow": {"symmetric": True, "convention": "narrow"},
  "signed": {"symmetric": True, "convention": "signed"},
  "integer": {"symmetric": False, "zero": "integer"},
  "real": {"symmetric": False, "zero": "real"},
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

unpack = jax.jit(Packed.unpack)
dense = jax.jit(QuantizedArray.materialize)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(0, 0.1, shape).astype(np.float32)


def groups_of(w, group):
  """The rows of each group of a kernel `[in, out]`; the last one may be shorter."""
  return [w[i : i + group] for i in range(0, len(w), group)]


def scales(w, bits, group, scheme):
  """Scale and minimum of each group, in float64, before they are stored: `[groups, out]` each."""
  scale, minimum = [], []
  for g in groups_of(w, group):
    low, high = np.minimum(g.min(0), 0), np.maximum(g.max(0), 0)
    amax = np.abs(g).max(0)
    scale.append({
      "full": 2 * amax / (2**bits - 1),
      "narrow": amax / (2 ** (bits - 1) - 1),
      "signed": np.where(high > -low, high, low) / -(2 ** (bits - 1)),
      "integer": (high - low) / (2**bits - 1),
      "real": (high - low) / (2**bits - 1),
    }[scheme])
    minimum.append(low)
  return np.stack(scale), np.stack(minimum)


def reference(w, bits, group, scheme, stored, minimum, tolerance):
  """Codes for the scales that will be read back, and which of them lie on no tie."""
  codes, sure = [], []
  clear = lambda x: np.abs(np.abs(x - np.floor(x)) - 0.5) > tolerance  # noqa: E731
  for g, s, m in zip(groups_of(w, group), stored, minimum, strict=True):
    if scheme == "real":
      x = (g - m) / s
      codes.append(np.clip(np.rint(x), 0, 2**bits - 1))
    elif scheme == "integer":
      x, z = g / s, np.clip(np.rint(-m / s), 0, 2**bits - 1)
      codes.append(np.clip(np.rint(x) + z, 0, 2**bits - 1))
    else:
      x, half = g / s, 2 ** (bits - 1)
      codes.append(np.clip(np.rint(x) + half, 1 if scheme == "narrow" else 0, 2**bits - 1))
    sure.append(clear(x) & (clear(-m / s) if scheme == "integer" else True))
  return np.concatenate(codes), np.concatenate(sure)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits, group, scale_dtype", [
  (8, 32, "bfloat16"), (8, -1, "float32"), (4, 32, "float32"), (4, 64, "bfloat16"), (4, -1, "float32"),
  (3, 64, "float32"), (3, -1, "bfloat16"), (2, 32, "bfloat16"),
])
def test_codes_are_the_references(scheme, bits, group, scale_dtype):
  """For 96 inputs: groups that fit, a ragged last one (64), and the row.

  Float32 rounds a quotient of up to `2**bits` to `2**bits * 6e-8`; closer to a half than a few of these,
  either neighbour is right.
  """
  w32 = normal(96, 24)
  w, size = w32.astype(np.float64), 96 if group == -1 else group
  leaf = quantize_matrix(w32, bits=bits, group_size=group, scale_dtype=scale_dtype, **SCHEMES[scheme])
  assert leaf.scale.dtype == scale_dtype

  scale, low = scales(w, bits, size, scheme)
  stored = np.asarray(leaf.scale).astype(np.float64)
  want = scale.astype(np.float32).astype(DTYPES[scale_dtype]).astype(np.float64)
  if scale_dtype == "float32":  # two or three roundings
    np.testing.assert_allclose(stored, want, rtol=4e-7)
  else:  # the nearest, save where float32's error moves a scale over a tie
    np.testing.assert_allclose(stored, want, rtol=2**-7)
    assert np.mean(stored == want) > 0.97

  minimum = low if scheme != "real" else low.astype(DTYPES[scale_dtype]).astype(np.float64)
  codes, sure = reference(w, bits, size, scheme, stored, minimum, tolerance=2**bits * 2e-7)
  assert np.mean(sure) > 0.95
  found = np.asarray(unpack(leaf.codes))
  np.testing.assert_array_equal(found[sure], codes[sure])
  assert np.abs(found[~sure] - codes[~sure]).max(initial=0) <= 1
  if scheme == "integer":
    np.testing.assert_array_equal(unpack(leaf.zero_point), np.clip(np.rint(-low / stored), 0, 2**bits - 1))
  if scheme == "real":
    np.testing.assert_array_equal(np.asarray(leaf.minimum).astype(np.float64), minimum)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_table_is_a_kernel_turned(scheme):
  """Groups run along the features: the same codes and scales, transposed."""
  w = normal(96, 24)
  kernel = quantize_matrix(w, bits=4, group_size=32, **SCHEMES[scheme])
  table = quantize_matrix(w.T, bits=4, group_size=32, axis=-1, **SCHEMES[scheme])
  np.testing.assert_array_equal(unpack(table.codes), unpack(kernel.codes).T)
  np.testing.assert_array_equal(table.scale, kernel.scale.T)
  np.testing.assert_array_equal(dense(table), dense(kernel).T)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_error_is_half_a_step(scheme):
  """Nowhere farther than half a scale; half more for a rounded zero, and where `signed` lacks a code."""
  w = normal(96, 24)
  leaf = quantize_matrix(w, bits=4, group_size=32, scale_dtype="float32", **SCHEMES[scheme])
  step = np.repeat(np.abs(np.asarray(leaf.scale)), 32, axis=0)
  reach = {"signed": 1.0, "integer": 1.0}.get(scheme, 0.5)
  assert np.all(np.abs(np.asarray(dense(leaf)) - w) <= step * (reach + 1e-4))


@pytest.mark.parametrize("convention", ["full", "narrow", "signed"])
def test_positive_extremes_are_kept(convention):
  """Whichever sign the largest weight of a group has: `signed` needs a negative scale for a positive one."""
  w = np.linspace(-0.4, 1, 32, dtype=np.float32)[:, None] * np.array([[1, -1]], np.float32)
  leaf = quantize_matrix(w, bits=4, group_size=32, convention=convention, scale_dtype="float32")
  error = np.abs(np.asarray(dense(leaf)) - w)
  assert error.max() < 2 * np.abs(np.asarray(leaf.scale)).max() < 0.4


@pytest.mark.parametrize("options", [
  {"bits": 4}, {"bits": 3, "convention": "narrow"}, {"bits": 2, "convention": "signed"},
  {"bits": 4, "symmetric": False}, {"bits": 3, "symmetric": False, "zero": "real"}, {"grid": "nf4"},
], ids=str)
def test_clipping_never_loses(options):
  """`clip="mse"` has at most the `sum |error|**2.4` of no clipping, in every group, and less in some."""
  w = normal(128, 16)
  w[np.random.default_rng(1).integers(0, 128, 8), np.arange(8)] *= 6

  def loss(clip):
    leaf = quantize_matrix(w, group_size=32, clip=clip, **options)
    error = np.abs(np.asarray(dense(leaf), np.float64) - w) ** 2.4
    return error.reshape(4, 32, 16).sum(1)

  none, mse = loss("none"), loss("mse")
  assert np.all(mse <= none * (1 + 1e-5))
  assert np.any(mse < none * 0.99)


def test_nf4_with_double_quantization_takes_4_13_bits():
  """4 + 8/64 + (scale and minimum of 256 scales, 64/(64*256)); the paper's 4.127 has no minimum."""
  leaf = quantize_matrix(normal(512, 256), grid="nf4", group_size=64, scale_bits=8)
  assert leaf.nbits / leaf.size == 4 + 8 / 64 + 64 / (64 * 256)
  single = quantize_matrix(normal(512, 256), grid="nf4", group_size=64, scale_dtype="float32")
  errors = [float(jnp.linalg.norm(dense(x) - normal(512, 256))) for x in (leaf, single)]
  assert errors[0] < errors[1] * 1.02  # 8-bit scales cost next to nothing


@pytest.mark.parametrize("step, bits", [(2.0**-5, 6), (0.01, 7), (0.05, 5)])
def test_fixed_step(step, bits):
  """`round(w / step) * step`, wherever no quotient is a tie."""
  w = normal(48, 20)
  leaf = quantize_matrix(w, bits=bits, step=step)
  x = w.astype(np.float64) / np.float64(np.float32(step))
  sure = np.abs(np.abs(x - np.floor(x)) - 0.5) > 1e-5
  np.testing.assert_allclose(np.asarray(dense(leaf))[sure], (np.rint(x) * step)[sure], rtol=1e-6, atol=1e-9)


def test_a_step_too_fine_for_the_bits_raises():
  with pytest.raises(WeightError, match=r"step=0.001, bits=4\) at layers/0/up/kernel: .*use bits=\d+ or"):
    apply(round_to_nearest(bits=4, step=0.001, group_size=-1), normal(48, 20))


def test_a_step_has_no_groups():
  """The default group size means nothing to a fixed step, so a row shorter than it is no error."""
  done = apply(round_to_nearest(bits=8, step=2.0**-5), normal(48, 20))
  assert done.scale.size == 1


def test_a_mask_decides_what_is_rounded():
  """Removed weights take no part in the range, and read as exactly 0 whether or not codes can say so."""
  w = normal(32, 8)
  masks = apply(magnitude(0.5), w)
  kept = np.asarray(masks.materialize()) != 0
  for options in SCHEMES.values():
    done = apply(round_to_nearest(bits=4, group_size=32, **options), masks)
    assert isinstance(done, MaskedArray) == (options.get("zero") == "real")
    assert np.all(np.asarray(jax.jit(lambda x: x.materialize())(done))[~kept] == 0)


# ------------------------------------------------------------------------------------- hard weights

FORMS = {
  **{name: {"group_size": 32, **options} for name, options in SCHEMES.items()},
  "tensor": {"group_size": "tensor"},
  "row int8": {"group_size": -1, "bits": 8, "symmetric": False},
  "int2 mse": {"group_size": 32, "bits": 2, "clip": "mse"},
  "real mse": {"group_size": 32, "symmetric": False, "zero": "real", "clip": "mse"},
  "nf4": {"grid": "nf4", "group_size": 32},
  "fp8_e4m3": {"grid": "fp8_e4m3", "group_size": 32},
  "fp8_e5m2": {"grid": "fp8_e5m2", "group_size": "tensor", "scale_dtype": "float32"},
  "mxfp4": {"grid": "mxfp4", "group_size": 32},
  "nvfp4": {"grid": "nvfp4", "group_size": 16},
  "double": {"group_size": 32, "scale_bits": 8},
  "double asym": {"group_size": 32, "scale_bits": 4, "symmetric": False},
}


def with_values(*placed):
  w = normal(64, 8)
  for where, value in placed:
    w[where] = value
  return w


FIRST = np.s_[:32, 0]
HARD = {
  "all zero": np.zeros((64, 8), np.float32),
  "zero group": with_values((FIRST, 0.0)),
  "constant group": with_values((FIRST, 0.25)),
  "negative constant group": with_values((FIRST, -0.25)),
  "denormals": normal(64, 8) * np.float32(1e-39),
  "denormal group": with_values((FIRST, 1e-40)),
  "tiny": normal(64, 8) * np.float32(1e-36),
  "outlier": with_values(((3, 0), 1e30)),
  "negative outlier": with_values(((3, 0), -1e30)),
  "two outliers": with_values(((3, 0), 1e37), ((4, 0), -1e37)),
  "one output": normal(64, 1),
}


@pytest.mark.parametrize("weight", HARD)
@pytest.mark.parametrize("form", FORMS)
def test_hard_weights_stay_finite(form, weight):
  """No NaN, no infinity; zeros stay zeros; a group without an outlier is as good as ever."""
  w, options = HARD[weight], FORMS[form]
  values = np.asarray(dense(quantize_matrix(w, **options)))
  assert np.all(np.isfinite(values))
  if weight == "zero group" and options["group_size"] == 32 and form != "double":
    assert np.all(values[FIRST] == 0)
  if weight == "all zero":
    assert np.all(values == 0)
  if "constant" in weight and options["group_size"] == 32 and "double" not in form:
    assert np.max(np.abs(values[FIRST] - w[FIRST])) <= (0.15 if options.get("bits") == 2 else 0.05)
  if "outlier" in weight:
    assert values[3, 0] == pytest.approx(w[3, 0], rel=0.5)
    if options["group_size"] == 32 and "double" not in form:  # its own scale: the neighbours' is not spoilt
      assert np.linalg.norm(values[:, 1:] - w[:, 1:]) < np.linalg.norm(w[:, 1:]) * 0.7
  if "denormal" in weight:
    assert np.max(np.abs(values[FIRST])) <= 1.2e-38 * 16


@pytest.mark.parametrize("form", ["row int8", "tensor"])
def test_a_matrix_of_one_input(form):
  """One input: a group of one, reproduced to the scale's precision."""
  w = normal(1, 8)
  values = np.asarray(dense(quantize_matrix(w, **FORMS[form])))
  np.testing.assert_allclose(values, w, rtol=0.02, atol=0.0 if form != "tensor" else np.abs(w).max() / 7)


@pytest.mark.parametrize("scheme", ["full", "integer", "real"])
@pytest.mark.parametrize("value", [1e30, -1e30])
def test_a_scale_that_float16_cannot_hold(scheme, value):
  """Either refused with the path, or reproduced; never infinite, never silently another number."""
  w = with_values(((3, 0), value))
  try:
    done = apply(round_to_nearest(group_size=32, scale_dtype="float16", **SCHEMES[scheme]), w)
  except WeightError as error:
    assert "layers/0/up/kernel" in str(error)
    return
  values = np.asarray(dense(done))
  assert np.all(np.isfinite(values))
  assert values[3, 0] == pytest.approx(value, rel=0.5)


@pytest.mark.parametrize("scheme", ["full", "integer", "real"])
def test_small_weights_with_float16_scales(scheme):
  """Scales near 1e-6 are subnormal in float16, with six bits left: no reason to lose the weights."""
  w = normal(64, 8) * np.float32(1e-3)
  leaf = quantize_matrix(w, group_size=32, bits=8, scale_dtype="float16", **SCHEMES[scheme])
  assert np.linalg.norm(np.asarray(dense(leaf)) - w) < 0.1 * np.linalg.norm(w)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_float16_weights_do_not_overflow(scheme):
  """Codes reach a step beyond the largest weight: near float16's end that must not be infinity."""
  w = normal(64, 8).astype(np.float16)
  w[3, 0], w[5, 1] = -65000, 65000
  try:
    done = apply(round_to_nearest(group_size=32, **SCHEMES[scheme]), w)
  except WeightError:
    return
  values = np.asarray(dense(done)).astype(np.float64)
  assert np.all(np.isfinite(values)) and values[3, 0] == pytest.approx(-65000, rel=0.2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("make", [round_to_nearest, functools.partial(round_to_nearest, grid="nf4")])
def test_nan_and_infinity_are_refused(make, bad):
  with pytest.raises(WeightError, match=r"round_to_nearest at layers/0/up/kernel: the weight holds NaN"):
    apply(make(group_size=32), with_values(((5, 2), bad)))


def test_refusals_say_what_would_do():
  with pytest.raises(WeightError, match=r"size=128\) at layers/0/up/kernel: a row has 64 inputs; use"):
    apply(round_to_nearest(group_size=128), normal(64, 8))
  with pytest.raises(WeightError, match="already stored as int4"):
    apply(round_to_nearest(group_size=32), quantize_matrix(normal(64, 8), group_size=32))
  with pytest.raises(WeightError, match="dtype is int32, a floating dtype is needed"):
    apply(round_to_nearest(group_size=32), np.ones((64, 8), np.int32))


@pytest.mark.parametrize("arguments, message", [
  ({"bits": 1}, "bits are 2 to 8"), ({"bits": 9}, "bits are 2 to 8"), ({"group_size": 0}, "at least 1"),
  ({"group_size": "row"}, "'tensor'"), ({"grid": "int5"}, "grids are"),
  ({"grid": "nf4", "symmetric": False}, "only integer grids have a zero"), ({"step": 0.0}, "positive number"),
  ({"step": float("nan")}, "positive number"), ({"scale_bits": 9}, "2 to 8, or none"),
])
def test_arguments_are_checked_at_once(arguments, message):
  with pytest.raises(ValueError, match=message):
    round_to_nearest(**arguments)


@pytest.mark.parametrize("arguments", [
  {"convention": "fulll"}, {"zero": "float"}, {"clip": "max"}, {"scale_dtype": "int8"},
], ids=str)
def test_words_are_checked_at_once(arguments):
  """A word that no branch knows must not fall through to a default."""
  with pytest.raises(ValueError, match=next(iter(arguments))):
    round_to_nearest(symmetric="zero" not in arguments, **arguments)


def apply(transform, w):
  params = {"layers": {"0": {"up": {"kernel": w if hasattr(w, "nbits") else jnp.asarray(w)}}}}
  done, _ = transform.apply(params, transform.init(params), Evidence())
  return done["layers"]["0"]["up"]["kernel"]
