"""The loss of predicting each next token, over runs of tokens so that no array is as large as all logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress.types import Params


def cross_entropy(logits: jax.Array, targets: jax.Array, teacher: jax.Array | None = None) -> jax.Array:
  """Nats `[...]` of logits `[..., vocab]` and the ids `[...]` that follow."""
  said = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  return -jnp.take_along_axis(said, targets[..., None], axis=-1)[..., 0]


def forward(model: Any, params: Params, batch: Mapping[str, jax.Array], remat: bool = True) -> Any:
  """The carry after the last block; with `remat` the way back keeps one carry a block and computes the rest again."""
  carry = model.start(params, batch)
  for block in model.blocks(params):
    run = lambda p, c, block=block: model.run(block, p, c)[0]  # noqa: E731
    carry = (jax.checkpoint(run) if remat else run)(params, carry)
  return carry


def mean_loss(
  model: Any,
  params: Params,
  batch: Mapping[str, jax.Array],
  loss: Callable[..., jax.Array],
  teacher: tuple[Any, Params] | None = None,
  chunk: int = 64,
  remat: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """The loss of predicting each next token, summed, and the number of tokens predicted.

  Logits are made for `chunk` positions at a time and again on the way back: the largest array is
  `[batch, chunk, vocab]`, twice with a teacher.

  Args:
    batch: `tokens: [batch, length]` and perhaps `attention_mask`, alike.
    loss: `(logits [..., vocab], ids that follow [...], the teacher's logits or None) -> [...]`, nats.
    teacher: its model and parameters; gradients do not reach them.
  """
  tokens = jnp.asarray(batch["tokens"])
  real = jnp.ones(tokens.shape, bool) if batch.get("attention_mask") is None else batch["attention_mask"] != 0
  carry = forward(model, params, batch, remat)
  guide = None if teacher is None else jax.lax.stop_gradient(forward(*teacher, batch, remat=False))
  positions = tokens.shape[1] - 1
  chunk = min(chunk, positions)
  counted = jnp.pad(real[:, 1:] & real[:, :-1], ((0, 0), (0, -positions % chunk)))
  targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, -positions % chunk)))

  @jax.checkpoint
  def some(params: Params, carry: Any, start: jax.Array) -> jax.Array:
    """Positions from `start` on; the last run overlaps the one before it, and counts what that left."""
    first = jnp.minimum(start, tokens.shape[1] - chunk)
    said = model.finish(params, carry, span=(first, chunk))
    wanted = (
      None if teacher is None else jax.lax.stop_gradient(teacher[0].finish(teacher[1], guide, span=(first, chunk)))
    )
    each = loss(said, jax.lax.dynamic_slice_in_dim(targets, first, chunk, 1), wanted)
    own = jax.lax.dynamic_slice_in_dim(counted, first, chunk, 1) & (first + jnp.arange(chunk) >= start)
    return jnp.sum(jnp.where(own, each, 0.0))

  def add(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
    return total + some(params, carry, start), None

  starts = jnp.arange(0, positions, chunk, dtype=jnp.int32)
  total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), starts)
  return total, jnp.sum(counted)
