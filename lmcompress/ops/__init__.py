"""Arithmetic: the door through which weights are met, rounding and masks. No trees, no names."""

from lmcompress.ops import dictionary as _dictionary  # these four register rules
from lmcompress.ops import factored as _factored
from lmcompress.ops import quantized as _quantized
from lmcompress.ops import sparse as _sparse
from lmcompress.ops.attention import View, attention, cross_attention, split_heads
from lmcompress.ops.backend import backends, use_backend
from lmcompress.ops.elementwise import argmax, gated_silu, rms_norm
from lmcompress.ops.kernels import cpu as _cpu  # and this one
from lmcompress.ops.linear import Rules, attend, embed, linear, linears, register
from lmcompress.ops.prepare import prepare

__all__ = [
  "Rules",
  "View",
  "argmax",
  "attend",
  "attention",
  "backends",
  "cross_attention",
  "embed",
  "gated_silu",
  "linear",
  "linears",
  "prepare",
  "register",
  "rms_norm",
  "split_heads",
  "use_backend",
]
del _cpu, _dictionary, _factored, _quantized, _sparse
