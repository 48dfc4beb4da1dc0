"""Recurrent encoder-decoders against torch's GRU and LSTM, a token at a time against all at once, and their file."""

from __future__ import annotations

import io
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lmcompress as lmc
from lmcompress import tree
from lmcompress.data.tokenizer import PairTokenizer, Tokenizer
from lmcompress.generation.cache import init_cache
from lmcompress.generation.seq2seq import beam_search, rewrite
from lmcompress.io import checkpoint, npz_model
from lmcompress.io.names import check_shapes
from lmcompress.models import Seq2Seq, Seq2SeqSizes
from lmcompress.types import FormatError, Model, WeightError

SOURCE = np.random.default_rng(0).integers(0, 11, (3, 6)).astype(np.int32)
WRITTEN = np.random.default_rng(1).integers(0, 13, (3, 5)).astype(np.int32)
MASK = np.asarray([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4])


def made(cell, layers=2, seed=0):
  model = Seq2Seq(sizes=Seq2SeqSizes(source=11, vocab=13, embed=9, units=7, layers=layers, cell=cell))
  params = model.init(jax.random.key(seed))
  # biases that matter
  return model, tree.map_leaves(lambda p, x: x + 0.3 * jnp.cos(jnp.arange(x.size)) if p.endswith("bias") else x, params)


def torch_logits(cell, params, length):
  """Torch's own recurrences, each source alone and without its padding."""
  params = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), params)
  kind, nets = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell], {}
  for side in ("encoder", "decoder"):
    nets[side] = kind(9, 7, 2, batch_first=True)
    with torch.no_grad():
      for i in range(2):
        layer = params[side]["layers"][str(i)]
        recurrent = layer["recurrent"].get("bias", torch.zeros_like(layer["input"]["bias"]))
        for theirs, ours in (("weight_ih", layer["input"]["kernel"].T), ("weight_hh", layer["recurrent"]["kernel"].T),
                             ("bias_ih", layer["input"]["bias"]), ("bias_hh", recurrent)):  # fmt: skip
          getattr(nets[side], f"{theirs}_l{i}").copy_(ours)
  found = []
  with torch.no_grad():
    for row, real in enumerate(length):
      state = nets["encoder"](params["embed"]["table"][SOURCE[row : row + 1, :real]])[1]
      hidden = nets["decoder"](params["decoder"]["embed"]["table"][WRITTEN[row : row + 1]], state)[0]
      found.append((hidden @ params["head"]["table"].T + params["head"]["bias"])[0].numpy())
  return np.stack(found)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_logits_equal_torch(cell):
  model, params = made(cell)
  ours = model.apply(params, SOURCE, attention_mask=MASK, decoder_input_ids=WRITTEN)
  np.testing.assert_allclose(ours, torch_logits(cell, params, MASK.sum(1)), atol=1e-5)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_token_at_a_time_and_all_at_once(cell):
  model, params = made(cell)
  want = model.apply(params, SOURCE, attention_mask=MASK, decoder_input_ids=WRITTEN)
  state = model.encode(params, SOURCE, init_cache(model, params, 3, 8), MASK)
  for n in range(WRITTEN.shape[1]):
    logits, state = model.decode(params, WRITTEN[:, n : n + 1], state)
    np.testing.assert_allclose(logits, want[:, n], atol=1e-6)


def test_the_search_is_that_of_all_continuations():
  """As many beams as there are texts of two tokens: the best of all."""
  model, params = made("gru", layers=1)
  found = beam_search(model, params, SOURCE[:1], 2, beams=13, stop_ids=())
  first = jax.nn.log_softmax(model.apply(params, SOURCE[:1], decoder_input_ids=np.asarray([[2]]))[0, -1])
  rows = np.stack([np.full(13, 2), np.arange(13)], 1).astype(np.int32)
  second = jax.nn.log_softmax(model.apply(params, np.repeat(SOURCE[:1], 13, 0), decoder_input_ids=rows)[:, -1])
  scores = np.asarray(first[:, None] + second)
  assert found[0].tokens == list(np.unravel_index(scores.argmax(), scores.shape))
  np.testing.assert_allclose(found[0].score, scores.max() / 2, atol=1e-5)


def test_is_a_model_and_taps_are_inputs():
  model, params = made("gru")
  assert isinstance(model, Model)
  check_shapes(model, params, "here")
  carry = model.start(params, {"tokens": SOURCE, "decoder_input_ids": WRITTEN})
  for block in model.blocks(params):
    given = carry["written"] if block.path == "decoder/layers/0" else carry["h"]
    carry, tapped = model.run(block, params, carry, taps=("input", "recurrent"))
    np.testing.assert_array_equal(tapped["input"], given)
    np.testing.assert_array_equal(tapped["recurrent"][:, 1:], carry["h"][:, :-1])


