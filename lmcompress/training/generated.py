"""Rows that a model writes: a student learns from its own texts as its teacher judges them, or from its teacher's."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import numpy as np

from lmcompress.types import Params


@dataclasses.dataclass(frozen=True)
class Generated:
  """The ends of some batches' rows are written by a model, and only they count.

  By the student with a divergence as the loss: on-policy distillation (GKD, arXiv:2306.13649; with the reverse KL what
  MiniLLM minimises, arXiv:2306.08543, its gradient taken token by token and not through the draw). By the teacher with
  labels as the loss: sequence-level distillation (Kim & Rush 2016, arXiv:1606.07947).

  Attributes:
    by: `student` or `teacher`.
    share: of batches that are written so; the others are of the text.
    prompt: tokens of a row that stay.
    temperature: of the draw; 0 takes the likeliest token.

  Raises:
    ValueError: an attribute is out of range.
  """

  by: Literal["student", "teacher"] = "student"
  share: float = 0.5
  prompt: int = 32
  temperature: float = 1.0

  def __post_init__(self) -> None:
    known = self.by in ("student", "teacher")
    if not known or not 0 < self.share <= 1 or self.prompt < 1 or not 0 <= self.temperature < float("inf"):
      raise ValueError(
        f"Generated(by={self.by!r}, share={self.share}, prompt={self.prompt}, temperature={self.temperature}): student "
        "or teacher, a share above 0 up to 1, a prompt from 1, a temperature from 0"
      )

  def due(self, seed: int, step: int) -> bool:
    """Whether the batch of a step is written; the same in every run."""
    return bool(np.random.default_rng([seed, step, 1]).random() < self.share)


def continued(
  model: Any, params: Params, rows: np.ndarray, settings: Generated, key: jax.Array
) -> tuple[np.ndarray, np.ndarray]:
  """Rows `[n, length]` whose tokens after the prompt the model drew, and a mask of those."""
  from lmcompress.generation.generate import decode
  from lmcompress.generation.sampling import Sampler

  prompts = [row[: settings.prompt].tolist() for row in rows]
  drawn = decode(model, params, prompts, rows.shape[1] - settings.prompt, Sampler(settings.temperature), key)
  ends = np.stack([np.asarray(tokens, rows.dtype) for tokens in drawn], axis=1)
  counted = np.zeros(rows.shape, np.int32)
  counted[:, settings.prompt :] = 1
  return np.concatenate([rows[:, : settings.prompt], ends], axis=1), counted
