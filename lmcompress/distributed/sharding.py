"""Sharding: a mesh by name, logical axes to mesh axes, and the specs of compressed leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lmcompress import tree
from lmcompress.types import CompressedArray, ConfigError, Params

RULES: dict[str, str | None] = {"vocab": "tensor", "mlp": "tensor", "kv": "tensor", "embed": None}
"""Which mesh axis each logical axis is split over; what is not named here is not split."""


def make_mesh(data: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
  """A mesh with axes `data` and `tensor`; one size may be -1, taken from the number of devices.

  Raises:
    ConfigError: the sizes do not multiply to at most the devices there are.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = [data, tensor]
  if any(n < 1 and n != -1 for n in sizes) or sizes.count(-1) > 1:
    raise ConfigError(f"mesh data={data}, tensor={tensor}: sizes are positive, and one at most is -1")
  if -1 in sizes:
    sizes[sizes.index(-1)] = len(devices) // math.prod(n for n in sizes if n != -1)
  if not 1 <= math.prod(sizes) <= len(devices):
    raise ConfigError(
      f"mesh data={data}, tensor={tensor} asks for {math.prod(sizes)} devices, {len(devices)} are there; "
      "on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N makes N of them"
    )
  return jax.make_mesh(
    tuple(sizes), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=devices[: math.prod(sizes)]
  )


def spec_of(path: str, axes: Mapping[str, tuple[Any, ...]], rules: Mapping[str, str | None] = RULES) -> PartitionSpec:
  """The dense spec of a parameter: its logical axes (a flattened one goes by its first name) through the rules."""
  names = tree.axes_of(axes, path)
  return PartitionSpec(*(rules.get(name[0] if isinstance(name, tuple) else name) for name in names))


def shardings(model: Any, params: Params, mesh: Mesh, rules: Mapping[str, str | None] = RULES) -> Params:
  """A tree like the parameters (compressed leaves opened) with a `NamedSharding` for each array.

  An axis of an array that the mesh does not divide stays whole on every device.
  """

  def of_leaf(path: str, leaf: Any) -> Any:
    spec = spec_of(path, model.axes, rules)
    specs = leaf.sharding_like(spec) if isinstance(leaf, CompressedArray) else spec
    fit = lambda s, x: NamedSharding(mesh, _fitting(s, x.shape, mesh))  # noqa: E731
    return jax.tree.map(fit, specs, leaf, is_leaf=lambda s: isinstance(s, PartitionSpec))

  return tree.map_leaves(of_leaf, params)


def _fitting(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  parts = (*spec, *([None] * (len(shape) - len(spec))))
  return PartitionSpec(
    *(
      name if name is not None and extent % mesh.shape[name] == 0 else None
      for name, extent in zip(parts, shape, strict=True)
    )
  )


def shard(model: Any, params: Params, mesh: Mesh, rules: Mapping[str, str | None] = RULES) -> Params:
  """The tree placed on the mesh."""
  return jax.device_put(params, shardings(model, params, mesh, rules))


def describe(model: Any, params: Params, mesh: Mesh) -> list[tuple[str, str, int]]:
  """Per leaf: path, how its largest array is split, and bytes per device."""
  rows = []
  for path, placed in tree.flatten(shardings(model, params, mesh)).items():
    leaves = jax.tree.leaves(tree.get(params, path))
    places = jax.tree.leaves(placed, is_leaf=lambda s: isinstance(s, NamedSharding))
    largest = max(zip(leaves, places, strict=True), key=lambda pair: pair[0].nbytes)
    nbytes = sum(math.prod(p.shard_shape(x.shape)) * x.dtype.itemsize for x, p in zip(leaves, places, strict=True))
    rows.append((path, str(tuple(largest[1].spec)), nbytes))
  return rows


def data_mesh(params: Params) -> Mesh | None:
  """The mesh that the parameters lie on, if it splits data."""
  sharding = getattr(next(iter(jax.tree.leaves(params)), None), "sharding", None)
  mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
  return mesh if isinstance(mesh, Mesh) and mesh.shape.get("data", 1) > 1 else None


def over_data(mesh: Mesh | None, batch: Any, rows: int, axis: int = 0) -> Any:
  """A batch, its arrays of so many rows (along `axis`) split over the axis `data` of a mesh that divides them."""
  if mesh is None or rows % mesh.shape["data"]:
    return batch
  split = NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
  fits = lambda x: x.ndim > axis and x.shape[axis] == rows  # noqa: E731
  return jax.tree.map(lambda x: jax.device_put(x, split) if fits(x) else x, batch)
