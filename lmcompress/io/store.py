"""Store: what a compression has finished, block by block on disk, so that a run which was cut off goes on there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmcompress.arrays.stored import StoredArray
from lmcompress.io import safetensors
from lmcompress.io.leaves import describe, rebuild
from lmcompress.types import CompressedArray, FormatError

_MARK = "about.json"


class Store:
  """A folder with a file for each finished part of each link.

  Attributes:
    folder: made when something is put in.
    mapped: whether leaves stay in their files (`StoredArray`) instead of in memory.
  """

  def __init__(self, folder: str | os.PathLike, about: Mapping[str, Any], mapped: bool = False):
    """Opens or begins a store.

    Args:
      about: what decides the bits of a result, such as the recipe, the model's files and the versions; a store made
        under another is emptied first.

    Raises:
      FileExistsError: the folder holds something that is no store; nothing of it is touched.
    """
    self.folder, self.mapped = Path(folder), mapped
    self._about = json.dumps(about, sort_keys=True, default=str)
    mark = self.folder / _MARK
    if mark.is_file():
      if mark.read_text("utf-8") != self._about:
        shutil.rmtree(self.folder)
    elif self.folder.exists() and any(self.folder.iterdir()):
      raise FileExistsError(f"{self.folder} holds something that is no store; choose another folder")

  def put(self, link: int, part: str, leaves: Mapping[str, Any], work: Mapping[str, Any]) -> dict[str, Any]:
    """Keeps the finished leaves of a part, with what the report says of them; returns what stands in the tree now."""
    self.folder.mkdir(parents=True, exist_ok=True)
    mark = self.folder / _MARK
    if not mark.is_file():
      mark.write_text(self._about, "utf-8")
    described, arrays = describe(dict(leaves), paths=True)
    name = self._name(link, part)
    partial = self.folder / f".{name}.partial"
    digests = safetensors.write(partial, arrays)
    text = json.dumps({"part": part, "leaves": described, "work": work, "digests": digests}, sort_keys=True)
    note = self.folder / f".{name}.json.partial"
    note.write_text(text, "utf-8")
    os.replace(partial, self.folder / f"{name}.safetensors")
    os.replace(note, self.folder / f"{name}.json")  # the last step: without it the part is not there
    return self._leaves(name, described) if self.mapped else dict(leaves)

  def find(self, link: int, part: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The leaves of a part that is finished and what was said of them; None where it is not, or is damaged."""
    name = self._name(link, part)
    try:
      note = json.loads((self.folder / f"{name}.json").read_text("utf-8"))
      file = safetensors.open_file(self.folder / f"{name}.safetensors")
      for array in note["digests"]:
        digest = hashlib.sha256()
        for chunk in file.chunks(array) if array else ():
          digest.update(chunk)
        if array and digest.hexdigest() != note["digests"][array]:
          return None
      return self._leaves(name, note["leaves"]), note["work"]
    except (OSError, ValueError, KeyError, TypeError, FormatError):
      return None

  def clear(self) -> None:
    """Removes the folder: the model is saved elsewhere."""
    shutil.rmtree(self.folder, ignore_errors=True)

  def _name(self, link: int, part: str) -> str:
    return f"{link:03d}-{part.replace('/', '.')}"

  def _leaves(self, name: str, described: Mapping[str, Any]) -> dict[str, Any]:
    path = self.folder / f"{name}.safetensors"
    leaves = {}
    for where, description in described.items():

      def read(description: Any = description, where: str = where) -> Any:
        return rebuild(description, safetensors.open_file(path).read, where, path)

      leaf = read()
      if not self.mapped:
        leaves[where] = jax.device_put(jax.tree.map(np.array, leaf))
        continue
      dense = not isinstance(leaf, CompressedArray)
      nbits = leaf.nbits if not dense else leaf.size * leaf.dtype.itemsize * 8
      kind = str(leaf.dtype) if dense else leaf.kind
      leaves[where] = StoredArray(read, tuple(leaf.shape), leaf.dtype, nbits, kind, dense)
    return leaves
