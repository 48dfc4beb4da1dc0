"""Paths, patterns and maps over a parameter tree whose leaves may be compressed arrays."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.types import CompressedArray, Params, WeightError

CONTRACTION_AXIS = {"kernel": -2, "table": -1}
"""The axis that a product sums over, by the leaf's name: kernels are `[in, out]`, tables `[vocab, features]`."""


def is_leaf(x: Any) -> bool:
  """True for a leaf of the parameter tree: an array, a compressed array, or a hole left by a partition."""
  return not isinstance(x, Mapping)


def natural(path: str) -> tuple:
  """Sort key under which `layers/10` follows `layers/9`."""
  return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.split("/"))


def flatten(params: Params) -> dict[str, Any]:
  """All leaves by path, in natural order."""
  leaves: dict[str, Any] = {}

  def walk(prefix: str, node: Any) -> None:
    if is_leaf(node):
      leaves[prefix] = node
      return
    for name in node:
      walk(f"{prefix}/{name}" if prefix else str(name), node[name])

  walk("", params)
  return dict(sorted(leaves.items(), key=lambda item: natural(item[0])))


def unflatten(leaves: Mapping[str, Any]) -> Params:
  """The nested tree of `{path: leaf}`."""
  params: Params = {}
  for path, leaf in leaves.items():
    *parents, name = path.split("/")
    node = params
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return params


def get(params: Params, path: str) -> Any:
  """The subtree or leaf at `path`; None where there is none."""
  node: Any = params
  for part in path.split("/"):
    if is_leaf(node) or part not in node:
      return None
    node = node[part]
  return node


def put(params: Params, path: str, value: Any) -> Params:
  """A tree like `params` with `value` at `path`; shares everything else."""
  head, _, rest = path.partition("/")
  return {**params, head: put(params.get(head, {}), rest, value) if rest else value}


def map_leaves(fn: Callable[[str, Any], Any], params: Params) -> Params:
  """`fn(path, leaf)` over every leaf, norms and biases included."""
  return unflatten({path: fn(path, leaf) for path, leaf in flatten(params).items()})


def is_weight(path: str) -> bool:
  """True for what compression acts on: kernels and tables, never norms and biases."""
  return path.rpartition("/")[2] in CONTRACTION_AXIS


def weights(params: Params) -> dict[str, Any]:
  """The weights by path, in natural order."""
  return {path: leaf for path, leaf in flatten(params).items() if is_weight(path)}


def map_weights(fn: Callable[[str, Any], Any], params: Params, selected: Iterable[str] | None = None) -> Params:
  """`fn(path, weight)` over the weights (all, or those `selected`); other leaves stay as they are."""
  chosen = None if selected is None else frozenset(selected)

  def visit(path: str, leaf: Any) -> Any:
    if is_weight(path) and (chosen is None or path in chosen):
      return fn(path, leaf)
    return leaf

  return map_leaves(visit, params)


def contraction_axis(path: str) -> int:
  """-2 for a kernel, -1 for a table."""
  return CONTRACTION_AXIS[path.rpartition("/")[2]]


def _regex(pattern: str) -> re.Pattern[str]:
  out = ""
  for part in re.split(r"(\*\*/?|\*)", pattern):
    out += {"**": ".*", "**/": "(?:.*/)?", "*": "[^/]*"}.get(part, re.escape(part))
  return re.compile(rf"{out}(?:/.*)?\Z")


def matches(pattern: str, path: str) -> bool:
  """Whether `pattern` names `path` or an ancestor of it: `*` stays within a segment, `**` crosses them.

  >>> matches("layers/*/mlp", "layers/3/mlp/up/kernel"), matches("layers/*", "embed/table")
  (True, False)
  """
  return _regex(pattern).match(path) is not None


