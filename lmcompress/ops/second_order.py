"""Rounding by second-order error feedback: the error of each input is absorbed by the inputs not yet rounded."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from lmcompress.ops.removal import Removal, refit, remove_in_turn
from lmcompress.ops.rounding import Fit, Rounding, best_shrink

_BLOCK = 128
"""Inputs between two updates of all that is left, where one scale serves the whole row."""
_TRIES = 8


def warn_of_damping(name: str, path: str, used: Any, first: Any) -> None:
  """Says so where a Hessian took more damping than asked for, or could not be factored at all."""
  if isinstance(used, jax.core.Tracer):
    return  # shapes alone
  used, first = float(used), float(first)
  if not used <= 1.01 * first:
    found = "none works, this is done without feedback" if np.isinf(used) else f"{used:.3g} works"
    warnings.warn(
      f"{name} at {path}: the Hessian cannot be factored with damping {first:.3g}; {found}; "
      "more calibration tokens than inputs would help",
      RuntimeWarning,
      stacklevel=3,
    )


class Factor(NamedTuple):
  """`hessian + damping * I`, whose inverse is `upper.T @ upper`.

  Attributes:
    upper: `[in, in]`, upper triangular.
    damping: what was added, a scalar; infinite where no damping made the Hessian positive definite.
  """

  upper: jax.Array
  damping: jax.Array


def output_energy(error: jax.Array, hessian: jax.Array) -> jax.Array:
  """`||X error||**2` over outputs, up to the Hessian's factor: `sum(error * (H error))` for `error: [in, out]`."""
  return jnp.sum(error * jnp.matmul(hessian, error))


