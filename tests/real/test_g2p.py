"""g2p-en: phonemes as its package's own NumPy code gives them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import lmcompress as lmc
from lmcompress.generation.seq2seq import rewrite


@pytest.mark.slow
def test_phonemes_equal_the_packages():
  path = Path(__file__).parents[2] / "experiments" / "phonemes.py"
  spec = importlib.util.spec_from_file_location("phonemes", path)
  study = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(study)
  model, params, tokenizer = lmc.load("g2p-en")
  words = ["hello", "compression", "queue", "a", "straightforwardness", "zzyzx"]
  said = rewrite(model, params, tokenizer, words, study.LONGEST)
  assert said == study.by_its_package(words) and said[0] == "HH EH1 L OW0"
