"""Mixtures of experts: rows go to the experts that a router chose for them, and to no other."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmcompress.ops.backend import use_backend
from lmcompress.tree import is_stacked

BLOCK = 128
"""Rows of one expert that are multiplied together, at most."""

ROWS = ("data", "fsdp")
"""Axes of a mesh that split rows."""

Run = Callable[[Any, jax.Array], jax.Array]
"""`(an expert's leaves, rows [n, inputs]) -> [n, outputs]`."""


def chosen(logits: jax.Array, count: int, normalize: bool) -> tuple[jax.Array, jax.Array]:
  """The likeliest experts of each row, and their weights (Shazeer et al. 2017, arXiv:1701.06538).

  Args:
    logits: the router's, `[..., experts]`.
    count: experts of a row.
    normalize: whether a row's weights add up to 1 (Mixtral), or are their shares among all experts.

  Returns:
    `(ids int32, weights float32)`, each `[..., count]`.
  """
  weights, ids = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), count)
  return ids, weights / jnp.sum(weights, axis=-1, keepdims=True) if normalize else weights


def mixture(
  run: Run, experts: Mapping[str, Any], x: jax.Array, logits: jax.Array, count: int, normalize: bool = True
) -> jax.Array:
  """The weighted sum of what its experts make of each row.

  Rows are sorted by expert and cut into blocks of one expert each, so that a block reads the weights of its expert
  alone, in whatever form they are stored; no row is dropped, whatever the router says (as Gale et al. 2022,
  arXiv:2211.15841). On a mesh rows stay where they are, and with an axis `expert` each device computes what its own
  experts give, which one sum over that axis adds up.

  Args:
    experts: a subtree for each expert by its number, or one whose leaves have a leading axis of experts.
    x: `[rows, inputs]`.
    logits: the router's, `[rows, experts]`.
    count, normalize: as of `chosen`.

  Returns:
    `[rows, outputs]` in the dtype of x, summed in float32.
  """

  def part(experts: Any, number: Any, x: jax.Array, logits: jax.Array) -> jax.Array:
    ids, weights = chosen(logits, count, normalize)
    here = None if number is None else number.size
    return _local(run, experts, x, ids if number is None else ids - number[0], weights, here)

  stacked, mesh = is_stacked(experts), jax.sharding.get_abstract_mesh()
  size = lambda name: 1 if mesh.empty else mesh.shape.get(name, 1)  # noqa: E731
  rows = tuple(name for name in ROWS if size(name) > 1)
  if x.shape[0] % math.prod(map(size, rows)):
    rows = ()
  over = stacked and size("expert") > 1
  if not rows and not over:
    return part(experts, None, x, logits).astype(x.dtype)
  split, lead = PartitionSpec(rows or None), PartitionSpec("expert" if over else None)
  names = {*rows, *(("expert",) if over else ())}
  alone = all(size(name) == 1 or name in names for name in mesh.axis_names)
  number = jnp.arange(jax.tree.leaves(experts)[0].shape[0], dtype=jnp.int32) if over else None

  def on_device(*given: Any) -> jax.Array:
    # XLA cannot split a kernel over another axis in here; products of plain JAX it can
    with contextlib.nullcontext() if alone else use_backend("reference"):
      y = part(*given)
    return (jax.lax.psum(y, "expert") if over else y).astype(x.dtype)

  return jax.shard_map(
    on_device, mesh=mesh, in_specs=(jax.tree.map(lambda _: lead, dict(experts)), lead, split, split), out_specs=split,
    axis_names=set(mesh.axis_names) if alone else names, check_vma=False,
  )(dict(experts), number, x, logits)  # fmt: skip


def _local(
  run: Run, experts: Mapping[str, Any], x: jax.Array, ids: jax.Array, weights: jax.Array, here: int | None
) -> jax.Array:
  """`mixture` on one device, float32; of ids outside of `0 .. here - 1` nothing is computed."""
  alone = None if is_stacked(experts) else [experts[name] for name in sorted(experts, key=int)]
  count = here or (len(alone) if alone is not None else jax.tree.leaves(experts)[0].shape[0])
  rows, choices = ids.shape
  total = rows * choices
  block = min(BLOCK, 1 << max(0, (total // count).bit_length() - 1))
  blocks = total if block == 1 else total // block + min(count, total)

  flat = jnp.where((ids < 0) | (ids >= count), count, ids).reshape(-1)
  order = jnp.argsort(flat, stable=True)
  expert = flat[order]
  load = jnp.zeros(count + 1, jnp.int32).at[flat].add(1)
  padded = -(-load // block) * block
  first, start = jnp.cumsum(load) - load, jnp.cumsum(padded) - padded
  place = start[expert] + jnp.arange(total, dtype=jnp.int32) - first[expert]
  place = jnp.where(expert == count, blocks * block, place)
  source = jnp.full(blocks * block, rows, jnp.int32).at[place].set((order // choices).astype(jnp.int32), mode="drop")
  share = jnp.zeros(blocks * block, jnp.float32).at[place].set(weights.reshape(-1)[order], mode="drop")
  ends = jnp.cumsum(padded[:count])
  which = jnp.searchsorted(ends, jnp.arange(blocks, dtype=jnp.int32) * block, side="right")

  outputs = jax.eval_shape(run, alone[0] if alone is not None else _one(experts, 0), x[:1]).shape[-1]
  nothing = jnp.zeros((block, outputs), x.dtype)

  @jax.checkpoint
  def some(which: jax.Array, source: jax.Array) -> jax.Array:
    """What an expert makes of a block of rows; made anew on the way back, which else keeps its weights each time."""
    rows = jnp.take(x, source, axis=0, mode="fill", fill_value=0)
    if alone is not None:
      branches = [functools.partial(run, leaves) for leaves in alone]
      return jax.lax.switch(which, [*branches, lambda _: nothing], rows)
    return jax.lax.cond(which < count, lambda: run(_one(experts, jnp.minimum(which, count - 1)), rows), lambda: nothing)

  given = (which.astype(jnp.int32), source.reshape(blocks, block))
  _, made = jax.lax.scan(lambda _, each: (None, some(*each)), None, given)
  made = made.reshape(blocks * block, outputs).astype(jnp.float32) * share[:, None]
  return jnp.zeros((rows, outputs), jnp.float32).at[source].add(made, mode="drop")


def _one(experts: Any, i: Any) -> Any:
  """The leaves of one expert of a stack: of compressed ones the bytes of that expert alone are read."""
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), experts)


UNCHOSEN = 0.1
"""What the inputs of tokens that an expert does not get are times, where its statistics are taken."""


def seen_by(ids: jax.Array, experts: int) -> list[jax.Array]:
  """For each expert `[..., 1]`: 1 for rows that go to it, `UNCHOSEN` for others.

  So an expert that the calibration text hardly uses is still solved for inputs of that kind, at a hundredth of the
  weight in second moments, and for one that is used this changes little.
  """
  return [jnp.where(jnp.any(ids == e, axis=-1, keepdims=True), 1.0, UNCHOSEN) for e in range(experts)]

