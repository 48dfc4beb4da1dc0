"""summary: what a tree holds, leaf by leaf and in all."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress import tree
from lmcompress.evaluate.size import kind, sizes
from lmcompress.types import CompressedArray, Params


def rows(params: Params, report: Any = None) -> list[dict[str, Any]]:
  """Per leaf: `path`, `kind`, `shape`, `bits` (per entry), `sparsity`, `bytes`, and `error` where a report has one."""
  errors = {} if report is None else {path: row["weight_error"] for path, row in report.last().items()}
  return [
    {
      "path": path,
      "kind": kind(leaf),
      "shape": tuple(leaf.shape),
      "bits": tree.leaf_nbits(leaf) / max(1, leaf.size),
      "sparsity": float(_zeros(leaf)),
      "bytes": tree.leaf_nbits(leaf) / 8,
      "error": errors.get(path),
    }
    for path, leaf in tree.flatten(params).items()
  ]


@functools.partial(jax.jit)
def _zeros(leaf: Any) -> jax.Array:
  return jnp.mean((leaf.materialize() if isinstance(leaf, CompressedArray) else leaf) == 0)


def summary(params: Params, report: Any = None, depth: int | None = 1) -> None:
  """Prints a table of the tree, and its totals.

  Args:
    params: a parameter tree, compressed or not.
    report: what `compress` returned, for a column of errors.
    depth: how many layers are shown leaf by leaf; the others, alike, are left out. None shows all.
  """
  from rich.console import Console

  console = Console()
  if not console.is_terminal:
    console.width = max(console.width, 110)
  console.print(table(params, report, depth))


def table(params: Params, report: Any = None, depth: int | None = None) -> Any:
  """The table that `summary` prints."""
  from rich.table import Table

  out = Table(title=None, box=None, header_style="bold", pad_edge=False)
  out.add_column("path", no_wrap=True)
  for name in ("stored as", "shape"):
    out.add_column(name, no_wrap=True)
  for name in ("bits", "zeros", "kB", "error"):
    out.add_column(name, justify="right", no_wrap=True)
  layers = sorted(params.get("layers", {}), key=lambda k: tree.natural(k))
  shown = set(layers if depth is None else layers[:depth])
  hidden = False
  for row in rows(params, report):
    parts = row["path"].split("/")
    if parts[0] == "layers" and parts[1] not in shown:
      if not hidden:
        out.add_row(f"layers/{layers[len(shown)]}..{layers[-1]}", "(not shown)", "", "", "", "", "")
      hidden = True
      continue
    error = "" if row["error"] is None else f"{row['error']:.4f}"
    out.add_row(
      row["path"],
      row["kind"],
      "x".join(map(str, row["shape"])),
      f"{row['bits']:.3f}",
      f"{row['sparsity']:.1%}",
      f"{row['bytes'] / 1e3:,.1f}",
      error,
    )
  total = sizes(params)
  out.caption = (
    f"{int(total['parameters']):,} parameters, {total['bits_per_weight']:.3f} bits per weight, "
    f"{total['nbits'] / 8e6:,.2f} MB"
  )
  return out
