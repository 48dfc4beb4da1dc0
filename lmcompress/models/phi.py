"""Phi: a decoder whose attention and MLP read one layer norm side by side; positions turn a part of each head."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmcompress import ops
from lmcompress.models.base import Decoder, linear_axes, norm_axes
from lmcompress.models.layers import LayerNorm, Linear, PlainMlp, linears
from lmcompress.models.rope import Rope
from lmcompress.types import Block, Params, Stage

_QUERY, _KEY = ("kv", "group", "head"), ("kv", "head")

AXES: Mapping[str, tuple[Any, ...]] = {
  "embed/table": ("vocab", "embed"),
  **norm_axes("layers/*/norm", "embed"),
  **linear_axes("layers/*/attn/q", "embed", _QUERY),
  **linear_axes("layers/*/attn/k", "embed", _KEY),
  **linear_axes("layers/*/attn/v", "embed", _KEY),
  **linear_axes("layers/*/attn/o", _QUERY, "embed"),
  **linear_axes("layers/*/mlp/up", "embed", "mlp"),
  **linear_axes("layers/*/mlp/down", "mlp", "embed"),
  **norm_axes("final_norm", "embed"),
  "head/table": ("vocab", "embed"),
  "head/bias": ("vocab",),
}


@dataclasses.dataclass(frozen=True)
class PhiConfig:
  """What the parameter tree cannot say. Depth, widths, heads and tying are read from the tree.

  Attributes:
    turned: entries of each head that positions turn, the first; an even number.
    activation: one of `layers.ACTIVATIONS`.
  """

  head_dim: int
  turned: int
  rope: Rope = dataclasses.field(default_factory=Rope)
  norm_epsilon: float = 1e-5
  activation: str = "gelu_tanh"
  max_length: int = 2048


@dataclasses.dataclass(frozen=True)
class PhiSizes:
  """Sizes for `init` only; a tree in hand speaks for itself."""

  vocab: int
  embed: int
  mlp: int
  layers: int
  heads: int
  kv_heads: int


class _Layer(nn.Module):
  """`h + attention(norm(h)) + mlp(norm(h))`."""

  config: PhiConfig
  sizes: PhiSizes | None = None

  @nn.compact
  def __call__(self, h: jax.Array, view: ops.View, layer_cache: Any = None) -> tuple[jax.Array, Any]:
    x = LayerNorm(self.config.norm_epsilon, name="norm")(h)
    self.sow("taps", "qkv_up_input", x)
    mixed, layer_cache = _Attention(self.config, self.sizes, name="attn")(x, view, layer_cache)
    return h + mixed + PlainMlp(self.config.activation, self.sizes.mlp if self.sizes else 0, name="mlp")(x), layer_cache


class _Attention(nn.Module):
  config: PhiConfig
  sizes: PhiSizes | None = None

  @nn.compact
  def __call__(self, x: jax.Array, view: ops.View, layer_cache: Any) -> tuple[jax.Array, Any]:
    s, head = self.sizes, self.config.head_dim
    dense = functools.partial(Linear, use_bias=True)
    kv = s.kv_heads * head if s else 0
    q, k, v = linears(x, dense(s.heads * head if s else 0, name="q"), dense(kv, name="k"), dense(kv, name="v"))
    mixed, layer_cache = ops.attention(q, k, v, view, head, layer_cache)
    self.sow("taps", "o_input", mixed)
    return dense(x.shape[-1], joins=True, name="o")(mixed), layer_cache


@dataclasses.dataclass(frozen=True)
class Phi(Decoder):
  """The architecture of Phi-1, 1.5 and 2 (Li et al. 2023, arXiv:2309.05463)."""

  config: PhiConfig
  sizes: PhiSizes | None = None

  architecture = "phi"
  axes = AXES
  stages = (
    Stage("qkv_up", ("attn/q", "attn/k", "attn/v", "mlp/up"), "norm"),
    Stage("o", ("attn/o",), "attn/v", free=("head",)),
    Stage("down", ("mlp/down",), ""),
  )

  def init(self, key: jax.Array) -> Params:
    """Random parameters of `sizes`, layers apart.

    Raises:
      ValueError: the model has no sizes.
    """
    s = self.sized()
    params = self.made(key, _Layer(self.config, s), s.vocab, s.embed, s.layers, tied=False)
    return {**params, "head": {**params["head"], "bias": jnp.zeros((s.vocab,), jnp.float32)}}

  def turned(self, positions: jax.Array, slots: int | None = None) -> tuple[jax.Array, jax.Array]:
    """cos and sin of each position, `[batch, length, turned / 2]`."""
    return self.config.rope.cos_sin(positions, self.config.turned, slots)

  def layer_of(self, block: Block) -> nn.Module:
    """The one form of layer."""
    return _Layer(self.config)

  def norm(self) -> nn.Module:
    """The layer norm after the last layer."""
    return LayerNorm(self.config.norm_epsilon)
