"""Encrypted models: what was saved comes back to the bit, and nothing comes back from another key or a changed file."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

import lmcompress as lmc
from lmcompress.errors import ConfigError, FormatError, SourceError
from lmcompress.io import checkpoint, encryption
from lmcompress.models import Llama, LlamaConfig, LlamaSizes

KEY = bytes(range(32))
MODEL = Llama(LlamaConfig(head_dim=8), LlamaSizes(vocab=4000, embed=128, mlp=256, layers=2, heads=4, kv_heads=2))
PARAMS = MODEL.init(jax.random.key(0))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A saved model of some pieces, and the same encrypted."""
  place = tmp_path_factory.mktemp("encrypted")
  lmc.save(place / "model", MODEL, PARAMS)
  encryption.encrypt(place / "model", place / "model.enc", KEY)
  assert (place / "model.enc").stat().st_size > 2 << 20
  return place


def test_what_was_saved_comes_back_to_the_bit(place, tmp_path, monkeypatch):
  encryption.decrypt(place / "model.enc", tmp_path / "model", KEY)
  names = sorted(path.name for path in (place / "model").iterdir())
  assert sorted(path.name for path in (tmp_path / "model").iterdir()) == names
  for name in names:
    assert (tmp_path / "model" / name).read_bytes() == (place / "model" / name).read_bytes()
  monkeypatch.setenv(encryption.KEY, KEY.hex())
  model, params, _ = lmc.load(place / "model.enc")
  assert checkpoint.tree_hash(params) == checkpoint.tree_hash(PARAMS)
  rows = np.arange(12, dtype=np.int32).reshape(2, 6)
  np.testing.assert_array_equal(model.apply(params, rows), MODEL.apply(PARAMS, rows))


def test_nothing_of_the_model_can_be_read_and_no_two_files_are_alike(place, tmp_path):
  data = (place / "model.enc").read_bytes()
  kernel = np.asarray(PARAMS["layers"]["0"]["mlp"]["up"]["kernel"]).tobytes()
  assert kernel[:64] in (place / "model" / checkpoint.WEIGHTS).read_bytes()
  assert kernel[:64] not in data and b"manifest" not in data and b"embed" not in data
  encryption.encrypt(place / "model", tmp_path / "again", KEY)
  again = (tmp_path / "again").read_bytes()
  assert len(again) == len(data) and sum(a == b for a, b in zip(data[40:2000], again[40:2000], strict=True)) < 60


def test_the_first_piece_is_plain_aes_gcm(place):
  """As the page says, by cryptography alone."""
  data = (place / "model.enc").read_bytes()
  cipher = AESGCM(HKDF(SHA256(), 32, data[8:40], b"LMCENC01").derive(KEY))
  plain = cipher.decrypt(bytes(12), data[40 : 40 + (1 << 20) + 16], data[:40])
  assert plain[:13] == b"manifest.json"


def changed(data, how):
  piece = (1 << 20) + 16
  head, first, second, rest = (data[a:b] for a, b in zip((0, 40, 40 + piece, 40 + 2 * piece),
                                                         (40, 40 + piece, 40 + 2 * piece, None), strict=True))
  return {
    "a bit": data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
    "the last bit": data[:-1] + bytes([data[-1] ^ 1]),
    "the salt": data[:20] + bytes([data[20] ^ 1]) + data[21:],
    "cut in a piece": data[:-7],
    "cut between pieces": head + first + second,
    "swapped": head + second + first + rest,
    "repeated": head + first + first + second + rest,
    "something after it": data + b"more",
    "a head alone": head,
    "half a head": data[:11],
  }[how]


@pytest.mark.parametrize(
  "how",
  ["a bit", "the last bit", "the salt", "cut in a piece", "cut between pieces", "swapped", "repeated",
   "something after it", "a head alone", "half a head"],
)  # fmt: skip
def test_a_changed_file_is_refused_and_leaves_nothing(place, tmp_path, how):
  (tmp_path / "bad").write_bytes(changed((place / "model.enc").read_bytes(), how))
  with pytest.raises(FormatError, match=r"changed or cut|not an encrypted model"):
    encryption.decrypt(tmp_path / "bad", tmp_path / "model", KEY)
  assert os.listdir(tmp_path) == ["bad"]


def test_another_key_is_refused(place, tmp_path, monkeypatch):
  with pytest.raises(FormatError, match="the key does not fit"):
    encryption.decrypt(place / "model.enc", tmp_path / "model", bytes(32))
  assert not os.listdir(tmp_path)
  monkeypatch.delenv(encryption.KEY, raising=False)
  monkeypatch.delenv(encryption.KEY_FILE, raising=False)
  with pytest.raises(ConfigError, match="a key is needed"):
    lmc.load(place / "model.enc")
  for text, said in (("12ab", "not 64 hex digits"), ("zz" * 32, "not 64 hex digits")):
    monkeypatch.setenv(encryption.KEY, text)
    with pytest.raises(ConfigError, match=said) as caught:
      lmc.load(place / "model.enc")
    assert text not in str(caught.value)
  monkeypatch.delenv(encryption.KEY)
  (tmp_path / "key").write_text(KEY.hex() + "\n")
  monkeypatch.setenv(encryption.KEY_FILE, str(tmp_path / "key"))
  assert encryption.read_key() == KEY == encryption.read_key(tmp_path / "key")
  with pytest.raises(ConfigError, match="cannot be read"):
    encryption.read_key(tmp_path / "nowhere")


def test_what_cannot_be_encrypted_is_said(place, tmp_path):
  with pytest.raises(SourceError, match="a folder of files"):
    encryption.encrypt(tmp_path / "nowhere", tmp_path / "x", KEY)
  (tmp_path / "deep" / "er").mkdir(parents=True)
  with pytest.raises(SourceError, match="a folder of files"):
    encryption.encrypt(tmp_path / "deep", tmp_path / "x", KEY)
  (tmp_path / "there").write_text("mine")
  for act in (
    lambda: encryption.encrypt(place / "model", tmp_path / "there", KEY),
    lambda: encryption.decrypt(place / "model.enc", tmp_path / "there", KEY),
  ):
    with pytest.raises(FileExistsError, match="is there"):
      act()
  assert (tmp_path / "there").read_text() == "mine"


@pytest.mark.slow
def test_the_commands_make_a_key_and_go_there_and_back(place, tmp_path):
  run = lambda *args, **env: subprocess.run(  # noqa: E731
    [sys.executable, "-m", "lmcompress.cli", *map(str, args)], capture_output=True, text=True, check=False,
    env={**os.environ, **env},
  )  # fmt: skip
  made = run("key", tmp_path / "key")
  assert made.returncode == 0 and (tmp_path / "key").stat().st_mode & 0o077 == 0
  assert (tmp_path / "key").read_text().strip() not in made.stdout + made.stderr
  assert run("encrypt", place / "model", tmp_path / "m.enc", "--key-file", tmp_path / "key").returncode == 0
  assert run("inspect", tmp_path / "m.enc", LMCOMPRESS_KEY_FILE=str(tmp_path / "key")).returncode == 0
  refused = run("decrypt", tmp_path / "m.enc", tmp_path / "back", LMCOMPRESS_KEY="00" * 32)
  assert refused.returncode == 2 and "the key does not fit" in refused.stderr and "Traceback" not in refused.stderr
  assert run("decrypt", tmp_path / "m.enc", tmp_path / "back", "--key-file", tmp_path / "key").returncode == 0
  assert checkpoint.tree_hash(lmc.load(tmp_path / "back")[1]) == checkpoint.tree_hash(PARAMS)
