"""Attention: rotary positions, the cache's update and scaled dot products with grouped queries, as one operation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress.ops import backend
from lmcompress.ops.linear import product


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("real", "slot", "cos", "sin", "bias"), meta_fields=("window", "cap", "causal"),
)
@dataclasses.dataclass(frozen=True)
class View:
  """What the current tokens may look at, and what is done to the scores.

  Attributes:
    real: bool `[batch, slots]`, True where a slot holds a token (of these, or of the cache).
    slot: int32, the slot of the first current token; 0 without a cache.
    cos, sin: `[batch, length, head / 2]` float32, of each token's position, or fewer for the first entries of a head
      alone; 1 and 0 turn nothing, as does none.
    bias: float32 `[1 or batch, heads, length, slots]`, added to the scores; None for none.
    window: a token sees that many slots up to its own; None for all (Mistral, arXiv:2310.06825).
    cap: scores become `cap * tanh(scores / cap)`; None leaves them (Gemma 2, arXiv:2408.00118).
    causal: whether a token sees no later ones; an encoder's sees all.
  """

  real: jax.Array
  slot: jax.Array | int
  cos: jax.Array
  sin: jax.Array
  bias: jax.Array | None = None
  window: int | None = None
  cap: float | None = None
  causal: bool = True

  def visible(self) -> jax.Array:
    """`[batch, length, slots]`: real slots, up to each current token if causal, from where its window begins."""
    length, slots = self.cos.shape[1], jnp.arange(self.real.shape[1])[None, :]
    here = self.slot + jnp.arange(length)[:, None]
    seen = slots <= here if self.causal else jnp.ones((length, self.real.shape[1]), bool)
    if self.window is not None:
      seen &= slots > here - self.window
    return seen[None] & self.real[:, None, :]

  @property
  def plain(self) -> bool:
    """Whether each token sees all up to itself, its scores as they are."""
    whole = self.window is None or self.window >= self.real.shape[1]
    return self.causal and whole and self.bias is None and self.cap is None


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Turns the first half of those entries of `x: [batch, length, heads, head]` that have a cos with the second."""
  turned = 2 * cos.shape[-1]
  if not turned:
    return x
  a, b = jnp.split(x[..., :turned].astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  made = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
  return made if turned == x.shape[-1] else jnp.concatenate([made, x[..., turned:]], axis=-1)


@jax.custom_vjp
def rounded_through(rounded: jax.Array, given: jax.Array) -> jax.Array:
  """What became of `given` by rounding; gradients pass to it as if nothing had (straight-through, arXiv:1308.3432)."""
  del given
  return rounded


rounded_through.defvjp(lambda rounded, given: (rounded, None), lambda _, g: (jnp.zeros_like(g), g))


def mix(
  q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, scale: float, view: View | None = None
) -> jax.Array:
  """Softmax attention in float32.

  Args:
    q: `[batch, length, kv, group, head]`.
    k, v: `[batch, kv, slots, head]`.
    visible: bool `[batch, length, slots]`, True where a query may look.
    scale: factor on the scores.
    view: whose bias and cap the scores get.

  Returns:
    `[batch, length, kv * group * head]` in the dtype of `q`.
  """
  return mix_parts(q, [(k, v, visible)], scale, view)


def mix_parts(
  q: jax.Array, parts: Sequence[tuple[jax.Array, jax.Array, jax.Array]], scale: float, view: View | None = None
) -> jax.Array:
  """`mix` over several `(k, v, visible)` of the same slots, of which a query sees a slot in one at most.

  What each part gives is summed in the dtype of `q`.
  """
  see = "btkgh,bksh->bkgts"
  scores = [product(see, q * scale, k.astype(q.dtype)) for k, _, _ in parts]
  if view is not None:
    scores = [_shaped(s, view) for s in scores]
  seen = [visible[:, None, None] for _, _, visible in parts]
  whole = functools.reduce(lambda s, part: jnp.where(part[1], part[0], s), zip(scores, seen, strict=True), -1e30)
  weights = jax.nn.softmax(whole, axis=-1).astype(q.dtype)
  out = sum(
    product(
      "bkgts,bksh->btkgh", jnp.where(visible, weights, 0) if len(parts) > 1 else weights, v.astype(q.dtype), q.dtype
    )  # XLA for CPUs has no such product of bfloat16 in float32
    for (_, v, _), visible in zip(parts, seen, strict=True)
  )  # fmt: skip
  return jnp.asarray(out).reshape(*q.shape[:2], -1).astype(q.dtype)


def _shaped(scores: jax.Array, view: View) -> jax.Array:
  """Scores `[batch, kv, group, length, slots]` with the bias and the cap of a view."""
  if view.bias is not None:
    scores = scores + view.bias.reshape(-1, *scores.shape[1:])
  return scores if view.cap is None else view.cap * jnp.tanh(scores / view.cap)


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, view: View, head: int, layer_cache: Any = None, scale: float | None = None
) -> tuple[jax.Array, Any]:
  """Attention of the current tokens to themselves, and to a cache where there is one.

  Args:
    q: `[batch, length, heads * head]`, before the rotation; k, v: `[batch, length, kv * head]`.
    view: positions and what may be seen.
    head: extent of a head.
    layer_cache: a `LayerCache` or another with its `buffers`, `with_buffers` and `attend`.
    scale: factor on the scores, by default `head**-0.5`.

  Returns:
    `[batch, length, heads * head]`, and the cache with these tokens' keys (rotated) and values.
  """
  factor = head**-0.5 if scale is None else scale
  run = _fused if _native(q, head, view) else _reference
  return run(q, k, v, view, head, layer_cache, factor)


