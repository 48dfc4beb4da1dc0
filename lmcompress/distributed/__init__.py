"""Meshes and sharding."""

import os

import jax

from lmcompress.distributed.sharding import RULES, make_mesh, placements, sequence_parallel, shard, shardings, spec_of

if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
  # virtual devices share the threads of a CPU: programs in flight together may keep one another waiting for ever
  os.environ.setdefault("NPROC", "32")
  jax.config.update("jax_cpu_enable_async_dispatch", False)

__all__ = ["RULES", "make_mesh", "placements", "sequence_parallel", "shard", "shardings", "spec_of"]
