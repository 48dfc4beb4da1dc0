"""lmcompress beside its peers on the CPU: the same weights, threads and tokens, measured in turn.

Each contender is a process in its own environment (`peers/*_worker.py`) that loads once and then waits. A round asks
one of them after the other, in an order that turns by one each time, so that what a shared machine does to one it does
to all; the first round only warms up. A measurement waits for a quiet machine, and is repeated if others came between.

Reproduce the committed result (`make bench-peers` makes the environment of the peers first):

  python experiments/peers.py --config configs/smollm2/peers.yaml

Look at two of them, quickly:

  python experiments/peers.py --config configs/smollm2/peers.yaml \\
    --contenders 'lmcompress int4*' 'llama.cpp Q4_0' --rounds 3 --out results/two.json
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import json
import os
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peers_report import SPEEDS, plot, show, spread

from lmcompress.config import Config, load_config, variants_of
from lmcompress.errors import ConfigError, LmcompressError

HERE = Path(__file__).resolve().parent
PATIENCE_S = 1200
"""Loading, compiling or a round may take this long."""
REPEATS = 3
"""Measurements of one round, at most, until others leave the machine alone."""
LOOK_S, WAIT_S = 0.2, 20
"""How long the machine is looked at before a measurement, and how long at most its quiet is waited for."""


@dataclasses.dataclass(frozen=True)
class Contender:
  """One bar of the plot.

  Attributes:
    library: whose it is.
    form: the weights, in the library's own words.
    bits: of a weight, so that like meets like.
    activations: what the products take in.
    cache: how keys and values are kept.
    worker: its script in `peers/`.
    options: what the worker is told beyond the setting.
    rounds: what it is asked for.
  """

  library: str
  form: str
  bits: int
  activations: str
  cache: str
  worker: str
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  rounds: tuple[str, ...] = SPEEDS

  @property
  def name(self) -> str:
    ours = f" ({self.activations}, KV {self.cache})" if self.library == "lmcompress" else ""
    return f"{self.library} {self.form}{ours}"


def _torch(library: str, form: str, bits: int, activations: str, cache: str, key: str) -> Contender:
  return Contender(library, form, bits, activations, cache, "torch_worker.py", {"form": key})


PEERS = (
  *(
    Contender("llama.cpp", kind, bits, activations, "float16", "llama_worker.py", {"kind": kind})
    for kind, bits, activations in (("Q4_0", 4, "int8 g32"), ("Q8_0", 8, "int8 g32"), ("BF16", 16, "bfloat16"))
  ),
  *(
    Contender("onnxruntime", form, bits, activations, "float32", "onnx_worker.py", {"kind": kind})
    for form, kind, bits, activations in (
      ("int4 g32", "Q4_0", 4, "int8 g32"),
      ("int8 g32", "Q8_0", 8, "int8 g32"),
      ("float32", "F32", 32, "float32"),
    )
  ),
  _torch("torch", "float32", 32, "float32", "float32", "float32"),
  _torch("torch", "bfloat16", 16, "bfloat16", "bfloat16", "bfloat16"),
  _torch("torch", "dynamic int8", 8, "int8 tensor", "float32", "dynamic-int8"),
  _torch("torchao", "int8 row", 8, "int8 token", "float32", "torchao-int8"),
  _torch("torchao", "int8 row compiled", 8, "int8 token", "float32", "torchao-int8-compiled"),
  _torch("torchao", "int4 g32", 4, "bfloat16", "bfloat16", "torchao-int4"),
)
OURS = (  # variant of the config ("" is the dense tree), bits, activations, cache
  ("", 32, "float32", "float32"),
  ("", 16, "bfloat16", "bfloat16"),
  ("int8-row", 8, "int8", "bfloat16"),
  ("int8-row", 8, "int8_token", "bfloat16"),
  ("int8-g32", 8, "int8", "bfloat16"),
  ("int4-g32", 4, "bfloat16", "bfloat16"),
  ("int4-g32", 4, "int8", "bfloat16"),
  ("int4-g32", 4, "int8", "int8"),
)
BANDWIDTH = Contender("memory", "bandwidth", 0, "", "", "bandwidth_worker.py", rounds=("bandwidth",))


def contenders(config: Config, patterns: Sequence[str]) -> list[Contender]:
  """Those whose name matches one of the patterns; ours take their recipes from the config's variants."""
  recipes = {variant.name: list(variant.recipe) for variant in variants_of(config)}
  found = list(PEERS)
  for variant, bits, activations, cache in OURS:
    if variant and variant not in recipes:
      raise ConfigError(f"{config.name}: no variant named {variant!r}; there are {', '.join(recipes)}")
    options = {"recipe": recipes.get(variant, []), "activations": activations, "cache": cache}
    form = variant or activations
    found.append(Contender("lmcompress", form, bits, activations, cache, "lmcompress_worker.py", options))
  chosen = [c for c in found if any(fnmatch.fnmatchcase(c.name, pattern) for pattern in patterns)]
  if not chosen:
    raise ConfigError(f"--contenders {' '.join(patterns)}: none; there are {'; '.join(c.name for c in found)}")
  return chosen


