"""From canonical leaves to tiles: each form of weight laid out as the CPU kernels read it, one at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lmcompress.arrays.bitmap import BitmapArray
from lmcompress.arrays.clustered import ClusteredArray
from lmcompress.arrays.grids import Float8, Integer
from lmcompress.arrays.lattice import LatticeArray
from lmcompress.arrays.nm_sparse import NMSparseArray
from lmcompress.arrays.packing import Packed
from lmcompress.arrays.quantized import QuantizedArray
from lmcompress.arrays.sparse_form import all_codes
from lmcompress.arrays.tiled import BLOCK, LANES, Form, TiledArray, pack_tiles
from lmcompress.types import CompressedArray

_CHUNK = 1024
"""Outputs that are laid out at a time, so that no whole weight lies unpacked in memory."""
_VALUES = {"float32": "float32", "bfloat16": "bfloat16"}
_SPARE = 64
"""Entries past the last value of a bitmap, which a vector load may touch."""


class Unsupported(Exception):
  """A form that has no tiles, in a few words."""


def tile(leaf: Any, axis: int, activations: str) -> TiledArray:
  """Lays a leaf out in tiles.

  Args:
    leaf: a compressed array, or a bfloat16 array.
    axis: its contraction axis.
    activations: what inputs are rounded to: `float32`, `bfloat16`, `int8` or `int8_token` (integer codes only;
      others take float32 inputs).

  Raises:
    Unsupported: the kernels do not read this form.
    ValueError: a scale, a minimum or a codebook is not finite.
  """
  shape = leaf.shape
  if len(shape) > 2:
    return _stacked(leaf, axis, activations)
  inputs, outputs = (shape[0], shape[1]) if axis == -2 else (shape[1], shape[0])
  if not inputs or not outputs:
    raise Unsupported("a weight without entries")
  makers: dict[type, Callable[..., dict[str, Any]]] = {
    QuantizedArray: _quantized,
    ClusteredArray: _clustered,
    LatticeArray: _lattice,
    NMSparseArray: _n_of_m,
    BitmapArray: _bitmap,
  }
  if not isinstance(leaf, CompressedArray):
    if leaf.dtype != jnp.bfloat16:
      raise Unsupported(f"dense {leaf.dtype}")
    parts = _bfloat16(leaf, axis, inputs, outputs)
  elif type(leaf) in makers:
    parts = makers[type(leaf)](leaf, axis, inputs, outputs)
  else:
    raise Unsupported(leaf.kind)
  form: Form = parts["form"]
  activations = taken(form, activations)
  arrays = {name: parts.get(name) for name in ("codes", "index", "start", "scale", "zero", "minimum", "outer", "table")}
  for name in ("scale", "minimum", "outer"):
    if arrays[name] is not None and not np.isfinite(np.asarray(arrays[name], np.float32)).all():
      raise ValueError(f"a {name} is NaN or infinite; the kernels take finite ones")
  placed: dict[str, Any] = {name: None if x is None else jax.device_put(_aligned(x)) for name, x in arrays.items()}
  return TiledArray(
    **placed,
    form=form,
    pad=(parts["pad"], -outputs % LANES),
    axis=axis,
    source=leaf.kind if isinstance(leaf, CompressedArray) else str(leaf.dtype),
    activations=activations,
  )


def taken(form: Form, activations: str) -> str:
  """What products of a form round their inputs to, asked for `activations`: only integer codes meet integers."""
  return "float32" if activations.startswith("int8") and form.codes != "integer" else activations


def _stacked(leaf: Any, axis: int, activations: str) -> TiledArray:
  """Leading axes layer by layer."""
  if isinstance(leaf, BitmapArray):
    raise Unsupported("a stack of bitmaps, whose tiles differ in length")
  parts = [tile(jax.tree.map(lambda x, i=i: x[i], leaf), axis, activations) for i in range(leaf.shape[0])]
  return jax.tree.map(lambda *xs: jnp.stack(xs), *parts)


def _aligned(x: Any) -> np.ndarray:
  """A copy at a 64-byte boundary, which `device_put` takes as it is."""
  x = np.ascontiguousarray(x)
  if x.ctypes.data % 64 == 0:
    return x
  room = np.empty(x.nbytes + 64, np.uint8)
  start = -room.ctypes.data % 64
  out = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
  out[...] = x
  return out


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
  room = np.zeros(nbytes + 64, np.uint8)
  start = -room.ctypes.data % 64
  return room[start : start + nbytes].view(dtype).reshape(shape)


def _layout(group: int, inputs: int) -> tuple[int, int]:
  """How a group is laid out, and how many inputs that makes: 16, a multiple of 32, or -1 for a row."""
  if group == -1 or group >= inputs:
    return -1, -(-inputs // BLOCK) * BLOCK
  padded = 16 if group <= 16 else -(-group // BLOCK) * BLOCK
  total = -(-inputs // group) * padded if padded != group else inputs
  return padded, -(-total // BLOCK) * BLOCK


def _spread(rows: np.ndarray, group: int, padded: int, total: int) -> np.ndarray:
  """`[inputs, outputs]` with each group padded with zeros, `[total, outputs]`."""
  inputs, outputs = rows.shape
  if group != padded and padded != -1:
    groups = -(-inputs // group)
    whole = np.pad(rows, ((0, groups * group - inputs), (0, 0))).reshape(groups, group, outputs)
    rows = np.pad(whole, ((0, 0), (0, padded - group), (0, 0))).reshape(-1, outputs)
  return np.pad(rows, ((0, total - rows.shape[0]), (0, -outputs % LANES)))


def _codes(packed: Packed, bits: int, group: int, inputs: int, outputs: int) -> tuple[np.ndarray, int, int]:
  """Tiled codes, the layout of a group, and the inputs that the layout adds at the end."""

  def read(start: int, size: int) -> np.ndarray:
    part = np.asarray(_unpack(packed, start, size))
    return part if packed.axis == -2 else part.T

  return _laid_out(read, bits, group, inputs, outputs)


def _laid_out(
  read: Callable[[int, int], np.ndarray], bits: int, group: int, inputs: int, outputs: int
) -> tuple[np.ndarray, int, int]:
  """`_codes` of what `read(start, size)` gives: uint8 `[inputs, size]`, the codes of some outputs."""
  padded, total = _layout(group, inputs)
  data = _empty((-(-outputs // LANES), total // BLOCK, 64 * bits), np.uint8)
  for start in range(0, outputs, _CHUNK):
    part = read(start, min(_CHUNK, outputs - start))
    tiles = pack_tiles(_spread(part, group, padded, total), bits)
    data[start // LANES : start // LANES + tiles.shape[0]] = tiles
  if padded == -1 or padded == group:
    return data, padded, total - inputs
  return data, padded, total // padded * group - inputs


def _unpack_columns(packed: Packed, start: Any, size: int) -> jax.Array:
  return packed.columns(start, size).unpack()


_unpack = jax.jit(_unpack_columns, static_argnames=("size",))


def _per_output(x: Any, axis: int, groups: int, outputs: int, count: int) -> np.ndarray:
  """A part shaped as a scale, as `[tiles, count, 16]`; one value for all is written out."""
  x = np.asarray(x)
  x = x if axis == -2 else x.T
  x = np.broadcast_to(x, (groups if x.shape[0] > 1 else 1, outputs))
  if x.shape[0] < count:
    x = np.concatenate([x, np.broadcast_to(x[-1:], (count - x.shape[0], outputs))])
  x = np.pad(x, ((0, 0), (0, -outputs % LANES)), mode="edge")
  return np.ascontiguousarray(x.reshape(count, -1, LANES).transpose(1, 0, 2))


def _quantized(leaf: QuantizedArray, axis: int, inputs: int, outputs: int) -> dict[str, Any]:
  grid = leaf.grid
  group = leaf.group_size if leaf.scale.shape[axis] > 1 else -1
  parts: dict[str, Any] = {}
  data, padded, pad = _codes(leaf.codes, grid.bits, group, inputs, outputs)
  groups = leaf.scale.shape[axis]
  laid = data.shape[1] * BLOCK
  count = 1 if padded == -1 else 2 * data.shape[1] if padded == 16 else -(-laid // padded)
  per_output = lambda x: _per_output(x, axis, groups, outputs, count)  # noqa: E731
  outer_mode = 0
  scale = leaf.scale
  if isinstance(scale, QuantizedArray):
    outer_mode, parts["outer"] = _outer(scale, axis, groups, outputs, count)
    codes = np.asarray(scale.codes.unpack())
    if isinstance(scale.grid, Float8):
      codes = codes.view(ml_dtypes.float8_e4m3fn)
    parts["scale"] = per_output(codes)
    if leaf.minimum is not None:
      raise Unsupported("quantized scales with real minimums")
  else:
    parts["scale"] = per_output(scale)
  if leaf.zero_point is not None:
    parts["zero"] = per_output(leaf.zero_point.unpack())
  if leaf.minimum is not None:
    parts["minimum"] = per_output(leaf.minimum)
    if parts["minimum"].dtype != parts["scale"].dtype:
      raise Unsupported(f"minimums in {leaf.minimum.dtype} beside scales in {leaf.scale.dtype}")
  if str(parts["scale"].dtype) not in ("float32", "float16", "bfloat16", "uint8", "float8_e8m0fnu", "float8_e4m3fn"):
    raise Unsupported(f"scales in {parts['scale'].dtype}")
  if isinstance(grid, Integer):
    affine = leaf.zero_point is not None or leaf.minimum is not None
    form = Form("integer", grid.bits, group, padded, 0 if affine else grid.offset, outer=outer_mode)
  else:
    parts["table"] = _table(grid.decode(jnp.arange(_entries(grid), dtype=jnp.uint8)), grid.bits)
    form = Form("table", grid.bits, group, padded, outer=outer_mode)
  return {**parts, "codes": data, "form": form, "pad": pad}


def _entries(grid: Any) -> int:
  return len(grid.values) if hasattr(grid, "values") else 2**grid.bits


def _table(values: Any, bits: int) -> np.ndarray:
  values = np.asarray(values, np.float32)
  return np.concatenate([values, np.zeros(2**bits - values.shape[0], np.float32)])


def _outer(scale: QuantizedArray, axis: int, groups: int, outputs: int, count: int) -> tuple[int, np.ndarray]:
  """How the scales of the scales lie, and they themselves: scale and minimum of each."""
  if isinstance(scale.grid, Float8) and scale.grid.name == "fp8_e4m3" and scale.scale.shape[-2:] == (1, 1):
    return 1, np.asarray(scale.scale, np.float32).reshape(1)
  if not isinstance(scale.grid, Integer) or scale.minimum is None or scale.axis != -1 or scale.group_size != 256:
    raise Unsupported(f"scales in {scale.kind}")
  factor, shift = (np.asarray(x, np.float32) for x in (scale.scale, scale.minimum))
  if axis == -2:  # [groups, chunks of 256 outputs]
    pair = np.stack([factor, shift], axis=-1).transpose(1, 0, 2)
    return 2, np.concatenate([pair, np.repeat(pair[:, -1:], count - groups, axis=1)], axis=1)
  pair = np.stack([factor, shift], axis=1)  # [outputs, 2, chunks of 256 groups]
  need = -(-count // 256)
  pair = np.pad(pair, ((0, 0), (0, 0), (0, max(0, need - pair.shape[-1]))), "edge")[..., :need]
  pair = np.pad(pair, ((0, -outputs % LANES), (0, 0), (0, 0)), mode="edge")
  return 3, np.ascontiguousarray(pair.reshape(-1, LANES, 2, need).transpose(0, 3, 2, 1))


def _clustered(leaf: ClusteredArray, axis: int, inputs: int, outputs: int) -> dict[str, Any]:
  bits = leaf.codes.bits
  if leaf.books > 1:
    raise Unsupported(f"{leaf.books} codebooks")
  data, padded, pad = _codes(leaf.codes, bits, -1, inputs, outputs)
  codebook = np.asarray(leaf.codebook, np.float32).reshape(*leaf.shape[:-2], -1)
  if not np.isfinite(codebook).all():
    raise ValueError("a codebook entry is NaN or infinite; the kernels take finite ones")
  return {"codes": data, "table": _table(codebook, bits), "form": Form("table", bits, -1, padded), "pad": pad}


def _lattice(leaf: LatticeArray, axis: int, inputs: int, outputs: int) -> dict[str, Any]:
  """Points of the lattice are odd multiples of a quarter from -11 to 11: twelve codes with a scale and a minimum."""
  unit = LatticeArray(leaf.codes, jnp.ones_like(leaf.scale), axis, leaf.pad, leaf.group_size, "float32")

  def read(start: int, size: int) -> np.ndarray:
    part = np.asarray(_quarters(unit, start, size))
    return part if axis == -2 else part.T

  data, padded, pad = _laid_out(read, 4, leaf.group_size, inputs, outputs)
  groups, laid = leaf.scale.shape[axis], data.shape[1] * BLOCK
  count = 1 if padded == -1 else 2 * data.shape[1] if padded == 16 else -(-laid // padded)
  scale = _per_output(np.asarray(leaf.scale, np.float32), axis, groups, outputs, count)
  form = Form("integer", 4, leaf.group_size, padded, 0)
  return {"codes": data, "scale": scale / 2, "minimum": scale * np.float32(-11 / 4), "form": form, "pad": pad}


@functools.partial(jax.jit, static_argnames=("size",))
def _quarters(unit: LatticeArray, start: Any, size: int) -> jax.Array:
  return jnp.round((unit.columns(start, size) * 4 + 11) / 2).astype(jnp.uint8)


def _bfloat16(leaf: Any, axis: int, inputs: int, outputs: int) -> dict[str, Any]:
  blocks, tiles = -(-inputs // BLOCK), -(-outputs // LANES)
  data = _empty((tiles, blocks, 16, LANES, 2), ml_dtypes.bfloat16)
  whole = np.asarray(leaf)
  for start in range(0, outputs, _CHUNK):
    part = whole[:, start : start + _CHUNK] if axis == -2 else whole[start : start + _CHUNK].T
    part = np.pad(part, ((0, blocks * BLOCK - inputs), (0, -part.shape[1] % LANES)))
    part = part.reshape(blocks, 16, 2, -1, LANES).transpose(3, 0, 1, 4, 2)
    data[start // LANES : start // LANES + part.shape[0]] = part
  return {"codes": data, "form": Form("bfloat16", 16), "pad": blocks * BLOCK - inputs}


def _values(leaf: Any, axis: int) -> tuple[np.ndarray, str, int, np.ndarray | None]:
  """Kept values `[kept, outputs]`, their type, the offset of codes, and a scale for each output."""
  values = leaf.values
  if not isinstance(values, CompressedArray):
    if str(values.dtype) not in _VALUES:
      raise Unsupported(f"sparse values in {values.dtype}")
    x = np.asarray(values)
    return (x if axis == -2 else x.T), _VALUES[str(values.dtype)], 0, None
  if not isinstance(values, QuantizedArray) or not _int8_of_outputs(values):
    raise Unsupported(f"sparse values in {values.kind}; int8 with a scale for each output has tiles")
  grid: Any = values.grid
  codes = np.asarray(values.codes.unpack())
  outputs = codes.shape[1] if axis == -2 else codes.shape[0]
  scale = _per_output(values.scale, axis, 1, outputs, 1)
  return (codes if axis == -2 else codes.T), "uint8", grid.offset, scale


def _int8_of_outputs(values: QuantizedArray) -> bool:
  """Whether kept values are symmetric int8 with a scale for each output."""
  symmetric = values.zero_point is None and values.minimum is None
  plain = isinstance(values.grid, Integer) and values.grid.bits == 8 and not isinstance(values.scale, CompressedArray)
  return symmetric and plain and values.scale.shape[values.axis] == 1


def _n_of_m(leaf: NMSparseArray, axis: int, inputs: int, outputs: int) -> dict[str, Any]:
  n, m, values = leaf.n, leaf.m, leaf.values
  if isinstance(values, QuantizedArray) and values.minimum is None and not _int8_of_outputs(values):
    return _quantized(all_codes(leaf), axis, inputs, outputs)  # fewer bits than positions and bytes would take
  count = 16 * n // m if m and 16 % m == 0 else 0
  bits = max(1, (m - 1).bit_length())
  if count not in (4, 8, 12) or count * bits > 32:
    raise Unsupported(f"{n}:{m} sparsity; 1:4, 2:4, 3:4, 1:2, 2:8, 4:8, 4:16 and 8:16 have tiles")
  values, kind, offset, scale = _values(leaf, axis)
  positions = np.asarray(leaf.indices.unpack())
  positions = positions if axis == -2 else positions.T
  windows, tiles = -(-inputs // BLOCK) * 2, -(-outputs // LANES)
  short = ((0, windows * count - values.shape[0]), (0, -outputs % LANES))
  values = np.pad(values, short, constant_values=np.asarray(offset, values.dtype))
  positions = np.pad(positions, short).reshape(windows, count, tiles, LANES)
  values = values.reshape(windows, count, tiles, LANES).transpose(2, 0, 1, 3)  # [tiles, windows, count, 16]
  word = np.uint16 if count * bits <= 16 else np.uint32
  index = np.zeros((tiles, windows, LANES), word)
  for j in range(count):
    index |= (positions[:, j].transpose(1, 0, 2).astype(word)) << word(bits * j)
  if kind == "uint8":  # codes in fours: byte b of lane o is value 4 v + b of output o
    values = values.reshape(tiles, windows, count // 4, 4, LANES).swapaxes(-1, -2).reshape(tiles, windows, count, LANES)
  form = Form("n_of_m", 8 if kind == "uint8" else 16, offset=offset, n=n, m=m, value=kind)
  return {"codes": values, "index": index, "scale": scale, "form": form, "pad": windows * 16 - inputs}


def _bitmap(leaf: BitmapArray, axis: int, inputs: int, outputs: int) -> dict[str, Any]:
  values, kind, offset, scale = _values(leaf, axis)
  there = np.asarray(leaf.bitmap.unpack()) != 0
  there = there if axis == -2 else there.T
  padded, tiles = -(-inputs // BLOCK) * BLOCK, -(-outputs // LANES)
  rank = np.cumsum(there, axis=0) - 1
  there = np.pad(there, ((0, padded - inputs), (0, -outputs % LANES))).reshape(padded, tiles, LANES).transpose(1, 0, 2)
  masks = np.sum(there.astype(np.uint16) << np.arange(LANES, dtype=np.uint16), axis=-1, dtype=np.uint16)
  tile_of, input_of, lane = np.nonzero(there)  # in the order in which the kernel reads
  output = tile_of * LANES + lane
  kept = values[rank[input_of, output], output]
  start = np.concatenate([[0], np.cumsum(there.sum(axis=(1, 2)))]).astype(np.uint32)
  codes = np.concatenate([kept, np.zeros(_SPARE, kept.dtype)])
  form = Form("bitmap", 8 if kind == "uint8" else 16, offset=offset, value=kind)
  return {
    "codes": codes, "index": masks, "start": start, "scale": scale, "form": form, "pad": padded - inputs,
  }  # fmt: skip
