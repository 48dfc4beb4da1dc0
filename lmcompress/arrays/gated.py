"""GatedArray: a weight whose inputs pass gates that learn to close."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmcompress.arrays import parts
from lmcompress.types import CompressedArray, Params

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
"""Of the hard concrete distribution, and how far it is stretched (Louizos et al. 2018, section 4.1)."""


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("weight", "openness", "noise", "price"),
  meta_fields=("axis", "rate"),
)
@dataclasses.dataclass(frozen=True)
class GatedArray(CompressedArray):
  """`dense == gates * weight`, a hard concrete gate from 0 to 1 for each run of inputs (arXiv:1712.01312).

  `gate == clip(1.2 sigmoid((noise + log_alpha) / (2/3)) - 0.1, 0, 1)` with `log_alpha == rate * openness`; without
  noise that is its median. The rate lets gates go from open to closed within the steps that an optimizer needs to move
  weights a little; gradients are those of `log_alpha`. What closes a gate is the price of being open, by `pressure`.

  Attributes:
    weight: dense or compressed, its inputs in n consecutive runs.
    openness: float32 `[..., n, 1]` for axis -2, `[..., 1, n]` for axis -1.
    noise: like it; the logit of what was drawn between 0 and 1 for this step, or 0.
    price: float32 `[..., 1, 1]`, nats that a gate pays for being open.
    axis: the contraction axis.
    rate: above 0.
  """

  weight: Any
  openness: jax.Array
  noise: jax.Array
  price: jax.Array
  axis: int
  rate: float

  @property
  def shape(self) -> tuple[int, ...]:
    return self.weight.shape

  @property
  def dtype(self) -> Any:
    return self.weight.dtype

  @property
  def nbits(self) -> int:
    """Of the training form; `remove_closed` leaves the weight."""
    return sum(parts.nbits(part) for part in (self.weight, self.openness, self.noise, self.price))

  @property
  def kind(self) -> str:
    return f"gated {parts.kind(self.weight)}"

  @classmethod
  def trainable_fields(cls) -> tuple[str, ...]:
    return ("weight", "openness")

  @property
  def log_alpha(self) -> jax.Array:
    """Of the shape of `openness`, with gradients that are as large as its own."""
    o = self.openness.astype(jnp.float32)
    return o + jax.lax.stop_gradient((self.rate - 1) * o)

  def gates(self) -> jax.Array:
    """What the inputs of each run are multiplied by, float32 of the shape of `openness`."""
    return jnp.clip(jax.nn.sigmoid((self.noise + self.log_alpha) / TEMPERATURE) * (HIGH - LOW) + LOW, 0, 1)

  def open_chance(self) -> jax.Array:
    """How likely each gate is above 0, of the shape of `openness` (equation 12)."""
    return jax.nn.sigmoid(self.log_alpha - TEMPERATURE * jnp.log(-LOW / HIGH))

  def pressure(self) -> jax.Array:
    """The gradient of `price * sum(open_chance())`, of the shape of `openness`."""
    chance = self.open_chance()
    return self.price * chance * (1 - chance)

  def let_through(self, x: jax.Array) -> jax.Array:
    """The input as the weight sees it, float32 of the shape of `x: [..., features]`."""
    return x * self._wide().reshape(-1)

  def materialize(self) -> jax.Array:
    return (parts.materialize(self.weight) * self._wide()).astype(self.dtype)

  def columns(self, start: Any, size: int) -> jax.Array:
    return parts.columns(self.weight, start, size, self.axis) * self._wide()

  def rows(self, ids: jax.Array) -> jax.Array:
    return parts.rows(self.weight, ids) * self._wide().reshape(-1)

  def sharding_like(self, spec: PartitionSpec) -> GatedArray:
    one: Any = PartitionSpec(*[None] * self.openness.ndim)
    inner = parts.sharding_like(self.weight, spec)
    return dataclasses.replace(self, weight=inner, openness=one, noise=one, price=one)

  def _wide(self) -> jax.Array:
    gates = self.gates()
    return jnp.repeat(gates, self.shape[self.axis] // gates.shape[self.axis], axis=self.axis)


def gated(weight: Any, runs: int, axis: int, start: float = 2.5, rate: float = 1000.0) -> GatedArray:
  """A weight whose inputs pass `runs` gates, open at first: `log_alpha == start`.

  Raises:
    ValueError: the inputs are no such number of equal runs, the axis is neither -2 nor -1, or the rate is not above 0.
  """
  if axis not in (-2, -1) or runs < 1 or weight.shape[axis] % runs or not rate > 0:
    raise ValueError(
      f"gated(runs={runs}, axis={axis}, rate={rate}): runs that divide the {weight.shape[axis]} inputs, axis -2 or -1, "
      "a rate above 0"
    )
  lead = weight.shape[:-2]
  shape = (*lead, runs, 1) if axis == -2 else (*lead, 1, runs)
  openness = jnp.full(shape, start / rate, jnp.float32)
  return GatedArray(weight, openness, jnp.zeros(shape), jnp.zeros((*lead, 1, 1)), axis, rate)


def pressed(grads: Params, trained: Params, kept: Params) -> Params:
  """Gradients of what trains with what its gates pay for being open, which no loss says.

  Args:
    trained, kept: a tree in two, as of `tree.partition`.
  """

  def add(g: Any, mine: Any, rest: Any) -> Any:
    if not isinstance(g, GatedArray) or g.openness is None:
      return g
    return dataclasses.replace(g, openness=g.openness + dataclasses.replace(rest, openness=mine.openness).pressure())

  return jax.tree.map(add, grads, trained, kept, is_leaf=_whole) if _has_gates(grads) else grads


def with_gates_of(now: Params, average: Params) -> Params:
  """A tree with the gates of another: a mean of gates that were closed for good would open them again."""
  put = lambda a, n: dataclasses.replace(a, openness=n.openness) if isinstance(a, GatedArray) else a  # noqa: E731
  return jax.tree.map(put, average, now, is_leaf=_whole)


def undrawn(params: Params) -> Params:
  """A tree with its gates at their medians."""
  calm = lambda x: dataclasses.replace(x, noise=jnp.zeros_like(x.noise)) if isinstance(x, GatedArray) else x  # noqa: E731
  return jax.tree.map(calm, params, is_leaf=_whole)


def _has_gates(params: Params) -> bool:
  return any(isinstance(x, GatedArray) for x in jax.tree.leaves(params, is_leaf=_whole))


def _whole(x: Any) -> bool:
  """What stands in one place of a tree in two: an array, gates, or nothing."""
  return isinstance(x, GatedArray) or x is None
