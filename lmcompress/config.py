"""Configs: one YAML file, `extends` and dotted overrides, checked by frozen types. It is data, never code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml

from lmcompress import recipe as recipes
from lmcompress.io.yaml_text import parse
from lmcompress.types import ConfigError


class _Table(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class Tokens(_Table):
  """Tokens of a text: `windows` blocks of `length` tokens."""

  text: str
  windows: int = pydantic.Field(32, ge=1)
  length: int = pydantic.Field(512, ge=2)


class Calibration(Tokens):
  """Tokens that methods take statistics of; the first token of each row counts as `first_weight` tokens."""

  first_weight: float = pydantic.Field(1.0, gt=0, le=1e6)


class Evaluate(_Table):
  """Perplexity and KL on held-out texts."""

  texts: tuple[str, ...] = pydantic.Field(("pydoc", "grimm"), strict=False)
  windows: int = pydantic.Field(16, ge=1)
  length: int = pydantic.Field(512, ge=2)


class Bench(_Table):
  """Latency of every stage; `rounds: 0` leaves it out."""

  prefill: int = pydantic.Field(512, ge=1)
  decode: int = pydantic.Field(16, ge=1)
  rounds: int = pydantic.Field(2, ge=0)


class Generate(_Table):
  """One continuation before and after."""

  prompt: str = "The capital of France is"
  max_new_tokens: int = pydantic.Field(32, ge=1)
  chat: bool = False


class Samples(_Table):
  """What the model makes of its own accord, judged at every stage; it was trained on the text of that name."""

  judge: Literal["digits", "tunes"]
  count: int = pydantic.Field(200, ge=10)
  temperature: float = pydantic.Field(1.0, gt=0)
  top_k: int = pydantic.Field(0, ge=0)


class Explain(_Table):
  """What matters to the loss on a text, and what the recipe changed, for the report."""

  text: str = "grimm"
  windows: int = pydantic.Field(4, ge=1)
  length: int = pydantic.Field(256, ge=2)


class Carbon(_Table):
  """Grams of CO2 beside the joules of a run, by a country's grid (ISO 3166, three letters)."""

  country: str = pydantic.Field(min_length=3, max_length=3)


class MeshSizes(_Table):
  """Devices that share the work; one size may be -1.

  `pipe` is the stages of a pipeline that trains; what else a run does takes their devices as more of `fsdp`.
  `rules` says for logical axes which axis of the mesh splits them, where it is not the usual one; null for none.
  `length` is the tokens of what lies between products: `tensor` makes norms and sums of training in parts, too.
  """

  data: int = 1
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1
  pipe: int = pydantic.Field(1, ge=1)
  rules: dict[str, Literal["tensor"] | None] = pydantic.Field(default_factory=dict)

  def sizes(self, devices: int) -> dict[str, int]:
    """The size of each axis of the mesh, stages taken as more of `fsdp`.

    Raises:
      ConfigError: they do not multiply to at most the devices there are.
    """
    from lmcompress.distributed.sharding import AXES, mesh_sizes

    found = mesh_sizes({axis: getattr(self, axis) for axis in (*AXES, "pipe")}, devices)
    stages = found.pop("pipe")
    return {**found, "fsdp": found["fsdp"] * stages}


class Gates(_Table):
  """What a run may lose, on every text; a run that loses more fails."""

  max_kl: float | None = pydantic.Field(None, ge=0)
  max_perplexity_ratio: float | None = pydantic.Field(None, gt=0)


class Budget(_Table):
  """What a search may spend; exactly one."""

  mib: float | None = pydantic.Field(None, gt=0)
  ms_per_token: float | None = pydantic.Field(None, gt=0)

  @pydantic.model_validator(mode="after")
  def _one(self) -> Budget:
    if (self.mib is None) == (self.ms_per_token is None):
      raise ValueError("give exactly one of mib (bytes on disk) and ms_per_token (of decoding)")
    return self

  @property
  def limit(self) -> float:
    """Bytes, or milliseconds."""
    return self.ms_per_token if self.ms_per_token is not None else (self.mib or 0.0) * 2**20


