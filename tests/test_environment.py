"""What is kept on a machine from one start to the next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
from lmcompress.environment import keep_programs
keep_programs()
import jax, jax.numpy as jnp
seen = []
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event))
def f(x):
  for n in range(60):
    x = jnp.linalg.qr(jnp.sin(x) + n)[0] if n % 20 == 0 else jnp.sort(jnp.cos(x), axis=n % 2)
  return x
value = float(jax.jit(f)(jnp.ones((8, 8)))[0, 0])
print(value, seen.count("/jax/compilation_cache/cache_hits"), jax.config.jax_compilation_cache_dir)
"""


def started(cache: Path, **environment: str) -> tuple[str, int, str]:
  """What a new process computes, how many programs it finds, and where it keeps them."""
  rest = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_ENABLE", "JAX_PERSISTENT"))}
  env = {**rest, "LMCOMPRESS_CACHE": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **environment}
  done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=env)
  value, hits, where = done.stdout.split()
  return value, int(hits), where


def programs(folder: Path) -> set[str]:
  return {path.name for path in folder.rglob("*-cache")}


def test_a_second_start_finds_the_programs_of_the_first(tmp_path):
  value, hits, where = started(tmp_path)
  kept = programs(Path(where))
  assert hits == 0 and Path(where).parent == tmp_path / "programs"
  assert any(name.startswith("jit_f-") for name in kept) and Path(where).stat().st_mode & 0o077 == 0
  again, hits, _ = started(tmp_path)
  assert again == value and hits == len(kept) and programs(Path(where)) == kept


def test_the_environment_has_the_last_word(tmp_path):
  assert started(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))[2] == str(tmp_path / "mine")
  assert not (tmp_path / "programs").exists()
  started(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
  assert not programs(tmp_path / "programs")


def test_a_folder_that_is_not_ones_own_keeps_none(tmp_path):
  (tmp_path / "file").write_text("")
  assert started(tmp_path / "file")[2] == "None"
  where = Path(started(tmp_path / "mine")[2])
  where.chmod(0o777)
  assert started(tmp_path / "mine")[1:] == (0, "None")
