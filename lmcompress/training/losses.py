"""Losses: cross entropy and distillation, over runs of tokens so that no array is as large as all logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmcompress.types import Params

Divergence = Literal["forward", "reverse", "jensen_shannon", "skewed", "skewed_reverse"]
DIVERGENCES: tuple[str, ...] = ("forward", "reverse", "jensen_shannon", "skewed", "skewed_reverse")


def divergence(teacher: jax.Array, student: jax.Array, kind: Divergence = "forward", mix: float = 0.1) -> jax.Array:
  """How far a student's distribution is from its teacher's, nats `[...]`.

  With p the teacher's and q the student's: `forward` is KL(p || q) (Hinton et al. 2015, arXiv:1503.02531); `reverse`
  KL(q || p) (MiniLLM, arXiv:2306.08543); `jensen_shannon`, m = mix p + (1 - mix) q, is mix KL(p || m) +
  (1 - mix) KL(q || m) (GKD, arXiv:2306.13649); `skewed` is KL(p || mix p + (1 - mix) q) and `skewed_reverse`
  KL(q || mix q + (1 - mix) p) (DistiLLM, arXiv:2402.03898).

  Args:
    teacher, student: log-probabilities `[..., vocab]`.
    mix: between 0 and 1; not of `forward` and `reverse`.
  """

  def kl(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(a == -jnp.inf, 0.0, jnp.exp(a) * (a - b)), axis=-1)

  def mixed(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.logaddexp(a + math.log(mix), b + math.log1p(-mix))

  if kind == "forward":
    return kl(teacher, student)
  if kind == "reverse":
    return kl(student, teacher)
  if kind == "skewed":
    return kl(teacher, mixed(teacher, student))
  if kind == "skewed_reverse":
    return kl(student, mixed(student, teacher))
  middle = mixed(teacher, student)
  return mix * kl(teacher, middle) + (1 - mix) * kl(student, middle)


@dataclasses.dataclass(frozen=True)
class Labels:
  """Cross entropy with the next token, nats."""

  needs_teacher = False

  def __call__(self, student: jax.Array, targets: jax.Array, teacher: jax.Array | None = None) -> jax.Array:
    """`[...]` of logits `[..., vocab]` and the ids `[...]` that follow."""
    said = jax.nn.log_softmax(student, axis=-1)
    return -jnp.take_along_axis(said, targets[..., None], axis=-1)[..., 0]


@dataclasses.dataclass(frozen=True)
class Distill:
  """A divergence from the teacher's distribution, and perhaps the labels beside it.

  Attributes:
    kind, mix: as of `divergence`.
    temperature: divides both logits; the divergence is multiplied by its square, so that gradients keep their size.
    labels: weight of the cross entropy; the divergence has the rest.

  Raises:
    ValueError: an attribute is out of range.
  """

  kind: Divergence = "forward"
  temperature: float = 1.0
  mix: float = 0.1
  labels: float = 0.0

  needs_teacher = True

  def __post_init__(self) -> None:
    if self.kind not in DIVERGENCES or not self.temperature > 0 or not 0 < self.mix < 1 or not 0 <= self.labels <= 1:
      raise ValueError(
        f"Distill(kind={self.kind!r}, temperature={self.temperature}, mix={self.mix}, labels={self.labels}): kind is "
        f"one of {', '.join(DIVERGENCES)}, temperature above 0, mix between 0 and 1, labels from 0 to 1"
      )

  def __call__(self, student: jax.Array, targets: jax.Array, teacher: jax.Array | None = None) -> jax.Array:
    """`[...]` of logits `[..., vocab]`, the ids that follow, and the teacher's logits."""
    if teacher is None:
      raise ValueError("Distill needs the teacher's logits")
    p, q = (jax.nn.log_softmax(logits / self.temperature, axis=-1) for logits in (teacher, student))
    lost = self.temperature**2 * divergence(p, q, self.kind, self.mix)
    return lost if not self.labels else (1 - self.labels) * lost + self.labels * Labels()(student, targets)


Loss = Labels | Distill


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
  loss: Loss,
  teacher: tuple[Any, Params] | None = None,
  chunk: int = 64,
  remat: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """The loss of predicting each next token, summed, and the number of tokens predicted.

  Logits are made for `chunk` positions at a time and again on the way back: the largest array is
  `[batch, chunk, vocab]`, twice with a teacher.

  Args:
    batch: `tokens: [batch, length]` and perhaps `attention_mask`, alike.
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
