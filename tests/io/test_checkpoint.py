"""Checkpoints: a saved tree comes back to the bit, and nothing damaged, cut or foreign is read as if whole."""

from __future__ import annotations

import ast
import contextlib
import copy
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import safetensors as package
import yaml
from small_model import byte_level

import lmcompress as lmc
from lmcompress import ops, tree
from lmcompress.arrays import Int8PerToken, bitmap, clustered, low_rank, nm_mask, nm_sparse, with_act
from lmcompress.distributed import make_mesh
from lmcompress.evaluate.size import bytes_in_memory, sizes
from lmcompress.io import checkpoint, safetensors, yaml_text
from lmcompress.io.checkpoint import MANIFEST, WEIGHTS, tree_hash, weights_size
from lmcompress.io.leaves import describe
from lmcompress.models import Llama, LlamaConfig, Rope
from lmcompress.transforms.round_to_nearest import quantize_matrix
from lmcompress.types import CompressedArray, FormatError

ROUND = lmc.round_to_nearest
FORMS = {  # every form of leaf, one for each weight of a layer
  "embed": lmc.at("embed", ROUND(bits=8, group_size=-1)),
  "q": lmc.at("layers/*/attn/q", ROUND(bits=4, group_size=32, symmetric=False)),
  "k": lmc.at("layers/*/attn/k", ROUND(bits=3, group_size=48)),
  "v": lmc.at("layers/*/attn/v", ROUND(grid="nf4", group_size=32, scale_bits=8)),
  "o": lmc.at("layers/*/attn/o",
              ROUND(bits=4, group_size=32, symmetric=False, zero="real", scale_dtype="float32")),
  "gate": lmc.at("layers/0/mlp/gate", ROUND(grid="fp8_e4m3", group_size=-1)),
  "up": lmc.at("layers/0/mlp/up", ROUND(grid="mxfp4")),
  "down": lmc.at("layers/0/mlp/down", ROUND(grid="nvfp4")),
  "mask": lmc.at("layers/1/mlp/gate", lmc.magnitude(sparsity=0.5)),
  "mask first": lmc.at("layers/1/mlp/up", lmc.magnitude(pattern="2:4")),
  "then codes": lmc.at("layers/1/mlp/up", ROUND(bits=2, group_size=16, scale_dtype="float16")),
  "step": lmc.at("layers/1/mlp/down", ROUND(bits=8, step=2.0**-6)),
}
TOKENS = np.random.default_rng(0).integers(0, 257, (2, 12), np.int32)


@pytest.fixture(scope="module")
def dense():
  rope = Rope(kind="llama3", factor=8.0, original_length=64, factors=(1.0, 1.0, 2.0, 2.0, 3.0, 4.0, 5.5, 8.0))
  model = Llama(LlamaConfig(head_dim=16, rope=rope, max_length=256))
  return model, random_params(vocab=264, embed=64, mlp=128, kv=32)


