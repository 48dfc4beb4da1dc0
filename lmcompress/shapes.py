"""Trees of shapes: what a model's `init` would make, and what a recipe would make of it, without any values."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress import tree
from lmcompress.calibration.statistics import STATISTICS
from lmcompress.transforms.combine import beneath_inputs
from lmcompress.types import ConfigError, Evidence, Params, Transform, WeightError


def shapes_of(model: Any) -> Params:
  """The tree that a model's `init` would make, as shapes."""
  return jax.eval_shape(model.init, jax.random.key(0))


def stored(params: Params, recipe: Any, dtype: Any = jnp.bfloat16, model: Any = None) -> Params:
  """The shapes of a tree after a recipe, what it leaves dense in `dtype`.

  Args:
    model: gives methods that calibrate the shapes of what they would collect, and its structure.

  Raises:
    ConfigError: what the recipe makes hangs on values, which are not there.
  """
  links, first = () if recipe is None else (recipe.links or (recipe,)), params

  def applied(link: Transform, params: Params) -> Params:
    link = beneath_inputs(link)
    state = link.init(params)  # what it refuses of any weights is no matter of values
    try:
      return link.apply(params, state, _evidence(link.needs, params, first, model))[0]
    except (AttributeError, WeightError) as error:
      raise TypeError(error) from None

  try:
    for link in links:
      if link.plan is not None:
        raise TypeError("it measures first, and then decides")
      params = jax.eval_shape(functools.partial(applied, link), params)
  except (jax.errors.ConcretizationTypeError, TypeError) as error:
    what = str(error).splitlines()[0]
    raise ConfigError(
      f"the recipe reads weights, and a plan has their shapes alone ({link.name}: {what}); name a method that stores "
      "them alike, such as round_to_nearest with the same bits and group_size"
    ) from None
  narrow = lambda x: jax.ShapeDtypeStruct(x.shape, dtype) if x.dtype == jnp.float32 else x  # noqa: E731
  return tree.map_leaves(lambda _, x: narrow(x) if isinstance(x, jax.ShapeDtypeStruct) else x, params)


def _evidence(needs: frozenset[str], params: Params, first: Params, model: Any) -> Evidence:
  """Evidence of the right shapes, all zeros."""
  weights = tree.weights(params)
  blocks = () if model is None else model.blocks(params)
  paths = [f"{b.path}/{linear}/kernel" for b in blocks for stage in b.stages for linear in stage.linears]
  wanted = [name for name in STATISTICS if name in needs]
  inputs = {path: weights[path].shape[tree.contraction_axis(path)] for path in paths if path in weights}
  dense = tree.map_leaves(lambda _, x: jnp.zeros(x.shape, jnp.float32), first)
  return Evidence(
    key=jax.random.key(0), structure=model, grads=dense, fisher=dense, reference=dense,
    statistics={path: {name: STATISTICS[name].init(n) for name in wanted} for path, n in inputs.items()},
  )  # fmt: skip
