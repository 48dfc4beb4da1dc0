"""Which kernels run: the choice of a backend, and the table that says what runs where."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

BACKENDS = ("auto", "native", "pallas", "reference")

_context: Any = jax.make_user_context(default_value="auto")  # part of jit's cache key, so that a choice retraces


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
  """Chooses the kernels within a `with` block.

  Args:
    name: `auto` takes the fastest there is; `native` the C++ kernels, `pallas` those for GPU and TPU (interpreted on
      a CPU, slowly), each refused where it cannot run; `reference` plain JAX.

  Raises:
    ValueError: the name is none of these.
    RuntimeError: that backend cannot run here.
  """
  if name not in BACKENDS:
    raise ValueError(f"use_backend({name!r}): one of {', '.join(BACKENDS)}")
  if name == "native" and (jax.default_backend() != "cpu" or native() is None):
    raise RuntimeError(f"use_backend('native'): {_why_not_native()}")
  with _context(name):
    yield


def chosen() -> str:
  """The backend of the innermost `use_backend`, `auto` outside of any."""
  return _context.value


def runs_native() -> bool:
  """Whether the C++ kernels are to run: on a CPU, built, and not chosen away."""
  return chosen() in ("auto", "native") and jax.default_backend() == "cpu" and native() is not None


def runs_pallas() -> bool:
  """Whether the Pallas kernels are to run: on a GPU or TPU, or because they were asked for."""
  return chosen() == "pallas" or (chosen() == "auto" and jax.default_backend() in ("gpu", "tpu"))


@functools.cache
def native() -> Any:
  """The compiled module with its handlers registered, or None; says once what is missing."""
  try:
    from lmcompress import _native  # pyright: ignore[reportAttributeAccessIssue]
  except ImportError:
    if jax.default_backend() == "cpu":
      warnings.warn(_why_not_native(), RuntimeWarning, stacklevel=2)
    return None
  for name, handler in _native.handlers().items():
    jax.ffi.register_ffi_target(name, handler, platform="cpu")
  return _native


def _why_not_native() -> str:
  if jax.default_backend() != "cpu":
    return f"the native kernels are for CPUs; this is a {jax.default_backend()}"
  return (
    "the CPU kernels are not built, the slower reference runs; install a C++ compiler (GCC or Clang) and "
    "`pip install --force-reinstall lmcompress`"
  )


def describe() -> str:
  """The kernels that multiply compressed weights here, in a few words, e.g. `native avx512, 2 threads`."""
  if runs_native():
    return f"native {native().isa()}, {threads()} threads"
  if runs_pallas():
    return f"pallas ({jax.default_backend()})"
  return f"reference (XLA {jax.default_backend()})"


def threads() -> int:
  """Threads that work on one operation: the cores of the affinity mask, at most LMCOMPRESS_THREADS."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  most = os.environ.get("LMCOMPRESS_THREADS", "")
  return max(1, min(cores, int(most))) if most.isdigit() else cores


_FORMS = {
  "int2 ... int8 (row, group, tensor; symmetric, zero point, minimum, quantized scales)": ("linear", "embed", "attend"),
  "nf4, mxfp4, nvfp4, fp8": ("linear", "embed", "attend"),
  "clustered": ("linear", "embed", "attend"),
  "e8p (2 bits; laid out in 4)": ("linear", "embed", "attend"),
  "int8 per token or group x int2 ... int8": ("linear", "embed", "attend"),
  "bfloat16": ("linear", "embed", "attend"),
  "n:m": ("linear", "embed", "attend"),
  "bitmap": ("linear", "embed", "attend"),
  "nested (laid out at one precision)": ("linear", "embed", "attend"),
  "outlier channels apart": ("linear", "embed", "attend"),
  "low rank": ("linear", "embed", "attend"),
  "masked (a training form)": (),
  "dense float32": (),
}
_PALLAS = {"int2 ... int8": "int4 and int8", "nf4": "fp8", "n:m": "2:4"}


def backends() -> list[dict[str, str]]:
  """What runs where: a row for each form, with the kernel for `cpu`, `gpu` and `tpu`, as they are in this install."""
  cpu = f"native {native().isa()}" if jax.default_backend() == "cpu" and native() is not None else "reference"
  rows = []
  for form, doors in _FORMS.items():
    pallas = next((f"pallas: {what}" for start, what in _PALLAS.items() if form.startswith(start)), "reference")
    if form.startswith("dense"):
      rows.append({"form": form, "cpu": "XLA", "gpu": "XLA", "tpu": "XLA"})
    else:
      rows.append({"form": form, "cpu": cpu if doors else "reference", "gpu": pallas, "tpu": pallas})
  return rows


_said: set[str] = set()


def say_once(what: str) -> None:
  """Warns that a form has no fast path here; once for each form."""
  if what not in _said:
    _said.add(what)
    warnings.warn(what, RuntimeWarning, stacklevel=3)


def read_bandwidth(nbytes: int = 1 << 29, rounds: int = 5) -> float:
  """Bytes per second that the native kernels' threads read from memory, the best of `rounds` over `nbytes`.

  Raises:
    RuntimeError: there are no native kernels.
  """
  import time

  if jax.default_backend() != "cpu" or native() is None:
    raise RuntimeError(f"read_bandwidth: {_why_not_native()}")
  block = jax.device_put(np.zeros(nbytes // 4, np.float32))
  block = block + 1  # pages of its own, not the one zero page
  read = jax.jit(jax.ffi.ffi_call("lmc_read", jax.ShapeDtypeStruct((2,), np.uint32)))
  jax.block_until_ready(read(block))
  best = float("inf")
  for _ in range(rounds):
    begun = time.perf_counter()
    jax.block_until_ready(read(block))
    best = min(best, time.perf_counter() - begun)
  return nbytes / best