def selects(pattern: str, path: str) -> bool:
  """Whether `pattern` selects the weight at `path`: it matches, and names a table if the weight is one."""
  pattern = pattern.strip("/")
  parent, _, name = path.rpartition("/")
  named = name != "table" or {name, parent.rpartition("/")[2]} & set(pattern.split("/"))
  return bool(named) and matches(pattern, path)


def select(params: Params, pattern: str) -> frozenset[str]:
  """Paths of the weights that `pattern` selects; tables (embedding, head) only where it names them.

  Raises:
    WeightError: nothing matches; the message shows the nearest paths.
  """
  paths = list(weights(params))
  found = frozenset(path for path in paths if selects(pattern, path))
  if not found:
    near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
    raise WeightError(
      f"pattern {pattern!r} selects no weight among {len(paths)}; nearest paths: {', '.join(near) or 'none'}"
    )
  return found


def default_selection(params: Params) -> frozenset[str]:
  """Every kernel; embedding and head only when named."""
  return frozenset(path for path in weights(params) if path.endswith("kernel"))


def axes_of(axes: Mapping[str, tuple[Any, ...]], path: str) -> tuple[Any, ...]:
  """The logical axes of the leaf at `path`, by the first pattern that matches it; empty where none does."""
  path = path.removeprefix("shared/")  # a value that several leaves refer to lies at the first one's path
  return next((names for pattern, names in axes.items() if matches(pattern, path)), ())


def partition(params: Params, trainable: Callable[[str], bool] = lambda path: True) -> tuple[Params, Params]:
  """Splits into a tree of trainable arrays and one of the rest, each with None where the other has a value.

  Gradients reach floats of 16 bits or more, and within a compressed leaf those in fields that it, and each part of it
  on the way, declares trainable; integers never (their float0 gradients break optimizers).

  Args:
    trainable: of an array's path, which within a compressed leaf goes on with its fields: `up/kernel`, or
      `up/kernel/delta/left`.
  """

  def split(path: str, leaf: Any) -> tuple[Any, Any]:
    children, treedef = jax.tree.flatten_with_path(leaf)
    flags = [_trains(leaf, where, x) and trainable("/".join([path, *(k.name for k in where)])) for where, x in children]
    return (
      treedef.unflatten([x if flag else None for flag, (_, x) in zip(flags, children, strict=True)]),
      treedef.unflatten([None if flag else x for flag, (_, x) in zip(flags, children, strict=True)]),
    )

  pairs = {path: split(path, leaf) for path, leaf in flatten(params).items()}
  return unflatten({k: v[0] for k, v in pairs.items()}), unflatten({k: v[1] for k, v in pairs.items()})


def _trains(leaf: Any, where: tuple[Any, ...], x: Any) -> bool:
  """Whether gradients may reach the array `x` at `where` within a leaf."""
  for key in where:
    if isinstance(leaf, CompressedArray) and key.name not in leaf.trainable_fields():
      return False
    leaf = getattr(leaf, key.name)
  return bool(jnp.issubdtype(x.dtype, jnp.floating)) and jnp.finfo(x.dtype).bits >= 16


def combine(left: Params, right: Params) -> Params:
  """Undoes `partition`: takes each value from the tree that has it."""
  return jax.tree.map(lambda a, b: b if a is None else a, left, right, is_leaf=lambda x: x is None)


