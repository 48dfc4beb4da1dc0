"""A run's result as a table in the terminal, a self-contained HTML page with plots, and TensorBoard events.

Everything here reads the dict of a run's `result.json`. A part that is missing or empty is left out, a number
that is missing shows as `-`, and one that is not finite as `nan` or `inf`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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

if TYPE_CHECKING:
  from rich.table import Table

Result = Mapping[str, Any]
Row = Mapping[str, Any]

MAX_HISTOGRAMS = 24

_HASH_LENGTH = 8
_LAYER = re.compile(r"^(?P<prefix>.*?)(?:^|/)layers/(?P<depth>\d+)/(?P<linear>.+)$")


def table(result: Result) -> Table:
  """One row per stage: size, quality, speed and cost."""
  shown = _table(_run_name(result), _caption(result))
  shown.add_column("stage", overflow="fold")
  columns = _stage_columns(result)
  for column in columns:
    shown.add_column(column.head, justify="right", no_wrap=True)
  for stage in _stages(result):
    name = _text(stage.get("name", "-"))
    shown.add_row(_literal(name.replace(" at ", "\nat ")), *(column.cell(stage) for column in columns))
  return shown


def compare_table(results: Sequence[Result]) -> Table:
  """One row per run: its last stage, with the texts that every run was scored on."""
  lasts = [stages[-1] if (stages := _stages(result)) else {} for result in results]
  everyone = [_texts([last], "perplexity") for last in lasts]
  texts = [text for text in (everyone[0] if everyone else []) if all(text in other for other in everyone)]
  left_out = sorted({text for other in everyone for text in other} - set(texts))
  machines = {_text((result.get("device") or {}).get("name", "-")) for result in results}
  notes = [f"left out, not in every run: {', '.join(left_out)}"] if left_out else []
  if len(machines) > 1:
    notes.append(f"speeds are not comparable, they come from {', '.join(sorted(machines))}")
  shown = _table("", "\n".join(notes))
  shown.add_column("run", overflow="fold")
  shown.add_column("model", overflow="fold")
  scores = [_score(measure, text) for measure in ("perplexity", "kl") for text in texts]
  columns = [_BITS, _SIZE, *scores, _DECODE]
  for column in columns:
    shown.add_column(column.head, justify="right", no_wrap=True)
  for result, last in zip(results, lasts, strict=True):
    shown.add_row(
      _literal(_run_name(result)), _literal(_text(result.get("model", "-"))), *(column.cell(last) for column in columns)
    )
  return shown


def html(result: Result) -> str:
  """The result as one page that needs nothing else: no script, no network; equal results give equal bytes."""
  import importlib.resources

  import jinja2

  source = importlib.resources.files("lmcompress").joinpath("report.html.j2").read_text(encoding="utf-8")
  template = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
  ).from_string(source)
  stages, columns = _stages(result), _stage_columns(result, agreement=True)
  weights = _last_rows(result)
  quality, errors, output_errors, training, histograms, curves, images = _plots(result, stages, weights)
  return template.render(
    name=_run_name(result),
    description=_text(result.get("description", "")),
    facts=_facts(result, stages),
    command=_text(result.get("command", "")),
    caption=_caption(result, description=False),
    heads=[column.head for column in columns],
    stages=[(_text(stage.get("name", "-")), [column.cell(stage) for column in columns]) for stage in stages],
    generation=_continuations(result.get("generation") or {}),
    quality=quality,
    errors=errors,
    output_errors=output_errors,
    training=training,
    trained=_trained(result),
    needs=_needs(result),
    tasks=_task_rows(stages),
    examples=_examples(stages),
    explained=_explained(result),
    images=images,
    confusions=_confusions(stages),
    curves=curves,
    profile=[
      (_text(row.get("operation", "-")), _text(row.get("calls", "-")), *(_show(row.get(k), 3) for k in ("ms", "share")))
      for row in result.get("profile") or []
    ],
    not_drawn=[f"{n} ({text})" for text, line in _quality(stages).items() for n, x, y in line if not drawn_at(x, y)],
    outside=[f"{path} {_show(row.get('weight_error'), 4)}" for path, row in weights.items() if not _LAYER.match(path)],
    histograms=histograms,
    histograms_left_out=max(0, len(result.get("histograms") or {}) - MAX_HISTOGRAMS),
    weights=[_weight_cells(row) for row in result.get("weights") or []],
    config=_yaml(result.get("config") or {}),
    origin=_origin(result),
  )


def write_html(result: Result, path: str | os.PathLike[str]) -> None:
  """Writes the page of `html` whole or not at all."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    temporary.write_text(html(result), encoding="utf-8")
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_tensorboard(result: Result, folder: str | os.PathLike[str]) -> None:
  """Writes one event file.

  The step of `bits_per_weight`, `perplexity/<text>`, `kl/<text>`, `<task>/<score>` and `tokens_per_s/<phase>` is the
  stage's index; the step of `weight_error/<linear>` is the layer's number, 0 for a weight outside the layers; the step
  of `training/loss`, `training/grad_norm`, `training/learning_rate` and `training/held_out` is the update. Numbers
  that are missing or NaN are skipped. A second call in the same folder adds a second file, and TensorBoard shows both.
  """
  from tensorboardX import SummaryWriter

  with SummaryWriter(logdir=os.fspath(folder)) as writer:

    def scalar(tag: str, value: Any, step: int) -> None:
      number = _float(value)
      if not math.isnan(number):
        writer.add_scalar(tag, number, step)

    for step, stage in enumerate(_stages(result)):
      scalar("bits_per_weight", stage.get("bits_per_weight"), step)
      for measure in ("perplexity", "kl", "tokens_per_s"):
        for key, value in (stage.get(measure) or {}).items():
          scalar(f"{measure}/{key}", value, step)
      for name, task in (stage.get("tasks") or {}).items():
        for key, value in task.items():
          if key != "n" and isinstance(value, float):
            scalar(f"{name}/{key}", value, step)
    for path, row in _last_rows(result).items():
      linear, depth = _split(path)
      scalar(f"weight_error/{linear}", row.get("weight_error"), depth or 0)
    for step, row in enumerate(_history(result), 1):
      for key in ("loss", "grad_norm", "learning_rate", "held_out"):
        scalar(f"training/{key}", row.get(key), step)
    indented = "\n".join(f"    {line}" for line in _yaml(result.get("config") or {}).splitlines())
    writer.add_text("config", indented)  # four spaces are a code block in TensorBoard's Markdown


