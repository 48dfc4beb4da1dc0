"""Rotation: the hidden stream turned into another basis, in which no channel stands out; the function stays."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.arrays import MaskedArray
from lmcompress.ops.hadamard import random_rotation
from lmcompress.transforms.combine import path_key, require_dense
from lmcompress.transforms.structure import places, stream_norms
from lmcompress.types import Evidence, Params, Stage, State, Transform, WeightError

_TOLERANCE = 1e-3


def rotate(heads: bool = True) -> Transform:
  """Turns the hidden stream by a random Hadamard matrix (Ashkboos et al. 2024, QuaRot, arXiv:2404.00456).

  The scales of norms move into the linears that read them, and the last one into the head, which is untied from the
  embedding where they shared a table; then every weight that reads or writes the hidden stream is turned. Outliers
  of weights and activations spread over all channels, so that rounding hurts less. Nothing is rounded: the logits stay
  as they are, which is checked on a few tokens. To be followed by a method that quantizes. Under norms that subtract a
  mean (Ba et al. 2016, arXiv:1607.06450) the rotation is one that leaves means as they are.

  Args:
    heads: also turns the values within each head, and the linear that reads them back.

  Raises:
    WeightError: a weight is compressed already, a norm is not where the structure says or has scales of 0 beside a
      bias, or the logits changed.
  """

  def init(params: Params, selected: frozenset[str] | None = None) -> State:
    for path, leaf in tree.weights(params).items():
      require_dense("rotate", path, leaf)
      if isinstance(leaf, MaskedArray):
        raise WeightError(f"rotate at {path}: the weight is masked; rotate first and prune afterwards")
    if selected is not None and (left := tree.default_selection(params) - selected):
      raise WeightError(f"rotate turns the whole model; {min(left)} is not selected, leave the pattern out")
    return ()

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    model, key = evidence.structure, evidence.key
    if key is None:
      raise WeightError("rotate draws signs at random: pass a key")
    folded, hidden = fold_norms(model, params)
    turned = [place for place in places(model, folded, hidden) if not place.path.endswith("/scale")]
    sizes = {tree.get(folded, place.path).shape[place.dim] for place in turned}
    if len(sizes) != 1:
      raise WeightError(f"rotate: axis {hidden!r} has extents {sorted(sizes)}; a rotation needs one")
    norms = stream_norms("rotate", model, folded)[1]
    centred = any(tree.get(folded, f"{path}/bias") is not None for path in norms)
    q, done = random_rotation(sizes.pop(), path_key(key, hidden), centred), folded
    for place in turned:  # every leaf along the hidden axis in the new basis, in which the stream is `h Q`
      done = tree.put(done, place.path, _times(tree.get(done, place.path), q, place.dim))
    if heads:
      for block in model.blocks(done):
        for stage in block.stages:
          done = _turn_heads(model, done, block.path, stage, path_key(key, block.path))
    _check(model, params, done)
    return done, state

  return Transform(init, apply, needs=frozenset({"key"}), scope="model", name="rotate", inputs=True)


def fold_norms(model: Any, params: Params) -> tuple[Params, str]:
  """Moves each norm's scale into the linears that read its output, and leaves ones; also the hidden axis' name.

  A bias is divided by it. The head, where it is the embedding itself, becomes a table of its own.

  Raises:
    WeightError: a norm feeds no stage, or has a bias and a scale of 0.
  """
  hidden, norms = stream_norms("rotate", model, params)
  blocks = model.blocks(params)
  feeds = {
    f"{block.path}/{stage.source}": [f"{block.path}/{linear}/kernel" for linear in stage.readers]
    for block in blocks
    for stage in block.stages
  }
  outside = [path for path in norms if not any(path.startswith(f"{block.path}/") for block in blocks)]
  for path in norms:
    if path not in feeds and outside != [path]:
      raise WeightError(f"rotate at {path}: no stage reads this norm, so its scale cannot move into a linear")
    scale, bias = tree.get(params, f"{path}/scale").astype(jnp.float32), tree.get(params, f"{path}/bias")
    if bias is not None:
      if not bool(jnp.all(scale != 0)):
        raise WeightError(f"rotate at {path}: a scale of 0 beside a bias cannot move into the linears that read it")
      params = tree.put(params, f"{path}/bias", (bias / scale).astype(bias.dtype))
    for reader in feeds.get(path, []):
      w = tree.get(params, reader)
      if w is not None:
        params = tree.put(params, reader, (w * scale[:, None]).astype(w.dtype))
    if path not in feeds and not bool(jnp.all(scale == 1)):
      table = params["head"]["table"] if "head" in params else params["embed"]["table"]
      params = tree.put(params, "head/table", (table * scale).astype(table.dtype))
    params = tree.put(params, f"{path}/scale", jnp.ones_like(tree.get(params, f"{path}/scale")))
  return params, hidden


def _times(w: jax.Array, q: jax.Array, i: int) -> jax.Array:
  """`w` with its dimension `i` multiplied by Q: what reads the stream becomes `Q^T W`, what writes it `W Q`."""
  turned = jnp.tensordot(w.astype(jnp.float32), q, axes=([i], [0]), precision=jax.lax.Precision.HIGHEST)
  return jnp.moveaxis(turned, -1, w.ndim + i).astype(w.dtype)


def _turn_heads(model: Any, params: Params, block: str, stage: Stage, key: jax.Array) -> Params:
  """Turns what the source of a stage gives along the axes that may turn freely, and turns it back in the readers."""
  source = f"{block}/{stage.source}"
  for axis in stage.free:
    extent = model.extents(params)[axis]
    q = random_rotation(extent, path_key(key, f"{stage.name}/{axis}"))
    ends = [(f"{source}/kernel", -1), (f"{source}/bias", -1)]
    for path, i in ends + [(f"{block}/{linear}/kernel", -2) for linear in stage.linears]:
      leaf = tree.get(params, path)
      if leaf is None:
        continue
      names = tree.axes_of(model.axes, path)[i]
      if not isinstance(names, tuple) or names[-1] != axis:
        raise WeightError(f"rotate at {path}: its axis {names} does not end in {axis!r}")
      shape, where = leaf.shape, leaf.ndim + i
      split = leaf.reshape(*shape[:where], shape[where] // extent, extent, *shape[where + 1 :])
      params = tree.put(params, path, _times(split, q, i).reshape(shape))
  return params


def _check(model: Any, before: Params, after: Params) -> None:
  """Raises unless both trees, where they are whole, give the same logits on a few tokens."""
  stages = [(block.path, stage) for block in model.blocks(before) for stage in block.stages]
  if any(tree.get(before, f"{path}/{linear}/kernel") is None for path, stage in stages for linear in stage.linears):
    return
  vocab = before["embed"]["table"].shape[-2]
  tokens = np.random.default_rng(0).integers(0, vocab, (1, 8)).astype(np.int32)
  a, b = (jnp.asarray(model.apply(params, tokens), jnp.float32) for params in (before, after))
  apart = float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(a)), 1e-30))
  dtype = jnp.result_type(*(leaf.dtype for leaf in tree.weights(before).values()))
  allowed = max(_TOLERANCE, 16 * math.sqrt(len(model.blocks(before))) * float(jnp.finfo(dtype).eps))
  if not apart <= allowed:
    raise WeightError(f"rotate: the logits changed by {apart:.2g} of the largest; the structure does not tell all")
