"""Arithmetic: the door through which weights are met, rounding and masks. No trees, no names."""

from lmcompress.ops import quantized as _quantized  # registers its rules
from lmcompress.ops.linear import Rules, attend, embed, linear, register

__all__ = ["Rules", "attend", "embed", "linear", "register"]
del _quantized
