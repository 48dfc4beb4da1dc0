"""What XLA makes of a training step on devices that need not be there: compiled in processes apart, never run."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from lmcompress.errors import LmcompressError
from lmcompress.types import ConfigError, Params

MOST_DEVICES = 4096
"""How many are made at most."""

_FLAGS = (
  "--xla_cpu_enable_concurrency_optimized_scheduler=false",  # in order, as accelerators do, and not all at once
  "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",  # nothing runs it
)  # fmt: skip


class VirtualStep(NamedTuple):
  """A training step on a mesh.

  Attributes:
    params: shapes.
    training: of type `Training`.
    length: tokens of a row.
    trained: paths of the arrays that train, as of `tree.partition`.
    teacher: a model and its shapes.
    sizes: of the mesh.
    rules: as of `distributed.shardings`.
  """

  model: Any
  params: Params
  training: Any
  length: int
  trained: frozenset[str]
  teacher: tuple[Any, Params] | None
  sizes: Mapping[str, int]
  rules: Mapping[str, str | None]


def temporaries(steps: Sequence[VirtualStep]) -> list[int]:
  """Bytes that one device holds while it runs each step, its arguments (weights, moments, rows) not counted.

  They are XLA's own account of the step's program for CPUs: gradients, activations, gathered weights, copies. Each
  is compiled in a process that Python starts anew, so that a script that is run as one guards its main part.

  Raises:
    ConfigError: a mesh has more than `MOST_DEVICES`.
    LmcompressError: a step does not compile.
  """
  most = max(math.prod(step.sizes.values()) for step in steps)
  if most > MOST_DEVICES:
    raise ConfigError(f"a plan of {most} devices besides those that only repeat rows; {MOST_DEVICES} at most")
  workers = min(len(steps), os.cpu_count() or 1)
  anew = multiprocessing.get_context("spawn")
  with ProcessPoolExecutor(workers, mp_context=anew, initializer=_begin, initargs=(most,)) as pool:
    try:
      return list(pool.map(_compiled, steps))
    except BrokenProcessPool:
      raise LmcompressError("a process that compiled a plan's step ended; has the machine memory left?") from None


def _begin(devices: int) -> None:
  """Sets a new process up before JAX starts in it."""
  own = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
  os.environ["XLA_FLAGS"] = " ".join([*own, *_FLAGS])
  import jax

  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", devices)


def _compiled(step: VirtualStep) -> int:
  """Temporaries of a step, in a process of virtual devices."""
  import jax
  from jax.sharding import NamedSharding

  from lmcompress.distributed import make_mesh, sequence_parallel, shardings
  from lmcompress.training import compiled_step

  devices = math.prod(step.sizes.values())
  mesh = make_mesh(**step.sizes, devices=jax.devices()[:devices]) if devices > 1 else None

  def placed(model: Any, params: Params) -> Params:
    if mesh is None:
      return params
    put = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
    places = shardings(model, params, mesh, step.rules)
    return jax.tree.map(put, params, places, is_leaf=lambda x: isinstance(x, NamedSharding))

  try:
    teacher = None if step.teacher is None else (step.teacher[0], placed(*step.teacher))
    with sequence_parallel(step.rules.get("length") == "tensor"):
      params, trained = placed(step.model, step.params), step.trained.__contains__
      made = compiled_step(step.model, params, step.training, step.length, trained, None, teacher)
    return made.memory_analysis().temp_size_in_bytes
  except Exception as error:  # as words: JAX's own are not all such as another process can be given
    said = (str(error).strip() or "it says no more").splitlines()[0]
    raise LmcompressError(f"a plan's step does not compile: {type(error).__name__}: {said}") from None
