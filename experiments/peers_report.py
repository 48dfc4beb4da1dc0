"""The result of `peers.py` as tables and as a plot."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SPEEDS = ("prefill", "decode", "decode8")
"""Reading the prompt, and writing one or eight sequences after it."""


def spread(values: Sequence[float]) -> dict[str, float]:
  """Median, quartiles and extremes."""
  low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
  return {"median": middle, "quartile_1": low, "quartile_3": high, "minimum": min(values), "maximum": max(values)}


def ratios(row: Mapping[str, Any], other: Mapping[str, Any], what: str) -> dict[str, float]:
  """How many times as fast `row` was as `other`, round by round."""
  pairs = zip(row["rounds"][what], other["rounds"][what], strict=True)
  return spread([a["rate"] / b["rate"] for a, b in pairs])


def show(result: Mapping[str, Any]) -> None:
  """The result as tables."""
  from rich.console import Console
  from rich.table import Table

  def cell(value: Mapping[str, float], form: str = ".1f") -> str:
    return f"{value['median']:{form}} [dim]({value['quartile_1']:{form}}-{value['quartile_3']:{form}})[/dim]"

  console = Console(width=None if sys.stdout.isatty() else 170)
  setting = f"{result['prefill']} tokens read, {result['decode']} written after them, {result['threads']} threads"
  table = Table(title=f"{result['model']}: {setting}; tokens/s, median (quartiles) of {result['rounds']} rounds")
  for column in ("", "activations", "KV", "prefill", "decode", "decode x8", "MB", "of bandwidth", "peak MB"):
    table.add_column(column, justify="left" if column in ("", "activations", "KV") else "right")
  for row in result["contenders"]:
    fraction = row["fraction_of_bandwidth"]
    table.add_row(
      f"{row['library']} {row['form']}",
      row["activations"],
      row["cache"],
      *(cell(row["tokens_per_s"][what], ".0f" if what == "prefill" else ".1f") for what in SPEEDS),
      f"{row['weight_bytes'] / 1e6:.0f}",
      "-" if fraction is None else f"{fraction:.0%}",
      f"{row['peak_bytes'] / 1e6:.0f}",
    )
  console.print(table)
  against = Table(title="times as fast, round by round: median (quartiles)")
  for column in ("", "as", *SPEEDS):
    against.add_column(column, justify="right" if column in SPEEDS else "left")
  for row in (row for row in result["contenders"] if row["library"] == "lmcompress"):
    for other in (o for o in result["contenders"] if o["library"] != "lmcompress" and o["bits"] == row["bits"]):
      against.add_row(row["name"], other["name"], *(cell(ratios(row, other, what), ".2f") for what in SPEEDS))
  if against.row_count:
    console.print(against)
  if result["bandwidth_gb_per_s"]:
    console.print(f"memory read: {cell(result['bandwidth_gb_per_s'])} GB/s")
  if result["others"]:
    others = result["others"]
    console.print(f"other processes: {others['median']:.0%} of the processors, at most {others['maximum']:.0%}")
  for row in result["contenders"]:
    console.print(f"[dim]{row['name']}:[/dim] {result['prompt']}", end="")
    console.print(json.dumps(row["continuation"], ensure_ascii=False)[1:-1], markup=False, highlight=False)
  for name, reason in result["left_out"].items():
    console.print(f"left out: {name}: {reason}", markup=False)


def plot(result: Mapping[str, Any], path: Path) -> None:
  """A panel for each speed, a bar for each contender, and what the memory would allow where one sequence is written."""
  from matplotlib.figure import Figure

  rows = sorted(result["contenders"], key=lambda row: (row["bits"], row["library"] != "lmcompress", row["name"]))
  libraries = sorted({row["library"] for row in rows}, key=lambda name: (name != "lmcompress", name))
  colour = {name: f"C{i}" for i, name in enumerate(libraries)}
  titles = {"prefill": "prefill", "decode": "decode, 1 sequence", "decode8": "decode, 8 sequences"}
  figure = Figure(figsize=(13, 1.2 + 0.32 * len(rows)), layout="constrained")
  for axis, what in zip(figure.subplots(1, len(SPEEDS), sharey=True), SPEEDS, strict=True):
    speeds = [row["tokens_per_s"][what] for row in rows]
    middle = [speed["median"] for speed in speeds]
    reach = [[s["median"] - s["quartile_1"] for s in speeds], [s["quartile_3"] - s["median"] for s in speeds]]
    axis.barh(range(len(rows)), middle, xerr=reach, color=[colour[row["library"]] for row in rows])
    if what == "decode" and result["bandwidth_gb_per_s"]:
      bandwidth = result["bandwidth_gb_per_s"]["median"] * 1e9
      roof = [bandwidth / row["bytes_per_token"] for row in rows]
      axis.plot(roof, range(len(rows)), "k|", markersize=9, label="memory bandwidth")
      axis.legend(fontsize=7)
    axis.set(title=titles[what], xlabel="tokens per second")
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
  figure.axes[0].invert_yaxis()
  figure.savefig(path, metadata={"Date": None})