# What a stage shows


class _Column(NamedTuple):
  head: str
  cell: Callable[[Row], str]


def _number(head: str, key: str, digits: int, unit: float = 1) -> _Column:
  return _Column(head, lambda stage: _show(stage.get(key), digits, unit))


def _score(measure: str, text: str) -> _Column:
  head, digits = {"perplexity": ("ppl", 2), "kl": ("KL", 4), "top1": ("top-1", 3), "accuracy": ("right", 3)}[measure]
  return _Column(f"{head}\n{text}", lambda stage: _show((stage.get(measure) or {}).get(text), digits))


def _headline(task: str, measure: str) -> _Column:
  of = lambda stage: (stage.get("tasks") or {}).get(task) or {}  # noqa: E731
  return _Column(f"{measure}\n{task}", lambda stage: _show(of(stage).get(measure), 1 if measure == "bleu" else 3))


def _measures(stages: Sequence[Row]) -> dict[str, str]:
  """The score that says most of each task, or of samples."""
  tasks = [item for stage in stages for item in (stage.get("tasks") or {}).items()]
  return {name: _text(task.get("measure", "accuracy")) for name, task in tasks}


def _task_rows(stages: Sequence[Row]) -> list[tuple[list[str], list[list[str]]]]:
  """A table for each set of scores: their names, and a row for each stage and task, intervals in brackets."""
  tables: dict[tuple[str, ...], list[list[str]]] = {}
  for stage in stages:
    for name, task in (stage.get("tasks") or {}).items():
      keys = tuple(key for key, value in task.items() if key != "n" and (value is None or isinstance(value, float)))
      cells = [_text(stage.get("name", "-")), name, _text(task.get("n", "-"))]
      for key in keys:
        low, high = (task.get("interval") or {}).get(key) or (None, None)
        digits = 1 if key in ("bleu", "chrf", "rows_per_s") else 3
        around = "" if low is None else f" ({_show(low, digits)} to {_show(high, digits)})"
        cells.append(f"{_show(task.get(key), digits)}{around}")
      tables.setdefault(keys, []).append(cells)
  return [(list(keys), rows) for keys, rows in tables.items()]


