"""Writing with an encoder-decoder against transformers' own search, and what it must refuse."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from small_model import byte_level

from lmcompress.errors import WeightError
from lmcompress.generation.seq2seq import beam_search, rewrite
from lmcompress.io.huggingface import load_folder, save_folder
from lmcompress.models import T5, T5Config, T5Sizes

TOKENS = np.random.default_rng(0).integers(2, 29, (3, 14)).astype(np.int32)
MASK = np.arange(14)[None] < np.array([[14], [9], [4]])


ENDS = {"vocab_size": 29, "d_model": 24, "pad_token_id": 0, "eos_token_id": 1}
BART = {
  **ENDS, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
  "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32, "bos_token_id": 2,
  "decoder_start_token_id": 2, "forced_eos_token_id": None, "init_std": 0.4,
}  # fmt: skip
NETS = {
  "T5": {**ENDS, "d_kv": 5, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0, "initializer_factor": 3.0},
  "Bart": {**BART, "d_model": 64, "init_std": 0.25},  # heads of 32, which the kernels take
  "MBart": {**BART, "init_std": 0.3},
}  # fmt: skip


@pytest.fixture(scope="module", params=NETS)
def pair(request, tmp_path_factory):
  """`(net, model, params)`: likely to end soon, so that beams end at different times."""
  torch.manual_seed(3)
  config = getattr(transformers, f"{request.param}Config")(**NETS[request.param])
  net = getattr(transformers, f"{request.param}ForConditionalGeneration")(config).eval()
  if request.param != "T5":
    net.final_logits_bias[0, 1] = 4.0
  folder = tmp_path_factory.mktemp(request.param)
  net.save_pretrained(folder)
  return net, *load_folder(folder)[:2]


def generated(net, beams, **given):
  """What transformers writes."""
  return net.generate(
    torch.tensor(np.where(MASK, TOKENS, 0)).long(), attention_mask=torch.tensor(MASK).long(), num_beams=beams,
    max_new_tokens=12, do_sample=False, early_stopping=False, **given,
  )  # fmt: skip


@pytest.mark.parametrize("beams", [1, 3])
def test_a_first_token_may_be_forced(beams, tmp_path):
  """By the folder's settings of generation, in a folder that is written again, and by the call."""
  torch.manual_seed(3)
  net = transformers.MBartForConditionalGeneration(transformers.MBartConfig(**NETS["MBart"])).eval()
  net.generation_config.forced_bos_token_id = 7
  net.save_pretrained(tmp_path / "in")
  model, params, _ = load_folder(tmp_path / "in")
  save_folder(model, params, tmp_path / "out")
  again, _, _ = load_folder(tmp_path / "out")
  assert model.config.first == again.config.first == 7
  said = json.loads((tmp_path / "in" / "generation_config.json").read_text())
  (tmp_path / "in" / "generation_config.json").write_text(
    json.dumps({**said, "decoder_start_token_id": None, "forced_bos_token_id": None})
  )
  assert load_folder(tmp_path / "in")[0].config == dataclasses.replace(model.config, first=None)
  for model_, given, theirs in ((model, {}, {}), (again, {"first": 9}, {"forced_bos_token_id": 9})):
    found = beam_search(model_, params, TOKENS, 12, MASK, beams, **given)
    with torch.no_grad():
      rows = generated(net, beams, **theirs)[:, 1:].tolist()
    for ours, row in zip(found, rows, strict=True):
      assert ours.tokens[0] == given.get("first", 7)
      assert ours.tokens == row[: len(ours.tokens)] and set(row[len(ours.tokens) :]) <= {0, 1}
  assert [found.tokens for found in beam_search(model, params, TOKENS, 12, MASK, beams, first=1)] == [[1]] * 3
  for outside in (29, -1):
    with pytest.raises(ValueError, match=rf"first={outside}\): the vocabulary has 29 tokens"):
      beam_search(model, params, TOKENS, 12, MASK, beams, first=outside)


@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), (2, 1.0), (4, 1.0), (3, 0.5), (3, 2.0)])
def test_equals_transformers(pair, beams, penalty):
  """The same tokens; padding on the right of the source changes nothing."""
  net, model, params = pair
  found = beam_search(model, params, TOKENS, 12, MASK, beams, penalty)
  with torch.no_grad():
    theirs = generated(net, beams, length_penalty=penalty)
  for ours, row in zip(found, theirs[:, 1:].tolist(), strict=True):
    row = row[: row.index(1) + 1] if 1 in row else row
    assert ours.tokens == row[: len(ours.tokens)] and set(row[len(ours.tokens) :]) <= {0}
  alone = beam_search(model, params, TOKENS[2:, :4], 12, None, beams, penalty)[0]
  assert alone.tokens == found[2].tokens and alone.score == pytest.approx(found[2].score, abs=1e-4)


def test_the_search_ends_at_different_lengths(pair):
  """The comparison above would say little if nothing ended before the limit."""
  lengths = {len(found.tokens) for found in beam_search(*pair[1:], TOKENS, 12, MASK, 4)}
  assert min(lengths) < 12


def test_cached_steps_equal_the_whole(pair):
  _, model, params = pair
  from lmcompress.generation.cache import init_cache

  written = TOKENS[:, 5:11]
  whole = np.asarray(model.apply(params, TOKENS, attention_mask=MASK, decoder_input_ids=written))
  state = model.encode(params, TOKENS, init_cache(model, params, 3, 16), MASK)
  for i in range(written.shape[1]):
    logits, state = model.decode(params, written[:, i : i + 1], state)
    np.testing.assert_allclose(logits, whole[:, i], atol=1e-4)


def test_texts_in_batches(pair):
  model = T5(T5Config(head_dim=8), T5Sizes(vocab=264, embed=16, mlp=16, layers=1, decoder_layers=1, heads=2))
  params = model.init(jax.random.key(0))
  texts = ["a wolf", "the king had three sons", "a", "dummling was the youngest of them"]
  together = rewrite(model, params, byte_level(), texts, 6, beams=2, batch=3)
  assert together == [rewrite(model, params, byte_level(), [text], 6, beams=2, batch=1)[0] for text in texts]


@pytest.mark.parametrize(("given", "said"), [
  ({"max_new_tokens": 0}, "at least 1"), ({"beams": 0}, "at least 1"), ({"max_new_tokens": 5000}, "model's context"),
])  # fmt: skip
def test_settings_out_of_range(pair, given, said):
  with pytest.raises(ValueError, match=said):
    beam_search(*pair[1:], TOKENS, **{"max_new_tokens": 4, **given})


def test_a_decoder_alone_is_refused(tiny):
  with pytest.raises(WeightError, match="Llama has no encoder"):
    beam_search(*tiny, TOKENS, 4)


def test_a_decoder_without_its_tokens(pair):
  with pytest.raises(WeightError, match="takes decoder_input_ids"):
    pair[1].apply(pair[2], TOKENS)
