"""How other libraries keep each architecture: names of tensors, and the config both ways; one file each."""

from lmcompress.io.architectures import bert, gpt2, llama

ALL = (llama.FOREIGN, gpt2.FOREIGN, *bert.FOREIGN)
"""A new architecture adds itself here."""
