"""The contracts of the library: parameters, compressed leaves, transforms, evidence and models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from lmcompress.errors import ConfigError, FormatError, LmcompressError, SourceError, WeightError

__all__ = [
  "Block",
  "BlockEvidence",
  "CompressedArray",
  "ConfigError",
  "Evidence",
  "FormatError",
  "LmcompressError",
  "Model",
  "Params",
  "SourceError",
  "Stage",
  "State",
  "Tokens",
  "Transform",
  "WeightError",
]

Params = dict[str, Any]
"""A nested dict with string keys whose leaves are `jax.Array` or `CompressedArray`; paths join the keys by `/`."""

State = Any
Tokens = Any
"""Token ids `[batch, length]` int32, a JAX or a NumPy array."""


class CompressedArray:
  """A weight stored in another way than densely: an array-like pytree node.

  Subclasses are frozen dataclasses registered with `jax.tree_util.register_dataclass`. They have no
  `__post_init__` (JAX rebuilds nodes with placeholders); factories check. `shape` is derived from data
  fields, so that it stays right under `vmap` and `scan`.
  """

  shape: tuple[int, ...]
  dtype: Any
  nbits: int

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def size(self) -> int:
    n = 1
    for extent in self.shape:
      n *= extent
    return n

  @property
  def nbytes(self) -> float:
    """Bytes that the stored form takes: `nbits / 8`, all parts counted."""
    return self.nbits / 8

  @property
  def kind(self) -> str:
    """A short word for tables, such as `int4 g64`."""
    raise NotImplementedError

  def materialize(self) -> jax.Array:
    """The dense value `[...shape]` in `dtype`."""
    raise NotImplementedError

  def columns(self, start: Any, size: int) -> jax.Array:
    """`size` outputs (rows of a table) from `start` on, dense float32: a tile of the weight."""
    raise NotImplementedError

  def rows(self, ids: jax.Array) -> jax.Array:
    """Rows `[*ids.shape, features]` of a table, dense float32."""
    raise NotImplementedError

  def sharding_like(self, spec: Any) -> Any:
    """The same node with a `PartitionSpec` for each data field, derived from the dense `spec`."""
    raise NotImplementedError

  @classmethod
  def trainable_fields(cls) -> tuple[str, ...]:
    """Names of the data fields that gradients may reach."""
    return ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Evidence:
  """What a transform may know beyond the tree. The driver fills what the transform's `needs` name.

  Attributes:
    selected: paths of the weights that the transform is to act on; None means its default selection.
    key: a PRNG key; fold in a path for a key of one weight.
    step: the training step, a scalar.
    statistics: per weight path, a dict of statistic name to array, e.g. `hessian: [in, in]`.
    grads: a tree like the parameters, dense: the gradient of the mean loss.
    fisher: a tree like the parameters, dense: the mean over rows of the squared gradient of a row's loss.
    reference: weights by path as they were when they were last dense, a tree.
    structure: what the model publishes (axes, blocks and their stages).
    tokens: calibration tokens `[n, length]`, for a method that runs the model itself.
    beside: what else the model takes with them, such as `decoder_input_ids`, a row for each of theirs.
    block: a `BlockEvidence`.
  """

  selected: frozenset[str] | None = dataclasses.field(default=None, metadata={"static": True})
  key: jax.Array | None = None
  step: jax.Array | int | None = None
  statistics: Mapping[str, Mapping[str, jax.Array]] | None = None
  grads: Params | None = None
  fisher: Params | None = None
  reference: Params | None = None
  structure: Any = dataclasses.field(default=None, metadata={"static": True})
  tokens: jax.Array | None = None
  beside: Mapping[str, jax.Array] | None = None
  block: Any = dataclasses.field(default=None, metadata={"static": True})


class BlockEvidence(NamedTuple):
  """A block with what goes through it, batch by batch.

  Attributes:
    path: where it lies in the tree.
    run: `(the subtree at path, carry) -> carry`, hashable and alike for blocks of one kind.
    inputs: carries of today's model.
    outputs: what the block gave before compression, on the inputs that it had then.
    masks: bool `[batch, length]`, True for real tokens.
  """

  path: str
  run: Callable[[Params, Any], Any]
  inputs: Sequence[Any]
  outputs: Sequence[Any]
  masks: Sequence[Any]


class Transform(NamedTuple):
  """A compression method as a pair of pure functions, as in optax.

  Attributes:
    init: `(params, selected=None) -> state`; sees the whole tree just before its turn, resolves patterns,
      checks and plans. Raises `WeightError` for what cannot work.
    apply: `(params, state, evidence) -> (params, state)`; gets any subtree with full paths.
    needs: names of the evidence it reads, e.g. `{"hessian"}`, `{"key"}`, `{"step"}`.
    phase: `"once"` (may change a leaf's type, driven from the host) or `"step"` (keeps structure, jits).
    scope: `"weight"`, `"block"` or `"model"`; `compress` cuts a chain at model-scope links.
    name: what tables and reports call it.
    links: the parts of a chain, in order; empty for a single method.
    plan: `state -> Transform`, for a method that first measures (its `apply` gathers the state and changes nothing)
      and then knows what to do; `compress` runs what it returns next.
    inputs: whether it sees what stands on a weight's input (`InputArray`), as what acts on inputs, changes them (so
      that steps set for them would be wrong) or runs the model must. Others are handed the weight beneath.
  """

  init: Callable[..., State]
  apply: Callable[[Params, State, Evidence], tuple[Params, State]]
  needs: frozenset[str] = frozenset()
  phase: str = "once"
  scope: str = "weight"
  name: str = ""
  links: tuple[Transform, ...] = ()
  plan: Callable[[State], Transform] | None = None
  inputs: bool = False


class Stage(NamedTuple):
  """Linears of a block that read the same input.

  Attributes:
    name: e.g. `"qkv"`; the key of the tap.
    linears: paths relative to the block, e.g. `("attn/q", "attn/k", "attn/v")`.
    source: the norm or linear (relative path) whose output feeds them.
    free: logical axes of the source's output along which any matrix may move from the source to these linears (between
      them lies nothing that would notice, as attention does not within a value's head).
    mask: the input of the model that says which tokens of the stage's input are real.
    others: linears that read what the source gives too and are linears of stages of their own, as experts are, which
      get but some of the tokens; those stages have no source.
  """

  name: str
  linears: tuple[str, ...]
  source: str
  free: tuple[str, ...] = ()
  mask: str = "attention_mask"
  others: tuple[str, ...] = ()

  @property
  def readers(self) -> tuple[str, ...]:
    """All linears that read what the source gives."""
    return self.linears + self.others


class Block(NamedTuple):
  """One block of a model: where it lies in the tree, its kind, and its stages in order of execution."""

  path: str
  kind: str
  stages: tuple[Stage, ...]


@runtime_checkable
class Model(Protocol):
  """A pure function and the structure it publishes; any object with these members is a model."""

  @property
  def axes(self) -> Mapping[str, tuple[Any, ...]]:
    """Logical axis names keyed by path pattern, e.g. `layers/*/mlp/up/kernel: ("embed", "mlp")`.

    Patterns of what lies in blocks have a `*`, or the block's number; a name that occurs elsewhere too is one axis with
    the same entries everywhere.
    """
    ...

  def init(self, key: jax.Array) -> Params: ...

  def apply(
    self,
    params: Params,
    tokens: Tokens,
    *,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    decoder_input_ids: Any = None,
    cache: Any = None,
  ) -> Any: ...

  def start(self, params: Params, inputs: Any) -> Any: ...

  def blocks(self, params: Params) -> tuple[Block, ...]:
    """The blocks that the tree has, in order of execution; of a subtree those that it has, perhaps none."""
    ...

  def run(self, block: Block, params: Params, carry: Any, taps: tuple[str, ...] = ()) -> tuple[Any, dict]: ...

  def finish(self, params: Params, carry: Any, last: bool = False, span: tuple[Any, int] | None = None) -> Any:
    """The output: of all tokens, of the last alone, or of `span[1]` from `span[0]` (perhaps traced) on."""
    ...

  def features(self, params: Params, carry: Any) -> jax.Array:
    """What a head of a task reads, `[batch, length, width]`: the states after the last block, normed."""
    ...
