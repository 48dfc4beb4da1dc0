"""A recurrent language model: an embedding, layers of LSTM, and a dense layer that predicts at every step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmcompress import ops
from lmcompress.arrays import resolve
from lmcompress.models.base import BlockModel, checked_tokens, numbered, of_tokens, run_module
from lmcompress.models.layers import Linear
from lmcompress.types import Block, Params, Stage

LSTM_DEPTH = 16
"""Layers at most."""

AXES: Mapping[str, tuple[Any, ...]] = {
  "embed/table": ("vocab", "embed"),
  **{
    path: axes
    for i in range(LSTM_DEPTH)
    for path, axes in {
      f"layers/{i}/input/kernel": (f"below_{i}", ("gate", f"unit_{i}")),
      f"layers/{i}/input/bias": (("gate", f"unit_{i}"),),
      f"layers/{i}/recurrent/kernel": (f"unit_{i}", ("gate", f"unit_{i}")),
    }.items()
  },
  "head/table": ("vocab", "top"),
  "head/bias": ("vocab",),
}


@dataclasses.dataclass(frozen=True)
class LSTMConfig:
  """What the parameter tree cannot say. Depth and widths are read from the tree."""

  max_length: int = 2048


@dataclasses.dataclass(frozen=True)
class LSTMSizes:
  """Sizes for `init` only; a tree in hand speaks for itself. The defaults have 4,178,704 parameters."""

  vocab: int = 10000
  embed: int = 256
  units: int = 128
  layers: int = 2


@functools.partial(jax.tree_util.register_dataclass, data_fields=("h", "c"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class LSTMState:
  """What a layer remembers: `h` its output and `c` its cell, both float32 `[batch, units]`."""

  h: jax.Array
  c: jax.Array

  @property
  def per_slot(self) -> tuple[jax.Array, ...]:
    """The arrays that grow with the slots: none."""
    return ()

  def rollback(self, length: Any, written: Any) -> LSTMState:
    """The state itself: padding, which it never took in, is all that can be forgotten again."""
    return self


class _Layer(nn.Module):
  """One layer over `x: [batch, length, below]`; gates in the order input, forget, cell, output."""

  units: int = 0

  @nn.compact
  def __call__(self, x: jax.Array, real: jax.Array, state: LSTMState | None = None) -> tuple[jax.Array, LSTMState]:
    self.sow("taps", "input_input", x)
    moved = Linear(4 * self.units, use_bias=True, name="input")(x)
    units = moved.shape[-1] // 4
    kernel, _ = Linear(4 * units, name="recurrent").leaves(units)
    if state is None:
      zeros = jnp.zeros((x.shape[0], units), jnp.float32)
      state = LSTMState(zeros, zeros)

    def step(before: LSTMState, now: tuple[jax.Array, jax.Array]) -> tuple[LSTMState, jax.Array]:
      given, counts = now
      gates = given + ops.linear(before.h.astype(given.dtype), kernel)
      i, f, g, o = jnp.split(gates.astype(jnp.float32), 4, axis=-1)
      c = jax.nn.sigmoid(f) * before.c + jax.nn.sigmoid(i) * jnp.tanh(g)
      h = jax.nn.sigmoid(o) * jnp.tanh(c)
      h, c = jnp.where(counts[:, None], h, before.h), jnp.where(counts[:, None], c, before.c)
      return LSTMState(h, c), h

    after, hidden = jax.lax.scan(step, state, (moved.swapaxes(0, 1), real.swapaxes(0, 1)))
    hidden = hidden.swapaxes(0, 1)
    self.sow("taps", "recurrent_input", jnp.concatenate([state.h[:, None], hidden[:, :-1]], axis=1))
    return hidden.astype(x.dtype), after


@jax.jit
def _logits(table: Any, bias: jax.Array | None, h: jax.Array) -> jax.Array:
  logits = ops.attend(h, table).astype(jnp.float32)
  return logits if bias is None else logits + bias


@dataclasses.dataclass(frozen=True)
class LSTM(BlockModel):
  """A long short-term memory over tokens (Hochreiter & Schmidhuber 1997; with forget gates, Gers et al. 2000).

  The output at each token predicts the next; padding leaves the state as it is.
  """

  config: LSTMConfig = LSTMConfig()
  sizes: LSTMSizes | None = None

  architecture = "lstm"
  axes = AXES
  stages = (Stage("input", ("input",), ""), Stage("recurrent", ("recurrent",), ""))

  def init(self, key: jax.Array) -> Params:
    """Random parameters of `sizes`: kernels of variance 1 / inputs, recurrent ones orthogonal, forget gates open.

    Raises:
      ValueError: the model has no sizes, or too many layers.
    """
    s = self.sized()
    if not 1 <= s.layers <= LSTM_DEPTH:
      raise ValueError(f"LSTM of {s.layers} layers: from 1 to {LSTM_DEPTH}")
    keys = jax.random.split(key, 2 * s.layers + 2)
    draw, turn = nn.initializers.variance_scaling(1.0, "fan_in", "normal"), nn.initializers.orthogonal()
    open_ = jnp.zeros((4, s.units)).at[1].set(1.0).reshape(-1)
    layers = {
      str(i): {
        "input": {"kernel": draw(keys[2 * i], (s.units if i else s.embed, 4 * s.units), jnp.float32), "bias": open_},
        "recurrent": {"kernel": turn(keys[2 * i + 1], (s.units, 4 * s.units), jnp.float32)},
      }
      for i in range(s.layers)
    }
    table = nn.initializers.normal
    return {
      "embed": {"table": table(s.embed**-0.5)(keys[-2], (s.vocab, s.embed), jnp.float32)},
      "layers": layers,
      "head": {"table": table(s.units**-0.5)(keys[-1], (s.vocab, s.units), jnp.float32), "bias": jnp.zeros((s.vocab,))},
    }

  def start(self, params: Params, inputs: Any) -> Any:
    """Embeds the tokens; the carry holds the hidden stream, which tokens are real, and the states."""
    inputs = inputs if isinstance(inputs, Mapping) else {"tokens": inputs}
    tokens = checked_tokens(inputs["tokens"], params["embed"]["table"].shape[-2])
    cache, mask = inputs.get("cache"), inputs.get("attention_mask")
    if cache is None and tokens.shape[1] > self.config.max_length:
      raise ValueError(f"{tokens.shape[1]} tokens are longer than the model's context of {self.config.max_length}")
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask) != 0
    cache = None if cache is None else cache.reserve(mask)
    return {"h": ops.embed(tokens, resolve(params, params["embed"]["table"])), "real": mask, "cache": cache}

  def blocks(self, params: Params) -> tuple[Block, ...]:
    """The layers that the tree has, in order."""
    return tuple(Block(f"layers/{i}", "recurrent", self.stages) for i in numbered(params, "layers"))

  def run(self, block: Block, params: Params, carry: Any, taps: tuple[str, ...] = ()) -> tuple[Any, dict]:
    """One layer over all tokens; `taps` names stages whose inputs are returned."""
    cache, layer = carry["cache"], resolve(params, params["layers"][block.path.rpartition("/")[2]])
    state = None if cache is None else cache.layer(block.path)
    (h, state), tapped = run_module(_Layer(), layer, carry["h"], carry["real"], state, taps=tuple(taps))
    cache = None if cache is None else cache.with_layer(block.path, state)
    return {**carry, "h": h, "cache": cache}, tapped

  def finish(self, params: Params, carry: Any, last: bool = False, span: tuple[Any, int] | None = None) -> Any:
    """Logits (of the last token alone with `last`, of `span[1]` tokens from `span[0]` on), and the advanced cache."""
    table = resolve(params, params["head"]["table"])
    logits = _logits(table, params["head"].get("bias"), of_tokens(carry["h"], last, span))
    cache = carry["cache"]
    return logits if cache is None else (logits, cache.advance(carry["h"].shape[1]))

  def features(self, params: Params, carry: Any) -> jax.Array:
    """What a head of a task reads: `[batch, length, units]` of the last layer."""
    return carry["h"]

  def extents(self, params: Params) -> dict[str, int]:
    """Extents of the axes that join layers; none of them may be narrowed in one place alone."""
    below, known = params["embed"]["table"].shape[-1] if "embed" in params else None, {"gate": 4}
    for i in numbered(params, "layers"):
      layer = params["layers"][i]
      shapes = {name: layer[name]["kernel"].shape for name in ("input", "recurrent") if "kernel" in layer.get(name, {})}
      if below is None and "input" in shapes:
        below = shapes["input"][-2]
      if below is not None:
        known[f"below_{i}"] = below
      below = shapes["recurrent"][-2] if "recurrent" in shapes else None
      if below is not None:
        known[f"unit_{i}"] = below
    return known if below is None else {**known, "top": below}

  def states(self, params: Params, batch: int) -> dict[str, LSTMState]:
    """Per block path, the state before the first token."""
    shapes = {i: (batch, params["layers"][i]["recurrent"]["kernel"].shape[-2]) for i in numbered(params, "layers")}
    return {f"layers/{i}": LSTMState(jnp.zeros(shape), jnp.zeros(shape)) for i, shape in shapes.items()}
