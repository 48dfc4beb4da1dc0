"""A benchmark as a table in the terminal and as a roofline plot, from the dict that `evaluate.bench` returns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcompress.evaluate.roofline import attainable
from lmcompress.figures import COLORS, MARKERS, figure_of, legend, style, svg
from lmcompress.report import _table
from lmcompress.result_rows import Result, Row, formatted

if TYPE_CHECKING:
  from rich.table import Table


def table(found: Result, name: str) -> Table:
  """One row for each phase, length and batch; the caption says what ran and what the machine gives."""
  shown = _table(f"{name}, {found['model']['bits_per_weight']:.2f} bits per weight", _caption(found))
  for head in ("test", "batch"):
    shown.add_column(head, justify="left" if head == "test" else "right", no_wrap=True)
  for head in (
    "tokens/s",
    "least",
    "quartiles",
    "most",
    "first\ntoken ms",
    "MB read/\ntoken",
    "of band-\nwidth",
    "GFLOP/s",
    "of its\nbound",
    "J/token",
    "peak\nMB",
    "above\nJAX MB",
  ):
    shown.add_column(head, justify="right", no_wrap=True)
  for row in found["rows"]:
    rate = row["tokens_per_s"]
    shown.add_row(
      _test(row, found["decode"]),
      str(row["batch"]),
      formatted(rate["median"], 1),
      formatted(rate["minimum"], 1),
      f"{formatted(rate['lower_quartile'], 1)} - {formatted(rate['upper_quartile'], 1)}",
      formatted(rate["maximum"], 1),
      formatted(row.get("first_token_s"), 1, 1e-3),
      formatted(row["bytes_per_token"], 2, 1e6),
      f"{row['bandwidth_fraction']:.0%}",
      formatted(row["operations_per_s"], 1, 1e9),
      f"{row['roofline_fraction']:.0%}",
      formatted(row["joules_per_token"], 3),
      formatted(row["peak_memory_bytes"], 0, 1e6),
      formatted(row["above_runtime_bytes"], 0, 1e6),
    )
  return shown


def _test(row: Row, decode: int) -> str:
  return f"prefill {row['length']}" if row["phase"] == "prefill" else f"decode {decode} at depth {row['length']}"


def _caption(found: Result) -> str:
  m = found["machine"]
  energy = m["energy"]
  return "\n".join(
    (
      f"backend {m['backend']}; {m['threads']} threads; {m['activations']} activations; {m['cache']} keys and values",
      f"memory gives {m['bandwidth'] / 1e9:.1f} GB/s, a float32 product {m['peak'] / 1e9:.0f} GFLOP/s (measured); "
      + (f"energy {energy['label']}: {energy['source']}" if energy else "energy not known: state --watts"),
      f"medians of {found['rounds']} rounds; an empty JAX process holds {m['runtime_memory_bytes'] / 1e6:.0f} MB",
    )
  )


def write_roofline(found: Result, path: str | os.PathLike[str], name: str = "") -> None:
  """Writes the plot: what memory and arithmetic allow at each number of operations a byte, and what was reached."""
  path = Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    temporary.write_text(_XML + roofline_svg(found, name), encoding="utf-8")
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


_XML = '<?xml version="1.0" encoding="utf-8"?>\n'


def roofline_svg(found: Result, name: str = "") -> str:
  """The plot as an `<svg>` element."""
  m, rows = found["machine"], found["rows"]
  bandwidth, peak = m["bandwidth"], m["peak"]
  ridge = peak / bandwidth
  xs = [row["operations_per_byte"] for row in rows]
  low, high = min(*xs, ridge) / 3, max(*xs, ridge) * 3
  with style():
    figure, axes = figure_of(4.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    line: dict[str, Any] = {"color": "#444444", "linewidth": 1.4}
    corners = [low, ridge, high]
    axes.plot(corners, [attainable(x, bandwidth, peak) / 1e9 for x in corners], **line)
    axes.annotate(
      f"memory, {bandwidth / 1e9:.1f} GB/s",
      (low, low * bandwidth / 1e9),
      xytext=(4, 18),
      textcoords="offset points",
      fontsize=8,
      color="#444444",
    )
    axes.annotate(
      f"float32 product, {peak / 1e9:.0f} GFLOP/s",
      (high, peak / 1e9),
      xytext=(-4, 4),
      textcoords="offset points",
      ha="right",
      fontsize=8,
      color="#444444",
    )
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    labels = set()
    for row in rows:
      label = f"{row['phase']}, batch {row['batch']}"
      axes.plot(
        [row["operations_per_byte"]],
        [row["operations_per_s"] / 1e9],
        linestyle="",
        marker=MARKERS[batches.index(row["batch"]) % len(MARKERS)],
        color=COLORS[0 if row["phase"] == "prefill" else 1],
        label=label if label not in labels else None,
        markersize=6,
      )
      labels.add(label)
      axes.annotate(
        str(row["length"]),
        (row["operations_per_byte"], row["operations_per_s"] / 1e9),
        xytext=(6, -9),
        textcoords="offset points",
        fontsize=7,
        color="#333333",
      )
    axes.set(xlabel="operations a byte read", ylabel="GFLOP/s")
    axes.set_title(f"{name}: {m['backend']}, {m['activations']} activations, {m['cache']} keys and values".lstrip(": "))
    legend(axes)
    return svg(figure, "roofline")
