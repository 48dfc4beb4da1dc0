"""Sharding: a mesh by name, logical axes to mesh axes, and the specs of compressed leaves."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lmcompress import tree
from lmcompress.arrays.stored import StoredArray, fetch
from lmcompress.types import CompressedArray, ConfigError, Params

AXES: tuple[str, ...] = ("data", "fsdp", "expert", "tensor")
"""What a mesh splits: the batch; the batch and weights, which are gathered where they are used; experts of mixtures;
products of weights."""

BATCH = ("data", "fsdp")
"""The axes that rows of a batch are split over."""

RULES: dict[str, str | None] = {
  "vocab": "tensor", "mlp": "tensor", "kv": "tensor", "embed": "fsdp", "expert": "expert", "length": None,
}  # fmt: skip
"""Which mesh axis each logical axis is split over; what is not named here is not split.

`length` is of activations: the tokens of what lies between products, over `tensor` or whole (`sequence_parallel`).
"""

sequence_parallel = jax.make_user_context(default_value=False)
"""Within `sequence_parallel(True)`, what lies between the products that `tensor` splits is split by tokens over it.

Norms and sums are then made in parts, and a device keeps its part of each block's input for the way back. The sum of
partial outputs becomes one whose parts stay where they are needed (reduce-scatter), and a gather stands before the next
product: as many bytes as one sum of all (Korthikanti et al. 2022, arXiv:2205.05198). Where `tensor` does not divide the
tokens, nothing changes; nor does it in `fit_local` and `fit_async`, whose copies lie on no mesh.
"""


def mesh_sizes(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
  """The size of each axis, one of which may be -1 and is then what is left of the devices.

  Raises:
    ConfigError: the sizes do not multiply to at most the devices there are.
  """
  said = ", ".join(f"{name}={n}" for name, n in sizes.items())
  if any(n < 1 and n != -1 for n in sizes.values()) or list(sizes.values()).count(-1) > 1:
    raise ConfigError(f"mesh {said}: sizes are positive, and one at most is -1")
  given = math.prod(n for n in sizes.values() if n != -1)
  found = {name: devices // given if n == -1 else n for name, n in sizes.items()}
  if not 1 <= math.prod(found.values()) <= devices:
    raise ConfigError(
      f"mesh {said} asks for {math.prod(found.values()) or given} devices, {devices} are there; "
      "on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N makes N of them"
    )
  return found


def make_mesh(data: int = 1, tensor: int = 1, fsdp: int = 1, expert: int = 1, devices: Any = None) -> Mesh:
  """A mesh with axes `data`, `fsdp`, `expert` and `tensor`; one size may be -1, taken from the number of devices.

  Raises:
    ConfigError: the sizes do not multiply to at most the devices there are.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = mesh_sizes({"data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor}, len(devices))
  shape = tuple(sizes[name] for name in AXES)
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[: math.prod(shape)])


def spec_of(path: str, axes: Mapping[str, tuple[Any, ...]], rules: Mapping[str, str | None] = RULES) -> PartitionSpec:
  """The dense spec of a parameter: its logical axes (a flattened one goes by its first name) through the rules.

  An axis of the mesh splits one axis of an array, the first that asks for it. A vector is not split over `fsdp`: to
  gather it costs more than it saves.
  """
  names = _names(path, axes)
  found: list[str | None] = []
  for name in names:
    to = rules.get(name)
    found.append(None if to in found or (to == "fsdp" and len(names) == 1) else to)
  return PartitionSpec(*found)


def _names(path: str, axes: Mapping[str, tuple[Any, ...]]) -> list[str]:
  """The logical axes of a parameter, a flattened one by its first name."""
  return [name[0] if isinstance(name, tuple) else name for name in tree.axes_of(axes, path)]


def _entries(model: Any, params: Params) -> dict[tuple[str, str], int]:
  """How many entries the first of each flattened axis has, such as key heads, by block and name, where it is known."""
  known, found = model.extents(params) if hasattr(model, "extents") else {}, {}
  for path, leaf in tree.weights(params).items():
    for name, extent in zip(tree.axes_of(model.axes, path), leaf.shape, strict=False):
      if isinstance(name, tuple) and set(name[1:]) <= set(known):
        found[_block_of(path), name[0]] = extent // math.prod(known[other] for other in name[1:])
  return found


def _shape(leaf: Any) -> tuple[int, ...]:
  return leaf.shape


def _block_of(path: str) -> str:
  """The path up to its last number."""
  parts = path.split("/")
  numbers = [i for i, part in enumerate(parts) if part.isdigit()]
  return "/".join(parts[: numbers[-1] + 1]) if numbers else ""


def dense_specs(
  model: Any, params: Params, sizes: Mapping[str, int], rules: Mapping[str, str | None] = RULES
) -> dict[str, PartitionSpec]:
  """By path, how a mesh of such sizes splits each leaf as the model sees it.

  An axis that the mesh does not divide stays whole, and so does one of heads where it does not divide their number.
  """
  counts = _entries(model, params)

  def of_leaf(path: str, leaf: Any) -> PartitionSpec:
    names, spec = _names(path, model.axes), spec_of(path, model.axes, rules)
    parts = zip(names, spec, _shape(leaf), strict=False)
    numbers = [(to, counts.get((_block_of(path), name), extent), sizes.get(to or "", 1)) for name, to, extent in parts]
    return PartitionSpec(*(to if n > 1 and count % n == 0 else None for to, count, n in numbers))

  return {path: of_leaf(path, leaf) for path, leaf in tree.flatten(params).items()}


def shardings(
  model: Any, params: Params, mesh: Mesh | AbstractMesh, rules: Mapping[str, str | None] = RULES
) -> Params:
  """A tree like the parameters (compressed leaves opened) with a `NamedSharding` for each array, as of `dense_specs`.

  An axis of an array of a compressed leaf that the mesh does not divide stays whole, too.
  """
  specs = dense_specs(model, params, mesh.shape, rules)

  def of_leaf(path: str, leaf: Any) -> Any:
    spec = leaf.sharding_like(specs[path]) if isinstance(leaf, CompressedArray) else specs[path]
    fit = lambda s, x: _place(mesh, s, x.shape)  # noqa: E731
    return jax.tree.map(fit, spec, leaf, is_leaf=lambda s: isinstance(s, PartitionSpec))

  return tree.map_leaves(of_leaf, params)


def _fitting(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
  parts = (*spec, *([None] * (len(shape) - len(spec))))
  return PartitionSpec(
    *(
      name if mesh.shape.get(name, 1) > 1 and extent % mesh.shape[name] == 0 else None
      for name, extent in zip(parts, shape, strict=True)
    )
  )


def _place(mesh: Mesh | AbstractMesh, spec: PartitionSpec, shape: tuple[int, ...]) -> NamedSharding:
  """The fitting spec without what it ends with in vain, as compiled programs give their outputs: they compile once."""
  parts = tuple(_fitting(spec, shape, mesh))
  while parts and parts[-1] is None:
    parts = parts[:-1]
  return NamedSharding(mesh, PartitionSpec(*parts))


def shard(model: Any, params: Params, mesh: Mesh, rules: Mapping[str, str | None] = RULES) -> Params:
  """The tree placed on the mesh, leaf by leaf: of a tree that lies in files, a process holds its part and one leaf.

  Where the mesh splits experts they are stacked on the way (`tree.stack_experts`).

  Raises:
    ConfigError: it splits experts, and the tree has none.
    WeightError: experts of a mixture are not alike, and cannot be stacked.
  """
  specs = dense_specs(model, as_on(params, mesh.shape), mesh.shape, rules)

  def put(spec: PartitionSpec, x: Any) -> jax.Array:
    return _put(x, _place(mesh, spec, x.shape))

  placed = {}
  for path, leaf in tree.flatten(params).items():
    if path not in specs:
      path, leaf = _stack_of(params, path)
    if path not in placed:
      leaf = fetch(leaf)
      spec = leaf.sharding_like(specs[path]) if isinstance(leaf, CompressedArray) else specs[path]
      whole = lambda s: isinstance(s, PartitionSpec)  # noqa: E731
      placed[path] = jax.block_until_ready(jax.tree.map(put, spec, leaf, is_leaf=whole))
  return tree.unflatten(placed)


def _put(x: Any, place: NamedSharding) -> jax.Array:
  if jax.process_count() == 1 or (isinstance(x, jax.Array) and not x.is_fully_addressable):
    return jax.device_put(x, place)
  mine = np.asarray(x)  # its part is copied, so that the rest can go
  return jax.make_array_from_callback(mine.shape, place, lambda index: np.array(mine[index]))


def beside(params: Params, arrays: Any) -> Any:
  """A tree of arrays, those that lie on no mesh copied to all devices of that which the parameters lie on.

  A program takes its own outputs from then on, which lie so, and is not compiled anew for them.
  """
  mesh = mesh_of(params)
  if mesh is None:
    return arrays
  whole = NamedSharding(mesh, PartitionSpec())
  away = lambda x: isinstance(x, jax.Array) and not isinstance(x.sharding, NamedSharding)  # noqa: E731
  return jax.tree.map(lambda x: _put(x, whole) if away(x) else x, arrays)


def as_on(params: Params, sizes: Mapping[str, int]) -> Params:
  """A tree (its leaves may be shapes) as a mesh of such sizes holds it: with experts in a stack where it splits them.

  Of leaves that are stacked the shapes are made, not the values.

  Raises:
    ConfigError: it splits experts, and the tree has none.
    WeightError: experts of a mixture are not alike.
  """
  if sizes.get("expert", 1) == 1 or tree.has_stacked_experts(params):
    return params
  leaves = tree.flatten(params)
  if not any(map(tree.in_mixture, leaves)):
    raise ConfigError(f"mesh expert={sizes['expert']} splits the experts of mixtures, and the model has none")
  shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)  # noqa: E731
  own = {
    path: shape(leaf) if isinstance(leaf, StoredArray) and leaf.dense else fetch(leaf)
    for path, leaf in leaves.items() if tree.in_mixture(path)
  }  # fmt: skip
  stacked = jax.eval_shape(tree.stack_experts, tree.unflatten(own))
  rest = {path: leaf for path, leaf in leaves.items() if not tree.in_mixture(path)}
  return tree.unflatten({**rest, **tree.flatten(stacked)})


def _stack_of(params: Params, path: str) -> tuple[str, Any]:
  """Of an expert's leaf, the path of the stack that it belongs to, and the stack when it is the first; else None."""
  before, _, after = path.partition(f"/{tree.EXPERTS}/")
  number, _, name = after.partition("/")
  experts = tree.get(params, f"{before}/{tree.EXPERTS}")
  stack = f"{before}/{tree.EXPERTS}/{name}"
  if number != min(experts, key=int):
    return stack, None
  leaves = [fetch(tree.get(experts[i], name)) for i in sorted(experts, key=int)]
  return stack, jax.tree.map(lambda *xs: jnp.stack(xs), *leaves)


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
  """A mesh of devices that need not be there."""
  return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


class Placement(NamedTuple):
  """Where the arrays of alike leaves lie.

  Attributes:
    path: with `*` for the numbers of layers.
    leaves: how many there are.
    shape: of one, as the model sees it.
    split: the mesh axis of each of its axes, before what a compressed form keeps whole.
    nbytes: of all of them on one device.
    whole: their bytes without a mesh.
  """

  path: str
  leaves: int
  shape: tuple[int, ...]
  split: tuple[str | None, ...]
  nbytes: int
  whole: int


def placements(
  model: Any, params: Params, sizes: Mapping[str, int], rules: Mapping[str, str | None] = RULES
) -> list[Placement]:
  """How a mesh of such sizes would hold a tree (of arrays or of their shapes), alike leaves in one row.

  Nothing is placed, and the devices need not be there.
  """
  mesh, params = abstract_mesh(sizes), as_on(params, sizes)
  found: dict[Any, Placement] = {}
  placed, specs = tree.flatten(shardings(model, params, mesh, rules)), dense_specs(model, params, sizes, rules)
  for path, leaf in tree.flatten(params).items():
    arrays = jax.tree.leaves(leaf)
    places = jax.tree.leaves(placed[path], is_leaf=lambda s: isinstance(s, NamedSharding))
    each = lambda x, shape: math.prod(shape) * np.dtype(x.dtype).itemsize  # noqa: E731
    nbytes = sum(each(x, p.shard_shape(x.shape)) for x, p in zip(arrays, places, strict=True))
    row = Placement(
      _numberless(path), 1, tuple(leaf.shape), tuple(_fitting(specs[path], leaf.shape, mesh)),
      nbytes, sum(each(x, x.shape) for x in arrays),
    )  # fmt: skip
    was = found.get(row[:1] + row[2:4])
    if was is not None:
      row = row._replace(leaves=was.leaves + 1, nbytes=was.nbytes + nbytes, whole=was.whole + row.whole)
    found[row[:1] + row[2:4]] = row
  return list(found.values())


def require_division(
  model: Any, params: Params, sizes: Mapping[str, int], rules: Mapping[str, str | None] = RULES
) -> None:
  """Refuses a mesh that does not divide what its rules split.

  Raises:
    ConfigError: names the weight, its axis, both numbers, and what would do; or a rule is of an axis that there is not.
  """
  axes = [axis for axes in model.axes.values() for axis in axes]
  known = {name for axis in axes for name in (axis if isinstance(axis, tuple) else (axis,))}
  if unknown := sorted(set(rules) - set(RULES) - known):
    raise ConfigError(f"mesh.rules.{unknown[0]}: no such axis; there are {', '.join(sorted(known | {'length'}))}")
  params = as_on(params, sizes)
  counts = _entries(model, params)
  for path, leaf in tree.weights(params).items():
    for name, to, extent in zip(_names(path, model.axes), spec_of(path, model.axes, rules), _shape(leaf), strict=False):
      n, extent = sizes.get(to or "", 1), counts.get((_block_of(path), name), extent)
      if extent % n:
        do = [str(k) for k in range(2, min(extent, 64) + 1) if extent % k == 0]
        keep = "" if to == "fsdp" else f", or keep it whole by mesh.rules.{name}=null"
        raise ConfigError(
          f"mesh {to}={n} does not divide the axis {name!r} of {_numberless(path)}, which has {extent} entries; "
          f"{to} may be {', '.join(do) or 1}{keep}"
        )


def _numberless(path: str) -> str:
  return "/".join("*" if part.isdigit() else part for part in path.split("/"))


def ways(mesh: Mesh | None) -> int:
  """Into how many parts a mesh splits the rows of a batch."""
  return 1 if mesh is None else math.prod(mesh.shape.get(name, 1) for name in BATCH)


def mesh_of(params: Params) -> Mesh | None:
  """The mesh that the parameters lie on, or those of them that lie on one."""
  shardings = (getattr(x, "sharding", None) for x in jax.tree.leaves(params))
  meshes = (s.mesh for s in shardings if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh))
  return next(meshes, None)