def random_params(vocab, embed, mlp, kv):
  """A Llama's tree with two layers, drawn without a compiler."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jax.device_put(rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32))

  def linear(inputs, outputs):
    return {"kernel": draw(inputs, outputs), "bias": draw(outputs)}

  layers = {
    str(i): {
      "attn_norm": {"scale": draw(embed)}, "mlp_norm": {"scale": draw(embed)},
      "attn": {"q": linear(embed, embed), "k": linear(embed, kv), "v": linear(embed, kv),
               "o": linear(embed, embed)},
      "mlp": {"gate": linear(embed, mlp), "up": linear(embed, mlp), "down": linear(mlp, embed)},
    } for i in range(2)
  }
  return {"embed": {"table": draw(vocab, embed)}, "layers": layers, "final_norm": {"scale": draw(embed)}}


@pytest.fixture(scope="module")
def mixed(dense):
  """The model with a weight of every form."""
  model, params = dense
  params = lmc.compress(model, params, FORMS.values())[0]
  for name, make in MADE.items():
    path = f"layers/1/attn/{name}/kernel"
    params = tree.put(params, path, make(tree.get(dense[1], path)))
  return model, params


def int8(values):
  return quantize_matrix(values, bits=8, axis=-2)


MADE = {  # forms that no transform above makes
  "q": lambda w: with_act(nm_sparse(w, nm_mask(w, 2, 4, -2), 2, 4, -2, int8), Int8PerToken()),
  "k": lambda w: clustered((w > 0).astype(int), np.float32([-0.1, 0.1, 0.3]), 2, -2),
  "v": lambda w: bitmap(w, w > 0, -2, int8),
  "o": lambda w: low_rank(int8(w[:, :8]), w[:8], -2),
}


@pytest.fixture(scope="module")
def saved(mixed, tmp_path_factory):
  """A folder that no test changes."""
  folder = tmp_path_factory.mktemp("saved") / "model"
  lmc.save(folder, *mixed, byte_level(), recipe=[{"name": "round_to_nearest", "bits": 4}])
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  """A copy to damage."""
  return Path(shutil.copytree(saved, tmp_path / "model"))


def refused(folder, *words):
  with pytest.raises(FormatError) as caught:
    lmc.load(folder)
  for word in words:
    assert word in str(caught.value), str(caught.value)
  assert "\n" not in str(caught.value)


def logits(model, params):
  return np.asarray(model.apply(params, TOKENS))


def body_of(folder):
  return json.loads((folder / MANIFEST).read_bytes())["body"]


def sign(folder, body):
  """Writes a manifest whose digest is right, whatever it says."""
  text = canonical(body)
  whole = {"body": body, "digest": hashlib.sha256(text).hexdigest()}
  (folder / MANIFEST).write_bytes(canonical(whole) + b"\n")


def canonical(value):
  return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


# ------------------------------------------------------------------------------------- what comes back


@pytest.mark.slow
@pytest.mark.parametrize("which", ["dense", "mixed"])
def test_a_tree_comes_back_to_the_bit(request, tmp_path, which):
  model, params = request.getfixturevalue(which)
  path = lmc.save(tmp_path / "new" / "model", model, params)
  found_model, found, tokenizer = lmc.load(path)
  assert tokenizer is None and found_model.config == model.config and type(found_model) is type(model)
  assert jax.tree.structure(found) == jax.tree.structure(params)
  assert tree_hash(found) == tree_hash(params)
  chex.assert_trees_all_equal_shapes_and_dtypes(found, params)
  np.testing.assert_array_equal(logits(found_model, found), logits(model, params))
  assert weights_size(params) == (path / WEIGHTS).stat().st_size


def test_the_tokenizer_and_the_recipe_are_kept(saved):
  _, _, tokenizer = lmc.load(saved)
  assert tokenizer.encode("a b") == byte_level().encode("a b") and tokenizer.stop_ids == frozenset({0})
  assert body_of(saved)["recipe"] == [{"name": "round_to_nearest", "bits": 4}]
  assert {p.name for p in saved.iterdir()} == {MANIFEST, WEIGHTS, "tokenizer.json", "tokenizer_config.json"}


def test_saving_twice_gives_the_same_bytes(mixed, saved, tmp_path):
  again = lmc.save(tmp_path / "again", *mixed, byte_level(), recipe=[{"name": "round_to_nearest", "bits": 4}])
  for path in saved.iterdir():
    assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_the_hash_sees_every_leaf_and_form(mixed):
  _, params = mixed
  hashes = {tree_hash(params)}
  for path, leaf in tree.flatten(params).items():
    arrays, form = jax.tree.flatten(leaf)
    for i, x in enumerate(arrays):
      flipped = np.array(x)
      flipped.reshape(-1).view(np.uint8)[-1] ^= 1
      hashes.add(tree_hash(tree.put(params, path, form.unflatten([*arrays[:i], flipped, *arrays[i + 1:]]))))
  hashes.add(tree_hash({**params, "other": params["final_norm"]}))
  assert len(hashes) == 2 + len(jax.tree.leaves(params))


@pytest.mark.slow
@pytest.mark.parametrize("links", [
  [ROUND(bits=4, group_size=64, symmetric=False), lmc.at("embed", ROUND(bits=8, group_size=-1))],
  [lmc.magnitude(sparsity=0.5), ROUND(bits=3, group_size=128),
   lmc.at("embed", ROUND(grid="nf4", scale_bits=8))],
], ids=["int4-g64", "masked-int3"])
def test_the_file_is_as_large_as_the_bits_say(tmp_path, links):
  """At most 2 % more: header and padding, at a size where they are not all there is."""
  model = Llama(LlamaConfig(head_dim=32))
  small, _ = lmc.compress(model, random_params(vocab=1000, embed=256, mlp=512, kv=256), links)
  path = lmc.save(tmp_path / "model", model, small) / WEIGHTS
  size, stored = path.stat().st_size, sizes(small)["nbits"] / 8
  assert size == weights_size(small)
  assert stored <= size <= 1.02 * stored


def test_the_safetensors_package_reads_the_weights(mixed, saved):
  _, arrays = describe(mixed[1])
  found = dict(package.deserialize((saved / WEIGHTS).read_bytes()))
  assert {name for name in found if not name.startswith(safetensors.PAD)} == set(arrays)
  for name, array in arrays.items():
    assert bytes(found[name]["data"]) == np.asarray(array).tobytes(), name
    assert tuple(found[name]["shape"]) == array.shape
  with package.safe_open(saved / WEIGHTS, framework="np") as file:
    np.testing.assert_array_equal(file.get_tensor("final_norm/scale"), mixed[1]["final_norm"]["scale"])


def test_every_array_starts_at_a_multiple_of_64(saved):
  whole = (saved / WEIGHTS).read_bytes()
  length = int.from_bytes(whole[:8], "little")
  for name, entry in json.loads(whole[8:8 + length]).items():
    if not name.startswith(safetensors.PAD):
      assert (8 + length + entry["data_offsets"][0]) % 64 == 0, name


def test_loading_makes_nothing_dense(dense, mixed, saved):
  """What is alive after `load` is what the tree stores, within 10 %."""
  lmc.load(saved)
  before = sum(x.nbytes for x in jax.live_arrays())
  model, params, _ = lmc.load(saved)
  after = sum(x.nbytes for x in jax.live_arrays())
  assert after - before <= 1.1 * sizes(params)["nbits"] / 8
  assert bytes_in_memory(params) < 0.5 * bytes_in_memory(dense[1])
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))
  assert isinstance(params["layers"]["0"]["attn"]["q"]["kernel"], CompressedArray)
  del model


def test_a_mesh_loads_the_same_bits_in_parts(mixed, saved):
  local = lmc.load(saved)[1]
  _, spread, _ = lmc.load(saved, make_mesh(data=1, tensor=8))
  chex.assert_tree_is_sharded(spread, devices=jax.devices())
  assert tree_hash(spread) == tree_hash(local) == tree_hash(mixed[1])
  up = spread["layers"]["0"]["mlp"]["up"]["kernel"]
  assert not up.codes.data.is_fully_replicated and not up.scale.is_fully_replicated
  assert up.codes.data.addressable_shards[0].data.nbytes * 8 == up.codes.data.nbytes
  down = spread["layers"]["0"]["mlp"]["down"]["kernel"]
  assert not down.codes.data.is_fully_replicated


def test_a_loaded_tree_computes_as_the_saved_one(mixed, saved):
  """Product by product, with the kernels that read the packed form."""
  _, found, _ = lmc.load(saved)
  x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
  for path in ("layers/0/attn/q/kernel", "layers/0/attn/v/kernel", "layers/0/mlp/up/kernel",
               "layers/1/mlp/up/kernel"):
    np.testing.assert_array_equal(ops.linear(x, tree.get(found, path)),
                                  ops.linear(x, tree.get(mixed[1], path)))


def test_a_tree_loaded_from_a_folder_can_be_saved_there(folder):
  model, params, tokenizer = lmc.load(folder)
  digest = tree_hash(params)
  lmc.save(folder, model, params, tokenizer)
  assert tree_hash(params) == digest == tree_hash(lmc.load(folder)[1])


# ---------------------------------------------------------------------------------------------- damage


def places(saved):
  """Offsets to flip in each file: all of its parts, and anywhere at random."""
  rng = random.Random(0)
  for path in sorted(saved.iterdir()):
    size = path.stat().st_size
    spots = {0, 1, 7, 8, size // 2, size - 2, size - 1, *(rng.randrange(size) for _ in range(60))}
    for at in sorted(spots):
      yield path.name, at
  for entry in safetensors.open_file(saved / WEIGHTS).entries.values():
    for at in {entry.start, (entry.start + entry.end) // 2, entry.end - 1}:
      yield WEIGHTS, at


def test_one_flipped_byte_in_any_file_is_refused(folder):
  """The message names the file, and the array where one is hit."""
  file = safetensors.open_file(folder / WEIGHTS)
  spans, rng, count = {name: (e.start, e.end) for name, e in file.entries.items()}, random.Random(1), 0
  del file
  for name, at in list(places(folder)):
    path = folder / name
    with path.open("r+b") as f:
      f.seek(at)
      byte = f.read(1)[0]
      f.seek(at)
      f.write(bytes([byte ^ rng.choice([1, 1 << rng.randrange(8), rng.randint(1, 255)])]))
    try:
      lmc.load(folder)
    except FormatError as error:
      hit = [n for n, (start, end) in spans.items() if name == WEIGHTS and start <= at < end]
      assert str(path) in str(error), (name, at, str(error))
      assert all(repr(n) in str(error) for n in hit), (name, at, str(error))
    else:
      pytest.fail(f"{name} with byte {at} flipped was read")
    with path.open("r+b") as f:
      f.seek(at)
      f.write(bytes([byte]))
    count += 1
  assert count > 400
  lmc.load(folder)


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, "tokenizer.json", "tokenizer_config.json"])
def test_each_file_cut_zeroed_extended_or_gone_is_refused(folder, name):
  path = folder / name
  whole = path.read_bytes()
  lengths = {0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 64, len(whole) - 1}
  for length in lengths & set(range(len(whole))):
    path.write_bytes(whole[:length])
    refused(folder, str(path))
  for tail in (b"\0", b"\n", b"{}", bytes(64)):
    path.write_bytes(whole + tail)
    refused(folder, str(path))
  path.write_bytes(bytes(len(whole)))
  refused(folder, str(path))
  path.unlink()
  refused(folder, "config.json" if name == MANIFEST else repr(name), str(folder))


def test_a_stretch_of_zeros_in_an_array_is_found(folder):
  """What a disk gives back after a crash: a page of zeros."""
  entry = safetensors.open_file(folder / WEIGHTS).entries["embed/table.codes.data"]
  with (folder / WEIGHTS).open("r+b") as f:
    f.seek(entry.start)
    f.write(bytes(512))
  refused(folder, str(folder / WEIGHTS), "'embed/table.codes.data'")


def test_a_file_too_many_is_refused(folder):
  (folder / "extra.bin").write_bytes(b"x")
  refused(folder, str(folder / "extra.bin"), "not part of this checkpoint")


def test_a_tokenizer_put_beside_a_checkpoint_without_one_is_refused(dense, saved, tmp_path):
  path = lmc.save(tmp_path / "model", *dense)
  shutil.copy(saved / "tokenizer.json", path)
  refused(path, str(path / "tokenizer.json"))


def test_a_folder_of_something_else_is_no_checkpoint(tmp_path):
  with pytest.raises(FormatError, match=r"manifest\.json: missing"):
    checkpoint.load_checkpoint(tmp_path)


def test_arrays_of_another_checkpoint_are_refused(dense, folder, tmp_path):
  other = lmc.save(tmp_path / "other", *dense)
  shutil.copy(other / WEIGHTS, folder / WEIGHTS)
  refused(folder, str(folder / WEIGHTS))


# ---------------------------------------------------------------------------------- manifests that lie


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../tokenizer.json", "sub/x", "C:\\x",
                                  "a\0b", "", ".", ".."])
def test_files_outside_the_folder_are_refused(folder, name):
  (folder.parent / "outside").write_bytes(b"x")
  body = body_of(folder)
  body["files"][name] = hashlib.sha256(b"x").hexdigest()
  sign(folder, body)
  refused(folder, "is missing")


def test_another_format_is_refused(folder):
  sign(folder, {**body_of(folder), "format": 2})
  refused(folder, str(folder / MANIFEST), "format 2, this version reads 1")


def test_another_architecture_is_refused(folder):
  body = body_of(folder)
  body["model"]["architecture"] = "mamba"
  sign(folder, body)
  refused(folder, str(folder / MANIFEST), "'mamba'", "llama")


NM, CLUSTERED, BITMAP, LOW_RANK = (f"layers/1/attn/{name}/kernel" for name in "qkvo")
Q, GATE, EMBED = "layers/0/attn/q/kernel", "layers/0/mlp/gate/kernel", "embed/table"
LIES = {
  "an unknown kind": lambda b: b["leaves"][Q].update(kind="Function"),
  "no kind": lambda b: b["leaves"][Q].pop("kind"),
  "a kind that is a list": lambda b: b["leaves"][Q].update(kind=["QuantizedArray"]),
  "a field too many": lambda b: b["leaves"][Q].update(more=1),
  "a field too few": lambda b: b["leaves"][Q].pop("scale"),
  "codes that are a number": lambda b: b["leaves"][Q].update(codes=3),
  "codes without bits": lambda b: b["leaves"][Q]["codes"].update(bits=0),
  "codes of strange bits": lambda b: b["leaves"][Q]["codes"].update(bits=9),
  "bits that are a text": lambda b: b["leaves"][Q]["codes"].update(bits="4"),
  "another axis": lambda b: b["leaves"][Q]["codes"].update(axis=-1),
  "an axis that is a text": lambda b: b["leaves"][Q]["codes"].update(axis="in"),
  "padding": lambda b: b["leaves"][Q]["codes"].update(pad=8),
  "an unknown table": lambda b: b["leaves"][Q].update(grid={"kind": "Table", "name": "nf5"}),
  "a table of nothing": lambda b: b["leaves"][Q].update(grid={"kind": "Table", "name": "x", "values": None}),
  "a grid's offset of nothing": lambda b: b["leaves"][Q]["grid"].update(offset=None),
  "a grid that is a number": lambda b: b["leaves"][Q].update(grid=4),
  "an unknown float": lambda b: b["leaves"][GATE].update(grid={"kind": "Float8", "name": "fp9"}),
  "a group of nothing": lambda b: b["leaves"][Q].update(group_size=0),
  "a group that is a text": lambda b: b["leaves"][Q].update(group_size="32"),
  "another group": lambda b: b["leaves"][Q].update(group_size=16),
  "an unknown dtype": lambda b: b["leaves"][Q].update(dtype="float128x"),
  "an array of another shape": lambda b: b["leaves"]["final_norm/scale"].update(shape=[32, 2]),
  "an array of another dtype": lambda b: b["leaves"]["final_norm/scale"].update(dtype="int32"),
  "an array that is not there": lambda b: b["leaves"]["final_norm/scale"].update(array="nothing"),
  "an array named by a list": lambda b: b["leaves"]["final_norm/scale"].update(array=["x"]),
  "padding as an array": lambda b: b["leaves"]["final_norm/scale"].update(array="_pad.1"),
  "another array": lambda b: b["leaves"][Q]["scale"].update(array="layers/0/attn/v/bias"),
  "another shape": lambda b: b["shapes"].update({Q: [64, 32]}),
  "a shape that is no list": lambda b: b["shapes"].update({Q: 64}),
  "a shape too few": lambda b: b["shapes"].pop(Q),
  "a shape too many": lambda b: b["shapes"].update({"layers/9/attn/q/kernel": [1, 1]}),
  "an act that is a number": lambda b: b["leaves"][NM].update(act=3),
  "an act that is a grid": lambda b: b["leaves"][NM].update(act=b["leaves"][Q]["grid"]),
  "an act with more": lambda b: b["leaves"][NM]["act"].update(more=1),
  "another axis of an act": lambda b: b["leaves"][NM].update(axis=-1),
  "an act within a mask": lambda b: b["leaves"]["layers/1/mlp/gate/kernel"].update(values=b["leaves"][NM]),
  "n of nothing": lambda b: b["leaves"][NM]["weight"].update(n=0),
  "more than m": lambda b: b["leaves"][NM]["weight"].update(n=4, m=2),
  "n beyond all": lambda b: b["leaves"][NM]["weight"].update(n=2**40, m=2**41),
  "a pattern that is a text": lambda b: b["leaves"][NM]["weight"].update(m="4"),
  "another pattern": lambda b: b["leaves"][NM]["weight"].update(n=1),
  "positions that are a number": lambda b: b["leaves"][NM]["weight"].update(indices=0),
  "positions along the outputs": lambda b: b["leaves"][NM]["weight"]["indices"].update(axis=-1),
  "values that are positions": lambda b: b["leaves"][NM]["weight"].update(values=b["leaves"][NM]["weight"]["indices"]),
  "a part's group of nothing": lambda b: b["leaves"][NM]["weight"]["values"].update(group_size=0),
  "a codebook that is a number": lambda b: b["leaves"][CLUSTERED].update(codebook=1.0),
  "a codebook for each row": lambda b: b["leaves"][CLUSTERED].update(codebook=b["leaves"][LOW_RANK]["right"]),
  "a codebook's dtype": lambda b: b["leaves"][CLUSTERED].update(dtype="float128x"),
  "bits that are values": lambda b: b["leaves"][BITMAP].update(bitmap=b["leaves"][BITMAP]["values"]),
  "values of other outputs": lambda b: b["leaves"][BITMAP].update(values=b["leaves"][LOW_RANK]["right"]),
  "a strange axis": lambda b: b["leaves"][LOW_RANK].update(axis=-3),
  "an axis that is true": lambda b: b["leaves"][LOW_RANK].update(axis=True),
  "another axis of the factors": lambda b: b["leaves"][LOW_RANK].update(axis=-1),
  "factors that do not fit": lambda b: b["leaves"][LOW_RANK].update(right=b["leaves"][LOW_RANK]["left"]),
  "a factor's scale": lambda b: b["leaves"][LOW_RANK]["left"].update(scale=b["leaves"][BITMAP]["values"]["scale"]),
  "a factor that is a number": lambda b: b["leaves"][LOW_RANK].update(left=2.0),
  "a leaf that is a number": lambda b: b["leaves"].update({Q: 3}),
  "a leaf that is nothing": lambda b: b["leaves"].update({Q: None}),
  "a leaf that is a list": lambda b: b["leaves"].update({Q: []}),
  "a leaf below a leaf": lambda b: (b["leaves"].update({f"{EMBED}/x": b["leaves"]["final_norm/scale"]}),
                                    b["shapes"].update({f"{EMBED}/x": [64]})),
  "leaves that are a list": lambda b: b.update(leaves=[]),
  "no leaves": lambda b: b.pop("leaves"),
  "no shapes": lambda b: b.pop("shapes"),
  "no files": lambda b: b.pop("files"),
  "files that are a list": lambda b: b.update(files=list(b["files"])),
  "no weights among the files": lambda b: b["files"].pop(WEIGHTS),
  "no arrays": lambda b: b.pop("arrays"),
  "arrays that are a list": lambda b: b.update(arrays=list(b["arrays"])),
  "an array too many": lambda b: b["arrays"].update(more="0" * 64),
  "no header": lambda b: b.pop("header"),
  "no model": lambda b: b.pop("model"),
  "a model that is a text": lambda b: b.update(model="llama"),
  "a model without a config": lambda b: b["model"].pop("config"),
  "an unknown setting": lambda b: b["model"]["config"].update(more=1),
  "a setting too few": lambda b: b["model"]["config"].pop("head_dim"),
  "a setting that is a text": lambda b: b["model"]["config"].update(head_dim="16"),
  "a length that is a text": lambda b: b["model"]["config"].update(max_length="long"),
  "heads that do not fit": lambda b: b["model"]["config"].update(head_dim=17),
  "heads of nothing": lambda b: b["model"]["config"].update(head_dim=0),
  "a rope that is a text": lambda b: b["model"]["config"].update(rope="linear"),
  "an unknown rope": lambda b: b["model"]["config"]["rope"].update(kind="spiral"),
  "a rope with more": lambda b: b["model"]["config"]["rope"].update(more=1),
  "a rope without factors": lambda b: b["model"]["config"]["rope"].pop("factors"),
  "factors that are texts": lambda b: b["model"]["config"]["rope"].update(factors=["x"]),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_signed_manifest_that_does_not_fit_is_refused(folder, lie):
  """Only a FormatError, whoever wrote it and however well it is signed."""
  body = body_of(folder)
  LIES[lie](body)
  sign(folder, body)
  refused(folder, str(folder))


@pytest.mark.parametrize("body", [None, [], 1, "x", {}, {"format": 1}, {"format": True}])
def test_a_signed_manifest_of_another_form_is_refused(folder, body):
  sign(folder, body)
  refused(folder, str(folder / MANIFEST))


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"a":' * 50_000,
                                  b"1" * 10_000,
                                  b'{"body": NaN, "digest": ""}', b'{"body": "\\ud800", "digest": ""}'])
def test_a_manifest_that_is_none_is_refused(folder, text):
  (folder / MANIFEST).write_bytes(text)
  refused(folder, str(folder / MANIFEST), "damaged")


def slots(node, path=()):
  """Every place of a JSON value."""
  items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
  for key, value in items:
    yield (*path, key)
    yield from slots(value, (*path, key))


@pytest.mark.slow
def test_signed_mutants_of_a_manifest_are_read_or_refused(folder):
  """Anything in any place of the body: FormatError or a tree, never another exception."""
  original, rng, wrong, read = body_of(folder), random.Random(0), [], 0
  everywhere = list(slots(original))
  short = [p for p in everywhere if p[0] not in ("arrays", "files")]
  values = [None, True, False, -1, 0, 1, 3, 2**31, 2**64, -2**70, 0.5, 1e308, "", "x", "../x", "int4", [],
            [0], [[]], {}, {"a": 1},
            {"kind": "Packed"}, {"array": "embed/table.codes.data"}]
  for _ in range(300):
    body = copy.deepcopy(original)
    for _ in range(rng.choice([1, 1, 2])):
      *parents, last = rng.choice(short if rng.random() < 0.9 else everywhere)
      node = body
      with contextlib.suppress(KeyError, IndexError, TypeError):
        for key in parents:
          node = node[key]
        if rng.random() < 0.2:
          del node[last]
        else:
          node[last] = copy.deepcopy(rng.choice(values))
    sign(folder, body)
    try:
      lmc.load(folder)
      read += 1
    except FormatError:
      pass
    except Exception as error:
      wrong.append(f"{type(error).__name__}: {error}"[:120])
  assert not wrong, f"{len(wrong)} of 300 mutants, such as {sorted(set(wrong))[:8]}"
  assert read < 150


# ---------------------------------------------------------------------------------------------- saving


def test_a_folder_with_foreign_files_is_not_touched(dense, tmp_path):
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(FileExistsError, match="another folder"):
    lmc.save(tmp_path, *dense)
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_foreign_files_beside_a_manifest_are_not_lost(dense, tmp_path):
  """`manifest.json` is a common name: a web app's folder is no checkpoint to replace."""
  (tmp_path / "app").mkdir()
  (tmp_path / "app" / MANIFEST).write_text('{"name": "my web app"}')
  (tmp_path / "app" / "thesis.tex").write_text("years of work")
  with pytest.raises(FileExistsError, match="another folder"):
    lmc.save(tmp_path / "app", *dense)
  assert (tmp_path / "app" / "thesis.tex").read_text() == "years of work"


