"""Tasks of the LM evaluation harness (EleutherAI) on any decoder and any tree, from local files or from a hub."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jinja2
import numpy as np

from lmcompress.calibration.token_loss import require_causal
from lmcompress.distributed.sharding import on_mesh_of
from lmcompress.types import ConfigError, LmcompressError, Params

try:
  import lm_eval
  from lm_eval.api.model import TemplateLM
  from lm_eval.tasks import TaskManager
  from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
  raise LmcompressError('tasks of the harness need lm-eval: pip install "lmcompress[harness]"') from None

BUCKET = 64
"""Rows are padded to multiples of so many tokens, so that few programs are compiled."""


class Harness(TemplateLM):
  """A model as the harness sees it; pass it to `lm_eval.simple_evaluate(model=Harness(...), ...)`.

  A request longer than the context loses its beginning, as with the harness's own models.

  Args:
    model: a decoder.
    params: its tree, dense, compressed or prepared.
    tokenizer: the model's.
    batch: rows at once.
    progress: called with what is done, how much of it, and how much there is.

  Raises:
    WeightError: the model predicts no next token.
    ConfigError: the batch is no positive number, or the tokenizer has no token that a text can begin after.
  """

  def __init__(
    self, model: Any, params: Params, tokenizer: Any, batch: int = 8,
    progress: Callable[[str, int, int], None] | None = None,
  ):  # fmt: skip
    super().__init__()
    require_causal(model, "tasks of the harness")
    if batch < 1:
      raise ConfigError(f"Harness(batch={batch}): from 1")
    first = next((t for t in (tokenizer.bos_id, tokenizer.eos_id) if t is not None), None)
    if first is None:
      raise ConfigError("the tokenizer has neither a token that begins a text nor one that ends it")
    self._model, self._params, self._tokenizer, self._first = model, params, tokenizer, first
    self._batch, self._progress = batch, progress
    self._longest = model.config.max_length

  @property
  def eot_token_id(self) -> int:
    """What stands before a text without a context."""
    return self._first

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
    """Token ids; a first token is put before those of a model that was trained with one, unless that is turned off."""
    return list(self._tokenizer.encode(string, add_bos=self._tokenizer.wants_bos and add_special_tokens is not False))

  def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
    """Of each `(texts, context, continuation)`, the continuation's log-likelihood and whether it is the greedy one."""
    found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
    rows = [(([*context] or [self._first]) + tail, len(tail)) for _, context, tail in requests]
    rows = [(tokens[-(self._longest + 1) :], count) for tokens, count in rows]
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i][0]), i))  # the longest first: memory fails at once
    for start in range(0, len(order), self._batch):
      some = order[start : start + self._batch]
      for i, score in zip(some, self._scored([rows[i] for i in some]), strict=True):
        found[i] = score
      self._tell("likelihoods", start + len(some), len(order))
    return found

  def _scored(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    """Rows `(tokens, how many of the last count)`, padded on their left, so that what counts ends together."""
    most = max(count for _, count in rows)
    if not most:
      return [(0.0, True)] * len(rows)
    length = min(BUCKET * math.ceil(max(len(tokens) for tokens, _ in rows) / BUCKET), self._longest + 1)
    span = min(1 << (most - 1).bit_length(), length - 1)
    tokens, mask = np.zeros((self._batch, length), np.int32), np.zeros((self._batch, length), bool)
    mask[:, -1] = True  # rows that only fill up the batch
    for i, (row, _) in enumerate(rows):
      row = row[-length:]
      tokens[i, length - len(row) :], mask[i, length - len(row) :] = row, True
    with on_mesh_of(self._params):
      likely, greedy = _tail(self._model, self._params, tokens, mask, span)
    likely, greedy = np.asarray(likely, np.float64), np.asarray(greedy)
    return [
      (float(likely[i, span - min(count, span) :].sum()), bool(greedy[i, span - min(count, span) :].all()))
      for i, (_, count) in enumerate(rows)
    ]

  def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
    """Of each text its log-likelihood, in windows of the model's context that do not overlap."""
    windows, owner = [], []
    for i, request in enumerate(requests):
      tokens = self.tok_encode(request.args[0], add_special_tokens=False)
      for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self._longest, 1):
        context, tail = make_disjoint_window(pair)
        windows.append((("", ""), list(context), list(tail)))
        owner.append(i)
    found = [0.0] * len(requests)
    for i, (likely, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
      found[i] += likely
    return found

  def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
    """Of each `(context, settings)` what the model writes up to one of the texts `until`.

    Raises:
      ConfigError: the settings ask for more tokens than the context holds.
    """
    from lmcompress.generation.engine import Engine
    from lmcompress.generation.generate import continued
    from lmcompress.generation.sampling import Sampler

    found = []
    for n, request in enumerate(requests):
      context, settings = request.args
      until = settings.get("until") or []
      count = int(settings.get("max_gen_toks", 256))
      room = self._longest - count
      if room < 1:
        raise ConfigError(f"max_gen_toks is {count}, and the model's context is {self._longest}")
      tokens = (self.tok_encode(context) or [self._first])[-room:]
      heat = float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0
      stop = [until] if isinstance(until, str) else list(until)
      sampler = Sampler(heat, int(settings.get("top_k", 0)), float(settings.get("top_p", 1.0)))
      engine = Engine(self._model, self._params, sampler, ahead=not stop)
      found += continued(engine, self._tokenizer, [tokens], count, jax.random.key(n) if heat else None, stop)
      self._tell("texts", n + 1, len(requests))
    return found

  def _tell(self, what: str, done: int, total: int) -> None:
    if self._progress is not None:
      self._progress(what, done, total)


@functools.partial(jax.jit, static_argnames=("model", "span"))
def _tail(model: Any, params: Params, tokens: jax.Array, mask: jax.Array, span: int) -> tuple[jax.Array, jax.Array]:
  """Of the last `span` tokens of each row, `[rows, span]`: their log-likelihoods, and whether each is the likeliest."""
  carry = model.start(params, {"tokens": tokens[:, :-1], "attention_mask": mask[:, :-1]})
  for block in model.blocks(params):
    carry, _ = model.run(block, params, carry)
  logits = model.finish(params, carry, span=(tokens.shape[1] - 1 - span, span)).astype(jnp.float32)
  wanted = tokens[:, -span:]
  picked = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
  return picked - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == wanted


def evaluate(
  harness: Harness, tasks: Sequence[str], include: Path | None = None, shots: int | None = None,
  limit: int | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
  """By task, its metrics with their standard errors, and how many samples it has.

  Args:
    tasks: names, or paths of YAML files of tasks.
    include: a folder of YAML files whose tasks have names, too; then the harness's own are not looked for.
    shots: examples before each sample; by default what the task says.
    limit: samples of each task; a trial's numbers, not a result.

  Raises:
    ConfigError: no such task; or one whose data cannot be had.
  """
  manager = TaskManager(include_path=include and str(include), include_defaults=include is None)
  known = set(manager.all_tasks)
  for task in tasks:
    if task not in known and not Path(task).is_file():
      near = ", ".join(sorted(known)[:8]) or "none"
      where = "the harness" if include is None else str(include)
      raise ConfigError(f"no task {task!r}: {where} has {near}{', ...' if len(known) > 8 else ''}, or name a YAML file")
  run: Any = lm_eval.simple_evaluate  # its decorator hides its parameters
  try:
    result: Any = run(
      model=harness, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False,
      bootstrap_iters=1000,
    )  # fmt: skip
  except (OSError, ValueError, LookupError, jinja2.TemplateError) as error:
    lines = str(error).strip().splitlines()
    raise ConfigError(f"{', '.join(tasks)}: {type(error).__name__}: {lines[0] if lines else 'no data'}") from error
  counts = result["n-samples"]
  return {
    task: {"samples": counts.get(task, {}).get("effective"), **{
      metric.removesuffix(",none"): value for metric, value in row.items() if isinstance(value, (int, float))
      and metric not in ("sample_len",)
    }}
    for task, row in result["results"].items()
  }  # fmt: skip
