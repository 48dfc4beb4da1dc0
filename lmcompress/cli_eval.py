"""The verb `eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lmcompress.cli_talk import ModelName
from lmcompress.errors import ConfigError, SourceError


def evaluate(
  model: ModelName,
  text: Annotated[list[str] | None, typer.Option("--text", help="A known text or a file; repeat for more.")] = None,
  windows: Annotated[int, typer.Option(help="Blocks of tokens from each text.")] = 16,
  length: Annotated[int, typer.Option(help="Tokens in a block.")] = 512,
  against: Annotated[str | None, typer.Option(help="A model to compare with: adds KL and top-1 agreement.")] = None,
  task: Annotated[
    list[str] | None, typer.Option("--task", help="A task of the LM evaluation harness, or its YAML file; repeat.")
  ] = None,
  include: Annotated[Path | None, typer.Option(help="A folder of YAML files of tasks.")] = None,
  shots: Annotated[int | None, typer.Option(help="Examples before each sample of a task.")] = None,
  limit: Annotated[int | None, typer.Option(help="Samples of each task, for a trial.")] = None,
  batch: Annotated[int, typer.Option(help="Rows of a task at once.")] = 8,
  out: Annotated[Path | None, typer.Option(help="Writes what was found as JSON, too.")] = None,
) -> None:
  """Measures perplexity, with --against the KL to another model, and with --task tasks of the LM evaluation harness.

  Examples:

    lmcompress eval smollm2-135m

    lmcompress eval results/quickstart-1a2b3c4d/model --against smollm2-135m --text pydoc --windows 4

    lmcompress eval smollm2-135m --task titles --include mytasks --limit 100
  """
  from lmcompress.io.load import load
  from lmcompress.ops import prepare
  from lmcompress.terminal import Progress, console

  if task and (text or against):
    raise ConfigError("--task goes without --text and --against; call twice")
  if not task and (include or shots is not None or limit is not None):
    raise ConfigError("--include, --shots and --limit go with --task")
  if out is not None:
    out.parent.mkdir(parents=True, exist_ok=True)
  net, params, tokenizer = load(model)
  if tokenizer is None:
    raise SourceError(f"{model} has no tokenizer; put a tokenizer.json beside it")
  screen = console()
  if task:
    from lmcompress.evaluate.harness import Harness
    from lmcompress.evaluate.harness import evaluate as run

    with Progress(screen) as progress:
      seen = Harness(net, prepare(params, consume=True), tokenizer, batch, progress.step)
      found: Any = run(seen, task, include, shots, limit)
    _show_tasks(screen, model, found)
  else:
    found = _texts(screen, model, net, params, tokenizer, text or ["pydoc", "grimm"], windows, length, against)
  if out is not None:
    out.write_text(json.dumps({"format": 1, "model": model, "found": found}, indent=1) + "\n", "utf-8")


def _show_tasks(screen: Any, model: str, found: dict[str, dict[str, Any]]) -> None:
  from rich.table import Table

  table = Table("task", "samples", "metric", "value", "standard error", title=model)
  for name, row in found.items():
    for metric, value in row.items():
      if metric == "samples" or "_stderr" in metric:
        continue
      base, _, kind = metric.partition(",")
      error = row.get(f"{base}_stderr" + (f",{kind}" if kind else ""))
      shown = "" if not isinstance(error, float) else f"{error:.4f}"
      table.add_row(name, str(row["samples"]), metric, f"{value:.4f}", shown)
  screen.print(table)


def _texts(
  screen: Any, model: str, net: Any, params: Any, tokenizer: Any, texts: list[str], windows: int, length: int,
  against: str | None,
) -> dict[str, dict[str, float]]:  # fmt: skip
  """Perplexity on each text, and what another model says of it."""
  from rich.table import Table

  from lmcompress.data import text as data
  from lmcompress.evaluate.perplexity import Score, compare, perplexity
  from lmcompress.evaluate.size import sizes
  from lmcompress.io.load import load
  from lmcompress.ops import prepare

  original = prepare(load(against)[1], consume=True) if against else None
  table = Table(title=f"{model}, {sizes(params)['bits_per_weight']:.3f} bits per weight")
  params = prepare(params, consume=True)
  for column in ("text", "perplexity", *(("KL", "top-1") if against else ())):
    table.add_column(column, justify="left" if column == "text" else "right")
  found: dict[str, dict[str, float]] = {}
  for name in texts:
    tokens = data.windows(tokenizer, data.load_text(name), windows, length)
    if original is None:
      found[name] = {"perplexity": perplexity(net, params, tokens)}
      table.add_row(name, f"{found[name]['perplexity']:.4f}")
      continue
    total = sum((scores["model"] for _, scores in compare(net, original, {"model": params}, tokens)), Score(0, 0, 0, 0))
    s = found[name] = total.summary()
    table.add_row(name, f"{s['perplexity']:.4f}", f"{s['kl']:.5f}", f"{s['top1']:.1%}")
  screen.print(table)
  return found