def stack_layers(params: Params) -> Params:
  """Turns `layers/0..n-1` into one subtree with a leading layer axis, for scanned training.

  Raises:
    WeightError: two layers differ in structure or shape.
  """
  layers = [params["layers"][name] for name in sorted(params["layers"], key=int)]

  for i, layer in enumerate(layers):
    if _form(layer) != _form(layers[0]):
      raise WeightError(f"layers/{i} differs from layers/0 in form, shape or dtype; only alike layers can be stacked")
  return {**params, "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}


def unstack_layers(params: Params) -> Params:
  """Undoes `stack_layers`."""
  depth = jax.tree.leaves(params["layers"])[0].shape[0]
  return {**params, "layers": {str(i): jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(depth)}}


EXPERTS = "experts"
"""The subtree of the experts of a mixture: one for each by its number, or one whose leaves have an axis of experts."""


def in_mixture(path: str) -> bool:
  """Whether a leaf is an expert's, or of a stack of experts.

  >>> in_mixture("layers/0/mlp/experts/3/up/kernel"), in_mixture("tasks/experts/kernel")
  (True, False)
  """
  return "/" in path.partition(f"/{EXPERTS}/")[2]


def is_stacked(experts: Mapping[str, Any]) -> bool:
  """Whether the leaves of a mixture's experts have an axis of experts; else each expert has a subtree of its number."""
  return not any(name.isdigit() for name in experts)


def stack_experts(params: Params) -> Params:
  """Gives the experts of each mixture one subtree with a leading axis, to be split over the axis `expert` of a mesh.

  Raises:
    WeightError: two experts of a mixture differ in structure or shape, or refer to values that lie elsewhere; says
      which.
  """
  from lmcompress.arrays.shared import SharedRef

  def stacked(path: str, experts: Params) -> Params:
    names = sorted(experts, key=int)
    for below, leaf in flatten(experts).items():
      parts = jax.tree.leaves(leaf, is_leaf=lambda x: isinstance(x, SharedRef))
      if any(isinstance(part, SharedRef) for part in parts):
        raise WeightError(f"{path}/{below} refers to values that the whole model shares, which a stack cannot; cluster "
                          "each weight by itself (kmeans), or leave experts apart")  # fmt: skip
    forms = [_form(experts[name]) for name in names]
    for name, form in zip(names, forms, strict=True):
      if form != forms[0]:
        raise WeightError(f"{path}/{name} differs from {path}/{names[0]} in form, shape or dtype; only alike stack")
    return jax.tree.map(lambda *xs: jnp.stack(xs), *(experts[name] for name in names))

  return _over_experts(params, stacked, bool(first := _first_mixture(params)) and not is_stacked(first))


def unstack_experts(params: Params) -> Params:
  """Undoes `stack_experts`; experts that stand apart already stay so."""

  def apart(path: str, experts: Params) -> Params:
    count = jax.tree.leaves(experts)[0].shape[0]
    return {str(i): jax.tree.map(lambda x, i=i: x[i], experts) for i in range(count)}

  return _over_experts(params, apart, has_stacked_experts(params))


def has_stacked_experts(params: Params) -> bool:
  """Whether there are mixtures whose experts are stacked."""
  return bool(first := _first_mixture(params)) and is_stacked(first)


def _over_experts(params: Params, fn: Callable[[str, Params], Params], due: bool) -> Params:
  def walk(path: str, node: Any) -> Any:
    if is_leaf(node):
      return node
    visit = lambda name, child: fn if _is_mixture(name, child) else walk  # noqa: E731
    return {name: visit(name, child)(f"{path}/{name}".lstrip("/"), child) for name, child in node.items()}

  return walk("", params) if due else params


def _first_mixture(node: Any) -> Params:
  """The experts of the first mixture of a tree; empty where it has none."""
  if is_leaf(node):
    return {}
  if EXPERTS in node and _is_mixture(EXPERTS, node[EXPERTS]):
    return node[EXPERTS]
  return next((found for child in node.values() if (found := _first_mixture(child))), {})


def _is_mixture(name: str, node: Any) -> bool:
  """Subtrees are what a mixture has; a head of a task that is called so has leaves."""
  return name == EXPERTS and not is_leaf(node) and not any(is_leaf(child) for child in node.values())


def _form(subtree: Any) -> Any:
  return jax.tree.structure(subtree), [(x.shape, x.dtype) for x in jax.tree.leaves(subtree)]


def leaf_nbits(leaf: Any) -> int:
  """Bits that a leaf takes in its stored form."""
  return leaf.nbits if isinstance(leaf, CompressedArray) else leaf.size * np.dtype(leaf.dtype).itemsize * 8
