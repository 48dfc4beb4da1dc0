"""A recurrent layer over a sequence: LSTM with four gates, GRU with three, told apart by the shape of the tree."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmcompress import ops
from lmcompress.models.layers import Linear
from lmcompress.types import Params

GATES = {"gru": 3, "lstm": 4}
"""Gates of each kind of cell: of a GRU reset, update and new; of an LSTM input, forget, cell and output."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("h", "c"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class RecurrentState:
  """What a layer remembers: `h` its output and, of an LSTM, `c` its cell, both float32 `[batch, units]`."""

  h: jax.Array
  c: jax.Array | None

  @property
  def per_slot(self) -> tuple[jax.Array, ...]:
    """The arrays that grow with the slots: none."""
    return ()

  def rollback(self, length: Any, written: Any) -> RecurrentState:
    """The state itself: padding, which it never took in, is all that can be forgotten again."""
    return self


def gates_of(layer: Params) -> int:
  """How many gates a layer of a tree has, a value of `GATES`."""
  shape = layer["recurrent"]["kernel"].shape
  return shape[-1] // shape[-2]


def empty_state(layer: Params, batch: int) -> RecurrentState:
  """The state of a layer of a tree before the first token."""
  zeros = jnp.zeros((batch, layer["recurrent"]["kernel"].shape[-2]), jnp.float32)
  return RecurrentState(zeros, zeros if gates_of(layer) == GATES["lstm"] else None)


def recurrent_axes(path: str, below: str, unit: str, bias: bool = False) -> dict[str, tuple[Any, ...]]:
  """Logical axes of the layer at `path`; `bias` says whether its recurrent kernel has one."""
  gates = ("gate", unit)
  axes: dict[str, tuple[Any, ...]] = {
    f"{path}/input/kernel": (below, gates), f"{path}/input/bias": (gates,), f"{path}/recurrent/kernel": (unit, gates),
  }  # fmt: skip
  return {**axes, f"{path}/recurrent/bias": (gates,)} if bias else axes


def recurrent_params(keys: Any, below: int, units: int, gates: int) -> Params:
  """Random parameters: kernels of variance 1 / inputs, recurrent ones orthogonal, an LSTM's forget gates open."""
  draw, turn = nn.initializers.variance_scaling(1.0, "fan_in", "normal"), nn.initializers.orthogonal()
  bias = jnp.zeros((gates, units), jnp.float32)
  if gates == GATES["lstm"]:
    bias = bias.at[1].set(1.0)
  params = {
    "input": {"kernel": draw(keys[0], (below, gates * units), jnp.float32), "bias": bias.reshape(-1)},
    "recurrent": {"kernel": turn(keys[1], (units, gates * units), jnp.float32)},
  }
  if gates == GATES["gru"]:
    params["recurrent"]["bias"] = jnp.zeros((gates * units,), jnp.float32)
  return params


class Recurrent(nn.Module):
  """One layer over `x: [batch, length, below]`; tokens that are not `real` leave its state as it is.

  An LSTM is Hochreiter & Schmidhuber 1997 with forget gates (Gers et al. 2000). A GRU is Cho et al. 2014
  (arXiv:1406.1078) in the form that libraries compute: the reset gate is applied after the recurrent product.
  """

  gates: int

  @nn.compact
  def __call__(
    self, x: jax.Array, real: jax.Array, state: RecurrentState | None = None
  ) -> tuple[jax.Array, RecurrentState]:
    self.sow("taps", "input_input", x)
    moved = Linear(use_bias=True, name="input")(x)
    units = moved.shape[-1] // self.gates
    kernel, bias = Linear(name="recurrent").leaves(units)
    if state is None:
      zeros = jnp.zeros((x.shape[0], units), jnp.float32)
      state = RecurrentState(zeros, zeros if self.gates == GATES["lstm"] else None)

    def step(before: RecurrentState, now: tuple[jax.Array, jax.Array]) -> tuple[RecurrentState, jax.Array]:
      given, counts = now
      own = ops.linear(before.h.astype(given.dtype), kernel)
      own = own if bias is None else own + bias.astype(own.dtype)
      given, own = given.astype(jnp.float32), own.astype(jnp.float32)
      after = _gru(given, own, before.h) if before.c is None else _lstm(given, own, before.c)
      kept = jax.tree.map(lambda new, old: jnp.where(counts[:, None], new, old), after, before)
      return kept, kept.h

    after, hidden = jax.lax.scan(step, state, (moved.swapaxes(0, 1), real.swapaxes(0, 1)))
    hidden = hidden.swapaxes(0, 1)
    self.sow("taps", "recurrent_input", jnp.concatenate([state.h[:, None], hidden[:, :-1]], axis=1))
    return hidden.astype(x.dtype), after


def _lstm(given: jax.Array, own: jax.Array, cell: jax.Array) -> RecurrentState:
  i, f, g, o = jnp.split(given + own, 4, axis=-1)
  c = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
  return RecurrentState(jax.nn.sigmoid(o) * jnp.tanh(c), c)


def _gru(given: jax.Array, own: jax.Array, before: jax.Array) -> RecurrentState:
  (r, z, n), (own_r, own_z, own_n) = jnp.split(given, 3, axis=-1), jnp.split(own, 3, axis=-1)
  r, z = jax.nn.sigmoid(r + own_r), jax.nn.sigmoid(z + own_z)
  return RecurrentState((1 - z) * jnp.tanh(n + r * own_n) + z * before, None)