def _confusions(stages: Sequence[Row]) -> list[tuple[str, list[str], list[tuple[str, list[int]]]]]:
  """Of the last stage: each task's classes, and a row of counts for each."""
  tasks = (stages[-1].get("tasks") or {}) if stages else {}
  tasks = {name: task for name, task in tasks.items() if "confusion" in task}
  rows = {name: list(zip(task["classes"], task["confusion"], strict=True)) for name, task in tasks.items()}
  return [(name, task["classes"], rows[name]) for name, task in tasks.items()]


def _examples(stages: Sequence[Row]) -> list[tuple[str, list[tuple[str, str]]]]:
  """Of the last stage: what was written for each task beside what a person wrote, or samples alone."""
  tasks = (stages[-1].get("tasks") or {}) if stages else {}
  shown = {name: task["examples"] for name, task in tasks.items() if task.get("examples") and not _are_images(task)}
  return [
    (name, [(one, "") if isinstance(one, str) else (_text(one[0]), _text(one[1])) for one in examples])
    for name, examples in shown.items()
  ]


def _explained(result: Result) -> dict[str, str]:
  """Plots of what matters and what changed, by what they show."""
  if not (found := result.get("explain")):
    return {}
  from lmcompress.importance_plots import drawn

  words = {"layers": "what the loss rises by when a layer is left out", "drift": "how far each stage's input has moved",
           "tokens": "divergence from the original after each token of the text"}  # fmt: skip
  shown = drawn(found).items()
  return {words.get(name, name.replace("axis_", "what matters along ")): picture for name, picture in shown}


def _are_images(task: Row) -> bool:
  return "recognised" in task


def _plot_images(stages: Sequence[Row]) -> str:
  """The images that the first stage to draw any and the last one drew, a row each, the digit that was asked above."""
  from matplotlib.figure import Figure

  drawn = [(_text(stage.get("name", "-")), task["examples"]) for stage in stages
           for task in (stage.get("tasks") or {}).values() if _are_images(task)]  # fmt: skip
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
      axes.plot(across, rates, label=_text(word), color=COLORS[c % len(COLORS)], linewidth=1.2)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle=":")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title=name)
    if len(task["classes"]) <= 12:
      legend(axes)
  return svg(figure, "roc")


def _speed(phase: str) -> _Column:
  return _Column(f"{phase}\ntok/s", lambda stage: _show((stage.get("tokens_per_s") or {}).get(phase), 1))


_BITS = _number("bits/\nweight", "bits_per_weight", 2)
_SIZE = _number("disk\nMB", "bytes_on_disk", 1, 1e6)
_SAVED = _number("effi-\nciency", "compression_efficiency", 3)
_DECODE = _speed("decode")


def _stage_columns(result: Result, agreement: bool = False) -> list[_Column]:
  stages = _stages(result)
  measures = ("perplexity", "kl", "top1", "accuracy") if agreement else ("perplexity", "kl")
  scores = [_score(measure, text) for measure in measures for text in _texts(stages, measure)]
  return [
    _BITS,
    _SIZE,
    _SAVED,
    *scores,
    *(_headline(task, measure) for task, measure in _measures(stages).items()),
    _speed("prefill"),
    _DECODE,
    _number("time\ns", "seconds", 1),
    _number("peak\nMB", "peak_memory_bytes", 0, 1e6),
  ]


def _facts(result: Result, stages: Sequence[Row]) -> list[tuple[str, str]]:
  """What the page's head says: the model, and each headline number before and after."""
  facts = [("model", _text(result.get("model", "-")))]
  if not stages:
    return facts
  columns = [("bits per weight", _BITS), ("MB on disk", _SIZE)]
  columns += [(f"perplexity, {text}", _score("perplexity", text)) for text in _texts(stages, "perplexity")]
  columns += [("decode, tokens/s", _DECODE)]
  pairs = [(label, column.cell(stages[0]), column.cell(stages[-1])) for label, column in columns]
  facts += [(label, f"{was} → {now}") for label, was, now in pairs if (was, now) != ("-", "-")]
  return facts + _energy(result)


def _energy(result: Result) -> list[tuple[str, str]]:
  """What this machine spent on the run, and whether that was measured."""
  spent = result.get("energy") or {}
  if math.isnan(_float(spent.get("joules"))):
    return []
  return [(f"energy, kJ ({_text(spent.get('label'))}: {_text(spent.get('source'))})", _show(spent["joules"], 1, 1e3))]


