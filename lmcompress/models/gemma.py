"""Gemma 1, 2 and 3: decoders with norms around each part, capped scores, windows, and scaled embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmcompress import ops
from lmcompress.models.base import Decoder, linear_axes, norm_axes
from lmcompress.models.layers import ACTIVATIONS, Linear, RMSNorm, linears
from lmcompress.models.rope import Rope
from lmcompress.types import Block, Params, Stage

_QUERY, _KEY = ("kv", "group", "head"), ("kv", "head")

AXES: Mapping[str, tuple[Any, ...]] = {
  "embed/table": ("vocab", "embed"),
  **norm_axes("layers/*/attn_norm", "embed", bias=False),
  **linear_axes("layers/*/attn/q", "embed", _QUERY),
  **linear_axes("layers/*/attn/k", "embed", _KEY),
  **linear_axes("layers/*/attn/v", "embed", _KEY),
  **linear_axes("layers/*/attn/o", _QUERY, "embed"),
  **norm_axes("layers/*/attn/q_norm", "head", bias=False),
  **norm_axes("layers/*/attn/k_norm", "head", bias=False),
  **norm_axes("layers/*/attn_after/norm", "embed", bias=False),
  **norm_axes("layers/*/mlp_norm", "embed", bias=False),
  **linear_axes("layers/*/mlp/gate", "embed", "mlp"),
  **linear_axes("layers/*/mlp/up", "embed", "mlp"),
  **linear_axes("layers/*/mlp/down", "mlp", "embed"),
  **norm_axes("layers/*/mlp_after/norm", "embed", bias=False),
  **norm_axes("final_norm", "embed", bias=False),
  "head/table": ("vocab", "embed"),
}


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
  """What the parameter tree cannot say. Norms after parts and of queries and keys are there if the tree has them.

  Attributes:
    kind: `gemma`, `gemma2` or `gemma3_text`, which name their norms differently.
    query_scale: what scores are divided by the square root of.
    rope: of layers that see all; `local_rope` of those with a window, None for the same.
    window: how many tokens up to itself a token sees in layers that are not among `full_layers`; None for all.
    score_cap, logit_cap: `cap * tanh(x / cap)` of scores and of logits; None for none.
  """

  head_dim: int
  kind: str = "gemma2"
  query_scale: float = 256.0
  rope: Rope = dataclasses.field(default_factory=Rope)
  local_rope: Rope | None = None
  rms_epsilon: float = 1e-6
  activation: str = "gelu_tanh"
  max_length: int = 8192
  window: int | None = None
  full_layers: tuple[int, ...] = ()
  score_cap: float | None = None
  logit_cap: float | None = None


@dataclasses.dataclass(frozen=True)
class GemmaSizes:
  """Sizes for `init` only; a tree in hand speaks for itself.

  Attributes:
    after: whether a norm follows each part (Gemma 2 and 3).
    normed: whether queries and keys are normed (Gemma 3).
  """

  vocab: int
  embed: int
  mlp: int
  layers: int
  heads: int
  kv_heads: int
  after: bool = True
  normed: bool = False


class _Attention(nn.Module):
  config: GemmaConfig
  sizes: GemmaSizes | None = None

  @nn.compact
  def __call__(self, x: jax.Array, view: ops.View, layer_cache: Any) -> tuple[jax.Array, Any]:
    c, s = self.config, self.sizes
    head = c.head_dim
    kv = s.kv_heads * head if s else 0
    q, k, v = linears(
      x, Linear(s.heads * head if s else 0, name="q"), Linear(kv, name="k"), Linear(kv, name="v")
    )
    if s.normed if s else self.has_variable("params", "q_norm"):
      q, k = (
        RMSNorm(c.rms_epsilon, name=name)(each.reshape(*each.shape[:2], -1, head)).reshape(each.shape)
        for name, each in (("q_norm", q), ("k_norm", k))
      )
    mixed, layer_cache = ops.attention(q, k, v, view, head, layer_cache, scale=c.query_scale**-0.5)
    self.sow("taps", "o_input", mixed)
    return Linear(x.shape[-1], joins=True, name="o")(mixed), layer_cache


class _Mlp(nn.Module):
  config: GemmaConfig
  sizes: GemmaSizes | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = self.sizes.mlp if self.sizes else 0
    gate, up = linears(x, Linear(width, name="gate"), Linear(width, name="up"))
    hidden = ACTIVATIONS[self.config.activation](gate) * up
    self.sow("taps", "down_input", hidden)
    return Linear(x.shape[-1], joins=True, name="down")(hidden)


class _After(nn.Module):
  """The norm after a part, where the tree has one."""

  epsilon: float
  there: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    there = self.there if self.is_initializing() else self.has_variable("params", "norm")
    return RMSNorm(self.epsilon, name="norm")(x) if there else x


class _Layer(nn.Module):
  config: GemmaConfig
  sizes: GemmaSizes | None = None
  local: bool = False

  @nn.compact
  def __call__(self, h: jax.Array, view: ops.View, layer_cache: Any = None) -> tuple[jax.Array, Any]:
    c, after = self.config, bool(self.sizes and self.sizes.after)
    cos, sin = (jnp.split(x, 2, axis=-1)[int(self.local)] if c.local_rope else x for x in (view.cos, view.sin))
    view = dataclasses.replace(view, cos=cos, sin=sin, window=c.window if self.local else None, cap=c.score_cap)
    x = RMSNorm(c.rms_epsilon, name="attn_norm")(h)
    self.sow("taps", "qkv_input", x)
    mixed, layer_cache = _Attention(c, self.sizes, name="attn")(x, view, layer_cache)
    h = h + _After(c.rms_epsilon, after, name="attn_after")(mixed)
    x = RMSNorm(c.rms_epsilon, name="mlp_norm")(h)
    self.sow("taps", "gate_up_input", x)
    return h + _After(c.rms_epsilon, after, name="mlp_after")(_Mlp(c, self.sizes, name="mlp")(x)), layer_cache


@dataclasses.dataclass(frozen=True)
class Gemma(Decoder):
  """The Gemma architecture (arXiv:2403.08295; Gemma 2, arXiv:2408.00118; Gemma 3's text part, arXiv:2503.19786).

  Folders keep the scales of norms as their distance from 1; here they are scales.
  """

  config: GemmaConfig
  sizes: GemmaSizes | None = None

  architecture = "gemma"
  axes = AXES
  stages = (
    Stage("qkv", ("attn/q", "attn/k", "attn/v"), "attn_norm"),
    Stage("o", ("attn/o",), "attn/v", free=("head",)),
    Stage("gate_up", ("mlp/gate", "mlp/up"), "mlp_norm"),
    Stage("down", ("mlp/down",), "mlp/up"),
  )

  def init(self, key: jax.Array) -> Params:
    """Random parameters of `sizes`, layers apart.

    Raises:
      ValueError: the model has no sizes.
    """
    s = self.sized()
    return self.made(key, _Layer(self.config, s), s.vocab, s.embed, s.layers, True)

  def embedded(self, params: Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """Rows of the table times the square root of their width."""
    h = super().embedded(params, tokens, positions)
    return h * jnp.asarray(h.shape[-1] ** 0.5, h.dtype)

  def turned(self, positions: jax.Array, slots: int | None = None) -> tuple[jax.Array, jax.Array]:
    """The rotary positions, those of layers with a window behind those of layers that see all where they differ."""
    c = self.config
    ropes = [c.rope] if c.local_rope is None else [c.rope, c.local_rope]
    both = [rope.cos_sin(positions, c.head_dim, slots) for rope in ropes]
    cos, sin = (jnp.concatenate(some, axis=-1) for some in zip(*both, strict=True))
    return cos, sin

  def layer_of(self, block: Block) -> nn.Module:
    """The layer, with a window unless it sees all."""
    full = self.config.window is None or int(block.path.rpartition("/")[2]) in self.config.full_layers
    return _Layer(self.config, local=not full)

  def norm(self) -> nn.Module:
    """The RMS norm after the last layer."""
    return RMSNorm(self.config.rms_epsilon)

  def logits(self, table: Any, h: jax.Array) -> jax.Array:
    """float32 `[batch, length, vocab]`, capped where the config says so."""
    found, cap = super().logits(table, h), self.config.logit_cap
    return found if cap is None else cap * jnp.tanh(found / cap)
