"""Checkpoints: a manifest that says what each leaf is, and aligned safetensors that are mapped, not read."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import lmcompress
from lmcompress import tree
from lmcompress.arrays import resolve
from lmcompress.data.tokenizer import TARGET, Tokenizer
from lmcompress.io import names, safetensors
from lmcompress.io.leaves import check_references, check_settings, describe, fits, rebuild
from lmcompress.models import ARCHITECTURES, Rope
from lmcompress.types import CompressedArray, FormatError, Params

MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
FORMAT = 1

_MAX_MANIFEST = 64 << 20
_OURS = {MANIFEST, WEIGHTS, "tokenizer.json", "tokenizer_config.json", TARGET}


def tree_hash(params: Params) -> str:
  """sha256 over paths, forms and bytes of a tree: equal hashes mean equal trees, to the bit."""
  leaves, arrays = describe(params)
  digest = hashlib.sha256(_canonical(leaves))
  for name in sorted(arrays):
    digest.update(safetensors.raw(arrays[name]))
  return digest.hexdigest()


def weights_size(params: Params) -> int:
  """Bytes of the weights file that `save` would write, header and padding counted."""
  return safetensors.layout(describe(params)[1])[1]


# ---------------------------------------------------------------------------------------- saving


def save(
  folder: str | os.PathLike,
  model: Any,
  params: Params,
  tokenizer: Tokenizer | None = None,
  *,
  recipe: Any = None,
  tasks: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
  """Writes model, tree and tokenizer to a folder that `load` reads back, bitwise (experts apart, if they were stacked).

  The folder appears whole or not at all; a checkpoint already there is replaced.

  Args:
    recipe: what made the tree, kept in the manifest.
    tasks: of each head of the tree by its name, `classes` in their order and the `length` of the rows it learned from.

  Raises:
    FileExistsError: the folder holds something that is not a checkpoint.
  """
  folder = Path(folder)
  if folder.exists() and (foreign := {p.name for p in folder.iterdir()} - _OURS):
    raise FileExistsError(
      f"{folder} holds {sorted(foreign)[0]!r}, which is no part of a checkpoint; choose another folder"
    )
  folder.parent.mkdir(parents=True, exist_ok=True)
  partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir()
  params = tree.unstack_experts(params)
  try:
    leaves, arrays = describe(params)
    digests = safetensors.write(partial / WEIGHTS, arrays)
    if tokenizer is not None:
      tokenizer.save(partial)
    files = {
      p.name: _file_digest(digests) if p.name == WEIGHTS else hashlib.sha256(p.read_bytes()).hexdigest()
      for p in sorted(partial.iterdir())
    }
    body = {
      "format": FORMAT,
      "versions": {"lmcompress": lmcompress.__version__, "jax": jax.__version__},
      "model": {"architecture": model.architecture, "config": dataclasses.asdict(model.config)},
      "recipe": recipe,
      "tasks": {name: {**task, "classes": list(task["classes"])} for name, task in (tasks or {}).items()},
      "leaves": leaves,
      "shapes": {path: list(leaf.shape) for path, leaf in tree.flatten(params).items()},
      "header": digests.pop(""),
      "arrays": digests,
      "files": files,
    }
    text = _canonical(body)
    (partial / MANIFEST).write_bytes(_canonical({"body": body, "digest": hashlib.sha256(text).hexdigest()}) + b"\n")
    _swap(partial, folder)
  except OSError as error:
    shutil.rmtree(partial, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    raise OSError(
      error.errno, f"saving {folder} failed: {error.strerror}; {free} bytes are free there", str(folder)
    ) from error
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  return folder


def _swap(partial: Path, folder: Path) -> None:
  if not folder.exists():
    os.rename(partial, folder)
    return
  old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
  os.rename(folder, old)
  try:
    os.rename(partial, folder)
  except BaseException:
    os.rename(old, folder)
    raise
  shutil.rmtree(old, ignore_errors=True)


def _canonical(value: Any) -> bytes:
  return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _file_digest(digests: Mapping[str, str]) -> str:
  """The weights file's digest, of its parts' digests: the header's and each array's, in order."""
  return hashlib.sha256("".join(digests[name] for name in sorted(digests)).encode()).hexdigest()


# ---------------------------------------------------------------------------------------- loading


def read_manifest(folder: Path) -> dict[str, Any]:
  """The manifest's body, checked against its own digest.

  Raises:
    FormatError: damaged, or of another format.
  """
  path = folder / MANIFEST
  if not path.is_file():
    raise FormatError(f"{path}: missing; {folder} is no lmcompress checkpoint")
  if path.stat().st_size > _MAX_MANIFEST:
    raise FormatError(f"{path}: over {_MAX_MANIFEST} bytes")
  raw = path.read_bytes()
  try:
    whole = json.loads(raw)
    body, digest = whole["body"], whole["digest"]
    intact = raw == _canonical(whole) + b"\n" and hashlib.sha256(_canonical(body)).hexdigest() == digest
  except (ValueError, KeyError, TypeError, RecursionError):
    intact = False
  if not intact:
    raise FormatError(f"{path}: damaged (its digest does not fit); restore the file or save the model again")
  if not isinstance(body, dict) or type(body.get("format")) is not int:
    raise FormatError(f"{path}: holds no manifest; save the model again")
  if body.get("format") != FORMAT:
    raise FormatError(f"{path}: format {body.get('format')!r}, this version reads {FORMAT}; use a matching lmcompress")
  return body


def load_checkpoint(
  folder: str | os.PathLike, mesh: Any = None, rules: Mapping[str, str | None] | None = None
) -> tuple[Any, Params, Tokenizer | None]:
  """Model, tree and tokenizer of a saved folder; arrays are placed from a memory map, nothing goes dense.

  Every file and every array is checked against the manifest's digests first.

  Args:
    mesh: places each leaf sharded, reading only what each device needs.
    rules: as of `load`.

  Raises:
    FormatError: names the file, and the array, that is damaged.
  """
  folder = Path(folder)
  body = read_manifest(folder)
  try:
    return _load(folder, body, mesh, rules)
  except FormatError:
    raise
  except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
    what = " ".join(str(error).split())[:200]
    raise FormatError(
      f"{folder / MANIFEST}: does not describe a checkpoint ({type(error).__name__}: {what})"
    ) from error


def read_tasks(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
  """The `tasks` that `save` was given.

  Raises:
    FormatError: the manifest is damaged.
  """
  found = read_manifest(Path(folder)).get("tasks", {})
  fits = isinstance(found, dict) and all(
    isinstance(task, dict)
    and isinstance(task.get("length"), int)
    and isinstance(task.get("classes"), list)
    and all(isinstance(word, str) for word in task["classes"])
    for task in found.values()
  )
  if not fits:
    raise FormatError(f"{Path(folder) / MANIFEST}: its tasks have no classes and lengths")
  return found


def _load(folder: Path, body: Mapping[str, Any], mesh: Any, rules: Any) -> tuple[Any, Params, Tokenizer | None]:
  if WEIGHTS not in body["files"]:
    raise FormatError(f"{folder / MANIFEST}: names no {WEIGHTS}")
  extra = {p.name for p in folder.iterdir() if p.is_file()} - {MANIFEST, *body["files"]}
  if extra:
    raise FormatError(f"{folder / sorted(extra)[0]}: not part of this checkpoint; remove it")
  for name, digest in body["files"].items():
    path = folder / name
    if Path(name).name != name or not path.is_file():
      raise FormatError(f"{folder}: the file {name!r} is missing")
    if name != WEIGHTS and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
      raise FormatError(f"{path}: damaged (its digest does not fit); restore the file or save the model again")
  file = _verified(folder / WEIGHTS, body)
  model = _model(body["model"], folder / MANIFEST)

  def read(name: str) -> Any:
    if not isinstance(name, str) or name not in body["arrays"]:
      raise FormatError(f"{folder / MANIFEST}: array {name!r} is not in {WEIGHTS}")
    return file.read(name)

  if set(body["leaves"]) != set(body["shapes"]):
    raise FormatError(f"{folder / MANIFEST}: leaves and shapes name different paths")

  leaves: Params = {}
  fitting: set[Any] = set()
  whole = {path: rebuild(d, read, path, folder / MANIFEST) for path, d in body["leaves"].items()}
  values = tree.unflatten(whole)
  for path, leaf in whole.items():
    if isinstance(leaf, CompressedArray):
      check_settings(leaf, path, folder / MANIFEST)
      check_references(leaf, values, path, folder / MANIFEST)
      real = resolve(values, leaf)
      form = (jax.tree.structure(real), tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(real)))
      if form not in fitting and isinstance(real, CompressedArray) and not fits(real):
        raise FormatError(f"{folder / MANIFEST}: the parts of {path} do not fit one another")
      fitting.add(form)
    if list(leaf.shape) != body["shapes"].get(path):
      raise FormatError(
        f"{folder / MANIFEST}: {path} has shape {list(leaf.shape)}, recorded is {body['shapes'].get(path)}"
      )
    leaves[path] = leaf
  params = tree.unflatten(leaves)
  names.check_shapes(model, params, str(folder / MANIFEST))
  if mesh is None:
    params = jax.device_put(params)
  else:
    from lmcompress.distributed import RULES, shard

    params = shard(model, params, mesh, RULES if rules is None else rules)
  tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").is_file() else None
  return model, params, tokenizer


def _verified(path: Path, body: Mapping[str, Any]) -> safetensors.File:
  """The weights file after every digest has been checked; padding must be zeros."""
  size = path.stat().st_size
  if size >= 8:
    with path.open("rb") as f:
      length = int.from_bytes(f.read(8), "little")
    if length <= size - 8:
      with path.open("rb") as f:
        header = hashlib.sha256(f.read(8 + length)).hexdigest()
      if header != body["header"]:
        raise FormatError(f"{path}: the header is damaged (its digest does not fit)")
  file = safetensors.open_file(path)
  end = max((e.end for e in file.entries.values()), default=file.header_end)
  if end != size:
    raise FormatError(f"{path}: {size} bytes, {end} expected; the file is cut or something was appended")
  for name in file.entries:
    if name.startswith(safetensors.PAD):
      if any(map(any, file.chunks(name))):
        raise FormatError(f"{path}: the padding {name!r} is damaged")
      continue
    digest = hashlib.sha256()
    for chunk in file.chunks(name):
      digest.update(chunk)
    if digest.hexdigest() != body["arrays"].get(name):
      raise FormatError(f"{path}: array {name!r} is damaged (its digest does not fit); save the model again")
  if missing := set(body["arrays"]) - set(file.entries):
    raise FormatError(f"{path}: array {sorted(missing)[0]!r} is missing")
  return file


def _model(description: Mapping[str, Any], where: Path) -> Any:
  known = ARCHITECTURES.get(description["architecture"])
  if known is None:
    raise FormatError(
      f"{where}: architecture {description['architecture']!r} is unknown here; known: {sorted(ARCHITECTURES)}"
    )
  model, config = known
  fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in description["config"].items()}
  for name in ("rope", "local_rope"):
    if isinstance(fields.get(name), Mapping):
      rope = fields[name]
      rope = {**rope, "factors": tuple(rope["factors"]), "long": tuple(rope.get("long", ()))}
      fields[name] = _typed(Rope, rope, where)
  return model(_typed(config, fields, where))


@functools.cache
def _checkers(cls: Any) -> dict[str, Any]:
  """A strict checker of each field's annotated type."""
  import pydantic

  hints = typing.get_type_hints(cls)
  return {
    name: pydantic.TypeAdapter(hint, config=None if dataclasses.is_dataclass(hint) else {"strict": True})
    for name, hint in hints.items()
  }


def _typed(cls: Any, fields: Mapping[str, Any], where: Path) -> Any:
  """`cls(**fields)`, each value of its annotated type."""
  import pydantic

  for name, value in fields.items():
    try:
      _checkers(cls)[name].validate_python(value)
    except (KeyError, pydantic.ValidationError):
      raise FormatError(f"{where}: {cls.__name__} takes no {name}={str(value)[:80]!r}") from None
  made = cls(**fields)
  if isinstance(made, Rope) and made.kind not in ("default", "linear", "dynamic", "llama3", "yarn", "longrope"):
    raise FormatError(f"{where}: rope {made.kind!r} is unknown")
  long = made if isinstance(made, Rope) and made.kind == "longrope" else None
  if long is not None and (long.original_length < 2 or not len(long.factors) == len(long.long) > 0):
    raise FormatError(f"{where}: a longrope has as many short factors as long ones, and a first length above 1")
  odd = getattr(made, "head_dim", 2) % 2 and hasattr(made, "rope")
  if getattr(made, "head_dim", 1) < 1 or odd or getattr(made, "max_length", 1) < 1:
    raise FormatError(f"{where}: head_dim or max_length out of range")
  return made