def inverse_factor(hessian: jax.Array, damping: float) -> Factor:
  """Factors the inverse of a damped Hessian by one Cholesky, of the matrix turned upside down.

  `J (H + d I) J = L L^T` with J the reversal gives `H + d I = R R^T` for the upper triangular `R = J L J`, so
  `U = R^-1`. JAX's Cholesky returns NaN instead of raising; then the damping is raised tenfold, up to 8 times.

  Args:
    damping: fraction of the mean of the diagonal.
  """
  n = hessian.shape[0]
  eye, first = jnp.eye(n, dtype=jnp.float32), damping * jnp.maximum(jnp.mean(jnp.diag(hessian)), 1e-30)

  def attempt(d: jax.Array) -> jax.Array:
    root = jnp.linalg.cholesky((hessian + d * eye)[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(root, eye, lower=False)

  def failed(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    tries, _, upper = state
    return (tries < _TRIES) & ~jnp.all(jnp.isfinite(upper))

  def again(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    tries, d, _ = state
    return tries + 1, 10 * d, attempt(10 * d)

  _, used, upper = jax.lax.while_loop(failed, again, (jnp.int32(1), first, attempt(first)))
  fine = jnp.all(jnp.isfinite(upper))
  return Factor(jnp.where(fine, upper, eye), jnp.where(fine, used, jnp.inf))


def _rows(fit: Fit, groups: Any) -> Fit:
  """The parameters `[groups, out]` of a fit for each of some inputs, by their group."""
  return jax.tree.map(lambda x: x[groups], fit._replace(stored=fit.scale))


def _one(fit: Fit, i: Any) -> Fit:
  return jax.tree.map(lambda x: x[i], fit)


def round_in_turn(
  w: jax.Array,
  upper: jax.Array,
  keep: jax.Array | None,
  rounding: Rounding,
  group: int,
  clip: bool,
  fit: Fit | None = None,
  group_of: jax.Array | None = None,
  parents: jax.Array | None = None,
  extra: int = 0,
) -> tuple[jax.Array, Fit]:
  """Rounds inputs one after another, each error spread over those that follow (Frantar et al. 2022, algorithm 1).

  Args:
    w: `[in, out]` float32 in the order in which inputs are rounded.
    upper: `[in, in]`, `inverse_factor`'s, in that order.
    keep: bool `[in, out]`, False for what stays 0; or None.
    group: inputs that are rounded between two updates of all that is left, a divisor of `in`.
    clip: shrinks each group's range to the least error weighed by `1 / upper_ii**2`, what the loop minimizes.
    fit: parameters fixed beforehand, `[groups, out]`, with `group_of: [in]`; else each `group` is fitted when its turn
      comes, to weights that carry the errors so far.
    parents: uint8 `[in, out]`: codes whose `extra` further bits alone are chosen.

  Returns:
    Codes uint8 `[in, out]` and the parameters `[groups, out]`, both in the order of `w`.
  """
  inputs, outputs = w.shape
  n = inputs // group
  at = jnp.arange(group)

  def block(w: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    i1 = b * group
    part = jax.lax.dynamic_slice(w, (i1, 0), (group, outputs))
    row = jax.lax.dynamic_slice(upper, (i1, 0), (group, inputs))
    own = jax.lax.dynamic_slice(row, (0, i1), (group, group))
    kept = None if keep is None else jax.lax.dynamic_slice(keep, (i1, 0), (group, outputs))
    diagonal = jnp.diag(own)
    least = None if parents is None else jax.lax.dynamic_slice(parents, (i1, 0), (group, outputs)) << extra
    if fit is None:
      real = part if kept is None else jnp.where(kept, part, 0.0)
      importance = (1.0 / (diagonal * diagonal))[:, None]
      here = rounding.fit(real, 0, best_shrink(rounding, real, 0, importance) if clip else 1.0)
      fits = jax.tree.map(lambda x: jnp.broadcast_to(x, (group, outputs)), here._replace(stored=here.scale))
    else:
      assert group_of is not None
      here, fits = None, _rows(fit, jax.lax.dynamic_slice(group_of, (i1,), (group,)))

    def one(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
      part, errors, codes = state
      value, mine = part[i], _one(fits, i)
      target = value if kept is None else jnp.where(kept[i], value, 0.0)
      code = rounding.encode(target[None], mine, 0)[0]
      code = code if least is None else jnp.clip(code, least[i], least[i] | (2**extra - 1))
      rounded = rounding.decode(code[None], mine, 0)[0]
      rounded = rounded if kept is None else jnp.where(kept[i], rounded, 0.0)
      error = (value - rounded) / diagonal[i]
      part = part - jnp.where(at > i, own[i], 0.0)[:, None] * error[None]
      return part, errors.at[i].set(error), codes.at[i].set(code)

    start = part, jnp.zeros_like(part), jnp.zeros(part.shape, jnp.uint8)
    _, errors, codes = jax.lax.fori_loop(0, group, one, start)
    later = jnp.where(jnp.arange(inputs) >= i1 + group, row, 0.0)
    return w - jnp.matmul(later.T, errors), (codes, here)

  _, (codes, fits) = jax.lax.scan(block, w, jnp.arange(n))
  return codes.reshape(inputs, outputs), fits if fit is None else fit


def descend(
  target: jax.Array,
  hessian: jax.Array,
  codes: jax.Array,
  keep: jax.Array | None,
  rounding: Rounding,
  fit: Fit,
  group: int,
) -> jax.Array:
  """One sweep of coordinate descent on `||X (target - value(codes))||`: each code to the best given all others.

  With `E = target - value` and `G = H E`, the best value of input i is `value_i + G_i / H_ii` (Behdin et al. 2023,
  QuantEase, arXiv:2309.01885). The error never rises. Inputs in their own order; `fit: [groups, out]`.

  Returns:
    The new codes.
  """
  inputs, outputs = target.shape
  n = inputs // group
  groups = codes.reshape(n, group, outputs)
  values = rounding.decode(groups, fit, 1).reshape(inputs, outputs)
  values = values if keep is None else jnp.where(keep, values, 0.0)

  def block(gradient: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    i1, mine = b * group, _one(fit, b)
    part = jax.lax.dynamic_slice(gradient, (i1, 0), (group, outputs))
    row = jax.lax.dynamic_slice(hessian, (i1, 0), (group, inputs))
    own = jax.lax.dynamic_slice(row, (0, i1), (group, group))
    before = jax.lax.dynamic_slice(values, (i1, 0), (group, outputs))
    kept = None if keep is None else jax.lax.dynamic_slice(keep, (i1, 0), (group, outputs))

    def one(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
      part, codes, moved = state
      best = before[i] + part[i] / own[i, i]
      best = best if kept is None else jnp.where(kept[i], best, 0.0)
      code = rounding.encode(best[None], mine, 0)[0]
      value = rounding.decode(code[None], mine, 0)[0]
      value = value if kept is None else jnp.where(kept[i], value, 0.0)
      change = value - before[i]
      part = part - own[:, i][:, None] * change[None]
      return part, codes.at[i].set(code), moved.at[i].set(change)

    start = part, groups[b], jnp.zeros_like(part)
    _, codes, moved = jax.lax.fori_loop(0, group, one, start)
    return gradient - jnp.matmul(row.T, moved), codes

  gradient = jnp.matmul(hessian, target - values)
  _, codes = jax.lax.scan(block, gradient, jnp.arange(n))
  return codes.reshape(inputs, outputs)


def _turns(diagonal: jax.Array, group: int, order: str, together: int = 1) -> jax.Array:
  """The order in which inputs are rounded, most active first; `group` keeps groups together.

  Args:
    together: consecutive inputs that stay so, a divisor of the group.
  """
  if together > 1:
    tuples = _turns(jnp.sum(diagonal.reshape(-1, together), axis=1), group // together, order)
    return (tuples[:, None] * together + jnp.arange(together)).reshape(-1)
  if order == "none":
    return jnp.arange(diagonal.shape[0])
  if order == "activation":
    return jnp.argsort(-diagonal, stable=True)
  energy = diagonal.reshape(-1, group)
  inside = jnp.argsort(-energy, axis=1, stable=True) + jnp.arange(energy.shape[0])[:, None] * group
  return inside[jnp.argsort(-jnp.sum(energy, axis=1), stable=True)].reshape(-1)


def without_drift(
  w: jax.Array, reference_hessian: jax.Array, factor: Factor, turn: jax.Array, dead: jax.Array, inputs: int
) -> jax.Array:
  """The weight that gives on today's inputs what `w` gave on those of the model before compression.

  The least squares solution `(H + d I)^-1 (R + d I) w`, with R the reference Hessian (Arai and Ichikawa 2025, QEP,
  arXiv:2504.09629); inputs that are always 0 stay.
  """
  n = w.shape[0]
  right = (jnp.matmul(reference_hessian, w) + factor.damping * w)[turn]
  best = jnp.matmul(factor.upper.T, jnp.matmul(factor.upper, right))[jnp.argsort(turn)]
  alive = (jnp.arange(n) < inputs) & ~dead
  return jnp.where(alive[:, None] & jnp.isfinite(factor.damping), best, w)


@functools.partial(jax.jit, static_argnames=("damping",))
def drift_corrected(
  w: jax.Array, hessian: jax.Array, reference_hessian: jax.Array, *, damping: float, share: Any
) -> jax.Array:
  """`w: [in, out]` moved by a share of the way to `without_drift`'s, inputs in their own order; float32."""
  w, turn, dead = w.astype(jnp.float32), jnp.arange(w.shape[0]), jnp.diag(hessian) == 0
  factor = inverse_factor(hessian + jnp.diag(jnp.where(dead, 1.0, 0.0)), damping)
  return w + share * (without_drift(w, reference_hessian, factor, turn, dead, w.shape[0]) - w)


class Solved(NamedTuple):
  """What `solve` found.

  Attributes:
    written: codes uint8 `[in, out]`; float32 values without a rounding.
    fit: parameters `[groups, out]`; None without a rounding.
    keep: bool `[in, out]`, what stays; None where nothing is masked.
    damping, first: the damping used, and the first one tried.
    extra: the extra bits of each code, in turn.
  """

  written: jax.Array
  fit: Fit | None
  keep: jax.Array | None
  damping: jax.Array
  first: jax.Array
  extra: list[jax.Array]


@functools.partial(
  jax.jit,
  static_argnames=(
    "rounding", "group_size", "order", "clip", "sweeps", "damping", "extra", "feedback", "refit_steps",
  ),
)
def solve(
  w: jax.Array,
  hessian: jax.Array,
  reference_hessian: jax.Array | None,
  keep: jax.Array | None,
  *,
  rounding: Rounding | None,
  group_size: int,
  order: str,
  clip: bool,
  sweeps: int,
  damping: float,
  propagation: Any = 0.0,
  extra: tuple[int, ...] = (),
  feedback: bool = True,
  removal: Removal | None = None,
  refit_steps: int = 0,
) -> Solved:
  """GPTQ or SparseGPT of one matrix, or of several side by side that read the same input.

  Args:
    w: `[in, out]`; hessian, reference_hessian: `[in, in]`; keep: bool `[in, out]` or None.
    rounding: None keeps values as they are, for a removal alone.
    group_size: inputs that share a scale, -1 for a row; without a rounding, inputs between two updates of the rest.
    sweeps: of coordinate descent over codes afterwards.
    propagation: how far `w` is first moved to undo what was done to its input, 0 to 1.
    extra: bits to add to each code afterwards, once or more often, for a grid with real minimums.
    feedback: whether errors are absorbed before the extra bits too; else each weight goes to its nearest code.
    removal: what to remove before anything is rounded.
    refit_steps: of `refit` after a removal.
  """
  inputs, outputs = w.shape
  w, hessian = w.astype(jnp.float32), hessian.astype(jnp.float32)
  dead = jnp.diag(hessian) == 0
  hessian = hessian + jnp.diag(jnp.where(dead, 1.0, 0.0))
  w = jnp.where(dead[:, None], 0.0, w)  # an input that is always 0
  per_row = group_size == -1 or group_size >= inputs
  group = _BLOCK if per_row else group_size
  together = max(1, removal.m) if removal is not None else 1
  group -= group % together
  spare = -inputs % group
  if spare:  # the last group is filled with inputs that nothing reads
    w = jnp.pad(w, ((0, spare), (0, 0)))
    keep = None if keep is None else jnp.pad(keep, ((0, spare), (0, 0)), constant_values=True)
    mean = jnp.mean(jnp.diag(hessian))
    unread = jnp.arange(inputs + spare) >= inputs
    hessian = jnp.pad(hessian, ((0, spare), (0, spare))) + jnp.diag(jnp.where(unread, mean, 0.0))
    if reference_hessian is not None:
      reference_hessian = jnp.pad(reference_hessian, ((0, spare), (0, spare)))
  total = inputs + spare
  diagonal, groups = jnp.diag(hessian), total // group
  turn = _turns(diagonal, group, "activation" if per_row and order == "group" else order, together)
  factor = inverse_factor(hessian[turn][:, turn], damping)
  if reference_hessian is not None:
    silent = jnp.pad(dead, (0, spare))
    w = w + propagation * (without_drift(w, reference_hessian, factor, turn, silent, inputs) - w)

  back, target = jnp.argsort(turn), w
  damped = hessian + jnp.where(jnp.isfinite(factor.damping), factor.damping, 0.0) * jnp.eye(total)
  if removal is not None:
    w, keep = remove_in_turn(w[turn], factor.upper, None if keep is None else keep[turn], removal, group, turn < inputs)
    w, keep = w[back], keep[back]
    w = refit(target, damped, w, keep, refit_steps) if refit_steps else w
  first = damping * jnp.mean(diagonal)
  if rounding is None:
    return Solved(w[:inputs], None, _first(keep, inputs), factor.damping, first, [])
  group_of = jnp.arange(total) // group
  fit = None
  if per_row:
    real = w if keep is None else jnp.where(keep, w, 0.0)
    shrink = best_shrink(rounding, real, 0, diagonal[:, None]) if clip else 1.0
    fit = jax.tree.map(lambda x: x[None], rounding.fit(real, 0, shrink))
    group_of = jnp.zeros(total, jnp.int32)
  elif order == "activation":
    real = (w if keep is None else jnp.where(keep, w, 0.0)).reshape(groups, group, outputs)
    shrink = best_shrink(rounding, real, 1, diagonal.reshape(groups, group, 1)) if clip else 1.0
    fit = rounding.fit(real, 1, shrink)
  upper = factor.upper if feedback else jnp.diag(jnp.diag(factor.upper))
  written, fit = round_in_turn(
    w[turn], upper, None if keep is None else keep[turn], rounding, group, clip, fit, group_of[turn]
  )
  written = written[back]
  if not per_row and order != "activation":
    fit = jax.tree.map(lambda x: x[jnp.argsort(turn[::group] // group)], fit)
  wide = fit
  if per_row:
    wide = jax.tree.map(lambda x: jnp.broadcast_to(x, (groups, outputs)), fit._replace(stored=fit.scale))
  for _ in range(sweeps):
    written = descend(target, hessian + factor.damping * jnp.eye(total), written, keep, rounding, wide, group)
  more, finer, whole = [], fit, written
  for bits in extra:
    rounding = dataclasses.replace(rounding, bits=rounding.bits + bits)
    step = finer.scale / 2**bits
    finer = Fit(step, step, None, finer.minimum - (finer.scale - step) / 2)
    whole, _ = round_in_turn(
      w[turn], factor.upper, None, rounding, group, False, finer, group_of[turn], whole[turn], bits
    )
    whole = whole[back]
    more.append(whole[:inputs] & (2**bits - 1))
  return Solved(written[:inputs], fit, _first(keep, inputs), factor.damping, first, more)


def _first(keep: jax.Array | None, inputs: int) -> jax.Array | None:
  return None if keep is None else keep[:inputs]
