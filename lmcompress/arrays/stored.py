"""StoredArray: a leaf that lies in a file and is read when it is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.types import CompressedArray


@dataclasses.dataclass(frozen=True, eq=False)
class StoredArray(CompressedArray):
  """Stands in a tree for a leaf on disk: of a model larger than memory, only what is in work is read.

  Not a JAX node: it enters no compiled function. `compress` reads each leaf when its turn comes; `fetch` reads one.

  Attributes:
    read: gives the leaf, dense or compressed.
    shape, dtype, nbits: of the leaf.
    form: its kind.
    dense: whether the leaf is an array, so that `np.asarray` gives its values.
  """

  read: Callable[[], Any]
  shape: tuple[int, ...]
  dtype: Any
  nbits: int
  form: str
  dense: bool

  @property
  def kind(self) -> str:
    return self.form

  def materialize(self) -> jax.Array:
    leaf = self.read()
    return leaf.materialize() if isinstance(leaf, CompressedArray) else jnp.asarray(leaf)

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    return np.asarray(self.materialize() if not self.dense else self.read(), dtype)


def fetch(leaf: Any) -> Any:
  """The leaf itself, read if it lies in a file."""
  return leaf.read() if isinstance(leaf, StoredArray) else leaf