# ---------------------------------------------------------------------------------------- workers


class Failure(Exception):
  """A worker did not answer as it should; the message is one line."""


class Worker:
  """A contender's process, and the one line at a time that is said to it."""

  def __init__(self, contender: Contender, python: str, setting: Mapping[str, Any], environment: Mapping[str, str]):
    self.contender, self.about = contender, {}
    self.rounds: dict[str, list[dict[str, Any]]] = {what: [] for what in contender.rounds}
    self.complaints = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (close)
    command = [python, str(HERE / "peers" / contender.worker), json.dumps({**setting, "options": contender.options})]
    try:
      self.process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=self.complaints,
        text=True,
        env={**os.environ, **environment},
      )
    except OSError as error:
      raise Failure(f"{python} does not start ({error.strerror}); `make bench-peers` makes the environment") from None

  def ask(self, what: str, **more: Any) -> dict[str, Any]:
    """One round.

    Raises:
      Failure: the worker died, said an error, or took too long.
    """
    stdin = self.process.stdin
    assert stdin is not None
    with contextlib.suppress(BrokenPipeError):
      stdin.write(json.dumps({"what": what, **more}) + "\n")
      stdin.flush()
    return self.listen()

  def listen(self) -> dict[str, Any]:
    assert self.process.stdout is not None
    with selectors.DefaultSelector() as selector:
      selector.register(self.process.stdout, selectors.EVENT_READ)
      if not selector.select(PATIENCE_S):
        raise Failure(f"no answer in {PATIENCE_S} s")
    line = self.process.stdout.readline()
    if not line:
      self.complaints.seek(0)
      lines = [line.strip() for line in self.complaints.read().splitlines() if line.strip()]
      raise Failure(f"exit status {self.process.wait()}: {lines[-1][:300] if lines else 'nothing on stderr'}")
    message = json.loads(line)
    if "error" in message:
      raise Failure(message["error"])
    return message

  def close(self) -> None:
    self.process.kill()
    self.process.wait()
    self.complaints.close()


