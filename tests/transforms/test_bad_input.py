"""Too little text, dead channels, zeros, outliers, denormals, NaN: a finite result, or an error with a name."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress import tree
from lmcompress.calibration import compress
from lmcompress.transforms import (
  any_precision,
  awq,
  gptq,
  hqq,
  learned_rounding,
  llm_int8,
  mixed_precision,
  quip_sharp,
  round_to_nearest,
  smooth_quant,
)
from lmcompress.types import Evidence, WeightError

PATH = "layers/0/mlp/up/kernel"
INPUTS, OUTPUTS = 64, 24
METHODS = {
  "gptq": lambda: gptq(4, 16),
  "gptq asymmetric": lambda: gptq(4, 16, symmetric=False, order="activation"),
  "hqq": lambda: hqq(4, 16),
  "quip_sharp": quip_sharp,
  "any_precision": lambda: any_precision((4, 8), 16),
  "llm_int8": lambda: llm_int8(4, 16, activations="none"),
  "llm_int8 fraction": lambda: llm_int8(4, 16, None, 0.1, activations="none"),
}


def case(name):
  rng = np.random.default_rng(0)
  tokens = 12 if name == "fewer tokens than channels" else 300
  x = rng.normal(size=(tokens, INPUTS)).astype(np.float32)
  w = rng.normal(0, 0.5, (INPUTS, OUTPUTS)).astype(np.float32)
  if name == "dead channel":
    x[:, 5] = 0
  if name == "dead channels":
    x[:, 8:] = 0
  if name == "zero group":
    w[16:32] = 0
  if name == "zero output":
    w[:, 3] = 0
  if name == "huge outliers":
    x[:, 3] *= 1e6
    w[7, 2] = 3e4
  if name == "denormals":
    w *= 1e-39
  if name == "tiny inputs":
    x *= 1e-18
  if name == "nothing but zeros":
    x[:] = w[:] = 0
  return x, jnp.asarray(w)


CASES = ["fewer tokens than channels", "dead channel", "dead channels", "zero group", "zero output", "huge outliers",
         "denormals", "tiny inputs", "nothing but zeros"]


def statistics(x):
  return {
    "hessian": jnp.asarray(2 * x.T @ x / len(x)), "absmax": jnp.asarray(np.abs(x).max(0)),
    "second_moment": jnp.asarray((x * x).mean(0)),
  }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_finite_and_no_worse_than_rounding(method, name):
  """Outputs on the calibration tokens, beside those of plain rounding in the same groups."""
  x, w = case(name)
  params = tree.unflatten({PATH: w})
  transform = METHODS[method]()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # damping raised: its own tests look at that
    done, _ = transform.apply(params, transform.init(params), Evidence(statistics={PATH: statistics(x)}))
  dense = np.asarray(tree.get(done, PATH).materialize(), np.float64)
  assert np.isfinite(dense).all() and dense.shape == w.shape
  plain = compress(None, params, round_to_nearest(4, 16))[0]
  error = lambda q: np.linalg.norm(x.astype(np.float64) @ (np.asarray(q, np.float64) - np.asarray(w, np.float64)))  # noqa: E731
  allowed = 4 if method == "quip_sharp" else 1.3  # two bits beside four
  floor = 1e-6 * np.linalg.norm(x) * max(1e-30, np.linalg.norm(w))
  if name == "denormals":  # a scale stays above the smallest normal number; what is lost is below it
    assert np.abs(dense - np.asarray(w)).max() < 4e-38
  elif name != "huge outliers" or method not in ("quip_sharp", "any_precision"):  # a scale for a row, or all widths
    assert error(dense) <= allowed * error(tree.get(plain, PATH).materialize()) + floor


@pytest.fixture(scope="module")
def tokens():
  return np.random.default_rng(0).integers(0, 64, (8, 16)).astype(np.int32)


WHOLE = {
  "gptq": lambda: gptq(4, 16), "awq": lambda: awq(4, 16), "quip_sharp": quip_sharp, "smooth_quant": smooth_quant,
  "mixed_precision": lambda: mixed_precision(6.0, (4, 8), 16), "any_precision": lambda: any_precision(group_size=16),
  "learned_rounding": lambda: learned_rounding(4, 16, steps=2), "llm_int8": llm_int8,
}  # fmt: skip


@pytest.mark.parametrize("method", WHOLE)
def test_no_calibration_text(tiny, method):
  with pytest.raises(WeightError, match=r"pass calibration=tokens \[n, length\]"):
    compress(*tiny, WHOLE[method](), key=jax.random.key(0))


@pytest.mark.parametrize(
  ("method", "bad"),
  [("gptq", np.inf), ("gptq", np.nan), ("awq", np.nan), ("quip_sharp", np.inf), ("llm_int8", np.nan),
   ("learned_rounding", np.inf)],
)  # fmt: skip
def test_activations_that_are_not_finite_are_named(tiny, tokens, method, bad):
  """A norm's scale is no weight, so nothing catches it before the text runs."""
  model, params = tiny
  params = tree.put(params, "layers/1/mlp_norm/scale", jnp.full(32, bad))
  with pytest.raises(WeightError, match="of layers/1/mlp/gate is not finite"):
    compress(model, params, WHOLE[method](), tokens, jax.random.key(0))


@pytest.mark.parametrize("tokens", [np.zeros((0, 4), np.int32), np.zeros(4, np.int32), np.zeros((2, 4), np.float32)])
def test_tokens_that_are_none(tiny, tokens):
  with pytest.raises(WeightError, match=r"\[n, length\] integers"):
    compress(*tiny, gptq(4, 16), tokens)
