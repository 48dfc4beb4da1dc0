"""AWQ: input channels that matter are scaled up before rounding, by what the activations say matters."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmcompress.ops.rounding import Rounding, grouped, ungrouped
from lmcompress.ops.second_order import output_energy
from lmcompress.transforms.combine import named_chain, require_dense, stagewise
from lmcompress.transforms.rescale import rescale
from lmcompress.types import Transform, WeightError

_STEPS = 20


def awq_scale(
  bits: int = 4, group_size: int = 64, symmetric: bool = False, scale_dtype: Literal["float32", "bfloat16"] = "bfloat16"
) -> Transform:
  """Scales input channels so that rounding hurts least (Lin et al. 2023, arXiv:2306.00978), and rounds nothing.

  Of `s = x**r` and `s = x**r / w**(1 - r)`, with x the mean activation and w the mean relative weight of a channel and
  r from 0 to 0.95, the one whose rounded weight gives the least output error `||X (W - Q(W s) / s)||`, which the
  Hessian tells. To be followed by a method that rounds with the same bits, such as `gptq`.

  Args:
    bits, group_size, symmetric, scale_dtype: of the rounding that is to follow.
  """
  rounding = _rounding("awq_scale", bits, group_size, symmetric, scale_dtype)

  def find(weights: list[jax.Array], share: Any, hessian: jax.Array, mean_abs: jax.Array) -> jax.Array:
    w = jnp.concatenate([w.astype(jnp.float32) for w in weights], axis=1)
    return best_scale(w, hessian, share(mean_abs), share(relative_size(w, group_size)), rounding, group_size)

  return rescale("awq_scale", find, frozenset({"hessian", "mean_abs"}))


def awq(
  bits: int = 4,
  group_size: int = 64,
  symmetric: bool = False,
  clip: bool = True,
  scale_dtype: Literal["float32", "bfloat16"] = "bfloat16",
) -> Transform:
  """Scales channels (`awq_scale`), shrinks ranges and rounds (Lin et al. 2023, arXiv:2306.00978).

  Args:
    bits: width of a code, 2 to 8.
    group_size: inputs that share a scale; -1 for a whole row.
    symmetric: no zero point.
    clip: shrinks the range of each group to the least error of its part of the output.
    scale_dtype: storage of scales.
  """
  rounding = _rounding("awq", bits, group_size, symmetric, scale_dtype)

  def check(path: str, leaf: Any) -> None:
    require_dense("awq", path, leaf)
    if group_size > leaf.shape[-2]:
      raise WeightError(f"awq(group_size={group_size}) at {path}: a row has {leaf.shape[-2]} inputs; use at most that")

  def quantize(weights: dict[str, Any], hessian: jax.Array) -> dict[str, Any]:
    options: dict[str, Any] = {"rounding": rounding, "group_size": group_size, "clip": clip}
    return {path: round_clipped(w, hessian, **options) for path, w in weights.items()}

  rounds = stagewise(quantize, name="round", needs=frozenset({"hessian"}), check=check)
  scale = awq_scale(bits, group_size, symmetric, scale_dtype)
  return named_chain(("awq scale", scale), ("awq round", rounds))._replace(name="awq")


def _rounding(name: str, bits: int, group_size: int, symmetric: bool, scale_dtype: str) -> Rounding:
  if not 2 <= bits <= 8:
    raise ValueError(f"{name}(bits={bits}): bits are 2 to 8")
  if group_size != -1 and group_size < 1:
    raise ValueError(f"{name}(group_size={group_size}): at least 1, or -1 for a whole row")
  return Rounding(bits, symmetric, scale_dtype=scale_dtype)


@functools.partial(jax.jit, static_argnames=("group_size",))
def relative_size(w: jax.Array, group_size: int) -> jax.Array:
  """The mean over outputs of `|w| / max |w| of its group`, `[in]`."""
  g = jnp.abs(grouped(w, group_size, -2))
  relative = g / jnp.maximum(jnp.max(g, axis=-2, keepdims=True), 1e-12)
  return jnp.mean(ungrouped(relative, w.shape[0], -2), axis=1)


@functools.partial(jax.jit, static_argnames=("rounding", "group_size"))
def best_scale(
  w: jax.Array, hessian: jax.Array, activation: jax.Array, size: jax.Array, rounding: Rounding, group_size: int
) -> jax.Array:
  """The channel scales of `awq_scale` for one matrix.

  Args:
    w: `[in, out]`; hessian: `[in, in]`.
    activation, size: `[in]`, the mean activation and `relative_size`.
  """

  def scale_of(i: jax.Array) -> jax.Array:
    ratio = (i % _STEPS) / _STEPS
    s = jnp.maximum(activation, 1e-6) ** ratio
    s = jnp.where(i < _STEPS, s, s / (size ** (1 - ratio) + 1e-4))
    s = jnp.clip(s, 1e-4, 1e4)
    return s / jnp.sqrt(jnp.max(s) * jnp.min(s))

  def loss(i: jax.Array) -> jax.Array:
    s = scale_of(i)[:, None]
    error = _rounded(w * s, rounding, group_size, 1.0) / s - w
    return output_energy(error, hessian)

  losses = jax.lax.map(loss, jnp.arange(2 * _STEPS))
  return scale_of(jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf)))


def _rounded(w: jax.Array, rounding: Rounding, group_size: int, shrink: Any) -> jax.Array:
  g = grouped(w, group_size, -2)
  fit = rounding.fit(g, -2, shrink)
  return ungrouped(rounding.decode(rounding.encode(g, fit, -2), fit, -2), w.shape[0], -2)


@functools.partial(jax.jit, static_argnames=("rounding", "group_size", "clip"))
def round_clipped(w: jax.Array, hessian: jax.Array, *, rounding: Rounding, group_size: int, clip: bool) -> Any:
  """Rounds `w: [in, out]`, each group's range shrunk to the least `|| X_group (w - q) ||`."""
  g = grouped(w.astype(jnp.float32), group_size, -2)
  shrink = 1.0
  if clip:
    groups, size = g.shape[0], g.shape[1]
    spare = groups * size - w.shape[0]
    whole = jnp.pad(hessian, ((0, spare), (0, spare))).reshape(groups, size, groups, size)
    own = whole[jnp.arange(groups), :, jnp.arange(groups)]  # [groups, size, size]

    def loss(shrink: jax.Array) -> jax.Array:
      fit = rounding.fit(g, -2, shrink)
      error = rounding.decode(rounding.encode(g, fit, -2), fit, -2) - g
      return jnp.sum(error * jnp.matmul(own, error), axis=-2)

    tried = 1.0 - jnp.arange(_STEPS) / (2 * _STEPS)
    shrink = tried[jnp.argmin(jax.lax.map(loss, tried), axis=0)]
  fit = rounding.fit(g, -2, shrink)
  codes = ungrouped(rounding.encode(g, fit, -2), w.shape[0], -2)
  return rounding.assemble(codes, fit, group_size, -2, str(w.dtype))
