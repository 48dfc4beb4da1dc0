"""Encoder-decoders as block views: the encoder's layers, the handing over, and the decoder's layers that look at it."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmcompress import ops
from lmcompress.arrays import resolve
from lmcompress.models.base import (
  DECODER,
  BlockModel,
  Decoding,
  checked_tokens,
  numbered,
  of_tokens,
  positions_of,
  run_module,
  unturned,
)
from lmcompress.models.layers import Linear, linears
from lmcompress.types import Block, Params, Stage, WeightError

HANDS_OVER = "hands over"
"""The kind of the block between both sides."""


class Attention(nn.Module):
  """Attention of the tokens of one side to themselves.

  Attributes:
    head: entries of a head.
    width: of all heads, for `init` alone.
    use_bias: whether `init` makes biases.
    scale: factor on the scores, by default `head**-0.5`.
  """

  head: int
  width: int = 0
  use_bias: bool = False
  scale: float | None = None

  @nn.compact
  def __call__(self, x: jax.Array, view: ops.View, layer_cache: Any = None) -> tuple[jax.Array, Any]:
    dense = functools.partial(Linear, self.width, self.use_bias)
    q, k, v = linears(x, dense(name="q"), dense(name="k"), dense(name="v"))
    mixed, layer_cache = ops.attention(q, k, v, view, self.head, layer_cache, self.scale)
    self.sow("taps", "o_input", mixed)
    return Linear(x.shape[-1], self.use_bias, joins=True, name="o")(mixed), layer_cache


class Cross(nn.Module):
  """Attention to what the encoder gave, or to keys and values that were made of it before; attributes as there."""

  head: int
  width: int = 0
  use_bias: bool = False
  scale: float | None = None

  @nn.compact
  def __call__(self, x: jax.Array, memory: jax.Array | None, view: ops.View, held: Any = None) -> jax.Array:
    q = Linear(self.width, self.use_bias, name="q")(x)
    k, v = held if memory is None else self.held(memory)
    scale = self.head**-0.5 if self.scale is None else self.scale
    mixed = ops.cross_attention(q, k, v, view, self.head, scale=scale)
    self.sow("taps", "cross_o_input", mixed)
    return Linear(x.shape[-1], self.use_bias, joins=True, name="o")(mixed)

  @nn.compact
  def held(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values `[batch, kv, slots, head]` of the encoder's states."""
    dense = functools.partial(Linear, self.width, self.use_bias)
    k, v = linears(memory, dense(name="k"), dense(name="v"))
    return ops.split_heads(k, self.head), ops.split_heads(v, self.head)


