"""BART and mBART: an encoder and a decoder that looks at it, learned positions, norms that subtract a mean, biases."""

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
from lmcompress.models.base import linear_axes, norm_axes, run_module
from lmcompress.models.encoder_decoder import Attention, Cross, EncoderDecoder, cross_stages, mask_of
from lmcompress.models.layers import LayerNorm, PlainMlp
from lmcompress.types import Params, Stage

FIRST_POSITION = 2
"""The row of a table of positions for the first token; BART keeps those before it."""


def _attention_axes(at: str, heads: str) -> dict[str, tuple[Any, ...]]:
  split = (heads, "head")
  inward = [linear_axes(f"{at}/{x}", "embed", split) for x in "qkv"]
  return {path: axes for part in (*inward, linear_axes(f"{at}/o", split, "embed")) for path, axes in part.items()}


def _side_axes(side: str) -> dict[str, tuple[Any, ...]]:
  at = f"{side}/layers/*"
  return {
    f"{side}/positions/table": ("position", "embed"),
    **norm_axes(f"{side}/embed_norm", "embed"),
    **_attention_axes(f"{at}/attn", f"{side}_kv"),
    **norm_axes(f"{at}/attn_norm", "embed"),
    **linear_axes(f"{at}/mlp/up", "embed", "mlp"),
    **linear_axes(f"{at}/mlp/down", "mlp", "embed"),
    **norm_axes(f"{at}/mlp_norm", "embed"),
    **norm_axes(f"{side}/final_norm", "embed"),
  }


AXES: Mapping[str, tuple[Any, ...]] = {
  "embed/table": ("vocab", "embed"),
  **_side_axes("encoder"),
  **_side_axes("decoder"),
  **_attention_axes("decoder/layers/*/cross", "kv"),
  **norm_axes("decoder/layers/*/cross_norm", "embed"),
  "head/table": ("vocab", "embed"),
  "logits/bias": ("row", "vocab"),
}


@dataclasses.dataclass(frozen=True)
class BartConfig:
  """What the parameter tree cannot say. Depths, widths, heads and tying are read from the tree.

  Attributes:
    pre_norm: a norm before each part (mBART) in place of one after it.
    scaled: embeddings are multiplied by the root of their width.
    activation: one of `layers.ACTIVATIONS`.
    start: the token that the decoder reads first.
    first: the token that it writes first, whatever it predicts; None leaves it free.
    max_length: tokens that the tables of positions have rows for.
  """

  head_dim: int
  pre_norm: bool = False
  scaled: bool = False
  norm_epsilon: float = 1e-5
  activation: str = "gelu"
  start: int = 2
  max_length: int = 1024
  first: int | None = None


@dataclasses.dataclass(frozen=True)
class BartSizes:
  """Sizes for `init` only; a tree in hand speaks for itself."""

  vocab: int
  embed: int
  mlp: int
  layers: int
  decoder_layers: int
  heads: int


class _Layer(nn.Module):
  """A layer of the encoder, or of the decoder where it has something to look at."""

  config: BartConfig
  sizes: BartSizes | None = None
  side: str = "encoder"

  @nn.compact
  def __call__(
    self,
    h: jax.Array,
    view: ops.View,
    memory: jax.Array | None = None,
    seen: ops.View | None = None,
    layer_cache: Any = None,
    held: Any = None,
  ) -> Any:
    c, s = self.config, self.sizes
    width = s.heads * c.head_dim if s else 0
    norm = functools.partial(LayerNorm, c.norm_epsilon)

    def before(name: str, h: jax.Array, tap: str) -> jax.Array:
      """What a part of the layer reads."""
      x = norm(name=name)(h) if c.pre_norm else h
      self.sow("taps", tap, x)
      return x

    def after(name: str, h: jax.Array, part: jax.Array) -> jax.Array:
      """The stream with what a part gave."""
      return h + part if c.pre_norm else norm(name=name)(h + part)

    x = before("attn_norm", h, "qkv_input")
    mixed, layer_cache = Attention(c.head_dim, width, True, name="attn")(x, view, layer_cache)
    h = after("attn_norm", h, mixed)
    if self.side == "decoder":
      assert seen is not None
      x = before("cross_norm", h, "cross_q_input")
      if memory is not None:
        self.sow("taps", "cross_kv_input", memory)
      h = after("cross_norm", h, Cross(c.head_dim, width, True, name="cross")(x, memory, seen, held))
    mlp = PlainMlp(c.activation, s.mlp if s else 0, name="mlp")
    h = after("mlp_norm", h, mlp(before("mlp_norm", h, "up_input")))
    return (h, layer_cache) if self.side == "decoder" else h


