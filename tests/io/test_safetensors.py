"""safetensors: what is written reads back here and in the package; a bad file is refused in one way."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from lmcompress.io.safetensors import DTYPES, is_supported, layout, open_file, write
from lmcompress.types import FormatError

SHAPES = ((), (0,), (1,), (3,), (2, 5), (4, 0, 3), (2, 3, 4, 5))


def filled(code, shape, seed=0):
  """An array with random bits, so that every NaN and every sign of a dtype may stand in it."""
  dtype = np.dtype(DTYPES[code])
  count = int(np.prod(shape, dtype=int)) * dtype.itemsize
  raw = np.random.default_rng(seed).integers(0, 2 if code == "BOOL" else 256, count, np.uint8)
  return raw.view(dtype).reshape(shape)


def raw(array):
  return np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8).tobytes()


def build(header, nbytes=0, *, length=None):
  """A file byte by byte, so that it can say what no writer would; `header` is a table or raw text."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(nbytes)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


LIES = [
  (b"", "0 bytes are too few"),
  (b"1234567", "7 bytes are too few"),
  (build({}, length=3), "claims 3 bytes, the file has 10|not valid JSON"),
  (build({}, length=2**63), "claims 9223372036854775808 bytes"),
  (build({}, length=2**64 - 1), "claims 18446744073709551615 bytes"),
  (build(b"{"), "not valid JSON"),
  (build(b"\xff\xfe"), "not valid JSON"),
  (build(b""), "not valid JSON"),
  (build(b"[" * 100_000), "not valid JSON"),
  (build(b'{"a":' * 50_000), "not valid JSON"),
  (build(b"[]"), "no JSON object"),
  (build(b"1" * 10_000), "not valid JSON"),
  (build(b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
         b'"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8), "duplicate keys"),
  (build({"x": 1}), "'x' has no dtype"),
  (build({"x": {"dtype": "F32", "shape": [2]}}), "'x' has no dtype, shape and data_offsets"),
  (build({"x": entry("F128")}, 8), "'x' has dtype 'F128'; known are F64"),
  (build({"x": entry(["F32"])}, 8), "'x' has dtype"),
  (build({"x": entry(None)}, 8), "'x' has dtype"),
  (build({"x": entry({})}, 8), "'x' has dtype"),
  (build({"x": {**entry(), "shape": "2"}}, 8), "'x' has shape"),
  (build({"x": entry(shape=(-2,))}, 8), "'x' has shape"),
  (build({"x": entry(shape=(2.0,))}, 8), "'x' has shape"),
  (build({"x": entry(shape=(True, 2))}, 8), "'x' has shape"),
  (build({"x": entry(shape=(1,) * 33)}, 8), "'x' has shape"),
  (build({"x": entry(shape=(2**60,))}, 8), "'x' has shape"),
  (build({"x": entry(shape=(2**47, 2**47))}, 8), "'x' takes 8 bytes, its shape"),
  (build({"x": entry(shape=(2**32, 2**32))}, 8), "'x' takes 8 bytes, its shape"),
  (build({"x": entry(shape=(3,))}, 8), "'x' takes 8 bytes, its shape .* needs 12"),
  (build({"x": entry(offsets=(0,))}, 8), "'x' has data_offsets"),
  (build({"x": entry(offsets=(0, 8, 8))}, 8), "'x' has data_offsets"),
  (build({"x": entry(offsets=(0, 8.0))}, 8), "'x' has data_offsets"),
  (build({"x": {**entry(), "data_offsets": None}}, 8), "'x' has data_offsets"),
  (build({"x": entry(offsets=(-8, 0))}, 8), "'x' ends at byte"),
  (build({"x": entry(offsets=(8, 0))}, 8), "'x' ends at byte"),
  (build({"x": entry(offsets=(0, 8))}, 7), "'x' ends at byte .*; the file is cut"),
  (build({"x": entry(offsets=(2**70, 2**70 + 8))}, 8), "'x' ends at byte"),
  (build({"x": entry(), "y": entry(offsets=(4, 12))}, 12), "tensors overlap"),
  (build({"x": entry(), "y": entry()}, 8), "tensors overlap"),
  (build({"n" * 10_000: 1}), "has no dtype"),
]


@pytest.fixture
def put(tmp_path):
  def put(content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return path
  return put


def refused(path, message):
  with pytest.raises(FormatError, match=message) as caught:
    open_file(path)
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("code", DTYPES)
def test_each_dtype_and_shape_reads_back(tmp_path, code):
  arrays = {f"x{i}": filled(code, shape, i) for i, shape in enumerate(SHAPES)}
  path = tmp_path / "model.safetensors"
  digests = write(path, arrays)
  file = open_file(path)
  for name, array in arrays.items():
    found = file.read(name)
    assert found.dtype == array.dtype and found.shape == array.shape and raw(found) == raw(array), name
    assert digests[name] == hashlib.sha256(raw(array)).hexdigest()
    assert is_supported(array.dtype)


def test_the_package_reads_what_is_written_here(tmp_path):
  arrays = {f"{code}.{i}": filled(code, shape, i) for code in DTYPES for i, shape in enumerate(SHAPES)}
  path = tmp_path / "model.safetensors"
  write(path, arrays)
  found = dict(safetensors.deserialize(path.read_bytes()))
  for name, array in arrays.items():
    assert found[name]["dtype"] == name.split(".")[0] and tuple(found[name]["shape"]) == array.shape
    assert bytes(found[name]["data"]) == raw(array), name
  with safetensors.safe_open(path, framework="np") as file:
    np.testing.assert_array_equal(file.get_tensor("F32.6"), arrays["F32.6"])


def test_what_the_package_writes_reads_here(tmp_path):
  arrays = {code: filled(code, (3, 5))
            for code in ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL")}
  path = tmp_path / "model.safetensors"
  save_file(arrays, path, metadata={"format": "pt"})
  file = open_file(path)
  assert set(file.entries) == set(arrays)
  for name, array in arrays.items():
    assert raw(file.read(name)) == raw(array)


def test_arrays_start_at_multiples_of_64_and_the_layout_is_foretold(tmp_path):
  arrays = {f"x{i}": np.ones(n, np.uint8) for i, n in enumerate([1, 63, 64, 65, 0, 7, 200])}
  head, size, spans = layout(arrays)
  path = tmp_path / "model.safetensors"
  digests = write(path, arrays)
  file = open_file(path)
  assert path.stat().st_size == size and path.read_bytes().startswith(head)
  assert digests[""] == hashlib.sha256(head).hexdigest()
  for name, (start, end) in spans.items():
    assert start % 64 == 0 and (file.entries[name].start, file.entries[name].end) == (start, end)
  covered = sorted((e.start, e.end) for e in file.entries.values())
  assert covered[0][0] == len(head) and covered[-1][1] == size
  assert all(a[1] == b[0] for a, b in itertools.pairwise(covered)), "the format admits no holes"


def test_jax_arrays_and_views_are_written(tmp_path):
  x = np.arange(24, dtype=np.float32).reshape(4, 6)
  path = tmp_path / "model.safetensors"
  write(path, {"jax": jnp.asarray(x), "view": x[::2, ::3], "turned": x.T,
               "half": jnp.asarray(x, jnp.bfloat16)})
  file = open_file(path)
  np.testing.assert_array_equal(file.read("jax"), x)
  np.testing.assert_array_equal(file.read("view"), x[::2, ::3])
  np.testing.assert_array_equal(file.read("turned"), x.T)
  np.testing.assert_array_equal(file.read("half").astype(np.float32), x)


def test_a_file_without_tensors_is_whole(tmp_path):
  path = tmp_path / "model.safetensors"
  write(path, {})
  assert open_file(path).entries == {}


def test_reading_copies_nothing(tmp_path):
  path = tmp_path / "model.safetensors"
  write(path, {"x": np.ones(1000, np.float32)})
  x = open_file(path).read("x")
  base = x
  while isinstance(base.base, np.ndarray):
    base = base.base
  assert isinstance(base, np.memmap) and x.ctypes.data % 64 == 0 and not x.flags.writeable


@pytest.mark.parametrize(("content", "message"), LIES, ids=range(len(LIES)))
def test_a_header_that_lies_is_refused(put, content, message):
  refused(put(content), message)


def test_a_message_stays_short(put):
  with pytest.raises(FormatError) as caught:
    open_file(put(build({"n" * 10**6: entry(shape=(3,) * 32)}, 8)))
  assert len(str(caught.value)) < 1000


def test_each_truncation_is_refused(tmp_path):
  path = tmp_path / "model.safetensors"
  write(path, {"a": np.ones(7, np.uint8), "b": np.ones((3, 3), np.float32)})
  whole = path.read_bytes()
  for length in range(len(whole)):
    path.write_bytes(whole[:length])
    with pytest.raises(FormatError, match=re.escape(str(path))):
      open_file(path)


def test_mutants_are_read_or_refused(tmp_path):
  """Bytes changed, cut, inserted, and values of the header replaced by what does not belong there."""
  path, rng = tmp_path / "model.safetensors", random.Random(0)
  write(path, {f"x{i}": filled(code, (3, 2), i) for i,
               code in enumerate(["F32", "BF16", "U8", "I64", "BOOL"])})
  whole = path.read_bytes()
  length = int.from_bytes(whole[:8], "little")
  header, data = json.loads(whole[8:8 + length]), whole[8 + length:]
  values = [None, True, -1, 0, 1, 2**31, 2**63, 2**70, 1.5, "", "F32", "U8", [], [0], [0, 0], [0, 2**50], {},
            "x" * 99]
  read, wrong = 0, []
  for n in range(600):
    if n % 2:
      mutant = bytearray(whole)
      for _ in range(rng.randint(1, 4)):
        at = rng.randrange(8 + length if rng.random() < 0.8 else len(mutant))
        kind = rng.randrange(4)
        if kind == 0:
          mutant[at] ^= rng.randint(1, 255)
        elif kind == 1:
          del mutant[at:at + rng.randint(1, 40)]
        elif kind == 2:
          mutant[at:at] = rng.choice([b"{", b"]", b",", b"0", b'"', b"\0", b"-", b"e9"])
        else:
          mutant[at:at + 1] = bytes(rng.choices(b'{}[]",:0123456789', k=3))
        if not mutant:
          break
      path.write_bytes(mutant)
    else:
      changed = json.loads(json.dumps(header))
      name = rng.choice(list(changed))
      field = rng.choice([None, "dtype", "shape", "data_offsets"])
      if field is None:
        changed[name] = rng.choice(values)
      elif rng.random() < 0.2:
        del changed[name][field]
      elif field != "dtype" and rng.random() < 0.5:
        changed[name][field][rng.randrange(len(changed[name][field]))] = rng.choice(values)
      else:
        changed[name][field] = rng.choice(values)
      path.write_bytes(build(changed) + data)
    try:
      file = open_file(path)
    except FormatError as error:
      assert str(path) in str(error)
      continue
    except Exception as error:
      wrong.append(repr(error))
      continue
    for found in file.entries:
      file.read(found)
    read += 1
  assert not wrong, f"{len(wrong)} mutants, such as {wrong[0]}"
  assert 0 < read < 500