_Links = Annotated[tuple[dict[str, Any], ...], pydantic.Field(strict=False, min_length=1)]


class Group(_Table):
  """Weights that are treated alike, and the links, or lists of links, that may be tried on them."""

  at: str
  candidates: tuple[dict[str, Any] | _Links, ...] = pydantic.Field(strict=False, min_length=1)

  @property
  def chains(self) -> list[list[dict[str, Any]]]:
    """Each candidate as its links, which know their weights."""
    chains = [[c] if isinstance(c, dict) else list(c) for c in self.candidates]
    return [[{**link, "at": self.at} for link in chain] for chain in chains]


class Search(_Table):
  """A search for the recipe that loses least."""

  budget: Budget
  groups: tuple[Group, ...] = pydantic.Field(strict=False, min_length=1)
  method: Literal["greedy", "optuna"] = "greedy"
  trials: int = pydantic.Field(20, ge=1)


class LabelsTable(_Table):
  """Cross entropy with the text's next tokens."""

  name: Literal["labels"]


class DistillTable(_Table):
  """A divergence from the teacher's predictions; keys as of `training.Distill`."""

  name: Literal["distill"]
  kind: Literal["forward", "reverse", "jensen_shannon", "skewed", "skewed_reverse"] = "forward"
  temperature: float = pydantic.Field(1.0, gt=0)
  mix: float = pydantic.Field(0.1, gt=0, lt=1)
  labels: float = pydantic.Field(0.0, ge=0, le=1)


class MatchTable(_Table):
  """What blocks see beside what the teacher's see; keys as of `training.Match`."""

  hidden: float = pydantic.Field(1.0, ge=0)
  relations: float = pydantic.Field(0.0, ge=0)
  heads: int = pydantic.Field(8, ge=1)
  layers: Literal["uniform", "name"] = "uniform"


class GeneratedTable(_Table):
  """Rows that a model writes; keys as of `training.Generated`."""

  by: Literal["student", "teacher"] = "student"
  share: float = pydantic.Field(0.5, gt=0, le=1)
  prompt: int = pydantic.Field(32, ge=1)
  temperature: float = pydantic.Field(1.0, ge=0)


class WrittenTable(_Table):
  """Rows that the teacher writes from nothing before the student trains; keys as of `training.write_rows`."""

  rows: int = pydantic.Field(ge=1)
  temperature: float = pydantic.Field(1.0, gt=0)
  batch: int = pydantic.Field(64, ge=1)


class TaskTable(_Table):
  """What the model learns of a labelled data set; its rows are cut or padded to `length` tokens."""

  name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=40)
  data: str
  length: int = pydantic.Field(128, ge=2)
  rows: int | None = pydantic.Field(None, ge=1)


class WeightingTable(_Table):
  """How the losses of tasks become one; keys as of `training.Weighting`."""

  kind: Literal["fixed", "uncertainty", "gradnorm"] = "fixed"
  alpha: float = pydantic.Field(1.5, ge=0)
  rate: float = pydantic.Field(0.025, gt=0)
  surgery: bool = False
  temperature: float = pydantic.Field(1.0, gt=0)


class PrivacyTable(_Table):
  """Differentially private training; keys as of `training.Privacy`."""

  noise: float = pydantic.Field(gt=0)
  clip: float = pydantic.Field(1.0, gt=0)
  delta: float = pydantic.Field(1e-5, gt=0, lt=1)


