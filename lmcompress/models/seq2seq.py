"""A recurrent encoder-decoder: one recurrence reads a sequence, and another begins from its last state and writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmcompress import ops
from lmcompress.arrays import resolve
from lmcompress.models.base import DECODER, BlockModel, Decoding, checked_tokens, numbered, of_tokens, run_module
from lmcompress.models.recurrent import (
  GATES,
  Recurrent,
  RecurrentState,
  empty_state,
  gates_of,
  recurrent_axes,
  recurrent_params,
)
from lmcompress.types import Block, Params, Stage, WeightError

SEQ2SEQ_DEPTH = 8
"""Layers at most of each side."""

SIDES = ("encoder", "decoder")

AXES: Mapping[str, tuple[Any, ...]] = {
  "embed/table": ("source", "encoder_below_0"),
  "decoder/embed/table": ("vocab", "decoder_below_0"),
  **{
    path: axes
    for side in SIDES
    for i in range(SEQ2SEQ_DEPTH)
    for path, axes in recurrent_axes(f"{side}/layers/{i}", f"{side}_below_{i}", f"unit_{i}", bias=True).items()
  },
  "head/table": ("vocab", "top"),
  "head/bias": ("vocab",),
}


@dataclasses.dataclass(frozen=True)
class Seq2SeqConfig:
  """What the parameter tree cannot say. Depths, widths and the kind of cell are read from the tree.

  Attributes:
    start: the token that the decoder reads first.
    max_length: tokens of each side at most.
  """

  start: int = 2
  max_length: int = 512


@dataclasses.dataclass(frozen=True)
class Seq2SeqSizes:
  """Sizes for `init` only; a tree in hand speaks for itself.

  Attributes:
    source, vocab: entries of the two vocabularies, of what is read and of what is written.
    cell: `gru` or `lstm`.
  """

  source: int = 29
  vocab: int = 74
  embed: int = 256
  units: int = 256
  layers: int = 1
  cell: str = "gru"


@dataclasses.dataclass(frozen=True)
class Seq2Seq(BlockModel):
  """A recurrent encoder-decoder (Cho et al. 2014, arXiv:1406.1078; Sutskever et al. 2014, arXiv:1409.3215).

  Layer by layer the decoder starts from the state in which the encoder ended. `apply` takes `decoder_input_ids` and
  gives logits for them; to write a token at a time, `encode` once and `decode` as often as needed.
  """

  config: Seq2SeqConfig = Seq2SeqConfig()
  sizes: Seq2SeqSizes | None = None

  architecture = "seq2seq"
  axes = AXES
  takes = frozenset({"attention_mask", "decoder_input_ids"})
  causal: ClassVar[bool] = False

  def init(self, key: jax.Array) -> Params:
    """Random parameters of `sizes`.

    Raises:
      ValueError: the model has no sizes, too many layers, or a cell that is not known.
    """
    s = self.sized()
    if not 1 <= s.layers <= SEQ2SEQ_DEPTH or s.cell not in GATES:
      cells = " or ".join(GATES)
      raise ValueError(f"Seq2Seq(layers={s.layers}, cell={s.cell!r}): 1 to {SEQ2SEQ_DEPTH} layers of {cells}")
    keys, table = jax.random.split(key, 4 * s.layers + 3), nn.initializers.normal
    sides: dict[str, Params] = {
      side: {
        "layers": {
          str(i): recurrent_params(
            keys[4 * i + 2 * n : 4 * i + 2 * n + 2], s.units if i else s.embed, s.units, GATES[s.cell]
          )
          for i in range(s.layers)
        }
      }
      for n, side in enumerate(SIDES)
    }
    sides["decoder"]["embed"] = {"table": table(s.embed**-0.5)(keys[-1], (s.vocab, s.embed), jnp.float32)}
    head = table(s.units**-0.5)(keys[-2], (s.vocab, s.units), jnp.float32)
    return {
      "embed": {"table": table(s.embed**-0.5)(keys[-3], (s.source, s.embed), jnp.float32)},
      **sides,
      "head": {"table": head, "bias": jnp.zeros((s.vocab,), jnp.float32)},
    }

  def _embedded(self, params: Params, ids: Any) -> jax.Array:
    table = params["embed"]["table"]
    tokens = checked_tokens(ids, table.shape[-2])
    if tokens.shape[1] > self.config.max_length:
      raise ValueError(f"{tokens.shape[1]} tokens are longer than the model's context of {self.config.max_length}")
    return ops.embed(tokens, resolve(params, table))

  def _read(self, params: Params, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's part of a carry."""
    h, mask = self._embedded(params, inputs["tokens"]), inputs.get("attention_mask")
    real = jnp.ones(h.shape[:2], bool) if mask is None else jnp.asarray(mask) != 0
    return {"h": h, "real": real, "states": (), "written": None, "writes": None}

  def start(self, params: Params, inputs: Any) -> Any:
    """Embeds both sides; the carry holds the stream, which tokens are real, and the states to hand over.

    Raises:
      ValueError: tokens are no `[batch, length]` integers, too many, or (a WeightError) there are none for the decoder.
    """
    inputs = inputs if isinstance(inputs, Mapping) else {"tokens": inputs}
    if inputs.get("decoder_input_ids") is None:
      start = self.config.start
      raise WeightError(f"Seq2Seq takes decoder_input_ids, what its decoder has read, from token {start} on")
    carry, written = self._read(params, inputs), self._embedded(params["decoder"], inputs["decoder_input_ids"])
    if written.shape[0] != carry["h"].shape[0]:
      raise ValueError(f"decoder_input_ids have {written.shape[0]} rows and tokens {carry['h'].shape[0]}")
    mask = inputs.get(DECODER)
    writes = jnp.ones(written.shape[:2], bool) if mask is None else jnp.asarray(mask) != 0
    return {**carry, "written": written, "writes": writes}

  def blocks(self, params: Params) -> tuple[Block, ...]:
    """The encoder's layers and the decoder's."""
    layers = [(side, i) for side in SIDES for i in numbered(params.get(side, {}), "layers")]
    return tuple(Block(f"{side}/layers/{i}", side, _STAGES[side]) for side, i in layers)

  def run(self, block: Block, params: Params, carry: Any, taps: tuple[str, ...] = ()) -> tuple[Any, dict]:
    """One layer over all its tokens; `taps` names stages whose inputs are returned."""
    layer = resolve(params, params[block.kind]["layers"][block.path.rpartition("/")[2]])
    before, states = None, carry["states"]
    if block.kind == "decoder":
      if carry["written"] is not None:
        carry = {**carry, "h": carry["written"], "real": carry["writes"], "written": None, "writes": None}
      before = states[0] if states else None
      states = states[1:] or states  # a side that is deeper goes on from the last state
    module = Recurrent(gates_of(layer))
    (h, after), tapped = run_module(module, layer, carry["h"], carry["real"], before, taps=tuple(taps))
    return {**carry, "h": h, "states": states if block.kind == "decoder" else (*states, after)}, tapped

  def finish(self, params: Params, carry: Any, last: bool = False, span: tuple[Any, int] | None = None) -> Any:
    """Logits of what the decoder reads (of the last token alone with `last`, of `span[1]` from `span[0]` on)."""
    head = params["head"]
    return _logits(resolve(params, head["table"]), head.get("bias"), of_tokens(carry["h"], last, span))

  def features(self, params: Params, carry: Any) -> jax.Array:
    """What a head reads: the decoder's states `[batch, length, units]`."""
    return carry["h"]

  def extents(self, params: Params) -> dict[str, int]:
    """Extents of the axes that join layers; none of them may be narrowed in one place alone."""
    known: dict[str, int] = {}
    for side, ends in (("encoder", params), ("decoder", params.get("decoder", {}))):
      below = ends["embed"]["table"].shape[-1] if "embed" in ends else None
      layers = params.get(side, {})
      for i in numbered(layers, "layers"):
        layer = layers["layers"][i]
        if below is not None:
          known[f"{side}_below_{i}"] = below
        if "kernel" not in layer.get("recurrent", {}):
          below = None
          continue
        below = known[f"unit_{i}"] = layer["recurrent"]["kernel"].shape[-2]
        known["gate"] = gates_of(layer)
      if side == "decoder" and below is not None:
        known["top"] = below
    return known

  def states(self, params: Params, batch: int) -> dict[str, RecurrentState]:
    """Per block path of the decoder, an empty state."""
    layers = params["decoder"]["layers"]
    return {f"decoder/layers/{i}": empty_state(layers[i], batch) for i in numbered(params["decoder"], "layers")}

  def encode(self, params: Params, tokens: Any, cache: Any, attention_mask: Any = None) -> Decoding:
    """Reads `tokens: [batch, source]` once; `cache` is an empty one for the decoder, a row or more for each source."""
    carry = self._read(params, {"tokens": tokens, "attention_mask": attention_mask})
    for block in self.blocks(params):
      if block.kind == "encoder":
        carry, _ = self.run(block, params, carry)
    rows, states = cache.real.shape[0] // carry["h"].shape[0], carry["states"]
    for n, i in enumerate(numbered(params["decoder"], "layers")):
      state = jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), states[min(n, len(states) - 1)])
      cache = cache.with_layer(f"decoder/layers/{i}", state)
    return Decoding(cache, {}, carry["real"])

  def decode(self, params: Params, ids: Any, state: Decoding) -> tuple[jax.Array, Decoding]:
    """Logits `[batch, vocab]` of the last of `ids: [batch, length]`, which continue what the decoder has read."""
    h = self._embedded(params["decoder"], ids)
    real = jnp.ones(h.shape[:2], bool)
    cache, length = state.cache.reserve(real), h.shape[1]
    for i in numbered(params["decoder"], "layers"):
      path, layer = f"decoder/layers/{i}", resolve(params, params["decoder"]["layers"][i])
      (h, own), _ = run_module(Recurrent(gates_of(layer)), layer, h, real, cache.layer(path))
      cache = cache.with_layer(path, own)
    return self.finish(params, {"h": h}, last=True)[:, 0], state._replace(cache=cache.advance(length))


@jax.jit
def _logits(table: Any, bias: jax.Array | None, h: jax.Array) -> jax.Array:
  logits = ops.attend(h, table).astype(jnp.float32)
  return logits if bias is None else logits + bias


_STAGES = {
  side: (Stage("input", ("input",), "", mask=mask), Stage("recurrent", ("recurrent",), "", mask=mask))
  for side, mask in (("encoder", "attention_mask"), ("decoder", DECODER))
}
