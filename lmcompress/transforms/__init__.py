"""A method per file, and the combinators that compose them."""

from lmcompress.transforms.combine import at, chain, leafwise, named_chain, partition, scheduled
from lmcompress.transforms.freeze import freeze
from lmcompress.transforms.magnitude import magnitude
from lmcompress.transforms.round_to_nearest import round_to_nearest

METHODS = {f.__name__: f for f in (round_to_nearest, magnitude, freeze)}
"""Method factories by the name that a recipe gives them; a new method adds itself here."""

__all__ = [
  "METHODS",
  "at",
  "chain",
  "freeze",
  "leafwise",
  "magnitude",
  "named_chain",
  "partition",
  "round_to_nearest",
  "scheduled",
]
