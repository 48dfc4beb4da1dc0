"""A pinned wheel gives its one file whole, checked and cached, or an error and an untouched cache."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lmcompress.data import fetch
from lmcompress.data.fetch import Wheel, cached_path, fetch_file
from lmcompress.types import FormatError, SourceError

CONTENT = b"once upon a time " * 1000
MEMBER = "tales/data/one.tab"
TAGS = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
METADATA = "Metadata-Version: 2.1\nName: tales\nVersion: 1.0\n"
ZEROS = "0" * 64


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
  monkeypatch.setenv("LMCOMPRESS_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture
def archive(tmp_path) -> Path:
  folder = tmp_path / "index"
  folder.mkdir()
  path = folder / "tales-1.0-py3-none-any.whl"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
    opened.writestr(MEMBER, CONTENT)
    opened.writestr("tales-1.0.dist-info/METADATA", METADATA)
    opened.writestr("tales-1.0.dist-info/WHEEL", TAGS)
    opened.writestr("tales-1.0.dist-info/RECORD", "")
  return path


@pytest.fixture
def wheel(archive) -> Wheel:
  return Wheel("tales", "1.0", digest(archive.read_bytes()), MEMBER, digest(CONTENT), len(CONTENT))


@pytest.fixture
def downloads(archive, monkeypatch) -> list[Wheel]:
  """Puts the fake index in place of pip, and lists what was asked of it."""
  asked = []

  def download(wheel: Wheel, folder: Path) -> Path:
    asked.append(wheel)
    path = folder / archive.name
    path.write_bytes(archive.read_bytes())
    return path

  monkeypatch.setattr(fetch, "download_wheel", download)
  return asked


def digest(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()


def files(folder: Path) -> list[Path]:
  return [path for path in folder.rglob("*") if path.is_file()]


def test_second_fetch_comes_from_the_cache(cache, wheel, downloads):
  path = fetch_file(wheel)
  assert path.read_bytes() == CONTENT
  assert fetch_file(wheel) == path
  assert downloads == [wheel]
  assert files(cache) == [path]  # The wheel itself is gone.
  assert not list(cache.glob(".fetch-*"))


def test_file_put_there_by_hand_is_as_good(cache, wheel, downloads):
  cached_path(wheel).parent.mkdir(parents=True)
  cached_path(wheel).write_bytes(CONTENT)
  assert fetch_file(wheel) == cached_path(wheel)
  assert not downloads


@pytest.mark.parametrize("damage", [
  lambda data: data[:-1], lambda data: b"", lambda data: data + b"x", lambda data: b"X" + data[1:],
], ids=["truncated", "empty", "longer", "flipped"])
def test_damaged_cache_is_reported_and_fetched_anew(cache, wheel, downloads, caplog, damage):
  path = fetch_file(wheel)
  path.write_bytes(damage(CONTENT))
  with caplog.at_level(logging.WARNING):
    assert fetch_file(wheel).read_bytes() == CONTENT
  assert len(downloads) == 2
  assert f"{path} is damaged" in caplog.text


@pytest.mark.parametrize("change", [
  {"sha256": ZEROS}, {"member_sha256": ZEROS}, {"nbytes": 10}, {"nbytes": len(CONTENT) + 1},
  {"member": "tales/data/two.tab"}, {"member": "data/one.tab"},
], ids=str)
def test_other_than_pinned_is_refused_and_leaves_nothing(cache, wheel, downloads, change):
  with pytest.raises(SourceError, match=r"package tales==1\.0"):
    fetch_file(dataclasses.replace(wheel, **change))
  assert files(cache) == []
  assert list(cache.iterdir()) == []


def test_refused_download_leaves_the_old_file(cache, wheel, downloads):
  path = fetch_file(wheel)
  with pytest.raises(SourceError):
    fetch_file(dataclasses.replace(wheel, sha256=ZEROS, member_sha256=ZEROS))
  assert path.read_bytes() == CONTENT


def test_archive_that_lies_about_its_size_is_refused(cache, wheel, archive, downloads):
  """The zip's directory says 10 bytes and its stream holds more: only the pinned size is ever written."""
  data = archive.read_bytes()
  real, false = len(CONTENT).to_bytes(4, "little"), (10).to_bytes(4, "little")
  assert data.count(real) == 2  # local header and central directory
  archive.write_bytes(data.replace(real, false))
  with pytest.raises(SourceError):
    fetch_file(dataclasses.replace(wheel, sha256=digest(archive.read_bytes()), nbytes=10))
  assert files(cache) == []


def test_no_zip_is_refused(cache, wheel, archive, downloads):
  archive.write_bytes(b"<html>sign in</html>")
  with pytest.raises(SourceError, match="not the pinned one"):
    fetch_file(wheel)
  with pytest.raises(SourceError, match="the wheel cannot be read"):
    fetch_file(dataclasses.replace(wheel, sha256=digest(archive.read_bytes())))
  assert files(cache) == []


