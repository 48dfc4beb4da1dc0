"""What a task teaches: a class for a row or for each of its tokens, where a span lies in it, or a text to write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import ops
from lmcompress.calibration.token_loss import cross_entropy, forward, head_loss, predictions
from lmcompress.training.loop import checked_rows, vocabulary_of
from lmcompress.types import Params

HEADS = "tasks"
"""Where a tree holds the heads of tasks, by name: `kernel [width, classes]` and `bias [classes]`.

A head of rows that other libraries trained has a layer before these, `dense`: `kernel [embed, width]`, `bias [width]`.
"""

Kind = Literal["labels", "tags", "spans", "texts"]
"""What `Task.labels` are."""


@dataclasses.dataclass(frozen=True)
class Task:
  """Rows and what is to be said of them.

  Attributes:
    tokens, mask: int32 `[n, length]`; the mask is nonzero for real tokens.
    labels: by `kind`: `labels` int `[n]`, a class of each row; `tags` int `[n, length]`, a class of each token, -1 for
      those that have none; `spans` int `[n, 2]`, the first and the last token of a part of the row; `texts` int
      `[n, target]`, the tokens that the decoder of an encoder-decoder is to write, -1 after the last.
    classes: names, by label; `("start", "end")` of spans, nothing of texts.
    second: of rows of two texts, int `[n, 2]`, the first and the last token of the second one, where spans lie.
  """

  tokens: np.ndarray
  mask: np.ndarray
  labels: np.ndarray
  classes: tuple[str, ...] = ()
  kind: Kind = "labels"
  second: np.ndarray | None = None

  @property
  def has_head(self) -> bool:
    """Whether a head beside the model says it; a text is written by the model itself."""
    return self.kind != "texts"

  def spread(self, count: int) -> Task:
    """At most `count` of the rows, spread over them."""
    chosen = np.linspace(0, len(self.labels) - 1, min(count, len(self.labels))).astype(int)
    second = None if self.second is None else self.second[chosen]
    return dataclasses.replace(
      self, tokens=self.tokens[chosen], mask=self.mask[chosen], labels=self.labels[chosen], second=second
    )

  def batch(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Rows as `loss` takes them; the name of the labels says their kind."""
    rows = {"tokens": self.tokens[chosen], "attention_mask": self.mask[chosen], self.kind: self.labels[chosen]}
    return rows if self.second is None else {**rows, "second": self.second[chosen]}


def said(model: Any, params: Params, name: str, rows: Mapping[str, Any], kind: Kind, remat: bool = False) -> jax.Array:
  """Logits of a task's head, float32.

  A class of a row is read from the state of its last real token, or where all see all from the mean of their states,
  and by a head with a layer of its own from the first token. A model that tells texts by types is given those of the
  second.

  Returns:
    `[batch, classes]`, of `tags` `[batch, length, classes]`, of `spans` `[batch, 2, length]`, -1e9 where none lies.
  """
  read = {name: rows[name] for name in ("tokens", "attention_mask")}
  real = within = jnp.asarray(rows["attention_mask"]) != 0
  if "second" in rows:
    places, ends = jnp.arange(within.shape[1]), jnp.asarray(rows["second"])
    if getattr(model, "tells_texts", False) and "types" in params and params["types"]["table"].shape[-2] > 1:
      read["token_type_ids"] = ((places >= ends[:, :1]) & real).astype(jnp.int32)
    within = real & (places >= ends[:, :1]) & (places <= ends[:, 1:])
  carry, _ = forward(model, params, read, remat)
  states = model.features(params, carry)
  head = params[HEADS][name]
  if kind == "labels" and "dense" in head:
    first = ops.linear(states[:, 0], head["dense"]["kernel"]) + head["dense"]["bias"]
    states = model.summary(first)
  elif kind == "labels":
    states = _read(states, real, getattr(model, "causal", True))
  logits = ops.linear(states, head["kernel"]).astype(jnp.float32) + head["bias"]
  if kind == "spans":
    return jnp.where(within[:, None, :], jnp.swapaxes(logits, 1, 2), -1e9)
  return logits


def _read(states: jax.Array, real: jax.Array, causal: bool) -> jax.Array:
  """The state `[batch, width]` by which a row is judged."""
  if causal:
    last = real.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
    return jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
  counts = jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1)
  return (jnp.sum(states.astype(jnp.float32) * real[..., None], axis=1) / counts).astype(states.dtype)


