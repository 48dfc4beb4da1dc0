"""GPT-2: a decoder with learned positions, biases everywhere, layer norms before each part, and a plain GELU."""

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
from lmcompress.models.base import Decoder, linear_axes, norm_axes
from lmcompress.models.layers import LayerNorm, Linear, PlainMlp, linears
from lmcompress.types import Block, Params, Stage

_HEADS = ("kv", "head")

AXES: Mapping[str, tuple[Any, ...]] = {
  "embed/table": ("vocab", "embed"),
  "positions/table": ("position", "embed"),
  **norm_axes("layers/*/attn_norm", "embed"),
  **linear_axes("layers/*/attn/q", "embed", _HEADS),
  **linear_axes("layers/*/attn/k", "embed", _HEADS),
  **linear_axes("layers/*/attn/v", "embed", _HEADS),
  **linear_axes("layers/*/attn/o", _HEADS, "embed"),
  **norm_axes("layers/*/mlp_norm", "embed"),
  **linear_axes("layers/*/mlp/up", "embed", "mlp"),
  **linear_axes("layers/*/mlp/down", "mlp", "embed"),
  **norm_axes("final_norm", "embed"),
  "head/table": ("vocab", "embed"),
}


@dataclasses.dataclass(frozen=True)
class GPT2Config:
  """What the parameter tree cannot say. Depth, widths, heads and tying are read from the tree.

  Attributes:
    activation: one of `layers.ACTIVATIONS`.
    max_length: positions that the table has.
  """

  head_dim: int
  norm_epsilon: float = 1e-5
  activation: str = "gelu_tanh"
  max_length: int = 1024


@dataclasses.dataclass(frozen=True)
class GPT2Sizes:
  """Sizes for `init` only; a tree in hand speaks for itself."""

  vocab: int
  embed: int
  mlp: int
  layers: int
  heads: int
  tied: bool = True


class _Layer(nn.Module):
  config: GPT2Config
  sizes: GPT2Sizes | None = None

  @nn.compact
  def __call__(self, h: jax.Array, view: ops.View, layer_cache: Any = None) -> tuple[jax.Array, Any]:
    x = LayerNorm(self.config.norm_epsilon, name="attn_norm")(h)
    self.sow("taps", "qkv_input", x)
    mixed, layer_cache = _Attention(self.config, self.sizes, name="attn")(x, view, layer_cache)
    h = h + mixed
    x = LayerNorm(self.config.norm_epsilon, name="mlp_norm")(h)
    self.sow("taps", "up_input", x)
    return h + PlainMlp(self.config.activation, self.sizes.mlp if self.sizes else 0, name="mlp")(x), layer_cache


class _Attention(nn.Module):
  config: GPT2Config
  sizes: GPT2Sizes | None = None

  @nn.compact
  def __call__(self, x: jax.Array, view: ops.View, layer_cache: Any) -> tuple[jax.Array, Any]:
    s, head = self.sizes, self.config.head_dim
    dense = functools.partial(Linear, s.heads * head if s else 0, use_bias=True)
    q, k, v = linears(x, dense(name="q"), dense(name="k"), dense(name="v"))
    mixed, layer_cache = ops.attention(q, k, v, view, head, layer_cache)
    self.sow("taps", "o_input", mixed)
    return Linear(x.shape[-1], use_bias=True, joins=True, name="o")(mixed), layer_cache


@dataclasses.dataclass(frozen=True)
class GPT2(Decoder):
  """The GPT-2 architecture (Radford et al. 2019, Language Models are Unsupervised Multitask Learners)."""

  config: GPT2Config
  sizes: GPT2Sizes | None = None

  architecture = "gpt2"
  axes = AXES
  stages = (
    Stage("qkv", ("attn/q", "attn/k", "attn/v"), "attn_norm"),
    Stage("o", ("attn/o",), "attn/v", free=("head",)),
    Stage("up", ("mlp/up",), "mlp_norm"),
    Stage("down", ("mlp/down",), ""),
  )

  def init(self, key: jax.Array) -> Params:
    """Random parameters of `sizes`, layers apart.

    Raises:
      ValueError: the model has no sizes.
    """
    s = self.sized()
    params = self.made(key, _Layer(self.config, s), s.vocab, s.embed, s.layers, s.tied)
    table = nn.initializers.normal(s.embed**-0.5)(jax.random.fold_in(key, 1), (self.config.max_length, s.embed))
    return {**params, "positions": {"table": table}}

  def embedded(self, params: Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """Tokens and positions, added."""
    table = resolve(params, params["positions"]["table"])
    held = table.shape[-2]
    return super().embedded(params, tokens, positions) + ops.embed(jnp.minimum(positions, held - 1), table)

  def layer_of(self, block: Block) -> nn.Module:
    """The one form of layer."""
    return _Layer(self.config)

  def norm(self) -> nn.Module:
    """The layer norm after the last layer."""
    return LayerNorm(self.config.norm_epsilon)
