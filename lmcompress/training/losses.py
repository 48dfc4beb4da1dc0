"""Losses of a token: cross entropy, and divergences from a teacher's predictions."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from lmcompress.calibration.token_loss import cross_entropy
from lmcompress.ops.divergence import kl

Divergence = Literal["forward", "reverse", "jensen_shannon", "skewed", "skewed_reverse"]
DIVERGENCES: tuple[str, ...] = get_args(Divergence)


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


class Likeliest(NamedTuple):
  """A teacher's k likeliest tokens: `ids: [..., k]` and their log-probabilities."""

  ids: jax.Array
  logprobs: jax.Array


def coarse(teacher: Likeliest, student: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Both distributions over k + 1 events, log-probabilities `[..., k + 1]`: the teacher's k tokens, and any other.

  A divergence of these is at most that of all tokens, and equal where both spread what is left alike.
  """
  named = jnp.take_along_axis(student, teacher.ids, axis=-1)
  others = jax.nn.logsumexp(jnp.put_along_axis(student, teacher.ids, -jnp.inf, axis=-1, inplace=False), axis=-1)
  left = jnp.log(jnp.maximum(-jnp.expm1(jax.nn.logsumexp(teacher.logprobs, axis=-1)), 1e-7))
  join = lambda most, rest: jnp.concatenate([most, rest[..., None]], axis=-1)  # noqa: E731
  return join(teacher.logprobs, left), join(named, jnp.maximum(others, math.log(1e-30)))


@dataclasses.dataclass(frozen=True)
class Labels:
  """Cross entropy with the next token, nats."""

  needs_teacher = False

  def __call__(self, student: jax.Array, targets: jax.Array, teacher: jax.Array | None = None) -> jax.Array:
    """`[...]` of logits `[..., vocab]` and the ids `[...]` that follow."""
    return cross_entropy(student, targets)


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

  def __call__(
    self, student: jax.Array, targets: jax.Array, teacher: jax.Array | Likeliest | None = None
  ) -> jax.Array:
    """`[...]` of logits `[..., vocab]`, the ids that follow, and the teacher's logits or its likeliest tokens.

    Raises:
      ValueError: no teacher, or its likeliest tokens and a temperature, which all of them would be needed for.
    """
    if teacher is None:
      raise ValueError("Distill needs the teacher's logits")
    if isinstance(teacher, Likeliest):
      if self.temperature != 1:
        raise ValueError(f"Distill(temperature={self.temperature}): likeliest tokens cannot be softened; use 1")
      p, q = coarse(teacher, jax.nn.log_softmax(student, axis=-1))
    else:
      p, q = (jax.nn.log_softmax(logits / self.temperature, axis=-1) for logits in (teacher, student))
    lost = self.temperature**2 * divergence(p, q, self.kind, self.mix)
    return lost if not self.labels else (1 - self.labels) * lost + self.labels * Labels()(student, targets)


Loss = Labels | Distill
