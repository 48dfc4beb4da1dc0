"""Models from sizes alone: the same bits every time, a vocabulary that any text goes through, errors by name."""

import numpy as np
import pytest

import lmcompress as lmc
from lmcompress.data.text import load_text
from lmcompress.data.tokenizer import Tokenizer
from lmcompress.io import checkpoint
from lmcompress.io.load import origin

PROSE = "The king had three sons, and the youngest of them was called Dummling. " * 40 + "\nA wolf came.\n"
SIZES = "architecture: llama\nseed: {seed}\ntext: {text}\nvocab: 300\nembed: 32\nmlp: 64\nlayers: 2\nhead_dim: 8\n"


@pytest.fixture
def place(tmp_path):
  (tmp_path / "prose.txt").write_text(PROSE, "utf-8")
  return tmp_path


def written(place, text):
  (place / "sizes.yml").write_text(text, "utf-8")
  return place / "sizes.yml"


def test_a_file_of_sizes_is_a_model(place):
  path = written(place, SIZES.format(seed=3, text=place / "prose.txt"))
  model, params, tokenizer = lmc.load(path)
  assert origin(path) == "random"
  assert params["embed"]["table"].shape == (300, 32) and sorted(params["layers"]) == ["0", "1"]
  assert params["layers"]["0"]["attn"]["k"]["kernel"].shape == (32, 16)
  ids = np.asarray([tokenizer.encode("A wolf came. 中\n")], np.int32)
  assert tokenizer.decode(ids[0]) == "A wolf came. 中\n" and ids.max() < 300
  assert model.apply(params, ids).shape == (1, ids.shape[1], 300)
  again = lmc.load(path)
  assert checkpoint.tree_hash(again[1]) == checkpoint.tree_hash(params)
  assert again[2].backend.to_str() == tokenizer.backend.to_str()
  other = lmc.load(written(place, SIZES.format(seed=4, text=place / "prose.txt")))[1]
  assert checkpoint.tree_hash(other) != checkpoint.tree_hash(params)


def test_a_learned_vocabulary_is_saved_and_read_again(place):
  model, params, tokenizer = lmc.load(written(place, SIZES.format(seed=0, text=place / "prose.txt")))
  lmc.save(place / "model", model, params, tokenizer)
  _, back, read = lmc.load(place / "model")
  assert checkpoint.tree_hash(back) == checkpoint.tree_hash(params)
  assert read.encode(PROSE) == tokenizer.encode(PROSE) and read.eos_id == tokenizer.eos_id is not None


def test_a_vocabulary_joins_what_is_frequent():
  """Against its own promise: more entries never need more tokens; 257 is a token a byte."""
  lengths = [len(Tokenizer.from_text(PROSE, n).encode(PROSE)) for n in (257, 280, 310)]
  assert lengths[0] == len(PROSE.encode()) > lengths[1] > lengths[2]
  for n, said in ((256, "need 257"), (5000, "ask for fewer")):
    with pytest.raises(ValueError, match=said):
      Tokenizer.from_text(PROSE, n)


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("[1, 2]", "a table of sizes is needed; found list"),
    ("text: books\nwidth: 3", "width"),
    ("vocab: 300", "text"),
    ("text: books\narchitecture: gpt9", "architecture"),
    ("text: books\nheads: 6\nkv_heads: 4", "6 heads over 4 kv_heads"),
    ("text: books\nlayers: 0", "layers"),
    ("text: {prose}\nvocab: 9000", "ask for fewer"),
    ("text: [", "not valid YAML"),
  ],
)
def test_sizes_that_cannot_be(place, text, said):
  with pytest.raises(lmc.ConfigError, match=said):
    lmc.load(written(place, text.replace("{prose}", str(place / "prose.txt"))))


def test_texts_join():
  """`+` between names; a path with a plus stays a path."""
  assert load_text("pydoc:even+pydoc:odd") == load_text("pydoc:even") + "\n\n" + load_text("pydoc:odd")
  with pytest.raises(lmc.SourceError):
    load_text("pydoc+nowhere.txt")
