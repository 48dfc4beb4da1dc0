"""A mixture of experts in the place of a gated feed-forward part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from lmcompress import ops
from lmcompress.distributed.sharding import split_tokens, whole_tokens
from lmcompress.models.base import linear_axes
from lmcompress.models.layers import Linear, linears
from lmcompress.ops.experts import chosen, mixture, seen_by
from lmcompress.tree import is_stacked
from lmcompress.types import Stage

AXES: Mapping[str, tuple[Any, ...]] = {
  **linear_axes("layers/*/mlp/router", "embed", "choice"),
  **{
    f"layers/*/mlp/experts/{stack}{part}/kernel": (("expert",) if not stack else ()) + ends
    for stack in ("", "*/")
    for part, ends in (("gate", ("embed", "mlp")), ("up", ("embed", "mlp")), ("down", ("mlp", "embed")))
  },
  **linear_axes("layers/*/mlp/shared/gate", "embed", "shared_mlp"),
  **linear_axes("layers/*/mlp/shared/up", "embed", "shared_mlp"),
  **linear_axes("layers/*/mlp/shared/down", "shared_mlp", "embed"),
  **linear_axes("layers/*/mlp/shared_gate", "embed", "shared_share"),
}


def stages(mlp: Mapping[str, Any]) -> tuple[Stage, ...]:
  """The stages of a mixture with such parameters: what all tokens go to, and for each expert that stands apart its own.

  Stacked experts have none: calibration takes them apart first (`tree.unstack_experts`).
  """
  apart = [] if is_stacked(mlp["experts"]) else sorted(mlp["experts"], key=int)
  every = [name for name in ("router", "shared_gate", "shared/gate", "shared/up") if name.split("/")[0] in mlp]
  reads = tuple(f"mlp/experts/{e}/{part}" for e in apart for part in ("gate", "up"))
  found = [Stage("router", tuple(f"mlp/{name}" for name in every), "mlp_norm", others=reads)]
  for e in apart:
    here = f"mlp/experts/{e}"
    found.append(Stage(f"expert_{e}", (f"{here}/gate", f"{here}/up"), ""))
    found.append(Stage(f"expert_{e}_down", (f"{here}/down",), f"{here}/up"))
  if "shared" in mlp:
    found.append(Stage("shared_down", ("mlp/shared/down",), "mlp/shared/up"))
  return tuple(found)


class _Gated(nn.Module):
  """`down(silu(gate(x)) * up(x))`, whose hidden units are tapped under a name; `width` for `init` alone."""

  tap: str
  width: int = 0

  @nn.compact
  def __call__(self, x: jax.Array, weight: Any = 1.0) -> jax.Array:
    """What it makes of x; the tap is times `weight`."""
    hidden = ops.gated_silu(*linears(x, Linear(self.width, name="gate"), Linear(self.width, name="up")))
    self.sow("taps", f"{self.tap}_input", hidden * weight)
    return Linear(x.shape[-1], joins=True, name="down")(hidden)


class _Apart(nn.Module):
  """Every expert on every token: what makes parameters, and what calibration looks at."""

  count: int
  width: int = 0

  @nn.compact
  def __call__(self, x: jax.Array, ids: jax.Array) -> None:
    for e, weight in enumerate(seen_by(ids, self.count)):
      weight = weight.astype(x.dtype)
      self.sow("taps", f"expert_{e}_input", x * weight)
      _Gated(f"expert_{e}_down", self.width, name=str(e))(x, weight)


class Mixture(nn.Module):
  """A router, experts, and perhaps one that all tokens share (Jiang et al. 2024, arXiv:2401.04088; Qwen's mixtures).

  Attributes:
    per_token: experts of a token.
    normalize: whether their weights add up to 1.
    experts, width, shared: for `init` alone: how many, of how many neurons, and those of the shared one (0: none).
  """

  per_token: int
  normalize: bool
  experts: int = 0
  width: int = 0
  shared: int = 0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = whole_tokens(x)
    self.sow("taps", "router_input", x)
    logits = Linear(self.experts, name="router")(x)
    if self.per_token > logits.shape[-1]:
      raise ValueError(f"{'/'.join(self.path)}: {self.per_token} experts a token, and there are {logits.shape[-1]}")
    if self.is_initializing() or (self.is_mutable_collection("taps") and not is_stacked(self._experts())):
      _Apart(logits.shape[-1], self.width, name="experts")(x, chosen(logits, self.per_token, self.normalize)[0])
    rows, said = (v.reshape(-1, v.shape[-1]) for v in (x, logits))
    y = mixture(_expert, self._experts(), rows, said, self.per_token, self.normalize).reshape(x.shape)
    y = split_tokens(y)
    if self.shared if self.is_initializing() else self.has_variable("params", "shared"):
      share = jax.nn.sigmoid(Linear(1, name="shared_gate")(x))
      y = y + share * _Gated("shared_down", self.shared, name="shared")(x)
    return y

  def _experts(self) -> Mapping[str, Any]:
    return self.variables["params"]["experts"]


def _expert(leaves: Any, x: jax.Array) -> jax.Array:
  gate, up, down = (leaves[part]["kernel"] for part in ("gate", "up", "down"))
  return ops.linear(ops.gated_silu(*ops.linears(x, [gate, up])), down)
