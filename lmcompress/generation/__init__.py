"""Generation: the KV cache, sampling, the decode engine, speculative decoding and prefix reuse."""

from lmcompress.generation.cache import KVCache, LayerCache, init_cache
from lmcompress.generation.engine import Engine, Stats
from lmcompress.generation.generate import decode, generate
from lmcompress.generation.prefix import PrefixCache
from lmcompress.generation.sampling import Sampler
from lmcompress.generation.speculative import first_layers

__all__ = [
  "Engine",
  "KVCache",
  "LayerCache",
  "PrefixCache",
  "Sampler",
  "Stats",
  "decode",
  "first_layers",
  "generate",
  "init_cache",
]
