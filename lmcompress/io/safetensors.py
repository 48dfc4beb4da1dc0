"""safetensors: a bounded reader over a memory map, and a writer that aligns every array to 64 bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lmcompress.types import FormatError

ALIGNMENT = 64
_MAX_HEADER = 100 << 20

DTYPES: dict[str, Any] = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "F8_E8M0": ml_dtypes.float8_e8m0fnu,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
_CODES = {np.dtype(v): k for k, v in DTYPES.items()}
PAD = "_pad."


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a file: its dtype, its shape, and where its bytes start and end."""

  dtype: np.dtype
  shape: tuple[int, ...]
  start: int
  end: int


@dataclasses.dataclass(frozen=True)
class File:
  """A file whose header has been read: its entries by name, its size and where the header ends."""

  path: Path
  entries: dict[str, Entry]
  size: int
  header_end: int

  def read(self, name: str) -> np.ndarray:
    """The tensor as a memory map of its own: nothing is copied until it is used, and its pages go when it goes."""
    entry = self.entries[name]
    if entry.start == entry.end:
      return np.empty(entry.shape, entry.dtype)
    data = np.memmap(self.path, np.uint8, "r", offset=entry.start, shape=(entry.end - entry.start,))
    return np.asarray(data).view(entry.dtype).reshape(entry.shape)

  def chunks(self, name: str, nbytes: int = 1 << 20) -> Iterator[bytes]:
    """The tensor's bytes, a piece at a time, read and not mapped."""
    entry = self.entries[name]
    with self.path.open("rb") as file:
      file.seek(entry.start)
      for at in range(entry.start, entry.end, nbytes):
        yield file.read(min(nbytes, entry.end - at))


def open_file(path: str | os.PathLike) -> File:
  """Reads a header within bounds.

  Raises:
    FormatError: the file is not whole and well-formed; the message names it and the tensor.
  """
  path = Path(path)
  size = path.stat().st_size
  if size < 8:
    raise FormatError(f"{path}: {size} bytes are too few for a safetensors file; fetch it again")
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    text = file.read(min(length, _MAX_HEADER, size - 8))
  if length > min(_MAX_HEADER, size - 8):
    raise FormatError(
      f"{path}: the header claims {length} bytes, the file has {size}; it is cut or no safetensors file"
    )
  try:
    header = json.loads(text, object_pairs_hook=_unique)
  except (ValueError, RecursionError) as error:
    raise FormatError(f"{path}: the header is not valid JSON ({error})") from None
  if not isinstance(header, dict):
    raise FormatError(f"{path}: the header is no JSON object")
  base, entries = 8 + length, {}
  for name, item in header.items():
    if name != "__metadata__":
      entries[name] = _entry(path, name, item, base, size)
  spans = sorted((e.start, e.end) for e in entries.values())
  if any(a[1] > b[0] for a, b in itertools.pairwise(spans)):
    raise FormatError(f"{path}: tensors overlap")
  return File(path, entries, size, base)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  keys = dict(pairs)
  if len(keys) != len(pairs):
    raise ValueError("duplicate keys")
  return keys


def _entry(path: Path, name: str, item: Any, base: int, size: int) -> Entry:
  def bad(what: str) -> FormatError:
    return FormatError(f"{path}: tensor {name[:200]!r} {what}")

  if not isinstance(item, dict) or not {"dtype", "shape", "data_offsets"} <= set(item):
    raise bad("has no dtype, shape and data_offsets")
  if not isinstance(item["dtype"], str) or item["dtype"] not in DTYPES:
    raise bad(f"has dtype {item['dtype']!r}; known are {', '.join(DTYPES)}")
  shape, offsets = item["shape"], item["data_offsets"]
  if not isinstance(shape, list) or len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
    raise bad(f"has shape {str(shape)[:80]}")
  if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
    raise bad(f"has data_offsets {str(offsets)[:80]}")
  dtype, count = np.dtype(DTYPES[item["dtype"]]), 1
  for n in shape:
    count *= n
  start, end = base + offsets[0], base + offsets[1]
  if not base <= start <= end <= size:
    raise bad(f"ends at byte {end}, the file has {size}; the file is cut or damaged")
  if end - start != count * dtype.itemsize:
    raise bad(f"takes {end - start} bytes, its shape {shape} needs {count * dtype.itemsize}")
  return Entry(dtype, tuple(shape), start, end)


def layout(arrays: Mapping[str, Any]) -> tuple[bytes, int, dict[str, tuple[int, int]]]:
  """Where a file of these arrays puts each: the header's bytes, the file's size, `{name: (start, end)}`.

  safetensors admits no holes, so what aligns an array is a named tensor of a few bytes before it.
  """
  header, offset, spans = {}, 0, {}
  for name in sorted(arrays):
    x = arrays[name]
    pad = -offset % ALIGNMENT
    if pad:
      header[f"{PAD}{len(header)}"] = {"dtype": "U8", "shape": [pad], "data_offsets": [offset, offset + pad]}
      offset += pad
    dtype = np.dtype(x.dtype)
    nbytes = int(np.prod(x.shape, dtype=np.int64)) * dtype.itemsize
    header[name] = {"dtype": _CODES[dtype], "shape": list(x.shape), "data_offsets": [offset, offset + nbytes]}
    spans[name] = (offset, offset + nbytes)
    offset += nbytes
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-(8 + len(text)) % ALIGNMENT)
  head = len(text).to_bytes(8, "little") + text
  return head, len(head) + offset, {k: (len(head) + a, len(head) + b) for k, (a, b) in spans.items()}


def write(path: str | os.PathLike, arrays: Mapping[str, Any]) -> dict[str, str]:
  """Writes arrays (JAX or NumPy), one host copy at a time, flushed to disk.

  Returns:
    sha256 of each array's bytes, and under `""` of the header.
  """
  head, _, spans = layout(arrays)
  digests = {"": hashlib.sha256(head).hexdigest()}
  with open(path, "wb") as file:
    file.write(head)
    for name in sorted(arrays):
      file.write(b"\0" * (spans[name][0] - file.tell()))
      data = raw(arrays[name])
      digests[name] = hashlib.sha256(data).hexdigest()
      file.write(data)
      _forget(arrays[name])
    file.flush()
    os.fsync(file.fileno())
  return digests


def _forget(x: Any) -> None:
  """Gives back the pages of a memory map that were read; they come back when they are needed."""
  while isinstance(x, np.ndarray) and not isinstance(x, np.memmap):
    x = x.base
  if isinstance(x, np.memmap) and hasattr(x._mmap, "madvise"):  # type: ignore[attr-defined]
    x._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


def raw(x: Any) -> memoryview:
  """The bytes of an array, row-major, on the host."""
  return memoryview(np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def is_supported(dtype: Any) -> bool:
  """Whether arrays of this dtype can be stored."""
  return np.dtype(dtype) in _CODES
