"""Thin linen layers that fetch the raw leaf, dense or compressed, and hand it to `ops`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmcompress import ops
from lmcompress.distributed.sharding import split_tokens, whole_tokens

_kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def raw(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> Any:
  """The leaf itself. linen's `param` would compare only the first field of a compressed leaf with the shape."""
  if module.is_initializing():
    return module.param(name, init, shape, jnp.float32)
  if not module.has_variable("params", name):
    raise ValueError(f"{'/'.join(module.path)}: the parameters have no {name!r}")
  return module.get_variable("params", name)


class Linear(nn.Module):
  """`x @ kernel + bias`, kernel `[in, out]`; the bias is there if the tree has one.

  Attributes:
    joins: whether its inputs are what others gave, heads or neurons, and its output goes back to the stream: where a
      mesh splits those, outputs are sums over devices.
  """

  features: int = 0
  use_bias: bool = False
  joins: bool = False

  @nn.compact
  def leaves(self, inputs: int) -> tuple[Any, jax.Array | None]:
    """The kernel for that many inputs, and the bias or None."""
    kernel = raw(self, "kernel", _kernel_init, (inputs, self.features))
    if kernel.shape[-2] != inputs:
      raise ValueError(f"{'/'.join(self.path)}/kernel: shape {tuple(kernel.shape)} does not take an input of {inputs}")
    biased = self.use_bias if self.is_initializing() else self.has_variable("params", "bias")
    return kernel, raw(self, "bias", nn.initializers.zeros, (kernel.shape[-1],)) if biased else None

  def __call__(self, x: jax.Array) -> jax.Array:
    return linears(x, self)[0]


def linears(x: jax.Array, *modules: Linear) -> list[jax.Array]:
  """What each of several linears makes of the same input."""
  leaves = [module.leaves(x.shape[-1]) for module in modules]
  joins = any(module.joins for module in modules)
  x = x if joins else whole_tokens(x)
  ys = ops.linears(x, [kernel for kernel, _ in leaves])
  ys = [split_tokens(y) for y in ys] if joins else ys
  return [y if bias is None else y + bias.astype(y.dtype) for y, (_, bias) in zip(ys, leaves, strict=True)]


class RMSNorm(nn.Module):
  """`x / rms(x) * scale` in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

  epsilon: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = raw(self, "scale", nn.initializers.ones, (x.shape[-1],))
    return ops.rms_norm(x, scale, self.epsilon)


class LayerNorm(nn.Module):
  """`(x - mean) / deviation * scale + bias` in float32 (Ba et al. 2016, arXiv:1607.06450)."""

  epsilon: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = raw(self, "scale", nn.initializers.ones, (x.shape[-1],))
    bias = raw(self, "bias", nn.initializers.zeros, (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.epsilon)
    return (normal * scale + bias).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
"""What stands between two linears, by name (GELU: Hendrycks & Gimpel 2016, arXiv:1606.08415)."""


class PlainMlp(nn.Module):
  """`down(activation(up(x)))` with biases; `activation` is one of `ACTIVATIONS`, `width` for `init` alone."""

  activation: str
  width: int = 0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = ACTIVATIONS[self.activation](Linear(self.width, use_bias=True, name="up")(x))
    self.sow("taps", "down_input", hidden)
    return Linear(x.shape[-1], use_bias=True, joins=True, name="down")(hidden)
