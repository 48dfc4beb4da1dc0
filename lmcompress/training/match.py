"""Matching what happens inside: a student's hidden states and relations between tokens beside its teacher's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmcompress.ops.divergence import kl
from lmcompress.types import Params

PROJECTIONS = "projections"
"""Where a tree in training holds the maps from the student's width to the teacher's."""


@dataclasses.dataclass(frozen=True)
class Match:
  """What a student's blocks see is brought towards what its teacher's see, beside the loss of predictions.

  Hidden states are the inputs of a block's first stage; those of the teacher are the aim of a learned projection where
  widths differ, and of the states themselves where they do not (TinyBERT, arXiv:1909.10351; DistilBERT,
  arXiv:1910.01108). Relations are softmax(x x' / sqrt(d)) between the tokens of a row, x the input of the last paired
  block's second stage (what attention mixed) cut into heads: they need no projection (MiniLMv2, arXiv:2012.15828).

  Attributes:
    hidden: weight of the squared error of hidden states relative to the teacher's square, a mean over pairs.
    relations: weight of the KL of relations, nats.
    heads: pieces of the width that relations are computed for.
    layers: `uniform` pairs the i-th of S blocks with the teacher's that is as deep, `name` with the one at its path.

  Raises:
    ValueError: an attribute is out of range.
  """

  hidden: float = 1.0
  relations: float = 0.0
  heads: int = 8
  layers: Literal["uniform", "name"] = "uniform"

  def __post_init__(self) -> None:
    weights = (self.hidden, self.relations)
    if not all(0 <= w < math.inf for w in weights) or not any(weights) or self.heads < 1:
      raise ValueError(
        f"Match(hidden={self.hidden}, relations={self.relations}, heads={self.heads}): weights from 0, one of them "
        "above it, heads from 1"
      )
    if self.layers not in ("uniform", "name"):
      raise ValueError(f"Match(layers={self.layers!r}): uniform or name")

  def pairs(self, model: Any, params: Params, teacher: tuple[Any, Params]) -> list[tuple[Any, Any]]:
    """Blocks of the student and their teacher's.

    Raises:
      ValueError: no block, one without its counterpart by name, or one without a second stage that relations need.
    """
    ours, theirs = model.blocks(params), teacher[0].blocks(teacher[1])
    if not ours or not theirs:
      raise ValueError(f"Match: the student has {len(ours)} blocks, the teacher {len(theirs)}; both need one")
    if self.layers == "name":
      found = {block.path: block for block in theirs}
      missing = [block.path for block in ours if block.path not in found]
      if missing:
        raise ValueError(f"Match(layers='name'): the teacher has no {missing[0]}; layers='uniform' pairs by depth")
      paired = [(block, found[block.path]) for block in ours]
    else:
      paired = [(block, theirs[round((i + 1) * len(theirs) / len(ours)) - 1]) for i, block in enumerate(ours)]
    if self.relations and min(len(block.stages) for block in paired[-1]) < 2:
      raise ValueError(f"Match(relations={self.relations}): {paired[-1][0].path} has one stage; two are needed")
    return paired

  def taps(self, paired: list[tuple[Any, Any]], side: int) -> dict[str, tuple[str, ...]]:
    """The inputs of stages that the loss reads, of the student (0) or the teacher (1)."""
    wanted: dict[str, tuple[str, ...]] = {}
    for pair in paired if self.hidden else ():
      wanted[pair[side].path] = (pair[side].stages[0].name,)
    if self.relations:
      last = paired[-1][side]
      wanted[last.path] = (*wanted.get(last.path, ()), last.stages[1].name)
    return wanted

  def projections(
    self, model: Any, params: Params, teacher: tuple[Any, Params], length: int, key: jax.Array
  ) -> dict[str, Any]:
    """A kernel `[width, teacher's width]` by the name of each block whose width differs from its teacher's.

    Raises:
      ValueError: a width that `heads` does not divide.
    """
    paired, row = self.pairs(model, params, teacher), jnp.zeros((1, length), jnp.int32)
    seen, shown = (
      jax.eval_shape(lambda p, who=who, side=side: _tapped(who, p, row, self.taps(paired, side)), p)
      for side, (who, p) in enumerate(((model, params), teacher))
    )
    made: dict[str, Any] = {}
    for n, (ours, theirs) in enumerate(paired):
      for i, relation in ((0, False), (1, True)):
        if i >= len(ours.stages) or ours.stages[i].name not in seen.get(ours.path, {}):
          continue
        widths = [
          x[block.path][block.stages[i].name].shape[-1] for x, block in ((seen, ours), (shown, theirs))
        ]
        if relation and any(width % self.heads for width in widths):
          raise ValueError(f"Match(heads={self.heads}): widths of {widths[0]} and {widths[1]} are no multiples of it")
        if not relation and widths[0] != widths[1]:
          draw = jax.random.normal(jax.random.fold_in(key, n), tuple(widths)) / math.sqrt(widths[0])
          made[ours.path.replace("/", "_")] = {"kernel": draw}
    return made

  def loss(
    self,
    paired: list[tuple[Any, Any]],
    seen: Mapping[str, Mapping[str, jax.Array]],
    shown: Mapping[str, Mapping[str, jax.Array]],
    projections: Mapping[str, Any],
    real: jax.Array,
  ) -> jax.Array:
    """The weighted sum, a mean over the real tokens; gradients do not reach `shown`, the teacher's."""
    count = jnp.maximum(jnp.sum(real), 1)

    def mean(each: jax.Array) -> jax.Array:
      return jnp.sum(jnp.where(real, each, 0.0)) / count

    total = jnp.zeros((), jnp.float32)
    for ours, theirs in paired if self.hidden else ():
      x = seen[ours.path][ours.stages[0].name].astype(jnp.float32)
      aim = jax.lax.stop_gradient(shown[theirs.path][theirs.stages[0].name]).astype(jnp.float32)
      name = ours.path.replace("/", "_")
      if name in projections:
        x = x @ projections[name]["kernel"]
      error = jnp.mean((x - aim) ** 2, -1) / jnp.maximum(jnp.mean(aim**2, -1), 1e-12)
      total += self.hidden / len(paired) * mean(error)
    if self.relations:
      ours, theirs = paired[-1]
      q = _relations(seen[ours.path][ours.stages[1].name], self.heads, real)
      p = jax.lax.stop_gradient(_relations(shown[theirs.path][theirs.stages[1].name], self.heads, real))
      total += self.relations * mean(jnp.mean(kl(p, q), axis=1))
    return total


def _tapped(model: Any, params: Params, row: jax.Array, taps: Mapping[str, tuple[str, ...]]) -> Any:
  carry, found = model.start(params, {"tokens": row}), {}
  for block in model.blocks(params):
    carry, seen = model.run(block, params, carry, taps.get(block.path, ()))
    found[block.path] = seen
  return found


def _relations(x: jax.Array, heads: int, real: jax.Array) -> jax.Array:
  """Log-probabilities `[batch, heads, length, length]` of each real token's likeness to the others."""
  batch, length, width = x.shape
  x = x.astype(jnp.float32).reshape(batch, length, heads, width // heads)
  scores = jnp.einsum("bqhd,bkhd->bhqk", x, x) / math.sqrt(width // heads)
  return jax.nn.log_softmax(jnp.where(real[:, None, None, :], scores, -1e30), axis=-1)
