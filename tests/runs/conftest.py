"""A saved model, a text and a config for the runs of these tests."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from small_model import byte_level, random_params
from small_run import RECIPE, WINDOWS

import lmcompress as lmc
from lmcompress.models import Llama, LlamaConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with a saved model, a text, and a config that points at them."""
  place = tmp_path_factory.mktemp("place")
  lmc.save(place / "base", Llama(LlamaConfig(head_dim=16, max_length=256)), random_params(), byte_level())
  words = np.random.default_rng(0).choice(["green", "eggs", "and", "ham", "I", "do", "not", "like", "them"],
                                          400)
  (place / "text.txt").write_text(" ".join(words))
  table = {
    "name": "tiny", "model": str(place / "base"), "recipe": RECIPE,
    "evaluate": {"texts": [str(place / "text.txt")], "windows": WINDOWS, "length": 32},
    "bench": {"prefill": 16, "decode": 112, "rounds": 1},  # the shapes of generation: compiled once for both
    "generate": {"prompt": "I do", "max_new_tokens": 4},
  }
  (place / "tiny.yaml").write_text(yaml.safe_dump(table))
  return place
