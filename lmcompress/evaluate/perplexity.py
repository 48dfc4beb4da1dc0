"""Perplexity, and how far a compressed model's predictions are from the original's."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.calibration.token_loss import require_causal
from lmcompress.distributed.sharding import data_mesh, over_data, ways
from lmcompress.types import Params


class Score(NamedTuple):
  """Sums over the tokens of one window; sums of windows add up.

  Attributes:
    nll: negative log-likelihood, nats.
    kl: KL divergence of the original's next-token distribution to this model's, nats; 0 with no original.
    agree: tokens at which both rank the same token first.
    count: tokens predicted.
    hits: tokens that this model ranks first.
  """

  nll: float
  kl: float
  agree: float
  count: float
  hits: float = 0.0

  def __add__(self, other: Score) -> Score:  # type: ignore[override]
    return Score(*(a + b for a, b in zip(self, other, strict=True)))

  @property
  def perplexity(self) -> float:
    return math.exp(min(self.nll / self.count, 700.0))

  def summary(self) -> dict[str, float]:
    """`perplexity`, `kl` (nats per token), `top1` (fraction that agrees) and `accuracy` (fraction that is right)."""
    shares = {"kl": self.kl, "top1": self.agree, "accuracy": self.hits}
    return {"perplexity": self.perplexity, **{name: total / self.count for name, total in shares.items()}}


def perplexity(
  model: Any, params: Params, tokens: Any, *, attention_mask: Any = None, stride: int | None = None, batch: int = 1
) -> float:
  """`exp` of the mean negative log-likelihood of the next token.

  Args:
    tokens: `[n, length]` int32; each row stands on its own, its first token is not predicted.
    attention_mask: `[n, length]`, zero at padding, which neither is predicted nor predicts.
    stride: rows are windows of one text that advance by `stride`: of every row after the first only the
      last `stride` tokens count, each with the rest of its row as context.
    batch: rows scored at once.

  Raises:
    ValueError: tokens are not `[n, length]` with a length of at least 2, or nothing is left to predict.
  """
  tokens, mask = checked(tokens, attention_mask, stride)
  if batch < 1:
    raise ValueError(f"batch={batch}: at least 1 row at once")
  total = Score(0, 0, 0, 0)
  for _, t, m in _batches(params, range(len(tokens)), tokens, mask, batch):
    total = sum(_scores(log_probabilities(model, params, t, m), t, m, None), total)
  return total.perplexity


def checked(tokens: Any, attention_mask: Any = None, stride: int | None = None) -> tuple[np.ndarray, np.ndarray]:
  """Tokens and the mask of the tokens that count, both `[n, length]`, or ValueError."""
  tokens = np.asarray(tokens)
  if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
    raise ValueError(f"tokens are [n, length] integers; found {tokens.dtype}{list(tokens.shape)}")
  n, length = tokens.shape
  if n < 1 or length < 2:
    raise ValueError(f"tokens of shape {list(tokens.shape)} leave nothing to predict; give rows of 2 tokens or more")
  real = np.ones(tokens.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
  if real.shape != tokens.shape:
    raise ValueError(f"attention_mask has shape {list(real.shape)}, the tokens {list(tokens.shape)}")
  counted = real.copy()
  if stride is not None:
    if not 1 <= stride <= length:
      raise ValueError(f"stride={stride}: from 1 to the window's length of {length}")
    counted[1:, : length - stride] = False
  if not (counted[:, 1:] & real[:, :-1]).any():
    raise ValueError("the masks leave no token to predict")
  return tokens, np.stack([real, counted]).transpose(1, 0, 2)  # type: ignore[return-value]


def _scores(logp: jax.Array, tokens: Any, masks: Any, reference: jax.Array | None) -> list[Score]:
  """A score per row."""
  if reference is not None and reference.shape != logp.shape:
    raise ValueError(
      f"vocabularies differ: {reference.shape[-1]} and {logp.shape[-1]} entries; KL needs one vocabulary"
    )
  columns = [np.asarray(x, np.float64) for x in _sums(logp, tokens, masks, reference)]
  return [Score(*(float(x) for x in row)) for row in zip(*columns, strict=True)]


def _batches(params: Params, rows: Sequence[int], tokens: np.ndarray, masks: np.ndarray, batch: int) -> Iterator[tuple]:
  """`(rows, tokens, masks)` a batch at a time, split over the mesh that the parameters lie on."""
  mesh = data_mesh(params)
  size = batch if mesh is None else max(batch, ways(mesh))
  for i in range(0, len(rows), size):
    some = list(rows[i : i + size])
    t, m = tokens[some], masks[some]
    t, m = over_data(mesh, (t, m), len(some))
    yield some, t, m


@jax.jit
def _sums(logp: jax.Array, tokens: jax.Array, masks: jax.Array, reference: jax.Array | None) -> tuple:
  """Per row: sums of the negative log-likelihood, the KL and the agreement, the count, and the tokens ranked first."""
  logp = logp[:, :-1]
  reference = None if reference is None else reference[:, :-1]
  keep = masks[:, 1, 1:] & masks[:, 0, :-1]
  nll = -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
  count = jnp.sum(keep, axis=1)
  total, first = jnp.sum(jnp.where(keep, nll, 0.0), axis=1), jnp.argmax(logp, axis=-1)
  hits = jnp.sum((first == tokens[:, 1:]) & keep, axis=1)
  if reference is None:
    return total, jnp.zeros_like(total), count, count, hits
  kl = jnp.sum(jnp.exp(reference) * (reference - logp), axis=-1)
  agree = jnp.argmax(reference, axis=-1) == first
  return total, jnp.sum(jnp.where(keep, kl, 0.0), axis=1), jnp.sum(agree & keep, axis=1), count, hits


def log_probabilities(model: Any, params: Params, tokens: np.ndarray, masks: np.ndarray) -> jax.Array:
  """Next-token log-probabilities `[batch, length, vocab]` float32, layer by compiled layer."""
  require_causal(model, "perplexity")
  return _log_softmax(model.apply(params, tokens, attention_mask=masks[:, 0]))


@functools.partial(jax.jit, donate_argnums=0)
def _log_softmax(logits: jax.Array) -> jax.Array:
  return jax.nn.log_softmax(logits, axis=-1)


def compare(
  model: Any, original: Params, others: Mapping[str, Params], tokens: Any, done: Mapping[int, Any] | None = None
) -> Iterator[tuple[int, dict[str, Score]]]:
  """Scores several trees against the original, window by window, so that no text's logits are ever kept.

  Args:
    original: the tree that the others are compared with.
    others: trees by name (the original may be among them).
    tokens: `[n, length]`.
    done: windows to skip, by row number: a run that continues.

  Yields:
    `(row, {name: Score})`.
  """
  tokens, masks = checked(tokens)
  pending = [row for row in range(len(tokens)) if not (done and row in done)]
  for rows, t, m in _batches(original, pending, tokens, masks, 1):
    reference = log_probabilities(model, original, t, m)
    scores = {
      name: _scores(reference if params is original else log_probabilities(model, params, t, m), t, m, reference)
      for name, params in others.items()
    }
    for i, row in enumerate(rows):
      yield row, {name: found[i] for name, found in scores.items()}
