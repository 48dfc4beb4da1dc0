"""A run's result as a table in the terminal, a self-contained HTML page with plots, and TensorBoard events.

Everything here reads the dict of a run's `result.json`. A part that is missing or empty is left out, a number
that is missing shows as `-`, and one that is not finite as `nan` or `inf`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lmcompress.figures import drawn_at
from lmcompress.report_plots import MAX_HISTOGRAMS, plots, quality_lines
from lmcompress.result_rows import (
  LAYER,
  Result,
  Row,
  are_images,
  as_float,
  as_text,
  formatted,
  history,
  last_rows,
  split_path,
  stages_of,
  texts_of,
)

if TYPE_CHECKING:
  from rich.table import Table

_HASH_LENGTH = 8


def table(result: Result) -> Table:
  """One row per stage: size, quality, speed and cost."""
  shown = _table(_run_name(result), _caption(result))
  shown.add_column("stage", overflow="fold")
  columns = _stage_columns(result)
  for column in columns:
    shown.add_column(column.head, justify="right", no_wrap=True)
  for stage in stages_of(result):
    name = as_text(stage.get("name", "-"))
    shown.add_row(_literal(name.replace(" at ", "\nat ")), *(column.cell(stage) for column in columns))
  return shown


def compare_table(results: Sequence[Result]) -> Table:
  """One row per run: its last stage, with the texts that every run was scored on."""
  lasts = [stages[-1] if (stages := stages_of(result)) else {} for result in results]
  everyone = [texts_of([last], "perplexity") for last in lasts]
  texts = [text for text in (everyone[0] if everyone else []) if all(text in other for other in everyone)]
  left_out = sorted({text for other in everyone for text in other} - set(texts))
  machines = {as_text((result.get("device") or {}).get("name", "-")) for result in results}
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
    names = _literal(_run_name(result)), _literal(as_text(result.get("model", "-")))
    shown.add_row(*names, *(column.cell(last) for column in columns))
  return shown


def html(result: Result) -> str:
  """The result as one page that needs nothing else: no script, no network; equal results give equal bytes."""
  import importlib.resources

  import jinja2

  source = importlib.resources.files("lmcompress").joinpath("report.html.j2").read_text(encoding="utf-8")
  template = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
  ).from_string(source)
  stages, columns = stages_of(result), _stage_columns(result, agreement=True)
  weights = last_rows(result)
  quality, errors, output_errors, training, histograms, curves, images = plots(result, stages, weights)
  return template.render(
    name=_run_name(result),
    description=as_text(result.get("description", "")),
    facts=_facts(result, stages),
    command=as_text(result.get("command", "")),
    caption=_caption(result, description=False),
    heads=[column.head for column in columns],
    stages=[(as_text(stage.get("name", "-")), [column.cell(stage) for column in columns]) for stage in stages],
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
      (*(as_text(row.get(k, "-")) for k in ("operation", "calls")), *(formatted(row.get(k)) for k in ("ms", "share")))
      for row in result.get("profile") or []
    ],
    not_drawn=[
      f"{n} ({text})" for text, line in quality_lines(stages).items() for n, x, y in line if not drawn_at(x, y)
    ],
    outside=[
      f"{path} {formatted(row.get('weight_error'), 4)}" for path, row in weights.items() if not LAYER.match(path)
    ],
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
      number = as_float(value)
      if not math.isnan(number):
        writer.add_scalar(tag, number, step)

    for step, stage in enumerate(stages_of(result)):
      scalar("bits_per_weight", stage.get("bits_per_weight"), step)
      for measure in ("perplexity", "kl", "tokens_per_s"):
        for key, value in (stage.get(measure) or {}).items():
          scalar(f"{measure}/{key}", value, step)
      for name, task in (stage.get("tasks") or {}).items():
        for key, value in task.items():
          if key != "n" and isinstance(value, float):
            scalar(f"{name}/{key}", value, step)
    for path, row in last_rows(result).items():
      linear, depth = split_path(path)
      scalar(f"weight_error/{linear}", row.get("weight_error"), depth or 0)
    for step, row in enumerate(history(result), 1):
      for key in ("loss", "grad_norm", "learning_rate", "held_out"):
        scalar(f"training/{key}", row.get(key), step)
    indented = "\n".join(f"    {line}" for line in _yaml(result.get("config") or {}).splitlines())
    writer.add_text("config", indented)  # four spaces are a code block in TensorBoard's Markdown


# What a stage shows


class _Column(NamedTuple):
  head: str
  cell: Callable[[Row], str]


def _number(head: str, key: str, digits: int, unit: float = 1) -> _Column:
  return _Column(head, lambda stage: formatted(stage.get(key), digits, unit))


def _score(measure: str, text: str) -> _Column:
  head, digits = {"perplexity": ("ppl", 2), "kl": ("KL", 4), "top1": ("top-1", 3), "accuracy": ("right", 3)}[measure]
  return _Column(f"{head}\n{text}", lambda stage: formatted((stage.get(measure) or {}).get(text), digits))


def _headline(task: str, measure: str) -> _Column:
  of = lambda stage: (stage.get("tasks") or {}).get(task) or {}  # noqa: E731
  return _Column(f"{measure}\n{task}", lambda stage: formatted(of(stage).get(measure), 1 if measure == "bleu" else 3))


def _measures(stages: Sequence[Row]) -> dict[str, str]:
  """The score that says most of each task, or of samples."""
  tasks = [item for stage in stages for item in (stage.get("tasks") or {}).items()]
  return {name: as_text(task.get("measure", "accuracy")) for name, task in tasks}


def _task_rows(stages: Sequence[Row]) -> list[tuple[list[str], list[list[str]]]]:
  """A table for each set of scores: their names, and a row for each stage and task, intervals in brackets."""
  tables: dict[tuple[str, ...], list[list[str]]] = {}
  for stage in stages:
    for name, task in (stage.get("tasks") or {}).items():
      keys = tuple(key for key, value in task.items() if key != "n" and (value is None or isinstance(value, float)))
      cells = [as_text(stage.get("name", "-")), name, as_text(task.get("n", "-"))]
      for key in keys:
        low, high = (task.get("interval") or {}).get(key) or (None, None)
        digits = 1 if key in ("bleu", "chrf", "rows_per_s") else 3
        around = "" if low is None else f" ({formatted(low, digits)} to {formatted(high, digits)})"
        cells.append(f"{formatted(task.get(key), digits)}{around}")
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
  shown = {name: task["examples"] for name, task in tasks.items() if task.get("examples") and not are_images(task)}
  return [
    (name, [(one, "") if isinstance(one, str) else (as_text(one[0]), as_text(one[1])) for one in examples])
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


def _speed(phase: str) -> _Column:
  return _Column(f"{phase}\ntok/s", lambda stage: formatted((stage.get("tokens_per_s") or {}).get(phase), 1))


_BITS = _number("bits/\nweight", "bits_per_weight", 2)
_SIZE = _number("disk\nMB", "bytes_on_disk", 1, 1e6)
_SAVED = _number("effi-\nciency", "compression_efficiency", 3)
_DECODE = _speed("decode")


def _stage_columns(result: Result, agreement: bool = False) -> list[_Column]:
  stages = stages_of(result)
  measures = ("perplexity", "kl", "top1", "accuracy") if agreement else ("perplexity", "kl")
  scores = [_score(measure, text) for measure in measures for text in texts_of(stages, measure)]
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
  facts = [("model", as_text(result.get("model", "-")))]
  if not stages:
    return facts
  columns = [("bits per weight", _BITS), ("MB on disk", _SIZE)]
  columns += [(f"perplexity, {text}", _score("perplexity", text)) for text in texts_of(stages, "perplexity")]
  columns += [("decode, tokens/s", _DECODE)]
  pairs = [(label, column.cell(stages[0]), column.cell(stages[-1])) for label, column in columns]
  facts += [(label, f"{was} → {now}") for label, was, now in pairs if (was, now) != ("-", "-")]
  return facts + _energy(result)


def _energy(result: Result) -> list[tuple[str, str]]:
  """What this machine spent on the run, and whether that was measured."""
  spent = result.get("energy") or {}
  if math.isnan(as_float(spent.get("joules"))):
    return []
  label, source = (as_text(spent.get(name)) for name in ("label", "source"))
  rows = [(f"energy, kJ ({label}: {source})", formatted(spent["joules"], 1, 1e3))]
  if not math.isnan(as_float(spent.get("grams"))):
    country, mix = (as_text(spent.get(name)) for name in ("country", "grid"))
    rows.append((f"CO2, g (grid of {country}: {mix})", formatted(spent["grams"], 2)))
  return rows


def _needs(result: Result) -> str:
  """What the compiled training step needs, in a line."""
  needs = (result.get("training") or {}).get("needs") or {}
  parts = [
    f"{formatted(needs[key], 1, unit)} {what}"
    for key, unit, what in (
      ("flops", 1e9, "GFLOP"), ("bytes_accessed", 1e9, "GB read and written"),
      ("temporaries", 1e6, "MB of temporaries"), ("peak_bytes", 1e6, "MB at once"),
    )
    if key in needs
  ]  # fmt: skip
  return f"A training step as compiled for a device (a loop's body counts once): {', '.join(parts)}." if parts else ""


def _continuations(generation: Row) -> dict[str, str]:
  """The prompt and what each model wrote after it."""
  prompt = as_text(generation.get("prompt", ""))
  parts = {key: as_text(generation.get(key, "")).removeprefix(prompt) for key in ("before", "after")}
  return {"prompt": prompt, **parts} if any(parts.values()) else {}


def _weight_cells(row: Row) -> list[str]:
  shape = " × ".join(map(str, row.get("shape") or []))
  numbers = [
    formatted(row.get(key), digits)
    for key, digits in (("bits", 3), ("sparsity", 3), ("weight_error", 4), ("output_error", 4), ("seconds", 2))
  ]
  return [*(as_text(row.get(key, "-")) for key in ("path", "link", "kind")), shape, *numbers]


def _origin(result: Result) -> list[tuple[str, str]]:
  """What a repetition has to share: hashes, seed, versions and the machine."""
  versions = (result.get("versions") or {}).items()
  keys = ("config_hash", "tree_hash", "seed", "original")
  rows = [(key.replace("_", " "), result.get(key)) for key in keys]
  rows += [("versions", ", ".join(f"{name} {version}" for name, version in versions))]
  rows += [(f"device {key}", value) for key, value in (result.get("device") or {}).items()]
  return [(key, as_text(value)) for key, value in rows if value not in (None, "")]


def _trained(result: Result) -> str:
  """What was trained, in a line."""
  training = result.get("training") or {}
  counts = (("steps", len(history(result))), ("tokens", training.get("tokens")), ("rows", training.get("rows")))
  known = [f"{value:,} {name}" for name, value in counts if isinstance(value, int)]
  if isinstance(training.get("trained_parameters"), int):
    known.append(f"{training['trained_parameters']:,} numbers that trained")
  return ", ".join(known)


def _privacy(result: Result) -> str:
  """What a private training spent; "" for any other."""
  spent = (result.get("training") or {}).get("epsilon")
  delta = (((result.get("config") or {}).get("train") or {}).get("privacy") or {}).get("delta")
  return "" if spent is None else f"private: epsilon {formatted(spent, 2)} at delta {as_float(delta):g}"


def _run_name(result: Result) -> str:
  parts = as_text(result.get("name")), as_text(result.get("config_hash"))[:_HASH_LENGTH]
  return "-".join(filter(None, parts))


def _caption(result: Result, description: bool = True) -> str:
  """What the numbers are relative to, and what computed them."""
  backends = list(dict.fromkeys(as_text(stage["backend"]) for stage in stages_of(result) if stage.get("backend")))
  original = as_text(result.get("original", ""))
  parts = [f"original: {original}" if original else "", f"backend: {', '.join(backends)}" if backends else ""]
  parts.append(_privacy(result))
  lines = [as_text(result.get("description", "")) if description else "", "; ".join(filter(None, parts))]
  return "\n".join(filter(None, lines))


def _yaml(config: Any) -> str:
  import yaml

  return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100)


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
