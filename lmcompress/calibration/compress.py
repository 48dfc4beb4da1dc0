"""compress: drives a recipe over a model, weight by weight or block by block, and reports what it did."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress import tree
from lmcompress.arrays import StoredArray, fetch, resolve
from lmcompress.calibration.gradients import GRADIENTS, gradients
from lmcompress.calibration.sequential import Work, batches_of, block_by_block
from lmcompress.distributed.sharding import on_mesh_of
from lmcompress.evaluate.size import kind
from lmcompress.transforms.combine import STATISTICS, beneath_inputs, chain
from lmcompress.types import CompressedArray, Evidence, Params, Transform, WeightError

Progress = Callable[[str, int, int], None]
"""Called with the link's name, how many of its parts are done, and how many there are."""

_OWN = ("tokens", "attention_mask", "weights", "decoder_weights")
"""What of a calibration a model is not handed beside its tokens."""


@dataclasses.dataclass
class Report:
  """What a compression did.

  Attributes:
    rows: one dict per weight and link: `link`, `path`, `kind`, `shape`, `bits` (per entry, all parts counted),
      `sparsity` (fraction of exact zeros), `weight_error` (relative to the weight the run started from),
      `output_error` (relative, of what the linear gives on the calibration tokens, against the weight before the link;
      None where it was not measured), `seconds`.
    links: one dict per link: `name`, `seconds` (without the measuring of errors).
  """

  rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  links: list[dict[str, Any]] = dataclasses.field(default_factory=list)

  def last(self) -> dict[str, dict[str, Any]]:
    """The latest row of each weight, by path."""
    return {row["path"]: row for row in self.rows}

  def __str__(self) -> str:
    lines = [f"{'weight':<34}{'stored as':<22}{'bits':>7}{'zeros':>8}{'error':>9}{'output':>9}"]
    for path, row in sorted(self.last().items(), key=lambda item: tree.natural(item[0])):
      lines.append(
        f"{path:<34}{row['kind']:<22}{row['bits']:>7.3f}{row['sparsity']:>8.1%}{row['weight_error']:>9.4f}"
        + (f"{row['output_error']:>9.4f}" if row["output_error"] is not None else "")
      )
    return "\n".join(lines)


def compress(
  model: Any,
  params: Params,
  recipe: Transform | Iterable[Transform],
  calibration: Any = None,
  key: jax.Array | None = None,
  *,
  progress: Progress | None = None,
  on_link: Callable[[str, Params], None] | None = None,
  store: Any = None,
) -> tuple[Params, Report]:
  """Applies a recipe to a parameter tree.

  Each link of a chain is planned on the tree as the link before left it. A link that needs no statistics is
  applied weight by weight; one that does runs block by block over the calibration tokens, each block seeing
  what the compressed blocks before it produce. Experts that are stacked are taken apart, and stacked again at the end.

  Args:
    model: the model that the tree belongs to.
    params: the tree; it is not changed.
    recipe: a transform, usually a `chain`, or transforms in order.
    calibration: `[n, length]` int32 tokens, or `{"tokens", "attention_mask"}` where rows are padded, for methods that
      need statistics; `weights` beside them say how much each token counts in those, as in `block_by_block`.
    key: decides everything random.
    progress: told of each part that is done.
    on_link: called after each link with its name and the tree.
    store: an `io.store.Store`: finished blocks go there, and those that it has from a run that was cut off are not
      made again. With leaves that stay in files, memory holds one block, whatever the depth.

  Returns:
    The compressed tree and a `Report`.

  Raises:
    WeightError: a pattern selects nothing, a weight cannot be compressed as asked, calibration is missing, or experts
      that were stacked are no longer alike.
  """
  recipe = recipe if isinstance(recipe, Transform) else chain(*recipe)
  stacked, params = tree.has_stacked_experts(params), tree.unstack_experts(params)
  report, original = Report(), params
  dense: dict[str, Any] = {}
  links = list(recipe.links or (recipe,))
  for i, link in enumerate(links):  # a link that plans adds what it decided on after itself
    if link.phase == "step":
      raise WeightError(f"{link.name} acts inside a training step; compress runs 'once' transforms only")
    if unmet := link.needs - {"key", "structure", "tokens", "block", "reference", *GRADIENTS, *STATISTICS}:
      raise WeightError(f"{link.name} needs {', '.join(sorted(unmet))}, which compress does not collect")
    begun, link = time.perf_counter(), beneath_inputs(link)
    evidence = Evidence(key=None if key is None else jax.random.fold_in(key, i), structure=model)
    if "key" in link.needs and key is None:
      raise WeightError(f"{link.name} draws at random: pass key=jax.random.key(seed) to compress")
    if link.scope == "model" and any(isinstance(leaf, StoredArray) for leaf in tree.flatten(params).values()):
      raise WeightError(f"{link.name} needs the whole model in memory; leave it out, or load the model whole")
    state = link.init(params, None)
    before = params
    if any("reference" in later.needs for later in links[i:]):
      dense |= {path: leaf for path, leaf in tree.weights(params).items() if not isinstance(leaf, CompressedArray)}
      evidence = dataclasses.replace(evidence, reference=tree.unflatten(dense))
    kept = None if store is None or link.plan is not None else _Kept(store, i)
    if link.needs & {"tokens", "block", *GRADIENTS, *STATISTICS} and calibration is None:
      raise WeightError(f"{link.name} needs {', '.join(sorted(link.needs))}: pass calibration=tokens [n, length]")
    if "tokens" in link.needs:
      given = calibration["tokens"] if isinstance(calibration, Mapping) else calibration
      more = calibration if isinstance(calibration, Mapping) else {}
      beside = {name: jnp.asarray(x) for name, x in more.items() if name not in _OWN}
      evidence = dataclasses.replace(evidence, tokens=jnp.asarray(given), beside=beside)
    if asked := link.needs & set(GRADIENTS):
      told = None if progress is None else functools.partial(progress, f"gradients for {link.name}")
      with on_mesh_of(params):
        found = gradients(model, params, batches_of(calibration), asked, told)
      evidence = dataclasses.replace(evidence, **found)
    if link.needs & set(STATISTICS):
      with on_mesh_of(params):
        params, state, work = block_by_block(model, params, link, state, evidence, calibration, progress, kept)
    elif link.scope == "weight":
      params, work = _weight_by_weight(params, link, state, evidence, progress, kept)
    else:
      params, state = link.apply(params, state, evidence)
      params, work = jax.block_until_ready(params), Work()
    if link.plan is not None:
      planned = link.plan(state)
      links[i + 1 : i + 1] = planned.links or (planned,)
    report.links.append({"name": link.name, "seconds": time.perf_counter() - begun})
    report.rows += _rows(link.name, original, before, params, work)
    if on_link is not None:
      on_link(link.name, params)
  return tree.stack_experts(params) if stacked else params, report


