"""Llama: a decoder with rotary positions, grouped queries, gated SiLU and RMS norms, as a pure function."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import ops
from lmcompress.arrays import resolve
from lmcompress.models.layers import Linear, RMSNorm, linears
from lmcompress.models.rope import Rope
from lmcompress.types import Block, Params, Stage, Tokens

STAGES = (
  Stage("qkv", ("attn/q", "attn/k", "attn/v"), "attn_norm"),
  Stage("o", ("attn/o",), "attn/v", free=("head",)),
  Stage("gate_up", ("mlp/gate", "mlp/up"), "mlp_norm"),
  Stage("down", ("mlp/down",), "mlp/up"),
)

_QUERY, _KEY = ("kv", "group", "head"), ("kv", "head")

AXES: Mapping[str, tuple[Any, ...]] = {
  "embed/table": ("vocab", "embed"),
  "layers/*/attn_norm/scale": ("embed",),
  "layers/*/attn/q/kernel": ("embed", _QUERY),
  "layers/*/attn/q/bias": (_QUERY,),
  "layers/*/attn/k/kernel": ("embed", _KEY),
  "layers/*/attn/k/bias": (_KEY,),
  "layers/*/attn/v/kernel": ("embed", _KEY),
  "layers/*/attn/v/bias": (_KEY,),
  "layers/*/attn/o/kernel": (_QUERY, "embed"),
  "layers/*/attn/o/bias": ("embed",),
  "layers/*/mlp_norm/scale": ("embed",),
  "layers/*/mlp/gate/kernel": ("embed", "mlp"),
  "layers/*/mlp/gate/bias": ("mlp",),
  "layers/*/mlp/up/kernel": ("embed", "mlp"),
  "layers/*/mlp/up/bias": ("mlp",),
  "layers/*/mlp/down/kernel": ("mlp", "embed"),
  "layers/*/mlp/down/bias": ("embed",),
  "final_norm/scale": ("embed",),
  "head/table": ("vocab", "embed"),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """What the parameter tree cannot say. Depth, widths, heads, biases and tying are read from the tree."""

  head_dim: int
  rope: Rope = dataclasses.field(default_factory=Rope)
  rms_epsilon: float = 1e-5
  max_length: int = 2048


@dataclasses.dataclass(frozen=True)
class LlamaSizes:
  """Sizes for `init` only; a tree in hand speaks for itself."""

  vocab: int
  embed: int
  mlp: int
  layers: int
  heads: int
  kv_heads: int
  tied: bool = True
  attention_bias: bool = False
  mlp_bias: bool = False


class _Attention(nn.Module):
  config: LlamaConfig
  sizes: LlamaSizes | None = None

  @nn.compact
  def __call__(self, x: jax.Array, view: ops.View, layer_cache: Any) -> tuple[jax.Array, Any]:
    head, s = self.config.head_dim, self.sizes
    dense = functools.partial(Linear, use_bias=bool(s and s.attention_bias))
    kv = s.kv_heads * head if s else 0
    q, k, v = linears(x, dense(s.heads * head if s else 0, name="q"), dense(kv, name="k"), dense(kv, name="v"))
    mixed, layer_cache = ops.attention(q, k, v, view, head, layer_cache)
    self.sow("taps", "o_input", mixed)
    return dense(x.shape[-1], name="o")(mixed), layer_cache


class _Mlp(nn.Module):
  sizes: LlamaSizes | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    s = self.sizes
    dense = functools.partial(Linear, use_bias=bool(s and s.mlp_bias))
    width = s.mlp if s else 0
    hidden = ops.gated_silu(*linears(x, dense(width, name="gate"), dense(width, name="up")))
    self.sow("taps", "down_input", hidden)
    return dense(x.shape[-1], name="down")(hidden)


class _Layer(nn.Module):
  config: LlamaConfig
  sizes: LlamaSizes | None = None

  @nn.compact
  def __call__(self, h: jax.Array, view: ops.View, layer_cache: Any = None) -> tuple[jax.Array, Any]:
    x = RMSNorm(self.config.rms_epsilon, name="attn_norm")(h)
    self.sow("taps", "qkv_input", x)
    mixed, layer_cache = _Attention(self.config, self.sizes, name="attn")(x, view, layer_cache)
    h = h + mixed
    x = RMSNorm(self.config.rms_epsilon, name="mlp_norm")(h)
    self.sow("taps", "gate_up_input", x)
    return h + _Mlp(self.sizes, name="mlp")(x), layer_cache


@functools.partial(jax.jit, static_argnames=("config", "taps"))
def _run_layer(
  config: LlamaConfig, params: Params, h: jax.Array, view: ops.View, layer_cache: Any, taps: tuple[str, ...]
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
  """One layer, compiled once for all layers of the same form."""
  mutable = ["taps"] if taps else []
  result: Any = _Layer(config).apply({"params": params}, h, view, layer_cache, mutable=mutable)
  (hidden, layer_cache), variables = result
  return hidden, layer_cache, {name: _tap(variables["taps"], name) for name in taps}


def _tap(taps: Mapping[str, Any], name: str) -> jax.Array:
  """The value sown under `name`, wherever in the layer."""
  for key, value in taps.items():
    if key == f"{name}_input":
      return value[0]
    if isinstance(value, Mapping) and (found := _tap(value, name)) is not None:
      return found
  return None  # type: ignore[return-value]


@functools.partial(jax.jit, static_argnames=("config",))
def _normed(config: LlamaConfig, norm: Params, h: jax.Array) -> jax.Array:
  normal: Any = RMSNorm(config.rms_epsilon).apply({"params": norm}, h)
  return normal


@functools.partial(jax.jit, static_argnames=("config",))
def _finish(config: LlamaConfig, params: Params, h: jax.Array) -> jax.Array:
  normal = _normed(config, params["final_norm"], h)
  table = params["head"]["table"] if "head" in params else params["embed"]["table"]
  return ops.attend(normal, table).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Llama:
  """The Llama architecture (Touvron et al. 2023, arXiv:2307.09288; SmolLM2, Mistral without window, ...).

  Attributes:
    config: what the tree cannot say.
    sizes: what `init` makes; not needed for a tree that is loaded.
  """

  config: LlamaConfig
  sizes: LlamaSizes | None = None

  architecture = "llama"
  axes = AXES

  def init(self, key: jax.Array) -> Params:
    """Random parameters of `sizes`, layers apart.

    Raises:
      ValueError: the model has no sizes.
    """
    s = self.sizes
    if s is None:
      raise ValueError("Llama.init needs sizes: Llama(config, LlamaSizes(vocab=..., embed=..., ...))")
    keys = jax.random.split(key, s.layers + 2)
    h = jnp.zeros((1, 1, s.embed), jnp.float32)
    view = self._view(jnp.ones((1, 1), bool), None)
    layer = _Layer(self.config, s)
    table = nn.initializers.normal(s.embed**-0.5)
    params: Params = {
      "embed": {"table": table(keys[0], (s.vocab, s.embed), jnp.float32)},
      "layers": {str(i): layer.init(keys[i + 2], h, view)["params"] for i in range(s.layers)},
      "final_norm": {"scale": jnp.ones((s.embed,), jnp.float32)},
    }
    if not s.tied:
      params["head"] = {"table": table(keys[1], (s.vocab, s.embed), jnp.float32)}
    return params

  def apply(
    self,
    params: Params,
    tokens: Tokens,
    *,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    decoder_input_ids: Any = None,
    cache: Any = None,
  ) -> Any:
    """Logits `[batch, length, vocab]` float32 of `tokens: [batch, length]` int32; `(logits, cache)` with a cache.

    Args:
      attention_mask: `[batch, length]`, nonzero for real tokens; padding may stand on either side.
      cache: a KV cache; the tokens continue what it holds.

    Raises:
      ValueError: tokens are not `[batch, length]` integers, or are longer than the model or the cache.
    """
    if token_type_ids is not None or decoder_input_ids is not None:
      raise ValueError("Llama is a decoder: it takes no token_type_ids and no decoder_input_ids")
    carry = self.start(params, {"tokens": tokens, "attention_mask": attention_mask, "cache": cache})
    for block in self.blocks(params):
      carry, _ = self.run(block, params, carry)
    return self.finish(params, carry)

  def start(self, params: Params, inputs: Any) -> Any:
    """Embeds the tokens; the carry holds the hidden stream, the view (positions, visibility) and the cache."""
    inputs = inputs if isinstance(inputs, Mapping) else {"tokens": inputs}
    given = inputs["tokens"]
    tokens = jnp.asarray(given)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise ValueError(f"tokens are [batch, length] integers; found {tokens.dtype}{list(tokens.shape)}")
    if isinstance(given, np.ndarray) and given.size:  # what lies on a device is not fetched to be checked
      low, high, vocab = int(given.min()), int(given.max()), params["embed"]["table"].shape[-2]
      if low < 0 or high >= vocab:
        raise ValueError(f"tokens from {low} to {high} are outside the vocabulary of {vocab}")
    cache, mask = inputs.get("cache"), inputs.get("attention_mask")
    if cache is None and tokens.shape[1] > self.config.max_length:
      raise ValueError(f"{tokens.shape[1]} tokens are longer than the model's context of {self.config.max_length}")
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask) != 0
    if cache is not None:
      cache = cache.reserve(mask)
    h = ops.embed(tokens, resolve(params, params["embed"]["table"]))
    return {"h": h, "view": self._view(mask, cache), "cache": cache}

  def _view(self, mask: jax.Array, cache: Any) -> ops.View:
    if cache is None:
      positions, real, slot = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0), mask, jnp.int32(0)
    else:
      positions, real, slot = cache.positions(mask.shape[1]), cache.real, cache.length
    return ops.View(real, slot, *self.config.rope.cos_sin(positions, self.config.head_dim))

  def blocks(self, params: Params) -> tuple[Block, ...]:
    """The layers that the tree has, in order; keys are never renumbered."""
    return tuple(Block(f"layers/{i}", "decoder", STAGES) for i in sorted(params.get("layers", {}), key=int))

  def run(self, block: Block, params: Params, carry: Any, taps: tuple[str, ...] = ()) -> tuple[Any, dict]:
    """One layer; `taps` names stages whose inputs are returned."""
    cache = carry["cache"]
    h, layer_cache, tapped = _run_layer(
      self.config,
      resolve(params, params["layers"][block.path.rpartition("/")[2]]),
      carry["h"],
      carry["view"],
      None if cache is None else cache.layer(block.path),
      tuple(taps),
    )
    if cache is not None:
      cache = cache.with_layer(block.path, layer_cache)
    return {**carry, "h": h, "cache": cache}, tapped

  def finish(self, params: Params, carry: Any, last: bool = False, span: tuple[Any, int] | None = None) -> Any:
    """Logits (of the last token alone with `last`, of `span[1]` tokens from `span[0]` on), and the advanced cache."""
    ends = {name: resolve(params, params[name]) for name in ("embed", "head", "final_norm") if name in params}
    h = carry["h"][:, -1:] if last else carry["h"]
    if span is not None:
      h = jax.lax.dynamic_slice_in_dim(h, span[0], span[1], axis=1)
    logits = _finish(self.config, ends, h)
    cache = carry["cache"]
    return logits if cache is None else (logits, cache.advance(carry["h"].shape[1]))

  def features(self, params: Params, carry: Any) -> jax.Array:
    """What a head reads: the normed states `[batch, length, embed]` after the last block."""
    return _normed(self.config, resolve(params, params["final_norm"]), carry["h"])

  def extents(self, params: Params) -> dict[str, int]:
    """Extents of logical axes that no array's shape tells by itself."""
    return {"head": self.config.head_dim}

  def cache_shapes(self, params: Params) -> dict[str, tuple[int, int]]:
    """Per block path, the KV heads and the head dimension that a cache must hold."""
    head = self.config.head_dim
    return {
      f"layers/{i}": (layer["attn"]["k"]["kernel"].shape[-1] // head, head) for i, layer in params["layers"].items()
    }
