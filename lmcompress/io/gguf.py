"""GGUF: reads headers within bounds and dequantizes tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
import os
import re
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmcompress.types import FormatError

if TYPE_CHECKING:
  from gguf import GGMLQuantizationType

VERSIONS = (2, 3)
MAX_DIMS = 4
MAX_NAME_NBYTES = 255
MAX_STRING_NBYTES = 1 << 20
MAX_ARRAY_ENTRIES = 1 << 24
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_ALIGNMENT = 1 << 16

_DEFAULT_ALIGNMENT = 32
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_DTYPES = {
  code: np.dtype(name)
  for code, name in {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
  }.items()
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """Where a tensor lies and how it is stored.

  Attributes:
    name: e.g. `blk.0.attn_q.weight`.
    shape: in NumPy order, `[out, in]` for a linear; the file stores the reverse.
    type: ggml's storage type.
    offset: bytes from the start of the file.
    nbytes: bytes that the tensor takes in the file.
  """

  name: str
  shape: tuple[int, ...]
  type: GGMLQuantizationType
  offset: int
  nbytes: int


@dataclasses.dataclass(frozen=True)
class Header:
  """All of a GGUF file but the weights.

  Attributes:
    path: the file.
    metadata: Python scalars and strings; an array of strings is a list, an array of numbers a NumPy array.
    tensors: by name, in the order of the file.
  """

  path: Path
  metadata: dict[str, Any]
  tensors: dict[str, TensorInfo]


class _Cursor:
  """A position in the file's bytes; every read is checked against the end of the file before it is made."""

  def __init__(self, path: Path, data: mmap.mmap):
    self.path = path
    self.data = data
    self.size = len(data)
    self.at = 0

  def fail(self, what: str) -> FormatError:
    return FormatError(f"{self.path} {what}")

  def truncated(self, what: str, end: int) -> FormatError:
    return self.fail(f"is truncated: {what} ends at byte {end}, the file has {self.size} bytes; fetch it again")

  def unknown_type(self, what: str, code: int) -> FormatError:
    return self.fail(f"is damaged: {what} has value type {code}, known are 0 to 12; fetch it again")

  def need(self, nbytes: int, what: str) -> None:
    if nbytes > self.size - self.at:
      raise self.truncated(what, self.at + nbytes)

  def u32(self, what: str) -> int:
    self.need(4, what)
    (value,) = _U32.unpack_from(self.data, self.at)
    self.at += 4
    return value

  def u64(self, what: str) -> int:
    self.need(8, what)
    (value,) = _U64.unpack_from(self.data, self.at)
    self.at += 8
    return value

  def string(self, what: str) -> str:
    return self.strings(1, what)[0]

  def strings(self, count: int, what: str) -> list[str]:
    # Local names, because vocabularies make this the one loop that takes time.
    data, size, at, unpack = self.data, self.size, self.at, _U64.unpack_from
    values = []
    try:
      for _ in range(count):
        (nbytes,) = unpack(data, at)
        start, at = at + 8, at + 8 + nbytes
        if nbytes > MAX_STRING_NBYTES:
          raise self.fail(f"is refused: a string of {what} claims {nbytes} bytes, {MAX_STRING_NBYTES} are allowed")
        if at > size:
          raise self.truncated(f"a string of {what}", at)
        values.append(str(data[start:at], "utf-8"))
    except struct.error:
      raise self.truncated(f"a string of {what}", at + 8) from None
    except UnicodeDecodeError:
      raise self.fail(f"is damaged: a string of {what} is not UTF-8; fetch it again") from None
    self.at = at
    return values

  def numbers(self, code: int, count: int, what: str) -> np.ndarray:
    dtype = _DTYPES[code]
    self.need(count * dtype.itemsize, what)
    raw = self.data[self.at : self.at + count * dtype.itemsize]
    self.at += len(raw)
    if code == _BOOL:
      return np.frombuffer(raw, np.uint8) != 0
    return np.frombuffer(raw, dtype)

  def value(self, code: int, what: str) -> Any:
    if code == _STRING:
      return self.string(what)
    if code == _ARRAY:
      return self.array(what)
    if code not in _DTYPES:
      raise self.unknown_type(what, code)
    return self.numbers(code, 1, what)[0].item()

  def array(self, what: str) -> list[str] | np.ndarray:
    code, count = self.u32(what), self.u64(what)
    if code == _ARRAY:
      raise self.fail(f"is refused: {what} is an array of arrays, which no known model needs")
    if code != _STRING and code not in _DTYPES:
      raise self.unknown_type(what, code)
    if count > MAX_ARRAY_ENTRIES:
      raise self.fail(f"is refused: {what} claims {count} entries, {MAX_ARRAY_ENTRIES} are allowed")
    self.need(count * (8 if code == _STRING else _DTYPES[code].itemsize), what)
    return self.strings(count, what) if code == _STRING else self.numbers(code, count, what)


