"""The verbs `run` and `resume`: by this process, as one of several, or by several that are started here."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from lmcompress.errors import ConfigError, LmcompressError
from lmcompress.terminal import RESULTS, ConfigFile, Overrides, Progress, Results, console, find_config, wide

Coordinator = Annotated[
  str | None, typer.Option("--coordinator", help="HOST:PORT of process 0 of several, or auto on a cluster.")
]
Process = Annotated[int | None, typer.Option("--process", help="The number of this process, from 0.")]
Processes = Annotated[int | None, typer.Option("--processes", help="How many processes there are.")]
Local = Annotated[
  int | None, typer.Option("--local-processes", help="Starts so many processes on this machine, and ends all with one.")
]
Profile = Annotated[
  bool, typer.Option("--profile", help="Traces a few steps for TensorBoard, and shows what took longest in the report.")
]


def run(
  config: ConfigFile,
  overrides: Overrides = None,
  results: Results = RESULTS,
  profile: Profile = False,
  coordinator: Coordinator = None,
  process: Process = None,
  processes: Processes = None,
  local: Local = None,
) -> None:
  """Runs a config: compresses, measures every stage, saves the model, writes the report.

  Examples:

    lmcompress run configs/smollm2/quickstart.yaml

    lmcompress run configs/smollm2/quickstart.yaml evaluate.windows=4 recipe.1.bits=3 seed=1

    lmcompress run configs/smollm2/recover.yaml --profile

    lmcompress run configs/small/scratch.yaml mesh.data=-1 --local-processes 2

    lmcompress run configs/small/scratch.yaml mesh.data=-1 --coordinator 10.0.0.1:9876 --process 0 --processes 2
  """
  from lmcompress.config import load_config

  path = find_config(config)
  command = shlex.join(["lmcompress", "run", path.as_posix(), *(overrides or [])])
  loaded = load_config(path, overrides or [])
  _alone(local, profile, coordinator)
  if local is not None:
    _launch(local, ["run", path.as_posix(), *(overrides or []), "--results", str(results)], results / loaded.folder)
    return
  _join(coordinator, process, processes)
  _run(loaded, results, command, profile=profile)


def resume(
  folder: Annotated[Path, typer.Argument(help="A run folder, e.g. results/quickstart-1a2b3c4d.")],
  profile: Profile = False,
  coordinator: Coordinator = None,
  process: Process = None,
  processes: Processes = None,
  local: Local = None,
) -> None:
  """Continues a run that was cut off, keeping every score it had written; on as many processes as there are now.

  Example:

    lmcompress resume results/quickstart-1a2b3c4d
  """
  from lmcompress.run_folder import read_run

  loaded = read_run(folder)
  _alone(local, profile, coordinator)
  if local is not None:
    _launch(local, ["resume", folder.as_posix()], folder)
    return
  _join(coordinator, process, processes)
  _run(loaded, folder.parent, shlex.join(["lmcompress", "resume", folder.as_posix()]), folder, profile)


def _join(coordinator: str | None, process: int | None, processes: int | None) -> None:
  """Becomes one of many processes, if that is asked."""
  if coordinator is None:
    if process is not None or processes is not None:
      raise ConfigError("--process and --processes go with --coordinator HOST:PORT")
    return
  from lmcompress.distributed import processes as many

  many.start(coordinator, process, processes)


def _alone(local: int | None, profile: bool, coordinator: str | None) -> None:
  """Refuses what `--local-processes` would leave out."""
  if local is not None and (profile or coordinator is not None):
    raise ConfigError("--local-processes: several processes are not profiled, and find one another; leave that out")


def _launch(count: int, arguments: list[str], folder: Path) -> None:
  from lmcompress.launch import launch

  if not 1 <= count <= 64:
    raise ConfigError(f"--local-processes {count}: from 1 to 64")
  code = launch(count, arguments, folder, lambda text: console().print(text, markup=False, highlight=False))
  if code:
    raise typer.Exit(code)


def _run(config: Any, results: Path, command: str, folder: Path | None = None, profile: bool = False) -> None:
  from lmcompress import experiment, report, run_folder
  from lmcompress.distributed import processes

  screen = console()
  folder = run_folder.prepare(config, results, folder)
  try:
    with Progress(screen) as progress:
      result = experiment.run(config, results, command, progress, folder, profile)
  except KeyboardInterrupt:
    screen.print(
      f"\ninterrupted; what was measured is kept. Continue with: lmcompress resume {folder}", highlight=False
    )
    raise typer.Exit(130) from None
  except LmcompressError:
    begun = [run_folder.METRICS, run_folder.TRAINING]
    if processes.count() == 1 and not any((folder / name).exists() for name in begun):
      shutil.rmtree(folder, ignore_errors=True)
    raise
  if not processes.first():
    return
  wide(screen).print(report.table(result))
  if result.get("generation"):
    g = result["generation"]
    for label, text in (("prompt", g["prompt"]), ("before", g["before"]), ("after", g["after"])):
      screen.print(f"[bold]{label}[/bold]: ", end="")
      screen.print(text.strip(), markup=False, highlight=False)
  for label, text in (
    ("report", folder / "report.html"),
    ("model", folder / run_folder.MODEL),
    ("repeat", result["command"]),
  ):
    screen.print(f"{label:>7}: {text}", markup=False, highlight=False, soft_wrap=True)
