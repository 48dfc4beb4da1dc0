"""Plots of what matters and what changed, for `lmcompress explain` and the report of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmcompress.figures import COLORS, figure_of, legend, style, svg


def drawn(found: Mapping[str, Any]) -> dict[str, str]:
  """SVGs of what `importance.explained` found: layers, a map of each axis, drift by stage, and the text by token."""
  pictures = {"layers": _layers(found["layers"])} if found["layers"] else {}
  for axis in dict.fromkeys(axis for axes in found["entries"].values() for axis in axes):
    pictures[f"axis_{axis}"] = _map(found["entries"], axis)
  if found.get("drift"):
    pictures["drift"] = _drift(found["drift"])
  if found.get("tokens"):
    pictures["tokens"] = _tokens(found["tokens"])
  return pictures


def plots(found: Mapping[str, Any], folder: Path) -> list[Path]:
  """Writes the plots into a folder."""
  paths = []
  for name, picture in drawn(found).items():
    paths.append(folder / f"{name}.svg")
    paths[-1].write_text(picture, "utf-8")
  return paths


def _whole(axis: Any) -> None:
  """Ticks at whole numbers alone."""
  axis.get_major_locator().set_params(integer=True)


def _layers(lost: Mapping[str, float]) -> str:
  with style():
    figure, axes = figure_of(3.6)
    axes.bar(range(len(lost)), list(lost.values()), color=COLORS[0])
    _whole(axes.xaxis)
    axes.set(xlabel="block", ylabel="rise of the loss without it (nats a token)")
    return svg(figure, "layers")


def _map(entries: Mapping[str, Mapping[str, Any]], axis: str) -> str:
  """One row a block, the entries of each sorted, as shares of the block's sum."""
  rows = [np.sort(np.asarray(axes[axis], float).reshape(-1))[::-1] for axes in entries.values() if axis in axes]
  width = max(row.size for row in rows)
  grid = np.full((len(rows), width), np.nan)
  for i, row in enumerate(rows):
    grid[i, : row.size] = row / max(row.sum(), 1e-300)
  with style():
    figure, axes = figure_of(max(2.4, 0.16 * len(rows)))
    axes.grid(visible=False)
    picture = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(picture, label="share of the block")
    _whole(axes.xaxis)
    _whole(axes.yaxis)
    axes.set(xlabel=f"entries of {axis}, those that matter most first", ylabel="block")
    return svg(figure, axis)


def _drift(rows: list[Mapping[str, Any]]) -> str:
  blocks = list(dict.fromkeys(row["block"] for row in rows))
  with style():
    figure, axes = figure_of(3.6)
    for n, stage in enumerate(dict.fromkeys(row["stage"] for row in rows)):
      mine = [(blocks.index(row["block"]), row["change"]) for row in rows if row["stage"] == stage]
      axes.plot(*zip(*mine, strict=True), label=stage, color=COLORS[n % len(COLORS)], marker="o", markersize=3)
    _whole(axes.xaxis)
    axes.set(xlabel="block", ylabel="change of the stage's input, relative")
    legend(axes)
    return svg(figure, "drift")


def _tokens(rows: list[list[Any]]) -> str:
  """The divergence after each token, a line for each row of text."""
  with style():
    figure, axes = figure_of(max(2.4, 0.9 * len(rows)))
    for n, row in enumerate(rows):
      axes.plot([kl for _, kl in row], label=f"row {n}", color=COLORS[n % len(COLORS)], linewidth=0.8)
    axes.set(xlabel="token", ylabel="KL from the model before (nats)")
    legend(axes)
    return svg(figure, "tokens")
