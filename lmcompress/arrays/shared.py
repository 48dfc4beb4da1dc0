"""SharedRef: a value that lies under `shared/` and is read from several places, by its path."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from lmcompress import tree
from lmcompress.types import CompressedArray, Params

SHARED = "shared"
"""The subtree that holds what others refer to."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedRef(CompressedArray):
  """Stands for the leaf at `path` of the same tree; takes no bits itself. Models `resolve` it before they compute.

  JAX trees keep no aliases: two places that hold one array become two in a gradient, a checkpoint or a mesh. One
  value and references to it stay one.

  Attributes:
    path: of the value, below `shared/`.
    extents: the value's shape.
    dtype: name of its dtype.
    axis: the contraction axis of a weight; -1 for what is none.
  """

  path: str = dataclasses.field(metadata={"static": True})
  extents: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  dtype: str = dataclasses.field(metadata={"static": True})
  axis: int = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    return self.extents

  @property
  def nbits(self) -> int:
    return 0

  @property
  def kind(self) -> str:
    return f"shared {self.path.removeprefix(f'{SHARED}/')}"

  def sharding_like(self, spec: Any) -> SharedRef:
    """Itself: it has no arrays, and the value is split at its own place."""
    return self

  def materialize(self) -> jax.Array:
    raise TypeError(f"a reference to {self.path} holds no values; arrays.resolve(params, leaf) finds them")


def refer(path: str, value: Any, axis: int = -1) -> SharedRef:
  """A reference to `value`, which is to lie at `path`."""
  return SharedRef(path, tuple(value.shape), str(np.dtype(value.dtype)), axis)


def resolve(params: Params, node: Any) -> Any:
  """`node`, a subtree or a leaf, with the values of `params` in the place of references.

  Raises:
    KeyError: a reference points to nothing.
  """
  if SHARED not in params:
    return node

  def find(x: Any) -> Any:
    if not isinstance(x, SharedRef):
      return x
    value = tree.get(params, x.path)
    if value is None:
      raise KeyError(f"a leaf refers to {x.path}, and the tree has no such path")
    return value

  return jax.tree.map(find, node, is_leaf=lambda x: isinstance(x, SharedRef))
