"""Experiments: a config to a run folder, step by step, so that a run that was cut off continues."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmcompress import measuring, tree
from lmcompress import recipe as recipes
from lmcompress.calibration import compress, weigh_first
from lmcompress.calibration.sequential import Streamed, expected_bytes
from lmcompress.calibration.statistics import STATISTICS
from lmcompress.config import Config, dump, rules_of, splits_tokens
from lmcompress.data.text import load_text, windows
from lmcompress.distributed import processes
from lmcompress.distributed.sharding import make_mesh, placements, require_division, sequence_parallel
from lmcompress.environment import device, exact_products, versions
from lmcompress.evaluate import energy, importance, profiling
from lmcompress.evaluate.latency import latency
from lmcompress.evaluate.memory import peak_bytes, release, reset_peak
from lmcompress.gates import through_gates
from lmcompress.io import checkpoint, hub
from lmcompress.io.load import load, origin, read_tasks
from lmcompress.io.store import Store
from lmcompress.io.whole import write_text
from lmcompress.judged_tasks import Judged, judged_task
from lmcompress.learning import check_samples, judge_samples, score_tasks, train_tasks, train_text
from lmcompress.ops.backend import threads
from lmcompress.run_folder import (
  BLOCKS,
  CONFIG,
  FINISHED,
  METRICS,
  MODEL,
  RESULT,
  TENSORBOARD,
  Records,
  read_result,
)
from lmcompress.stages import Silent, Stage, Watcher, key
from lmcompress.training.heads import with_start
from lmcompress.training.pipeline import stages_of
from lmcompress.types import ConfigError, FormatError, Params, SourceError, Transform


@exact_products()
def run(
  config: Config,
  results: Path,
  command: str,
  watcher: Watcher | None = None,
  folder: Path | None = None,
  profile: bool = False,
) -> dict[str, Any]:
  """Runs a config in `results/<name>-<hash>`, continuing what is already there, and returns its result.

  Finished blocks of each link and scores that were written are kept, the rest is made again to the same bits. The
  folder holds `config.yaml`, `metrics.jsonl`, `model/`, `result.json`, `report.html` and TensorBoard events.

  Args:
    results: the folder of run folders.
    folder: the run folder, if it is not the config's own in `results`.
    command: what repeats the run, for the record.
    watcher: told of progress.
    profile: trace three steps of the training, or a prompt and its continuation, for TensorBoard; the report says which
      operations took longest, and what the training step needs.

  Raises:
    LmcompressError: the config, the model, a text or a weight is not as needed; nothing half-written is left.
  """
  watcher = watcher or Silent()
  if config.search is not None:
    raise ConfigError(f"{config.name} is a search; run it with: lmcompress search")
  if config.variants:
    raise ConfigError(f"{config.name} has variants: it is a study, run it by the command in its header")
  if config.explain is not None and config.stream:
    raise ConfigError("explain: a streamed model stays in its files; leave stream out")
  if config.train is not None and config.stream:
    raise ConfigError("train: a streamed model stays in its files; leave stream out")
  if config.tasks and config.stream:
    raise ConfigError("tasks: a streamed model has no heads; leave stream or tasks out")
  many = processes.count() > 1
  if many:
    _fits_processes(config, profile)
    watcher = watcher if processes.first() else Silent()
  folder = folder or results / config.folder
  if (folder / RESULT).is_file():
    watcher.note(f"{folder} is complete already; its result is shown (remove the folder to run it again)")
    return through_gates(config, read_result(folder))

  mesh, electricity = _mesh(config), None if config.carbon is None else energy.grid(config.carbon.country)
  counter = energy.meter(threads=threads(), platform=jax.default_backend())
  if electricity is not None and (counter is None or counter.label == "modelled"):
    counter = energy.estimated(electricity)
  started, joules = time.perf_counter(), 0.0 if counter is None else counter.read()
  watcher.note(f"loading {config.model}")
  reset_peak()
  begun = time.perf_counter()
  model, params, tokenizer = load(config.model, mesh, lazy=config.stream, rules=rules_of(config))
  if mesh is not None:
    _tell_places(config, model, params, mesh, watcher)
  stages = [Stage("original", params, time.perf_counter() - begun, peak_bytes())]
  if tokenizer is None:
    raise SourceError(f"{config.model} has no tokenizer, texts cannot be scored; put a tokenizer.json beside it")
  encoder, writes = not getattr(model, "causal", True), hasattr(model, "encode")
  if encoder:
    _fits_encoder(config, model, params, profile)
  b, most = config.bench, model.config.max_length
  decodes = b.rounds > 0 or (profile and config.train is None)
  for what, length in (
    ("evaluate.length", config.evaluate.length if config.evaluate.texts else 0),
    ("explain.length", config.explain.length if config.explain else 0),
    ("calibration.length", config.calibration.length if config.calibration else 0),
    ("train.length", config.train.length if config.train and not config.tasks else 0),
    (  # a decoder reads a token more, the one that it begins with
      "tasks.length + 1" if writes else "tasks.length",
      max((table.length + writes for table in config.tasks), default=0),
    ),
    ("train.held_out.length", config.train.held_out.length if config.train and config.train.held_out else 0),
    (f"bench.prefill {b.prefill} + decode", b.prefill + b.decode if decodes else 0),
  ):
    if length > most:
      raise ConfigError(f"{what}: {length} tokens are more than the model's context of {most}")
  texts = {
    name: windows(tokenizer, load_text(name), config.evaluate.windows, config.evaluate.length)
    for name in config.evaluate.texts
  }
  e, explained_on = config.explain, None
  if e is not None:
    explained_on = windows(tokenizer, load_text(e.text), e.windows, e.length)
  if config.samples is not None:
    check_samples(config.samples, model, tokenizer)
  tasks = {table.name: judged_task(table, model, tokenizer) for table in config.tasks}
  calibration = _calibration(config, model, tokenizer, tasks)
  vocab = params["embed"]["table"].shape[0]
  for name, tokens in texts.items():
    if int(tokens.max()) >= vocab:
      raise ConfigError(f"text {name}: token {int(tokens.max())} is outside the model's vocabulary of {vocab}")
  del params  # the stages hold it

  rows: list[dict[str, Any]] = []
  store = None if many else Store(folder / BLOCKS, _decides(config, calibration), mapped=config.stream)
  if config.recipe:
    rows = _compress(config, recipes.build(config.recipe), model, calibration, stages, watcher, store)
  folder.mkdir(parents=True, exist_ok=True)
  if processes.first():
    write_text(folder / CONFIG, dump(config))
  training = None
  if config.train is not None:
    decides = _decides(config, calibration)
    with sequence_parallel(splits_tokens(config)):
      if tasks:
        training = train_tasks(config, config.train, model, tasks, stages, watcher, folder, decides)
      else:
        with _original_away(config, stages):
          training = train_text(config, config.train, model, tokenizer, stages, watcher, folder, decides, mesh, profile)
  last = None if many else Store(folder / FINISHED, _decides(config, calibration))
  if config.finish:
    rows += _compress(config, recipes.build(config.finish, "finish"), model, calibration, stages, watcher, last)
  if many:
    watcher.note("gathering the trees; the first process measures and writes")
    stages, mesh = _at_home(stages), None
    if not processes.first():
      processes.meet("result")
      return read_result(folder)
  records = Records(folder / METRICS)
  digest = checkpoint.tree_hash(stages[-1].params)
  written = records.found("tree")
  if written and written[-1]["tree_hash"] != digest:
    if written[-1].get("processes", 1) == processes.count():
      raise FormatError(f"{folder / METRICS}: it was written for another tree; remove {folder} and run again")
    watcher.note("as many processes as now sum in another order than those before: scores are taken anew")
    records.clear()
    shutil.rmtree(folder / MODEL, ignore_errors=True)
  if not records.found("tree"):
    records.add({"kind": "tree", "tree_hash": digest, "processes": processes.count()})
  if not (folder / MODEL / checkpoint.MANIFEST).is_file():
    watcher.note("saving the model")
    heads = read_tasks(config.model) | {
      t.name: {"classes": tasks[t.name].train.classes, "length": t.length, "kind": tasks[t.name].train.kind}
      for t in config.tasks if tasks[t.name].train.has_head
    }  # fmt: skip
    checkpoint.save(folder / MODEL, model, stages[-1].params, tokenizer, recipe=list(config.recipe), tasks=heads)

  ready = [stage.params for stage in stages] if config.stream else measuring.prepared(config, model, stages, mesh)
  scores = measuring.scores(Streamed(model) if config.stream else model, stages, ready, texts, records, watcher)
  judged = score_tasks(model, tokenizer, stages, ready, tasks, records, watcher)
  drawn = judge_samples(config, model, tokenizer, stages, ready, records, watcher)
  speeds, generation = {}, None
  if not config.stream:  # decoding needs all weights at once
    speeds = measuring.speeds(config, model, stages, ready, records, watcher)
    generation = measuring.continuations(config, model, ready, tokenizer, watcher)
  if profile and config.train is None and not config.stream:
    watcher.note("tracing a prompt and its continuation")
    with profiling.trace(folder / TENSORBOARD):
      latency(model, ready[-1], prefill=b.prefill, decode=b.decode, rounds=1)
  explanation = None
  if explained_on is not None:
    before, after = stages[0].params, stages[-1].params
    explanation = importance.explained(model, after, explained_on, tokenizer, before, watcher.note)
  spent = None
  if counter is not None:
    spent = counter.read() - joules
    counter.stop()
  result = {
    "format": 1,
    "name": config.name,
    "description": config.description,
    "config_hash": config.hash,
    "seed": config.seed,
    "model": config.model,
    "original": origin(config.model),
    "versions": versions(),
    "device": device(),
    "tree_hash": digest,
    "command": command,
    "config": config.model_dump(mode="json"),
    "stages": [
      measuring.stage_row(stage, stages[0], ready[i], scores[key(stages, i)], speeds.get(key(stages, i), {}))
      | {"tasks": judged.get(key(stages, i), {}) | drawn.get(key(stages, i), {})}
      for i, stage in enumerate(stages)
    ],
    "weights": rows,
    "training": training,
    "profile": profiling.busiest(folder / TENSORBOARD),
    "energy": counter and {
      "label": counter.label, "source": counter.source, "joules": spent, "seconds": time.perf_counter() - started
    } | (electricity.said(spent or 0.0) if electricity else {}),
    "histograms": {} if config.stream else measuring.histograms(stages[0].params, stages[-1].params),
    "generation": generation,
    "explain": explanation,
  }
  from lmcompress import report

  report.write_tensorboard(result, folder / TENSORBOARD)
  report.write_html(result, folder / "report.html")
  write_text(folder / RESULT, json.dumps(result, indent=1, allow_nan=True) + "\n")
  for kept in (store, last):
    if kept is not None:
      kept.clear()
  processes.meet("result")
  return through_gates(config, result)


def _fits_processes(config: Config, profile: bool) -> None:
  """Raises ConfigError where processes differ, or the config asks what only one process has."""
  processes.agree(
    config=dump(config), versions=json.dumps(versions(), sort_keys=True), profile="on" if profile else "off"
  )
  if config.mesh is None:
    raise ConfigError(
      f"{processes.count()} processes share a mesh, and {config.name} has none; add mesh.data=-1, or start one process"
    )
  sizes = config.mesh.sizes(jax.device_count())
  if math.prod(sizes.values()) != jax.device_count():
    raise ConfigError(
      f"the mesh has {math.prod(sizes.values())} devices, the {processes.count()} processes have {jax.device_count()}; "
      "each has to have its part: say -1 for one size, or start fewer"
    )
  asked = {"stream": config.stream, "--profile": profile, "mesh.pipe": config.mesh.pipe > 1}
  if refused := [word for word, value in asked.items() if value]:
    raise ConfigError(f"several processes do not run {', '.join(refused)} yet; start one process, or leave it out")


def _at_home(stages: list[Stage]) -> list[Stage]:
  """The stages with trees that lie in this process alone; weights that stages share are gathered once."""
  made: dict[tuple[str, int], Any] = {}
  for stage in stages:
    new = {path: leaf for path, leaf in tree.flatten(stage.params).items() if (path, id(leaf)) not in made}
    gathered = processes.whole(new)
    device_ = jax.local_devices()[0]
    made |= {(path, id(leaf)): jax.device_put(gathered[path], device_) for path, leaf in new.items()}
  return [
    Stage(
      stage.name,
      tree.unflatten({path: made[path, id(leaf)] for path, leaf in tree.flatten(stage.params).items()}),
      stage.seconds,
      stage.peak_memory_bytes,
    )
    for stage in stages
  ]


def _calibration(config: Config, model: Any, tokenizer: Any, tasks: Mapping[str, Judged]) -> Any:
  """Windows of the text, or of an encoder-decoder the training rows of the task that `text` names; None if not asked.

  Raises:
    ConfigError: too few tokens or rows.
  """
  c = config.calibration
  if c is None or not hasattr(model, "encode"):
    if c is None:
      return None
    return weigh_first(windows(tokenizer, load_text(c.text), c.windows, c.length), c.first_weight)
  if c.text not in tasks:
    named = ", ".join(tasks) or "none"
    raise ConfigError(f"calibration.text: {c.text!r}: an encoder-decoder is calibrated on one of its tasks: {named}")
  train = tasks[c.text].train
  if len(train.labels) < c.windows:
    raise ConfigError(f"calibration.windows: {c.windows} of {len(train.labels)} rows of task {c.text}; use fewer")
  chosen = np.linspace(0, len(train.labels) - 1, c.windows).astype(int)
  written = with_start(model, train.labels[chosen])
  return weigh_first({
    "tokens": train.tokens[chosen, : c.length], "attention_mask": train.mask[chosen, : c.length] != 0,
    "decoder_input_ids": np.asarray(written["tokens"])[:, : c.length],
    "decoder_attention_mask": np.asarray(written["attention_mask"])[:, : c.length],
  }, c.first_weight)  # fmt: skip


def _fits_encoder(config: Config, model: Any, params: Params, profile: bool) -> None:
  """Raises ConfigError where a run asks an encoder for what only predictions of next tokens give."""
  writes = hasattr(model, "encode")
  asked = {
    "evaluate.texts: []": config.evaluate.texts, "bench.rounds: 0": config.bench.rounds,
    "generate: null": config.generate is not None, "no --profile": profile and config.train is None,
    "samples: null": config.samples, "explain: null": config.explain,
  }  # fmt: skip
  wants = [word for word, value in asked.items() if value]
  if not config.tasks:
    wants.append("tasks, by which it is scored")
  headless = [] if writes else [t.name for t in config.tasks if t.name not in params.get("tasks", {})]
  if headless and config.train is None:
    wants.append(f"train, since the model has no head for {headless[0]}")
  if config.train is not None and config.train.held_out is not None:
    wants.append("train.held_out: null")
  if wants:
    what = "an encoder-decoder, which writes texts" if writes else "an encoder, which predicts no next token"
    raise ConfigError(
      f"{config.model} is {what}; its run needs {', '.join(wants)} "
      "(vectors of sentences are compared by experiments/sentences.py)"
    )


def _decides(config: Config, calibration: Any) -> dict[str, Any]:
  """What decides the bits of a compression: finished blocks are used again only where all of it is the same."""
  path = Path(hub.resolve_model(config.model))
  files = sorted(path.iterdir()) if path.is_dir() else [path]
  if config.train is not None and config.train.teacher is not None:
    teacher = Path(hub.resolve_model(config.train.teacher))
    files += sorted(teacher.iterdir()) if teacher.is_dir() else [teacher]
  return {
    "config": config.hash,
    "versions": versions(),
    "model": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
    "calibration": None if calibration is None else _digest(calibration),
  }


def _digest(calibration: Any) -> str:
  parts = [calibration[name] for name in sorted(calibration)] if isinstance(calibration, Mapping) else [calibration]
  return hashlib.sha256(b"".join(np.asarray(part).tobytes() for part in parts)).hexdigest()


def _mesh(config: Config) -> Any:
  if config.mesh is None:
    return None
  return make_mesh(**config.mesh.sizes(jax.device_count()))


def _tell_places(config: Config, model: Any, params: Params, mesh: Any, watcher: Watcher) -> None:
  """Says how the mesh holds the tree; refuses one that does not divide it."""
  if config.mesh is not None and config.mesh.pipe > 1:
    watcher.note(f"{config.mesh.pipe} stages train; all else takes their devices as more of fsdp")
    try:
      stages_of(model, params, config.mesh.pipe)
    except ValueError as error:
      raise ConfigError(f"mesh.pipe={config.mesh.pipe}: {error}") from None
  require_division(model, params, mesh.shape, rules_of(config))
  rows = placements(model, params, mesh.shape, rules_of(config))
  held, whole = (sum(getattr(row, name) for row in rows) for name in ("nbytes", "whole"))
  split = ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1) or "nothing split"
  watcher.note(
    f"each of {mesh.size} devices ({split}) holds "
    f"{held / 2**20:.1f} MiB of the model's {whole / 2**20:.1f}:"
  )
  if splits_tokens(config):
    parts = mesh.shape["tensor"]
    if config.train is None or parts == 1:
      why = "nothing trains" if config.train is None else "tensor=1 splits nothing"
      raise ConfigError(f"mesh.rules.length=tensor is of training over tensor, and here {why}; leave it out")
    odd = [n for n in [t.length for t in config.tasks] or [config.train.length] if n % parts]
    if odd:
      raise ConfigError(f"mesh.rules.length=tensor: tensor={parts} does not divide rows of {odd[0]} tokens")
    what = "in the encoder (the decoder stays whole), what" if hasattr(model, "encode") else "what"
    watcher.note(f"training: {what} lies between products is split by tokens over tensor")
  for row in rows:
    split = " ".join(f"{n}/{to}" if to else str(n) for n, to in zip(row.shape, row.split, strict=True))
    watcher.note(f"  {row.leaves:4d} x {row.path}  [{split}]  {row.nbytes / 2**20:.2f} MiB")


@contextlib.contextmanager
def _original_away(config: Config, stages: list[Stage]) -> Iterator[None]:
  """While a text trains a tree that a recipe made, the original need not be in memory: it is read again for the scores.

  It stays where it teaches, lies on a mesh, or is made anew from a file of sizes.
  """
  train, made = config.train, config.model.endswith((".yml", ".yaml"))
  assert train is not None
  teaches = train.teacher is None and (train.settings().needs_teacher or train.written is not None)
  if len(stages) == 1 or teaches or made or config.mesh is not None or processes.count() > 1:
    yield
    return
  others = {id(x) for stage in stages[1:] for x in jax.tree.leaves(stage.params)}  # arrays, within leaves too
  mine = tree.flatten(stages[0].params)
  shared = {path: leaf for path, leaf in mine.items() if all(id(x) in others for x in jax.tree.leaves(leaf))}
  del mine
  stages[0].params = {}
  release()
  yield
  again = load(config.model)[1]
  for path, leaf in shared.items():
    again = tree.put(again, path, leaf)
  stages[0].params = again


def _compress(
  config: Config,
  recipe: Transform,
  model: Any,
  calibration: Any,
  stages: list[Stage],
  watcher: Watcher,
  store: Store | None,
) -> list[dict[str, Any]]:
  """Appends a stage for each link; returns the report's rows."""
  first, params = len(stages), stages[-1].params

  def after(name: str, tree_: Params) -> None:
    stages.append(Stage(name, tree_, 0.0, peak_bytes()))
    reset_peak()

  if calibration is not None:
    rows, length = (calibration["tokens"] if isinstance(calibration, Mapping) else calibration).shape
    links = recipe.links or (recipe,)
    beside = [expected_bytes(params, rows, length, link.needs) for link in links if link.needs & set(STATISTICS)]
    if beside:
      most = max(beside, key=lambda parts: sum(parts.values()))
      watcher.note(
        f"calibration holds about {sum(most.values()) / 2**20:.0f} MiB of arrays beside the model, whatever its depth ("
        + ", ".join(f"{name} {nbytes / 2**20:.0f}" for name, nbytes in most.items())
        + "), and its compiled programs a few hundred more"
      )
  reset_peak()
  _, report = compress(
    model,
    params,
    recipe,
    calibration,
    jax.random.key(config.seed),
    progress=watcher.step,
    on_link=after,
    store=store,
  )
  for stage, link in zip(stages[first:], report.links, strict=True):
    stage.seconds = link["seconds"]
  return report.rows
