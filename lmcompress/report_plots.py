"""The plots of a run's report, each an SVG, or nothing where the result has nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lmcompress.figures import (
  COLORS,
  LINES,
  MARKERS,
  drawn_at,
  figure_of,
  legend,
  log_if_wide,
  number_points,
  plain_ticks,
  style,
  svg,
)
from lmcompress.result_rows import (
  Result,
  Row,
  are_images,
  as_float,
  as_text,
  history,
  split_path,
  texts_of,
)

MAX_HISTOGRAMS = 24


def plots(result: Result, stages: Sequence[Row], weights: Mapping[str, Row]) -> tuple[str, ...]:
  """SVG of perplexity against size, errors against depth, the loss, weights' values, ROC and images; "" for none."""
  with style():
    errors = _plot_errors(weights, "weight"), _plot_errors(weights, "output")
    histograms = _plot_histograms(result.get("histograms") or {})
    loss, curves = _plot_training(history(result)), _plot_curves(stages)
    return _plot_quality(stages), *errors, loss, histograms, curves, _plot_images(stages)


def _plot_quality(stages: Sequence[Row]) -> str:
  lines = {text: [(n, x, y) for n, x, y in line if drawn_at(x, y)] for text, line in quality_lines(stages).items()}
  points = [point for line in lines.values() for point in line]
  if not points:
    return ""
  figure, axes = figure_of(4.2)
  for n, (text, line) in enumerate(lines.items()):
    axes.plot(
      [x for _, x, _ in line],
      [y for _, _, y in line],
      label=text,
      color=COLORS[n % len(COLORS)],
      marker=MARKERS[n % len(MARKERS)],
      markersize=5,
      linewidth=1.4,
    )
  log_if_wide(axes, "x", [x for _, x, _ in points], 4, (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 11, 16, 24, 32))
  values = [y for _, _, y in points]
  steps = (1, 2, 5) if max(values) < 1e3 * min(values) else (1,)
  log_if_wide(axes, "y", values, 10, [step * 10**n for n in range(8) for step in steps])
  axes.margins(0.08)
  for line in lines.values():
    number_points(axes, line)
  axes.set(xlabel="bits per weight", ylabel="perplexity")
  legend(axes)
  return svg(figure, "quality")


def quality_lines(stages: Sequence[Row]) -> dict[str, list[tuple[int, float, float]]]:
  """By text: stage, bits per weight and perplexity, where the text was scored."""
  return {
    text: [
      (n, as_float(stage.get("bits_per_weight")), as_float(stage["perplexity"][text]))
      for n, stage in enumerate(stages)
      if text in (stage.get("perplexity") or {})
    ]
    for text in texts_of(stages, "perplexity")
  }


