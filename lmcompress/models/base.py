"""What architectures share: a model as a start, blocks and a finish, and decoders that keep a cache."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import ops
from lmcompress.arrays import resolve
from lmcompress.distributed.sharding import gathered, on_mesh_of, whole_tokens
from lmcompress.types import Block, Params, Stage, Tokens

DECODER = "decoder_attention_mask"
"""The input that says which tokens of `decoder_input_ids` are real."""


@functools.partial(jax.jit, static_argnames=("module", "taps"))
def run_module(module: nn.Module, params: Params, *args: Any, taps: tuple[str, ...] = ()) -> tuple[Any, dict]:
  """What a module makes of `args`, and what it sowed as `<tap>_input`; compiled once for all blocks of one form."""
  result: Any = module.apply({"params": params}, *args, mutable=["taps"] if taps else [])
  made, variables = result
  return made, {name: _tap(variables["taps"], name) for name in taps}


def _tap(taps: Mapping[str, Any], name: str) -> jax.Array:
  """The value sown under `name`, wherever in the block."""
  for key, value in taps.items():
    if key == f"{name}_input":
      return value[0]
    if isinstance(value, Mapping) and (found := _tap(value, name)) is not None:
      return found
  return None  # type: ignore[return-value]


def linear_axes(path: str, inputs: Any, outputs: Any) -> dict[str, tuple[Any, ...]]:
  """Logical axes of a linear: its kernel, and the bias that it may have."""
  return {f"{path}/kernel": (inputs, outputs), f"{path}/bias": (outputs,)}


def norm_axes(path: str, axis: str, bias: bool = True) -> dict[str, tuple[Any, ...]]:
  """Logical axes of a norm: its scale, and the bias of one that subtracts a mean."""
  return {f"{path}/scale": (axis,), **({f"{path}/bias": (axis,)} if bias else {})}


def checked_tokens(given: Any, vocab: int) -> jax.Array:
  """Token ids `[batch, length]`.

  Raises:
    ValueError: they are no such integers, or (where they lie on the host) outside the vocabulary.
  """
  tokens = jnp.asarray(given)
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f"tokens are [batch, length] integers; found {tokens.dtype}{list(tokens.shape)}")
  if isinstance(given, np.ndarray) and given.size:  # what lies on a device is not fetched to be checked
    low, high = int(given.min()), int(given.max())
    if low < 0 or high >= vocab:
      raise ValueError(f"tokens from {low} to {high} are outside the vocabulary of {vocab}")
  return tokens


def positions_of(mask: jax.Array) -> jax.Array:
  """Positions `[batch, length]` of tokens, how many real ones stand before each; padding may stand on either side."""
  return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)


def unturned(positions: jax.Array, head: int) -> tuple[jax.Array, jax.Array]:
  """1 and 0 as cos and sin for `positions: [batch, length]`; none at all where a head has no two halves."""
  shape = (*positions.shape, 0 if head % 2 else head // 2)
  return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)


def numbered(params: Params, name: str) -> list[str]:
  """The keys of `params[name]` in the order of their numbers; they are never renumbered."""
  return sorted(params.get(name, {}), key=int)


@dataclasses.dataclass(frozen=True)
class BlockModel(abc.ABC):
  """A model by its block view (see `types.Model`); a subclass gives `start`, `blocks`, `run`, `finish`.

  Attributes:
    config: what the tree cannot say.
    sizes: what `init` makes; not needed for a tree that is loaded.
    takes: the inputs of `apply` beside the tokens.
    causal: whether the output at a token predicts the next.
  """

  config: Any
  sizes: Any = None

  architecture: ClassVar[str]
  axes: ClassVar[Mapping[str, tuple[Any, ...]]]
  takes: ClassVar[frozenset[str]] = frozenset({"attention_mask", "cache"})
  causal: ClassVar[bool] = True

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
    """The output for `tokens: [batch, length]` int32, of a decoder logits float32; `(output, cache)` with a cache.

    Args:
      attention_mask: `[batch, length]`, nonzero for real tokens; padding may stand on either side.
      token_type_ids: `[batch, length]`, which of two texts a token belongs to.
      decoder_input_ids: `[batch, length]`, what the decoder of an encoder-decoder has read.
      cache: what was read before; the tokens continue it.

    Raises:
      ValueError: an input that the architecture does not take, tokens that are no `[batch, length]` integers, or more
        of them than the model or the cache holds.
    """
    inputs = {
      "attention_mask": attention_mask, "token_type_ids": token_type_ids, "decoder_input_ids": decoder_input_ids,
      "cache": cache,
    }  # fmt: skip
    given = {name: value for name, value in inputs.items() if value is not None}
    if left := sorted(set(given) - self.takes):
      takes = ", ".join(sorted(self.takes))
      raise ValueError(f"{type(self).__name__} takes no {' and no '.join(left)}; it takes {takes}")
    with on_mesh_of(params):
      ends = gathered(self, params)
      carry = self.start(ends, {"tokens": tokens, **given})
      for block in self.blocks(params):
        carry, _ = self.run(block, gathered(self, params, block.path), carry)
      return self.finish(ends, carry)

  @abc.abstractmethod
  def start(self, params: Params, inputs: Any) -> Any:
    """The carry before the first block."""

  @abc.abstractmethod
  def blocks(self, params: Params) -> tuple[Block, ...]:
    """The blocks that the tree has, in order."""

  @abc.abstractmethod
  def run(self, block: Block, params: Params, carry: Any, taps: tuple[str, ...] = ()) -> tuple[Any, dict]:
    """One block; `taps` names stages whose inputs are returned."""

  @abc.abstractmethod
  def finish(self, params: Params, carry: Any, last: bool = False, span: tuple[Any, int] | None = None) -> Any:
    """The output for the carry after the last block."""

  def extents(self, params: Params) -> dict[str, int]:
    """Extents of logical axes that no array's shape tells by itself."""
    return {}

  def sized(self) -> Any:
    """The sizes that `init` needs.

    Raises:
      ValueError: the model has none.
    """
    if self.sizes is None:
      name = type(self).__name__
      raise ValueError(f"{name}.init needs sizes: {name}(config, {name}Sizes(vocab=..., embed=..., ...))")
    return self.sizes