def _needs(result: Result) -> str:
  """What the compiled training step needs, in a line."""
  needs = (result.get("training") or {}).get("needs") or {}
  parts = [
    f"{_show(needs[key], 1, unit)} {what}"
    for key, unit, what in (
      ("flops", 1e9, "GFLOP"), ("bytes_accessed", 1e9, "GB read and written"),
      ("temporaries", 1e6, "MB of temporaries"), ("peak_bytes", 1e6, "MB at once"),
    )
    if key in needs
  ]  # fmt: skip
  return f"A training step as compiled (a loop's body counts once): {', '.join(parts)}." if parts else ""


def _continuations(generation: Row) -> dict[str, str]:
  """The prompt and what each model wrote after it."""
  prompt = _text(generation.get("prompt", ""))
  parts = {key: _text(generation.get(key, "")).removeprefix(prompt) for key in ("before", "after")}
  return {"prompt": prompt, **parts} if any(parts.values()) else {}


def _weight_cells(row: Row) -> list[str]:
  shape = " × ".join(map(str, row.get("shape") or []))
  numbers = [
    _show(row.get(key), digits)
    for key, digits in (("bits", 3), ("sparsity", 3), ("weight_error", 4), ("output_error", 4), ("seconds", 2))
  ]
  return [*(_text(row.get(key, "-")) for key in ("path", "link", "kind")), shape, *numbers]


def _origin(result: Result) -> list[tuple[str, str]]:
  """What a repetition has to share: hashes, seed, versions and the machine."""
  versions = (result.get("versions") or {}).items()
  keys = ("config_hash", "tree_hash", "seed", "original")
  rows = [(key.replace("_", " "), result.get(key)) for key in keys]
  rows += [("versions", ", ".join(f"{name} {version}" for name, version in versions))]
  rows += [(f"device {key}", value) for key, value in (result.get("device") or {}).items()]
  return [(key, _text(value)) for key, value in rows if value not in (None, "")]


# Plots


def _plots(result: Result, stages: Sequence[Row], weights: Mapping[str, Row]) -> tuple[str, ...]:
  """SVG of perplexity against size, errors against depth, the loss, weights' values, ROC and images; "" for none."""
  with style():
    errors = _plot_errors(weights, "weight"), _plot_errors(weights, "output")
    histograms = _plot_histograms(result.get("histograms") or {})
    loss, curves = _plot_training(_history(result)), _plot_curves(stages)
    return _plot_quality(stages), *errors, loss, histograms, curves, _plot_images(stages)


def _history(result: Result) -> list[Row]:
  """A row for each step of a training; empty where there was none."""
  return list((result.get("training") or {}).get("history") or [])


def _trained(result: Result) -> str:
  """What was trained, in a line."""
  training = result.get("training") or {}
  counts = (("steps", len(_history(result))), ("tokens", training.get("tokens")), ("rows", training.get("rows")))
  known = [f"{value:,} {name}" for name, value in counts if isinstance(value, int)]
  if isinstance(training.get("trained_parameters"), int):
    known.append(f"{training['trained_parameters']:,} numbers that trained")
  return ", ".join(known)


def _privacy(result: Result) -> str:
  """What a private training spent; "" for any other."""
  spent = (result.get("training") or {}).get("epsilon")
  delta = (((result.get("config") or {}).get("train") or {}).get("privacy") or {}).get("delta")
  return "" if spent is None else f"private: epsilon {_show(spent, 2)} at delta {_float(delta):g}"


def _plot_training(history: Sequence[Row]) -> str:
  losses = [(n, _float(row.get("loss"))) for n, row in enumerate(history, 1)]
  drawn = [(n, loss) for n, loss in losses if math.isfinite(loss)]
  if not drawn:
    return ""
  figure, axes = figure_of(3.2)
  axes.plot([n for n, _ in drawn], [loss for _, loss in drawn], color=COLORS[0], linewidth=1.4)
  names = [key for key in dict.fromkeys(key for row in history for key in row) if key.partition("/")[0] == "held_out"]
  for i, name in enumerate(names, 1):
    held = [(n, _float(row[name])) for n, row in enumerate(history, 1) if name in row]
    label, color = name.replace("held_out", "held out").replace("/", " "), COLORS[i % len(COLORS)]
    axes.plot([n for n, _ in held], [loss for _, loss in held], color=color, marker=MARKERS[i % 7], label=label)
  if names:
    legend(axes)
  axes.set_xlabel("step")
  axes.set_ylabel("loss (nats a token)")
  return svg(figure, "training")


