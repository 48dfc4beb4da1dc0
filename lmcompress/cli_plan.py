"""The verb `plan`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer


def plan(
  model: Annotated[str, typer.Argument(help="A preset such as llama3-405b, a config, a known name, or a path.")],
  topology: Annotated[
    str | None, typer.Option("--topology", "-t", help="Sizes of the mesh, such as data=8,fsdp=16 or pipe=4,tensor=8.")
  ] = None,
  accelerator: Annotated[
    str | None, typer.Option("--accelerator", "-a", help="Such as h100 or tpu-v5p; all that are known by default.")
  ] = None,
  serve: Annotated[bool, typer.Option("--serve", help="Plans decoding instead of training.")] = False,
  batch: Annotated[int | None, typer.Option(help="Rows of a step over all devices; of a config, its own.")] = None,
  length: Annotated[int | None, typer.Option(help="Tokens of a row; of a config, its own.")] = None,
  compute: Annotated[str, typer.Option(help="Of products in training: bfloat16 or float32.")] = "bfloat16",
  price: Annotated[float | None, typer.Option(help="Of a device and hour, in any currency; none is assumed.")] = None,
  out: Annotated[Path | None, typer.Option(help="Writes the plan as JSON, too.")] = None,
) -> None:
  """What a model needs on a machine that need not be there, from shapes alone: no weights are read or held.

  Bytes of each device, messages of a step, the time that a roofline bounds it to, energy, cost, the largest batch that
  fits, and what compression makes the model fit.

  Examples:

    lmcompress plan llama3-405b --topology data=8,fsdp=16,tensor=8 --batch 1024 --length 4096

    lmcompress plan llama3-70b --serve --topology tensor=4 --accelerator h100 --length 8192

    lmcompress plan configs/small/scratch.yaml --topology data=2,tensor=2
  """
  from rich.console import Console
  from rich.table import Table

  from lmcompress import plan_request
  from lmcompress.distributed.accelerators import ACCELERATORS
  from lmcompress.errors import ConfigError

  if accelerator is not None and accelerator not in ACCELERATORS:
    raise ConfigError(f"--accelerator {accelerator}: none that is known here; those are {', '.join(ACCELERATORS)}")
  from lmcompress.terminal import find_config

  with contextlib.suppress(ConfigError):  # a config by its name
    model = str(find_config(model)) if model not in plan_request.PRESETS and not Path(model).exists() else model
  asked = plan_request.Asked.of(model, topology, serve, batch, length, compute)
  console = Console()
  console.width = console.width if console.is_terminal else max(console.width, 140)
  with console.status("the plan" if serve else "compiling the step for virtual devices"):
    made = asked.plan(asked.batch)
  devices = asked.devices
  table = Table("weights", "each", "split", "MiB a device", title=f"{model} on {devices} devices: {asked.said}")
  for row in made.placements:
    split = " x ".join(f"{n}/{to}" if to else str(n) for n, to in zip(row.shape, row.split, strict=True))
    each = f"{row.whole / row.leaves / 2**20:.2f} MiB"
    table.add_row(f"{row.leaves} {row.path}", each, split, f"{row.nbytes / 2**20:.2f}")
  console.print(table)
  table = Table("on one device", "GB")
  for what, nbytes in made.nbytes.items():
    table.add_row(what, f"{nbytes / 1e9:.3f}")
  table.add_row("together", f"{made.total / 1e9:.3f}")
  console.print(table)
  if made.messages:
    table = Table("sent in a step", "collective", "over", "times", "GB a device")
    for m in made.messages:
      table.add_row(m.what, m.kind, m.axis, str(m.count), f"{m.nbytes / 1e9:.3f}")
    console.print(table)
  unit = "decoding step" if serve else "step"
  columns = ["device", "fits", f"{unit}, s", "tokens/s", "J a token", "largest batch"]
  columns += ["form of layers that fits"] if serve else []
  table = Table(*columns, *(["cost of 10^9 tokens"] if price is not None else []))
  with console.status("the largest batch of each device"):
    named = {name: device for name, device in ACCELERATORS.items() if accelerator in (None, name)}
    rows = {name: asked.on(made, device) for name, device in named.items()}
  for name, found in rows.items():
    device = named[name]
    t = found["estimate"]
    cells = [
      name, "yes" if found["fits"] else f"no, {device.memory / 1e9:.0f} GB", f"{t.least:.4g} to {t.most:.4g}",
      f"{made.tokens / t.most:.4g} to {made.tokens / t.least:.4g}",
      "not published" if t.joules is None else f"{t.joules / made.tokens:.3g}", str(found["largest_batch"] or "none"),
    ]  # fmt: skip
    cells += [found["form"] or "none of these"] if serve else []
    if price is not None:
      cells.append(f"{devices * price * t.least / 3600 * 1e9 / made.tokens:.4g}")
    table.add_row(*cells)
  console.print(table)
  console.print(
    "Estimates: a roofline of data sheets, from all overlapped to nothing; latencies are not in it. Energy is the "
    "highest draw for the least time. What a training step makes is XLA's account of its program for CPUs."
  )
  if asked.note:
    console.print(f"Note: {asked.note}.")
  if asked.waiting:
    console.print(f"Stages wait for one another {asked.waiting:.0%} of a step, which is not in the seconds either.")
  if out is not None:
    body = {
      "format": 1, "model": model, "devices": devices, "sizes": asked.sizes, "serve": serve, "batch": asked.batch,
      "length": asked.length, "nbytes": made.nbytes, "total": made.total, "operations": made.operations,
      "note": asked.note,
      "messages": [m._asdict() for m in made.messages], "placements": [p._asdict() for p in made.placements],
      "devices_of": {name: {**found, "estimate": found["estimate"]._asdict()} for name, found in rows.items()},
    }  # fmt: skip
    out.write_text(json.dumps(body, indent=1) + "\n", "utf-8")

