"""Rescaling input channels: inputs divided by a scale and weights multiplied by it, the function unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress import tree
from lmcompress.arrays import MaskedArray, fetch
from lmcompress.transforms.combine import require_dense
from lmcompress.transforms.structure import extents
from lmcompress.types import Block, Evidence, Params, Stage, State, Transform, WeightError

Scales = Callable[..., jax.Array]
"""`(weights: list of [in, out], share, **evidence) -> [in]`, what the input of a stage is divided by; `share` makes any
`[in]` equal where the source gives one value to several inputs."""


def rescale(name: str, find: Scales, needs: frozenset[str], norms_only: bool = False) -> Transform:
  """Divides the input of each stage by scales that `find` chooses, in whatever produces it.

  The structure says what feeds a stage: a norm, whose scale (and bias) is divided, or a linear, whose output is
  divided. Where queries share keys and values, inputs that one value reaches share a scale. A stage that nothing
  linear feeds stays as it is, and with `norms_only` one that a linear feeds does too. Dense weights only: what is
  quantized cannot be scaled exactly.

  Raises (when applied):
    WeightError: some but not all linears of a stage are selected, or the linear that feeds them is not, or nothing that
      feeds a selected stage can be divided.
  """

  def init(params: Params, selected: frozenset[str] | None = None) -> State:
    chosen = tree.default_selection(params) if selected is None else selected
    for path, leaf in tree.weights(params).items():
      if path in chosen:
        require_dense(name, path, fetch(leaf))
        if isinstance(leaf, MaskedArray):
          raise WeightError(f"{name} at {path}: the weight is masked; rescale first and prune afterwards")
    return ()

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    chosen = tree.default_selection(params) if evidence.selected is None else evidence.selected
    here, statistics = [path for path in tree.weights(params) if path in chosen], evidence.statistics or {}
    for path in here:
      if path not in statistics:
        raise WeightError(f"{name} at {path}: it rescales inputs of blocks' linears; select those, e.g. 'layers/*'")
    before = params
    for block in evidence.structure.blocks(params) if here else ():
      for stage in block.stages:
        params = _stage(params, block, stage, evidence, set(here))
    if here and params is before:
      fed = "norm" if norms_only else "norm or linear"
      raise WeightError(f"{name} at {here[0]}: no {fed} alone feeds what is selected, so nothing can take its scales")
    return params, state

  def _stage(params: Params, block: Block, stage: Stage, evidence: Evidence, here: set[str]) -> Params:
    paths = [f"{block.path}/{linear}/kernel" for linear in stage.readers]
    paths = [path for path in paths if tree.get(params, path) is not None]
    source = f"{block.path}/{stage.source}"
    linear = tree.get(params, f"{source}/kernel") is not None
    if not set(paths) & here or tree.get(params, source) is None or (linear and norms_only):
      return params
    if missing := set(paths) - here:
      raise WeightError(f"{name} at {paths[0]}: {sorted(missing)[0]} reads the same input and is not selected")
    if linear and f"{source}/kernel" not in here:
      raise WeightError(f"{name} at {paths[0]}: {source}/kernel, which feeds it, is not selected")
    weights = [tree.get(params, path) for path in paths]
    given = {need: (evidence.statistics or {})[paths[0]][need] for need in sorted(needs)}
    share, narrow = _sharing(params, evidence.structure, block.path, f"{source}/kernel", paths[0])
    scale = find(weights, share, **given)
    for path, w in zip(paths, weights, strict=True):
      params = tree.put(params, path, (w * scale[:, None]).astype(w.dtype))
    for part in ("scale", "bias", "kernel"):
      found = tree.get(params, f"{source}/{part}")
      if found is not None:
        params = tree.put(params, f"{source}/{part}", (found / narrow(scale)).astype(found.dtype))
    return params

  return Transform(init, apply, needs=needs, scope="block", name=name, inputs=True)


def _sharing(params: Params, structure: Any, block: str, source: str, consumer: str) -> tuple[Callable, Callable]:
  """`share: [in] -> [in]`, the mean of inputs that one output of the source reaches; `narrow: [in] -> [source]`."""
  if tree.get(params, source) is None:  # a norm feeds one input by each entry
    return (lambda s: s), (lambda s: s)
  names = {path: _axis(structure.axes, path, end) for path, end in ((source, -1), (consumer, -2))}
  given, read = names[source], names[consumer]
  if given == read:
    return (lambda s: s), (lambda s: s)
  sizes = extents(structure, params, block)
  if not set(given) < set(read) or any(n not in sizes for n in read):
    raise WeightError(f"{consumer}: its input {read} does not tell which outputs {given} of {source} it reads")
  shape, over = [sizes[n] for n in read], tuple(i for i, n in enumerate(read) if n not in given)
  mean = lambda s: jnp.mean(s.reshape(shape), axis=over, keepdims=True)  # noqa: E731
  return (lambda s: jnp.broadcast_to(mean(s), shape).reshape(-1)), (lambda s: mean(s).reshape(-1))


def _axis(axes: Mapping[str, tuple[Any, ...]], path: str, end: int) -> tuple[str, ...]:
  names = tree.axes_of(axes, path)
  if not names:
    raise WeightError(f"{path}: the model names no axes of it")
  return names[end] if isinstance(names[end], tuple) else (names[end],)
