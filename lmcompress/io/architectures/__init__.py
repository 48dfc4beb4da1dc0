"""How other libraries keep each architecture: names of tensors, and the config both ways; one file each."""

from lmcompress.io.architectures import llama

ALL = (llama.FOREIGN,)
"""A new architecture adds itself here."""
