"""LLM.int8: input channels with outliers kept in 16 bits, the rest of the weight and of its input in 8 or 4."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.arrays import ACTS, split, with_act
from lmcompress.ops.rounding import quantize
from lmcompress.transforms.combine import require_dense, stagewise
from lmcompress.transforms.round_to_nearest import quantize_matrix
from lmcompress.transforms.smooth_quant import ActName
from lmcompress.types import Transform, WeightError


def llm_int8(
  bits: int = 8,
  group_size: int = -1,
  threshold: float | None = 6.0,
  fraction: float | None = None,
  outlier_bits: Literal[8, 16] = 16,
  activations: ActName | Literal["none"] = "int8_per_token",
) -> Transform:
  """Two precisions in one weight (Dettmers et al. 2022, arXiv:2208.07339), its outlier channels found by calibration.

  Linears that read one input keep the same channels apart.

  Args:
    bits, group_size: of the rest, symmetric; -1 is one scale for each output.
    threshold: a channel is an outlier where its input exceeds this on the calibration text, as in the paper.
    fraction: instead, this share of the channels, those that rounding the weight hurts most: the largest
      `E[x_j**2] * ||w_j - Q(w_j)||**2` (Lee et al. 2023, OWQ, arXiv:2306.02272). Set `threshold` to null.
    outlier_bits: 16 stores those channels in bfloat16, 8 in integers with a scale for each output.
    activations: what the rest of the input is rounded to, as in `quantize_inputs`; `none` leaves it.

  Raises:
    ValueError: an argument is out of range, or both or neither of `threshold` and `fraction` are given.
    WeightError (when planned): a group larger than the row, a quantized or masked weight, NaN or infinity.
  """
  if not 2 <= bits <= 8 or group_size == 0 or group_size < -1 or outlier_bits not in (8, 16):
    raise ValueError(
      f"llm_int8(bits={bits}, group_size={group_size}, outlier_bits={outlier_bits}): bits are 2 to 8, a group "
      "at least 1 or -1, outliers have 8 or 16 bits"
    )
  if (threshold is None) == (fraction is None):
    raise ValueError(f"llm_int8(threshold={threshold}, fraction={fraction}): give one of them, and the other as null")
  if (threshold is not None and not threshold > 0) or (fraction is not None and not 0 < fraction < 1):
    raise ValueError(f"llm_int8(threshold={threshold}, fraction={fraction}): above 0, a fraction below 1")
  if activations not in (*ACTS, "none"):
    raise ValueError(f"llm_int8(activations={activations!r}): one of {', '.join(ACTS)}, none")

  def check(path: str, leaf: Any) -> None:
    require_dense("llm_int8", path, leaf)
    if not isinstance(leaf, jax.Array):
      raise WeightError(f"llm_int8 at {path}: the weight is {leaf.kind}; start from dense weights")
    if group_size > leaf.shape[-2]:
      raise WeightError(f"llm_int8(group_size={group_size}) at {path}: a row has {leaf.shape[-2]} inputs")

  def apart(weights: dict[str, Any], **statistics: jax.Array) -> dict[str, Any]:
    w = jnp.concatenate([w.astype(jnp.float32) for w in weights.values()], axis=1)
    channels = _channels(w, bits, group_size, threshold, fraction, **statistics)
    return {path: one(w, channels) for path, w in weights.items()}

  def one(w: jax.Array, channels: np.ndarray) -> Any:
    rest = w.at[channels].set(0)  # so that outliers stretch no scale
    base: Any = quantize_matrix(rest, bits=bits, group_size=group_size, convention="narrow")
    base = base if activations == "none" else with_act(base, ACTS[activations], -2)
    if not channels.size:
      return base
    outliers: Any = w[channels].astype(jnp.bfloat16)
    if outlier_bits == 8:
      outliers = quantize(w[channels], bits=8, convention="narrow")
    return split(base, outliers, jnp.asarray(channels), -2)

  needs = {"absmax"} if fraction is None else {"second_moment"}
  return stagewise(apart, name="llm_int8", needs=frozenset(needs), check=check)


def _channels(
  w: jax.Array, bits: int, group_size: int, threshold: float | None, fraction: float | None,
  absmax: Any = None, second_moment: Any = None,
) -> np.ndarray:  # fmt: skip
  """The input channels to keep apart, ascending; never all of them."""
  if fraction is None:
    found = np.argsort(-np.asarray(absmax), kind="stable")[: int(np.sum(np.asarray(absmax) > threshold))]
    return np.sort(found[: w.shape[0] - 1])
  rounded = quantize_matrix(w, bits=bits, group_size=group_size, convention="narrow").materialize()
  hurt = np.asarray(second_moment * jnp.sum((w - rounded) ** 2, axis=1))
  count = min(max(1, round(fraction * w.shape[0])), w.shape[0] - 1)
  return np.sort(np.argsort(-hurt, kind="stable")[:count])
