"""Pure Flax models, an architecture per file."""

from lmcompress.models.llama import Llama, LlamaConfig, LlamaSizes
from lmcompress.models.rope import Rope

ARCHITECTURES = {"llama": (Llama, LlamaConfig)}
"""Model class and config class by the architecture's name; a new model adds itself here."""

__all__ = ["ARCHITECTURES", "Llama", "LlamaConfig", "LlamaSizes", "Rope"]
