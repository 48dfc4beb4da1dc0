"""Removing by second-order error feedback: what a weight gave is taken over by the inputs not yet done."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.ops.masks import Target, n_of_m, smallest


@functools.partial(jax.tree_util.register_dataclass, data_fields=("totals",), meta_fields=("outputs", "n", "m"))
@dataclasses.dataclass(frozen=True)
class Removal:
  """What is removed on the way: of each block of inputs, the least `w_i**2 / upper_ii**2`.

  How much is an array, so that one compiled program serves every sparsity.

  Attributes:
    totals: int32 `[weights]`, entries that go of each of the weights that stand side by side.
    outputs: of each of them.
    n, m: kept of how many, instead; 0 for totals.
  """

  totals: jax.Array
  outputs: tuple[int, ...]
  n: int = 0
  m: int = 0

  @classmethod
  def of(cls, target: Target, inputs: int, outputs: tuple[int, ...]) -> Removal:
    """Each weight meets the target by itself."""
    totals = jnp.asarray([target.removed(inputs * n) for n in outputs], jnp.int32)
    return cls(totals, outputs, target.n, target.m)

  def keep(self, part: jax.Array, diagonal: jax.Array, counts: jax.Array) -> jax.Array:
    """True for what stays of a block.

    Args:
      part: `[group, out]`; diagonal: `[group]`, 0 for an input that is to stay.
      counts: `[weights]`, how many entries of each to remove; a pattern does not read it.
    """
    filled = diagonal[:, None] > 0
    score = jnp.where(filled, jnp.square(part / jnp.where(filled, diagonal[:, None], 1.0)), jnp.inf)
    if self.m:
      return n_of_m(score, self.n, self.m, -2)
    ends = np.cumsum(self.outputs)[:-1].tolist()
    parts = jnp.split(score, ends, axis=1)
    return ~jnp.concatenate([smallest(s, counts[i]) for i, s in enumerate(parts)], axis=1)

  def counts(self, real: jax.Array) -> jax.Array:
    """`[blocks, weights]`: removals for each block of `real: [blocks, group]`, in proportion and exact in all."""
    inputs, so_far = jnp.sum(real, dtype=jnp.int32), jnp.cumsum(jnp.sum(real, axis=1, dtype=jnp.int32))
    whole, rest = self.totals // inputs, self.totals % inputs  # so that no product leaves 32 bits
    return jnp.diff(whole * so_far[:, None] + rest * so_far[:, None] // inputs, axis=0, prepend=0)


def remove_in_turn(
  w: jax.Array, upper: jax.Array, keep: jax.Array | None, removal: Removal, group: int, real: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Removes weights input by input, each error spread over those that follow (Frantar and Alistarh 2023, algorithm 1).

  What goes is chosen block by block, and for a pattern among each m inputs at their turn, from weights that carry the
  errors so far (SparseGPT, arXiv:2301.00774).

  Args:
    w: `[in, out]` float32 in the order of turns; upper: `[in, in]`, `inverse_factor`'s, in that order.
    keep: bool `[in, out]`, False for what is 0 already; or None.
    group: inputs of a block, a divisor of `in`, and a multiple of a pattern's m.
    real: bool `[in]`, False for inputs that only fill up the last block; they stay.

  Returns:
    Values and what stays, `[in, out]`.
  """
  inputs, outputs = w.shape
  n, at = inputs // group, jnp.arange(group)
  counts = removal.counts(real.reshape(n, group))
  m = removal.m

  def block(w: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    i1 = b * group
    part = jax.lax.dynamic_slice(w, (i1, 0), (group, outputs))
    row = jax.lax.dynamic_slice(upper, (i1, 0), (group, inputs))
    own = jax.lax.dynamic_slice(row, (0, i1), (group, group))
    old = jnp.ones(part.shape, bool) if keep is None else jax.lax.dynamic_slice(keep, (i1, 0), (group, outputs))
    diagonal = jnp.diag(own)
    staying = jnp.where(jax.lax.dynamic_slice(real, (i1,), (group,)), diagonal, 0.0)

    def choose(part: jax.Array, diagonal: jax.Array, old: jax.Array) -> jax.Array:
      return removal.keep(jnp.where(old, part, 0.0), diagonal, counts[b]) & old

    def one(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      part, errors, kept = state
      if m:

        def again(kept: jax.Array) -> jax.Array:
          few, before = (jax.lax.dynamic_slice(x, (i, 0), (m, outputs)) for x in (part, old))
          mine = choose(few, jax.lax.dynamic_slice(staying, (i,), (m,)), before)
          return jax.lax.dynamic_update_slice(kept, mine, (i, 0))

        kept = jax.lax.cond(i % m == 0, again, lambda kept: kept, kept)
      error = jnp.where(kept[i], 0.0, part[i]) / diagonal[i]
      return part - jnp.where(at > i, own[i], 0.0)[:, None] * error[None], errors.at[i].set(error), kept

    start = part, jnp.zeros_like(part), old if m else choose(part, staying, old)
    part, errors, kept = jax.lax.fori_loop(0, group, one, start)
    later = jnp.where(jnp.arange(inputs) >= i1 + group, row, 0.0)
    return w - jnp.matmul(later.T, errors), (jnp.where(kept, part, 0.0), kept)

  _, (values, kept) = jax.lax.scan(block, w, jnp.arange(n))
  return values.reshape(inputs, outputs), kept.reshape(inputs, outputs)


def refit(
  target: jax.Array, hessian: jax.Array, values: jax.Array, keep: jax.Array, steps: int
) -> jax.Array:
  """Values on a fixed support nearer to the least `||X (target - values)||`, by preconditioned conjugate gradients.

  Each output by itself (Meng et al. 2024, ALPS, arXiv:2406.07831, section 3.3). The error never rises.

  Args:
    target, values: `[in, out]`; hessian: `[in, in]`, positive definite; keep: bool `[in, out]`, the support.
    steps: of conjugate gradients.
  """
  diagonal = jnp.diag(hessian)[:, None]

  def residual(v: jax.Array) -> jax.Array:
    return jnp.where(keep, jnp.matmul(hessian, v), 0.0)

  def step(_: Any, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    x, r, p, rz = state
    hp = residual(p)
    length = rz / jnp.maximum(jnp.sum(p * hp, axis=0), jnp.finfo(jnp.float32).tiny)
    x, r = x + length * p, r - length * hp
    z = r / diagonal
    new = jnp.sum(r * z, axis=0)
    return x, r, z + new / jnp.maximum(rz, jnp.finfo(jnp.float32).tiny) * p, new

  start = jnp.where(keep, values, 0.0)
  r = residual(target - start)
  z = r / diagonal
  return jax.lax.fori_loop(0, steps, step, (start, r, z, jnp.sum(r * z, axis=0)))[0]
