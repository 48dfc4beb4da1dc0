"""The verb `bench`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lmcompress.cli_talk import ModelName
from lmcompress.errors import ConfigError, LmcompressError, SourceError
from lmcompress.terminal import console, find_config, wide


def bench(
  model: ModelName,
  prefill: Annotated[list[int], typer.Option(help="Tokens of a prompt that is read; repeat for more.")] = [512],  # noqa: B006
  depth: Annotated[list[int], typer.Option(help="Tokens in the cache where decoding starts; repeat.")] = [512],  # noqa: B006
  batch: Annotated[list[int], typer.Option(help="Sequences at once; repeat.")] = [1],  # noqa: B006
  decode: Annotated[int, typer.Option(help="Tokens written in each round.")] = 32,
  rounds: Annotated[int, typer.Option(help="Rounds that count, after a warm-up.")] = 5,
  activations: Annotated[
    str, typer.Option(help="What products round their inputs to: float32, bfloat16, int8, int8_token.")
  ] = "float32",
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
  wide(console()).print(bench_report.table(found, name))
  for label, path in (("json", json_), ("plot", plot)):
    if path is not None:
      typer.echo(f"{label}: {path}")


def _links(recipe: str | None, bits: int | None, group_size: int) -> tuple[list[dict[str, Any]], Any]:
  """The recipe of a config, or of a width, with what the config says of calibration."""
  if recipe is None:
    link = {"name": "round_to_nearest", "bits": bits, "group_size": group_size}
    return ([] if bits is None else [link]), None
  if bits is not None:
    raise ConfigError(f"--recipe {recipe} and --bits {bits}: one of them; leave one out")
  from lmcompress.config import load_config

  config = load_config(find_config(recipe), [])
  return list(config.recipe), config.calibration


def _compressed(net: Any, params: Any, tokenizer: Any, links: list[dict[str, Any]], calibration: Any) -> Any:
  if not links:
    return params
  import jax

  from lmcompress import recipe as recipes
  from lmcompress.calibration import compress, weigh_first
  from lmcompress.data.text import load_text, windows

  tokens = None
  if calibration is not None:
    if tokenizer is None:
      raise SourceError("the recipe is calibrated on a text and the model has no tokenizer")
    text = windows(tokenizer, load_text(calibration.text), calibration.windows, calibration.length)
    tokens = weigh_first(text, calibration.first_weight)
  return compress(net, params, recipes.build(links), tokens, jax.random.key(0))[0]
