"""Search: the recipe that loses least under a budget, among candidates for each part of a model."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmcompress import config as configs
from lmcompress import ops, recipe
from lmcompress.calibration import compress, weigh_first
from lmcompress.data.text import load_text, windows
from lmcompress.environment import device, versions
from lmcompress.errors import ConfigError, FormatError, SourceError
from lmcompress.evaluate.latency import latency
from lmcompress.evaluate.perplexity import Score, compare
from lmcompress.io import checkpoint
from lmcompress.io.load import load
from lmcompress.stages import Silent, Watcher

TRIALS, RESULT, BEST, PLOT, TIMES = "trials.jsonl", "search.json", "best.yaml", "pareto.svg", "latency.svg"

Choice = tuple[int, ...]
"""For each group, which of its candidates; -1 leaves it as it is."""

Groups = list[tuple[str, list[list[dict[str, Any]]]]]
"""A pattern and its candidates, each some links, for each group."""


@dataclasses.dataclass(frozen=True)
class Trial:
  """What one choice costs: `kl` and `perplexity` on the config's first text, `nbytes` on disk, `ms_per_token` of
  decoding (None where the budget does not ask for it)."""

  choice: Choice
  kl: float
  perplexity: float
  nbytes: int
  ms_per_token: float | None


class Measure:
  """Compresses by a choice and scores it; each choice once, on record in a file."""

  def __init__(self, config: configs.Config, groups: Groups, folder: Path, watcher: Watcher):
    self.config, self.groups, self.watcher, self.file = config, groups, watcher, folder / TRIALS
    self.timed = config.search is not None and config.search.budget.ms_per_token is not None
    model, params, tokenizer = load(config.model)
    if tokenizer is None:
      raise SourceError(f"{config.model} has no tokenizer, texts cannot be scored; put a tokenizer.json beside it")
    e, c = config.evaluate, config.calibration
    self.model, self.params = model, params
    self.held_out = windows(tokenizer, load_text(e.texts[0]), e.windows, e.length)
    text = None if c is None else windows(tokenizer, load_text(c.text), c.windows, c.length)
    self.calibration = None if c is None else weigh_first(text, c.first_weight)
    self.trials: dict[Choice, Trial] = {}
    if self.file.is_file():
      try:
        for line in self.file.read_text("utf-8").splitlines():
          row = json.loads(line)
          self.trials[tuple(row["choice"])] = Trial(**{**row, "choice": tuple(row["choice"])})
      except (ValueError, KeyError, TypeError):
        raise FormatError(f"{self.file}: not JSON lines of trials; remove it and search again") from None

  def __call__(self, choice: Choice) -> Trial:
    if choice not in self.trials:
      trial = self._measured(choice)
      self.trials[choice] = trial
      with self.file.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(trial)) + "\n")
        file.flush()
        os.fsync(file.fileno())
      said = f"{trial.nbytes / 1e6:.1f} MB, KL {trial.kl:.4f}, perplexity {trial.perplexity:.3f}"
      self.watcher.note(f"{len(self.trials):>4}  {said}  {describe(self.groups, choice)}")
    return self.trials[choice]

  def _measured(self, choice: Choice) -> Trial:
    links = recipe_of(self.groups, choice)
    done = self.params
    if links:
      key = jax.random.key(self.config.seed)
      done, _ = compress(self.model, self.params, recipe.build(links), self.calibration, key)
    total = Score(0, 0, 0, 0)
    ready = ops.prepare(done)
    for _, scores in compare(self.model, self.params, {"done": ready}, self.held_out):
      total += scores["done"]
    ms = None
    if self.timed:
      b = self.config.bench
      found = latency(self.model, ready, prefill=b.prefill, decode=b.decode, rounds=max(1, b.rounds))
      ms = found["decode_ms"]["median"]
    return Trial(choice, total.summary()["kl"], total.perplexity, checkpoint.weights_size(done), ms)

  def cost(self, trial: Trial) -> float:
    """What the budget limits."""
    return trial.ms_per_token if trial.ms_per_token is not None else float(trial.nbytes)


def space(config: configs.Config) -> Groups:
  """Pattern and candidates of each group.

  Raises:
    ConfigError: the config asks for no search.
  """
  if config.search is None:
    raise ConfigError(f"{config.name}: nothing to search; add a `search` table with a budget and groups")
  return [(group.at, group.chains) for group in config.search.groups]


def recipe_of(groups: Groups, choice: Choice) -> list[dict[str, Any]]:
  """The links of a choice."""
  return [link for (_, chains), i in zip(groups, choice, strict=True) if i >= 0 for link in chains[i]]


def describe(groups: Groups, choice: Choice) -> str:
  """A choice in a line."""
  parts = []
  for (at, chains), i in zip(groups, choice, strict=True):
    said = ["as it is"] if i < 0 else [_said(link) for link in chains[i]]
    parts.append(f"{at}: {' then '.join(said)}")
  return "; ".join(parts)


def _said(link: Mapping[str, Any]) -> str:
  rest = ", ".join(f"{key} {value}" for key, value in link.items() if key not in ("name", "at"))
  return f"{link['name']} {rest}".strip()


def search(config: configs.Config, results: Path, watcher: Watcher | None = None) -> dict[str, Any]:
  """Finds the choice of least KL within the budget; writes trials, result, best recipe and plot to its folder.

  `greedy` measures every candidate alone, then steps from the uncompressed model to whatever costs least for what it
  saves, measuring each step. `optuna` starts from there, and tries `trials` more choices by its tree-structured Parzen
  estimator. What was measured before is not measured again.

  Raises:
    ConfigError: no search, an empty budget that no choice meets, or optuna is missing.
  """
  if config.train is not None or config.finish:
    raise ConfigError(f"{config.name}: a search trains nothing; leave train and finish out, and train what it finds")
  watcher = watcher or Silent()
  folder = results / config.folder
  groups = space(config)
  assert config.search is not None
  folder.mkdir(parents=True, exist_ok=True)
  measure = Measure(config, groups, folder, watcher)
  sizes, budget = [len(chains) for _, chains in groups], config.search.budget.limit
  path = greedy(measure, sizes, budget)
  if config.search.method == "optuna":
    explore(measure, sizes, budget, config.search.trials, config.seed, path)
  trials = list(measure.trials.values())
  fitting = [t for t in trials if measure.cost(t) <= budget]
  if not fitting:
    least = min(trials, key=measure.cost)
    raise ConfigError(
      f"{config.name}: no choice of {len(trials)} meets the budget of {budget:g}; the least is {measure.cost(least):g} "
      f"({describe(groups, least.choice)}). Allow more, or add a smaller candidate"
    )
  best = min(fitting, key=lambda t: t.kl)
  front = pareto([(measure.cost(t), t.perplexity) for t in trials])
  result = {
    "format": 1,
    "name": config.name,
    "config_hash": config.hash,
    "model": config.model,
    "budget": config.search.budget.model_dump(exclude_none=True),
    "versions": versions(),
    "device": device(),
    "trials": [{**dataclasses.asdict(t), "recipe": describe(groups, t.choice)} for t in trials],
    "front": [list(trials[i].choice) for i in front],
    "best": {**dataclasses.asdict(best), "recipe": recipe_of(groups, best.choice)},
  }
  (folder / RESULT).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  (folder / BEST).write_text(_best(config, result["best"]["recipe"]), "utf-8")
  size = [t.nbytes / 1e6 for t in trials]
  (folder / PLOT).write_text(plot(trials, size, None if measure.timed else budget / 1e6, "MB on disk"), "utf-8")
  if measure.timed:
    times = [measure.cost(t) for t in trials]
    (folder / TIMES).write_text(plot(trials, times, budget, "ms per token"), "utf-8")
  return result


def greedy(measure: Measure, sizes: Sequence[int], budget: float) -> list[Choice]:
  """Steps of least measured KL for what they save, until the budget is met; the choices on the way."""
  none: Choice = (-1,) * len(sizes)
  start = measure(none)
  alone: dict[tuple[int, int], Trial] = {}
  total = sum(sizes)
  for group, count in enumerate(sizes):
    for i in range(count):
      alone[group, i] = measure(_with(none, group, i))
      measure.watcher.step("candidates alone", len(alone), total)
  saved = {(g, i): measure.cost(start) - measure.cost(t) for (g, i), t in alone.items()}
  saved.update({(g, -1): 0.0 for g in range(len(sizes))})
  loss = {(g, i): max(t.kl, 0.0) for (g, i), t in alone.items()} | {(g, -1): 0.0 for g in range(len(sizes))}
  at: Choice = none
  path: list[Choice] = [none]
  while measure.cost(measure(at)) > budget:
    moves = [
      ((loss[g, i] - loss[g, at[g]]) / (saved[g, i] - saved[g, at[g]]), g, i)
      for g, i in alone
      if saved[g, i] > saved[g, at[g]]
    ]
    if not moves:
      break
    _, g, i = min(moves)
    at = _with(at, g, i)
    path.append(at)
  return path


def _with(choice: Choice, group: int, candidate: int) -> Choice:
  return (*choice[:group], candidate, *choice[group + 1 :])


def explore(
  measure: Measure, sizes: Sequence[int], budget: float, trials: int, seed: int, known: Sequence[Choice]
) -> None:
  """More choices, proposed by optuna; those over the budget count as infeasible."""
  try:
    import optuna
  except ImportError:
    raise ConfigError("search.method optuna needs optuna: pip install 'lmcompress[search]', or use greedy") from None
  optuna.logging.set_verbosity(optuna.logging.WARNING)

  def over(trial: Any) -> tuple[float]:
    return (trial.user_attrs["over"],)

  def objective(trial: Any) -> float:
    choice = tuple(trial.suggest_categorical(f"group{g}", list(range(-1, n))) for g, n in enumerate(sizes))
    found = measure(choice)
    trial.set_user_attr("over", measure.cost(found) - budget)
    measure.watcher.step("optuna", trial.number + 1, trials)
    return found.kl

  with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # newer versions would have the constraint set on the trial
    sampler = optuna.samplers.TPESampler(seed=seed, constraints_func=over)
  study = optuna.create_study(sampler=sampler)
  for choice in known[-3:]:
    study.enqueue_trial({f"group{g}": i for g, i in enumerate(choice)})
  study.optimize(objective, n_trials=trials)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
  """Indices of the points that no other beats in both coordinates (less is better), by the first."""
  front, least = [], math.inf
  for i in sorted(range(len(points)), key=lambda i: points[i]):
    if points[i][1] < least:
      front.append(i)
      least = points[i][1]
  return front


def _best(config: configs.Config, links: Sequence[Mapping[str, Any]]) -> str:
  """A config that runs the best recipe."""
  found = config.model_copy(update={"name": f"{config.name}-best", "recipe": tuple(links), "search": None})
  return f"# The best recipe of `{config.name}`.\n# Run: lmcompress run {BEST}\n{configs.dump(found)}"


def plot(trials: Sequence[Trial], x: Sequence[float], limit: float | None, label: str) -> str:
  """An SVG: what every choice costs, `x`, against its perplexity, the Pareto front, and the budget if it is of that."""
  from lmcompress import figures

  y = [t.perplexity for t in trials]
  return figures.scatter(np.array(x), np.array(y), pareto(list(zip(x, y, strict=True))), limit, label, "perplexity")
