"""A run's result as plots and tables read it: what is missing is empty, and what is no number shows as text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

Result = Mapping[str, Any]
Row = Mapping[str, Any]

LAYER = re.compile(r"^(?P<prefix>.*?)(?:^|/)layers/(?P<depth>\d+)/(?P<linear>.+)$")


def stages_of(result: Result) -> list[Row]:
  return list(result.get("stages") or [])


def history(result: Result) -> list[Row]:
  """A row for each step of a training; empty where there was none."""
  return list((result.get("training") or {}).get("history") or [])


def texts_of(stages: Iterable[Row], measure: str) -> list[str]:
  return list(dict.fromkeys(text for stage in stages for text in stage.get(measure) or {}))


def last_rows(result: Result) -> dict[str, Row]:
  """Each weight's latest row, by path: its state at the end of the run."""
  return {as_text(row.get("path", "-")): row for row in result.get("weights") or []}


def split_path(path: str) -> tuple[str, int | None]:
  """A weight's kind of linear and its layer.

  >>> split_path("layers/3/attn/q/kernel"), split_path("embed/kernel")
  (('attn/q', 3), ('embed', None))
  """
  path = path.removesuffix("/kernel")
  match = LAYER.match(path)
  if match is None:
    return path, None
  return "/".join(filter(None, (match["prefix"], match["linear"]))), int(match["depth"])


def are_images(task: Row) -> bool:
  return "recognised" in task


def as_text(value: Any) -> str:
  return "" if value is None else str(value).strip("\n")


def as_float(value: Any) -> float:
  try:
    return float(value)
  except (TypeError, ValueError):
    return math.nan


def formatted(value: Any, digits: int = 3, unit: float = 1) -> str:
  """A number in about six characters; `-` where there is none.

  >>> formatted(9.1234, 2), formatted(2e-5, 2), formatted(123456.7, 1), formatted(1e9, 1), formatted(None, 2)
  ('9.12', '2e-05', '123457', '1.0e+09', '-')
  """
  if value is None:
    return "-"
  number = as_float(value) / unit
  if not math.isfinite(number):
    return str(number)
  if 0 < abs(number) < 0.5 * 10**-digits:
    return f"{number:.0e}"
  if abs(number) >= 1e6:
    return f"{number:.1e}"
  return f"{number:.{0 if abs(number) >= 1000 else digits}f}"
