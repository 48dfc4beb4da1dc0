"""Encrypted models: a folder as one file under AES-256-GCM, read with its key alone and refused if a bit differs."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lmcompress.types import ConfigError, FormatError, SourceError

MAGIC = b"LMCENC01"
KEY, KEY_FILE = "LMCOMPRESS_KEY", "LMCOMPRESS_KEY_FILE"
"""Environment variables: 64 hex digits, or the path of a file that holds them."""
_SALT, _TAG, _CHUNK = 32, 16, 1 << 20


def new_key() -> str:
  """A random key of 256 bits, 64 hex digits."""
  return secrets.token_hex(32)


def read_key(file: str | os.PathLike | None = None) -> bytes:
  """The key of a file, else of the environment: `LMCOMPRESS_KEY`, or the file that `LMCOMPRESS_KEY_FILE` names.

  Raises:
    ConfigError: there is none, or it is not 64 hex digits; the message does not show it.
  """
  where, text = "", ""
  if file is None and os.environ.get(KEY):
    where, text = KEY, os.environ[KEY]
  else:
    path = file or os.environ.get(KEY_FILE)
    if not path:
      raise ConfigError(f"a key is needed: set {KEY} to 64 hex digits, or {KEY_FILE} to the path of a file with them")
    where = os.fspath(path)
    try:
      text = Path(path).read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
      raise ConfigError(f"the key file {where} cannot be read ({type(error).__name__})") from None
  text = text.strip()
  if len(text) != 64 or any(c not in "0123456789abcdefABCDEF" for c in text):
    raise ConfigError(f"the key in {where} is not 64 hex digits; `lmcompress key` makes one")
  return bytes.fromhex(text)


def encrypt(folder: str | os.PathLike, target: str | os.PathLike, key: bytes) -> Path:
  """Writes a folder's files as one encrypted file, whole or not at all.

  The file is `LMCENC01`, a random salt of 32 bytes, and pieces of at most 1 MiB, each sealed by AES-256-GCM under a key
  of this file alone (HKDF-SHA256 of `key` and the salt), its number and whether it is the last being the nonce (STREAM,
  Hoang et al. 2015): pieces cannot be changed, cut off, swapped or repeated.

  Raises:
    SourceError: the folder is none, or holds something other than files.
    ConfigError: cryptography is missing.
    FileExistsError: the target is there.
  """
  folder, target = Path(folder), Path(target)
  if not folder.is_dir() or any(not path.is_file() or path.is_symlink() for path in folder.iterdir()):
    raise SourceError(f"{folder}: a folder of files is needed, as `save` writes it")
  if target.exists():
    raise FileExistsError(f"{target} is there; choose another name")
  salt = secrets.token_bytes(_SALT)
  cipher = _cipher(key, salt)
  partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
  try:
    with partial.open("wb") as sink:
      sink.write(MAGIC + salt)
      sealed = _Sealed(sink, cipher, MAGIC + salt)
      with tarfile.open(fileobj=sealed, mode="w|", format=tarfile.PAX_FORMAT) as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for path in sorted(folder.iterdir()):
          info = tarfile.TarInfo(path.name)
          info.size = path.stat().st_size
          with path.open("rb") as file:
            archive.addfile(info, file)
      sealed.finish()
      sink.flush()
      os.fsync(sink.fileno())
    os.replace(partial, target)
  finally:
    partial.unlink(missing_ok=True)
  return target


def decrypt(source: str | os.PathLike, folder: str | os.PathLike, key: bytes) -> Path:
  """Writes the files of an encrypted file to a folder, which appears whole or not at all.

  Raises:
    FormatError: the key is another one, or the file was changed or cut; nothing is left.
    FileExistsError: the folder is there.
  """
  source, folder = Path(source), Path(folder)
  if folder.exists():
    raise FileExistsError(f"{folder} is there; choose another name")
  folder.parent.mkdir(parents=True, exist_ok=True)
  partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
  try:
    _unpack(source, partial, key)
    os.rename(partial, folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return folder


@contextlib.contextmanager
def opened(source: str | os.PathLike, key: bytes) -> Iterator[Path]:
  """The files of an encrypted file in a folder that goes away; in memory where the system has `/dev/shm`.

  Raises:
    FormatError: as of `decrypt`.
  """
  memory = Path("/dev/shm")
  home = str(memory) if memory.is_dir() and os.access(memory, os.W_OK) else None
  with tempfile.TemporaryDirectory(prefix="lmcompress-", dir=home) as folder:  # readable by this user alone
    _unpack(Path(source), Path(folder), key)
    yield Path(folder)


def is_encrypted(path: Path) -> bool:
  """Whether a file begins as `encrypt` writes it."""
  with path.open("rb") as file:
    return file.read(len(MAGIC)) == MAGIC


def _unpack(source: Path, folder: Path, key: bytes) -> None:
  with source.open("rb") as file:
    head = file.read(len(MAGIC) + _SALT)
    if len(head) < len(MAGIC) + _SALT or not head.startswith(MAGIC):
      raise FormatError(f"{source}: not an encrypted model; `lmcompress encrypt` makes one")
    plain = io.BufferedReader(_Unsealed(file, _cipher(key, head[len(MAGIC) :]), head, source), _CHUNK)
    try:
      with tarfile.open(fileobj=plain, mode="r|") as archive:
        for info in archive:
          if not info.isfile() or Path(info.name).name != info.name or info.name in (".", ".."):
            raise FormatError(f"{source}: holds {info.name[:80]!r}, which is no plain file")
          taken: Any = archive.extractfile(info)
          with (folder / info.name).open("wb") as sink:
            shutil.copyfileobj(taken, sink, _CHUNK)
      while plain.read(_CHUNK):  # what follows the archive is checked, too
        pass
    except tarfile.TarError as error:
      raise FormatError(f"{source}: cannot be read ({error})") from None


def _cipher(key: bytes, salt: bytes) -> Any:
  """AES-256-GCM under the key of one file."""
  try:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
  except ImportError:
    raise ConfigError("encrypted models need cryptography: pip install 'lmcompress[encryption]'") from None
  if len(key) != 32:
    raise ConfigError(f"a key has 32 bytes; found {len(key)}")
  return AESGCM(HKDF(SHA256(), 32, salt, MAGIC).derive(key))


def _nonce(number: int, last: bool) -> bytes:
  return number.to_bytes(11, "big") + bytes([last])


class _Sealed(io.RawIOBase):
  """Takes bytes and writes sealed pieces."""

  def __init__(self, sink: BinaryIO, cipher: Any, head: bytes):
    self._sink, self._cipher, self._head, self._left, self._number = sink, cipher, head, bytearray(), 0

  def writable(self) -> bool:
    return True

  def write(self, data: Any) -> int:
    self._left += data
    while len(self._left) > _CHUNK:  # the last piece is never empty, and is known by being last
      self._seal(bytes(self._left[:_CHUNK]), last=False)
      del self._left[:_CHUNK]
    return len(data)

  def finish(self) -> None:
    self._seal(bytes(self._left), last=True)

  def _seal(self, piece: bytes, last: bool) -> None:
    self._sink.write(self._cipher.encrypt(_nonce(self._number, last), piece, self._head))
    self._number += 1


class _Unsealed(io.RawIOBase):
  """Gives the bytes of sealed pieces, each after it was found whole."""

  def __init__(self, source: BinaryIO, cipher: Any, head: bytes, path: Path):
    self._source, self._cipher, self._head, self._path = source, cipher, head, path
    self._plain, self._number, self._ahead = b"", 0, source.read(_CHUNK + _TAG)
    self._ended = False

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    if not self._plain and not self._ended:
      self._open()
    count = min(len(buffer), len(self._plain))
    buffer[:count] = self._plain[:count]
    self._plain = self._plain[count:]
    return count

  def _open(self) -> None:
    from cryptography.exceptions import InvalidTag

    piece, self._ahead = self._ahead, self._source.read(_CHUNK + _TAG)
    self._ended = not self._ahead
    try:
      self._plain = self._cipher.decrypt(_nonce(self._number, self._ended), piece, self._head)
    except (InvalidTag, ValueError):
      what = "the key does not fit, or the file was changed or cut"
      raise FormatError(f"{self._path}: {what}; nothing of it is used") from None
    self._number += 1
