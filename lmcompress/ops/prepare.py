"""Preparing a tree for the kernels of a backend: leaves laid out anew, one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from lmcompress import tree
from lmcompress.arrays.clustered import ClusteredArray
from lmcompress.arrays.direction import DirectionArray
from lmcompress.arrays.fake_quant import FakeQuantArray
from lmcompress.arrays.gated import GatedArray
from lmcompress.arrays.input import InputArray, Int8PerGroup, Int8PerToken
from lmcompress.arrays.learned_input import LearnedInputArray
from lmcompress.arrays.low_rank import LowRankArray
from lmcompress.arrays.masked import MaskedArray
from lmcompress.arrays.nested import NestedArray
from lmcompress.arrays.outliers import OutlierArray
from lmcompress.arrays.scored import ScoredArray
from lmcompress.arrays.shared import SharedRef, resolve
from lmcompress.arrays.split import SplitArray
from lmcompress.arrays.sum import SumArray
from lmcompress.arrays.tiled import TiledArray
from lmcompress.ops import backend
from lmcompress.types import CompressedArray, Params, WeightError

ACTIVATIONS = ("float32", "bfloat16", "int8", "int8_token")


def prepare(
  params: Params,
  *,
  activations: str = "float32",
  consume: bool = False,
  progress: Callable[[str, int, int], None] | None = None,
) -> Params:
  """Lays compressed and bfloat16 weights out for this machine's kernels.

  On a CPU with native kernels each becomes a `TiledArray`; elsewhere, and under `use_backend("reference")`, the tree
  stays as it is. Dense float32 weights stay too (XLA's own products are as fast). A compressed form without a
  fast path stays and says so once, by name.

  Args:
    params: a canonical tree.
    activations: what inputs are rounded to before a product. `float32` computes in float; `bfloat16` rounds inputs of
      many rows at once to bfloat16 (decoding stays in float32); `int8` rounds to 8 bits with a scale for every 32
      inputs of a token and multiplies integers, `int8_token` with one scale for a token, as `InputArray`s with
      `Int8PerGroup` and `Int8PerToken` ask for themselves. Forms other than integer codes take float32 there.
    consume: empties `params` as it goes, so that memory never holds two copies of more than one weight.
    progress: called with `("prepare", done, total)`.

  Returns:
    A tree of the same paths; it computes, and is not saved.

  Raises:
    ValueError: the word for activations is not known.
    WeightError: a scale is NaN or infinite; names the weight.
  """
  if activations not in ACTIVATIONS:
    raise ValueError(f"prepare(activations={activations!r}): one of {', '.join(ACTIVATIONS)}")
  if not backend.runs_native():
    return params
  leaves = {path: _codebooks(params, leaf) for path, leaf in tree.flatten(params).items()}
  if consume:
    params.clear()
  done: dict[str, Any] = {}
  total = len(leaves)
  for n, path in enumerate(list(leaves), 1):
    leaf = leaves.pop(path)
    if tree.is_weight(path):
      leaf = _prepared(path, leaf, tree.contraction_axis(path), activations)
    done[path] = leaf
    if progress is not None:
      progress("prepare", n, total)
  return tree.unflatten(done)


def _codebooks(params: Params, leaf: Any) -> Any:
  """A leaf whose tiles are to hold a codebook that lies elsewhere; a reference to a whole weight stays one."""
  if isinstance(leaf, ClusteredArray):
    return resolve(params, leaf)
  if isinstance(leaf, SumArray):
    return dataclasses.replace(leaf, base=_codebooks(params, leaf.base))
  return leaf


def _prepared(path: str, leaf: Any, axis: int, activations: str) -> Any:
  from lmcompress.ops.kernels.tiling import Unsupported, taken, tile

  if isinstance(leaf, TiledArray):
    return dataclasses.replace(leaf, activations=taken(leaf.form, activations))
  if isinstance(leaf, LearnedInputArray):
    return _prepared(path, leaf.fixed(), axis, activations)
  if isinstance(leaf, InputArray):
    fused = {Int8PerGroup: "int8", Int8PerToken: "int8_token"}.get(type(leaf.act), "float32")
    inner = _prepared(path, leaf.weight, axis, fused)
    if fused != "float32" and isinstance(inner, TiledArray) and inner.activations == fused:
      return inner
    return dataclasses.replace(leaf, weight=inner)
  if isinstance(leaf, LowRankArray):
    left, right = (_prepared(path, part, axis, activations) for part in (leaf.left, leaf.right))
    return dataclasses.replace(leaf, left=left, right=right)
  if isinstance(leaf, SplitArray):
    base = _prepared(path, leaf.base, axis, activations)
    return dataclasses.replace(leaf, base=base, outliers=_prepared(path, leaf.outliers, axis, "float32"))
  if isinstance(leaf, SumArray):
    base, delta = (_prepared(path, part, axis, activations) for part in (leaf.base, leaf.delta))
    return dataclasses.replace(leaf, base=base, delta=delta)
  if isinstance(leaf, DirectionArray):
    try:
      return _prepared(path, leaf.folded(), axis, activations)
    except ValueError as reason:
      backend.say_once(f"no fast CPU kernel for {leaf.kind} ({reason}); it runs on the slower reference")
      return leaf
  if isinstance(leaf, (OutlierArray, SharedRef)):
    return leaf  # its products gather what they need; what it refers to is prepared at its own place
  if isinstance(leaf, (FakeQuantArray, GatedArray, ScoredArray)):
    return leaf.materialize()  # as large, and not rounded anew at each product
  if isinstance(leaf, NestedArray):
    leaf = leaf.quantized()
  if not isinstance(leaf, CompressedArray) and str(leaf.dtype) != "bfloat16":
    return leaf
  try:
    return tile(leaf, axis, activations)
  except Unsupported as reason:
    if not isinstance(leaf, MaskedArray):
      backend.say_once(f"no fast CPU kernel for {leaf.kind} ({reason}); it runs on the slower reference")
    return leaf
  except ValueError as error:
    raise WeightError(f"prepare at {path}: {error}") from None