def read_header(path: str | os.PathLike[str]) -> Header:
  """Reads metadata and tensor places of a GGUF file of version 2 or 3; no weight is read.

  Every count, length and offset is checked against the bytes that the file has before anything is allocated.

  Args:
    path: a little-endian GGUF file.

  Raises:
    FormatError: the file cannot be read, is truncated, damaged or beyond the caps of this module.
  """
  path = Path(path)
  with _mapped(path) as data:
    cursor = _Cursor(path, data)
    tensor_count, key_count = _preamble(cursor)
    metadata, alignment = _metadata(cursor, key_count)
    return Header(path, metadata, _tensors(cursor, tensor_count, alignment))


def read_tensor(header: Header, name: str, entry: int | None = None) -> np.ndarray:
  """Reads one tensor as float32 in NumPy order, `[out, in]` for a linear.

  Args:
    header: from `read_header`.
    name: a key of `header.tensors`.
    entry: reads that entry of the first axis alone, such as one expert of a stack.

  Raises:
    FormatError: there is no such tensor or entry, its type cannot be dequantized or the file changed since.
  """
  if name not in header.tensors:
    some = ", ".join(list(header.tensors)[:3])
    raise FormatError(f"{header.path} has no tensor {name!r}; it has {len(header.tensors)}, such as {some}")
  info = header.tensors[name]
  if entry is not None:
    if len(info.shape) < 2 or not 0 <= entry < info.shape[0]:
      raise FormatError(f"{header.path}: tensor {name!r} is {list(info.shape)} and has no entry {entry}")
    share = info.nbytes // info.shape[0]
    info = dataclasses.replace(info, shape=info.shape[1:], offset=info.offset + entry * share, nbytes=share)
  if 0 in info.shape:
    return np.zeros(info.shape, np.float32)
  try:
    raw = np.memmap(header.path, np.uint8, mode="r", offset=info.offset, shape=(info.nbytes,))
  except (OSError, ValueError) as error:
    raise FormatError(
      f"{header.path} changed since its header was read: tensor {name!r} needs bytes "
      f"{info.offset} to {info.offset + info.nbytes} ({error}); read the header "
      "again"
    ) from None
  with np.errstate(all="ignore"):
    return _decode(header.path, info, raw)


def _decode(path: Path, info: TensorInfo, raw: np.ndarray) -> np.ndarray:
  kind = info.type.name
  if kind in _PLAIN:
    return np.array(raw.view(_PLAIN[kind]), np.float32).reshape(info.shape)
  if kind == "BF16":
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(info.shape)

  from gguf import quants

  try:
    rows = np.asarray(raw).reshape(math.prod(info.shape[:-1]), -1)
    return quants.dequantize(rows, info.type).reshape(info.shape)
  except NotImplementedError:
    raise FormatError(
      f"{path}: tensor {info.name!r} has type {kind}, which cannot be dequantized; convert "
      "the file to a type such as Q8_0, Q4_K or F16"
    ) from None


def require_decoders(header: Header) -> None:
  """Checks, before any weight is read, that all can be: a block of zeros of each type is dequantized.

  Raises:
    FormatError: names the first tensor of a type that cannot be.
  """
  from gguf.constants import GGML_QUANT_SIZES

  tried = set()
  for info in header.tensors.values():
    if info.type not in tried:
      tried.add(info.type)
      size, nbytes = GGML_QUANT_SIZES[info.type]
      _decode(header.path, dataclasses.replace(info, shape=(1, size)), np.zeros(nbytes, np.uint8))


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
  try:
    with open(path, "rb", opener=_open_regular) as file:
      size = os.fstat(file.fileno()).st_size
      if size < 24:
        raise FormatError(
          f"{path} is truncated: a GGUF header takes 24 bytes, the file has {size} bytes; fetch it again"
        )
      with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data
  except (OSError, ValueError) as error:
    if isinstance(error, FormatError):
      raise
    raise FormatError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _open_regular(path: str, flags: int) -> int:
  # A pipe would block the open itself.
  if not stat.S_ISREG(os.stat(path).st_mode):
    raise OSError(0, "it is not a regular file")
  return os.open(path, flags)