def stage_meshes(mesh: Mesh | None, stages: int) -> list[Mesh]:
  """A mesh of its own for each stage of a pipeline, of what `fsdp` splits; without a mesh, a device each.

  Raises:
    ValueError: fewer devices than stages, or an `fsdp` that they do not divide.
  """
  if mesh is None:
    if len(jax.devices()) < stages:
      raise ValueError(f"{stages} stages on {len(jax.devices())} devices: one each is needed")
    return [make_mesh(devices=[device]) for device in jax.devices()[:stages]]
  if mesh.shape["fsdp"] % stages:
    raise ValueError(
      f"{stages} stages of a mesh with fsdp={mesh.shape['fsdp']}: stages share the devices that split weights, and "
      "have to divide them"
    )
  parts = np.split(mesh.devices, stages, axis=AXES.index("fsdp"))
  return [Mesh(part, AXES, axis_types=(AxisType.Auto,) * len(AXES)) for part in parts]


def data_mesh(params: Params) -> Mesh | None:
  """The mesh that the parameters lie on, if it splits rows."""
  mesh = mesh_of(params)
  return mesh if ways(mesh) > 1 else None


def split_on(mesh: Mesh, x: jax.Array) -> NamedSharding:
  """An array's place on a mesh of the same axes, split as it is on its own; whole where it lies on one device."""
  spec = x.sharding.spec if isinstance(x.sharding, NamedSharding) else PartitionSpec()
  return _place(mesh, spec, x.shape)