class Train(_Table):
  """Training after the recipe; keys as of `training.Training`, and what trains on what.

  `text`, `windows` and `length` say the rows (`windows: null` takes all of the text), `written` those that the teacher
  writes beside them or in their stead; without either the config's `tasks` are learned, together as `weighting` says.
  `trainable` the arrays that train by patterns of their paths, such as `**/delta` for adapters, `teacher` whose
  predictions are distilled: the model as it was, or another by name; with `teacher_top_k` its likeliest tokens of all
  rows are written first, and it need not run while the student trains. `during` is a recipe of methods that act after
  each step, such as `prune_gradually`. A state is saved every `save_every` steps, and `held_out` is scored every
  `evaluate_every`.
  """

  text: str | None = None
  windows: int | None = pydantic.Field(None, ge=1)
  written: WrittenTable | None = None
  length: int = pydantic.Field(256, ge=2)
  weighting: WeightingTable | None = None
  steps: int = pydantic.Field(100, ge=1)
  batch: int = pydantic.Field(4, ge=1)
  accumulate: int = pydantic.Field(1, ge=1)
  learning_rate: float = pydantic.Field(1e-4, gt=0)
  warmup: int = pydantic.Field(0, ge=0)
  schedule: Literal["constant", "linear", "cosine"] = "cosine"
  optimizer: Literal["adamw", "sgd"] = "adamw"
  weight_decay: float = pydantic.Field(0.0, ge=0)
  clip: float | None = pydantic.Field(1.0, gt=0)
  average: float | None = pydantic.Field(None, gt=0, lt=1)
  compute: Literal["float32", "bfloat16"] = "float32"
  chunk: int = pydantic.Field(64, ge=1)
  remat: bool = True
  loss: LabelsTable | DistillTable = pydantic.Field(
    default_factory=lambda: LabelsTable(name="labels"), discriminator="name"
  )
  match: MatchTable | None = None
  generated: GeneratedTable | None = None
  teacher: str | None = None
  teacher_top_k: int | None = pydantic.Field(None, ge=1)
  privacy: PrivacyTable | None = None
  cache: Literal["bfloat16", "int8", "int4"] | None = None
  during: tuple[dict[str, Any], ...] = pydantic.Field((), strict=False)
  trainable: tuple[str, ...] = pydantic.Field(("**",), strict=False, min_length=1)
  save_every: int = pydantic.Field(50, ge=1)
  held_out: Tokens | None = None
  evaluate_every: int = pydantic.Field(50, ge=1)

  @pydantic.model_validator(mode="after")
  def _fits(self) -> Train:
    self.settings()
    return self

  def settings(self) -> Any:
    """The `training.Training` that the keys say."""
    from lmcompress.training import Distill, Generated, Labels, Match, Privacy, Training

    parts = {"privacy": Privacy, "match": Match, "generated": Generated}
    given = {name: value for name, value in self if name in Training.__dataclass_fields__ and name != "loss"}
    for name, kind in parts.items():
      given[name] = None if given[name] is None else kind(**given[name].model_dump())
    loss = Labels() if isinstance(self.loss, LabelsTable) else Distill(**self.loss.model_dump(exclude={"name"}))
    return Training(loss=loss, **given)


