"""The command line: a verb for each thing one does with runs and models."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from lmcompress.cli_eval import evaluate
from lmcompress.cli_explain import explain
from lmcompress.cli_plan import plan
from lmcompress.cli_sweep import sweep
from lmcompress.cli_talk import ModelName, chat, classify, generate
from lmcompress.errors import ConfigError, LmcompressError, SourceError

app = typer.Typer(
  name="lmcompress",
  help="Compresses language models: quantization, pruning and their compositions, from config files.\n\n"
  "Start with: [bold]lmcompress run configs/smollm2/quickstart.yaml[/bold]",
  no_args_is_help=True,
  add_completion=False,
  rich_markup_mode="rich",
  pretty_exceptions_enable=False,
)

ConfigFile = Annotated[str, typer.Argument(help="A config file, or its name as `lmcompress ls` shows it.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Dotted overrides, e.g. evaluate.windows=4 seed=1.")]
Results = Annotated[Path, typer.Option("--results", help="Folder of the run folders.")]
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
KeyFile = Annotated[
  Path | None, typer.Option(help="The key's file; else LMCOMPRESS_KEY or LMCOMPRESS_KEY_FILE says it.")
]
RESULTS = Path("results")
CONFIGS = Path("configs")


def _console() -> Any:
  from rich.console import Console

  return Console()


class _Progress:
  """Shows a run's progress: bars in a terminal, a line for each part elsewhere."""

  def __init__(self, console: Any):
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    self.console = console
    self.interrupted = False
    self.live = console.is_terminal
    self.bars = Progress(
      TextColumn("{task.description}"),
      BarColumn(),
      MofNCompleteColumn(),
      TimeElapsedColumn(),
      console=console,
      transient=False,
    )
    self.tasks: dict[str, Any] = {}

  def _interrupt(self, *_: Any) -> None:
    """The first Ctrl-C ends the run after the part in work (an exception inside XLA is lost); the second at once."""
    if self.interrupted:
      os._exit(130)
    self.interrupted = True

  def __enter__(self) -> _Progress:
    self.before = signal.signal(signal.SIGINT, self._interrupt)
    if self.live:
      self.bars.start()
    return self

  def __exit__(self, *_: Any) -> None:
    signal.signal(signal.SIGINT, self.before)
    if self.live:
      self.bars.stop()

  def step(self, what: str, done: int, total: int) -> None:
    if self.interrupted:
      raise KeyboardInterrupt
    if not self.live:
      if done == total:
        self.console.print(f"{what}: {total} done", markup=False, highlight=False)
      return
    if what not in self.tasks:
      self.tasks[what] = self.bars.add_task(what, total=total)
    self.bars.update(self.tasks[what], completed=done)

  def note(self, text: str) -> None:
    self.console.print(text, markup=False, highlight=False)


def _find_config(name: str) -> Path:
  """A path, or a name below configs/ with or without `.yaml`."""
  from lmcompress.errors import ConfigError

  path = Path(name)
  with contextlib.suppress(OSError, ValueError):  # no name that a file can have
    for candidate in (path, CONFIGS / name, CONFIGS / f"{name}.yaml", *sorted(CONFIGS.glob(f"**/{name}.yaml"))):
      if candidate.is_file():
        return candidate
  raise ConfigError(f"{name}: no such config file; `lmcompress ls` lists those there are")


@app.command()
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

  path = _find_config(config)
  command = shlex.join(["lmcompress", "run", path.as_posix(), *(overrides or [])])
  loaded = load_config(path, overrides or [])
  _alone(local, profile, coordinator)
  if local is not None:
    _launch(local, ["run", path.as_posix(), *(overrides or []), "--results", str(results)], results / loaded.folder)
    return
  _join(coordinator, process, processes)
  _run(loaded, results, command, profile=profile)


@app.command()
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
  from lmcompress.errors import ConfigError

  if coordinator is None:
    if process is not None or processes is not None:
      raise ConfigError("--process and --processes go with --coordinator HOST:PORT")
    return
  from lmcompress.distributed import processes as many

  many.start(coordinator, process, processes)


def _alone(local: int | None, profile: bool, coordinator: str | None) -> None:
  """Refuses what `--local-processes` would leave out."""
  from lmcompress.errors import ConfigError

  if local is not None and (profile or coordinator is not None):
    raise ConfigError("--local-processes: several processes are not profiled, and find one another; leave that out")