@pytest.mark.parametrize("member", [
  "../../x", "/etc/x", "a/../../x", "a//x", "./x", "", "a/", "..\\x", "C:/x", "a\0x",
])
def test_member_that_could_leave_the_cache_is_refused(cache, wheel, downloads, member):
  with pytest.raises(FormatError, match="member"):
    fetch_file(dataclasses.replace(wheel, member=member))
  assert not downloads and not cache.exists()


@pytest.mark.parametrize("change", [
  {"package": "../x"}, {"package": "--index-url"}, {"package": ""}, {"version": "1/../.."}, {"version": "-1"},
  {"sha256": "abc"}, {"member_sha256": "A" * 64},
], ids=str)
def test_pin_that_could_be_an_option_or_a_path_is_refused(wheel, change):
  with pytest.raises(FormatError, match=next(iter(change))):
    dataclasses.replace(wheel, **change)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("no space left")], ids=repr)
def test_interrupted_download_leaves_nothing(cache, wheel, monkeypatch, interruption):
  def download(wheel, folder):
    (folder / "partial.whl").write_bytes(b"PK")
    raise interruption

  monkeypatch.setattr(fetch, "download_wheel", download)
  with pytest.raises((KeyboardInterrupt, SourceError)):
    fetch_file(wheel)
  assert list(cache.iterdir()) == []


def test_what_killed_processes_left_is_removed_after_a_day(cache, wheel, downloads):
  old, young = cache / ".fetch-old", cache / ".fetch-young"
  for folder in (old, young):
    folder.mkdir(parents=True)
    (folder / "partial.whl").write_bytes(b"PK")
  os.utime(old, (0, 0))
  fetch_file(wheel)
  assert not old.exists() and young.exists()


def test_many_at_once_all_get_the_whole_file(cache, wheel, archive, monkeypatch):
  together = threading.Barrier(4, timeout=10)

  def download(wheel, folder):
    together.wait()  # None finds another's file in the cache: all download.
    path = folder / archive.name
    path.write_bytes(archive.read_bytes())
    return path

  monkeypatch.setattr(fetch, "download_wheel", download)
  with ThreadPoolExecutor(4) as pool:
    paths = list(pool.map(fetch_file, [wheel] * 4))
  assert {path.read_bytes() for path in paths} == {CONTENT}
  assert files(cache) == [paths[0]]


def test_unwritable_cache_is_named(tmp_path, wheel, downloads, monkeypatch):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("LMCOMPRESS_CACHE", str(tmp_path / "file"))
  with pytest.raises(SourceError, match="LMCOMPRESS_CACHE"):
    fetch_file(wheel)


@pytest.fixture
def local_index(archive, monkeypatch, tmp_path):
  """Real pip, set by its own environment to a folder in place of a network."""
  if fetch._pip() is None:
    pytest.fail("these tests need a pip beside this Python or on PATH")
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(archive.parent))
  monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
  monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
  monkeypatch.chdir(tmp_path)
  (tmp_path / "pip.py").write_text("raise SystemExit('ran a file of the current folder')")


@pytest.mark.slow
def test_pip_downloads_from_where_its_environment_says(cache, wheel, local_index):
  assert fetch_file(wheel).read_bytes() == CONTENT


@pytest.mark.slow
def test_pip_that_finds_nothing_says_what_to_do(cache, wheel, local_index):
  with pytest.raises(SourceError) as raised:
    fetch_file(dataclasses.replace(wheel, version="2.0"))
  message = str(raised.value)
  assert "tales==2.0" in message and "pip download" in message
  assert str(cache / "tales-2.0" / MEMBER) in message
  assert list(cache.iterdir()) == []


def test_no_pip_says_what_to_do(cache, wheel, monkeypatch):
  monkeypatch.setattr(fetch, "_pip", lambda: None)
  with pytest.raises(SourceError, match="no pip beside this Python or on PATH"):
    fetch_file(wheel)


def test_pip_on_path_stands_in_for_a_missing_one(monkeypatch, tmp_path):
  program = tmp_path / "pip3"
  program.write_text("#!/bin/sh\nexit 0\n")
  program.chmod(0o755)
  monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
  monkeypatch.setenv("PATH", str(tmp_path))
  assert fetch._pip.__wrapped__() == (str(program),)
  program.write_text("#!/bin/sh\nexit 1\n")
  assert fetch._pip.__wrapped__() is None


def test_complaint_hides_credentials():
  stderr = "noise\nERROR: https://user:secret@index/simple refused\n"
  result = fetch.subprocess.CompletedProcess([], 1, "", stderr)
  assert fetch._complaint(result) == "ERROR: https://***@index/simple refused"