@dataclasses.dataclass(frozen=True)
class _Kept:
  """The parts of one link in a store."""

  store: Any
  link: int

  def put(self, part: str, leaves: Mapping[str, Any], work: Mapping[str, Any]) -> dict[str, Any]:
    return self.store.put(self.link, part, leaves, work)

  def find(self, part: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    return self.store.find(self.link, part)


def _weight_by_weight(
  params: Params, link: Transform, state: Any, evidence: Evidence, progress: Progress | None, kept: _Kept | None
) -> tuple[Params, Work]:
  """Applies a link to one weight's subtree at a time, so that only one is in work."""
  leaves, work = tree.flatten(params), Work()
  paths = [path for path in leaves if tree.is_weight(path)]
  for n, path in enumerate(paths):
    begun = time.perf_counter()
    if kept is not None and (found := kept.find(path)) is not None:
      leaves[path], work.seconds[path] = found[0][path], found[1]["seconds"]
      continue
    leaf = fetch(leaves[path])
    done, _ = link.apply(tree.unflatten({path: leaf}), state, evidence)
    made = jax.block_until_ready(tree.get(done, path))
    work.seconds[path] = time.perf_counter() - begun
    if made is not leaf:
      told = {"seconds": work.seconds[path]}
      leaves[path] = made if kept is None else kept.put(path, {path: made}, told)[path]
    if progress is not None:
      progress(link.name, n + 1, len(paths))
  return tree.unflatten(leaves), work


def _rows(name: str, original: Params, before: Params, after: Params, work: Work) -> list[dict[str, Any]]:
  rows, first, old = [], tree.weights(original), tree.weights(before)
  for path, leaf in tree.weights(after).items():
    if old.get(path) is leaf:
      continue
    same = path in first and first[path].shape == leaf.shape
    now = fetch(resolve(after, leaf))
    error, zeros = _error(now, fetch(first[path]) if same else now)
    rows.append(
      {
        "link": name,
        "path": path,
        "kind": kind(leaf),
        "shape": list(leaf.shape),
        "bits": tree.leaf_nbits(leaf) / leaf.size,
        "sparsity": float(zeros),
        "weight_error": float(error) if same else float("nan"),
        "output_error": work.output_error.get(path),
        "seconds": work.seconds.get(path, 0.0),
      }
    )
  return rows


@functools.partial(jax.jit)
def _error(leaf: Any, original: Any) -> tuple[jax.Array, jax.Array]:
  """`||leaf - original|| / ||original||` and the fraction of exact zeros."""
  w, w0 = (x.materialize() if isinstance(x, CompressedArray) else x for x in (leaf, original))
  difference, norm = (jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)))) for x in (w - w0, w0))
  return jnp.where(norm > 0, difference / norm, difference), jnp.mean(w == 0)