def test_a_file_in_the_place_of_the_folder_is_not_touched(dense, tmp_path):
  (tmp_path / "model").write_text("mine")
  with pytest.raises(OSError, match="model"):
    lmc.save(tmp_path / "model", *dense)
  assert [p.name for p in tmp_path.iterdir()] == ["model"] and (tmp_path / "model").read_text() == "mine"


def test_an_empty_folder_is_filled(dense, tmp_path):
  lmc.load(lmc.save(tmp_path, *dense))


def test_an_old_checkpoint_is_replaced_as_a_whole(dense, folder):
  """The tokenizer of the old one does not stay behind."""
  lmc.save(folder, *dense)
  assert {p.name for p in folder.iterdir()} == {MANIFEST, WEIGHTS}
  assert [p.name for p in folder.parent.iterdir()] == ["model"]
  assert tree_hash(lmc.load(folder)[1]) == tree_hash(dense[1])


def test_a_damaged_checkpoint_can_be_saved_over(dense, folder):
  (folder / MANIFEST).write_bytes(b"{")
  lmc.save(folder, *dense)
  assert tree_hash(lmc.load(folder)[1]) == tree_hash(dense[1])


def test_a_full_disk_leaves_the_old_checkpoint(dense, folder, monkeypatch):
  def full(path, arrays):
    Path(path).write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  digest = tree_hash(lmc.load(folder)[1])
  with monkeypatch.context() as patched:
    patched.setattr(checkpoint.safetensors, "write", full)
    message = r"saving .*model failed: No space left on device; \d+ bytes are free"
    with pytest.raises(OSError, match=message) as caught:
      lmc.save(folder, *dense)
  assert caught.value.errno == errno.ENOSPC and str(folder) in str(caught.value)
  assert [p.name for p in folder.parent.iterdir()] == ["model"]
  assert tree_hash(lmc.load(folder)[1]) == digest
  lmc.save(folder, *dense)
  assert tree_hash(lmc.load(folder)[1]) == tree_hash(dense[1])


