"""Writing with an encoder-decoder: the source is read once, then a token at a time, greedily or by beam search."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.generation.cache import init_cache
from lmcompress.generation.prefill import bucket
from lmcompress.types import Params, WeightError


class Written(NamedTuple):
  """What was written for one source.

  Attributes:
    tokens: without the start token, the stop token counted.
    score: the sum of log-probabilities over `len(tokens)**length_penalty`.
  """

  tokens: list[int]
  score: float


def rewrite(
  model: Any,
  params: Params,
  tokenizer: Any,
  texts: Sequence[str],
  max_new_tokens: int = 64,
  beams: int = 1,
  length_penalty: float = 1.0,
  batch: int = 8,
  first: int | None = None,
) -> list[str]:
  """Answers, titles or translations of texts, as the model was trained to write.

  Args:
    texts: what the encoder reads, with whatever task prefix the model knows; the tokenizer ends them.
    max_new_tokens, beams, length_penalty, first: as of `beam_search`.
    batch: sources at once; those of about the same length go together.

  Raises:
    ValueError: a setting out of range, or a text longer than the model takes.
    WeightError: the model is no encoder-decoder.
  """
  rows = [tokenizer.encode(text, add_special=True) for text in texts]
  if batch < 1 or not all(rows):
    raise ValueError(f"rewrite(batch={batch}): at least one source at once, each with at least one token")
  order, found = sorted(range(len(rows)), key=lambda i: len(rows[i])), {}
  for begin in range(0, len(order), batch):
    some = order[begin : begin + batch]
    width = min(model.config.max_length, bucket(max(len(rows[i]) for i in some)))
    tokens, mask = np.zeros((batch, width), np.int32), np.zeros((batch, width), bool)
    mask[:, 0] = True  # rows that only fill the batch
    for row, i in enumerate(some):
      if len(rows[i]) > width:
        raise ValueError(f"a text of {len(rows[i])} tokens is longer than the model's context of {width}")
      tokens[row, : len(rows[i])], mask[row, : len(rows[i])] = rows[i], True
    stops = sorted(tokenizer.stop_ids)
    written = beam_search(model, params, tokens, max_new_tokens, mask, beams, length_penalty, stops, first)
    found.update(zip(some, written[: len(some)], strict=True))
  return [tokenizer.decode([t for t in found[i].tokens if t not in tokenizer.stop_ids]) for i in range(len(rows))]


def beam_search(
  model: Any,
  params: Params,
  tokens: Any,
  max_new_tokens: int,
  attention_mask: Any = None,
  beams: int = 1,
  length_penalty: float = 1.0,
  stop_ids: Sequence[int] = (1,),
  first: int | None = None,
) -> list[Written]:
  """The likeliest text for each source that a search over `beams` finds (Sutskever et al. 2014, arXiv:1409.3215).

  The search of a source ends when as many hypotheses as there are beams have ended, and the best that is still open
  could not reach the worst of them even if it ended now. One beam is the greedy choice.

  Args:
    tokens: `[batch, source]`.
    max_new_tokens: tokens that are written at most.
    attention_mask: `[batch, source]`, nonzero for real tokens.
    beams: hypotheses kept at each step.
    length_penalty: above 0 long hypotheses gain, below they lose.
    stop_ids: tokens that end a hypothesis.
    first: the token that is written first whatever the model predicts, by default the one of its config; of an mBART it
      names the language to write.

  Raises:
    ValueError: a setting out of range.
    WeightError: the model is no encoder-decoder.
  """
  if not hasattr(model, "encode"):
    raise WeightError(f"{type(model).__name__} has no encoder beside its decoder; use generate")
  if max_new_tokens < 1 or beams < 1:
    raise ValueError(f"beam_search(max_new_tokens={max_new_tokens}, beams={beams}): both at least 1")
  if max_new_tokens > model.config.max_length:
    raise ValueError(f"{max_new_tokens} new tokens are more than the model's context of {model.config.max_length}")
  first, size = getattr(model.config, "first", None) if first is None else first, _vocabulary(params)
  if first is not None and not 0 <= first < size:
    raise ValueError(f"beam_search(first={first}): the vocabulary has {size} tokens")
  tokens = np.asarray(tokens)
  batch = len(tokens)
  mask = np.ones(tokens.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
  state = _encoded(model, params, tokens, mask, beams, bucket(max_new_tokens))
  search = [_Search(beams, length_penalty, frozenset(stop_ids)) for _ in range(batch)]
  ids = np.full((batch, beams), model.config.start, np.int32)
  parents = np.tile(np.arange(beams, dtype=np.int32), (batch, 1))
  scores = np.full((batch, beams), -1e9, np.float32)
  scores[:, 0] = 0.0  # the beams are alike at first: one of them counts
  for written in range(max_new_tokens):
    values, places, state = _step(model, params, state, ids, parents, scores)
    values, places = np.asarray(values), np.asarray(places)
    if first is not None and not written:  # read by the next step; beams are alike as before
      ids[:] = first
      for one in search:
        one.begin(first)
      continue
    for row, one in enumerate(search):
      parents[row], ids[row], scores[row] = one.step(values[row], places[row] // size, places[row] % size)
    if all(one.done for one in search):
      break
  return [one.best() for one in search]


def _vocabulary(params: Params) -> int:
  return int(params.get("head", params["embed"])["table"].shape[-2])


class _Search:
  """The open and the ended hypotheses of one source."""

  def __init__(self, beams: int, length_penalty: float, stop_ids: frozenset[int]):
    self.beams, self.penalty, self.stop_ids = beams, length_penalty, stop_ids
    self.open: list[tuple[float, list[int]]] = [(0.0, [])] * beams
    self.ended: list[Written] = []
    self.done = False

  def begin(self, token: int) -> None:
    """Takes a token that is written whatever the model predicts."""
    self.open = [(0.0, [token])] * self.beams
    if token in self.stop_ids:
      self._end([token], 0.0)
      self.done = True

  def step(self, values: np.ndarray, parents: np.ndarray, ids: np.ndarray) -> tuple[list[int], list[int], list[float]]:
    """Takes the best candidates, best first; gives parent, token and score of each hypothesis that stays open."""
    if self.done:
      return [0] * self.beams, [0] * self.beams, [0.0] * self.beams
    kept: list[tuple[int, int, float]] = []
    for rank, (value, parent, token) in enumerate(zip(values.tolist(), parents.tolist(), ids.tolist(), strict=True)):
      if token not in self.stop_ids:
        kept.append((parent, token, value))
      elif rank < self.beams:
        self._end([*self.open[parent][1], token], value)
        if self.beams == 1:
          self.done = True
      if len(kept) == self.beams:
        break
    self.open = [(value, [*self.open[parent][1], token]) for parent, token, value in kept]
    if len(self.ended) == self.beams and self.open:
      best, length = self.open[0][0], len(self.open[0][1])
      self.done = self.done or min(e.score for e in self.ended) >= best / length**self.penalty
    return tuple(map(list, zip(*kept, strict=True)))  # type: ignore[return-value]

  def _end(self, tokens: list[int], value: float) -> None:
    self.ended.append(Written(tokens, value / len(tokens) ** self.penalty))
    self.ended = sorted(self.ended, key=lambda e: -e.score)[: self.beams]

  def best(self) -> Written:
    """The best hypothesis, ended or cut off."""
    if not self.done:
      for value, tokens in self.open:
        self._end(tokens, value)
    return self.ended[0]


@functools.partial(jax.jit, static_argnames=("model", "beams", "slots"))
def _encoded(model: Any, params: Params, tokens: jax.Array, mask: jax.Array, beams: int, slots: int) -> Any:
  """The decoder's state before its first token, a row for each beam."""
  state = model.encode(params, tokens, init_cache(model, params, len(tokens) * beams, slots), mask)
  held, real = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), (state.held, state.real))
  return state._replace(held=held, real=real)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def _step(
  model: Any, params: Params, state: Any, ids: jax.Array, parents: jax.Array, scores: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
  """The 2 * beams best continuations of each source, best first: their scores, and `beam * vocab + token`."""
  batch, beams = ids.shape
  rows = (jnp.arange(batch)[:, None] * beams + parents).reshape(-1)
  cache = jax.tree.map(lambda x: x[rows] if x.ndim else x, state.cache)
  logits, state = model.decode(params, ids.reshape(-1, 1), state._replace(cache=cache))
  total = scores[..., None] + jax.nn.log_softmax(logits, axis=-1).reshape(batch, beams, -1)
  values, places = jax.lax.top_k(total.reshape(batch, -1), 2 * beams)
  return values, places, state
