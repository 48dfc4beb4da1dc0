"""environment: the versions, devices and instruction sets that decide what runs and how fast."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmcompress

_ISA = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "sve")


def facts() -> dict[str, str]:
  """What `lmcompress env` prints, in order."""
  import jax

  from lmcompress.ops import backend

  devices = device()
  gpus = [d for d in jax.devices() if d.platform == "gpu"]
  return {
    **versions(),
    "devices": f"{devices['devices']} x {devices['name']} ({devices['platform']}), {devices['cores']} cores",
    "backend": backend.describe(),
    "cuda": _plugin("cuda")
    if gpus
    else "none in use" + ("; the extra `lmcompress[cuda]` brings it" if not _plugin("cuda") else ""),
    "cudnn": _package("nvidia-cudnn-cu13") or _package("nvidia-cudnn-cu12") or "none",
    "compiler": _compiler(),
    "isa": " ".join(_flags()) or "unknown",
    "machine": f"{platform.system()} {platform.machine()}",
  }


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
  """Within it float32 products are of float32, also where a device's default is tf32 or bfloat16.

  Hessians, factorizations and scores are to agree with a CPU's; products of bfloat16 stay as fast as they are.
  """
  import jax

  cpu = jax.default_backend() == "cpu"
  with contextlib.nullcontext() if cpu else jax.default_matmul_precision("float32"):
    yield


def versions() -> dict[str, str]:
  """Versions of what decides a result."""
  from importlib.metadata import version

  return {
    "lmcompress": lmcompress.__version__,
    "python": platform.python_version(),
    **{name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
  }


def device() -> dict[str, Any]:
  """The devices that ran."""
  import jax

  first = jax.devices()[0]
  return {
    "platform": first.platform,
    "name": first.device_kind,
    "devices": jax.device_count(),
    "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
  }


def _plugin(name: str) -> str:
  return _package(f"jax-{name}13-plugin") or _package(f"jax-{name}12-plugin")


def _package(name: str) -> str:
  from importlib.metadata import PackageNotFoundError, version

  try:
    return f"{name} {version(name)}"
  except PackageNotFoundError:
    return ""


def _compiler() -> str:
  for name in ("c++", "g++", "clang++"):
    found = shutil.which(name)
    if found:
      done = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=10, check=False)
      return done.stdout.splitlines()[0] if done.stdout else name
  return "none"


def _flags() -> list[str]:
  try:
    text = Path("/proc/cpuinfo").read_text()
  except OSError:
    return []
  line = next((x for x in text.splitlines() if x.lower().startswith(("flags", "features"))), "")
  return [flag for flag in _ISA if flag in line.split()]