@contextlib.contextmanager
def started(
  chosen: Sequence[Contender], pythons: Mapping[bool, str], setting: Mapping[str, Any], left_out: dict[str, str]
) -> Iterator[list[Worker]]:
  """Workers that have loaded, started one by one; what does not start is left out with its reason."""
  threads = str(setting["threads"])
  environment = {
    name: threads for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
  } | {"LMCOMPRESS_THREADS": threads, "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
  workers: list[Worker] = []
  try:
    for contender in chosen:
      say(f"loading {contender.name}")
      python = pythons[contender.library in ("lmcompress", "memory")]
      try:
        worker = Worker(contender, python, setting, environment)
        workers.append(worker)
        worker.about = worker.listen()["about"]
      except Failure as failure:
        leave_out(workers, contender, failure, left_out)
    yield workers
  finally:
    for worker in workers:
      worker.close()


def leave_out(workers: list[Worker], contender: Contender, failure: Failure, left_out: dict[str, str]) -> None:
  """A contender that failed has no numbers, and its reason is part of the result."""
  left_out[contender.name] = str(failure)
  say(f"{contender.name} is left out: {failure}")
  for worker in [w for w in workers if w.contender == contender]:
    worker.close()
    workers.remove(worker)


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------- measuring


class Machine:
  """What the processors that we use do, read from /proc; elsewhere nothing is known and all seems quiet."""

  def __init__(self, threads: int):
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(threads))
    if len(available) < threads:
      raise ConfigError(f"--threads {threads}: this process may use {len(available)} processors")
    self.processors = available[:threads]
    if hasattr(os, "sched_setaffinity"):
      os.sched_setaffinity(0, self.processors)  # workers inherit it: no library can start more threads than run

  def busy_s(self) -> float:
    """Seconds that the processors were busy, with whatever."""
    try:
      lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
      return 0.0
    rows = {fields[0]: [int(field) for field in fields[1:9]] for line in lines if (fields := line.split())}
    ticks = sum(sum(row) - row[3] - row[4] for row in (rows[f"cpu{n}"] for n in self.processors))  # not idle, iowait
    return ticks / os.sysconf("SC_CLK_TCK")

  def settle(self, quiet: float) -> None:
    """Waits until the processors are at most `quiet` busy; all of our own processes wait then."""
    for _ in range(int(WAIT_S / LOOK_S)):
      begun, busy = time.perf_counter(), self.busy_s()
      time.sleep(LOOK_S)
      if self.busy_s() - busy <= quiet * (time.perf_counter() - begun) * len(self.processors):
        return

  def used_s(self, pid: int) -> float:
    """Seconds that a process used."""
    try:
      fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
      return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measured(worker: Worker, what: str, machine: Machine, quiet: float) -> dict[str, Any]:
  """The answer to a round, and `others`: the share of the processors that other processes took meanwhile.

  It is measured again, a few times, until that share is at most `quiet`; the quietest one counts.
  """
  tries = []
  for _ in range(REPEATS):
    machine.settle(quiet)
    begun, busy, used = time.perf_counter(), machine.busy_s(), machine.used_s(worker.process.pid)
    found = worker.ask(what)
    wall = time.perf_counter() - begun
    others = machine.busy_s() - busy - (machine.used_s(worker.process.pid) - used)
    tries.append({**found, "others": max(0.0, others / wall / len(machine.processors))})
    if tries[-1]["others"] <= quiet:
      break
  return min(tries, key=lambda found: found["others"])


def run(workers: list[Worker], rounds: int, machine: Machine, quiet: float, left_out: dict[str, str]) -> None:
  """The first round warms up; then each worker's answers are kept, round by round."""
  for n in range(rounds + 1):
    turn = n % len(workers) if workers else 0
    for worker in workers[turn:] + workers[:turn]:
      say(f"round {n} of {rounds}: {worker.contender.name}" + ("" if n else " (warming up)"))
      try:
        for what in worker.contender.rounds:
          found = measured(worker, what, machine, quiet) if n else worker.ask(what)
          if n:
            worker.rounds[what].append(found)
      except Failure as failure:
        leave_out(workers, worker.contender, failure, left_out)


