"""What a block computes, computed again on the way back instead of kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun


def recomputed(run: Callable[..., Any]) -> Callable[..., Any]:
  """A function of pytrees that keeps nothing but what it reads for the way back, where it runs again.

  The source is Chen et al. 2016, arXiv:1604.06174. On CPUs XLA drops the barriers of `jax.checkpoint` and then computes
  all blocks again at once, so that as much stands in memory as without it. There the second run and the way back are a
  branch of a conditional, which begins when the gradient of the output has come, and whose insides no other block's mix
  with. A function says all that it reads by its arguments.
  """
  return _in_a_branch(run) if jax.default_backend() == "cpu" else jax.checkpoint(run)


def _in_a_branch(run: Callable[..., Any]) -> Callable[..., Any]:
  def call(*args: Any) -> Any:
    made, shapes = jax.make_jaxpr(run, return_shape=True)(*args)
    body, used = _of_what_it_reads(made)
    given = jax.tree.leaves(args)
    return jax.tree.unflatten(jax.tree.structure(shapes), _kept_inputs(body)([given[n] for n in used]))

  return call


def _of_what_it_reads(made: ClosedJaxpr) -> tuple[Callable[..., list[jax.Array]], list[int]]:
  """A traced function of those inputs that anything in it reads, and their numbers."""
  inner = made.jaxpr
  read = {v for v in (*inner.outvars, *(v for e in inner.eqns for v in e.invars)) if not isinstance(v, Literal)}
  used = [n for n, v in enumerate(inner.invars) if v in read]
  return jaxpr_as_fun(ClosedJaxpr(inner.replace(invars=[inner.invars[n] for n in used]), made.consts)), used


def _kept_inputs(body: Callable[..., list[jax.Array]]) -> Callable[[list[jax.Array]], list[jax.Array]]:
  """A function of a list of arrays, whose way back runs it again in a branch."""

  @jax.custom_vjp
  def run(values: list[jax.Array]) -> list[jax.Array]:
    return body(*values)

  def forward(values: list[Any]) -> tuple[list[jax.Array], Any]:
    moving = [v.value if v.perturbed and _is_float(v.value) else None for v in values]
    fixed = [v.value if x is None else None for v, x in zip(values, moving, strict=True)]
    return body(*(v.value for v in values)), (moving, fixed)

  def backward(kept: Any, gradients: list[Any]) -> tuple[list[Any]]:
    known = {n: g for n, g in enumerate(gradients) if not isinstance(g, SymbolicZero) and _is_float(g)}

    def again(moving: Any, fixed: Any, known: dict[int, jax.Array]) -> Any:
      def outputs(moving: Any) -> dict[int, jax.Array]:
        made = body(*(f if x is None else x for x, f in zip(moving, fixed, strict=True)))
        return {n: made[n] for n in known}

      return jax.vjp(outputs, moving)[1](known)[0]

    # XLA takes a branch away that it knows to be taken
    begins, kept, known = jax.lax.optimization_barrier((jnp.bool_(True), kept, known))
    never = lambda moving, *_: jax.tree.map(jnp.zeros_like, moving)  # noqa: E731
    return (jax.lax.cond(begins, again, never, *kept, known),)

  run.defvjp(forward, backward, symbolic_zeros=True)
  return run


def _is_float(x: jax.Array) -> bool:
  return jnp.issubdtype(x.dtype, jnp.inexact)
