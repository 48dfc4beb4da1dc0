"""Logical axes: where an axis of a model occurs, how long it is, and a tree with some of its entries removed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.arrays import MaskedArray, masked
from lmcompress.transforms.combine import require_dense
from lmcompress.types import CompressedArray, Params, WeightError


class Place(NamedTuple):
  """One dimension of one leaf that an axis is (a part of).

  Attributes:
    path: the leaf.
    dim: the dimension, negative.
    names: the axes that are flattened into it, outermost first.
  """

  path: str
  dim: int
  names: tuple[str, ...]

  @property
  def reads(self) -> bool:
    """Whether a product sums over it: the entries of a kernel's input, of a table's features."""
    return tree.is_weight(self.path) and self.dim == tree.contraction_axis(self.path)


def places(model: Any, params: Params, axis: str, under: str = "") -> list[Place]:
  """Where an axis occurs among the leaves at or below `under`."""
  return [p for p in _all_places(model, params, under) if axis in p.names]


def _all_places(model: Any, params: Params, under: str) -> list[Place]:
  found = []
  for path, leaf in tree.flatten(params).items():
    if under and not path.startswith(f"{under}/"):
      continue
    for i, names in enumerate(tree.axes_of(model.axes, path)):
      found.append(Place(path, i - leaf.ndim, _names(names)))
  return found


def _global_axes(model: Any) -> frozenset[str]:
  """Axes with the same entries everywhere: those that occur outside of blocks too."""
  outside = [names for pattern, names in model.axes.items() if not _numbered(pattern)]
  return frozenset(name for names in outside for part in names for name in _names(part))


def _numbered(pattern: str) -> bool:
  """Whether a pattern names leaves of blocks, by `*` or a number in the place of the block's own."""
  return any(part == "*" or part.isdigit() for part in pattern.split("/"))


def local_axes(model: Any, params: Params, under: str) -> dict[str, Place]:
  """Axes whose entries are a block's own and may be removed, each with the first place where it occurs.

  What no product sums over, as the choices of a router, is none of them.
  """
  fixed = _global_axes(model) | set(dict(getattr(model, "extents", lambda params: {})(params)))
  here = _all_places(model, params, under)
  read = {name for place in here if place.reads for name in place.names}
  found: dict[str, Place] = {}
  for place in here:
    for name in place.names:
      if name in read - fixed:
        found.setdefault(name, place)
  return found


def neuron_axes(axes: Mapping[str, Place]) -> list[str]:
  """Of `local_axes`, those that fill a dimension by themselves, as hidden neurons do."""
  return [name for name, place in axes.items() if place.names == (name,)]


def head_axes(axes: Mapping[str, Place], depth: int = 0) -> list[str]:
  """Of `local_axes`, those of groups of queries with their key and value, or at depth 1 of the queries of a group."""
  return [name for name, place in axes.items() if len(place.names) > 1 and place.names[depth] == name]


def _names(part: Any) -> tuple[str, ...]:
  return part if isinstance(part, tuple) else (part,)


def extents(model: Any, params: Params, under: str = "") -> dict[str, int]:
  """How many entries each axis has, by what the model says and what shapes leave over.

  Raises:
    WeightError: shapes disagree.
  """
  known = dict(getattr(model, "extents", lambda params: {})(params))
  open_ = [(p, tree.get(params, p.path).shape[p.dim]) for p in _all_places(model, params, under)]
  while open_:
    left = []
    for place, size in open_:
      unknown = [name for name in place.names if name not in known]
      rest = math.prod(known[name] for name in place.names if name in known)
      if len(unknown) == 1 and size % rest == 0:
        known[unknown[0]] = size // rest
      elif not unknown and rest != size:
        raise WeightError(f"{place.path}: axes {place.names} have {rest} entries in all, the shape has {size}")
      elif unknown:
        left.append((place, size))
    if len(left) == len(open_):
      break
    open_ = left
  return known


def remaining(model: Any, params: Params, axis: str, keep: np.ndarray, under: str = "") -> Params:
  """A tree whose `axis` has the entries `keep` alone, wherever it occurs at or below `under`.

  Args:
    keep: ascending indices `[kept]`; for an axis that lies within another in a flattened dimension, also
      `[*outer, kept]`, some of each entry of the outer ones.

  Raises:
    WeightError: a leaf is compressed.
  """
  sizes = extents(model, params, under)
  for place in places(model, params, axis, under):
    leaf = tree.get(params, place.path)
    at = place.names.index(axis)
    shape = [sizes[name] for name in place.names]
    chosen = np.asarray(keep)
    outer = list(range(at - chosen.ndim + 1, at))
    chosen = chosen.reshape([shape[i] if i in outer else 1 for i in range(at)] + [-1] + [1] * (len(shape) - at - 1))
    chosen = np.broadcast_to(chosen, [chosen.shape[at] if i == at else n for i, n in enumerate(shape)])
    positions = np.take_along_axis(np.arange(math.prod(shape)).reshape(shape), chosen, axis=at).reshape(-1)
    params = tree.put(params, place.path, _take(place, leaf, positions))
  return params


def _take(place: Place, leaf: Any, positions: np.ndarray) -> Any:
  if isinstance(leaf, MaskedArray) and not isinstance(leaf.values, CompressedArray):
    values, mask = (jnp.take(x, positions, axis=place.dim) for x in (leaf.values, leaf.mask.unpack()))
    return masked(values, mask, leaf.axis)
  if isinstance(leaf, CompressedArray):
    raise WeightError(f"{place.path}: it is stored as {leaf.kind}; remove entries of an axis before that")
  return jnp.take(leaf, positions, axis=place.dim)


def require_removable(name: str, params: Params, found: list[Place]) -> None:
  """Raises unless all leaves are dense, perhaps masked, and finite."""
  for path in dict.fromkeys(place.path for place in found):
    require_dense(name, path, tree.get(params, path))


def stream_norms(name: str, model: Any, params: Params) -> tuple[str, list[str]]:
  """The axis of the hidden stream, and the norms over it.

  It is the axis that norms of blocks share with what lies outside of blocks: norms within blocks' own axes, as of
  queries, and those of a head alone are not over it.

  Raises:
    WeightError: blocks have no norms, or they lie on several axes.
  """
  fixed = _global_axes(model)
  scales = {pattern: names[-1] for pattern, names in model.axes.items() if pattern.endswith("/scale")}
  streams = {axis for pattern, axis in scales.items() if _numbered(pattern) and axis in fixed}
  if len(streams) != 1:
    raise WeightError(f"{name}: norms lie on axes {sorted(map(str, streams))}; exactly one is needed")
  axis = next(iter(streams))
  paths = [path for path in tree.flatten(params) if path.endswith("/scale")]
  return axis, [p.removesuffix("/scale") for p in paths if tree.axes_of(model.axes, p)[-1:] == (axis,)]


def with_values(leaf: Any, values: jax.Array) -> Any:
  """The leaf with other values of the same shape, in its dtype; a mask stays."""
  if isinstance(leaf, MaskedArray):
    return dataclasses.replace(leaf, values=values.astype(leaf.dtype))
  return values.astype(leaf.dtype)
