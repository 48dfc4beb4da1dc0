"""GPTQ on one matrix: what it promises, against the paper's loop in NumPy float64."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress import tree
from lmcompress.arrays import MaskedArray, QuantizedArray, masked
from lmcompress.calibration import compress
from lmcompress.ops.rounding import Rounding
from lmcompress.ops.second_order import inverse_factor, solve
from lmcompress.transforms import gptq, round_to_nearest, wanda
from lmcompress.transforms.round_to_nearest import quantize_matrix
from lmcompress.types import Evidence, WeightError

PATH = "layers/0/mlp/up/kernel"


def inputs(n=64, tokens=400, seed=0):
  """Tokens whose channels are correlated and of very different sizes."""
  rng = np.random.default_rng(seed)
  mixing = rng.normal(size=(n, n)) / np.sqrt(n) + np.diag(np.exp(rng.normal(size=n)))
  return (rng.normal(size=(tokens, n)) @ mixing).astype(np.float32)


def weight(n=64, out=24, seed=1):
  return jnp.asarray(np.random.default_rng(seed).normal(0, 0.5, (n, out)).astype(np.float32))


def run(transform, w, x, path=PATH, reference=None):
  params = {"layers": {"0": {"mlp": {"up": {"kernel": w}}}}}
  hessian = jnp.asarray(2 / len(x) * x.astype(np.float64).T @ x, jnp.float32)
  r = x if reference is None else reference
  given = {"hessian": hessian, "reference_hessian": jnp.asarray(2 / len(x) * x.astype(np.float64).T @ r, jnp.float32)}
  evidence = Evidence(statistics={path: given})
  return transform.apply(params, transform.init(params), evidence)[0]["layers"]["0"]["mlp"]["up"]["kernel"]


def output_error(w, q, x):
  dense = np.asarray(q.materialize(), np.float64)
  return np.linalg.norm(x @ (np.asarray(w, np.float64) - dense)) / np.linalg.norm(x @ np.asarray(w, np.float64))


def reference_gptq(w, hessian, scale, zero, levels, damping, order):
  """Frantar et al. 2022, algorithm 1, in float64, with scales `[in, out]` given: codes `[in, out]`."""
  w, n = w.astype(np.float64).copy(), len(w)
  h = hessian.astype(np.float64) + damping * np.mean(np.diag(hessian)) * np.eye(n)
  h, w = h[np.ix_(order, order)], w[order]
  upper = np.linalg.cholesky(np.linalg.inv(h)).T
  codes = np.zeros(w.shape)
  for i in range(n):
    s, z = scale[order[i]], zero[order[i]]
    codes[i] = np.clip(np.round(w[i] / s) + z, 0, levels)
    error = (w[i] - (codes[i] - z) * s) / upper[i, i]
    w[i:] -= np.outer(upper[i, i:], error)
  back = np.empty_like(codes)
  back[order] = codes
  return back


def test_the_factor_of_the_inverse():
  x = inputs()
  h = jnp.asarray(x.T @ x / 200)
  factor = inverse_factor(h, 0.01)
  want = np.linalg.inv(np.asarray(h, np.float64) + float(factor.damping) * np.eye(64))
  upper = np.asarray(factor.upper, np.float64)
  np.testing.assert_allclose(upper.T @ upper, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
  np.testing.assert_array_equal(np.tril(upper, -1), 0)


@pytest.mark.parametrize("order", ["none", "activation"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_the_papers(order, symmetric):
  """With scales fixed beforehand; a float32 solve may round a tie the other way, in a few of 1536 codes."""
  w, x = weight(), inputs()
  hessian = 2 / len(x) * x.T @ x
  size = 16 if order == "activation" else -1
  done = run(gptq(4, size, symmetric, order=order, clip="none", sweeps=0, scale_dtype="float32"), w, x)
  fixed = quantize_matrix(w, bits=4, group_size=size, symmetric=symmetric, scale_dtype="float32")
  repeat = 64 // fixed.scale.shape[0]
  scale = np.repeat(np.asarray(fixed.scale, np.float64), repeat, 0)
  zero = np.full(fixed.scale.shape, 8.0) if symmetric else np.asarray(fixed.zero_point.unpack(), np.float64)
  zero = np.repeat(zero, repeat, 0)
  turn = np.arange(64) if order == "none" else np.argsort(-np.diag(hessian), kind="stable")
  want = reference_gptq(np.asarray(w), hessian, scale, zero, 15, 0.01, turn)
  np.testing.assert_allclose(done.scale, fixed.scale, rtol=3e-7)
  assert np.mean(np.asarray(done.codes.unpack()) != want) < 0.01


@pytest.mark.parametrize("options", [
  {}, {"symmetric": False}, {"group_size": -1}, {"order": "activation"}, {"order": "none"}, {"clip": "none"},
  {"grid": "nf4"}, {"zero": "real", "symmetric": False},
])
def test_beats_rounding_on_outputs(options):
  """Though it is further from the weight itself."""
  w, x = weight(), inputs()
  options = {"group_size": 16, **options}
  done = run(gptq(3, **options), w, x)
  plain = {k: v for k, v in options.items() if k not in ("order", "clip")}
  rounded = quantize_matrix(w, bits=3, **plain)
  assert output_error(w, done, x) < 0.85 * output_error(w, rounded, x)
  assert done.nbits == rounded.nbits and done.grid == rounded.grid
  difference = lambda q: float(jnp.linalg.norm(q.materialize() - w))  # noqa: E731
  if options.get("clip") == "none":
    assert difference(done) > difference(rounded)


def test_sweeps_lower_the_error():
  w, x = weight(), inputs()
  errors = [output_error(w, run(gptq(3, 16, sweeps=n), w, x), x) for n in (0, 1, 3)]
  assert errors[0] > errors[1] >= errors[2]


def test_propagation_undoes_what_came_before():
  """The inputs have drifted; the outputs that count are those before the drift."""
  w, x = weight(), inputs(tokens=2000)
  drifted = (x * (1 + 0.2 * np.random.default_rng(3).normal(size=64))).astype(np.float32)
  target = x @ np.asarray(w, np.float64)

  def missed(q):
    return np.linalg.norm(target - drifted @ np.asarray(q.materialize(), np.float64))

  plain, moved = (run(gptq(4, 16, error_propagation=a), w, drifted, reference=x) for a in (0.0, 1.0))
  assert missed(moved) < 0.6 * missed(plain)
  same = run(gptq(4, 16, error_propagation=1.0), w, x, reference=x)
  np.testing.assert_allclose(same.materialize(), run(gptq(4, 16), w, x).materialize(), atol=0.35)


def test_linears_of_a_stage_are_solved_as_one():
  x = inputs()
  h = jnp.asarray(2 / len(x) * x.T @ x)
  options = dict(group_size=16, order="group", clip=True, sweeps=1, damping=0.01, rounding=Rounding(4))
  a, b = weight(out=24), weight(out=8, seed=5)
  both = solve(jnp.concatenate([a, b], 1), h, None, None, **options)[0]
  np.testing.assert_array_equal(both[:, :24], solve(a, h, None, None, **options)[0])
  np.testing.assert_array_equal(both[:, 24:], solve(b, h, None, None, **options)[0])


@pytest.mark.parametrize("group", [16, 24, 50, -1])
def test_groups_that_do_not_divide_a_row(group):
  w, x = weight(n=70), inputs(n=70)
  done = run(gptq(4, group), w, x)
  assert done.shape == (70, 24) and done.group_size == group
  assert output_error(w, done, x) < output_error(w, quantize_matrix(w, bits=4, group_size=group), x)


def test_what_a_mask_removed_stays_removed():
  w, x = weight(), inputs()
  keep = jnp.arange(w.size).reshape(w.shape) % 3 != 0
  leaf = masked(w, keep, -2)
  done = run(gptq(4, 16), leaf, x)
  assert isinstance(done, QuantizedArray)
  np.testing.assert_array_equal(np.asarray(done.materialize())[~np.asarray(keep)], 0)
  kept = run(gptq(4, 16, symmetric=False, zero="real"), leaf, x)
  assert isinstance(kept, MaskedArray)
  np.testing.assert_array_equal(np.asarray(kept.materialize())[~np.asarray(keep)], 0)
  rounded = run(round_to_nearest(4, 16), leaf, x)
  dense = np.asarray(leaf.materialize())
  assert output_error(dense, done, x) < output_error(dense, rounded, x)


@pytest.mark.parametrize("case", ["few tokens", "dead input", "zero group", "outlier", "denormal", "no activity"])
def test_hard_inputs_give_finite_codes(case):
  w, x = np.array(weight()), inputs()
  if case == "few tokens":
    x = x[:5]
  if case == "dead input":
    x[:, 7] = 0
  if case == "zero group":
    w[16:32] = 0
  if case == "outlier":
    w[3, 2] = 1e30
  if case == "denormal":
    w[:16] = 1e-40
  if case == "no activity":
    x[:] = 0
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    done = run(gptq(4, 16), jnp.asarray(w), x)
  dense = np.asarray(done.materialize())
  assert np.isfinite(dense).all()
  if case == "dead input":
    np.testing.assert_array_equal(dense[7], 0)
  if case == "few tokens":
    assert output_error(w, done, x) < output_error(w, quantize_matrix(jnp.asarray(w), bits=4, group_size=16), x)


def test_a_hessian_that_cannot_be_factored_is_reported():
  w = weight()
  h = jnp.asarray(np.diag(np.r_[-2.0, np.ones(63)]).astype(np.float32))
  params = {"layers": {"0": {"mlp": {"up": {"kernel": w}}}}}
  t = gptq(4, 16)
  with pytest.warns(RuntimeWarning, match=rf"gptq at {PATH}: the Hessian cannot be factored with damping .* works"):
    done, _ = t.apply(params, t.init(params), Evidence(statistics={PATH: {"hessian": h}}))
  assert np.isfinite(np.asarray(done["layers"]["0"]["mlp"]["up"]["kernel"].materialize())).all()


@pytest.mark.parametrize("arguments, message", [
  ({"bits": 9}, "bits are 2 to 8"), ({"group_size": 8}, "at least 16"), ({"damping": 0.0}, "damping lies between"),
  ({"error_propagation": 2.0}, "error_propagation is 0 to 1"), ({"sweeps": -1}, "not negative"),
  ({"grid": "nf4", "symmetric": False}, "only integer grids have a zero"),
])
def test_arguments_out_of_range(arguments, message):
  with pytest.raises(ValueError, match=message):
    gptq(**arguments)


def test_weights_that_cannot_be_quantized():
  x = inputs()
  with pytest.raises(WeightError, match=r"gptq\(group_size=128\) at .*a row has 64 inputs"):
    run(gptq(4, 128), weight(), x)
  with pytest.raises(WeightError, match="NaN or infinity"):
    run(gptq(4, 16), weight().at[0, 0].set(jnp.nan), x)
  with pytest.raises(WeightError, match="already stored as"):
    run(gptq(4, 16), quantize_matrix(weight(), bits=8), x)


def test_jit_equals_eager():
  w, x = weight(32, 8), inputs(32)
  h = jnp.asarray(2 / len(x) * x.T @ x)
  options = dict(group_size=16, order="group", clip=True, sweeps=1, damping=0.01, rounding=Rounding(4))
  jitted = solve(w, h, None, None, **options)
  with jax.disable_jit():
    eager = solve(w, h, None, None, **options)
  assert np.mean(np.asarray(jitted[0]) != np.asarray(eager[0])) < 0.01


@pytest.mark.parametrize("method", [functools.partial(gptq, 3, 16), functools.partial(wanda, 0.5)])
def test_stages_one_by_one_or_a_block_at_once(tiny, method):
  """What reads a block's own input is the same either way; what comes later in the block sees another input."""
  model, params = tiny
  tokens = np.random.default_rng(0).integers(0, 64, (16, 16)).astype(np.int32)
  apart, at_once = (compress(model, params, method(sequential=s), tokens)[0] for s in ("stage", "block"))
  value = lambda p, path: np.asarray(tree.get(p, path).materialize())  # noqa: E731
  np.testing.assert_array_equal(value(apart, "layers/0/attn/q/kernel"), value(at_once, "layers/0/attn/q/kernel"))
  assert not np.array_equal(value(apart, "layers/0/mlp/down/kernel"), value(at_once, "layers/0/mlp/down/kernel"))
  with pytest.raises(ValueError, match="stage or block"):
    method(sequential="layer")
