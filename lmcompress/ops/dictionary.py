"""Products with a weight of atoms: for few rows, what each run of x makes of every atom is looked up."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress.arrays import parts
from lmcompress.arrays.dictionary import DictionaryArray
from lmcompress.ops.linear import Rules, gathered_embed, over_tiles, register, tiled_attend, tiled_linear

_SMALL_M = 2
"""Rows of x up to which looking products up beats decoding tiles (measured, two AVX-512 cores)."""


@functools.partial(jax.jit, inline=False)
def _looked_up(x: jax.Array, w: DictionaryArray) -> jax.Array:
  """`y[o] == sum over runs and terms of coefficient * (x_run @ atoms[code])`: no entry of the weight is made."""
  inputs, outputs = w.shape[w.axis], w.shape[-3 - w.axis]
  rows = jnp.pad(x.reshape(-1, inputs).astype(jnp.float32), ((0, 0), (0, w.pad)))
  runs, count = (inputs + w.pad) // w.width, w.atoms.shape[-2]
  split = rows.reshape(-1, runs, w.width)
  atoms = jnp.broadcast_to(w.atoms.astype(jnp.float32), (runs, count, w.width))
  made = jnp.einsum("mrd,rkd->rkm", split, atoms).reshape(runs * count, -1)
  first = jnp.repeat(jnp.arange(runs) * count, w.terms)[:, None]

  def product(start: Any, size: int) -> jax.Array:
    codes = w.codes.columns(start, size).unpack().astype(jnp.int32)
    found = made[(codes if w.axis == -2 else codes.T) + first]  # [runs * terms, size, m]
    if w.coefficients is not None:
      given = parts.columns(w.coefficients, start, size, w.axis)
      found = found * (given if w.axis == -2 else given.T)[..., None]
    return jnp.sum(found, axis=0).T

  return over_tiles(product, outputs).reshape(*x.shape[:-1], outputs).astype(x.dtype)


def _linear(x: jax.Array, w: DictionaryArray) -> jax.Array:
  return _looked_up(x, w) if x.size // x.shape[-1] <= _SMALL_M else tiled_linear(x, w)


def _attend(x: jax.Array, w: DictionaryArray) -> jax.Array:
  return _looked_up(x, w) if x.size // x.shape[-1] <= _SMALL_M else tiled_attend(x, w)


register(DictionaryArray, Rules(_linear, gathered_embed, _attend))
