"""How other libraries keep each architecture: names of tensors, and the config both ways; one file each."""

from lmcompress.io.architectures import bart, bert, gemma, gpt2, llama, phi, t5

ALL = (llama.FOREIGN, gpt2.FOREIGN, *bert.FOREIGN, *bart.FOREIGN, t5.FOREIGN, gemma.FOREIGN, phi.FOREIGN)
"""A new architecture adds itself here."""