def test_a_real_limit_on_file_size_leaves_the_old_checkpoint(dense, folder):
  digest = tree_hash(lmc.load(folder)[1])
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    with pytest.raises(OSError, match=r"saving .*model failed: File too large; \d+ bytes are free"):
      lmc.save(folder, *dense)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert [p.name for p in folder.parent.iterdir()] == ["model"]
  assert tree_hash(lmc.load(folder)[1]) == digest


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), RuntimeError("device lost")])
def test_a_save_cut_off_leaves_nothing(dense, tmp_path, monkeypatch, error):
  def stop(path, arrays):
    Path(path).write_bytes(b"half")
    raise error

  monkeypatch.setattr(checkpoint.safetensors, "write", stop)
  with pytest.raises(type(error)):
    lmc.save(tmp_path / "model", *dense)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_rename_leaves_the_old_checkpoint(dense, folder, monkeypatch, failing):
  """The old checkpoint is put aside, then the new one takes its place; either step may fail."""
  digest, calls, rename = tree_hash(lmc.load(folder)[1]), [], os.rename

  def flaky(a, b):
    calls.append(a)
    if len(calls) == failing:
      raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    rename(a, b)

  with monkeypatch.context() as patched:
    patched.setattr(checkpoint.os, "rename", flaky)
    with pytest.raises(OSError, match="Permission denied"):
      lmc.save(folder, *dense)
  assert [p.name for p in folder.parent.iterdir()] == ["model"]
  assert tree_hash(lmc.load(folder)[1]) == digest


