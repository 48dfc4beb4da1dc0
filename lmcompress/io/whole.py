"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
  """Writes a file; one that was there stays until the new one is on the disk."""
  partial = path.with_name(f".{path.name}.partial")
  try:
    with partial.open("w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except OSError:
    with contextlib.suppress(OSError):
      partial.unlink()
    raise
