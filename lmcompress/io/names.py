"""Where each parameter lies in foreign checkpoints, and whether a tree's shapes fit one another."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.arrays import StoredArray
from lmcompress.types import FormatError, Params


@dataclasses.dataclass(frozen=True)
class Name:
  """One parameter: its path here, in Hugging Face folders and in GGUF; `{i}` stands for the layer.

  Attributes:
    optional: whether a checkpoint may lack it.
    part: `(i, shares)` where parameters share one foreign tensor: this is the i-th of parts of its outputs, which are
      to one another as the shares.
    turned: whether a foreign kernel is `[out, in]`, as a linear of torch; a Conv1D of GPT-2 is not.
    outside: whether it lies beside what a folder's prefix names, as a head does.
    offset: what is added when it is read: a scale that is kept as its distance from 1.
  """

  path: str
  hf: str
  gguf: str = ""
  optional: bool = False
  part: tuple[int, tuple[int, ...]] = (0, (1,))
  turned: bool = True
  outside: bool = False
  offset: float = 0.0

  def read(self, array: np.ndarray) -> jax.Array:
    """The parameter, float32, of a foreign tensor."""
    x = jax.device_put(np.ascontiguousarray(self._share(array), dtype=np.float32))
    x = _transpose(x) if self._turns else x
    return x + self.offset if self.offset else x

  def shape(self, foreign: Sequence[int]) -> tuple[int, ...]:
    """The parameter's shape, of the foreign tensor's."""
    axis = 0 if self._turns or len(foreign) == 1 else len(foreign) - 1
    i, shares = self.part
    own = [n * shares[i] // sum(shares) if at == axis else n for at, n in enumerate(foreign)]
    return tuple([*own[:-2], *own[:-3:-1]] if self._turns else own)

  def write(self, values: np.ndarray) -> np.ndarray:
    """The foreign tensor, or this part of it."""
    x = np.asarray(values, np.float32) - np.float32(self.offset)
    return np.ascontiguousarray(x.T if self._turns else x)

  @property
  def outputs(self) -> int:
    """The axis of the foreign tensor on which parts lie beside one another."""
    return 0 if self._turns or not self.path.endswith("kernel") else 1

  @property
  def _turns(self) -> bool:
    return self.turned and self.path.endswith("kernel")

  def _share(self, array: np.ndarray) -> np.ndarray:
    i, shares = self.part
    if len(shares) == 1:
      return array
    if array.ndim <= self.outputs or array.shape[self.outputs] % sum(shares):
      parts = f"{len(shares)} equal parts" if len(set(shares)) == 1 else f"parts as {' : '.join(map(str, shares))}"
      raise FormatError(f"{self.path}: a tensor of shape {list(array.shape)} does not fall into {parts}")
    ends = np.cumsum(shares)[:-1] * (array.shape[self.outputs] // sum(shares))
    return np.split(array, ends, axis=self.outputs)[i]


@jax.jit
def _transpose(x: jax.Array) -> jax.Array:
  return x.mT if x.ndim > 1 else x


def layer_names(*names: tuple[str, str, str], biases: bool = False) -> tuple[Name, ...]:
  """Names of linears from `(path, hf, gguf)` without their ends: a kernel, and a bias where a checkpoint has one."""
  return tuple(
    name
    for path, hf, gguf in names
    for name in (
      Name(f"{path}/kernel", f"{hf}.weight", f"{gguf}.weight"),
      Name(f"{path}/bias", f"{hf}.bias", f"{gguf}.bias", not biases),
    )
  )


def norm_names(path: str, hf: str, gguf: str = "") -> tuple[Name, Name]:
  """Names of a norm that subtracts a mean: its scale, and its bias."""
  return Name(f"{path}/scale", f"{hf}.weight", f"{gguf}.weight"), Name(f"{path}/bias", f"{hf}.bias", f"{gguf}.bias")


def plan(
  names: Iterable[Name], field: str, found: Iterable[str], layers: Mapping[str, int], where: str,
  prefixes: Sequence[str] = ("",), ignored: Sequence[str] = (),
) -> dict[str, tuple[Name, str]]:  # fmt: skip
  """`{path here: (its name, the tensor there)}` for the tensors `found` in a checkpoint.

  Args:
    layers: how many there are, by what the paths of a stack of layers begin with (`""` for one stack).
    prefixes: what may stand before the tensors' names; the first is what most checkpoints have.
    ignored: patterns of tensors that hold nothing the config does not say.

  Raises:
    FormatError: a tensor that the architecture needs is missing, or one is left over.
  """
  available, mapping = set(found), {}
  for name in names:
    for i in range(depth_of(name.path, layers)):
      bare = getattr(name, field).format(i=i)
      called = [bare] if name.outside else [prefix + bare for prefix in prefixes]
      there = next((theirs for theirs in called if theirs in available), None)
      if there is not None:
        mapping[name.path.format(i=i)] = (name, there)
      elif not name.optional:
        raise FormatError(
          f"{where}: the tensor {called[0]!r} is missing "
          f"({len(available)} tensors, {' and '.join(map(str, layers.values()))} layers expected)"
        )
  left = sorted(available - {tensor for _, tensor in mapping.values()})
  left = [t for t in left if not any(re.fullmatch(p, t) for p in ignored)]
  if left:
    raise FormatError(f"{where}: tensor {left[0]!r} ({len(left)} in all) has no place in this architecture")
  return mapping


def one_width(what: str, widths: Sequence[int]) -> int:
  """The width that all have.

  Raises:
    FormatError: they differ, as after pruning, and a `config.json` has one number for all.
  """
  if len(set(widths)) != 1:
    found = ", ".join(map(str, sorted(set(widths))))
    raise FormatError(f"{what} of {found} entries: config.json has one number for all; save with lmcompress.save")
  return widths[0]


def depth_of(path: str, layers: Mapping[str, int]) -> int:
  """How many parameters a path stands for: one, or one a layer of its stack."""
  if "{i}" not in path:
    return 1
  return next(n for start, n in layers.items() if path.startswith(start))


def lazily(name: Name, read: Callable[[], np.ndarray], shape: Sequence[int]) -> StoredArray:
  """The parameter of what `read` gives, each time that it is used; the foreign tensor has `shape`."""
  own = name.shape(shape)
  return StoredArray(lambda: name.read(read()), own, jnp.dtype("float32"), 32 * math.prod(own), "float32", True)


_WORDS = {("kernel", -2): "inputs", ("kernel", -1): "outputs", ("table", -2): "rows", ("table", -1): "features"}


def check_shapes(model: Any, params: Params, where: str) -> None:
  """Refuses a tree whose leaves do not fit one another, by the axes that the model publishes.

  An axis has one extent in all the model, or, where it occurs within blocks alone, in each block.

  Raises:
    FormatError: names the first parameter that does not fit.
  """
  leaves = {path: leaf for path, leaf in tree.flatten(params).items() if not path.startswith("shared/")}
  block_of = {
    path: block.path for block in model.blocks(params) for path in leaves if path.startswith(f"{block.path}/")
  }
  axes = {path: tree.axes_of(model.axes, path) for path in leaves}
  for path, leaf in leaves.items():
    if not axes[path] and not path.startswith("tasks/"):
      raise FormatError(f"{where}: {path} has no place in this architecture")
    if axes[path] and len(leaf.shape) != len(axes[path]):
      raise FormatError(f"{where}: {path} has shape {list(leaf.shape)}, {len(axes[path])} axes expected")
  everywhere = {n for path, parts in axes.items() if path not in block_of for part in parts for n in _flat(part)}
  fixed: Mapping[str, int] = getattr(model, "extents", lambda params: {})(params)
  known: dict[tuple[str, str], int] = {}

  def place(path: str, name: str) -> tuple[str, str]:
    return ("" if name in everywhere else block_of.get(path, ""), name)

  def check(path: str, dim: int, part: Any) -> bool:
    """Whether the dimension could be checked or has told the one extent that was not known."""
    size, names = leaves[path].shape[dim], _flat(part)
    word = _WORDS.get((path.rpartition("/")[2], dim - len(axes[path])), "entries")
    extents = [fixed.get(name, known.get(place(path, name))) for name in names]
    rest = math.prod(n for n in extents if n is not None)
    unknown = [name for name, n in zip(names, extents, strict=True) if n is None]
    if len(unknown) > 1:
      return False
    if not unknown and size != rest:
      raise FormatError(f"{where}: {path} has {size} {word}, {rest} expected")
    if unknown:
      if size == 0 or size % rest:
        what = f"the {names[-1]} size {rest}" if len(names) == 2 else f"the {rest} of {' and '.join(names[:-1])}"
        raise FormatError(f"{where}: {path} has {size} {word}, no multiple of {what}")
      known[place(path, unknown[0])] = size // rest
    return True

  open_ = [(path, dim, part) for path, parts in axes.items() for dim, part in enumerate(parts)]
  while open_:
    left = [item for item in open_ if not check(*item)]
    if len(left) == len(open_):
      break
    open_ = left
  table, most = leaves.get("positions/table"), getattr(getattr(model, "config", None), "max_length", 0)
  if table is not None and table.shape[0] < most:
    raise FormatError(f"{where}: positions/table has {table.shape[0]} rows, and the context is said to be {most}")
  _check_heads(model, leaves, known, where)


def _check_heads(model: Any, leaves: Mapping[str, Any], known: Mapping[tuple[str, str], int], where: str) -> None:
  """Refuses a head of a task that does not read what the model gives."""
  embed = known.get(("", "embed"))
  for path, leaf in leaves.items():
    if not path.startswith("tasks/"):
      continue
    head, _, end = path.rpartition("/")
    dense = leaves.get(f"{head}/dense/kernel")
    inputs = embed if dense is None else dense.shape[-1]
    if end == "kernel" and leaf.shape[-2] != inputs:
      raise FormatError(f"{where}: {path} has {leaf.shape[-2]} inputs, {inputs} expected")
    kernel = leaves.get(f"{head}/kernel")
    if end == "bias" and kernel is not None and leaf.shape[-1:] != kernel.shape[-1:]:
      raise FormatError(f"{where}: {path} has shape {list(leaf.shape)}, {kernel.shape[-1]} entries expected")


def _flat(part: Any) -> tuple[str, ...]:
  return part if isinstance(part, tuple) else (part,)


def integer(config: Mapping[str, Any], key: str, where: Any, default: int | None = None, least: int = 1) -> int:
  """An integer of a foreign config, positive or at least `least`.

  Raises:
    FormatError: it is none.
  """
  value = config.get(key, default)
  if type(value) is not int or not least <= value < 2**31:
    wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
    raise FormatError(f"{where}: {key} is {value!r}; {wanted} is needed")
  return value


def number(config: Mapping[str, Any], key: str, default: float, where: Any) -> float:
  """A positive number of a foreign config.

  Raises:
    FormatError: it is none.
  """
  value = config.get(key, default)
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
    raise FormatError(f"{where}: {key} is {value!r}; a positive number is needed")
  try:
    return float(value)
  except OverflowError:
    raise FormatError(f"{where}: {key} is over the range of floats") from None


def choice(config: Mapping[str, Any], key: str, default: str, known: Mapping[str, str], where: Any) -> str:
  """What a word of a foreign config is called here.

  Raises:
    FormatError: the word is not known here.
  """
  value = config.get(key, default)
  if not isinstance(value, str) or value not in known:
    raise FormatError(f"{where}: {key} {value!r} is not known here; known are {', '.join(map(repr, known))}")
  return known[value]


def divided(config: Mapping[str, Any], whole: str, by: str, where: Any) -> int:
  """`config[whole] / config[by]`, a whole number.

  Raises:
    FormatError: it is none.
  """
  n, parts = integer(config, whole, where), integer(config, by, where)
  if n % parts:
    raise FormatError(f"{where}: {whole} is {n}, no multiple of {by}, which is {parts}")
  return n // parts


@dataclasses.dataclass(frozen=True)
class Foreign:
  """How Hugging Face folders keep an architecture.

  Attributes:
    model: the class of the model.
    model_types: the words in `config.json`, the first the one that is written.
    names: of a config, where the parameters lie.
    read: `(config, where) -> model`.
    write: `(model, params) -> config`, of which `model_type` and `architectures` say what it is.
    depth: the key of the number of layers, or one for each stack of layers by what its paths begin with.
    prefixes, ignored: as of `plan`.
    tied: whether the head is the embedding where the config does not say.
    headless: whether a checkpoint may have no head at all.
    writing: keys that `generation_config.json` says, too, and then decides, and whether they may be null there.
    heads: where the head of a task lies, by what the task tells (`training.heads.Kind`).
  """

  model: type
  model_types: tuple[str, ...]
  names: Callable[[Mapping[str, Any]], tuple[Name, ...]]
  read: Callable[[Mapping[str, Any], Any], Any]
  write: Callable[[Any, Params], dict[str, Any]]
  depth: str | Mapping[str, str] = "num_hidden_layers"
  prefixes: tuple[str, ...] = ("",)
  ignored: tuple[str, ...] = ()
  tied: bool = False
  headless: bool = False
  writing: Mapping[str, bool] = dataclasses.field(default_factory=dict)
  heads: Mapping[str, tuple[Name, ...]] = dataclasses.field(default_factory=dict)

  @property
  def stacks(self) -> Mapping[str, str]:
    """The key of the number of layers, by what the paths of a stack begin with."""
    return {"": self.depth} if isinstance(self.depth, str) else self.depth


@functools.cache
def foreign() -> dict[str, Foreign]:
  """By the word in `config.json`, how an architecture is kept."""
  from lmcompress.io import architectures

  return {word: kind for kind in architectures.ALL for word in kind.model_types}