class Config(_Table):
  """A run: what is compressed, how, and what is measured.

  `train` trains the tree that the recipe left, on a text or on `tasks` (whose heads are then scored at every stage that
  has them), and `finish` is a recipe for what training left, such as `freeze`.
  `search` is for `lmcompress search`, which finds the recipe. `stream` leaves the weights of a Hugging Face folder or a
  GGUF file on disk until they are used: memory holds one block, whatever the depth. `variants` is for studies: each
  is a table of dotted overrides, such as `{recipe.0.bits: 3}`.
  """

  name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
  description: str = ""
  seed: int = pydantic.Field(0, ge=0, lt=2**32)
  model: str
  recipe: tuple[dict[str, Any], ...] = pydantic.Field(strict=False)
  train: Train | None = None
  tasks: tuple[TaskTable, ...] = pydantic.Field((), strict=False)
  finish: tuple[dict[str, Any], ...] = pydantic.Field((), strict=False)
  calibration: Calibration | None = None
  evaluate: Evaluate = pydantic.Field(default_factory=lambda: Evaluate.model_validate({}))
  bench: Bench = pydantic.Field(default_factory=lambda: Bench.model_validate({}))
  generate: Generate | None = pydantic.Field(default_factory=lambda: Generate.model_validate({}))
  samples: Samples | None = None
  explain: Explain | None = None
  carbon: Carbon | None = None
  mesh: MeshSizes | None = None
  gates: Gates | None = None
  stream: bool = False
  search: Search | None = None
  variants: tuple[dict[str, Any], ...] = pydantic.Field((), strict=False)

  @property
  def hash(self) -> str:
    """Eight hex digits that change with anything that changes the result."""
    silent = ("gates", "stream", "search", "train", "tasks", "finish", "samples", "explain")
    without = {"carbon", *(name for name in silent if not getattr(self, name))}  # what says nothing changes nothing
    table = self.model_dump(mode="json", exclude=without)
    if self.mesh:
      unsaid = {"fsdp": 1, "expert": 1, "pipe": 1, "rules": {}}
      table["mesh"] = {key: value for key, value in table["mesh"].items() if unsaid.get(key) != value}
    if self.calibration and self.calibration.first_weight == 1:
      del table["calibration"]["first_weight"]
    if self.train:
      table["train"] = {key: value for key, value in table["train"].items() if value is not None}
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:8]

  @property
  def folder(self) -> str:
    """`<name>-<hash>`."""
    return f"{self.name}-{self.hash}"


def rules_of(config: Config) -> dict[str, str | None]:
  """Which axis of the mesh splits each logical axis: the usual ones, and over them the config's own."""
  from lmcompress.distributed.sharding import RULES

  return {**RULES, **(config.mesh.rules if config.mesh else {})}


def splits_tokens(config: Config) -> bool:
  """Whether, in training, what lies between products is split by tokens (`distributed.sequence_parallel`)."""
  return rules_of(config).get("length") == "tensor"


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
  """The table of a file merged over those it extends (tables merge by key, anything else is replaced)."""
  path = path.resolve()
  if path in seen:
    raise ConfigError(f"{path.name}: extends itself through {' -> '.join(p.name for p in (*seen, path))}")
  if not path.is_file():
    raise ConfigError(f"{path}: no such config file; `lmcompress ls` lists those there are")
  try:
    table = parse(path.read_text("utf-8"), path.name)
  except UnicodeDecodeError:
    raise ConfigError(f"{path.name}: not UTF-8 text") from None
  if not isinstance(table, dict):
    raise ConfigError(f"{path.name}: a config is a table of keys; found {type(table).__name__}")
  base = table.pop("extends", None)
  if base is None:
    return table
  if not isinstance(base, str):
    raise ConfigError(f"{path.name}: extends is the path of one file; found {base!r}")
  return merge(read(path.parent / base, (*seen, path)), table)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
  """`over` on `base`: tables key by key, everything else whole."""
  out = dict(base)
  for key, value in over.items():
    both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
    out[key] = merge(out[key], value) if both else value
  return out


