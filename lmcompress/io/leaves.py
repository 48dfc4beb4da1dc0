"""Leaves as files hold them: what each is, in JSON, and its arrays by name; and back, refusing what none here makes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmcompress import tree
from lmcompress.arrays import (
  E2M1,
  NF4,
  BitmapArray,
  ClusteredArray,
  DictionaryArray,
  DirectionArray,
  FakeQuantArray,
  FixedStep,
  Float8,
  Float8PerToken,
  GatedArray,
  InputArray,
  Int8PerGroup,
  Int8PerToken,
  Int8Static,
  Integer,
  LatticeArray,
  LearnedInputArray,
  LowRankArray,
  MaskedArray,
  NestedArray,
  NMSparseArray,
  OutlierArray,
  Packed,
  QuantizedArray,
  ScoredArray,
  SharedRef,
  SplitArray,
  StaticStep,
  StoredArray,
  SumArray,
  Table,
  Threshold,
  Uint8PerTensor,
)
from lmcompress.arrays.shared import SHARED
from lmcompress.io import safetensors
from lmcompress.types import CompressedArray, FormatError, Params

_KINDS = {
  c.__name__: c
  for c in (
    BitmapArray,
    ClusteredArray,
    DictionaryArray,
    DirectionArray,
    FakeQuantArray,
    GatedArray,
    InputArray,
    LatticeArray,
    LearnedInputArray,
    LowRankArray,
    MaskedArray,
    NMSparseArray,
    NestedArray,
    OutlierArray,
    Packed,
    QuantizedArray,
    ScoredArray,
    SharedRef,
    SplitArray,
    SumArray,
  )
}
_ACTS = (FixedStep, Float8PerToken, Int8PerGroup, Int8PerToken, Int8Static, StaticStep, Threshold, Uint8PerTensor)
_VALUES = {c.__name__: c for c in (Integer, Float8, Table, *_ACTS)}
_TABLES = {t.name: t for t in (NF4, E2M1)}


def describe(params: Params, paths: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
  """`{path: description}` and the arrays by name: what a manifest says of a tree, and what the file holds.

  Args:
    paths: `params` is `{path: leaf}` already.
  """
  arrays: dict[str, Any] = {}

  def visit(name: str, node: Any) -> Any:
    if node is None or isinstance(node, (bool, int, float, str)):
      return node
    if isinstance(node, tuple):
      return list(node)
    if isinstance(node, StoredArray) and not node.dense:
      node = node.read()
    kind = type(node).__name__
    if kind in _KINDS:
      return {
        "kind": kind,
        **{f.name: visit(f"{name}.{f.name}", getattr(node, f.name)) for f in dataclasses.fields(node)},
      }
    if kind in _VALUES:
      if isinstance(node, Table) and node == _TABLES.get(node.name):
        return {"kind": "Table", "name": node.name}
      return {"kind": kind, **{f.name: getattr(node, f.name) for f in dataclasses.fields(node) if f.init}}
    if not safetensors.is_supported(node.dtype):
      raise ValueError(f"{name}: arrays of {node.dtype} cannot be stored")
    arrays[name] = node
    return {"array": name, "dtype": str(np.dtype(node.dtype)), "shape": list(node.shape)}

  leaves = {path: visit(path, leaf) for path, leaf in (params if paths else tree.flatten(params)).items()}
  return leaves, arrays


def rebuild(description: Any, read: Callable[[str], Any], path: str, where: Path) -> Any:
  """Undoes `describe` for one leaf.

  Raises:
    FormatError: the description is not one that `describe` gives.
  """
  if not isinstance(description, dict):
    if description is None or isinstance(description, (bool, int, float, str)):
      return description
    if isinstance(description, list) and all(type(n) is int and n >= 0 for n in description):
      return tuple(description)
    raise FormatError(f"{where}: {path} is described by {type(description).__name__}")
  if "array" in description:
    name = description["array"]
    x = read(name)
    if description != {"array": name, "dtype": str(np.dtype(x.dtype)), "shape": list(x.shape)}:
      raise FormatError(f"{where}: array {name!r} is {x.dtype}{list(x.shape)}, described as {description}")
    return x
  name = str(description.get("kind"))
  given = {k: v for k, v in description.items() if k != "kind"}
  if name == "Table" and set(given) == {"name"} and given["name"] in _TABLES:
    return _TABLES[given["name"]]
  cls = _KINDS.get(name) or _VALUES.get(name)
  wanted = {f.name for f in dataclasses.fields(cls) if f.init} if cls else set()
  if cls is None or set(given) != wanted:
    raise FormatError(
      f"{where}: {path} has kind {name!r} with fields {sorted(given)}; {sorted(wanted) or 'it is unknown here'}"
    )
  if cls is Table:
    return Table(str(given["name"]), tuple(float(v) for v in given["values"]))
  return cls(**{k: rebuild(v, read, f"{path}.{k}", where) for k, v in given.items()})


_SETTINGS: dict[str, Callable[[Any], bool]] = {
  "act": lambda v: type(v) in _ACTS,
  "axis": lambda v: type(v) is int and v in (-2, -1),
  "bits": lambda v: type(v) is int and 1 <= v <= 8,
  "extents": lambda v: type(v) is tuple and all(type(n) is int and n >= 0 for n in v),
  "group_size": lambda v: type(v) is int and (v == -1 or v > 0),
  "inputs": lambda v: type(v) is int and v > 0,
  "lowest": lambda v: type(v) is int and 0 <= v <= 255,
  "m": lambda v: type(v) is int and 2 <= v <= 256,
  "n": lambda v: type(v) is int and 1 <= v <= 255,
  "offset": lambda v: type(v) is int and 0 <= v <= 255,
  "pad": lambda v: type(v) is int and v >= 0,
  "scale_dtype": lambda v: v in ("bfloat16", "float16", "float32"),
  "step": lambda v: type(v) is float and 0 < v < math.inf,
}
"""What the static fields of a compressed leaf and its grids may be, by name."""


def check_settings(node: Any, path: str, where: Path) -> None:
  """Refuses settings, here and in the parts, that nothing here makes.

  Raises:
    FormatError: names the setting.
  """
  for field in dataclasses.fields(node):
    value = getattr(node, field.name)
    if field.name in _SETTINGS and not _SETTINGS[field.name](value):
      raise FormatError(f"{where}: {path} has {field.name} {str(value)[:80]}")
    if type(value) in (*_KINDS.values(), *_VALUES.values()):
      check_settings(value, f"{path}.{field.name}", where)
  if isinstance(node, NMSparseArray) and node.n >= node.m:
    raise FormatError(f"{where}: {path} keeps {node.n} of {node.m}")
  if isinstance(node, ClusteredArray):
    entries, books = node.codebook.shape[-1], node.books
    if not 1 <= entries <= 2**node.codes.bits or not books or node.outputs % books:
      raise FormatError(f"{where}: {path} has {books} codebooks of {entries} entries for {node.outputs} outputs")
  if isinstance(node, DictionaryArray):
    (spaces, count), codes = node.atoms.shape[-3:-1], node.codes.shape[node.axis]
    runs = codes // max(node.terms, 1)
    if not 1 <= count <= 2**node.codes.bits or node.terms < 1 or codes != runs * node.terms or spaces not in (1, runs):
      raise FormatError(f"{where}: {path} has {spaces} times {count} atoms and {node.terms} terms for {codes} codes")


def check_references(leaf: Any, values: Params, path: str, where: Path) -> None:
  """Refuses a reference to what is not there, is not what it says, or is itself one."""
  for node in jax.tree.leaves(leaf, is_leaf=lambda x: isinstance(x, SharedRef)):
    if not isinstance(node, SharedRef):
      continue
    value = tree.get(values, node.path) if node.path.startswith(f"{SHARED}/") else None
    if not isinstance(value, (jax.Array, np.ndarray, CompressedArray)) or isinstance(value, SharedRef):
      raise FormatError(f"{where}: {path} refers to {node.path[:80]!r}, which holds no value")
    if tuple(value.shape) != node.extents or str(np.dtype(value.dtype)) != node.dtype:
      raise FormatError(f"{where}: {path} refers to {node.path} as {node.dtype}{list(node.extents)}; it is another")


def fits(leaf: CompressedArray) -> bool:
  """Whether the parts fit one another: the dense value and a tile of it have the shapes that the leaf says."""
  parts = (getattr(leaf, field.name) for field in dataclasses.fields(leaf))  # type: ignore[arg-type]
  if not all(fits(part) for part in parts if isinstance(part, CompressedArray)):
    return False
  dense, tile = jax.eval_shape(lambda x: (x.materialize(), x.columns(0, 1)), leaf)
  axis: int = leaf.axis  # type: ignore[attr-defined]
  expected = list(leaf.shape)
  expected[-3 - axis] = 1
  return dense.shape == leaf.shape and list(tile.shape) == expected