@dataclasses.dataclass(frozen=True)
class Bart(EncoderDecoder):
  """The BART architecture (Lewis et al. 2019, arXiv:1910.13461; mBART, arXiv:2001.08210, with norms before each part).

  Where a norm follows each part, none feeds a stage alone: what a method would scale in the norm, the stream has too.
  """

  config: BartConfig
  sizes: BartSizes | None = None

  architecture = "bart"
  axes = AXES

  def init(self, key: jax.Array) -> Params:
    """Random parameters of `sizes`, layers apart.

    Raises:
      ValueError: the model has no sizes.
    """
    s, c = self.sized(), self.config
    keys = iter(jax.random.split(key, s.layers + s.decoder_layers + 3))
    h, view = jnp.zeros((1, 1, s.embed), jnp.float32), self._view(jnp.ones((1, 1), bool), 1)
    draw = nn.initializers.normal(s.embed**-0.5)

    def norm() -> Params:
      return {"scale": jnp.ones((s.embed,)), "bias": jnp.zeros((s.embed,))}

    def side(name: str, count: int) -> Params:
      layer, beside = _Layer(c, s, name), () if name == "encoder" else (h, view)
      return {
        "positions": {"table": draw(next(keys), (c.max_length + FIRST_POSITION, s.embed), jnp.float32)},
        "embed_norm": norm(),
        "layers": {str(i): layer.init(next(keys), h, view, *beside)["params"] for i in range(count)},
        **({"final_norm": norm()} if c.pre_norm else {}),
      }

    return {
      "embed": {"table": draw(next(keys), (s.vocab, s.embed), jnp.float32)},
      "encoder": side("encoder", s.layers),
      "decoder": side("decoder", s.decoder_layers),
    }

  def encoder_layer(self) -> nn.Module:
    """A layer of the encoder."""
    return _Layer(self.config)

  def decoder_layer(self) -> nn.Module:
    """A layer of the decoder."""
    return _Layer(self.config, side="decoder")

  def embedded(self, params: Params, side: str, ids: jax.Array, positions: jax.Array) -> jax.Array:
    """The hidden stream `[batch, length, embed]` before a side's first layer."""
    h = ops.embed(ids, resolve(params, params["embed"]["table"]))
    h = h * h.shape[-1] ** 0.5 if self.config.scaled else h
    h = h + ops.embed(positions + FIRST_POSITION, resolve(params, params[side]["positions"]["table"]))
    return self._normed(resolve(params, params[side]["embed_norm"]), h)

  def _normed(self, norm: Params, h: jax.Array) -> jax.Array:
    return run_module(LayerNorm(self.config.norm_epsilon), norm, h)[0]

  def handed(self, layer: Params, h: jax.Array) -> jax.Array:
    """The encoder's last states, normed where each part had its norm before it."""
    return self._normed(layer, h) if self.config.pre_norm else h

  def features(self, params: Params, carry: Any) -> jax.Array:
    """What a head reads: the decoder's last states `[batch, length, embed]`."""
    h = carry["h"]
    return self._normed(resolve(params, params["decoder"]["final_norm"]), h) if self.config.pre_norm else h

  def logits(self, params: Params, h: jax.Array) -> jax.Array:
    """float32 `[batch, length, vocab]` of such states."""
    bias = params["logits"]["bias"] if "logits" in params else jnp.float32(0)
    return _logits(resolve(params, params["head" if "head" in params else "embed"]["table"]), bias, h)

  def stages_of(self, side: str, layer: Params) -> tuple[Stage, ...]:
    """The stages of a layer."""
    feeds = "{}_norm".format if self.config.pre_norm else lambda part: ""
    mask = mask_of(side)
    return (
      Stage("qkv", ("attn/q", "attn/k", "attn/v"), feeds("attn"), mask=mask),
      Stage("o", ("attn/o",), "attn/v", free=("head",), mask=mask),
      *(cross_stages(feeds("cross")) if side == "decoder" else ()),
      Stage("up", ("mlp/up",), feeds("mlp"), mask=mask),
      Stage("down", ("mlp/down",), "", mask=mask),
    )


@jax.jit
def _logits(table: Any, bias: jax.Array, h: jax.Array) -> jax.Array:
  return ops.attend(h, table).astype(jnp.float32) + bias