def override(table: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
  """Applies `evaluate.windows=4`, `recipe.0.sparsity=0.3`; the value is YAML."""
  for text in assignments:
    dotted, equals, raw = text.partition("=")
    if not equals or not dotted:
      raise ConfigError(f"override {text!r}: write key.path=value, e.g. evaluate.windows=4")
    table = _set(table, dotted.split("."), parse(raw, f"override {text!r}"), text)
  return table


def _set(node: Any, keys: list[str], value: Any, text: str) -> Any:
  if not keys:
    return value
  key, rest = keys[0], keys[1:]
  if isinstance(node, (list, tuple)):
    if not (key.isascii() and key.isdigit()) or int(key) >= len(node):
      raise ConfigError(f"override {text!r}: {key!r} is no index of a list of {len(node)}")
    return [_set(item, rest, value, text) if i == int(key) else item for i, item in enumerate(node)]
  if node is not None and not isinstance(node, dict):
    raise ConfigError(f"override {text!r}: {key!r} is below {node!r}, which is no table")
  return {**(node or {}), key: _set((node or {}).get(key), rest, value, text)}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
  """The resolved, checked config of a file.

  Raises:
    ConfigError: one line that says where, what was found and what would do.
  """
  return check(override(read(Path(path)), overrides), Path(path).name)


def check(table: Mapping[str, Any], where: str) -> Config:
  """A `Config` of a table, its recipe built once to check it."""
  unknown = set(table) - set(Config.model_fields)
  if unknown:
    raise ConfigError(f"{where}: no key {sorted(unknown)[0]!r}; keys are extends, {', '.join(Config.model_fields)}")
  try:
    config = Config(**table)
  except pydantic.ValidationError as error:
    raise ConfigError(f"{where}: {recipes.explain(error)}") from None
  try:
    if config.recipe:
      recipes.build(config.recipe)
    _require_rows(config)
    if config.train and config.train.during:
      _require_steps(recipes.build(config.train.during, "train.during"))
    if config.finish:
      recipes.build(config.finish, "finish")
    for n, group in enumerate(config.search.groups if config.search else ()):
      for i, chain in enumerate(group.chains):
        for link in chain:
          recipes.build_link(link, f"search.groups.{n}.candidates.{i}")
    variants_of(config)
  except ConfigError as error:
    raise ConfigError(f"{where}: {error}") from None
  return config


def _require_rows(config: Config) -> None:
  """Training has rows of a text or of tasks, not of both."""
  train, names = config.train, [task.name for task in config.tasks]
  names += [config.samples.judge] if config.samples else []
  if len(set(names)) < len(names):
    raise ConfigError(f"tasks and samples: two have the name {max(names, key=names.count)}; rename a task")
  names = [task.name for task in config.tasks]
  if train is None:
    return
  if (train.text is None and train.written is None) == (not names):
    raise ConfigError("train: give a text or written rows, or leave them out and give tasks")
  others = ("match", "generated", "privacy", "held_out", "teacher_top_k", "cache")
  alone = [key for key in others if getattr(train, key) is not None]
  if names and (alone or train.accumulate > 1):
    refused = ", ".join(alone) or "accumulate but 1"
    raise ConfigError(f"train: tasks are learned from labels or a teacher, all in each batch: no {refused}")
  if config.mesh is not None and config.mesh.pipe > 1:
    never = ("match", "generated", "privacy", "during", "cache")
    given = {"tasks": names, **{f"train.{key}": getattr(train, key) for key in never}}
    if asked := [word for word, value in given.items() if value]:
      raise ConfigError(f"mesh.pipe={config.mesh.pipe}: a pipeline has no {', no '.join(asked)}; say fsdp instead")
  for link in train.during:
    end = link.get("end", 100)
    if link.get("name") == "l0" and isinstance(end, int) and train.steps <= end:
      raise ConfigError(f"train.during: l0 closes gates at step {end}, and training has {train.steps}; train on")
  if train.weighting is not None and not names:
    raise ConfigError("train.weighting: it weighs tasks; there are none")


def _require_steps(transform: Any) -> None:
  if transform.phase != "step":
    names = ", ".join(link.name for link in transform.links or (transform,))
    raise ConfigError(f"train.during: {names}: what acts once belongs in recipe; prune_gradually acts at each step")


def variants_of(config: Config) -> list[Config]:
  """The config of each variant, its overrides applied, checked.

  Raises:
    ConfigError: an override does not fit.
  """
  table = config.model_dump(mode="json", exclude={"variants"})
  found = []
  for variant in config.variants:
    changed: Any = table
    for dotted, value in variant.items():
      changed = _set(changed, dotted.split("."), value, f"variants: {dotted}")
    found.append(check(changed, "variants"))
  return found


def dump(config: Config) -> str:
  """The resolved config as YAML."""
  return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
