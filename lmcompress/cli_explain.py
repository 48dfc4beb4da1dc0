"""The verb `explain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lmcompress.cli_talk import ModelName
from lmcompress.errors import ConfigError, SourceError


def explain(
  model: ModelName,
  against: Annotated[str | None, typer.Option(help="The model before it was compressed: adds what changed.")] = None,
  text: Annotated[str, typer.Option(help="A known text or a file.")] = "grimm",
  windows: Annotated[int, typer.Option(help="Blocks of tokens from the text.")] = 4,
  length: Annotated[int, typer.Option(help="Tokens in a block.")] = 256,
  out: Annotated[Path, typer.Option(help="Folder for explain.json and plots.")] = Path("results/explain"),
) -> None:
  """Shows which layers, heads and neurons matter, outlier channels, and with --against what compression changed.

  A layer is left out and the loss measured; heads and neurons are scored by what the loss changes to first order
  without them.

  Examples:

    lmcompress explain smollm2-135m

    lmcompress explain results/quickstart-1a2b3c4d/model --against smollm2-135m --text pydoc
  """
  from rich.table import Table

  from lmcompress.data import text as texts
  from lmcompress.evaluate import importance
  from lmcompress.importance_plots import plots
  from lmcompress.io.load import load
  from lmcompress.terminal import Progress, console

  net, params, tokenizer = load(model)
  if tokenizer is None:
    raise SourceError(f"{model} has no tokenizer; put a tokenizer.json beside it")
  before = None if against is None else _before(against, model, net, params)
  tokens = texts.windows(tokenizer, texts.load_text(text), windows, length)
  screen = console()
  with Progress(screen) as progress:
    found = {"format": 1, "model": model, "against": against, "text": text}
    found |= importance.explained(net, params, tokens, tokenizer, before, progress.note)
  out.mkdir(parents=True, exist_ok=True)
  (out / "explain.json").write_text(json.dumps(found) + "\n", "utf-8")
  written = plots(found, out)
  columns = ("block", "loss when left out", "axes: share of the largest fifth", "largest outlier", "drift")
  table = Table(*columns, title=model)
  for block, axes in found["entries"].items():
    table.add_row(block, *_cells(found, axes, block))
  screen.print(table)
  if against is not None:
    worst = sorted((token for row in found["tokens"] for token in row), key=lambda token: -token[1])[:10]
    screen.print("most changed after: " + ", ".join(f"{word!r} {kl:.2f}" for word, kl in worst), markup=False)
  for path in written:
    screen.print(f"plot: {path}", markup=False, highlight=False, soft_wrap=True)


def _before(against: str, model: str, net: Any, params: Any) -> Any:
  """The tree to compare with.

  Raises:
    ConfigError: it is of another architecture or vocabulary.
  """
  from lmcompress.io.load import load

  other, before, _ = load(against)
  (theirs, other_name), (ours, name) = (
    (p["embed"]["table"].shape[-2], type(m).__name__) for p, m in ((before, other), (params, net))
  )
  if other_name != name or theirs != ours:
    told = f"a {other_name} with a vocabulary of {theirs}; {model} is a {name} with {ours}"
    raise ConfigError(f"--against {against}: {told}")
  return before


def _cells(found: dict[str, Any], axes: dict[str, Any], block: str) -> list[str]:
  import numpy as np

  shares = []
  for axis, x in axes.items():
    flat = np.sort(np.asarray(x))[::-1]
    top = flat[: max(1, round(flat.size / 5))].sum() / max(flat.sum(), 1e-300)
    shares.append(f"{axis} ({flat.size}): {top:.0%}")
  lost = found["layers"].get(block)
  rows = [row for row in found["outliers"] if row["block"] == block]
  top = max(rows, key=lambda row: row["ratio"], default=None)
  moved = [row["change"] for row in found.get("drift", ()) if row["block"] == block]
  return [
    "-" if lost is None else f"{lost:+.3f}", ", ".join(shares),
    "-" if top is None else f"{top['stage']} {top['channel']}: {top['ratio']:.0f}x",
    f"{max(moved):.3f}" if moved else "-",
  ]  # fmt: skip
