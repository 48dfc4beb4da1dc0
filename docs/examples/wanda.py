"""Wanda: removes the weights whose size times the norm of their input is least, output by output."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress.arrays import MaskedArray, masked
from lmcompress.ops import masks
from lmcompress.transforms.combine import leafwise, require_dense
from lmcompress.types import Transform


def wanda(sparsity: float = 0.5) -> Transform:
  """Prunes by |weight| times input norm (Sun et al. 2023, arXiv:2306.11695).

  Args:
    sparsity: fraction of the inputs of each output that is removed, exact to the entry.

  Raises:
    ValueError: the sparsity is no fraction.
    WeightError (when planned): an already quantized weight, NaN or infinity.
  """
  if not 0 <= sparsity <= 1:
    raise ValueError(f"wanda(sparsity={sparsity}): a fraction from 0 to 1")

  def prune(w: Any, *, axis: int, second_moment: jax.Array) -> MaskedArray:
    values = jnp.where(w.mask.unpack() != 0, w.values, 0) if isinstance(w, MaskedArray) else w
    removed = round(values.shape[axis] * sparsity)
    return masked(values, wanda_mask(values, second_moment, removed), axis)

  return leafwise(prune, name="wanda", check=functools.partial(require_dense, "wanda"))


@jax.jit
def wanda_mask(w: jax.Array, second_moment: jax.Array, removed: int) -> jax.Array:
  """The mask (True keeps) that drops the `removed` least scores of each output.

  The paper's letters: W is `w`, transposed; ||X_j||_2 is the norm of input j over all tokens. Here it is the
  root mean square, the same but for a factor that every input shares, so the ranking is the paper's.

  Args:
    w: `[in, out]`.
    second_moment: `[in]`, the mean of the squared input.
  """
  score = jnp.abs(w.astype(jnp.float32)) * jnp.sqrt(second_moment)[:, None]
  return ~masks.smallest(score, removed, axis=-2)
