"""environment: the versions, devices and instruction sets that decide what runs and how fast."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmcompress

PROGRAMS = "programs"
"""Folder of compiled programs below the cache folder."""
PROGRAMS_BYTES = 1 << 30
"""Of one kind of CPU; those used longest ago go first."""

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


def keep_programs() -> None:
  """Keeps compiled programs in the cache folder from one start to the next, those of each kind of CPU apart.

  They are machine code that is loaded as it is: a folder that others own or may write is not used, nor one that cannot
  be written. JAX's variables have the last word: `JAX_COMPILATION_CACHE_DIR` keeps programs elsewhere,
  `JAX_ENABLE_COMPILATION_CACHE=false` nowhere.
  """
  import jax

  from lmcompress.data.fetch import cache_folder

  if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
    return
  kind = hashlib.sha256(f"{platform.machine()} {_features()}".encode()).hexdigest()[:12]
  folder = cache_folder() / PROGRAMS / kind
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
  except OSError:
    return
  others = hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022)
  if others or not os.access(folder, os.W_OK | os.X_OK):
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))
  for name, value in (("persistent_cache_min_compile_time_secs", 0), ("compilation_cache_max_size", PROGRAMS_BYTES)):
    if f"JAX_{name.upper()}" not in os.environ:
      jax.config.update(f"jax_{name}", value)


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
  features = _features().split()
  return [flag for flag in _ISA if flag in features]


def _features() -> str:
  """What Linux says the CPU has, '' elsewhere."""
  try:
    text = Path("/proc/cpuinfo").read_text()
  except OSError:
    return ""
  return next((x for x in text.splitlines() if x.lower().startswith(("flags", "features"))), "")
