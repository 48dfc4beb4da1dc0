"""T5 and Flan-T5: an encoder and a decoder that looks at it, positions as biases of attention, RMS norms."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmcompress import ops
from lmcompress.arrays import resolve
from lmcompress.models.base import run_module
from lmcompress.models.encoder_decoder import Attention, Cross, EncoderDecoder, cross_stages, mask_of
from lmcompress.models.layers import ACTIVATIONS, Linear, RMSNorm, linears
from lmcompress.types import Params, Stage


def _attention_axes(at: str, heads: str) -> dict[str, tuple[Any, ...]]:
  split = (heads, "head")
  return {**{f"{at}/{x}/kernel": ("embed", split) for x in "qkv"}, f"{at}/o/kernel": (split, "embed")}


def _layer_axes(side: str) -> dict[str, tuple[Any, ...]]:
  at = f"{side}/layers/*"
  return {
    f"{at}/attn_norm/scale": ("embed",),
    **_attention_axes(f"{at}/attn", f"{side}_kv"),
    f"{at}/mlp_norm/scale": ("embed",),
    f"{at}/mlp/gate/kernel": ("embed", "mlp"),
    f"{at}/mlp/up/kernel": ("embed", "mlp"),
    f"{at}/mlp/down/kernel": ("mlp", "embed"),
    f"{side}/relative/bias": ("bucket", f"{side}_kv"),
    f"{side}/final_norm/scale": ("embed",),
  }


AXES: Mapping[str, tuple[Any, ...]] = {
  "embed/table": ("vocab", "embed"),
  **_layer_axes("encoder"),
  **_layer_axes("decoder"),
  "decoder/layers/*/cross_norm/scale": ("embed",),
  **_attention_axes("decoder/layers/*/cross", "kv"),
  "head/table": ("vocab", "embed"),
}


@dataclasses.dataclass(frozen=True)
class T5Config:
  """What the parameter tree cannot say. Depths, widths, heads, gates and tying are read from the tree.

  Attributes:
    activation: one of `layers.ACTIVATIONS`, of the gate where there is one.
    max_distance: from how many tokens on all distances share a bias.
    scaled: whether states are divided by `embed**0.5` before the head reads them (the first T5, not v1.1 and Flan).
    start: the token that the decoder reads first.
    max_length: tokens that either side takes at most; the architecture itself has no limit.
  """

  head_dim: int
  rms_epsilon: float = 1e-6
  activation: str = "relu"
  max_distance: int = 128
  scaled: bool = True
  start: int = 0
  max_length: int = 4096


@dataclasses.dataclass(frozen=True)
class T5Sizes:
  """Sizes for `init` only; a tree in hand speaks for itself."""

  vocab: int
  embed: int
  mlp: int
  layers: int
  decoder_layers: int
  heads: int
  buckets: int = 32
  gated: bool = False
  tied: bool = True


def _heads(layer: Any) -> tuple[int, int, bool, float]:
  """What a layer's attentions are made with: neither biases nor a scale."""
  head = layer.config.head_dim
  return head, layer.sizes.heads * head if layer.sizes else 0, False, 1.0


class _Mlp(nn.Module):
  config: T5Config
  sizes: T5Sizes | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    s, act = self.sizes, ACTIVATIONS[self.config.activation]
    dense = functools.partial(Linear, s.mlp if s else 0)
    if s.gated if s else self.has_variable("params", "gate"):
      gate, up = linears(x, dense(name="gate"), dense(name="up"))
      hidden = act(gate) * up
    else:
      hidden = act(dense(name="up")(x))
    self.sow("taps", "down_input", hidden)
    return Linear(x.shape[-1], joins=True, name="down")(hidden)


class _EncoderLayer(nn.Module):
  config: T5Config
  sizes: T5Sizes | None = None

  @nn.compact
  def __call__(self, h: jax.Array, view: ops.View) -> jax.Array:
    norm = functools.partial(RMSNorm, self.config.rms_epsilon)
    x = norm(name="attn_norm")(h)
    self.sow("taps", "qkv_input", x)
    h = h + Attention(*_heads(self), name="attn")(x, view)[0]
    x = norm(name="mlp_norm")(h)
    self.sow("taps", "up_input", x)
    return h + _Mlp(self.config, self.sizes, name="mlp")(x)


class _DecoderLayer(nn.Module):
  config: T5Config
  sizes: T5Sizes | None = None

  @nn.compact
  def __call__(
    self, h: jax.Array, view: ops.View, memory: jax.Array | None, seen: ops.View, layer_cache: Any, held: Any
  ) -> tuple[jax.Array, Any]:
    norm = functools.partial(RMSNorm, self.config.rms_epsilon)
    x = norm(name="attn_norm")(h)
    self.sow("taps", "qkv_input", x)
    mixed, layer_cache = Attention(*_heads(self), name="attn")(x, view, layer_cache)
    h = h + mixed
    x = norm(name="cross_norm")(h)
    self.sow("taps", "cross_q_input", x)
    if memory is not None:
      self.sow("taps", "cross_kv_input", memory)
    h = h + Cross(*_heads(self), name="cross")(x, memory, seen, held)
    x = norm(name="mlp_norm")(h)
    self.sow("taps", "up_input", x)
    return h + _Mlp(self.config, self.sizes, name="mlp")(x), layer_cache


