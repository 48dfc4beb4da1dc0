"""Llama and what differs from it by a little: Mistral (a window), Qwen2 (biases), Qwen3 (normed queries and keys), and
Mixtral and Qwen's mixtures of experts, which some or all of the layers may have in the place of their MLP."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from lmcompress import ops
from lmcompress.models import experts
from lmcompress.models.base import Decoder, linear_axes, norm_axes, numbered
from lmcompress.models.layers import Linear, RMSNorm, linears
from lmcompress.models.rope import Rope
from lmcompress.types import Block, Params, Stage

ATTENTION = (
  Stage("qkv", ("attn/q", "attn/k", "attn/v"), "attn_norm"),
  Stage("o", ("attn/o",), "attn/v", free=("head",)),
)
STAGES = (
  *ATTENTION,
  Stage("gate_up", ("mlp/gate", "mlp/up"), "mlp_norm"),
  Stage("down", ("mlp/down",), "mlp/up"),
)

_QUERY, _KEY = ("kv", "group", "head"), ("kv", "head")

AXES: Mapping[str, tuple[Any, ...]] = {
  "embed/table": ("vocab", "embed"),
  **norm_axes("layers/*/attn_norm", "embed", bias=False),
  **linear_axes("layers/*/attn/q", "embed", _QUERY),
  **linear_axes("layers/*/attn/k", "embed", _KEY),
  **norm_axes("layers/*/attn/q_norm", "head", bias=False),
  **norm_axes("layers/*/attn/k_norm", "head", bias=False),
  **linear_axes("layers/*/attn/v", "embed", _KEY),
  **linear_axes("layers/*/attn/o", _QUERY, "embed"),
  **norm_axes("layers/*/mlp_norm", "embed", bias=False),
  **linear_axes("layers/*/mlp/gate", "embed", "mlp"),
  **linear_axes("layers/*/mlp/up", "embed", "mlp"),
  **linear_axes("layers/*/mlp/down", "mlp", "embed"),
  **experts.AXES,
  **norm_axes("final_norm", "embed", bias=False),
  "head/table": ("vocab", "embed"),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """What the parameter tree cannot say. Depth, widths, heads, biases, norms and tying are read from the tree.

  Attributes:
    window: how many tokens up to itself a token sees; None for all.
    full_layers: the numbers of the layers whose tokens see all in spite of a window.
    experts_per_token: where a layer is a mixture of experts, how many each token goes to.
    normalize_experts: whether their weights add up to 1.
  """

  head_dim: int
  rope: Rope = dataclasses.field(default_factory=Rope)
  rms_epsilon: float = 1e-5
  max_length: int = 2048
  window: int | None = None
  full_layers: tuple[int, ...] = ()
  experts_per_token: int = 2
  normalize_experts: bool = True


@dataclasses.dataclass(frozen=True)
class LlamaSizes:
  """Sizes for `init` only; a tree in hand speaks for itself.

  Attributes:
    experts: of each layer, of `mlp` neurons each; 0 for an MLP.
    shared: neurons of an expert that all tokens go to; 0 for none.
  """

  vocab: int
  embed: int
  mlp: int
  layers: int
  heads: int
  kv_heads: int
  tied: bool = True
  attention_bias: bool = False
  mlp_bias: bool = False
  experts: int = 0
  shared: int = 0


class _Attention(nn.Module):
  config: LlamaConfig
  sizes: LlamaSizes | None = None

  @nn.compact
  def __call__(self, x: jax.Array, view: ops.View, layer_cache: Any) -> tuple[jax.Array, Any]:
    head, s = self.config.head_dim, self.sizes
    dense = functools.partial(Linear, use_bias=bool(s and s.attention_bias))
    kv = s.kv_heads * head if s else 0
    q, k, v = linears(x, dense(s.heads * head if s else 0, name="q"), dense(kv, name="k"), dense(kv, name="v"))
    if self.has_variable("params", "q_norm"):
      q, k = (
        RMSNorm(self.config.rms_epsilon, name=name)(each.reshape(*each.shape[:2], -1, head)).reshape(each.shape)
        for name, each in (("q_norm", q), ("k_norm", k))
      )
    mixed, layer_cache = ops.attention(q, k, v, view, head, layer_cache)
    self.sow("taps", "o_input", mixed)
    return dense(x.shape[-1], joins=True, name="o")(mixed), layer_cache


class _Mlp(nn.Module):
  sizes: LlamaSizes | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    s = self.sizes
    dense = functools.partial(Linear, use_bias=bool(s and s.mlp_bias))
    width = s.mlp if s else 0
    hidden = ops.gated_silu(*linears(x, dense(width, name="gate"), dense(width, name="up")))
    self.sow("taps", "down_input", hidden)
    return dense(x.shape[-1], joins=True, name="down")(hidden)


class _Layer(nn.Module):
  config: LlamaConfig
  sizes: LlamaSizes | None = None
  window: int | None = None

  @nn.compact
  def __call__(self, h: jax.Array, view: ops.View, layer_cache: Any = None) -> tuple[jax.Array, Any]:
    view = dataclasses.replace(view, window=self.window)
    x = RMSNorm(self.config.rms_epsilon, name="attn_norm")(h)
    self.sow("taps", "qkv_input", x)
    mixed, layer_cache = _Attention(self.config, self.sizes, name="attn")(x, view, layer_cache)
    h = h + mixed
    x = RMSNorm(self.config.rms_epsilon, name="mlp_norm")(h)
    self.sow("taps", "gate_up_input", x)
    return h + self._mlp()(x), layer_cache

  def _mlp(self) -> nn.Module:
    """The MLP or the mixture, as the parameters have it."""
    c, s = self.config, self.sizes
    if s.experts if s else "router" in self.variables["params"]["mlp"]:
      sizes = (s.experts, s.mlp, s.shared) if s else ()
      return experts.Mixture(c.experts_per_token, c.normalize_experts, *sizes, name="mlp")
    return _Mlp(s, name="mlp")


@dataclasses.dataclass(frozen=True)
class Llama(Decoder):
  """The Llama architecture (Touvron et al. 2023, arXiv:2307.09288; SmolLM2, Mistral, Mixtral, Qwen2, Qwen3).

  Rotary positions, grouped queries, gated SiLU and RMS norms.
  """

  config: LlamaConfig
  sizes: LlamaSizes | None = None

  architecture = "llama"
  axes = AXES
  stages = STAGES

  def init(self, key: jax.Array) -> Params:
    """Random parameters of `sizes`, layers apart.

    Raises:
      ValueError: the model has no sizes.
    """
    s = self.sized()
    return self.made(key, _Layer(self.config, s), s.vocab, s.embed, s.layers, s.tied)

  def blocks(self, params: Params) -> tuple[Block, ...]:
    """The layers that the tree has, in order; those with a mixture have stages for each expert."""
    found = super().blocks(params)
    mlps = [params["layers"][i].get("mlp", {}) for i in numbered(params, "layers")]
    return tuple(
      block._replace(stages=(*ATTENTION, *experts.stages(mlp))) if "router" in mlp else block
      for block, mlp in zip(found, mlps, strict=True)
    )

  def layer_of(self, block: Block) -> nn.Module:
    """The layer, with the window where it has one."""
    full = int(block.path.rpartition("/")[2]) in self.config.full_layers
    return _Layer(self.config, window=None if full else self.config.window)

  def norm(self) -> nn.Module:
    """The RMS norm after the last layer."""
    return RMSNorm(self.config.rms_epsilon)

  def turned(self, positions: jax.Array, slots: int | None = None) -> tuple[jax.Array, jax.Array]:
    """The rotary positions."""
    return self.config.rope.cos_sin(positions, self.config.head_dim, slots)
