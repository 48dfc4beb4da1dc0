"""Meshes and sharding."""

from lmcompress.distributed.sharding import RULES, make_mesh, placements, shard, shardings, spec_of

__all__ = ["RULES", "make_mesh", "placements", "shard", "shardings", "spec_of"]
