"""BERT and its kin RoBERTa and DistilBERT: encoders that see all of a text, with a norm after each part."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmcompress import ops
from lmcompress.arrays import resolve
from lmcompress.models.base import (
  BlockModel,
  checked_tokens,
  linear_axes,
  norm_axes,
  numbered,
  of_tokens,
  positions_of,
  run_module,
  unturned,
)
from lmcompress.models.layers import ACTIVATIONS, LayerNorm, Linear, PlainMlp, linears
from lmcompress.types import Block, Params, Stage

_HEADS = ("kv", "head")

AXES: Mapping[str, tuple[Any, ...]] = {
  "embed/table": ("vocab", "embed"),
  "positions/table": ("position", "embed"),
  "types/table": ("type", "embed"),
  **norm_axes("embed_norm", "embed"),
  **linear_axes("layers/*/attn/q", "embed", _HEADS),
  **linear_axes("layers/*/attn/k", "embed", _HEADS),
  **linear_axes("layers/*/attn/v", "embed", _HEADS),
  **linear_axes("layers/*/attn/o", _HEADS, "embed"),
  **norm_axes("layers/*/attn_norm", "embed"),
  **linear_axes("layers/*/mlp/up", "embed", "mlp"),
  **linear_axes("layers/*/mlp/down", "mlp", "embed"),
  **norm_axes("layers/*/mlp_norm", "embed"),
  **linear_axes("pooler", "embed", "pooled"),
  **linear_axes("masked/dense", "embed", "guess"),
  **norm_axes("masked/norm", "guess"),
  "masked/bias": ("vocab",),
  "head/table": ("vocab", "guess"),
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """What the parameter tree cannot say. Depth, widths, heads and tying are read from the tree.

  Attributes:
    kind: `bert`, `roberta` or `distilbert`, which name their tensors differently.
    activation: one of `layers.ACTIVATIONS`.
    first_position: the row of the table for the first token; RoBERTa keeps rows before it for padding.
    max_length: tokens that the table of positions has rows for.
  """

  head_dim: int
  kind: str = "bert"
  norm_epsilon: float = 1e-12
  activation: str = "gelu"
  first_position: int = 0
  max_length: int = 512


@dataclasses.dataclass(frozen=True)
class BertSizes:
  """Sizes for `init` only; a tree in hand speaks for itself.

  Attributes:
    types: rows of the table of token types; 0 for none.
    masked: whether there is a head that guesses masked tokens.
  """

  vocab: int
  embed: int
  mlp: int
  layers: int
  heads: int
  types: int = 2
  masked: bool = False


class Encoded(NamedTuple):
  """What an encoder gives.

  Attributes:
    hidden: `[batch, length, embed]`, the states after the last layer.
    pooled: `[batch, pooled]`, what the pooler makes of the first token; None without one.
    logits: float32 `[batch, length, vocab]` of the head that guesses masked tokens; None without one.
  """

  hidden: jax.Array
  pooled: jax.Array | None = None
  logits: jax.Array | None = None


class _Attention(nn.Module):
  config: BertConfig
  sizes: BertSizes | None = None

  @nn.compact
  def __call__(self, x: jax.Array, view: ops.View) -> jax.Array:
    s, head = self.sizes, self.config.head_dim
    dense = functools.partial(Linear, s.heads * head if s else 0, use_bias=True)
    q, k, v = linears(x, dense(name="q"), dense(name="k"), dense(name="v"))
    mixed, _ = ops.attention(q, k, v, view, head)
    self.sow("taps", "o_input", mixed)
    return Linear(x.shape[-1], use_bias=True, joins=True, name="o")(mixed)


class _Layer(nn.Module):
  config: BertConfig
  sizes: BertSizes | None = None

  @nn.compact
  def __call__(self, h: jax.Array, view: ops.View) -> jax.Array:
    norm = functools.partial(LayerNorm, self.config.norm_epsilon)
    self.sow("taps", "qkv_input", h)
    h = norm(name="attn_norm")(h + _Attention(self.config, self.sizes, name="attn")(h, view))
    self.sow("taps", "up_input", h)
    mlp = PlainMlp(self.config.activation, self.sizes.mlp if self.sizes else 0, name="mlp")
    return norm(name="mlp_norm")(h + mlp(h))


class _Masked(nn.Module):
  """What guesses masked tokens from states `[batch, length, embed]`."""

  config: BertConfig

  @nn.compact
  def __call__(self, h: jax.Array, table: Any) -> jax.Array:
    h = ACTIVATIONS[self.config.activation](Linear(use_bias=True, name="dense")(h))
    h = LayerNorm(self.config.norm_epsilon, name="norm")(h)
    return ops.attend(h, table).astype(jnp.float32) + self.get_variable("params", "bias")


@dataclasses.dataclass(frozen=True)
class Bert(BlockModel):
  """An encoder (Devlin et al. 2018, arXiv:1810.04805; RoBERTa, arXiv:1907.11692; DistilBERT, arXiv:1910.01108).

  A norm follows each part, so none feeds a stage alone: what a method would scale in the norm, the stream has too.
  """

  config: BertConfig
  sizes: BertSizes | None = None

  architecture = "bert"
  axes = AXES
  takes = frozenset({"attention_mask", "token_type_ids"})
  causal: ClassVar[bool] = False
  stages = (
    Stage("qkv", ("attn/q", "attn/k", "attn/v"), ""),
    Stage("o", ("attn/o",), "attn/v", free=("head",)),
    Stage("up", ("mlp/up",), ""),
    Stage("down", ("mlp/down",), ""),
  )

  def init(self, key: jax.Array) -> Params:
    """Random parameters of `sizes`, layers apart.

    Raises:
      ValueError: the model has no sizes.
    """
    s, c = self.sized(), self.config
    keys = jax.random.split(key, s.layers + 5)
    h = jnp.zeros((1, 1, s.embed), jnp.float32)
    layer, view = _Layer(c, s), self._view(jnp.ones((1, 1), bool))
    draw = nn.initializers.normal(s.embed**-0.5)

    def norm() -> Params:
      return {"scale": jnp.ones((s.embed,)), "bias": jnp.zeros((s.embed,))}

    params: Params = {
      "embed": {"table": draw(keys[0], (s.vocab, s.embed), jnp.float32)},
      "positions": {"table": draw(keys[1], (c.max_length + c.first_position, s.embed), jnp.float32)},
      "embed_norm": norm(),
      "layers": {str(i): layer.init(keys[i + 5], h, view)["params"] for i in range(s.layers)},
    }
    if s.types:
      params["types"] = {"table": draw(keys[2], (s.types, s.embed), jnp.float32)}
    if s.masked:
      dense = {"kernel": draw(keys[3], (s.embed, s.embed), jnp.float32), "bias": jnp.zeros((s.embed,))}
      params["masked"] = {"dense": dense, "norm": norm(), "bias": jnp.zeros((s.vocab,))}
    return params

  def _view(self, mask: jax.Array) -> ops.View:
    return ops.View(mask, jnp.int32(0), *unturned(mask, self.config.head_dim), causal=False)

  def start(self, params: Params, inputs: Any) -> Any:
    """Embeds tokens, positions and types; the carry holds the hidden stream and the view.

    Raises:
      ValueError: tokens are no `[batch, length]` integers, or more than the model has positions for.
    """
    inputs = inputs if isinstance(inputs, Mapping) else {"tokens": inputs}
    tokens = checked_tokens(inputs["tokens"], params["embed"]["table"].shape[-2])
    if tokens.shape[1] > self.config.max_length:
      raise ValueError(f"{tokens.shape[1]} tokens are longer than the model's context of {self.config.max_length}")
    mask, types = inputs.get("attention_mask"), inputs.get("token_type_ids")
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask) != 0
    ends = {name: resolve(params, params[name]) for name in ("embed", "positions", "types") if name in params}
    if types is not None and "types" not in params:
      raise ValueError("token_type_ids: this model has no table of token types; leave them out")
    if types is None:
      types = jnp.zeros(tokens.shape, jnp.int32)
    else:
      types = checked_tokens(types, ends["types"]["table"].shape[-2])
    if types.shape != tokens.shape or mask.shape != tokens.shape:
      raise ValueError(f"token_type_ids {types.shape}, attention_mask {mask.shape} and tokens {tokens.shape} differ")
    h = ops.embed(tokens, ends["embed"]["table"])
    h += ops.embed(positions_of(mask) + self.config.first_position, ends["positions"]["table"])
    if "types" in ends:
      h += ops.embed(types, ends["types"]["table"])
    h, _ = run_module(LayerNorm(self.config.norm_epsilon), resolve(params, params["embed_norm"]), h)
    return {"h": h, "view": self._view(mask)}

  def blocks(self, params: Params) -> tuple[Block, ...]:
    """The layers that the tree has, in order."""
    return tuple(Block(f"layers/{i}", "encoder", self.stages) for i in numbered(params, "layers"))

  def run(self, block: Block, params: Params, carry: Any, taps: tuple[str, ...] = ()) -> tuple[Any, dict]:
    """One layer; `taps` names stages whose inputs are returned."""
    layer = resolve(params, params["layers"][block.path.rpartition("/")[2]])
    h, tapped = run_module(_Layer(self.config), layer, carry["h"], carry["view"], taps=tuple(taps))
    return {**carry, "h": h}, tapped

  def finish(self, params: Params, carry: Any, last: bool = False, span: tuple[Any, int] | None = None) -> Encoded:
    """States, and what the pooler and the head for masked tokens make of them where the tree has those."""
    h, pooled, logits = of_tokens(carry["h"], last, span), None, None
    if "pooler" in params:
      pooled = jnp.tanh(run_module(Linear(use_bias=True), resolve(params, params["pooler"]), carry["h"][:, 0])[0])
    if "masked" in params:
      table = resolve(params, params["head" if "head" in params else "embed"]["table"])
      logits, _ = run_module(_Masked(self.config), resolve(params, params["masked"]), h, table)
    return Encoded(h, pooled, logits)

  def features(self, params: Params, carry: Any) -> jax.Array:
    """What a head reads: the states `[batch, length, embed]` after the last layer."""
    return carry["h"]

  @property
  def tells_texts(self) -> bool:
    """Whether tokens of the second of two texts have type 1; RoBERTa's tokenizers give all of them type 0."""
    return self.config.kind == "bert"

  def summary(self, x: jax.Array) -> jax.Array:
    """What a head reads of a row, of what its own layer makes of the first token (transformers' classifiers)."""
    return jax.nn.relu(x) if self.config.kind == "distilbert" else jnp.tanh(x)

  def extents(self, params: Params) -> dict[str, int]:
    """Extents of logical axes that no array's shape tells by itself."""
    return {"head": self.config.head_dim}
