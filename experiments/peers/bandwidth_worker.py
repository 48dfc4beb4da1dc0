"""The memory's read bandwidth in GB/s, the ceiling of decoding: `bandwidth.c`, or NumPy where no compiler is."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from protocol import Answer, Setting, answer, serve

_NBYTES = 1 << 30
_REPEATS = 5


def build(setting: Setting) -> tuple[dict[str, Any], dict[str, Any]]:
  compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
  seconds = _in_c(compiler, setting) if compiler else _in_numpy(setting)

  def bandwidth() -> Answer:
    return answer(_NBYTES / 1e9, [seconds() for _ in range(_REPEATS)])

  return {"versions": {}, "notes": "C" if compiler else "NumPy (no C compiler)"}, {"bandwidth": bandwidth}


def _in_c(compiler: str, setting: Setting) -> Callable[[], float]:
  source, library = Path(__file__).with_name("bandwidth.c"), Path(setting.folder) / "bandwidth.so"
  library.parent.mkdir(parents=True, exist_ok=True)
  flags = ["-O3", "-march=native", "-pthread", "-shared", "-fPIC"]
  result = subprocess.run([compiler, *flags, "-o", str(library), str(source)], capture_output=True, text=True)
  if result.returncode:
    raise RuntimeError(f"{source.name} does not compile: {result.stderr.strip().splitlines()[0]}")
  code = ctypes.CDLL(str(library))
  code.make.restype, code.make.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  code.seconds.restype = ctypes.c_double
  code.seconds.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  data = code.make(_NBYTES)
  if not data:
    raise MemoryError(f"no {_NBYTES} bytes to read")
  return lambda: code.seconds(data, _NBYTES, setting.threads)


def _in_numpy(setting: Setting) -> Callable[[], float]:
  shares = np.array_split(np.ones(_NBYTES // 8), setting.threads)
  pool = ThreadPoolExecutor(setting.threads)

  def seconds() -> float:
    begun = time.perf_counter()
    list(pool.map(np.sum, shares))  # np.sum releases the lock
    return time.perf_counter() - begun

  return seconds


if __name__ == "__main__":
  serve(build)
