"""`lmcompress generate`: drafts and stats on the command line; what can be mended is one line."""

from __future__ import annotations

import sys

import pytest
from small_model import byte_level, random_params

import lmcompress as lmc
from lmcompress import cli
from lmcompress.models import Llama, LlamaConfig


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  home = tmp_path_factory.mktemp("home")
  model = Llama(LlamaConfig(head_dim=16, max_length=256))
  lmc.save(home / "base", model, random_params(), byte_level())
  lmc.save(home / "foreign", model, random_params(vocab=270), byte_level())
  return home


@pytest.fixture
def generate(home, monkeypatch, capsys):
  monkeypatch.chdir(home)

  def call(*arguments):
    monkeypatch.setattr(sys, "argv", ["lmcompress", "generate", "base", "I do", *arguments])
    try:
      cli.main()
      code = 0
    except SystemExit as end:
      code = end.code or 0
    return code, *capsys.readouterr()

  return call


def test_a_draft_gives_the_same_text_and_stats_tell_of_it(generate):
  code, plain, told = generate("-n", "8", "--stats")
  assert code == 0 and "8 tokens" in told and "tokens/s" in told and "draft" not in told
  for draft in (["--draft-layers", "1"], ["--draft", "base", "--draft-tokens", "2"]):
    code, out, told = generate("-n", "8", "--stats", *draft)
    assert (code, out) == (0, plain) and "proposals accepted" in told
  assert "100.0% of" in told


@pytest.mark.parametrize(("arguments", "words"), [
  (["--draft-layers", "3"], "n=3): the model has 2 layers; use 1 to 2"),
  (["--draft-layers", "0"], "n=0): the model has 2 layers; use 1 to 2"),
  (["--draft-layers", "1", "--draft-tokens", "0"], "draft_tokens=0: a draft proposes at least 1"),
  (["--draft", "base", "--draft-layers", "1"], "one draft at a time"),
  (["--draft", "foreign"], "a vocabulary of 270 tokens and the model one of 264"),
  (["--draft", "nowhere"], "model 'nowhere': no such path"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_drafts_that_cannot_be(generate, arguments, words):
  code, out, told = generate("-n", "4", *arguments)
  assert code == 2 and out == "" and words in told and told.count("\n") == 1 and told.startswith("lmcompress: ")