def _plot_errors(weights: Mapping[str, Row], of: str) -> str:
  """The `weight` or the `output` error of each kind of linear by depth; '' where none was measured."""
  lines: dict[str, list[tuple[int, float]]] = {}
  for path, row in weights.items():
    linear, depth = split_path(path)
    error = as_float(row.get(f"{of}_error"))
    if depth is not None and math.isfinite(error):
      lines.setdefault(linear, []).append((depth, error))
  if not lines:
    return ""
  from matplotlib.ticker import MaxNLocator

  figure, axes = figure_of(max(3.6, 0.2 * len(lines)))
  for n, (linear, points) in enumerate(sorted(lines.items())):
    xs, ys = zip(*sorted(points), strict=True)
    axes.plot(
      xs,
      ys,
      label=linear,
      color=COLORS[n % len(COLORS)],
      marker=MARKERS[n % len(MARKERS)],
      markersize=3.5,
      linewidth=1.2,
      linestyle=LINES[n // len(COLORS) % len(LINES)],
    )
  axes.set(xlabel="layer", ylabel=f"relative {of} error")
  axes.set_ylim(0, 1.08 * max(error for points in lines.values() for _, error in points) or 1)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  legend(axes)
  return svg(figure, f"{of} errors")


def _plot_training(history: Sequence[Row]) -> str:
  losses = [(n, as_float(row.get("loss"))) for n, row in enumerate(history, 1)]
  drawn = [(n, loss) for n, loss in losses if math.isfinite(loss)]
  if not drawn:
    return ""
  figure, axes = figure_of(3.2)
  axes.plot([n for n, _ in drawn], [loss for _, loss in drawn], color=COLORS[0], linewidth=1.4)
  names = [key for key in dict.fromkeys(key for row in history for key in row) if key.partition("/")[0] == "held_out"]
  for i, name in enumerate(names, 1):
    held = [(n, as_float(row[name])) for n, row in enumerate(history, 1) if name in row]
    label, color = name.replace("held_out", "held out").replace("/", " "), COLORS[i % len(COLORS)]
    axes.plot([n for n, _ in held], [loss for _, loss in held], color=color, marker=MARKERS[i % 7], label=label)
  if names:
    legend(axes)
  axes.set_xlabel("step")
  axes.set_ylabel("loss (nats a token)")
  return svg(figure, "training")


def _plot_histograms(histograms: Mapping[str, Row]) -> str:
  shown = [
    (path, edges, before, after)
    for path, histogram in list(histograms.items())[:MAX_HISTOGRAMS]
    for edges, before, after in [[list(map(as_float, histogram.get(k) or [])) for k in ("edges", "before", "after")]]
    if len(edges) - 1 == len(before) == len(after) and all(map(math.isfinite, edges + before + after))
  ]
  if not shown:
    return ""
  from matplotlib.figure import Figure

  columns = min(3, len(shown))
  rows = -(-len(shown) // columns)
  figure = Figure(figsize=(8.6 if columns > 1 else 4.6, 0.5 + 2.1 * rows), layout="constrained")
  grid = list(figure.subplots(rows, columns, squeeze=False).flat)
  for axes, (path, edges, before, after) in zip(grid, shown, strict=False):
    was = axes.stairs(before, edges, fill=True, color="#c3c8cf")
    now = axes.stairs(after, edges, color=COLORS[0], linewidth=0.9)
    axes.set_title(path)
    counts = [count for count in before + after if count > 0]
    if counts:
      axes.set_yscale("log", nonpositive="clip")
      axes.set_ylim(0.7 * min(counts), 1.6 * max(counts))
      plain_ticks(axes.yaxis, [10.0**n for n in range(-12, 16)])
    axes.tick_params(labelsize=7)
    axes.locator_params(axis="x", nbins=5)
  for axes in grid[len(shown) :]:
    axes.set_axis_off()
  figure.legend([was, now], ["before", "after"], loc="outside upper right", ncols=2)
  return svg(figure, "histograms")


def _plot_curves(stages: Sequence[Row]) -> str:
  """Of the last stage: for each task the ROC curve of each class against the rest."""
  from matplotlib.figure import Figure

  tasks = {name: task for name, task in ((stages[-1].get("tasks") or {}) if stages else {}).items() if task.get("roc")}
  if not tasks:
    return ""
  columns = min(2, len(tasks))
  rows = math.ceil(len(tasks) / columns)
  figure = Figure(figsize=(4.3 * columns, 3.6 * rows), layout="constrained")
  for n, (name, task) in enumerate(tasks.items(), 1):
    axes = figure.add_subplot(rows, columns, n)
    for c, (word, rates) in enumerate(zip(task["classes"], task["roc"], strict=True)):
      across = [i / (len(rates) - 1) for i in range(len(rates))]
      axes.plot(across, rates, label=as_text(word), color=COLORS[c % len(COLORS)], linewidth=1.2)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle=":")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title=name)
    if len(task["classes"]) <= 12:
      legend(axes)
  return svg(figure, "roc")


def _plot_images(stages: Sequence[Row]) -> str:
  """The images that the first stage to draw any and the last one drew, a row each, the digit that was asked above."""
  from matplotlib.figure import Figure

  drawn = [(as_text(stage.get("name", "-")), task["examples"]) for stage in stages
           for task in (stage.get("tasks") or {}).values() if are_images(task)]  # fmt: skip
  drawn = drawn[:1] + drawn[-1:] if len(drawn) > 1 else drawn
  if not drawn:
    return ""
  columns = max(len(examples) for _, examples in drawn)
  figure = Figure(figsize=(0.5 * columns, 0.75 * len(drawn)), layout="constrained")
  for row, (name, examples) in enumerate(drawn):
    for n, image in enumerate(examples):
      axes = figure.add_subplot(len(drawn), columns, row * columns + n + 1)
      levels = [ord(letter) - ord("A") for letter in image[1:65]]
      if len(levels) == 64 and min(levels) >= 0 and max(levels) <= 16:
        pixels = [levels[i : i + 8] for i in range(0, 64, 8)]
        axes.pcolormesh(pixels, cmap="gray_r", vmin=0, vmax=16)
        axes.invert_yaxis()
      axes.set(xticks=[], yticks=[], aspect="equal")
      axes.set_title(image[:1], fontsize=7)
      if n == 0:
        axes.set_ylabel(name, fontsize=6)
  return svg(figure, "images")