def _preamble(cursor: _Cursor) -> tuple[int, int]:
  """The tensor count and the key count."""
  magic = cursor.data[:4]
  cursor.at = 4
  if magic != b"GGUF":
    raise cursor.fail(f"is no GGUF file: it starts with {magic!r} instead of b'GGUF'")
  version = cursor.u32("the version")
  if version & 0xFFFF == 0:
    raise cursor.fail("is big-endian GGUF; convert it to little-endian, for example with gguf-convert-endian")
  if version not in VERSIONS:
    raise cursor.fail(f"is GGUF version {version}, versions 2 and 3 can be read; convert the model again")
  tensor_count = cursor.u64("the tensor count")
  key_count = cursor.u64("the key count")
  if tensor_count > MAX_TENSORS:
    raise cursor.fail(f"is refused: it claims {tensor_count} tensors, {MAX_TENSORS} are allowed")
  if key_count > MAX_KEYS:
    raise cursor.fail(f"is refused: it claims {key_count} metadata keys, {MAX_KEYS} are allowed")
  return tensor_count, key_count


def _metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Any], int]:
  """The metadata and the alignment of the data section."""
  metadata: dict[str, Any] = {}
  alignment = _DEFAULT_ALIGNMENT
  for index in range(count):
    key = cursor.string(f"the name of metadata key {index}")
    if key in metadata:
      raise cursor.fail(f"is refused: metadata key {_short(key)} is there twice")
    what = f"metadata key {_short(key)}"
    code = cursor.u32(what)
    metadata[key] = cursor.value(code, what)
    if key == "general.alignment":
      alignment = metadata[key]
      if code != _UINT32 or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.fail(
          f"is refused: general.alignment is {_short(alignment)}, it must be a uint32 that "
          f"is a power of two up to {MAX_ALIGNMENT}"
        )
  return metadata, alignment


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
  tensors: dict[str, TensorInfo] = {}
  for index in range(count):
    info = _tensor(cursor, index, alignment)
    if info.name in tensors:
      raise cursor.fail(f"is refused: tensor {info.name!r} is there twice")
    tensors[info.name] = info

  data_start = -(-cursor.at // alignment) * alignment
  for name, info in tensors.items():
    tensors[name] = dataclasses.replace(info, offset=data_start + info.offset)
  end, before = data_start, ""
  for info in sorted(tensors.values(), key=lambda info: info.offset):
    if info.offset + info.nbytes > cursor.size:
      raise cursor.truncated(f"tensor {info.name!r}", info.offset + info.nbytes)
    if info.nbytes and info.offset < end:
      raise cursor.fail(
        f"is damaged: tensor {info.name!r} starts at byte {info.offset}, inside tensor "
        f"{before!r}, which ends at byte {end}; fetch it again"
      )
    if info.nbytes:
      end, before = info.offset + info.nbytes, info.name
  return tensors


def _tensor(cursor: _Cursor, index: int, alignment: int) -> TensorInfo:
  """One tensor's entry; its offset still counts from the start of the data section."""
  from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

  name = cursor.string(f"the name of tensor {index}")
  what = f"tensor {_short(name)}"
  if not _safe(name):
    raise cursor.fail(
      f"is refused: {what} has a name that is empty, longer than {MAX_NAME_NBYTES} bytes, "
      "not printable or a path out of its folder"
    )
  dims = cursor.u32(what)
  if dims > MAX_DIMS:
    raise cursor.fail(f"is refused: {what} has {dims} dimensions, {MAX_DIMS} are allowed")
  extents = [cursor.u64(what) for _ in range(dims)]
  code = cursor.u32(what)
  offset = cursor.u64(what)
  try:
    kind = GGMLQuantizationType(code)
    block_size, block_nbytes = GGML_QUANT_SIZES[kind]
  except (ValueError, KeyError):
    raise cursor.fail(
      f"cannot be read: {what} has type {code}, which gguf does not know; update gguf, or convert the model again"
    ) from None
  row = extents[0] if extents else 1
  if row % block_size:
    raise cursor.fail(
      f"is damaged: {what} has rows of {row} weights, {kind.name} needs a multiple of {block_size}; fetch it again"
    )
  if offset % alignment:
    raise cursor.fail(
      f"is damaged: {what} starts at byte {offset} of the data, which is not a multiple of {alignment}; fetch it again"
    )
  nbytes = math.prod(extents) // block_size * block_nbytes
  if nbytes > cursor.size or any(extent > cursor.size * block_size for extent in extents):
    raise cursor.fail(
      f"is truncated: {what} of shape {tuple(reversed(extents))} takes {nbytes} bytes, the "
      f"file has {cursor.size} bytes; fetch it again"
    )
  return TensorInfo(name, tuple(reversed(extents)), kind, offset, nbytes)


def _safe(name: str) -> bool:
  path_like = name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or re.match(r"[A-Za-z]:", name)
  return 0 < len(name.encode()) <= MAX_NAME_NBYTES and name.isprintable() and not path_like


def _short(value: Any) -> str:
  """A value as an error message shows it."""
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."
