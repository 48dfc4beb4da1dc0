"""What `lmcompress plan` is asked: a model by name, a mesh, a kind of work, and what fits a device."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress import tree
from lmcompress.distributed.accelerators import Accelerator
from lmcompress.distributed.sharding import AXES, RULES
from lmcompress.models import Gemma, GemmaConfig, GemmaSizes, Llama, LlamaConfig, LlamaSizes
from lmcompress.models.rope import Rope
from lmcompress.planner import Plan, estimate, largest_batch, serve_plan, train_plan, ways
from lmcompress.shapes import shapes_of, stored
from lmcompress.training import Training
from lmcompress.types import ConfigError, Params

_LLAMA3 = LlamaConfig(head_dim=128, rope=Rope(theta=500_000.0), max_length=8192)
_MIXTRAL = LlamaConfig(head_dim=128, rope=Rope(theta=1_000_000.0), max_length=32768)
PRESETS: dict[str, Any] = {
  "llama3-8b": Llama(_LLAMA3, LlamaSizes(128256, 4096, 14336, 32, 32, 8, tied=False)),
  "llama3-70b": Llama(_LLAMA3, LlamaSizes(128256, 8192, 28672, 80, 64, 8, tied=False)),
  "llama3-405b": Llama(
    dataclasses.replace(_LLAMA3, max_length=131072), LlamaSizes(128256, 16384, 53248, 126, 128, 8, tied=False)
  ),
  "mixtral-8x7b": Llama(_MIXTRAL, LlamaSizes(32000, 4096, 14336, 32, 32, 8, tied=False, experts=8)),
  "mixtral-8x22b": Llama(
    dataclasses.replace(_MIXTRAL, max_length=65536), LlamaSizes(32768, 6144, 16384, 56, 48, 8, tied=False, experts=8)
  ),
  "gemma2-9b": Gemma(
    GemmaConfig(head_dim=256, query_scale=256**-0.5, window=4096, full_layers=tuple(range(1, 42, 2)), score_cap=50.0,
                max_length=8192),
    GemmaSizes(vocab=256000, embed=3584, mlp=14336, layers=42, heads=16, kv_heads=8),
  ),
}  # fmt: skip
"""Models by name, of published sizes; no weights."""


def parse_topology(text: str) -> dict[str, int]:
  """`data=8,tensor=2` as sizes of a mesh.

  Raises:
    ConfigError: it is none.
  """
  sizes: dict[str, int] = {}
  for part in filter(None, (p.strip() for p in text.split(","))):
    name, _, number = part.partition("=")
    if name not in (*AXES, "pipe") or name in sizes or not number.isdecimal() or not 1 <= int(number) <= 1 << 20:
      known = ", ".join(f"{axis}=N" for axis in (*AXES, "pipe"))
      raise ConfigError(f"--topology {text}: {part!r} is no axis and size; write {known}, each once at most")
    sizes[name] = int(number)
  return sizes


FORMS: dict[str, dict[str, Any] | None] = {
  "bfloat16": None,
  "int8, a scale a row": {"bits": 8, "group_size": -1},
  "int4, groups of 128": {"bits": 4, "group_size": 128},
  "int3, groups of 128": {"bits": 3, "group_size": 128},
  "int2, groups of 64": {"bits": 2, "group_size": 64},
}
"""How the layers may be stored for decoding, the least lossy first, as keys of `round_to_nearest`."""


@dataclasses.dataclass(frozen=True)
class Asked:
  """A model, a machine and a kind of work.

  Attributes:
    params: shapes; for decoding, as the weights are stored; for training, as a config's recipe leaves them.
    dense: shapes in float32.
    trainable: patterns of the arrays that train.
    teacher: a model to be distilled, and its shapes.
    note: what is not planned as the config says, in words.
  """

  model: Any
  params: Params
  dense: Params
  sizes: dict[str, int]
  rules: Mapping[str, str | None]
  training: Training | None
  batch: int
  length: int
  trainable: tuple[str, ...] = ("**",)
  teacher: tuple[Any, Params] | None = None
  note: str = ""
  _made: dict[int, Plan] = dataclasses.field(default_factory=dict, repr=False)
  """Plans by their rows: the same for all kinds of devices."""

  @classmethod
  def of(
    cls, name: str, topology: str | None, serve: bool, batch: int | None, length: int | None, compute: str
  ) -> Asked:
    """What a command line says; a config says the rest itself.

    Raises:
      LmcompressError: there is no such model or config, or what is asked does not fit it.
    """
    if compute not in ("bfloat16", "float32"):
      raise ConfigError(f"--compute {compute}: bfloat16 or float32")
    if min(batch or 1, length or 1) < 1:
      raise ConfigError(f"--batch {batch}, --length {length}: from 1")
    rules, sizes, training, recipe, table, teacher, note = dict(RULES), {}, None, None, None, None, ""
    if name in PRESETS:
      model = PRESETS[name]
      dense = shapes_of(model)
    else:
      model, dense, config = _named(name)
      if config is not None:
        from lmcompress import recipe as recipes
        from lmcompress.config import rules_of

        rules = rules_of(config)
        recipe = recipes.build(config.recipe) if config.recipe else None
        if config.mesh is not None:
          sizes = {axis: getattr(config.mesh, axis) for axis in (*AXES, "pipe")}
        if config.train is not None and not serve:
          table = config.train
          training = table.settings()
          length, compute = length or table.length, training.compute
          training = dataclasses.replace(training, batch=batch or training.batch)
          if training.needs_teacher and table.teacher_top_k is None:  # else it has gone before the training
            teacher = (model, dense) if table.teacher is None else _named(table.teacher)[:2]
    sizes = sizes if topology is None else parse_topology(topology)
    if -1 in sizes.values():
      raise ConfigError("a mesh with a size of -1 takes what devices there are; say all sizes by --topology")
    tokens: int = length or min(model.config.max_length, 4096)
    if tokens > model.config.max_length:
      raise ConfigError(f"--length {tokens}: longer than the model's context of {model.config.max_length}")
    stages = sizes.get("pipe", 1)
    if serve and stages > 1:  # as a run does
      sizes = {**sizes, "fsdp": sizes.get("fsdp", 1) * stages, "pipe": 1}
    if not serve and training is None:
      rows = batch or ways(sizes) * stages
      training = Training(steps=2, batch=rows, accumulate=stages, compute=compute)  # type: ignore[arg-type]
    trainable = ("**",) if table is None else table.trainable
    try:
      dtype = jnp.bfloat16 if serve else jnp.float32
      params = stored(dense, recipe, dtype, model) if serve or table is not None else dense
    except ConfigError:
      paths: list[str] = []
      tree.partition(dense, lambda path: bool(paths.append(path)))
      if serve or not all(any(tree.matches(pattern, path) for path in paths) for pattern in trainable):
        raise
      params, note = dense, "the recipe reads weights: planned as if it left them dense"
    rows = batch or (ways(sizes) if training is None else training.batch)
    settings = None if serve else training
    return cls(model, params, dense, sizes, rules, settings, rows, tokens, trainable, teacher, note)

  @property
  def devices(self) -> int:
    return math.prod(self.sizes.values())

  @property
  def waiting(self) -> float:
    """The share of a step that a stage of a pipeline waits for others (Narayanan et al. 2021, arXiv:2104.04473)."""
    ahead = self.sizes.get("pipe", 1) - 1
    return 0.0 if self.training is None else ahead / (self.training.accumulate + ahead)

  @property
  def said(self) -> str:
    """In words."""
    mesh = ", ".join(f"{axis}={n}" for axis, n in self.sizes.items()) or "no mesh"
    kind = "decoding" if self.training is None else f"training in {self.training.compute}"
    return f"{mesh}; {kind}, {self.batch} rows of {self.length} tokens"

  def plan(self, batch: int) -> Plan:
    """For so many rows."""
    if batch not in self._made:
      self._made[batch] = self._planned(batch, self.params)
    return self._made[batch]

  def _planned(self, batch: int, params: Params) -> Plan:
    if self.training is None:
      return serve_plan(self.model, params, batch, self.length, self.sizes, self.rules)
    training = dataclasses.replace(self.training, batch=batch)
    selected = lambda path: any(tree.matches(pattern, path) for pattern in self.trainable)  # noqa: E731
    return train_plan(self.model, params, training, self.length, self.sizes, self.rules, selected, self.teacher)

  def on(self, made: Plan, device: Accelerator) -> dict[str, Any]:
    """Whether it `fits` a device, the `estimate`, the `largest_batch`, and the first `form` of `FORMS` that fits."""
    step = ways(self.sizes) * (1 if self.training is None else self.training.accumulate)
    other = step if self.batch >= 8 * step else 8 * step  # so far apart that activations tell
    each = max((made.total - self.plan(other).total) / (self.batch - other), 1.0)
    most = largest_batch(lambda n: made.total + each * (n - self.batch), device.memory, step)
    form = None
    for word, keys in FORMS.items() if self.training is None else ():
      with contextlib.suppress(ConfigError):  # groups that the widths do not take
        if self._planned(self.batch, self._in_form(keys)).total <= device.memory:
          form = word
          break
    return {
      "fits": made.total <= device.memory, "estimate": estimate(made, device, self.sizes or {"data": 1}),
      "largest_batch": most, "form": form,
    }  # fmt: skip

  def _in_form(self, keys: dict[str, Any] | None) -> Params:
    from lmcompress.transforms import at, round_to_nearest

    return stored(self.dense, None if keys is None else at("layers/*", round_to_nearest(**keys)))


def _named(name: str) -> tuple[Any, Params, Any]:
  """Model, shapes in float32, and the config of a config's file."""
  from pathlib import Path

  from lmcompress.config import load_config
  from lmcompress.io.load import load

  path = Path(name)
  config = load_config(path) if path.suffix == ".yaml" and path.is_file() and "recipe" in path.read_text() else None
  model, params, _ = load(name if config is None else config.model)
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
  return model, jax.tree.map(shape, params), config