def test_what_cannot_be_stored_is_named_and_leaves_nothing(dense, tmp_path):
  model, params = dense
  with pytest.raises(ValueError, match=r"^final_norm/scale: arrays of complex64 cannot be stored"):
    lmc.save(tmp_path / "model", model, tree.put(params, "final_norm/scale", np.ones(64, np.complex64)))
  assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------- data is never code


EVENTS = ("exec", "compile", "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen",
          "socket.connect",
          "pickle.find_class", "import", "ctypes.dlopen")
_heard: list | None = None


def _listen(event, args):
  if _heard is not None and event in EVENTS:
    _heard.append((event, str(args)[:100]))


def test_loading_runs_nothing(saved):
  """No code is compiled or run, nothing imported, no process or connection started by what a folder says."""
  global _heard
  lmc.load(saved)  # what is imported at first use
  sys.addaudithook(_listen)
  _heard = []
  try:
    lmc.load(saved)
    heard = _heard
  finally:
    _heard = None
  assert heard == []


SOURCES = sorted(Path(lmc.__file__).parent.rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "runpy",
                     "code", "imp"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
FORBIDDEN_ATTRIBUTES = {
  ("torch", "load"), ("jnp", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("yaml", "load_all"),
  ("yaml", "UnsafeLoader"), ("yaml", "FullLoader"), ("yaml", "Loader"), ("os", "system"), ("os", "popen"),
}
FORBIDDEN_IMPORTERS = {"import_module", "spec_from_file_location", "module_from_spec", "SourceFileLoader",
                       "load_module"}


@pytest.mark.parametrize("path", SOURCES,
                         ids=lambda path: path.relative_to(Path(lmc.__file__).parent).as_posix())
def test_no_source_runs_what_it_reads(path):
  """No pickle, eval or unsafe loader, no import by a string but for the table in `lmcompress/__init__.py`."""
  root = path == Path(lmc.__file__)
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    where = f"{path.name}:{getattr(node, 'lineno', 0)}"
    if isinstance(node, ast.Import):
      assert not {name.name.split(".")[0] for name in node.names} & FORBIDDEN_MODULES, where
    elif isinstance(node, ast.ImportFrom):
      assert (node.module or "").split(".")[0] not in FORBIDDEN_MODULES, where
      assert not {name.name for name in node.names} & FORBIDDEN_IMPORTERS, where
    elif isinstance(node, ast.Name):
      assert node.id not in FORBIDDEN_CALLS, where
    elif isinstance(node, ast.Attribute):
      assert root or node.attr not in FORBIDDEN_IMPORTERS, where
      assert (ast.unparse(node.value), node.attr) not in FORBIDDEN_ATTRIBUTES, where
    elif isinstance(node, ast.keyword):
      on = isinstance(node.value, ast.Constant) and node.value.value is False
      assert node.arg not in ("allow_pickle", "trust_remote_code", "shell") or on, where
    if isinstance(node, ast.Call):
      call = ast.unparse(node.func)
      if call in ("np.load", "numpy.load"):
        assert any(k.arg == "allow_pickle" for k in node.keywords), where
      if call == "yaml.load":
        assert path.name == "yaml_text.py" and ast.unparse(node.args[1]) == "_Loader", where
  assert issubclass(yaml_text._Loader, yaml.SafeLoader)


def test_names_of_the_public_face_come_from_a_constant_table():
  """The one import by a string takes its module from a table that no input reaches."""
  calls = [node for node in ast.walk(ast.parse(Path(lmc.__file__).read_text("utf-8")))
           if isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module"]
  assert [ast.unparse(call.args[0]) for call in calls] == ["home"]
  assert all(home.startswith("lmcompress.") for home in lmc._HOMES.values())
  with pytest.raises(AttributeError, match="no attribute 'os'"):
    _ = lmc.os