def study(arguments: argparse.Namespace) -> dict[str, Any]:
  """Measures everything; returns the study's result."""
  from lmcompress import load
  from lmcompress.data.fetch import cache_folder
  from lmcompress.environment import device, versions
  from lmcompress.io.hub import resolve_model
  from lmcompress.io.load import origin

  config = load_config(arguments.config)
  chosen = [BANDWIDTH, *contenders(config, arguments.contenders)]
  rounds = arguments.rounds or config.bench.rounds
  if rounds < 1:
    raise ConfigError("bench.rounds: 0 measures nothing; at least 1")
  source = resolve_model(config.model)
  if source.suffix != ".gguf":
    raise ConfigError(f"model {config.model}: the peers read a GGUF file; found {source.name}")
  machine = Machine(arguments.threads)
  _, params, tokenizer = load(config.model)
  setting = {
    "source": str(source),
    "folder": str(cache_folder() / "peers"),
    "threads": arguments.threads,
    "prefill": config.bench.prefill,
    "decode": config.bench.decode,
    "vocab": params["embed"]["table"].shape[0],
  }
  del params
  prompt = config.generate.prompt if config.generate else "The"
  left_out: dict[str, str] = {}
  with started(chosen, {True: sys.executable, False: arguments.peers}, setting, left_out) as workers:
    run(workers, rounds, machine, arguments.quiet, left_out)
    continuations = {}
    for worker in workers[:]:
      try:
        if worker.contender != BANDWIDTH:
          tokens = worker.ask("greedy", prompt=tokenizer.encode(prompt))["tokens"]
          continuations[worker.contender.name] = tokenizer.decode(tokens)
        worker.about.update(worker.ask("memory"))
      except Failure as failure:
        leave_out(workers, worker.contender, failure, left_out)
  memory = next((w.rounds["bandwidth"] for w in workers if w.contender == BANDWIDTH), None)
  depth = config.bench.prefill + config.bench.decode / 2
  rows = [_row(w, memory, depth, continuations) for w in workers if w.contender != BANDWIDTH]
  others = [found["others"] for w in workers for answers in w.rounds.values() for found in answers]
  return {
    "format": 1,
    "name": config.name,
    "config_hash": config.hash,
    "model": config.model,
    "original": origin(config.model),
    "versions": versions() | {name: v for row in rows for name, v in row.pop("versions").items()},
    "device": {**device(), "processor": _processor()},
    "threads": arguments.threads,
    "prefill": config.bench.prefill,
    "decode": config.bench.decode,
    "rounds": rounds,
    "prompt": prompt,
    "bandwidth_gb_per_s": spread([found["rate"] for found in memory]) if memory else None,
    "others": spread(others) if others else None,
    "contenders": rows,
    "left_out": left_out,
  }


def _row(
  worker: Worker, memory: list[dict[str, Any]] | None, depth: float, continuations: Mapping[str, str]
) -> dict[str, Any]:
  c, about = worker.contender, worker.about
  per_token = about["weight_bytes"] + about["cache_bytes"] * depth
  fraction = None
  if memory is not None:
    pairs = zip(worker.rounds["decode"], memory, strict=True)
    fraction = statistics.median(a["rate"] * per_token / (m["rate"] * 1e9) for a, m in pairs)
  return {
    "name": c.name,
    "library": c.library,
    "form": c.form,
    "bits": c.bits,
    "activations": c.activations,
    "cache": c.cache,
    **about,
    "bytes_per_token": per_token,
    "fraction_of_bandwidth": fraction,
    "continuation": continuations[c.name],
    "tokens_per_s": {what: spread([found["rate"] for found in answers]) for what, answers in worker.rounds.items()},
    "rounds": worker.rounds,
  }


def _processor() -> str:
  with contextlib.suppress(OSError):
    for line in Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.split(":", 1)[1].strip()
  return "unknown"


def main() -> int:
  """Runs the study and writes its result and plot; 1 if a contender was left out."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", type=Path, required=True, help="sizes, rounds, and the recipes of our forms")
  parser.add_argument("--contenders", nargs="+", default=["*"], help="patterns of names, such as 'llama.cpp *'")
  parser.add_argument("--rounds", type=int, default=0, help="rounds that count, instead of the config's bench.rounds")
  parser.add_argument("--threads", type=int, default=2, help="threads, and processors, of each contender (2)")
  parser.add_argument("--quiet", type=float, default=0.1, help="share of the processors that others may take (0.1)")
  parser.add_argument("--peers", default=".venv-peers/bin/python", help="the Python of peers-requirements.txt")
  parser.add_argument("--out", type=Path, default=HERE / "results" / "peers.json", help="result; the plot lies beside")
  arguments = parser.parse_args()
  try:
    result = study(arguments)
    if not result["contenders"]:
      raise LmcompressError("no contender could be measured")
  except LmcompressError as error:
    say(f"peers: {error}")
    return 2
  except KeyboardInterrupt:
    say("peers: interrupted, nothing written")
    return 130
  arguments.out.parent.mkdir(parents=True, exist_ok=True)
  arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  plot(result, arguments.out.with_suffix(".svg"))
  show(result)
  print(arguments.out)
  return 1 if result["left_out"] else 0


if __name__ == "__main__":
  sys.exit(main())