def test_what_is_refused():
  model, params = made("gru")
  with pytest.raises(WeightError, match="takes decoder_input_ids"):
    model.apply(params, SOURCE)
  with pytest.raises(ValueError, match="decoder_input_ids have 2 rows and tokens 3"):
    model.apply(params, SOURCE, decoder_input_ids=WRITTEN[:2])
  with pytest.raises(ValueError, match="513 tokens are longer than the model's context of 512"):
    model.apply(params, SOURCE, decoder_input_ids=np.zeros((3, 513), np.int32))
  with pytest.raises(ValueError, match="outside the vocabulary of 13"):
    model.apply(params, SOURCE, decoder_input_ids=WRITTEN + 9)
  with pytest.raises(ValueError, match=r"cell='rnn'\): 1 to 8 layers of gru or lstm"):
    Seq2Seq(sizes=Seq2SeqSizes(cell="rnn")).init(jax.random.key(0))


def arrays():
  """Random weights under the archive's names, of two units."""
  letters, sounds, rng = len(npz_model.LETTERS), len(npz_model.PHONEMES), np.random.default_rng(0)
  shapes = {"enc_emb": (letters, 4), "dec_emb": (sounds, 4), "fc_w": (sounds, 2), "fc_b": (sounds,)}
  for side in ("enc", "dec"):
    shapes |= {f"{side}_w_ih": (6, 4), f"{side}_w_hh": (6, 2), f"{side}_b_ih": (6,), f"{side}_b_hh": (6,)}
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_the_archive_and_the_saved_folder(tmp_path):
  path = tmp_path / "small.npz"
  np.savez(path, **arrays())
  model, params, tokenizer = lmc.load(path)
  assert tokenizer.encode("Né'b", add_special=True) == [16, 7, 1, 4, 2] and tokenizer.stop_ids == {3}
  said = rewrite(model, params, tokenizer, ["abc", "longer"], 6)
  assert all(set(text.split()) <= set(npz_model.PHONEMES) for text in said)
  compressed = lmc.compress(model, params, lmc.round_to_nearest(8, -1))[0]
  checkpoint.save(tmp_path / "saved", model, compressed, tokenizer)
  model, again, tokenizer = lmc.load(tmp_path / "saved")
  assert isinstance(tokenizer, PairTokenizer) and isinstance(tokenizer.target, Tokenizer)
  assert rewrite(model, again, tokenizer, ["abc"], 6) == rewrite(model, compressed, tokenizer, ["abc"], 6)
  (tmp_path / "saved" / "target_tokenizer.json").write_text("{}")
  with pytest.raises(FormatError, match=r"target_tokenizer\.json"):
    lmc.load(tmp_path / "saved")


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda a: a.pop("fc_b"), "no fc_b; a model here is g2p-en's"),
    (lambda a: a.update(more=a["fc_b"]), "more is no part of g2p-en's model"),
    (lambda a: a.update(fc_b=a["fc_b"].astype(np.float64)), r"fc_b is float64\[74\]"),
    (lambda a: a.update(fc_w=a["fc_b"]), r"fc_w is float32\[74\]"),
    (lambda a: a.update(dec_w_ih=a["dec_w_ih"][:, :3]), "decoder/layers/0/input/kernel"),
    (lambda a: a.update(enc_w_hh=np.zeros((0, 0), np.float32)), r"enc_w_hh is \[0, 0\]"),
    (lambda a: a.update(dec_w_hh=np.zeros((8, 2), np.float32)), r"dec_w_hh is \[8, 2\]"),
    (lambda a: a.update(enc_emb=a["enc_emb"][:5]), "5 letters in enc_emb; 29 are known"),
    (lambda a: a.update(fc_b=np.asarray([{}], object)), "no NumPy archive that can be read"),
  ],
)
def test_archives_that_are_refused(tmp_path, change, message):
  found = arrays()
  change(found)
  np.savez(tmp_path / "bad.npz", **found)
  with pytest.raises(FormatError, match=message):
    lmc.load(tmp_path / "bad.npz")


def test_archives_that_are_none_or_too_large(tmp_path):
  path = tmp_path / "bad.npz"
  np.savez(path, **arrays())
  whole = path.read_bytes()
  for some in (b"", b"\0" * 99, whole[:-30], whole[: len(whole) // 2]):
    path.write_bytes(some)
    with pytest.raises(FormatError, match="no NumPy archive that can be read"):
      lmc.load(path)
  packed = io.BytesIO()
  np.savez_compressed(packed, **arrays())
  flipped = bytearray(packed.getvalue())
  flipped[len(flipped) // 2] ^= 0xFF
  huge = io.BytesIO()
  np.lib.format.write_array_header_1_0(huge, {"descr": "<f4", "fortran_order": False, "shape": (10**14,)})
  for content in (bytes(flipped), archive_of(b"not an array"), archive_of(huge.getvalue() + b"1234")):
    path.write_bytes(content)
    with pytest.raises(FormatError, match="no NumPy archive that can be read"):
      lmc.load(path)
  path.write_bytes(archive_of(b"\0" * (65 << 20)))
  with pytest.raises(FormatError, match="unpacked are over the limit"):
    lmc.load(path)


def archive_of(member):
  packed = io.BytesIO()
  with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("fc_b.npy", member)
  return packed.getvalue()
