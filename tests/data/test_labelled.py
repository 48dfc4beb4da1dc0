"""Labelled data: splits that do not leak, rows of tokens that end where their document does, images as letters."""

import numpy as np
import pytest

from lmcompress.data.labelled import DATASETS, encode_rows, load_labelled
from lmcompress.data.tokenizer import Tokenizer
from lmcompress.errors import ConfigError, SourceError

TOKENIZER = Tokenizer.from_text("A wolf came to the ABCDEFGHIJKLMNOPQ of a king. " * 20, 280)


@pytest.mark.slow
@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_is_whole_and_its_halves_are_apart(name):
  data = load_labelled(name)
  want = {"bbc": 5, "newsgroups": 20, "movies": 3, "digits": 10}[name]
  assert len(data.classes) == want == len(set(data.classes))
  for documents, labels in (data.train, data.test):
    assert len(documents) == len(labels) > 300 and set(labels.tolist()) == set(range(want))
  if name == "bbc":
    assert not set(data.train[0]) & set(data.test[0])
    assert any("recession" in text for text in data.train[0])
  again = load_labelled(name)
  np.testing.assert_array_equal(again.train[1], data.train[1])


def test_rows_end_where_their_document_does():
  tokens, mask = encode_rows(["A wolf.", "A wolf came to the king of a wolf came"], TOKENIZER, 6)
  assert tokens.shape == mask.shape == (2, 6)
  ids = TOKENIZER.encode("A wolf.")
  assert tokens[0, : mask[0].sum()].tolist() == ids[:6] and mask[1].all()
  assert not tokens[0][mask[0] == 0].any()


def test_an_image_is_a_row_of_letters():
  images = np.asarray([[0, 16, 3, 3], [1, 0, 0, 2]], np.uint8)
  tokens, mask = encode_rows(images, TOKENIZER, 5)
  letters = [TOKENIZER.encode(x)[0] for x in "AQDD"]
  assert tokens[0, :4].tolist() == letters and mask.sum() == 8
  with pytest.raises(ConfigError, match="fewer than the 4 pixels"):
    encode_rows(images, TOKENIZER, 3)


def test_what_cannot_be_read_is_said():
  with pytest.raises(SourceError, match="did you mean bbc"):
    load_labelled("bbcc")
  with pytest.raises(ConfigError, match="document 1 has no tokens"):
    encode_rows(["a", ""], TOKENIZER, 4)


def test_special_tokens_stay_around_a_text_that_is_cut():
  class Framed:
    def encode(self, text, add_special=False):
      ids = [ord(c) for c in text]
      return [1, *ids, 2] if add_special else ids

  tokens, mask = encode_rows(["abcdef", "a"], Framed(), 4, special=True)
  assert tokens.tolist() == [[1, 97, 98, 2], [1, 97, 2, 0]] and mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
  assert encode_rows(["abcdef"], Framed(), 4)[0].tolist() == [[97, 98, 99, 100]]
