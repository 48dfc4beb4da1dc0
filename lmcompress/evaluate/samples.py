"""What a decoder makes of its own accord, judged: images of digits by a classifier of real ones, tunes by parsing."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from lmcompress.data.text import load_text
from lmcompress.evaluate.resampling import resampled
from lmcompress.types import ConfigError

LEVELS, SIDE = 17, 8
"""Grey levels of an image, and its rows and columns."""
_FIRST_LEVEL = ord("A")


class Judge(NamedTuple):
  """How samples of a text are asked for and judged.

  Attributes:
    text: the known text that they are like; a sample of it ends where its documents do, at an empty line.
    prompts: what samples begin with, in turn.
    max_new_tokens: of a sample.
    judge: samples with their prompts, and a seed, to their scores.
    package, extra: that judges, and what installs it.
  """

  text: str
  prompts: Callable[[], Sequence[str]]
  max_new_tokens: int
  judge: Callable[[Sequence[str], int], dict[str, Any]]
  package: str
  extra: str

  def require(self) -> None:
    """Raises ConfigError where the package that judges is missing."""
    if importlib.util.find_spec(self.package) is None:
      raise ConfigError(f"judging {self.text} needs {self.package}: pip install 'lmcompress[{self.extra}]'")


def judge_digits(samples: Sequence[str], seed: int = 0) -> dict[str, Any]:
  """Whether images show the digits that they were asked to show, as a support vector machine sees it (scikit-learn).

  It learns from `digits:rest`, as the model should have. An image that is no 64 letters from A to Q is not recognised.

  Args:
    samples: each the digit that was asked for and the image.
    seed: of the resampling.

  Returns:
    `n`, `valid` (the share that are images), `recognised` (taken for the digit that was asked), `new` (of the valid
    ones, not in the text), `real` (recognised of `digits:fifth`, which neither has seen), `interval` of `recognised`,
    `measure`, which names that, and `examples`.

  Raises:
    ConfigError: scikit-learn is missing.
  """
  try:
    from sklearn.svm import SVC
  except ImportError:
    raise ConfigError("judging digits needs scikit-learn: pip install 'lmcompress[tasks]'") from None
  known = load_text("digits:rest").split("\n\n")
  seen = set(known)
  learned = SVC(gamma="scale").fit([_pixels(image) for image in known], [int(image[0]) for image in known])
  held = load_text("digits:fifth").split("\n\n")
  real = learned.predict([_pixels(image) for image in held]) == [int(image[0]) for image in held]
  whole = re.compile(f"[0-9][A-Q]{{{SIDE * SIDE}}}")
  valid = [bool(whole.fullmatch(sample)) for sample in samples]
  right = [
    ok and int(learned.predict([_pixels(sample)])[0]) == int(sample[0])
    for sample, ok in zip(samples, valid, strict=True)
  ]
  novel = [sample not in seen for sample, ok in zip(samples, valid, strict=True) if ok]
  return _shares(samples, {"valid": valid, "recognised": right}, "recognised", seed) | {
    "new": float(np.mean(novel)) if novel else None, "real": float(np.mean(real))
  }  # fmt: skip


def _pixels(image: str) -> np.ndarray:
  """Grey levels `[64]` of an image's letters, after its digit."""
  return np.frombuffer(image[1:].encode(), np.uint8).astype(np.float64) - _FIRST_LEVEL


def judge_tunes(samples: Sequence[str], seed: int = 0) -> dict[str, Any]:
  """Whether tunes can be read as ABC, and how many of their bars are as long as their metre says (music21).

  The first and the last bar may be incomplete, and so may be bars at a repeat; they are not counted, nor are those of a
  tune without a metre.

  Args:
    samples: metre, unit, key and notes, as the text `tunes` has them.
    seed: of the resampling.

  Returns:
    `n`, `valid` (the share that music21 reads, that have four notes or more, and no character that no tune of the text
    has: music21 passes over what it does not know), `bars` (the share of bars of valid tunes that are full), `new` (of
    the valid ones, not in the text), `real` (`bars` of as many held-out tunes), `interval` of `valid` and `bars`,
    `measure`, which is `bars`, and `examples`.

  Raises:
    ConfigError: music21 is missing.
  """
  text = load_text("tunes:rest")
  known, letters = set(text.split("\n\n")), set(text)
  found = [_bars(sample) if set(sample) <= letters else None for sample in samples]
  held = load_text("tunes:fifth").split("\n\n")
  real = [_bars(tune) for tune in held[:: max(1, len(held) // max(1, len(samples)))][: len(samples)]]
  valid = [one is not None for one in found]
  novel = [sample.strip() not in known for sample, ok in zip(samples, valid, strict=True) if ok]
  shares = _shares(samples, {"valid": valid}, "valid", seed)
  counts = np.asarray([one or (0, 0) for one in found], np.float64)
  around = resampled(counts, _full, 1000, seed)
  return shares | {
    "measure": "bars", "bars": float(_full(counts.sum(0))), "new": float(np.mean(novel)) if novel else None,
    "real": float(_full(np.asarray([one or (0, 0) for one in real], np.float64).sum(0))),
    "interval": {**shares["interval"], "bars": around},
  }  # fmt: skip


def _full(counts: np.ndarray) -> np.ndarray:
  """The share of full bars, of sums `[..., 2]` of those and of all that count."""
  return counts[..., 0] / np.maximum(counts[..., 1], 1)


def _bars(tune: str) -> tuple[int, int] | None:
  """How many inner bars are full, and how many there are; None if it is no tune."""
  try:
    from music21 import converter
  except ImportError:
    raise ConfigError("judging tunes needs music21: pip install 'lmcompress[music]'") from None
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      score = converter.parse(f"X:1\n{tune.strip()}\n", format="abc", forceSource=True)
      notes = list(score.recurse().notes)
      key, metres = "K:" in tune, list(score.recurse().getElementsByClass("TimeSignature"))
      lengths = [Fraction(bar.duration.quarterLength) for bar in score.recurse().getElementsByClass("Measure")]
  except Exception:  # music21 raises whatever it meets in a text that is no tune
    return None
  if len(notes) < 4 or not key:
    return None
  inner = lengths[1:-1]
  if len(metres) != 1:
    return 0, 0
  whole = Fraction(metres[0].barDuration.quarterLength)
  return sum(length == whole for length in inner), len(inner)


def _shares(
  samples: Sequence[str], outcomes: dict[str, list[bool]], measure: str, seed: int, shown: int = 20
) -> dict[str, Any]:
  each = {name: np.asarray(values, np.float64) for name, values in outcomes.items()}
  mean = lambda sums: sums / len(samples)  # noqa: E731
  return {
    "measure": measure, "n": len(samples), **{name: float(values.mean()) for name, values in each.items()},
    "interval": {measure: resampled(each[measure], mean, 1000, seed)}, "examples": list(samples[:shown]),
  }  # fmt: skip


def _heads() -> list[str]:
  """Metre, unit and key of the held-out tunes, in their order."""
  return [f"{chr(10).join(tune.split(chr(10))[:3])}\n" for tune in load_text("tunes:fifth").split("\n\n")]


JUDGES: dict[str, Judge] = {
  "digits": Judge("digits", lambda: list("0123456789"), SIDE * SIDE + 2, judge_digits, "sklearn", "tasks"),
  "tunes": Judge("tunes", _heads, 320, judge_tunes, "music21", "music"),
}
"""By name."""