class Held(nn.Module):
  """The keys and values of a decoder layer's `cross`."""

  head: int

  @nn.compact
  def __call__(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
    return Cross(self.head, name="cross").held(memory)


@dataclasses.dataclass(frozen=True)
class EncoderDecoder(BlockModel):
  """An encoder and a decoder, both of layers with attention; `apply` takes `decoder_input_ids` and gives their logits.

  To write text a token at a time, `encode` once and `decode` as often as needed. A subclass gives the modules of both
  layers, `embedded`, `handed`, `features`, `logits`, `stages` and, where positions are biases of attention, `biased`.
  Its config has `head_dim`, `max_length` and `start`, the token that the decoder reads first. The tree has `layers`
  under `encoder` and `decoder`; the encoder's `final_norm`, or else its `embed_norm`, stands for the handing over.
  """

  takes: ClassVar[frozenset[str]] = frozenset({"attention_mask", "decoder_input_ids"})
  causal: ClassVar[bool] = False

  @abc.abstractmethod
  def encoder_layer(self) -> nn.Module:
    """`(h, view) -> h`."""

  @abc.abstractmethod
  def decoder_layer(self) -> nn.Module:
    """`(h, view, memory or None, seen, layer_cache, held) -> (h, layer_cache)`."""

  @abc.abstractmethod
  def embedded(self, params: Params, side: str, ids: jax.Array, positions: jax.Array) -> jax.Array:
    """The hidden stream `[batch, length, embed]` before a side's first layer."""

  @abc.abstractmethod
  def handed(self, layer: Params, h: jax.Array) -> jax.Array:
    """What the decoder sees of the encoder's last states; `layer` is what the tree has at the block's path."""

  @abc.abstractmethod
  def features(self, params: Params, carry: Any) -> jax.Array:
    """What a head reads: the decoder's states `[batch, length, embed]` after its last norm."""

  @abc.abstractmethod
  def logits(self, params: Params, h: jax.Array) -> jax.Array:
    """float32 `[batch, length, vocab]` of such states."""

  @abc.abstractmethod
  def stages_of(self, side: str, layer: Params) -> tuple[Stage, ...]:
    """The stages of a layer."""

  def biased(self, params: Params, side: str, queries: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
    """What positions `[batch, ...]` add to the scores of attention, as `View` takes it; nothing here."""
    return {}

  def _view(self, real: jax.Array, length: int, **other: Any) -> ops.View:
    """What `length` tokens see of the slots that are `real`, in any order but for what `other` says."""
    cos, sin = unturned(jnp.zeros((real.shape[0], length), jnp.int32), self.config.head_dim)
    return ops.View(real, **{"slot": jnp.int32(0), "causal": False, **other}, cos=cos, sin=sin)

  def _checked(self, params: Params, ids: Any) -> jax.Array:
    tokens = checked_tokens(ids, params["embed"]["table"].shape[-2])
    if tokens.shape[1] > self.config.max_length:
      raise ValueError(f"{tokens.shape[1]} tokens are longer than the model's context of {self.config.max_length}")
    return tokens

  def _read(self, params: Params, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's part of a carry."""
    tokens, mask = self._checked(params, inputs["tokens"]), inputs.get("attention_mask")
    real = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask) != 0
    at = positions_of(real)
    view = self._view(real, tokens.shape[1], **self.biased(params, "encoder", at, at))
    h = self.embedded(params, "encoder", tokens, at)
    return {"h": h, "view": view, "memory": None, "written": None, "writes": None, "seen": None}

  def start(self, params: Params, inputs: Any) -> Any:
    """Embeds both sides; the carry holds the stream, first the encoder's, what it may see, and what comes later.

    Raises:
      ValueError: tokens are no `[batch, length]` integers, too many, or (a WeightError) there are none for the decoder.
    """
    inputs = inputs if isinstance(inputs, Mapping) else {"tokens": inputs}
    if inputs.get("decoder_input_ids") is None:
      name, first = type(self).__name__, self.config.start
      raise WeightError(f"{name} takes decoder_input_ids, what its decoder has read, from token {first} on")
    carry, ids = self._read(params, inputs), self._checked(params, inputs["decoder_input_ids"])
    if ids.shape[0] != carry["h"].shape[0]:
      raise ValueError(f"decoder_input_ids have {ids.shape[0]} rows and tokens {carry['h'].shape[0]}")
    mask = inputs.get(DECODER)
    real = jnp.ones(ids.shape, bool) if mask is None else jnp.asarray(mask) != 0
    at = positions_of(real)
    return {
      **carry, "written": self.embedded(params, "decoder", ids, at),
      "writes": self._view(real, ids.shape[1], causal=True, **self.biased(params, "decoder", at, at)),
      "seen": self._view(carry["view"].real, ids.shape[1]),
    }  # fmt: skip

  def blocks(self, params: Params) -> tuple[Block, ...]:
    """The encoder's layers, the block that hands over, and the decoder's layers."""
    found = []
    for side in ("encoder", "decoder"):
      layers = params.get(side, {})
      for i in numbered(layers, "layers"):
        found.append(Block(f"{side}/layers/{i}", side, self.stages_of(side, layers["layers"][i])))
      if side == "encoder":
        at = next((name for name in ("final_norm", "embed_norm") if name in layers), None)
        found += [] if at is None else [Block(f"encoder/{at}", HANDS_OVER, ())]
    return tuple(found)

  def run(self, block: Block, params: Params, carry: Any, taps: tuple[str, ...] = ()) -> tuple[Any, dict]:
    """One layer, or the handing over; `taps` names stages whose inputs are returned."""
    layer = params
    for part in block.path.split("/"):
      layer = layer[part]
    layer = resolve(params, layer)
    if block.kind == "encoder":
      h, tapped = run_module(self.encoder_layer(), layer, carry["h"], carry["view"], taps=tuple(taps))
      return {**carry, "h": h}, tapped
    if block.kind == HANDS_OVER:
      memory = self.handed(layer, carry["h"])
      return {**carry, "memory": memory, "h": carry["written"], "written": None, "view": carry["writes"]}, {}
    (h, _), tapped = run_module(
      self.decoder_layer(), layer, carry["h"], carry["writes"], carry["memory"], carry["seen"], None, None,
      taps=tuple(taps),
    )  # fmt: skip
    return {**carry, "h": h}, tapped

  def finish(self, params: Params, carry: Any, last: bool = False, span: tuple[Any, int] | None = None) -> Any:
    """Logits of what the decoder reads (of the last token alone with `last`, of `span[1]` from `span[0]` on)."""
    return self.logits(params, self.features(params, {**carry, "h": of_tokens(carry["h"], last, span)}))

  def extents(self, params: Params) -> dict[str, int]:
    """Extents of logical axes that no array's shape tells by itself."""
    return {"head": self.config.head_dim}

  def cache_shapes(self, params: Params) -> dict[str, tuple[int, int]]:
    """Per block path of the decoder, the heads and the head dimension that a cache must hold."""
    head = self.config.head_dim
    layers = params["decoder"]["layers"]
    return {
      f"decoder/layers/{i}": (layers[i]["attn"]["k"]["kernel"].shape[-1] // head, head)
      for i in numbered(params["decoder"], "layers")
    }

  def encode(self, params: Params, tokens: Any, cache: Any, attention_mask: Any = None) -> Decoding:
    """Reads `tokens: [batch, source]` once; `cache` is an empty one for the decoder's tokens."""
    carry = self._read(params, {"tokens": tokens, "attention_mask": attention_mask})
    held = {}
    for block in self.blocks(params):
      if block.kind != "decoder":
        carry, _ = self.run(block, params, carry)
      else:
        layer = resolve(params, params["decoder"]["layers"][block.path.rpartition("/")[2]])
        held[block.path], _ = run_module(Held(self.config.head_dim), {"cross": layer["cross"]}, carry["memory"])
    # the encoder's own view was handed over as None: what is real of the source stands in `real`
    real = jnp.ones(jnp.shape(tokens), bool) if attention_mask is None else jnp.asarray(attention_mask) != 0
    return Decoding(cache, held, real)

  def decode(self, params: Params, ids: Any, state: Decoding) -> tuple[jax.Array, Decoding]:
    """Logits `[batch, vocab]` of the last of `ids: [batch, length]`, which continue what the decoder has read."""
    ids = self._checked(params, ids)
    cache = state.cache.reserve(jnp.ones(ids.shape, bool))
    slots = jnp.broadcast_to(jnp.arange(cache.real.shape[1]), cache.real.shape)
    here = jnp.broadcast_to(cache.length + jnp.arange(ids.shape[1]), ids.shape)
    h = self.embedded(params, "decoder", ids, here)
    added = self.biased(params, "decoder", here, slots)
    view = self._view(cache.real, ids.shape[1], slot=cache.length, causal=True, **added)
    seen = self._view(state.real, ids.shape[1])
    for block in self.blocks(params):
      if block.kind == "decoder":
        layer = resolve(params, params["decoder"]["layers"][block.path.rpartition("/")[2]])
        (h, own), _ = run_module(
          self.decoder_layer(), layer, h, view, None, seen, cache.layer(block.path), state.held[block.path]
        )
        cache = cache.with_layer(block.path, own)
    logits = self.finish(params, {"h": h}, last=True)[:, 0]
    return logits, state._replace(cache=cache.advance(ids.shape[1]))


def cross_stages(before: str) -> tuple[Stage, ...]:
  """The stages of a decoder layer's `cross`, whose queries the norm `before` feeds, or nothing that could be scaled."""
  return (
    Stage("cross_q", ("cross/q",), before, mask=DECODER),
    Stage("cross_kv", ("cross/k", "cross/v"), ""),
    Stage("cross_o", ("cross/o",), "cross/v", free=("head",), mask=DECODER),
  )


def mask_of(side: str) -> str:
  """The name of the mask of a side's tokens."""
  return "attention_mask" if side == "encoder" else DECODER
