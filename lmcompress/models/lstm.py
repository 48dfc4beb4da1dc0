"""A recurrent language model: an embedding, layers of LSTM, and a dense layer that predicts at every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmcompress import ops
from lmcompress.arrays import resolve
from lmcompress.models.base import BlockModel, checked_tokens, numbered, of_tokens, run_module
from lmcompress.models.recurrent import Recurrent, RecurrentState, empty_state, recurrent_axes, recurrent_params
from lmcompress.types import Block, Params, Stage

LSTM_DEPTH = 16
"""Layers at most."""

AXES: Mapping[str, tuple[Any, ...]] = {
  "embed/table": ("vocab", "embed"),
  **{
    path: axes
    for i in range(LSTM_DEPTH)
    for path, axes in recurrent_axes(f"layers/{i}", f"below_{i}", f"unit_{i}").items()
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
    layers = {
      str(i): recurrent_params(keys[2 * i : 2 * i + 2], s.units if i else s.embed, s.units, 4) for i in range(s.layers)
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
    (h, state), tapped = run_module(Recurrent(4), layer, carry["h"], carry["real"], state, taps=tuple(taps))
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

  def states(self, params: Params, batch: int) -> dict[str, RecurrentState]:
    """Per block path, the state before the first token."""
    layers = params["layers"]
    return {f"layers/{i}": empty_state(layers[i], batch) for i in numbered(params, "layers")}
