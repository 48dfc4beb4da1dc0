"""GGUF: tensors equal those of the gguf package bit by bit, and a bad file is refused in one way."""

from __future__ import annotations

import itertools
import os
import random
import re
import struct
import time

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants

from lmcompress.io import gguf as reader
from lmcompress.io.gguf import read_header, read_tensor
from lmcompress.types import FormatError

QUANTIZED = sorted(kind for kind in quants._type_traits if kind.name != "BF16")
WRITTEN = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"}
UINT8, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 4, 5, 6, 7, 8, 9, 10
F32, Q8_0 = 0, 8


def stored(kind, rng, shape=(6, 512)):
  """Weights as the file stores them, `[out, bytes]` uint8."""
  if kind.name in WRITTEN:
    return quants.quantize(rng.normal(size=shape).astype(np.float32), kind)
  block_size, block_nbytes = gguf.GGML_QUANT_SIZES[kind]
  return rng.integers(0, 256, (*shape[:-1], shape[-1] // block_size * block_nbytes), np.uint8)


def write(path, tensors, **metadata):
  """A file as the gguf package writes it; `tensors` maps names to an array or to (bytes, type)."""
  writer = GGUFWriter(path, "llama")
  for key, value in metadata.items():
    writer.add_array(key, value) if isinstance(value, list) else writer.add_string(key, value)
  for name, value in tensors.items():
    data, kind = value if isinstance(value, tuple) else (value, None)
    writer.add_tensor(name, data, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def bits(array):
  return np.ascontiguousarray(array, np.float32).view(np.uint32)


def string(text):
  raw = text if isinstance(text, bytes) else text.encode()
  return struct.pack("<Q", len(raw)) + raw


def key(name, code=UINT8, value=b"\0"):
  return string(name) + struct.pack("<I", code) + value


def array(code, count, values=b""):
  return struct.pack("<IQ", code, count) + values


def entry(name="w", extents=(32,), code=F32, offset=0):
  """A tensor's entry; `extents` as in the file, the fastest first."""
  dims = b"".join(struct.pack("<Q", extent) for extent in extents)
  return string(name) + struct.pack("<I", len(extents)) + dims + struct.pack("<IQ", code, offset)


def build(keys=(), entries=(), nbytes=0, *, version=3, n_keys=None, n_tensors=None, magic=b"GGUF",
          alignment=32):
  """A file byte by byte, so that it can say what no writer would."""
  counts = (len(entries) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
  head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(entries)
  return head + bytes(-len(head) % alignment) + bytes(nbytes)


@pytest.fixture
def put(tmp_path):
  def put(content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return path
  return put


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_a_quantized_tensor_equals_the_gguf_package_bit_by_bit(tmp_path, kind):
  rng = np.random.default_rng(0)
  tensors = {"a": (stored(kind, rng), kind), "b": (stored(kind, rng, (256,)), kind)}
  path = write(tmp_path / "model.gguf", tensors)
  header = read_header(path)
  assert header.tensors["a"].shape == (6, 512) and header.tensors["b"].shape == (256,)
  with np.errstate(all="ignore"):
    for tensor in GGUFReader(path).tensors:
      expected = quants.dequantize(tensor.data, kind)
      ours = read_tensor(header, tensor.name)
      assert ours.dtype == np.float32 and ours.shape == expected.shape
      np.testing.assert_array_equal(bits(ours), bits(expected))
      info = header.tensors[tensor.name]
      assert (info.type, info.offset, info.nbytes) == (kind, tensor.data_offset, tensor.n_bytes)


@pytest.mark.parametrize("dtype", ["f4", "f2", "f8", "i1", "i2", "i4", "i8"])
def test_a_plain_tensor_is_itself_as_float32(tmp_path, dtype):
  values = np.random.default_rng(0).normal(scale=40, size=(2, 3, 5)).astype(dtype)
  header = read_header(write(tmp_path / "model.gguf", {"w": values, "one": values[0, 0, :1]}))
  np.testing.assert_array_equal(read_tensor(header, "w"), values.astype(np.float32))
  np.testing.assert_array_equal(read_tensor(header, "one"), values[0, 0, :1].astype(np.float32))
  assert read_tensor(header, "w").flags.writeable


def test_bfloat16_is_the_upper_half_of_a_float32(tmp_path):
  values = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
  raw = quants.quantize(values, GGMLQuantizationType.BF16)
  header = read_header(write(tmp_path / "model.gguf", {"w": (raw, GGMLQuantizationType.BF16)}))
  expected = quants.dequantize(raw, GGMLQuantizationType.BF16)
  np.testing.assert_array_equal(bits(read_tensor(header, "w")), bits(expected))


@pytest.mark.parametrize(("code", "row_nbytes"), [(9, 40), (15, 292)], ids=["Q8_1", "Q8_K"])
def test_a_type_that_gguf_cannot_dequantize_is_named(put, code, row_nbytes):
  block_size, nbytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType(code)]
  header = read_header(put(build(entries=[entry("blk.0.w", (block_size,), code)], nbytes=nbytes)))
  with pytest.raises(FormatError, match=rf"blk\.0\.w.*{GGMLQuantizationType(code).name}.*convert"):
    read_tensor(header, "blk.0.w")


def test_metadata_equals_the_gguf_package(tmp_path):
  path = tmp_path / "model.gguf"
  writer = GGUFWriter(path, "llama")
  writer.add_uint8("u8", 200), writer.add_int8("i8", -5), writer.add_uint16("u16", 60000)
  writer.add_int16("i16", -30000), writer.add_uint32("u32", 1 << 31), writer.add_int32("i32", -7)
  writer.add_uint64("u64", (1 << 64) - 1), writer.add_int64("i64", -(1 << 62)), writer.add_float32("f32", 0.1)
  writer.add_float64("f64", 0.1), writer.add_bool("yes", True), writer.add_string("text", "naïve 🙂")
  writer.add_array("words", ["a", "", "中文"]), writer.add_array("scores", [0.5, -1.0])
  writer.add_array("types", [1, 3, 6]), writer.add_array("flags", [True, False])
  writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
  writer.close()
  metadata = read_header(path).metadata
  expected = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
  for name, value in metadata.items():
    assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected[name], name
  assert type(metadata["u32"]) is int and type(metadata["yes"]) is bool
  assert metadata["types"].dtype == np.int32


def test_version_2_and_an_alignment_are_read(put):
  keys = [key("general.alignment", UINT32, struct.pack("<I", 1024))]
  header = read_header(put(build(keys, [entry()], 128, version=2, alignment=1024)))
  assert header.tensors["w"].offset == 1024 and header.metadata == {"general.alignment": 1024}


def test_a_tensor_without_weights_is_empty(put):
  header = read_header(put(build(entries=[entry(extents=(32, 0)), entry("scalar", ())], nbytes=4)))
  assert read_tensor(header, "w").shape == (0, 32) and read_tensor(header, "scalar").shape == ()


HUGE = (1 << 64) - 1
REFUSED = {
  "magic": (build(magic=b"GGJT"), "starts with b'GGJT'"),
  "empty": (b"", "24 bytes, the file has 0"),
  "short": (b"GGUF\3\0\0\0", "the file has 8 bytes"),
  "version 1": (build(version=1), "version 1, versions 2 and 3"),
  "version 4": (build(version=4), "version 4, versions 2 and 3"),
  "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
  "tensor count": (build(n_tensors=(1 << 16) + 1), "65537 tensors, 65536 are allowed"),
  "huge tensor count": (build(n_tensors=HUGE), "tensors, 65536 are allowed"),
  "key count": (build(n_keys=(1 << 16) + 1), "65537 metadata keys, 65536 are allowed"),
  "missing keys": (build(n_keys=3), "is truncated"),
  "missing tensors": (build(n_tensors=3, alignment=1), "is truncated"),
  "string beyond the cap": (
    build([key("k", STRING, string(b"a" * ((1 << 20) + 1)))]), "1048577 bytes, 1048576 are allowed"),
  "string beyond the file": (build([key("k", STRING, struct.pack("<Q", 5000))]), "is truncated: a string of"),
  "huge string": (build([key("k", STRING, struct.pack("<Q", HUGE))]), f"{HUGE} bytes"),
  "string that is no UTF-8": (build([key("k", STRING, string(b"\xff\xfe"))]), "not UTF-8"),
  "value type": (build([key("k", 13)]), "'k' has value type 13"),
  "array beyond the cap": (build([key("k", ARRAY, array(UINT8, (1 << 24) + 1))]), "16777217 entries"),
  "huge array": (build([key("k", ARRAY, array(STRING, HUGE))]), "entries, 16777216 are allowed"),
  "array of numbers beyond the file": (build([key("k", ARRAY, array(UINT64, 1 << 24))]), "is truncated"),
  "array of strings beyond the file": (build([key("k", ARRAY, array(STRING, 1 << 24))]), "is truncated"),
  "array of arrays": (
    build([key("k", ARRAY, array(ARRAY, 1, array(UINT8, 1, b"\0")))]), "'k' is an array of arrays"),
  "array type": (build([key("k", ARRAY, array(99, 1, b"\0"))]), "'k' has value type 99"),
  "duplicate key": (build([key("k"), key("k")]), "'k' is there twice"),
  "alignment 0": (build([key("general.alignment", UINT32, struct.pack("<I", 0))]), "alignment is 0"),
  "alignment 48": (build([key("general.alignment", UINT32, struct.pack("<I", 48))]), "alignment is 48"),
  "alignment 128 KiB": (build([key("general.alignment", UINT32, struct.pack("<I", 1 << 17))]), "is 131072"),
  "alignment as text": (build([key("general.alignment", STRING, string("32"))]), "alignment is '32'"),
  "five dimensions": (build(entries=[entry(extents=(1,) * 5)], nbytes=4), "5 dimensions, 4 are allowed"),
  "huge dimension count": (build(entries=[string("w") + struct.pack("<I", 1 << 31)]), "4 are allowed"),
  "product beyond 64 bits": (build(entries=[entry(extents=(1 << 32, 1 << 32, 1 << 32))]), "is truncated"),
  "product that wraps to 0": (build(entries=[entry(extents=(1 << 32, 1 << 32))]), "is truncated"),
  "huge extent times 0": (build(entries=[entry(extents=(1 << 62, 0))]), "is truncated"),
  "tensor type": (build(entries=[entry(code=99)], nbytes=128), "type 99, which gguf does not know"),
  "removed tensor type": (build(entries=[entry(code=4)], nbytes=128), "type 4, which gguf does not know"),
  "row no multiple of a block": (
    build(entries=[entry(extents=(33,), code=Q8_0)], nbytes=68), "rows of 33 weights, Q8_0 needs"),
  "offset beyond the file": (build(entries=[entry(offset=1 << 40)], nbytes=128), "tensor 'w' ends"),
  "huge offset": (build(entries=[entry(offset=HUGE - 31)], nbytes=128), "is truncated"),
  "offset not aligned": (build(entries=[entry(offset=4)], nbytes=256), "not a multiple of 32"),
  "weights cut off": (build(entries=[entry()], nbytes=127), "byte 192, the file has 191 bytes; fetch"),
  "duplicate tensor": (build(entries=[entry(), entry(offset=128)], nbytes=256), "tensor 'w' is there twice"),
  "overlapping tensors": (build(entries=[entry(), entry("v", offset=96)], nbytes=256), "inside tensor 'w'"),
  "empty name": (build(entries=[entry("")], nbytes=128), "name that is empty"),
  "long name": (build(entries=[entry("w" * 256)], nbytes=128), "longer than 255 bytes"),
  "name with NUL": (build(entries=[entry("a\0b")], nbytes=128), "not printable"),
  "name that climbs": (build(entries=[entry("../../etc/x")], nbytes=128), "path out of its folder"),
  "absolute name": (build(entries=[entry("/etc/x")], nbytes=128), "path out of its folder"),
  "name with a drive": (build(entries=[entry("C:\\x")], nbytes=128), "path out of its folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_beyond_the_bounds_is_refused_and_named(put, case):
  content, message = REFUSED[case]
  path = put(content)
  with pytest.raises(FormatError, match=message) as caught:
    read_header(path)
  assert str(caught.value).startswith(str(path)) and len(str(caught.value)) < 1000


def test_a_small_file_that_claims_much_is_refused_at_once(put):
  path = put(build([key("k", ARRAY, array(STRING, 1 << 24, bytes(100)))]))
  start = time.perf_counter()
  with pytest.raises(FormatError, match="is truncated"):
    read_header(path)
  assert time.perf_counter() - start < 1


def test_what_is_no_file_is_refused(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  for name, message in (("absent", "No such"), (".", "not a regular file"), ("pipe", "not a regular file")):
    with pytest.raises(FormatError, match=f"cannot be read.*{message}"):
      read_header(tmp_path / name)


def test_an_unknown_tensor_and_a_file_that_shrank_are_named(put):
  path = put(build(entries=[entry()], nbytes=128))
  header = read_header(path)
  with pytest.raises(FormatError, match=re.escape(f"{path} has no tensor 'v'; it has 1, such as w")):
    read_tensor(header, "v")
  path.write_bytes(path.read_bytes()[:-64])
  with pytest.raises(FormatError, match="changed since"):
    read_tensor(header, "w")
  path.unlink()
  with pytest.raises(FormatError, match="changed since"):
    read_tensor(header, "w")


def mutants(content, seed, count):
  """Damaged copies: flipped bytes, a number replaced by an extreme one, an end cut off, a span moved."""
  rng = random.Random(seed)
  extremes = [0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 32, 1 << 62, HUGE - 31, HUGE]
  for index in range(count):
    mutant = bytearray(content)
    at = rng.randrange(len(mutant))
    if index % 4 == 0:
      del mutant[at:]
    elif index % 4 == 1:
      mutant[at:at + 8] = struct.pack("<Q", rng.choice(extremes))
    elif index % 4 == 2:
      mutant[at:at] = mutant[rng.randrange(len(mutant)):][:rng.randrange(1, 40)]
    else:
      for _ in range(rng.randint(1, 4)):
        mutant[rng.randrange(len(mutant))] = rng.randrange(256)
    yield bytes(mutant)


def test_mutants_are_read_or_refused_quickly(tmp_path):
  rng = np.random.default_rng(0)
  kinds = [GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q6_K, GGMLQuantizationType.IQ2_XS]
  tensors = {f"blk.{i}.w": (stored(kind, rng, (2, 256)), kind) for i, kind in enumerate(kinds)}
  path = write(tmp_path / "seed.gguf", {**tensors, "norm": rng.normal(size=8).astype(np.float32)},
               name="a model", words=["a", "bc", "def"], types=[1, 2, 3])
  outcomes = {True: 0, False: 0}
  # The head is where the reader decides; weights may hold any bytes.
  head = read_header(path).tensors["blk.0.w"].offset
  content = path.read_bytes()
  damaged_heads = (mutant + content[head:] for mutant in mutants(content[:head], 1, 400))
  for mutant in itertools.chain(mutants(content, 0, 100), damaged_heads):
    path.write_bytes(mutant)
    start = time.perf_counter()
    try:
      header = read_header(path)
      for name in header.tensors:
        assert read_tensor(header, name).shape == header.tensors[name].shape
      outcomes[True] += 1
    except FormatError as error:
      assert str(path) in str(error)
      outcomes[False] += 1
    assert time.perf_counter() - start < 1
  assert min(outcomes.values()) > 20, outcomes


def test_importing_the_reader_does_not_import_gguf():
  assert "gguf" not in vars(reader)
