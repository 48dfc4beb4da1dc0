"""Generation: the KV cache, sampling, and the decode loop."""

from lmcompress.generation.cache import KVCache, LayerCache, init_cache
from lmcompress.generation.generate import decode, generate
from lmcompress.generation.sampling import Sampler

__all__ = ["KVCache", "LayerCache", "Sampler", "decode", "generate", "init_cache"]
