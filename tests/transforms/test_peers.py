"""One matrix as llm-compressor 0.14 makes it (`experiments/peers/one_matrix.py` wrote the file), beside ours."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress.arrays import NF4
from lmcompress.ops.rounding import Rounding, quantize
from lmcompress.ops.second_order import solve
from lmcompress.transforms.awq import relative_size

GROUP = 32


@pytest.fixture(scope="module")
def peer():
  with np.load(Path(__file__).parent / "llmcompressor.npz") as file:
    return dict(file)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_rounding(peer, kind):
  """Scales to a rounding of float32; values but for ties: a group's extreme lies half-way between two codes."""
  w = jnp.asarray(peer["w"].T)
  leaf = quantize(w, bits=4, group_size=GROUP, symmetric=kind == "symmetric", scale_dtype="float32")
  np.testing.assert_allclose(leaf.scale.T, peer[f"{kind}_scale"], rtol=2e-6)
  scale = np.repeat(peer[f"{kind}_scale"], GROUP, axis=1)
  tie = np.abs(np.abs(peer["w"] / scale) % 1 - 0.5) < 1e-5
  want, found = np.where(tie, 0, peer[f"{kind}_rounded"]), np.where(tie, 0, leaf.materialize().T)
  assert np.mean(tie) < 0.04
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_gptq_with_static_groups(peer, kind):
  """Inputs by activity, scales of the weights as they came: nearly every code; a flip of one moves those after it."""
  rounding = Rounding(4, kind == "symmetric", scale_dtype="float32")
  codes, fit, *_ = solve(
    jnp.asarray(peer["w"].T), jnp.asarray(peer["hessian"]), None, None, rounding=rounding, group_size=GROUP,
    order="activation", clip=False, sweeps=0, damping=0.01,
  )  # fmt: skip
  wide = lambda x: np.repeat(np.asarray(x), GROUP, axis=0)  # noqa: E731
  zero = 8 if fit.zero_point is None else wide(fit.zero_point)
  mine = (np.asarray(codes, np.float32) - zero) * wide(fit.scale)
  steps = np.abs(mine - peer[f"{kind}_gptq"].T) / wide(fit.scale)
  assert np.mean(steps > 0.5) < 0.01 and steps.max() < 1.5


def test_scales_of_smooth_quant(peer):
  """Alike but for a constant (the peer doubles the weights' range), which changes nothing."""
  scale = peer["absmax"] ** 0.6 / np.abs(peer["w"]).max(0) ** 0.4
  ratio = scale / peer["smooth"]
  np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)


def test_weights_that_awq_looks_at(peer):
  """The mean size of a channel within its groups, from which both make the same candidates."""
  np.testing.assert_allclose(relative_size(jnp.asarray(peer["w"].T), GROUP), peer["awq_weight_mean"], rtol=1e-4)


def test_the_table_of_nf4():
  """As published in the code of QLoRA (bitsandbytes, `create_normal_map`), to the digits printed there."""
  published = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
  )  # fmt: skip
  assert NF4.values == published
