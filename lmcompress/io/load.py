"""load: a name, a GGUF file, a Hugging Face folder or a saved folder to a model, its tree and its tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmcompress.io import checkpoint, encryption, hub, npz_model
from lmcompress.types import FormatError, Params, SourceError


def load(
  name: str | os.PathLike,
  mesh: Any = None,
  bits: int | None = None,
  lazy: bool = False,
  rules: Mapping[str, str | None] | None = None,
) -> tuple[Any, Params, Any]:
  """Loads a model.

  Args:
    name: a known name such as `"smollm2-135m"`, or the path of a GGUF file, of a Hugging Face folder, of a folder with
      a T5 as `encoder.onnx` and `decoder.onnx`, of the `.npz` of g2p-en, of a folder that `save` wrote, of a file that
      `encryption.encrypt` wrote (its key is in the environment), or of a YAML file of the sizes of a model to be
      trained.
    mesh: places the parameters sharded over a mesh of `distributed.make_mesh`.
    lazy: leaves weights in their files until they are used, for a Hugging Face folder or a GGUF file larger than
      memory; `compress` with a `Store` goes through such a tree block by block.
    rules: by which mesh axis each logical axis is split; `distributed.RULES` where not given.
    bits: which width of weights that hold several (`any_precision`); all of them where not given.

  Returns:
    `(model, params, tokenizer)`; the tokenizer is None where the source has none.

  Raises:
    SourceError: there is no such model.
    FormatError: the file is damaged or of a form not known here; the message names it.
    WeightError: `bits` is given and no weight, or not every nested one, has such a width.
  """
  model, params, tokenizer = _read(name, mesh, lazy, rules)
  if bits is not None:
    from lmcompress.transforms.any_precision import at_precision

    params = at_precision(params, bits)
  return model, params, tokenizer


def _read(name: str | os.PathLike, mesh: Any, lazy: bool, rules: Any) -> tuple[Any, Params, Any]:
  path = Path(hub.resolve_model(str(name)))
  if lazy and (mesh is not None or not (_is_gguf(path) or _is_plain_folder(path))):
    raise SourceError(
      f"{name}: only weights of Hugging Face folders and GGUF files can stay in their files, and not on a mesh"
    )
  if path.is_file() and path.suffix in (".yaml", ".yml"):
    from lmcompress.io.untrained import load_untrained

    return _placed(*load_untrained(path), mesh, rules)
  if path.is_file() and path.suffix == npz_model.SUFFIX:
    return _placed(*npz_model.load_npz(path), mesh, rules)
  if path.is_file() and encryption.is_encrypted(path):
    with encryption.opened(path, encryption.read_key()) as folder:
      return _read(folder, mesh, lazy, rules)
  if path.is_file():
    if not _is_gguf(path):
      begins = f"starts with {_magic(path)!r}, not with b'GGUF'"
      raise FormatError(f"{path}: {begins}; files are GGUF, other forms are folders")
    from lmcompress.io.gguf_model import load_gguf

    return _placed(*load_gguf(path, lazy or mesh is not None), mesh, rules)
  if (path / checkpoint.MANIFEST).is_file():
    return checkpoint.load_checkpoint(path, mesh, rules)
  from lmcompress.io.onnx_model import is_onnx, load_onnx

  if is_onnx(path):
    return _placed(*load_onnx(path), mesh, rules)
  from lmcompress.io.huggingface import load_folder

  return _placed(*load_folder(path, lazy or mesh is not None), mesh, rules)


def _magic(path: Path) -> bytes:
  with path.open("rb") as f:
    return f.read(4)


def _is_gguf(path: Path) -> bool:
  return path.is_file() and _magic(path) == b"GGUF"


def _is_plain_folder(path: Path) -> bool:
  from lmcompress.io.onnx_model import is_onnx

  return (path / "config.json").is_file() and not (path / checkpoint.MANIFEST).is_file() and not is_onnx(path)


def read_tasks(name: str | os.PathLike) -> dict[str, dict[str, Any]]:
  """What the heads of a model tell, by name: `kind`, `classes` and `length`, the tokens of a row that are read.

  A saved folder says them as `save` was given them, a Hugging Face folder by its `config.json`; others have none.

  Raises:
    SourceError: there is no such model.
    FormatError: the folder is damaged.
  """
  path = Path(hub.resolve_model(str(name)))
  if (path / checkpoint.MANIFEST).is_file():
    return checkpoint.read_tasks(path)
  from lmcompress.io.huggingface import read_tasks as of_folder

  return of_folder(path) if (path / "config.json").is_file() else {}


def origin(name: str | os.PathLike) -> str:
  """What the weights of a model are, for tables: `float32`, or what float32 was dequantized from."""
  path = Path(hub.resolve_model(str(name)))
  if path.is_file() and path.suffix in (".yaml", ".yml"):
    return "random"
  if path.is_file() and path.suffix == npz_model.SUFFIX:
    return "float32"
  if path.is_file() and encryption.is_encrypted(path):
    return "as saved, encrypted"
  if path.is_file():
    from lmcompress.io.gguf_model import describe

    return describe(path)
  if (path / checkpoint.MANIFEST).is_file():
    return "as saved"
  from lmcompress.io.onnx_model import is_onnx

  return "float32, dequantized where ONNX has integers" if is_onnx(path) else "float32"


def _placed(model: Any, params: Params, tokenizer: Any, mesh: Any, rules: Any) -> tuple[Any, Params, Any]:
  """Sharded over the mesh, if there is one; what is still in its file is read as it is placed."""
  if mesh is not None:
    from lmcompress.distributed import RULES, shard

    params = shard(model, params, mesh, RULES if rules is None else rules)
  return model, params, tokenizer
