"""The verb `sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sweep(
  config: Annotated[str, typer.Argument(help="A config file, or its name as `lmcompress ls` shows it.")],
  overrides: Annotated[list[str] | None, typer.Argument(help="Dotted overrides of all runs.")] = None,
  grid: Annotated[
    list[str] | None, typer.Option("--grid", "-g", help="A dotted key and its values; repeat for a product.")
  ] = None,
  processes: Annotated[
    int | None, typer.Option("--processes", "-p", help="Runs at once: one, or with --ray as many as there is room for.")
  ] = None,
  ray: Annotated[
    str | None, typer.Option("--ray", help="The address of a Ray cluster, or local: its machines run the trials.")
  ] = None,
  cpus: Annotated[float, typer.Option("--cpus", help="CPUs that a run takes, with --ray.")] = 1,
  gpus: Annotated[float, typer.Option("--gpus", help="GPUs that a run takes, with --ray.")] = 0,
  results: Annotated[Path, typer.Option("--results", help="Folder of the run folders.")] = Path("results"),
) -> None:
  """Runs a config for every combination of values, or for each of its variants, and puts the runs in one table.

  Each is a run folder of its own; what is complete is not run again, so the same command continues a sweep.

  Examples:

    lmcompress sweep configs/smollm2/quickstart.yaml --grid "recipe.1.bits=[3,4,5]" --grid "seed=[0,1]"

    lmcompress sweep configs/small/distill.yaml --processes 2

    lmcompress sweep configs/small/distill.yaml --ray auto --gpus 1
  """
  from rich.table import Table

  from lmcompress.config import load_config
  from lmcompress.places import Here, OnRay
  from lmcompress.sweep import said, trials_of
  from lmcompress.sweep import sweep as run
  from lmcompress.terminal import Progress, console, find_config, wide

  loaded = load_config(find_config(config), overrides or [])
  screen = console()
  place = OnRay(ray, cpus, gpus) if ray else Here()
  try:
    at_once = processes if processes is not None else len(trials_of(loaded, grid or [], results)) if ray else 1
    with Progress(screen) as progress:
      folder, rows = run(loaded, grid or [], results, at_once, progress, place=place)
  finally:
    place.close()
  table = Table("run", "bits/weight", "MB", "perplexity", "KL", "s", "folder")
  for row in rows:
    if row["error"]:
      table.add_row(said(row["choice"]), "", "", row["error"], "", "", row["folder"])
      continue
    scores = [", ".join(f"{value:.4f}" for value in row[key].values()) for key in ("perplexity", "kl")]
    table.add_row(
      said(row["choice"]), f"{row['bits_per_weight']:.2f}", f"{row['bytes_on_disk'] / 1e6:.1f}", *scores,
      f"{row['seconds']:.0f}", row["folder"],
    )  # fmt: skip
  wide(screen).print(table)
  screen.print(f"table: {folder / 'sweep.json'}", markup=False, highlight=False, soft_wrap=True)
  if any(row["error"] for row in rows):
    raise typer.Exit(1)
