"""Hugging Face folders: config.json, safetensors in one file or many, and the tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmcompress import tree
from lmcompress.arrays import InputArray, LearnedInputArray, resolve
from lmcompress.data.tokenizer import Tokenizer
from lmcompress.io import names, safetensors, task_heads
from lmcompress.types import CompressedArray, FormatError, Params


def read_json(path: Path, limit: int = 64 << 20) -> dict[str, Any]:
  """A JSON object within bounds.

  Raises:
    FormatError: missing, too large, or no JSON object.
  """
  if not path.is_file():
    raise FormatError(f"{path}: missing; a Hugging Face folder has config.json and *.safetensors")
  if path.stat().st_size > limit:
    raise FormatError(f"{path}: {path.stat().st_size} bytes are over the limit of {limit}")
  try:
    found = json.loads(path.read_text("utf-8"))
  except (ValueError, RecursionError) as error:
    raise FormatError(f"{path}: not valid JSON ({error})") from None
  if not isinstance(found, dict):
    raise FormatError(f"{path}: a JSON object is expected, found {type(found).__name__}")
  return found


def load_folder(folder: Path, lazy: bool = False) -> tuple[Any, Params, Tokenizer | None]:
  """Model, float32 parameters and tokenizer (None where the folder has none).

  Args:
    lazy: leaves are read when they are used (`StoredArray`), norms and biases at once.

  Raises:
    FormatError: names the file, and the tensor, that is wrong.
  """
  config, where = read_json(folder / "config.json"), folder / "config.json"
  known, word = names.foreign(), config.get("model_type")
  kind = known.get(word) if isinstance(word, str) else None
  if kind is None:
    raise FormatError(f"{where}: model_type {word!r} is not known here; known are {', '.join(known)}")
  if (told := folder / "generation_config.json").is_file():  # newer folders say there how to write
    said = {key: value for key, value in read_json(told).items() if key in kind.writing}
    config |= {key: value for key, value in said.items() if value is not None or kind.writing[key]}
  model = kind.read(config, where)
  files = _tensors(folder)
  depth = {start: names.integer(config, key, where) for start, key in kind.stacks.items()}
  head = kind.heads.get(task_heads.task_of(config) or "", ())
  mapping = names.plan((*kind.names(config), *head), "hf", files, depth, str(folder), kind.prefixes, kind.ignored)
  heads = [name for name in kind.names(config) if name.path == "head/table"]
  if heads and config.get("tie_word_embeddings", kind.tied):
    mapping.pop("head/table", None)
  elif heads and not kind.headless and "head/table" not in mapping:
    raise FormatError(f"{folder}: the tensor {heads[0].hf!r} is missing and config.json does not tie it")
  leaves = {}
  for path, (name, theirs) in mapping.items():
    entry = files[theirs].entries[theirs]
    if not np.issubdtype(entry.dtype, np.floating) and entry.dtype.name not in (
      "bfloat16",
      "float8_e4m3fn",
      "float8_e5m2",
    ):
      raise FormatError(f"{files[theirs].path}: tensor {theirs!r} is {entry.dtype}; floating weights are expected")
    read = functools.partial(files[theirs].read, theirs)
    stays = lazy and tree.is_weight(path)
    leaves[path] = names.lazily(name, read, entry.shape) if stays else name.read(read())
  params = tree.unflatten(leaves)
  names.check_shapes(model, params, str(folder))
  if head:
    task_heads.check_head(config, params, where)
  return model, params, Tokenizer.from_folder(folder) if (folder / "tokenizer.json").is_file() else None


def read_tasks(folder: Path) -> dict[str, dict[str, Any]]:
  """As `checkpoint.read_tasks`: the head that the folder's `config.json` names, called by its kind; none is empty.

  Raises:
    FormatError: the config is damaged.
  """
  config, where = read_json(folder / "config.json"), folder / "config.json"
  kind = names.foreign().get(str(config.get("model_type")))
  if kind is None or task_heads.task_of(config) not in kind.heads:
    return {}
  return task_heads.told(config, where, kind.read(config, where).config.max_length)


def save_folder(
  model: Any,
  params: Params,
  folder: Path,
  tokenizer: Tokenizer | None = None,
  tasks: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
  """Writes a model as other libraries read it: float32 safetensors, `config.json` and the tokenizer.

  Compressed weights are written dense, as what they stand for. Where layers were removed, the others close up.

  Args:
    tasks: kinds and classes of the tree's heads, as of `lmcompress.io.load.read_tasks`.

  Raises:
    FormatError: the architecture has no such form, its layers differ in width, an input is changed on its way into a
      weight, a head has no such form, or the folder has files already.
  """
  from safetensors.numpy import save_file

  folder = Path(folder)
  kind = next((kind for kind in names.foreign().values() if isinstance(model, kind.model)), None)
  if kind is None:
    raise FormatError(f"{type(model).__name__} has no form in Hugging Face folders")
  if folder.exists() and any(folder.iterdir()):
    raise FormatError(f"{folder}: has files already; name an empty or a new folder")
  if getattr(model.config, "full_layers", ()):  # they are named by numbers, which close up too
    order = sorted(params["layers"], key=int)
    full = tuple(new for new, old in enumerate(order) if int(old) in model.config.full_layers)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, full_layers=full))
  params = _closed_up(tree.unstack_experts(params), kind.stacks)
  config = kind.write(model, params)
  kind = names.foreign()[config["model_type"]]
  if params.get("tasks"):
    config, params = task_heads.with_head(config, params, tasks or {}, kind.heads, folder)
  places = (*kind.names(config), *kind.heads.get(task_heads.task_of(config) or "", ()))
  depth, dense = {start: config[key] for start, key in kind.stacks.items()}, tree.flatten(params)
  parts: dict[str, dict[int, tuple[names.Name, Any]]] = {}
  for name in places:
    for i in range(names.depth_of(name.path, depth)):
      leaf = dense.pop(name.path.format(i=i), None)
      if leaf is not None:
        theirs = ("" if name.outside else kind.prefixes[0]) + name.hf.format(i=i)
        parts.setdefault(theirs, {})[name.part[0]] = (name, leaf)
  if dense:
    raise FormatError(f"{min(dense)} has no place in the folder of a {config['model_type']}")
  tensors = {}
  for theirs, found in parts.items():
    arrays = [name.write(_dense(leaf)) for _, (name, leaf) in sorted(found.items())]
    axis = 0 if arrays[0].ndim == 1 else found[0][0].outputs
    tensors[theirs] = np.concatenate(arrays, axis=axis) if len(arrays) > 1 else arrays[0]
  folder.mkdir(parents=True, exist_ok=True)
  save_file(tensors, folder / "model.safetensors", {"format": "pt"})
  (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
  if tokenizer is not None:
    tokenizer.save(folder)


def _mixed(paths: Iterable[str]) -> bool:
  """Whether a layer with such leaves is a mixture of experts; layers with and without one are of two kinds."""
  return any(map(tree.in_mixture, paths))


def _closed_up(params: Params, stacks: Iterable[str]) -> Params:
  """The tree without references, its layers numbered from 0.

  Raises:
    FormatError: layers differ in width, or a weight's input is changed on its way.
  """
  flat = {path: resolve(params, leaf) for path, leaf in tree.flatten(params).items() if path.split("/")[0] != "shared"}
  for path, leaf in flat.items():
    if isinstance(leaf, (InputArray, LearnedInputArray)):
      raise FormatError(f"{path}: stored as {leaf.kind}, which changes its input; a dense weight cannot say that")
  params = tree.unflatten(flat)
  for start in stacks:
    layers = tree.get(params, f"{start}layers") or {}
    order = sorted(layers, key=int)
    shapes = [{path: leaf.shape for path, leaf in tree.flatten(layers[i]).items()} for i in order]
    for i, own in zip(order, shapes, strict=True):
      first = next(other for other in shapes if _mixed(other) == _mixed(own))
      for path in sorted(set(own) | set(first)):
        if own.get(path) != first.get(path):
          raise FormatError(
            f"{start}layers/{i}/{path} has shape {own.get(path)} and in the first layer {first.get(path)}; "
            "config.json has one width for all layers"
          )
    params = tree.put(params, f"{start}layers", {str(new): layers[old] for new, old in enumerate(order)})
  return params


def _dense(leaf: Any) -> np.ndarray:
  return np.asarray(leaf.materialize() if isinstance(leaf, CompressedArray) else leaf)


def _tensors(folder: Path) -> dict[str, safetensors.File]:
  """The file of each tensor; an index may only name files beside it."""
  index = folder / "model.safetensors.index.json"
  if not index.is_file():
    single = folder / "model.safetensors"
    if not single.is_file():
      raise FormatError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there")
    file = safetensors.open_file(single)
    return {name: file for name in file.entries}
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
    raise FormatError(f"{index}: weight_map is missing or not a map of tensor to file")
  files = {}
  for name in sorted(set(weight_map.values())):
    path = folder / name
    if Path(name).name != name or "\\" in name or "\0" in name or not path.is_file():
      raise FormatError(f"{index}: {name!r} is no file beside it")
    files[name] = safetensors.open_file(path)
  for tensor, name in weight_map.items():
    if tensor not in files[name].entries:
      raise FormatError(f"{index}: tensor {tensor!r} is not in {name}")
  return {tensor: files[name] for tensor, name in weight_map.items()}