def buckets_of(distance: jax.Array, buckets: int, most: int, both: bool) -> jax.Array:
  """The bucket of each distance `key - query`: near ones alone, far ones by their logarithm (arXiv:1910.10683, 2.1)."""
  side = jnp.zeros_like(distance)
  if both:
    buckets //= 2
    side = jnp.where(distance > 0, buckets, 0)
    distance = jnp.abs(distance)
  else:
    distance = jnp.maximum(-distance, 0)
  exact = buckets // 2
  far = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(most / exact) * (buckets - exact)
  far = jnp.minimum(exact + far.astype(jnp.int32), buckets - 1)
  return side + jnp.where(distance < exact, distance, far)


def _scaled(layer: Mapping[str, Any], head: int) -> Params:
  """A new layer, its queries smaller by the root of a head's width, by which attention does not divide."""
  attentions = {name: part for name, part in layer.items() if "q" in part}
  smaller = {name: {**part, "q": {"kernel": part["q"]["kernel"] * head**-0.5}} for name, part in attentions.items()}
  return {**layer, **smaller}


@dataclasses.dataclass(frozen=True)
class T5(EncoderDecoder):
  """The T5 architecture (Raffel et al. 2019, arXiv:1910.10683; v1.1 and Flan with gates)."""

  config: T5Config
  sizes: T5Sizes | None = None

  architecture = "t5"
  axes = AXES

  def init(self, key: jax.Array) -> Params:
    """Random parameters of `sizes`, layers apart.

    Raises:
      ValueError: the model has no sizes.
    """
    s, c = self.sized(), self.config
    keys = jax.random.split(key, s.layers + s.decoder_layers + 4)
    h, view = jnp.zeros((1, 1, s.embed), jnp.float32), self._view(jnp.ones((1, 1), bool), 1)
    draw, one = nn.initializers.normal, {"scale": jnp.ones((s.embed,), jnp.float32)}
    first, second = keys[: s.layers], keys[s.layers : -4]
    given = {
      "encoder": [_EncoderLayer(c, s).init(k, h, view)["params"] for k in first],
      "decoder": [_DecoderLayer(c, s).init(k, h, view, h, view, None, None)["params"] for k in second],
    }
    params: Params = {
      "embed": {"table": draw(1.0)(keys[-1], (s.vocab, s.embed), jnp.float32)},
      **{
        side: {
          "layers": {str(i): _scaled(layer, c.head_dim) for i, layer in enumerate(layers)},
          "relative": {"bias": draw(s.embed**-0.5)(keys[-2 - n], (s.buckets, s.heads), jnp.float32)},
          "final_norm": dict(one),
        }
        for n, (side, layers) in enumerate(given.items())
      },
    }
    if not s.tied:
      params["head"] = {"table": draw(s.embed**-0.5)(keys[-4], (s.vocab, s.embed), jnp.float32)}
    return params

  def encoder_layer(self) -> nn.Module:
    """A layer of the encoder."""
    return _EncoderLayer(self.config)

  def decoder_layer(self) -> nn.Module:
    """A layer of the decoder."""
    return _DecoderLayer(self.config)

  def embedded(self, params: Params, side: str, ids: jax.Array, positions: jax.Array) -> jax.Array:
    """The hidden stream `[batch, length, embed]` before a side's first layer."""
    return ops.embed(ids, resolve(params, params["embed"]["table"]))

  def biased(self, params: Params, side: str, queries: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
    """`bias: [batch, heads, queries, keys]` float32 of positions `[batch, ...]`."""
    table = resolve(params, params[side]["relative"]["bias"]).astype(jnp.float32)
    distance = keys[:, None, :] - queries[:, :, None]
    found = buckets_of(distance, table.shape[0], self.config.max_distance, side == "encoder")
    return {"bias": jnp.moveaxis(table[found], -1, 1)}

  def handed(self, layer: Params, h: jax.Array) -> jax.Array:
    """The encoder's last states, normed."""
    return run_module(RMSNorm(self.config.rms_epsilon), layer, h)[0]

  def features(self, params: Params, carry: Any) -> jax.Array:
    """What a head reads: the decoder's normed states `[batch, length, embed]`."""
    norm = resolve(params, params["decoder"]["final_norm"])
    return run_module(RMSNorm(self.config.rms_epsilon), norm, carry["h"])[0]

  def logits(self, params: Params, h: jax.Array) -> jax.Array:
    """float32 `[batch, length, vocab]` of normed states."""
    h = h * h.shape[-1] ** -0.5 if self.config.scaled else h
    return _logits(resolve(params, params["head" if "head" in params else "embed"]["table"]), h)

  def stages_of(self, side: str, layer: Params) -> tuple[Stage, ...]:
    """The stages of a layer, with a gate or without."""
    mask, gated = mask_of(side), "gate" in layer.get("mlp", {})
    return (
      Stage("qkv", ("attn/q", "attn/k", "attn/v"), "attn_norm", mask=mask),
      Stage("o", ("attn/o",), "attn/v", free=("head",), mask=mask),
      *(cross_stages("cross_norm") if side == "decoder" else ()),
      Stage("up", ("mlp/gate", "mlp/up") if gated else ("mlp/up",), "mlp_norm", mask=mask),
      Stage("down", ("mlp/down",), "mlp/up" if gated else "", mask=mask),
    )


@jax.jit
def _logits(table: Any, h: jax.Array) -> jax.Array:
  return ops.attend(h, table).astype(jnp.float32)
