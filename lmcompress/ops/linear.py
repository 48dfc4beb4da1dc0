"""The one door for arithmetic on weights: `linear`, `embed` and `attend`, by the exact type of the leaf."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmcompress.ops import backend
from lmcompress.types import CompressedArray


class Rules(NamedTuple):
  """How one kind of leaf multiplies.

  Attributes:
    linear: `(x [..., in], w [in, out]) -> [..., out]`.
    embed: `(ids [...], w [vocab, features]) -> [..., features]`.
    attend: `(x [..., features], w [vocab, features]) -> [..., vocab]`.
  """

  linear: Callable[[jax.Array, Any], jax.Array]
  embed: Callable[[jax.Array, Any], jax.Array]
  attend: Callable[[jax.Array, Any], jax.Array]


_RULES: dict[type, Rules] = {}
_SHARED: dict[type, Callable[[jax.Array, Sequence[Any]], list[jax.Array]]] = {}


def register(
  kind: type, rules: Rules, linears: Callable[[jax.Array, Sequence[Any]], list[jax.Array]] | None = None
) -> None:
  """Adds the rules of an array type; a type without rules raises at its first use.

  Args:
    linears: products of one input with several weights of that type, where doing them together pays.
  """
  _RULES[kind] = rules
  if linears is not None:
    _SHARED[kind] = linears


def _rules(w: Any, door: str) -> Rules:
  if isinstance(w, jax.Array):  # true for tracers; singledispatch on jax.Array is not
    return DENSE
  rules = _RULES.get(type(w))
  if rules is None:
    known = ", ".join(sorted(kind.__name__ for kind in _RULES))
    raise TypeError(f"ops.{door} has no rule for {type(w).__name__}; it knows jax.Array, {known}; see ops.register")
  return rules


def linear(x: jax.Array, w: Any) -> jax.Array:
  """`x @ w` for `x: [..., in]` and `w: [in, out]`, accumulated in float32, in the dtype of `x`."""
  return _rules(w, "linear").linear(x, w)


def linears(x: jax.Array, weights: Sequence[Any]) -> list[jax.Array]:
  """`x @ w` for weights that read the same input; in one operation where their kernel can."""
  kinds = {type(w) for w in weights}
  shared = _SHARED.get(kinds.pop()) if len(kinds) == 1 else None
  return shared(x, weights) if shared is not None else [linear(x, w) for w in weights]


def embed(ids: jax.Array, w: Any) -> jax.Array:
  """Rows `ids: [...]` of a table `w: [vocab, features]`."""
  return _rules(w, "embed").embed(ids, w)


def attend(x: jax.Array, w: Any) -> jax.Array:
  """`x @ w.T` for `x: [..., features]` and a table `w: [vocab, features]`: the logits of a head."""
  return _rules(w, "attend").attend(x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _narrow(spec: str, dtype: Any, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(spec, a, b, preferred_element_type=dtype)


def _narrow_forward(spec: str, dtype: Any, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _narrow(spec, dtype, a, b), (a, b)


def _narrow_backward(
  spec: str, dtype: Any, kept: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
  a, b = kept
  grad = grad.astype(a.dtype)
  first, second, out = re.split(",|->", spec)
  return jnp.einsum(f"{out},{second}->{first}", grad, b), jnp.einsum(f"{first},{out}->{second}", a, grad)


_narrow.defvjp(_narrow_forward, _narrow_backward)


def product(spec: str, a: jax.Array, b: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
  """`einsum` of two arrays, accumulated in float32, in a dtype; each index is of two of the three terms or of all.

  Where both are bfloat16, so are the products of their gradients. Left to itself, JAX multiplies the float32 gradient
  of the result by the bfloat16 operand, and XLA then widens both: on a GPU, several times as slow. Such a product has
  no derivative forward (`jax.jvp`).
  """
  if a.dtype == b.dtype == jnp.bfloat16:
    return jnp.asarray(_narrow(spec, dtype, a, b))
  return jnp.einsum(spec, a, b, preferred_element_type=dtype)


def _dense(matrix: str, x: jax.Array, w: jax.Array) -> jax.Array:
  """The product of the last axis of `x`, `i`, and that axis of a matrix, leaving `o`."""
  lead = "abcdefgh"[: x.ndim - 1]
  return product(f"{lead}i,{matrix}->{lead}o", x, w).astype(x.dtype)


DENSE = Rules(functools.partial(_dense, "io"), lambda ids, w: w[ids], functools.partial(_dense, "oi"))

def or_pallas(reference: Callable[[jax.Array, Any], jax.Array], door: str) -> Callable[[jax.Array, Any], jax.Array]:
  """`reference`, or the Pallas kernel of `door` where those are to run and take this weight.

  A weight that they do not take runs on the reference and says so once, by name.
  """

  def product(x: jax.Array, w: Any) -> jax.Array:
    if not backend.runs_pallas():
      return reference(x, w)
    from lmcompress.ops.kernels import gpu, tpu

    kernels = tpu if jax.default_backend() == "tpu" else gpu
    reason = kernels.supports(x, w, door)
    if reason:
      backend.say_once(f"no Pallas kernel for {w.kind} ({reason}); it runs on the slower reference")
      return reference(x, w)
    return getattr(kernels, door)(x, w, interpret=jax.default_backend() == "cpu")

  return product


TILE = 192
"""Outputs (table rows) that a reference loop holds dense at a time."""


def over_tiles(product: Callable[[jax.Array, int], jax.Array], outputs: int, tile: int = TILE) -> jax.Array:
  """Concatenates `product(start, size) -> [m, size]` over tiles of the outputs, one tile alive at a time.

  The backward pass rebuilds each tile instead of keeping it (`jax.checkpoint`), so that it holds no dense
  weight either.
  """
  tile = min(tile, outputs)
  whole = outputs // tile
  _, parts = jax.lax.scan(
    jax.checkpoint(lambda _, i: (None, product(i * tile, tile))), None, jnp.arange(whole, dtype=jnp.int32)
  )
  y = jnp.moveaxis(parts, 0, 1).reshape(parts.shape[1], whole * tile)
  if outputs % tile:
    y = jnp.concatenate([y, product(jnp.int32(whole * tile), outputs % tile)], axis=1)
  return y


@functools.partial(jax.jit, inline=False)
def tiled_linear(x: jax.Array, w: Any) -> jax.Array:
  """The reference of `linear` for any compressed array: tiles of outputs, each dense for one product."""
  rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  y = over_tiles(lambda start, size: rows @ w.columns(start, size), w.shape[-1])
  return y.reshape(*x.shape[:-1], w.shape[-1]).astype(x.dtype)


@functools.partial(jax.jit, inline=False)
def tiled_attend(x: jax.Array, w: Any) -> jax.Array:
  """The reference of `attend` for any compressed array: tiles of table rows."""
  rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  y = over_tiles(lambda start, size: jnp.einsum("md,vd->mv", rows, w.columns(start, size)), w.shape[-2])
  return y.reshape(*x.shape[:-1], w.shape[-2]).astype(x.dtype)


def gathered_embed(ids: jax.Array, w: CompressedArray) -> jax.Array:
  """The reference of `embed` for any compressed array: decodes the rows asked for."""
  return w.rows(ids).astype(w.dtype)
