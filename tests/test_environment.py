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
def f(x):
  for n in range(60):
    x = jnp.linalg.qr(jnp.sin(x) + n)[0] if n % 20 == 0 else jnp.sort(jnp.cos(x), axis=n % 2)
  return x
print(float(jax.jit(f)(jnp.ones((8, 8)))[0, 0]), jax.config.jax_compilation_cache_dir)
"""


def started(cache: Path, **environment: str) -> tuple[str, str]:
  """What a new process computes, and where it keeps programs."""
  rest = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_ENABLE"))}
  env = {**rest, "LMCOMPRESS_CACHE": str(cache), **environment}
  done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=env)
  assert done.stderr == ""
  value, where = done.stdout.split()
  return value, where


def programs(folder: Path) -> set[str]:
  return {path.name for path in folder.rglob("*-cache")}


def test_a_second_start_finds_the_programs_of_the_first(tmp_path):
  first, where = started(tmp_path)
  kept = programs(Path(where))
  assert Path(where).parent == tmp_path / "programs" and any(name.startswith("jit_f-") for name in kept)
  assert started(tmp_path) == (first, where) and programs(Path(where)) == kept


def test_the_environment_has_the_last_word(tmp_path):
  assert started(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))[1] == str(tmp_path / "mine")
  assert not (tmp_path / "programs").exists()


def test_a_folder_that_cannot_be_written_keeps_none(tmp_path):
  (tmp_path / "file").write_text("")
  assert started(tmp_path / "file")[1] == "None"
