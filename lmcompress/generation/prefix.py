"""Prefix reuse: the KV caches of prompts that were read, so that a prompt which begins alike reads only the rest."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lmcompress.generation.cache import KVCache
from lmcompress.generation.slots import Axes, cut, paste
from lmcompress.types import Params


@dataclasses.dataclass(frozen=True)
class _Entry:
  owner: int
  form: tuple[Any, ...]
  ids: np.ndarray
  piece: list[jax.Array]
  real: np.ndarray
  nbytes: int


@dataclasses.dataclass(frozen=True)
class Match:
  """The beginning of a prompt that is stored already.

  Attributes:
    tokens: how many of the prompt's tokens it holds.
    slots: how many slots they lie in (more than `tokens` where some are not real).
  """

  tokens: int = 0
  slots: int = 0
  entry: _Entry | None = None


class PrefixCache:
  """Keys and values of prompts already read, bounded by bytes; the least recently used goes first.

  Entries belong to the very parameters that made them and to the form of their cache (its dtype), so one prefix cache
  may serve several models; it holds on to their parameters until `clear`.

  Attributes:
    max_nbytes: bound on the bytes of all entries together.
    nbytes: bytes of the entries it holds.
    reused_tokens: tokens of prompts that were copied instead of read.
    read_tokens: tokens of prompts that were read.
  """

  def __init__(self, max_nbytes: int = 1 << 30):
    if max_nbytes < 1:
      raise ValueError(f"PrefixCache(max_nbytes={max_nbytes}): a positive number of bytes")
    self.max_nbytes = max_nbytes
    self.nbytes = self.reused_tokens = self.read_tokens = 0
    self._entries: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()
    self._owners: list[Params] = []

  def __len__(self) -> int:
    return len(self._entries)

  def clear(self) -> None:
    """Forgets every entry, and the parameters that they belong to."""
    self._entries.clear()
    self._owners.clear()
    self.nbytes = 0

  def find(self, params: Params, form: tuple[Any, ...], ids: Sequence[int]) -> Match:
    """The longest stored beginning of a prompt; at least one token is left to be read.

    Args:
      params: the parameters that are to read it.
      form: what must be alike for caches to be copied: their structure, dtypes and shapes but for the slots.
    """
    owner, row, best = self._owner(params), np.asarray(ids), Match()
    for entry in self._entries.values():
      if entry.owner != owner or entry.form != form:
        continue
      both = min(len(entry.ids), len(row) - 1)
      differ = np.flatnonzero(entry.ids[:both] != row[:both])
      tokens = int(differ[0]) if differ.size else both
      if tokens > best.tokens:
        best = Match(tokens, int(np.flatnonzero(entry.real)[tokens - 1]) + 1, entry)
    return best

  def load(self, cache: KVCache, row: int, match: Match, width: int, axes: tuple[Axes, ...]) -> KVCache:
    """Copies a match to the front of a sequence; `width` is at least `match.slots`. The cache is donated."""
    entry = match.entry
    if entry is None:
      return cache
    self._entries.move_to_end(self._name(entry))
    width = min(width, len(entry.real))
    real = entry.real[:width] & (np.arange(width) < match.slots)
    return paste(cache, row, entry.piece, real, axes, width)

  def store(
    self, params: Params, form: tuple[Any, ...], ids: Sequence[int], cache: KVCache, row: int, width: int,
    axes: tuple[Axes, ...],
  ) -> None:  # fmt: skip
    """Keeps a copy of the first `width` slots of a sequence, which hold exactly `ids`; makes room for it first.

    An entry that the new one begins with is dropped: whatever it could give, the new one can.
    """
    owner, row_ids = self._owner(params), np.asarray(ids)
    for name, entry in list(self._entries.items()):
      if entry.owner == owner and entry.form == form:
        both = min(len(entry.ids), len(row_ids))
        if not np.array_equal(entry.ids[:both], row_ids[:both]):
          continue
        if len(entry.ids) >= len(row_ids):
          self._entries.move_to_end(name)
          return
        self._drop(name)
    shapes = jax.eval_shape(lambda c: cut(c, 0, axes, width), cache)
    nbytes = sum(s.size * s.dtype.itemsize for s in shapes)
    if nbytes > self.max_nbytes:
      return
    while self.nbytes + nbytes > self.max_nbytes:
      self._drop(next(iter(self._entries)))
    real = np.array(cache.real[row, :width])
    entry = _Entry(owner, form, row_ids, cut(cache, row, axes, width), real, nbytes)
    self._entries[self._name(entry)] = entry
    self.nbytes += nbytes

  def _owner(self, params: Params) -> int:
    for i, known in enumerate(self._owners):
      if known is params:
        return i
    self._owners.append(params)
    return len(self._owners) - 1

  def _name(self, entry: _Entry) -> tuple[Any, ...]:
    return entry.owner, entry.form, entry.ids.tobytes()

  def _drop(self, name: tuple[Any, ...]) -> None:
    self.nbytes -= self._entries.pop(name).nbytes
