"""What stands around products: RMS normalization, the gated activation, the largest logit; each with a CPU kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress.ops import backend


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  """`x / rms(x) * scale` in float32, in the dtype of `x: [..., features]` (arXiv:1910.07467)."""

  def reference(x: jax.Array, scale: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    normal = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (normal * scale).astype(x.dtype)

  if not is_native(x, scale):
    return reference(x, scale)
  from lmcompress.ops.kernels import cpu

  return with_gradients(lambda x, scale: cpu.rms_norm(x, scale, epsilon), reference)(x, scale)


def gated_silu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """`silu(gate) * up` (Shazeer 2020, arXiv:2002.05202)."""

  def reference(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up

  if not is_native(gate, up):
    return reference(gate, up)
  from lmcompress.ops.kernels import cpu

  return with_gradients(cpu.gated_silu, reference)(gate, up)


def argmax(x: jax.Array) -> jax.Array:
  """The first largest of the last axis, int32 `[...]`; a NaN counts as largest. For sampling: not differentiable."""
  if not is_native(x) or not x.shape[-1]:
    return jnp.argmax(x, axis=-1).astype(jnp.int32)
  from lmcompress.ops.kernels import cpu

  return cpu.argmax(x)


def is_native(*xs: Any) -> bool:
  """Whether dense float32 arrays all, and the CPU kernels run."""
  floats = all(isinstance(x, jax.Array) and x.dtype == jnp.float32 for x in xs)
  return floats and backend.runs_native()


def with_gradients(kernel: Callable, reference: Callable) -> Callable:
  """A kernel that is differentiated as its reference is."""
  run = jax.custom_vjp(kernel)
  run.defvjp(lambda *args: (kernel(*args), args), lambda saved, g: jax.vjp(reference, *saved)[1](g))
  return run
