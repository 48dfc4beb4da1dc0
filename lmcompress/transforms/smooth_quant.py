"""SmoothQuant: outliers of activations moved into the weights, so that both can be rounded to 8 bits."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.arrays import ACTS, FixedStep, InputArray, Int8Static, with_act
from lmcompress.ops.observers import OBSERVERS
from lmcompress.transforms.combine import INPUTS, leafwise, named_chain, stagewise
from lmcompress.transforms.rescale import rescale
from lmcompress.transforms.round_to_nearest import round_to_nearest
from lmcompress.types import Transform, WeightError

ActName = Literal["int8_per_token", "int8_per_group", "fp8_per_token", "uint8_per_tensor"]


def smooth(alpha: float = 0.5, sources: Literal["norms", "all"] = "norms") -> Transform:
  """Divides input channel j by `max |X_j|**alpha / max |W_j|**(1 - alpha)`, and rounds nothing (arXiv:2211.10438).

  Args:
    alpha: how much of the difficulty moves from activations to weights, 0 to 1.
    sources: `norms` rescales what a norm feeds, as the paper does; `all` also what a linear feeds (through values and
      gated products).
  """
  if not 0 <= alpha <= 1:
    raise ValueError(f"smooth(alpha={alpha}): 0 to 1")

  def find(weights: list[jax.Array], share: Any, absmax: jax.Array) -> jax.Array:
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(w), axis=1) for w in weights]), axis=0).astype(jnp.float32)
    scale = jnp.maximum(absmax, 1e-5) ** alpha / jnp.maximum(largest, 1e-5) ** (1 - alpha)
    return share(jnp.where(absmax > 0, jnp.maximum(scale, 1e-5), 1.0))

  return rescale("smooth", find, frozenset({"absmax"}), norms_only=sources == "norms")


def smooth_quant(
  alpha: float = 0.5,
  bits: int = 8,
  group_size: int = -1,
  activations: ActName = "int8_per_group",
  sources: Literal["norms", "all"] = "norms",
) -> Transform:
  """Smooths, rounds weights, and rounds activations at run time (Xiao et al. 2022, arXiv:2211.10438): W8A8.

  Args:
    alpha, sources: as in `smooth`.
    bits, group_size: of the weights, symmetric; -1 is one scale for each output.
    activations: as in `quantize_inputs`.
  """
  return named_chain(
    ("smooth", smooth(alpha, sources)),
    ("round weights", round_to_nearest(bits, group_size, convention="narrow")),
    ("round inputs", quantize_inputs(activations)),
  )._replace(name="smooth_quant")


def quantize_activations(step: float) -> Transform:
  """Rounds what layers hand on to multiples of a fixed step: `round(x / step) * step` at the input of each weight.

  Args:
    step: the distance of two values; the report of `compress` and the perplexity tell what it costs.
  """
  if not 0 < step < float("inf"):
    raise ValueError(f"quantize_activations(step={step}): a step is a positive number")

  def wrap(w: Any, *, axis: int) -> InputArray:
    return with_act(w, FixedStep(float(step)), axis)

  check = functools.partial(fresh_input, "quantize_activations")
  return leafwise(wrap, name="quantize_activations", check=check)._replace(inputs=True)


def fresh_input(name: str, path: str, leaf: Any) -> None:
  """Raises WeightError where something is done to an input already."""
  if isinstance(leaf, INPUTS):
    raise WeightError(f"{name} at {path}: its input is acted on already ({leaf.kind}); do so once")


def quantize_inputs(
  activations: ActName | Literal["int8_static"] = "int8_per_token",
  observer: Literal["absmax", "percentile", "mse"] = "mse",
  percentile: float = 99.99,
) -> Transform:
  """Rounds the input of each weight at run time; integer codes of both are multiplied as integers.

  Args:
    activations: `int8_per_token` has a scale for each token (arXiv:2206.01861); `int8_per_group` one for every 32
      inputs of it, which outliers spoil less (the CPU kernels multiply both); `fp8_per_token` rounds to e4m3;
      `uint8_per_tensor` has one scale and one zero for all tokens of a call, as onnxruntime rounds at run time;
      `int8_static` has one scale for all tokens, found on the calibration text (the products of these two are float
      ones here).
    observer: how a static scale is found: `absmax` covers every input, `percentile` that share of them, `mse` loses
      least in the mean square.
    percentile: of `percentile`, 50 to 100.
  """
  if activations not in (*ACTS, "int8_static"):
    raise ValueError(f"quantize_inputs(activations={activations!r}): one of {', '.join(ACTS)}, int8_static")
  if observer not in OBSERVERS or not 50 <= percentile <= 100:
    raise ValueError(
      f"quantize_inputs(observer={observer!r}, percentile={percentile}): one of {', '.join(OBSERVERS)}; from 50 to 100"
    )

  def wrap(w: Any, *, axis: int) -> InputArray:
    return with_act(w, ACTS[activations], axis)

  def fixed(weights: dict[str, Any], histogram: jax.Array) -> dict[str, Any]:
    counts = np.asarray(histogram, np.float64)
    limit = OBSERVERS[observer](counts, percentile) if observer == "percentile" else OBSERVERS[observer](counts)
    return {path: with_act(w, Int8Static(limit / 127), -2) for path, w in weights.items()}

  check = functools.partial(fresh_input, "quantize_inputs")
  if activations == "int8_static":
    return stagewise(fixed, name="quantize_inputs", needs=frozenset({"histogram"}), check=check)._replace(inputs=True)
  return leafwise(wrap, name="quantize_inputs", check=check)._replace(inputs=True)