def _quality(stages: Sequence[Row]) -> dict[str, list[tuple[int, float, float]]]:
  """By text: stage, bits per weight and perplexity, where the text was scored."""
  return {
    text: [
      (n, _float(stage.get("bits_per_weight")), _float(stage["perplexity"][text]))
      for n, stage in enumerate(stages)
      if text in (stage.get("perplexity") or {})
    ]
    for text in _texts(stages, "perplexity")
  }


def _plot_quality(stages: Sequence[Row]) -> str:
  lines = {text: [(n, x, y) for n, x, y in line if drawn_at(x, y)] for text, line in _quality(stages).items()}
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


def _plot_errors(weights: Mapping[str, Row], of: str) -> str:
  """The `weight` or the `output` error of each kind of linear by depth; '' where none was measured."""
  lines: dict[str, list[tuple[int, float]]] = {}
  for path, row in weights.items():
    linear, depth = _split(path)
    error = _float(row.get(f"{of}_error"))
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


def _plot_histograms(histograms: Mapping[str, Row]) -> str:
  shown = [
    (path, edges, before, after)
    for path, histogram in list(histograms.items())[:MAX_HISTOGRAMS]
    for edges, before, after in [[list(map(_float, histogram.get(key) or [])) for key in ("edges", "before", "after")]]
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


# Reading a result


def _stages(result: Result) -> list[Row]:
  return list(result.get("stages") or [])


def _texts(stages: Iterable[Row], measure: str) -> list[str]:
  return list(dict.fromkeys(text for stage in stages for text in stage.get(measure) or {}))


def _last_rows(result: Result) -> dict[str, Row]:
  """Each weight's latest row, by path: its state at the end of the run."""
  return {_text(row.get("path", "-")): row for row in result.get("weights") or []}


def _split(path: str) -> tuple[str, int | None]:
  """A weight's kind of linear and its layer.

  >>> _split("layers/3/attn/q/kernel"), _split("embed/kernel")
  (('attn/q', 3), ('embed', None))
  """
  path = path.removesuffix("/kernel")
  match = _LAYER.match(path)
  if match is None:
    return path, None
  return "/".join(filter(None, (match["prefix"], match["linear"]))), int(match["depth"])


def _run_name(result: Result) -> str:
  parts = _text(result.get("name")), _text(result.get("config_hash"))[:_HASH_LENGTH]
  return "-".join(filter(None, parts))


def _caption(result: Result, description: bool = True) -> str:
  """What the numbers are relative to, and what computed them."""
  backends = list(dict.fromkeys(_text(stage["backend"]) for stage in _stages(result) if stage.get("backend")))
  original = _text(result.get("original", ""))
  parts = [f"original: {original}" if original else "", f"backend: {', '.join(backends)}" if backends else ""]
  parts.append(_privacy(result))
  lines = [_text(result.get("description", "")) if description else "", "; ".join(filter(None, parts))]
  return "\n".join(filter(None, lines))


def _yaml(config: Any) -> str:
  import yaml

  return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100)


def _text(value: Any) -> str:
  return "" if value is None else str(value).strip("\n")


def _float(value: Any) -> float:
  try:
    return float(value)
  except (TypeError, ValueError):
    return math.nan


def _show(value: Any, digits: int, unit: float = 1) -> str:
  """A number in about six characters; `-` where there is none.

  >>> _show(9.1234, 2), _show(2e-5, 2), _show(123456.7, 1), _show(1e9, 1), _show(None, 2)
  ('9.12', '2e-05', '123457', '1.0e+09', '-')
  """
  if value is None:
    return "-"
  number = _float(value) / unit
  if not math.isfinite(number):
    return str(number)
  if 0 < abs(number) < 0.5 * 10**-digits:
    return f"{number:.0e}"
  if abs(number) >= 1e6:
    return f"{number:.1e}"
  return f"{number:.{0 if abs(number) >= 1000 else digits}f}"


def _table(title: str, caption: str) -> Table:
  from rich import box
  from rich.table import Table

  return Table(
    title=_literal(title) if title else None,
    caption=_literal(caption) if caption else None,
    box=box.SIMPLE_HEAD,
    pad_edge=False,
    padding=(0, 1, 0, 0),
    title_justify="left",
    caption_justify="left",
  )


def _literal(text: str) -> Any:
  """Text in which `[...]`, as in `layers/[0-3]`, is no markup."""
  from rich.text import Text

  return Text(text)
