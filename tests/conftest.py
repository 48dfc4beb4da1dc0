"""Every test runs on eight virtual CPU devices, and shares one small Llama."""

from __future__ import annotations

import gc
import importlib.metadata
import os
from pathlib import Path

_EIGHT = "--xla_force_host_platform_device_count=8"
_QUICK = "--xla_backend_optimization_level=0"  # tests compile much and compute little
if importlib.metadata.version("jaxlib").startswith("0.10."):  # it halves compiling; later ones have no such flag
  _QUICK += " --xla_cpu_use_fusion_emitters=false"
_PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600"
if _EIGHT not in os.environ.get("XLA_FLAGS", ""):  # eight threads on a busy machine may keep one another waiting
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_EIGHT} {_PATIENT} {_QUICK}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
gc.set_threshold(200_000, 20, 10)  # what JAX keeps of programs is much and lives long; to go through it takes a 15th
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads wait by spinning, which other workers pay for
os.environ.setdefault("NPROC", "32")  # XLA's threads: programs of eight devices in flight must not starve each other
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # workers, and the next run, share what one compiled
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_cpu_enable_async_dispatch", False)  # programs of eight devices in flight at once may starve

from lmcompress.models import Llama, LlamaConfig, LlamaSizes  # noqa: E402

_MAPPINGS = 40_000
"""Memory mappings above which compiled programs are dropped; Linux allows 65,530 and each program takes a few."""


LONGEST = ("test_every_architecture.py", "test_docs.py", "test_smollm2.py", "test_processes.py")
"""Files that begin first, so that no worker is left alone with one of them at the end."""


def pytest_collection_modifyitems(items):
  """Sorts by file; the order within each stays."""
  items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def _forget() -> None:
  """Before the mappings run out, in which case XLA crashes, forgets what was compiled."""
  maps = Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > _MAPPINGS:
    jax.clear_caches()
    gc.collect()  # programs that lie in cycles


@pytest.fixture(scope="module", autouse=True)
def apart():
  """Between files: few programs (to look at the mappings takes too long for each test), and flags as they were."""
  _forget()
  flags = os.environ["XLA_FLAGS"]
  yield
  assert os.environ["XLA_FLAGS"] == flags, "a test left other flags to the processes that later ones start"


@pytest.fixture
def few_programs_each():
  """Between tests, for a file that compiles very much."""
  _forget()


@pytest.fixture(scope="session")
def tiny():
  """`(model, params)`: two layers, grouped queries, an untied head; embed 32, mlp 64, vocab 64."""
  sizes = LlamaSizes(vocab=64, embed=32, mlp=64, layers=2, heads=4, kv_heads=2, tied=False)
  model = Llama(LlamaConfig(head_dim=8), sizes)
  return model, model.init(jax.random.key(0))