def on_stage(mesh: Mesh, batch: Any, rows: int) -> Any:
  """Arrays placed on a mesh: those of so many rows split over the axes `BATCH` that divide them, others whole."""
  whole = NamedSharding(mesh, PartitionSpec())
  names = tuple(name for name in BATCH if mesh.shape.get(name, 1) > 1)
  split = NamedSharding(mesh, PartitionSpec(names)) if names and rows % ways(mesh) == 0 else whole
  return jax.tree.map(lambda x: jax.device_put(x, split if x.ndim and x.shape[0] == rows else whole), batch)


def over_data(mesh: Mesh | None, batch: Any, rows: int, axis: int = 0) -> Any:
  """A batch, its arrays of so many rows (along `axis`) split over the axes `BATCH` of a mesh that divides them."""
  split = rows_split(mesh, rows, axis)
  fits = lambda x: split is not None and x.ndim > axis and x.shape[axis] == rows  # noqa: E731
  return jax.tree.map(lambda x: jax.device_put(x, split) if fits(x) else x, batch)


def rows_split(mesh: Mesh | None, rows: int, axis: int = 0) -> NamedSharding | None:
  """Where arrays of so many rows (along `axis`) lie, split over the axes `BATCH` of a mesh that divides them."""
  if mesh is None or ways(mesh) == 1 or rows % ways(mesh):
    return None
  names = [name for name in BATCH if mesh.shape.get(name, 1) > 1]
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, tuple(names) if len(names) > 1 else names[0]))