def split_heads(x: jax.Array, head: int) -> jax.Array:
  """`[batch, length, heads * head]` as `[batch, heads, length, head]`."""
  return x.reshape(*x.shape[:2], -1, head).swapaxes(1, 2)


def cross_attention(q: jax.Array, k: jax.Array, v: jax.Array, view: View, head: int, scale: float) -> jax.Array:
  """Attention of `q: [batch, length, heads * head]` to keys and values `[batch, kv, slots, head]` made elsewhere."""
  batch, length, kv = *q.shape[:2], k.shape[1]
  return mix(q.reshape(batch, length, kv, -1, head), k, v, view.visible(), scale, view)


def _native(q: jax.Array, head: int, view: View) -> bool:
  """Whether the kernel takes this: whole vectors in a head, turned as one, float32, nothing done to the scores."""
  whole = 2 * view.cos.shape[-1] == head
  return backend.runs_native() and q.dtype == jnp.float32 and head % 32 == 0 and view.plain and whole


def _reference(q: Any, k: Any, v: Any, view: View, head: int, layer_cache: Any, scale: float) -> tuple[jax.Array, Any]:
  batch, length, kv = *q.shape[:2], k.shape[-1] // head
  q = rotate(q.reshape(batch, length, -1, head), view.cos, view.sin).reshape(batch, length, kv, -1, head)
  k = rotate(k.reshape(batch, length, kv, head), view.cos, view.sin).swapaxes(1, 2)
  v = v.reshape(batch, length, kv, head).swapaxes(1, 2)
  if layer_cache is not None:
    return layer_cache.attend(q, k, v, view, scale)
  return mix(q, k, v, view.visible(), scale, view), None


def _fused(q: Any, k: Any, v: Any, view: View, head: int, layer_cache: Any, scale: float) -> tuple[jax.Array, Any]:
  """The kernel, with the reference's gradients and batching."""
  from lmcompress.ops.kernels import cpu

  @jax.custom_batching.sequential_vmap
  def forward(q: Any, k: Any, v: Any, view: View, layer_cache: Any) -> Any:
    buffers = () if layer_cache is None else layer_cache.buffers
    args = (q, k, v, view.cos, view.sin, view.real, jnp.asarray(view.slot, jnp.int32))
    mixed, after = cpu.attention(*args, buffers, head, scale)
    return mixed, None if layer_cache is None else layer_cache.with_buffers(after)

  @jax.custom_vjp
  def run(q: Any, k: Any, v: Any, view: View, layer_cache: Any) -> Any:
    return forward(q, k, v, view, layer_cache)

  def reference(q: Any, k: Any, v: Any, view: View, layer_cache: Any) -> Any:
    return _reference(q, k, v, view, head, layer_cache, scale)

  run.defvjp(lambda *args: (forward(*args), args), lambda saved, g: jax.vjp(reference, *saved)[1](g))
  return run(q, k, v, dataclasses.replace(view, slot=jnp.asarray(view.slot, jnp.int32)), layer_cache)
