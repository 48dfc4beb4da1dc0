"""The loss of predicting each next token, over runs of tokens so that no array is as large as all logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress.calibration.recompute import recomputed
from lmcompress.distributed.sharding import gathered, whole_tokens
from lmcompress.models.base import DECODER
from lmcompress.types import Params, WeightError


def require_causal(model: Any, what: str) -> None:
  """Refuses a model whose output at a token does not predict the next, as an encoder's does not.

  Raises:
    WeightError: it is such a model; names `what` was asked of it.
  """
  if not getattr(model, "causal", True):
    raise WeightError(f"{what}: a {type(model).__name__} sees a whole text at once and predicts no next token")


def cross_entropy(logits: jax.Array, targets: jax.Array, teacher: jax.Array | None = None) -> jax.Array:
  """Nats `[...]` of logits `[..., vocab]` and the ids `[...]` that follow."""
  said = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  return -jnp.take_along_axis(said, targets[..., None], axis=-1)[..., 0]


def forward(
  model: Any,
  params: Params,
  batch: Mapping[str, jax.Array],
  remat: bool = True,
  taps: Mapping[str, tuple[str, ...]] | None = None,
  cache: Any = None,
) -> tuple[Any, dict[str, dict[str, jax.Array]]]:
  """The carry after the last block, and the inputs of stages that `taps` names, by the path of their block.

  With `remat` the way back keeps one carry a block and computes the rest again. Tokens see others as an empty `cache`
  holds them, which is then forgotten.
  """
  given = jax.tree.map(whole_tokens, dict(batch))
  if cache is None:
    return through_blocks(model, params, model.start(gathered(model, params), given), remat, taps)
  carry = model.start(gathered(model, params), {**given, "cache": cache})
  carry, tapped = through_blocks(model, params, carry, remat, taps)
  return {**carry, "cache": None}, tapped


def through_blocks(
  model: Any, params: Params, carry: Any, remat: bool = True, taps: Mapping[str, tuple[str, ...]] | None = None
) -> tuple[Any, dict[str, dict[str, jax.Array]]]:
  """The carry after the blocks of a tree, which may be some of the model's, and what `forward` says of taps."""
  tapped = {}
  for block in model.blocks(params):
    wanted = (taps or {}).get(block.path, ())

    def run(params: Params, carry: Any, block: Any = block, wanted: tuple[str, ...] = wanted) -> Any:
      return model.run(block, gathered(model, params, block.path), carry, wanted)

    carry, found = (recomputed(run) if remat else run)(params, carry)
    if wanted:
      tapped[block.path] = found
  return {**carry, "h": whole_tokens(carry["h"])} if "h" in carry else carry, tapped


def mean_loss(
  model: Any,
  params: Params,
  batch: Mapping[str, jax.Array],
  loss: Callable[..., jax.Array],
  teacher: tuple[Any, Params] | None = None,
  chunk: int = 64,
  remat: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """The loss of predicting each next token, summed, and the number of tokens predicted.

  Logits are made for `chunk` positions at a time and again on the way back: the largest array is
  `[batch, chunk, vocab]`, twice with a teacher.

  Args:
    batch: `tokens: [batch, length]` and perhaps `attention_mask` and `counted`, alike: the real tokens, and those among
      them whose prediction counts. Of an encoder-decoder the tokens of `decoder_input_ids` are predicted.
    loss: `(logits [..., vocab], ids that follow [...], the teacher's logits or None) -> [...]`, nats.
    teacher: its model and parameters; gradients do not reach them.

  Raises:
    WeightError: the model predicts no next token.
  """
  writes = "decoder_input_ids" in getattr(model, "takes", ())
  if not writes:
    require_causal(model, "a loss over next tokens")
  carry, _ = forward(model, params, batch, remat)
  guide = None if teacher is None else predictions(*teacher, forward(*teacher, batch, remat=False)[0])
  said = {"tokens": batch["decoder_input_ids"], "attention_mask": batch.get(DECODER)} if writes else batch
  return head_loss(model, params, carry, said, loss, guide, chunk)


def predictions(model: Any, params: Params, carry: Any) -> Callable[[Any, int], jax.Array]:
  """A teacher's logits of a run of tokens; gradients do not reach it."""
  carry = jax.lax.stop_gradient(carry)
  return lambda first, count: jax.lax.stop_gradient(model.finish(gathered(model, params), carry, span=(first, count)))


def head_loss(
  model: Any,
  params: Params,
  carry: Any,
  batch: Mapping[str, jax.Array],
  loss: Callable[..., jax.Array],
  guide: Callable[[Any, int], Any] | None,
  chunk: int,
) -> tuple[jax.Array, jax.Array]:
  """What `mean_loss` gives, after the last block; `guide` says what the teacher says of a run of tokens."""
  tokens = whole_tokens(jnp.asarray(batch["tokens"]))
  real = jnp.ones(tokens.shape, bool) if batch.get("attention_mask") is None else batch["attention_mask"] != 0
  counts = real[:, 1:] & real[:, :-1]
  if batch.get("counted") is not None:
    counts &= batch["counted"][:, 1:] != 0
  positions = tokens.shape[1] - 1
  chunk = min(chunk, positions)
  counted = jnp.pad(counts, ((0, 0), (0, -positions % chunk)))
  targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, -positions % chunk)))

  @jax.checkpoint
  def some(params: Params, carry: Any, start: jax.Array) -> jax.Array:
    """Positions from `start` on; the last run overlaps the one before it, and counts what that left."""
    first = jnp.minimum(start, tokens.shape[1] - chunk)
    said = model.finish(gathered(model, params), carry, span=(first, chunk))
    wanted = None if guide is None else guide(first, chunk)
    each = loss(said, jax.lax.dynamic_slice_in_dim(targets, first, chunk, 1), wanted)
    own = jax.lax.dynamic_slice_in_dim(counted, first, chunk, 1) & (first + jnp.arange(chunk) >= start)
    return jnp.sum(jnp.where(own, each, 0.0))

  def add(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
    return total + some(params, carry, start), None

  starts = jnp.arange(0, positions, chunk, dtype=jnp.int32)
  total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), starts)
  return total, jnp.sum(counted)
