"""Opaque calls on a mesh: each shard calls the kernel on its part, told how by which dimensions go together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

Cut = tuple[str, int] | None
"""Of a dimension: the factor that it follows, and into how many equal parts that may be split; None stays whole."""
Call = Callable[..., Sequence[jax.Array]]


def partitioned(
  call: Call,
  operands: Sequence[Sequence[Cut]],
  results: Sequence[Sequence[Cut]],
  sums: str = "",
  by_place: Call | None = None,
) -> Callable[..., tuple[jax.Array, ...]]:
  """`call` as a function that XLA splits over a mesh instead of gathering its operands.

  A factor is split where the mesh divides its parts. Where arrays disagree, on a factor or on what an axis of the
  mesh is for, the last operand decides: weights stand after activations, which are cheaper to move.

  Args:
    call: `(*arrays) -> arrays`, right for parts of the arrays as well.
    operands, results: a `Cut` for each dimension of each array.
    sums: the factor over which partial results are added: one all-reduce for each result.
    by_place: called instead of `call` on a shard, with the shard's index along `sums` before the arrays.

  Returns:
    A function of the arrays. With one device, `call` itself.
  """
  if jax.device_count() == 1:
    return lambda *arrays: tuple(call(*arrays))
  parts = dict(cut for cuts in (*operands, *results) for cut in cuts if cut is not None)

  def split(arrays: Any, outs: Any) -> dict[str, tuple[str, ...]]:
    """The mesh axes of each factor that is split."""
    asked: dict[str, tuple[int, tuple[str, ...], Any]] = {}
    for turn, (cuts, x) in enumerate(zip([*results, *operands], [*outs, *arrays], strict=True)):
      if not isinstance(x.sharding, NamedSharding):
        continue
      for cut, axes in zip(cuts, x.sharding.spec, strict=False):
        if cut is not None and axes:
          asked[cut[0]] = turn, axes if isinstance(axes, tuple) else (axes,), x.sharding.mesh
    chosen: dict[str, tuple[str, ...]] = {}
    for factor, (_, axes, mesh) in sorted(asked.items(), key=lambda item: -item[1][0]):
      free = not any(set(axes) & set(others) for others in chosen.values())
      if free and parts[factor] % math.prod(mesh.shape[a] for a in axes) == 0:
        chosen[factor] = axes
    return chosen

  def partition(mesh: Any, arrays: Any, outs: Any) -> Any:
    chosen = split(arrays, outs)

    def place(cuts: Sequence[Cut]) -> NamedSharding:
      return NamedSharding(mesh, PartitionSpec(*(None if cut is None else chosen.get(cut[0]) for cut in cuts)))

    def of_shard(*shard: jax.Array) -> tuple[jax.Array, ...]:
      if sums not in chosen:
        return tuple(call(*shard))
      at = chosen[sums]
      ys = call(*shard) if by_place is None else by_place(jax.lax.axis_index(at), *shard)
      return tuple(jax.lax.psum(y, at) for y in ys)

    return mesh, of_shard, tuple(map(place, results)), tuple(map(place, operands))

  def rule(_mesh: Any, operand_types: Any, result_types: Any) -> SdyShardingRule:
    return _sharding_rule(operands, results, [x.shape for x in (*operand_types, *result_types)], parts, sums)

  whole = custom_partitioning(lambda *arrays: tuple(call(*arrays)))
  whole.def_partition(partition, sharding_rule=rule)
  return whole


def _sharding_rule(
  operands: Sequence[Sequence[Cut]],
  results: Sequence[Sequence[Cut]],
  shapes: Sequence[Sequence[int]],
  parts: dict[str, int],
  sums: str,
) -> SdyShardingRule:
  """The same for XLA's propagation: a dimension is a factor, or a factor times a rest of its own."""
  sizes: dict[str, int] = {}
  whole: list[str] = []
  alone: set[str] = set()

  def mapping(n: int, cuts: Sequence[Cut]) -> ArrayMapping:
    dims: list[Any] = []
    for d, (cut, extent) in enumerate(zip(cuts, shapes[n], strict=True)):
      rest = f"x{n}_{d}"
      if cut is None:
        whole.append(rest)
        dims.append(rest)
      elif cut[1] == extent:
        alone.add(cut[0])
        dims.append(cut[0])
      else:
        sizes.update({cut[0]: cut[1], rest: extent // cut[1]})
        dims.append(CompoundFactor(cut[0], rest))
    return ArrayMapping(*dims)

  before = tuple(mapping(n, cuts) for n, cuts in enumerate(operands))
  after = tuple(mapping(len(operands) + n, cuts) for n, cuts in enumerate(results))
  return SdyShardingRule(
    before,
    after,
    reduction_factors=(sums,) if sums in parts else (),
    need_replication_factors=tuple(whole),
    **{name: size for name, size in sizes.items() if name not in alone},  # pyright: ignore[reportArgumentType]
  )