class Decoding(NamedTuple):
  """The decoder of an encoder-decoder on its way: what it has read, and what its layers hold of the source.

  Attributes:
    cache: of the decoder's own tokens, or the states of a recurrent one.
    held: per block path `(k, v)`, each `[batch, kv, source, head]`; nothing of a recurrent one.
    real: bool `[batch, source]`, the tokens of the source that are real.
  """

  cache: Any
  held: dict[str, tuple[jax.Array, jax.Array]]
  real: jax.Array


def of_tokens(h: jax.Array, last: bool, span: tuple[Any, int] | None) -> jax.Array:
  """`[batch, length, ...]` of all tokens, of the last alone, or of `span[1]` from `span[0]` on."""
  h = whole_tokens(h)
  h = h[:, -1:] if last else h
  return h if span is None else jax.lax.dynamic_slice_in_dim(h, span[0], span[1], axis=1)


@dataclasses.dataclass(frozen=True)
class Decoder(BlockModel):
  """A causal decoder: `embed`, layers of one form under `layers`, `final_norm`, and the head or the embedding again.

  A subclass gives `stages`, `layer_of`, `norm` and, where they are its own, `embedded`, `turned` and `logits`. Its
  config has `head_dim` and `max_length`.
  """

  stages: ClassVar[tuple[Stage, ...]]

  @abc.abstractmethod
  def layer_of(self, block: Block) -> nn.Module:
    """The module of a block: `(h, view, layer_cache) -> (h, layer_cache)`."""

  @abc.abstractmethod
  def norm(self) -> nn.Module:
    """The norm after the last layer."""

  def embedded(self, params: Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """The hidden stream `[batch, length, embed]` before the first layer."""
    return whole_tokens(ops.embed(tokens, resolve(params, params["embed"]["table"])), gradients=True)

  def turned(self, positions: jax.Array, slots: int | None = None) -> tuple[jax.Array, jax.Array]:
    """cos and sin of each position, `[batch, length, head / 2]`; as they are here they turn nothing."""
    return unturned(positions, self.config.head_dim)

  def logits(self, table: Any, h: jax.Array) -> jax.Array:
    """float32 `[batch, length, vocab]` of normed states."""
    return ops.attend(h, table).astype(jnp.float32)

  def start(self, params: Params, inputs: Any) -> Any:
    """Embeds the tokens; the carry holds the hidden stream, the view (positions, visibility) and the cache."""
    inputs = inputs if isinstance(inputs, Mapping) else {"tokens": inputs}
    tokens = checked_tokens(inputs["tokens"], params["embed"]["table"].shape[-2])
    cache, mask = inputs.get("cache"), inputs.get("attention_mask")
    if cache is None and tokens.shape[1] > self.config.max_length:
      raise ValueError(f"{tokens.shape[1]} tokens are longer than the model's context of {self.config.max_length}")
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask) != 0
    if cache is None:
      positions, real, slot = positions_of(mask), mask, jnp.int32(0)
    else:
      cache = cache.reserve(mask)
      positions, real, slot = cache.positions(mask.shape[1]), cache.real, cache.length
    view = ops.View(real, slot, *self.turned(positions, None if cache is None else cache.real.shape[1]))
    return {"h": self.embedded(params, tokens, positions), "view": view, "cache": cache}

  def blocks(self, params: Params) -> tuple[Block, ...]:
    """The layers that the tree has, in order; keys are never renumbered."""
    return tuple(Block(f"layers/{i}", "decoder", self.stages) for i in numbered(params, "layers"))

  def run(self, block: Block, params: Params, carry: Any, taps: tuple[str, ...] = ()) -> tuple[Any, dict]:
    """One layer; `taps` names stages whose inputs are returned."""
    cache = carry["cache"]
    layer = resolve(params, params["layers"][block.path.rpartition("/")[2]])
    layer_cache = None if cache is None else cache.layer(block.path)
    (h, layer_cache), tapped = run_module(
      self.layer_of(block), layer, carry["h"], carry["view"], layer_cache, taps=tuple(taps)
    )
    if cache is not None:
      cache = cache.with_layer(block.path, layer_cache)
    return {**carry, "h": h, "cache": cache}, tapped

  def finish(self, params: Params, carry: Any, last: bool = False, span: tuple[Any, int] | None = None) -> Any:
    """Logits (of the last token alone with `last`, of `span[1]` tokens from `span[0]` on), and the advanced cache."""
    ends = {name: resolve(params, params[name]) for name in ("embed", "head", "final_norm") if name in params}
    logits = _finish(type(self)(self.config), ends, of_tokens(carry["h"], last, span))
    cache = carry["cache"]
    return logits if cache is None else (logits, cache.advance(carry["h"].shape[1]))

  def features(self, params: Params, carry: Any) -> jax.Array:
    """What a head reads: the normed states `[batch, length, embed]` after the last block."""
    return run_module(self.norm(), resolve(params, params["final_norm"]), carry["h"])[0]

  def extents(self, params: Params) -> dict[str, int]:
    """Extents of logical axes that no array's shape tells by itself."""
    return {"head": self.config.head_dim}

  def cache_shapes(self, params: Params) -> dict[str, tuple[int, int]]:
    """Per block path, the KV heads and the head dimension that a cache must hold."""
    head = self.config.head_dim
    return {
      f"layers/{i}": (layer["attn"]["k"]["kernel"].shape[-1] // head, head) for i, layer in params["layers"].items()
    }

  def made(self, key: jax.Array, layer: nn.Module, vocab: int, embed: int, layers: int, tied: bool) -> Params:
    """Random parameters: a table of scale `embed**-0.5` at each end, layers by their own `init`, norms of ones."""
    keys = jax.random.split(key, layers + 2)
    h, positions = jnp.zeros((1, 1, embed), jnp.float32), jnp.zeros((1, 1), jnp.int32)
    view = ops.View(jnp.ones((1, 1), bool), jnp.int32(0), *self.turned(positions))
    table = nn.initializers.normal(embed**-0.5)
    params: Params = {
      "embed": {"table": table(keys[0], (vocab, embed), jnp.float32)},
      "layers": {str(i): layer.init(keys[i + 2], h, view)["params"] for i in range(layers)},
      "final_norm": dict(self.norm().init(keys[1], h)["params"]),
    }
    if not tied:
      params["head"] = {"table": table(keys[1], (vocab, embed), jnp.float32)}
    return params


@functools.partial(jax.jit, static_argnames=("model",))
def _finish(model: Decoder, params: Params, h: jax.Array) -> jax.Array:
  normal, _ = run_module(model.norm(), params["final_norm"], h)
  head = params["head"] if "head" in params else params["embed"]
  logits = model.logits(head["table"], normal)
  return logits + head["bias"] if "bias" in head else logits