def loss(
  model: Any,
  params: Params,
  name: str,
  rows: Mapping[str, Any],
  remat: bool = True,
  chunk: int = 64,
  measure: Callable[..., jax.Array] = cross_entropy,
  teacher: tuple[Any, Params] | None = None,
) -> jax.Array:
  """The mean loss of what the rows teach, nats.

  Args:
    rows: as of `Task.batch`.
    chunk: of texts: tokens whose logits are in memory at a time.
    measure: `(logits [..., classes], labels [...], the teacher's logits or None) -> [...]`.
    teacher: a model that does the same task, and its parameters; gradients do not reach them.
  """
  if "texts" in rows:
    given = with_start(model, rows["texts"])
    beside = {"decoder_input_ids": given["tokens"], "decoder_attention_mask": given["attention_mask"]}
    read = {**{k: rows[k] for k in ("tokens", "attention_mask")}, **beside}
    carry, _ = forward(model, params, read, remat)
    guide = None if teacher is None else predictions(*teacher, forward(*teacher, read, remat=False)[0])
    total, count = head_loss(model, params, carry, given, measure, guide, chunk)
    return total / jnp.maximum(count, 1)
  kind: Kind = next(kind for kind in ("tags", "spans", "labels") if kind in rows)
  labels = jnp.asarray(rows[kind])
  shown = None if teacher is None else jax.lax.stop_gradient(said(*teacher, name, rows, kind))
  each = measure(said(model, params, name, rows, kind, remat), jnp.maximum(labels, 0), shown)
  counts = labels >= 0
  return jnp.sum(jnp.where(counts, each, 0.0)) / jnp.maximum(jnp.sum(counts), 1)


def with_start(model: Any, texts: Any) -> dict[str, jax.Array]:
  """Texts `[batch, target]` with the token before them that a decoder begins with: `tokens` and `attention_mask`."""
  texts = jnp.asarray(texts)
  first = jnp.full((texts.shape[0], 1), model.config.start, jnp.int32)
  whole = jnp.concatenate([first, texts], axis=1)
  real = jnp.pad(texts >= 0, ((0, 0), (1, 0)), constant_values=True)
  return {"tokens": jnp.maximum(whole, 0), "attention_mask": real}


def checked_task(name: str, task: Task, model: Any, params: Params) -> Task:
  """The task as arrays that fit together and fit the model.

  Raises:
    ValueError: they do not; says which and why.
  """
  tokens = checked_rows(f"task {name}", task.tokens, params)
  mask, labels = np.asarray(task.mask), np.asarray(task.labels)
  n, length = tokens.shape
  each = {"labels": (), "tags": (length,), "spans": (2,), "texts": labels.shape[1:2]}[task.kind]
  if mask.shape != tokens.shape or labels.shape != (n, *each) or not mask.any(axis=1).all():
    found = f"tokens {list(tokens.shape)}, mask {list(mask.shape)}, {task.kind} {list(labels.shape)}"
    raise ValueError(f"task {name}: {found}: a mask like the tokens, a real token in each row and {task.kind} for it")
  second = None if task.second is None else np.asarray(task.second).astype(np.int32)
  if second is not None and (second.shape != (n, 2) or not _spans_of(second, mask)):
    raise ValueError(f"task {name}: second {list(second.shape)}: the first and the last token of the second text")
  if task.kind == "texts":
    if not hasattr(model, "encode"):
      raise ValueError(f"task {name}: a {type(model).__name__} has no decoder beside an encoder to write texts with")
    vocabulary = vocabulary_of(params)
    if not (labels >= 0).any(axis=1).all() or labels.max() >= vocabulary or labels.min() < -1:
      raise ValueError(f"task {name}: a text to write has no token, or one outside the vocabulary of {vocabulary}")
  elif hasattr(model, "encode"):
    raise ValueError(f"task {name}: a {type(model).__name__} learns to write texts; give it a data set of pairs")
  elif task.kind == "spans":
    if not _spans_of(labels, mask):
      raise ValueError(f"task {name}: a span that ends before it begins, or outside the row's tokens")
    if second is not None and ((labels[:, 0] < second[:, 0]) | (labels[:, 1] > second[:, 1])).any():
      raise ValueError(f"task {name}: a span outside the row's second text")
  else:
    known = labels[labels >= 0] if task.kind == "tags" else labels
    count = len(task.classes)
    if count < 2 or not known.size or labels.min() < (-1 if task.kind == "tags" else 0) or labels.max() >= count:
      found = f"{task.kind} from {labels.min()} to {labels.max()} of {count} classes"
      raise ValueError(f"task {name}: {found}; two or more are needed, and a class for each label")
  return Task(tokens, mask.astype(np.int32), labels.astype(np.int32), tuple(task.classes), task.kind, second)


def _spans_of(spans: np.ndarray, mask: np.ndarray) -> bool:
  """Whether all are the first and the last of some real tokens of their rows."""
  inside = (spans >= 0).all() and (spans < mask.shape[1]).all() and (spans[:, 0] <= spans[:, 1]).all()
  return bool(inside) and bool(np.take_along_axis(mask, spans, axis=1).all())
