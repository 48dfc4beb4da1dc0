"""What the tests of formats share."""

from __future__ import annotations

import weakref

import pytest

from lmcompress.io import names


@pytest.fixture
def reads(monkeypatch):
  """Counts lazy reads: `reads["all"]`, and `reads["alive"]`, the most foreign tensors that were there at once."""
  alive, counts, lazily = [], {"all": 0, "alive": 0}, names.lazily

  def counted(name, read, shape):
    def once():
      found = read()
      alive.append(weakref.ref(found))
      counts["all"] += 1
      counts["alive"] = max(counts["alive"], sum(ref() is not None for ref in alive))
      return found

    return lazily(name, once, shape)

  monkeypatch.setattr(names, "lazily", counted)
  return counts
