"""Rounding vectors of inputs in turn: the error of each vector is absorbed by the inputs not yet rounded."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress.arrays.lattice import VECTOR, LatticeArray, decode, encode
from lmcompress.ops.rounding import store
from lmcompress.ops.second_order import inverse_factor, without_drift

_BLOCK = 64
"""Inputs between two updates of all that is left."""


_FAR = 1e4
"""In units of the scale: what lies beyond has the same nearest point, and its square is finite."""


def _nearest(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Codes `[out]` and values `[8, out]` of `x: [8, out]`."""
  codes = encode(jnp.clip(x / scale, -_FAR, _FAR).T)
  return codes, decode(codes).T * scale


def round_vectors(w: jax.Array, upper: jax.Array, scale: jax.Array) -> jax.Array:
  """Block LDLQ (Tseng et al. 2024, QuIP#, arXiv:2402.04396, section 4.1): codes uint16 `[in / 8, out]`.

  The inputs that are left move by `U_BR^T U_BB^-T e` where B is the vector and e its error, the step of GPTQ for eight
  inputs at once.

  Args:
    w: `[in, out]` float32 in the order in which vectors are rounded; `in` is a multiple of 64.
    upper: `[in, in]`, `inverse_factor`'s, in that order.
    scale: `[in / 8, out]`.
  """
  inputs, outputs = w.shape
  each = _BLOCK // VECTOR

  def block(w: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    i1 = b * _BLOCK
    row = jax.lax.dynamic_slice(upper, (i1, 0), (_BLOCK, inputs))
    own = jax.lax.dynamic_slice(row, (0, i1), (_BLOCK, _BLOCK))
    scales = jax.lax.dynamic_slice(scale, (b * each, 0), (each, outputs))

    def one(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      part, errors, codes = state
      at = j * VECTOR
      target = jax.lax.dynamic_slice(part, (at, 0), (VECTOR, outputs))
      code, value = _nearest(target, scales[j])
      rows = jax.lax.dynamic_slice(own, (at, 0), (VECTOR, _BLOCK))
      corner = jax.lax.dynamic_slice(rows, (0, at), (VECTOR, VECTOR))
      error = jax.scipy.linalg.solve_triangular(corner, target - value, trans="T", lower=False)
      later = jnp.where(jnp.arange(_BLOCK) >= at + VECTOR, rows, 0.0)
      part = part - jnp.matmul(later.T, error)
      return part, jax.lax.dynamic_update_slice(errors, error, (at, 0)), codes.at[j].set(code)

    part = jax.lax.dynamic_slice(w, (i1, 0), (_BLOCK, outputs))
    start = part, jnp.zeros_like(part), jnp.zeros((each, outputs), jnp.uint16)
    _, errors, codes = jax.lax.fori_loop(0, each, one, start)
    later = jnp.where(jnp.arange(inputs) >= i1 + _BLOCK, row, 0.0)
    return w - jnp.matmul(later.T, errors), codes

  _, codes = jax.lax.scan(block, w, jnp.arange(inputs // _BLOCK))
  return codes.reshape(inputs // VECTOR, outputs)


def descend_vectors(target: jax.Array, hessian: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
  """One sweep over the vectors: each moves to the point nearest its best given all others, where that lowers the error.

  With `E = target - value` and `G = H E`, the best values of vector B are `value_B + H_BB^-1 G_B`, and moving by d
  changes `||X E||^2` by `d^T H_BB d - 2 d^T G_B`.
  """
  inputs, outputs = target.shape
  values = (decode(codes) * scale[..., None]).transpose(0, 2, 1).reshape(inputs, outputs)

  def one(state: tuple[jax.Array, jax.Array], j: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    gradient, codes = state
    at = j * VECTOR
    rows = jax.lax.dynamic_slice(hessian, (at, 0), (VECTOR, inputs))
    corner = jax.lax.dynamic_slice(rows, (0, at), (VECTOR, VECTOR))
    g = jax.lax.dynamic_slice(gradient, (at, 0), (VECTOR, outputs))
    before = jax.lax.dynamic_slice(values, (at, 0), (VECTOR, outputs))
    code, value = _nearest(before + jnp.linalg.solve(corner, g), scale[j])
    change = value - before
    better = jnp.sum(change * (jnp.matmul(corner, change) - 2 * g), axis=0) < 0
    change = jnp.where(better, change, 0.0)
    code = jnp.where(better, code, codes[j])
    return (gradient - jnp.matmul(rows.T, change), codes.at[j].set(code)), code

  gradient = jnp.matmul(hessian, target - values)
  (_, codes), _ = jax.lax.scan(one, (gradient, codes), jnp.arange(inputs // VECTOR))
  return codes


def _fitted(target: jax.Array, hessian: jax.Array, codes: jax.Array, per: int, scale: jax.Array) -> jax.Array:
  """The scales `[groups, out]` of least error for given codes, group after group, others as they are."""
  inputs, outputs = target.shape
  shapes = decode(codes).transpose(0, 2, 1).reshape(inputs, outputs)
  groups = inputs // per

  def one(state: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
    gradient, scale = state
    rows = jax.lax.dynamic_slice(hessian, (g * per, 0), (per, inputs))
    corner = jax.lax.dynamic_slice(rows, (0, g * per), (per, per))
    v = jax.lax.dynamic_slice(shapes, (g * per, 0), (per, outputs))
    here = jax.lax.dynamic_slice(gradient, (g * per, 0), (per, outputs))
    energy = jnp.sum(v * jnp.matmul(corner, v), axis=0)
    moved = jnp.where(energy > 0, jnp.sum(v * here, axis=0) / jnp.where(energy > 0, energy, 1.0), 0.0)
    moved = jnp.where(scale[g] + moved > 0.1 * scale[g], moved, 0.0)
    return (gradient - jnp.matmul(rows.T, v * moved), scale.at[g].add(moved)), None

  wide = jnp.repeat(scale, per, axis=0)
  gradient = jnp.matmul(hessian, target - shapes * wide)
  return jax.lax.scan(one, (gradient, scale), jnp.arange(groups))[0][1]


@functools.partial(jax.jit, static_argnames=("group_size", "sweeps", "damping", "spread", "scale_dtype"))
def solve_lattice(
  w: jax.Array,
  hessian: jax.Array,
  reference_hessian: jax.Array | None,
  *,
  group_size: int,
  sweeps: int,
  damping: float,
  spread: float,
  scale_dtype: str,
  propagation: Any = 0.0,
) -> tuple[LatticeArray, jax.Array, jax.Array]:
  """Codes of one matrix, or of several side by side that read the same input; the arguments are `quip_sharp`'s.

  Args:
    w: `[in, out]`; hessian, reference_hessian: `[in, in]`.

  Returns:
    The array `[in, out]`, the damping used and the first one tried.
  """
  inputs, outputs = w.shape
  w, hessian = w.astype(jnp.float32), hessian.astype(jnp.float32)
  dead = jnp.diag(hessian) == 0
  hessian = hessian + jnp.diag(jnp.where(dead, 1.0, 0.0))
  w = jnp.where(dead[:, None], 0.0, w)  # an input that is always 0
  size = group_size if group_size != -1 and group_size < inputs else -1
  unit = _BLOCK if size == -1 else max(_BLOCK, size) if max(_BLOCK, size) % size == 0 else _BLOCK * size
  spare, mean = -inputs % unit, jnp.mean(jnp.diag(hessian))
  total = inputs + spare
  unread = jnp.arange(total) >= inputs
  w = jnp.pad(w, ((0, spare), (0, 0)))
  hessian = jnp.pad(hessian, ((0, spare), (0, spare))) + jnp.diag(jnp.where(unread, mean, 0.0))
  energy = jnp.where(unread, -1.0, jnp.diag(hessian)).reshape(-1, VECTOR)
  vectors = jnp.argsort(-jnp.sum(energy, axis=1), stable=True)
  turn = (vectors[:, None] * VECTOR + jnp.arange(VECTOR)).reshape(-1)
  factor = inverse_factor(hessian[turn][:, turn], damping)
  if reference_hessian is not None:
    reference = jnp.pad(reference_hessian, ((0, spare), (0, spare)))
    w = w + propagation * (without_drift(w, reference, factor, turn, jnp.pad(dead, (0, spare)), inputs) - w)
  per = total if size == -1 else size
  groups = w.reshape(-1, per, outputs)
  alive = ~unread & ~jnp.pad(dead, (0, spare))
  count = jnp.maximum(jnp.sum(alive.reshape(-1, per), axis=1), 1)[:, None]
  scale = jnp.sqrt(jnp.sum(groups * groups, axis=1) / count) / spread
  scale = store(jnp.maximum(scale, jnp.finfo(jnp.float32).tiny), scale_dtype).astype(jnp.float32)  # no point is 0
  wide = lambda s: jnp.repeat(s, per // VECTOR, axis=0)  # noqa: E731
  codes = round_vectors(w[turn], factor.upper, wide(scale)[vectors])[jnp.argsort(vectors)]
  damped = hessian + jnp.where(jnp.isfinite(factor.damping), factor.damping, 0.0) * jnp.eye(total)
  for _ in range(sweeps):
    scale = store(_fitted(w, damped, codes, per, scale), scale_dtype).astype(jnp.float32)
    codes = descend_vectors(w, damped, codes, wide(scale))
  pad = -inputs % VECTOR
  kept = 1 if size == -1 else -(-inputs // size)
  array = LatticeArray(codes[: (inputs + pad) // VECTOR], scale[:kept].astype(scale_dtype), -2, pad, size, "float32")
  return array, factor.damping, damping * jnp.mean(jnp.diag(hessian))
