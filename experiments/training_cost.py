"""What a training step costs: codes that learn and distillation beside the plain step, and the memory of logits.

Steps of all kinds take turns within one process, so that a busy machine hits all alike. A distilled step is held
against the plain step and the teacher's forward pass together. Memory is what XLA says of the compiled step.

  python experiments/training_cost.py --model smollm2-135m
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from lmcompress.errors import LmcompressError

RESULT = Path(__file__).parent / "results" / "training_cost.json"


def study(name: str, batch: int, length: int, rounds: int) -> dict[str, Any]:
  """Times and sizes of each kind of step."""
  import jax
  import numpy as np

  from lmcompress import compress, fake_quantize, load, tree
  from lmcompress.environment import device, versions
  from lmcompress.evaluate.profiling import needs
  from lmcompress.training import Distill, Training, compiled_step, start, train_step

  model, params, _ = load(name)
  vocabulary = params.get("head", params["embed"])["table"].shape[-2]
  rows = np.random.default_rng(0).integers(0, vocabulary, (1, batch, length)).astype(np.int32)
  plain, trains = Training(steps=1000, batch=batch), functools.partial(tree.matches, "layers/*")
  codes = compress(model, params, fake_quantize(2, 64))[0]
  teacher = (model, params)
  kinds = {
    "plain": (params, plain, None), "codes": (codes, plain, None),
    "distilled": (params, dataclasses.replace(plain, loss=Distill()), teacher),
  }  # fmt: skip
  forward = jax.jit(lambda p, t: jax.numpy.sum(model.apply(p, t)[:, -1]))
  states = {kind: start(tree_, training, trains) for kind, (tree_, training, _) in kinds.items()}
  seconds: dict[str, list[float]] = {kind: [] for kind in (*kinds, "teacher")}
  for n in range(rounds + 1 if rounds else 0):
    for kind, (_, training, guide) in kinds.items():
      state, begun = states[kind], time.perf_counter()
      moving = state._replace(kept=None)
      given = guide or (None, None)
      new, found = train_step(
        model, moving, state.kept, {"tokens": rows}, training, None, *given, key=jax.random.key(n)
      )  # fmt: skip
      jax.block_until_ready(found["loss"])
      if n:
        seconds[kind].append(time.perf_counter() - begun)
      states[kind] = new._replace(kept=state.kept)
      print(f"round {n} {kind}: {time.perf_counter() - begun:.2f} s", file=sys.stderr, flush=True)
    begun = time.perf_counter()
    jax.block_until_ready(forward(params, rows[0]))
    if n:
      seconds["teacher"].append(time.perf_counter() - begun)
  memory = {}
  for what, chunk in (("runs of 64", 64), ("all at once", length)):
    for kind, (tree_, training, guide) in kinds.items():
      if kind != "codes":
        step = compiled_step(model, tree_, dataclasses.replace(training, chunk=chunk), length, trains, None, guide)
        memory[f"{kind}, {what}"] = needs(step)
        memory[f"{kind}, the loss alone, {what}"] = needs(loss_alone(model, params, training, batch, length, chunk))
  found = {"memory": {f"{batch} x {length}": memory}}
  if not rounds:
    return found
  middle = {kind: statistics.median(times) for kind, times in seconds.items()}
  return {
    "format": 1, "model": name, "batch": batch, "length": length, "vocabulary": vocabulary, "rounds": rounds,
    "seconds": middle, "codes_ratio": middle["codes"] / middle["plain"],
    "distilled_ratio": middle["distilled"] / (middle["plain"] + middle["teacher"]), **found,
    "versions": versions(), "device": device(),
  }  # fmt: skip


def loss_alone(model: Any, params: Any, training: Any, batch: int, length: int, chunk: int) -> Any:
  """The compiled loss of the states after the last block, and its gradient; a teacher's states stand beside them."""
  import jax
  import jax.numpy as jnp

  from lmcompress.calibration.token_loss import head_loss, predictions

  tokens = jnp.zeros((batch, length), jnp.int32)
  start = jax.eval_shape(lambda p: model.start(p, {"tokens": tokens}), params)

  def lost(carry: Any, ends: Any, theirs: Any) -> Any:
    guide = predictions(model, ends, theirs) if training.loss.needs_teacher else None
    return head_loss(model, ends, carry, {"tokens": tokens}, training.loss, guide, chunk)[0]

  def of_states(h: Any, carry: Any, ends: Any, theirs: Any) -> Any:
    return jax.value_and_grad(lambda h: lost({**carry, "h": h}, ends, theirs))(h)

  return jax.jit(of_states).lower(start["h"], start, params, start).compile()


def main() -> int:
  """Runs the study, writes its result and prints it."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="smollm2-135m", help="a known name or a path")
  parser.add_argument("--batch", type=int, default=4, help="rows of a step")
  parser.add_argument("--length", type=int, default=256, help="tokens of a row")
  parser.add_argument("--rounds", type=int, default=5, help="rounds that count; 0 for memory alone")
  parser.add_argument("--out", type=Path, default=RESULT, help="result")
  arguments = parser.parse_args()
  try:
    result = study(arguments.model, arguments.batch, arguments.length, arguments.rounds)
  except LmcompressError as error:
    print(f"training_cost: {error}", file=sys.stderr)
    return 2
  old = json.loads(arguments.out.read_text("utf-8")) if arguments.out.is_file() else {}
  known = {size: found for size, found in old.get("memory", {}).items() if " x " in size}
  result = {**old, **result, "memory": known | result["memory"]}
  arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  times = ", ".join(f"{kind} {seconds:.2f} s" for kind, seconds in result["seconds"].items())
  print(f"{times}; codes {result['codes_ratio']:.3f} of plain, distilled {result['distilled_ratio']:.3f} of both")
  for kind, found in result["memory"][f"{arguments.batch} x {arguments.length}"].items():
    sizes = [found[key] / 2**20 for key in ("temporaries", "peak_bytes")]
    print(f"{kind:<44}{sizes[0]:>8.0f} MiB of temporaries, {sizes[1]:.0f} at once")
  return 0


if __name__ == "__main__":
  sys.exit(main())
