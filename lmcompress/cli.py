"""The command line: a verb for each thing one does with runs and models."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from lmcompress.cli_bench import bench
from lmcompress.cli_eval import evaluate
from lmcompress.cli_explain import explain
from lmcompress.cli_files import decrypt, encrypt, export, key
from lmcompress.cli_plan import plan
from lmcompress.cli_run import resume, run
from lmcompress.cli_sweep import sweep
from lmcompress.cli_talk import ModelName, chat, classify, generate
from lmcompress.errors import ConfigError, LmcompressError
from lmcompress.terminal import CONFIGS, RESULTS, ConfigFile, Overrides, Progress, Results, console, find_config, wide

app = typer.Typer(
  name="lmcompress",
  help="Compresses language models: quantization, pruning and their compositions, from config files.\n\n"
  "Start with: [bold]lmcompress run configs/smollm2/quickstart.yaml[/bold]",
  no_args_is_help=True,
  add_completion=False,
  rich_markup_mode="rich",
  pretty_exceptions_enable=False,
)

for _verb in (run, resume, sweep, generate, chat, classify, explain, plan, bench, export, key, encrypt, decrypt):
  app.command()(_verb)
app.command(name="eval")(evaluate)


@app.command()
def search(config: ConfigFile, overrides: Overrides = None, results: Results = RESULTS) -> None:
  """Finds the recipe of least KL under a budget of bytes or latency, among candidates for each part of the model.

  Examples:

    lmcompress search configs/smollm2/search.yaml

    lmcompress search configs/smollm2/search.yaml search.method=optuna search.trials=40 search.budget.mib=70
  """
  from rich.table import Table

  from lmcompress import search as searching
  from lmcompress.config import load_config

  found = load_config(find_config(config), overrides or [])
  screen = console()
  folder = results / found.folder
  try:
    with Progress(screen) as progress:
      result = searching.search(found, results, progress)
  except KeyboardInterrupt:
    screen.print("\ninterrupted; what was measured is kept: the same command goes on", highlight=False)
    raise typer.Exit(130) from None
  table = Table(title=f"{found.name}: the front of {len(result['trials'])} choices")
  for column in ("MB", *(("ms/token",) if result["best"]["ms_per_token"] else ()), "perplexity", "KL", "recipe"):
    table.add_column(column, justify="left" if column == "recipe" else "right")
  rows = {tuple(t["choice"]): t for t in result["trials"]}
  for choice in result["front"]:
    t = rows[tuple(choice)]
    times = [f"{t['ms_per_token']:.2f}"] if t["ms_per_token"] else []
    best = "[bold]" if list(choice) == list(result["best"]["choice"]) else ""
    cells = [f"{t['nbytes'] / 1e6:.1f}", *times, f"{t['perplexity']:.3f}", f"{t['kl']:.4f}", t["recipe"]]
    table.add_row(*(best + cell.replace("[", "\\[") for cell in cells))
  wide(screen).print(table)
  for label, name in (("best", searching.BEST), ("plot", searching.PLOT), ("result", searching.RESULT)):
    screen.print(f"{label:>7}: {folder / name}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def validate(config: ConfigFile, overrides: Overrides = None) -> None:
  """Checks a config and prints it resolved; runs nothing.

  Example:

    lmcompress validate configs/smollm2/quickstart.yaml recipe.1.bits=3
  """
  from lmcompress.config import dump, load_config

  found = load_config(find_config(config), overrides or [])
  typer.echo(dump(found), nl=False)
  typer.echo(f"# valid; runs in results/{found.folder}")


@app.command(name="ls")
def list_(results: Results = RESULTS) -> None:
  """Lists configs, models, texts, data sets of tasks and runs.

  Example:

    lmcompress ls
  """
  from rich.table import Table

  from lmcompress.data.labelled import DATASETS
  from lmcompress.data.pairs import PAIRS
  from lmcompress.data.questions import QUESTIONS
  from lmcompress.data.tagged import TAGGED
  from lmcompress.data.text import TEXTS
  from lmcompress.io.hub import MODELS
  from lmcompress.run_folder import RESULT, run_folders

  screen = console()

  def show(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for row in rows or [("(none)", "")]:
      table.add_row(*row)
    screen.print(table)

  configs = [(str(p), _first_line(p)) for p in sorted(CONFIGS.glob("**/*.yaml"))] if CONFIGS.is_dir() else []
  show("configs", configs)
  show("models", [(name, entry.description) for name, entry in MODELS.items()])
  show("texts", list(TEXTS.items()))
  show("data sets", [item for names in (DATASETS, TAGGED, QUESTIONS, PAIRS) for item in names.items()])
  show(
    "runs",
    [
      (str(p), "complete" if (p / RESULT).is_file() else "cut off: lmcompress resume continues it")
      for p in run_folders(results)
    ],
  )


def _first_line(path: Path) -> str:
  first = path.read_text("utf-8").split("\n", 1)[0]
  return first.lstrip("# ").strip() if first.startswith("#") else ""


@app.command()
def cp(config: ConfigFile, target: Annotated[Path, typer.Argument(help="The new config file.")]) -> None:
  """Copies a config, resolved, as the start of your own.

  Example:

    lmcompress cp quickstart mine.yaml
  """
  from lmcompress.config import dump, load_config

  source = find_config(config)
  if target.exists():
    raise ConfigError(f"{target} exists already; it is not overwritten")
  header = [line for line in source.read_text("utf-8").splitlines() if line.startswith("#")]
  target.parent.mkdir(parents=True, exist_ok=True)
  target.write_text("\n".join([*header, dump(load_config(source))]), "utf-8")
  typer.echo(f"{target} written; run it with: lmcompress run {target}")




@app.command()
def inspect(
  model: ModelName,
  all_layers: Annotated[bool, typer.Option("--all", help="Shows every layer.")] = False,
) -> None:
  """Shows what a model holds: path, form, shape, bits, zeros, bytes, and errors where a run recorded them.

  Example:

    lmcompress inspect results/quickstart-1a2b3c4d/model
  """
  from lmcompress import run_folder
  from lmcompress.calibration import Report
  from lmcompress.io.load import load
  from lmcompress.leaf_table import table

  _, params, _ = load(model)
  beside = Path(model).parent
  report = None
  if Path(model).is_dir() and (beside / run_folder.RESULT).is_file():
    report = Report(rows=run_folder.read_result(beside)["weights"])
  wide(console()).print(table(params, report, None if all_layers else 1))


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A complete run folder.")]) -> None:
  """Prints a run's table and writes its HTML report again.

  Example:

    lmcompress report results/quickstart-1a2b3c4d
  """
  from lmcompress import report as reports
  from lmcompress import run_folder

  result = run_folder.read_result(folder)
  reports.write_html(result, folder / "report.html")
  screen = wide(console())
  screen.print(reports.table(result))
  screen.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


@app.command()
def compare(folders: Annotated[list[Path], typer.Argument(help="Two complete run folders or more.")]) -> None:
  """Puts runs side by side.

  Example:

    lmcompress compare results/quickstart-1a2b3c4d results/int8-5e6f7a8b
  """
  from lmcompress import report as reports
  from lmcompress import run_folder

  wide(console()).print(reports.compare_table([run_folder.read_result(folder) for folder in folders]))


@app.command()
def env(
  kernels: Annotated[bool, typer.Option("--kernels", help="Shows which kernel runs each form of weight.")] = False,
) -> None:
  """Shows what decides speed here: versions, devices, CUDA, compiler, instruction sets.

  Examples:

    lmcompress env

    lmcompress env --kernels
  """
  from lmcompress.environment import facts

  screen = console()
  if kernels:
    from rich.table import Table

    from lmcompress.ops import backends

    rows = backends()
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
      table.add_row(*row.values())
    wide(screen).print(table)
    return
  for name, value in facts().items():
    screen.print(f"{name:>12}: {value}", highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
  """What a user can mend is one line on standard error and exit code 2, never a traceback."""
  try:
    yield
  except (LmcompressError, ValueError, FileExistsError, IsADirectoryError, PermissionError) as error:
    _fail(str(error), 2)
  except BrokenPipeError:
    os._exit(0)
  except OSError as error:
    _fail(str(error), 2 if error.errno in (28, 27) else 1)
  except KeyboardInterrupt:
    _fail("interrupted", 130)
  except Exception as error:
    if not _one_of_many():
      raise
    what = " ".join(str(error).split())[:300]
    _fail(f"this process failed, or lost another one ({type(error).__name__}: {what}); what was saved is kept", 1)


def _one_of_many() -> bool:
  jax = sys.modules.get("jax")
  return jax is not None and jax.distributed.is_initialized()


def _fail(message: str, code: int) -> None:
  sys.stderr.write(f"lmcompress: {' '.join(message.split())}\n")
  if _one_of_many():  # the end of an interpreter waits for the other processes
    sys.stderr.flush()
    os._exit(code)
  raise SystemExit(code)


def main() -> None:
  """The `lmcompress` command."""
  with _one_line_errors():
    app()


if __name__ == "__main__":
  main()