def _launch(count: int, arguments: list[str], folder: Path) -> None:
  from lmcompress.errors import ConfigError
  from lmcompress.launch import launch

  if not 1 <= count <= 64:
    raise ConfigError(f"--local-processes {count}: from 1 to 64")
  code = launch(count, arguments, folder, lambda text: _console().print(text, markup=False, highlight=False))
  if code:
    raise typer.Exit(code)


def _run(config: Any, results: Path, command: str, folder: Path | None = None, profile: bool = False) -> None:
  from lmcompress import experiment, report, run_folder
  from lmcompress.distributed import processes

  console = _console()
  folder = run_folder.prepare(config, results, folder)
  try:
    with _Progress(console) as progress:
      result = experiment.run(config, results, command, progress, folder, profile)
  except KeyboardInterrupt:
    console.print(
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
  _wide(console).print(report.table(result))
  if result.get("generation"):
    g = result["generation"]
    for label, text in (("prompt", g["prompt"]), ("before", g["before"]), ("after", g["after"])):
      console.print(f"[bold]{label}[/bold]: ", end="")
      console.print(text.strip(), markup=False, highlight=False)
  for label, text in (
    ("report", folder / "report.html"),
    ("model", folder / run_folder.MODEL),
    ("repeat", result["command"]),
  ):
    console.print(f"{label:>7}: {text}", markup=False, highlight=False, soft_wrap=True)


def _wide(console: Any) -> Any:
  """Tables keep their columns where the output is no terminal."""
  if not console.is_terminal:
    console.width = max(console.width, 140)
  return console


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

  found = load_config(_find_config(config), overrides or [])
  console = _console()
  folder = results / found.folder
  try:
    with _Progress(console) as progress:
      result = searching.search(found, results, progress)
  except KeyboardInterrupt:
    console.print("\ninterrupted; what was measured is kept: the same command goes on", highlight=False)
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
  _wide(console).print(table)
  for label, name in (("best", searching.BEST), ("plot", searching.PLOT), ("result", searching.RESULT)):
    console.print(f"{label:>7}: {folder / name}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def validate(config: ConfigFile, overrides: Overrides = None) -> None:
  """Checks a config and prints it resolved; runs nothing.

  Example:

    lmcompress validate configs/smollm2/quickstart.yaml recipe.1.bits=3
  """
  from lmcompress.config import dump, load_config

  found = load_config(_find_config(config), overrides or [])
  typer.echo(dump(found), nl=False)
  typer.echo(f"# valid; runs in results/{found.folder}")


@app.command(name="ls")
def list_(results: Results = RESULTS) -> None:
  """Lists configs, models, texts and runs.

  Example:

    lmcompress ls
  """
  from rich.table import Table

  from lmcompress.data.text import TEXTS
  from lmcompress.io.hub import MODELS
  from lmcompress.run_folder import RESULT, run_folders

  console = _console()

  def show(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for row in rows or [("(none)", "")]:
      table.add_row(*row)
    console.print(table)

  configs = [(str(p), _first_line(p)) for p in sorted(CONFIGS.glob("**/*.yaml"))] if CONFIGS.is_dir() else []
  show("configs", configs)
  show("models", [(name, entry.description) for name, entry in MODELS.items()])
  show("texts", list(TEXTS.items()))
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
  from lmcompress.errors import ConfigError

  source = _find_config(config)
  if target.exists():
    raise ConfigError(f"{target} exists already; it is not overwritten")
  header = [line for line in source.read_text("utf-8").splitlines() if line.startswith("#")]
  target.parent.mkdir(parents=True, exist_ok=True)
  target.write_text("\n".join([*header, dump(load_config(source))]), "utf-8")
  typer.echo(f"{target} written; run it with: lmcompress run {target}")


for _verb in (generate, chat, classify, explain, plan, sweep):
  app.command()(_verb)
app.command(name="eval")(evaluate)


@app.command()
def bench(
  model: ModelName,
  prefill: Annotated[list[int], typer.Option(help="Tokens of a prompt that is read; repeat for more.")] = [512],  # noqa: B006
  depth: Annotated[list[int], typer.Option(help="Tokens in the cache where decoding starts; repeat.")] = [512],  # noqa: B006
  batch: Annotated[list[int], typer.Option(help="Sequences at once; repeat.")] = [1],  # noqa: B006
  decode: Annotated[int, typer.Option(help="Tokens written in each round.")] = 32,
  rounds: Annotated[int, typer.Option(help="Rounds that count, after a warm-up.")] = 5,
  activations: Annotated[str, typer.Option(help="What products round their inputs to: float32, bfloat16, int8.")] = (
    "float32"
  ),
  cache: Annotated[str, typer.Option(help="Keys and values: float32, bfloat16, int8, int4.")] = "float32",
  backend: Annotated[str, typer.Option(help="auto, native, pallas, reference.")] = "auto",
  recipe: Annotated[str | None, typer.Option(help="A config whose recipe compresses the model first.")] = None,
  bits: Annotated[int | None, typer.Option(help="Rounds the linears to this many bits first.")] = None,
  group_size: Annotated[int, typer.Option(help="Inputs that share a scale, with --bits.")] = 64,
  watts: Annotated[float | None, typer.Option(help="Power for joules, where nothing measures them.")] = None,
  json_: Annotated[str | None, typer.Option("--json", help="Writes JSON to a file; `-` prints it.")] = None,
  plot: Annotated[Path | None, typer.Option(help="Writes a roofline plot, an SVG file.")] = None,
) -> None:
  """Times prefill and decode on the kernels, and holds them against what memory and arithmetic allow.

  Examples:

    lmcompress bench smollm2-135m

    lmcompress bench smollm2-135m --recipe configs/smollm2/quickstart.yaml --batch 1 --batch 8 --plot roofline.svg

    lmcompress bench smollm2-135m --bits 4 --group-size 32 --activations int8 --cache int8 --depth 512 --depth 4096

    lmcompress bench results/quickstart-1a2b3c4d/model --json -
  """
  import json

  from lmcompress import bench_report
  from lmcompress.evaluate import bench as benches
  from lmcompress.io.load import load
  from lmcompress.ops import use_backend

  for path in filter(None, (plot, Path(json_) if json_ not in (None, "-") else None)):
    if not path.parent.is_dir() or path.is_dir():
      raise SourceError(f"{path}: it cannot be written; name a file in a folder that is there")
  if plot is not None and plot.suffix != ".svg":
    raise SourceError(f"--plot {plot}: the plot is SVG; name it {plot.with_suffix('.svg').name}")
  links, calibration = _links(recipe, bits, group_size)
  progress = sys.stderr.isatty()
  try:
    with use_backend(backend):
      benches.check(activations, cache, watts)
      net, params, tokenizer = load(model)
      params = _compressed(net, params, tokenizer, links, calibration)
      found = benches.bench(
        net,
        params,
        prefill=prefill,
        depth=depth,
        batch=batch,
        decode=decode,
        rounds=rounds,
        activations=activations,
        cache=cache,
        watts=watts,
        consume=True,
        note=lambda text: typer.echo(text, err=True) if progress else None,
      )
  except RuntimeError as error:  # a backend that cannot run here
    if isinstance(error, LmcompressError) or "use_backend" not in str(error):
      raise
    raise SourceError(str(error)) from None
  name = model + (f" with {recipe}" if recipe else f" at {bits} bits in groups of {group_size}" if bits else "")
  found = {"name": name, "recipe": links, **found}
  if plot is not None:
    bench_report.write_roofline(found, plot, name)
  text = json.dumps(found, indent=1)
  if json_ == "-":
    typer.echo(text)
    return
  if json_ is not None:
    Path(json_).write_text(text + "\n", "utf-8")
  _wide(_console()).print(bench_report.table(found, name))
  for label, path in (("json", json_), ("plot", plot)):
    if path is not None:
      typer.echo(f"{label}: {path}")


def _links(recipe: str | None, bits: int | None, group_size: int) -> tuple[list[dict[str, Any]], Any]:
  """The recipe of a config, or of a width, with what the config says of calibration."""
  from lmcompress.errors import ConfigError

  if recipe is None:
    link = {"name": "round_to_nearest", "bits": bits, "group_size": group_size}
    return ([] if bits is None else [link]), None
  if bits is not None:
    raise ConfigError(f"--recipe {recipe} and --bits {bits}: one of them; leave one out")
  from lmcompress.config import load_config

  config = load_config(_find_config(recipe), [])
  return list(config.recipe), config.calibration


def _compressed(net: Any, params: Any, tokenizer: Any, links: list[dict[str, Any]], calibration: Any) -> Any:
  if not links:
    return params
  import jax

  from lmcompress import recipe as recipes
  from lmcompress.calibration import compress
  from lmcompress.data.text import load_text, windows

  tokens = None
  if calibration is not None:
    if tokenizer is None:
      raise SourceError("the recipe is calibrated on a text and the model has no tokenizer")
    tokens = windows(tokenizer, load_text(calibration.text), calibration.windows, calibration.length)
  return compress(net, params, recipes.build(links), tokens, jax.random.key(0))[0]


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
  _wide(_console()).print(table(params, report, None if all_layers else 1))


@app.command()
def key(path: Annotated[Path, typer.Argument(help="The new file, readable by you alone.")]) -> None:
  """Makes a random key for encrypted models.

  Example:

    lmcompress key model.key
  """
  from lmcompress.io.encryption import new_key

  try:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
      file.write(new_key() + "\n")
  except FileExistsError:
    raise ConfigError(f"{path} is there; a key is never replaced") from None
  _console().print(f"a key is in {path}; what it encrypts cannot be read without it", markup=False, highlight=False)


@app.command()
def export(
  model: ModelName,
  folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
) -> None:
  """Writes a model as a Hugging Face folder, which transformers and others load; compressed weights become dense.

  Example:

    lmcompress export results/finetune-1a2b3c4d/model finetuned
  """
  import lmcompress as lmc
  from lmcompress.io.huggingface import save_folder

  net, params, tokenizer = lmc.load(model)
  save_folder(net, params, folder, tokenizer)
  _there(lambda: folder)


@app.command()
def encrypt(
  folder: Annotated[Path, typer.Argument(help="A model folder, e.g. results/quickstart-1a2b3c4d/model.")],
  target: Annotated[Path, typer.Argument(help="The new file.")],
  key_file: KeyFile = None,
) -> None:
  """Writes a model folder as one encrypted file (AES-256-GCM); `load` and every verb read it where the key is set.

  Examples:

    lmcompress encrypt results/quickstart-1a2b3c4d/model quickstart.enc --key-file model.key

    LMCOMPRESS_KEY_FILE=model.key lmcompress generate quickstart.enc "Once upon a time"
  """
  from lmcompress.io import encryption

  _there(lambda: encryption.encrypt(folder, target, encryption.read_key(key_file)))


@app.command()
def decrypt(
  source: Annotated[Path, typer.Argument(help="A file that `encrypt` wrote.")],
  folder: Annotated[Path, typer.Argument(help="The new model folder.")],
  key_file: KeyFile = None,
) -> None:
  """Writes the model folder of an encrypted file; another key or a changed file leaves nothing.

  Example:

    lmcompress decrypt quickstart.enc model --key-file model.key
  """
  from lmcompress.io import encryption

  _there(lambda: encryption.decrypt(source, folder, encryption.read_key(key_file)))


def _there(act: Callable[[], Path]) -> None:
  """What was written, or that something is there already."""
  try:
    done = act()
  except FileExistsError as error:
    raise ConfigError(str(error)) from None
  _console().print(f"written: {done}", markup=False, highlight=False, soft_wrap=True)


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
  console = _wide(_console())
  console.print(reports.table(result))
  console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


@app.command()
def compare(folders: Annotated[list[Path], typer.Argument(help="Two complete run folders or more.")]) -> None:
  """Puts runs side by side.

  Example:

    lmcompress compare results/quickstart-1a2b3c4d results/int8-5e6f7a8b
  """
  from lmcompress import report as reports
  from lmcompress import run_folder

  _wide(_console()).print(reports.compare_table([run_folder.read_result(folder) for folder in folders]))


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

  console = _console()
  if kernels:
    from rich.table import Table

    from lmcompress.ops import backends

    rows = backends()
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
      table.add_row(*row.values())
    _wide(console).print(table)
    return
  for name, value in facts().items():
    console.print(f"{name:>12}: {value}", highlight=False, markup=False, soft_wrap=True)


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
