"""A compression that was cut off goes on where it was, to the same bits; a model in files is gone through by blocks."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from small_model import random_params

import lmcompress as lmc
from lmcompress import tree
from lmcompress.arrays import StoredArray, fetch
from lmcompress.calibration import compress
from lmcompress.calibration.sequential import Streamed
from lmcompress.evaluate.size import sizes
from lmcompress.io import safetensors
from lmcompress.io.checkpoint import save, tree_hash
from lmcompress.io.store import Store
from lmcompress.models import Llama, LlamaConfig
from lmcompress.transforms import at, awq, chain, gptq, mixed_precision, rotate, round_to_nearest
from lmcompress.types import SourceError, WeightError

MODEL = Llama(LlamaConfig(head_dim=16, max_length=256))
CALIBRATION = np.random.default_rng(0).integers(0, 264, (8, 16)).astype(np.int32)
RECIPES = {
  "rounding": lambda: at("**/kernel", round_to_nearest(4, 32)),
  "gptq": lambda: chain(gptq(4, 32, error_propagation=0.5), at("embed", round_to_nearest(8, -1))),
  "awq": lambda: awq(4, 32),
  "planned": lambda: mixed_precision(4.6, (3, 4, 8), 32),
}


@pytest.fixture(scope="module")
def params():
  return random_params()


class Cut(Exception):
  pass


def cut_after(parts):
  """A progress callback that ends the run after so many parts."""

  def progress(name, done, total):
    nonlocal parts
    parts -= 1
    if parts == 0:
      raise Cut

  return progress


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("parts", [1, 3])
def test_a_run_that_was_cut_off_goes_on(params, tmp_path, name, parts):
  whole, report = compress(MODEL, params, RECIPES[name](), CALIBRATION)
  with pytest.raises(Cut):
    store = Store(tmp_path / "s", {"seed": 0})
    compress(MODEL, params, RECIPES[name](), CALIBRATION, store=store, progress=cut_after(parts))
  store, seen = Store(tmp_path / "s", {"seed": 0}), []
  done, again = compress(
    MODEL, params, RECIPES[name](), CALIBRATION, store=store, progress=lambda link, n, total: seen.append(n)
  )
  assert tree_hash(done) == tree_hash(whole)
  for a, b in zip(again.rows, report.rows, strict=True):
    assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
  store.clear()
  assert not (tmp_path / "s").exists()


def test_finished_parts_are_not_made_again(params, tmp_path, monkeypatch):
  store = Store(tmp_path / "s", {})
  compress(MODEL, params, gptq(4, 32), CALIBRATION, store=store)
  transform = gptq(4, 32)

  def never(done, state, evidence):
    assert not tree.weights(done).keys() - {"embed/table"}
    return done, state

  again, _ = compress(MODEL, params, transform._replace(apply=never), CALIBRATION, store=store)
  assert tree_hash(again) == tree_hash(compress(MODEL, params, transform, CALIBRATION)[0])


@pytest.mark.parametrize("harm", ["bytes", "note", "cut", "missing"])
def test_a_damaged_part_is_made_again(params, tmp_path, harm):
  store = Store(tmp_path / "s", {})
  whole, _ = compress(MODEL, params, gptq(4, 32), CALIBRATION, store=store)
  weights, note = (tmp_path / "s" / f"000-layers.1.{end}" for end in ("safetensors", "json"))
  data = bytearray(weights.read_bytes())
  data[-7] ^= 1
  {
    "bytes": lambda: weights.write_bytes(data), "note": lambda: note.write_text("{"),
    "cut": lambda: weights.write_bytes(data[:100]), "missing": note.unlink,
  }[harm]()  # fmt: skip
  assert tree_hash(compress(MODEL, params, gptq(4, 32), CALIBRATION, store=store)[0]) == tree_hash(whole)


def test_another_recipe_empties_a_store(params, tmp_path):
  compress(MODEL, params, gptq(4, 32), CALIBRATION, store=Store(tmp_path / "s", {"bits": 4}))
  assert list((tmp_path / "s").iterdir())
  Store(tmp_path / "s", {"bits": 3})
  assert not (tmp_path / "s").exists()


def test_a_folder_that_is_no_store_is_left_alone(tmp_path):
  (tmp_path / "thesis").mkdir()
  (tmp_path / "thesis" / "chapter.txt").write_text("one")
  with pytest.raises(FileExistsError, match="holds something that is no store"):
    Store(tmp_path / "thesis", {})
  assert (tmp_path / "thesis" / "chapter.txt").read_text() == "one"


# ------------------------------------------------------------------------- a model that stays in its files


@pytest.fixture(scope="module")
def folder(params, tmp_path_factory):
  """A Hugging Face folder in two shards, as bfloat16."""
  from lmcompress.io.architectures.llama import NAMES

  folder = tmp_path_factory.mktemp("hf")
  leaves = tree.flatten(params)
  theirs = {}
  for name in NAMES:
    for i in range(2):
      path = name.path.format(i=i)
      if path in leaves:
        x = np.asarray(leaves[path])
        theirs[name.hf.format(i=i)] = np.ascontiguousarray(x.T if path.endswith("kernel") else x)
  half = len(theirs) // 2
  parts = [dict(list(theirs.items())[:half]), dict(list(theirs.items())[half:])]
  index = {}
  for n, part in enumerate(parts):
    safetensors.write(folder / f"model-{n}.safetensors", part)
    index |= dict.fromkeys(part, f"model-{n}.safetensors")
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
  (folder / "config.json").write_text(json.dumps({
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 2,
    "max_position_embeddings": 256, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
  }))  # fmt: skip
  return folder


@pytest.mark.parametrize("name", RECIPES)
def test_in_files_as_in_memory(folder, tmp_path, name):
  """The same bits; leaves stay in files on the way in and on the way out, and what is saved is the same checkpoint."""
  model, whole, _ = lmc.load(folder)
  _, lazy, _ = lmc.load(folder, lazy=True)
  assert all(isinstance(leaf, StoredArray) for leaf in tree.weights(lazy).values())
  assert sizes(lazy)["bytes_in_memory"] == 5 * 64 * 4 and sizes(lazy)["nbits"] == sizes(whole)["nbits"]  # the norms
  a, report = compress(model, whole, RECIPES[name](), CALIBRATION)
  b, other = compress(model, lazy, RECIPES[name](), CALIBRATION, store=Store(tmp_path / "s", {}, mapped=True))
  if name != "planned":  # its first link is measured in memory, and blocks of it go to files when they are done
    assert all(isinstance(leaf, StoredArray) for leaf in tree.weights(b).values())
  assert tree_hash(tree.map_leaves(lambda path, leaf: fetch(leaf), b)) == tree_hash(a)
  assert [row["weight_error"] for row in report.rows] == [row["weight_error"] for row in other.rows]
  save(tmp_path / "a", model, a), save(tmp_path / "b", model, b)
  same = [(tmp_path / x / "weights.safetensors").read_bytes() for x in "ab"]
  assert same[0] == same[1]
  logits = Streamed(model).apply(b, CALIBRATION[:2])
  np.testing.assert_allclose(logits, model.apply(a, CALIBRATION[:2]), rtol=2e-4, atol=2e-4)


def test_what_needs_the_whole_model_says_so(folder, tmp_path):
  model, lazy, _ = lmc.load(folder, lazy=True)
  with pytest.raises(WeightError, match="rotate needs the whole model in memory"):
    compress(model, lazy, rotate(), key=jax.random.key(0))
  save(tmp_path / "saved", model, lmc.load(folder)[1])
  with pytest.raises(SourceError, match="only weights of Hugging Face folders"):
    lmc.load(tmp_path / "saved", lazy=True)