@contextlib.contextmanager
def on_mesh_of(params: Params) -> Iterator[None]:
  """Work on the mesh that a tree lies on: models gather there what is split over `fsdp`, block by block, and send rows
  to the experts that are split over `expert`."""
  with on_mesh(mesh_of(params)):
    yield


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
  """Work on a mesh, as of `on_mesh_of`."""
  named = 1 if mesh is None else ways(mesh) * mesh.shape.get("expert", 1)
  if mesh is not None and sequence_parallel.value:
    named *= mesh.shape.get("tensor", 1)
  if mesh is None or named == 1:
    yield
  else:
    with jax.set_mesh(mesh):
      yield


def gathered(model: Any, params: Params, block: str | None = None) -> Params:
  """The tree, the leaves of a block (or all that are in none) gathered over `fsdp` in the form that they are stored in.

  Said inside of what is computed again on the way back, so that no more than one block is whole at a time; gradients
  go back split (Rajbhandari et al. 2020, ZeRO stage 3, arXiv:1910.02054). Where the mesh in use (`on_mesh_of`) has no
  such axis, and for a model that names no axes, nothing happens.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.shape.get("fsdp", 1) == 1 or not hasattr(model, "axes"):
    return params
  inside = (f"{block}/",) if block else tuple(f"{b.path}/" for b in model.blocks(params))

  def of_leaf(path: str, leaf: Any) -> Any:
    if path.startswith(inside) != (block is not None):
      return leaf
    spec = spec_of(path, model.axes)
    specs = leaf.sharding_like(spec) if isinstance(leaf, CompressedArray) else spec
    return jax.tree.map(_gather, specs, leaf, is_leaf=lambda s: isinstance(s, PartitionSpec))

  def _gather(spec: PartitionSpec, x: Any) -> Any:
    split = _fitting(spec, x.shape, mesh)
    if "fsdp" not in split:
      return x
    rest = PartitionSpec.UNCONSTRAINED  # as another axis may be by rules of its own
    whole, split = (PartitionSpec(*(to if n == "fsdp" else rest for n in split)) for to in (None, "fsdp"))
    put = jax.lax.with_sharding_constraint
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return put(x, whole)
    gather = jax.custom_vjp(lambda x: put(x, whole))
    gather.defvjp(lambda x: (put(x, whole), None), lambda _, g: (put(put(g, whole), split),))
    return gather(x)

  return tree.map_leaves(of_leaf, params)


def _over_tokens(x: jax.Array) -> tuple[PartitionSpec, PartitionSpec] | None:
  """The specs of `[batch, length, ...]` split by tokens and whole, where the mesh in use splits it so."""
  parts = jax.sharding.get_abstract_mesh().shape.get("tensor", 1) if sequence_parallel.value else 1
  if parts == 1 or x.ndim < 2 or x.shape[1] % parts:
    return None
  rows, rest = PartitionSpec.UNCONSTRAINED, [None] * (x.ndim - 2)
  return PartitionSpec(rows, "tensor", *rest), PartitionSpec(rows, None, *rest)


def split_tokens(x: jax.Array) -> jax.Array:
  """What a row-parallel product gives, `[batch, length, width]`, each device keeping its part of the tokens.

  Gradients are gathered on the way back.
  """
  return x if (specs := _over_tokens(x)) is None else _placed(x, *specs)


def whole_tokens(x: jax.Array, gradients: bool = False) -> jax.Array:
  """What a column-parallel product takes, `[batch, length, width]`, or ids, gathered.

  A device keeps its tokens' part of the sum of gradients, or where `gradients` are whole as well all of it.
  """
  if (specs := _over_tokens(x)) is None:
    return x
  return jax.lax.with_sharding_constraint(x, specs[1]) if gradients else _placed(x, *reversed(specs))


def _placed(x: jax.Array, here: PartitionSpec, back: PartitionSpec) -> jax.Array:
  put = jax.lax.with_sharding_constraint
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return put(x, here)
  place = jax.custom_vjp(lambda x: put(x, here))
  place.defvjp(lambda x: (put(x, here), None), lambda _, g: (put(g, back),))
  return place(x)
