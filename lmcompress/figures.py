"""How every plot looks, and the plots that more than one page has."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444")  # Okabe and Ito
MARKERS = "osD^vPX"
LINES = ("-", "--", ":")

MAX_PERPLEXITY = 1e7
"""Worse is not drawn: an even guess over any vocabulary does better, and the scale would hide the rest."""


@contextlib.contextmanager
def style() -> Iterator[None]:
  """How every plot looks; not the reader's matplotlibrc, or equal results would give unequal bytes."""
  import matplotlib

  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(
      {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "axes.edgecolor": "#888888",
        "legend.frameon": False,
      }
    )
    yield


def figure_of(height: float) -> tuple[Figure, Axes]:
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8.6, height), layout="constrained")
  return figure, figure.subplots()


def legend(axes: Axes) -> None:
  axes.figure.legend(loc="outside right upper")


def log_if_wide(axes: Axes, which: str, values: Sequence[float], ratio: float, ticks: Iterable[float]) -> None:
  """A logarithmic axis with plain numbers at those of `ticks` in view, where the values span over `ratio`."""
  if max(values) > ratio * min(values):
    getattr(axes, f"set_{which}scale")("log")
    plain_ticks(getattr(axes, f"{which}axis"), ticks)


def plain_ticks(axis: Any, ticks: Iterable[float]) -> None:
  from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

  axis.set_major_locator(FixedLocator(list(ticks)))
  axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
  axis.set_minor_locator(NullLocator())


def number_points(axes: Axes, line: Sequence[tuple[int, float, float]], near: float = 0.03) -> None:
  """Writes each point's stage number beside it; points that would share a place share a label."""
  axes.autoscale_view()
  groups: list[tuple[list[int], Any]] = []
  for n, x, y in line:
    place = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
    beside = next((group for group, other in groups if max(abs(place - other)) < near), None)
    if beside is None:
      groups.append(([n], place))
    else:
      beside.append(n)
  positions = {n: (x, y) for n, x, y in line}
  for group, _ in groups:
    axes.annotate(
      ", ".join(map(str, group)),
      positions[group[0]],
      xytext=(5, 5),
      textcoords="offset points",
      fontsize=8,
      color="#333333",
    )


def svg(figure: Figure, salt: str) -> str:
  """The figure's `<svg>` element, without dates, addresses or ids that a second figure could share."""
  import io

  import matplotlib

  matplotlib.rcParams["svg.hashsalt"] = salt
  file = io.StringIO()
  figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
  element = file.getvalue()
  element = element[element.index("<svg") :]
  return re.sub(r'<g id="[^"]*"', "<g", element)


def drawn_at(bits: float, perplexity: float) -> bool:
  return 0 < bits < math.inf and 0 < perplexity < MAX_PERPLEXITY


def scatter(x: Any, y: Any, front: list[int], limit: float | None, xlabel: str, ylabel: str) -> str:
  """An SVG of points, those of a front joined, and a limit on x if there is one."""
  with style():
    figure, axes = figure_of(4.2)
    drawn = [i for i in range(len(x)) if drawn_at(float(x[i]), float(y[i]))]
    axes.scatter([x[i] for i in drawn], [y[i] for i in drawn], s=16, color=COLORS[1], label="measured")
    line = [i for i in front if i in drawn]
    axes.plot([x[i] for i in line], [y[i] for i in line], color=COLORS[0], marker="o", markersize=4, label="front")
    if limit is not None:
      axes.axvline(limit, color="0.5", linewidth=1, linestyle="--", label="budget")
    log_if_wide(axes, "y", [float(y[i]) for i in drawn], 10, [s * 10**n for n in range(8) for s in (1, 2, 5)])
    axes.set(xlabel=xlabel, ylabel=ylabel)
    legend(axes)
    return svg(figure, "pareto")
