"""A model larger than memory: random folders of growing depth, compressed from their files; the peak of each run.

Every run is a process of its own whose peak (`ru_maxrss`) is recorded beside the bytes of the folder and of its largest
leaf. Reproduce the committed result (about 7 GB of disk, which the script frees again):

  python experiments/streaming.py

Quicker, with smaller models:

  python experiments/streaming.py --embed 512 --mlp 1536 --depths 4 16 --out /dev/stdout
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

RESULT = Path(__file__).parent / "results" / "streaming.json"
RECIPES = ("round_to_nearest", "gptq")
CEILING = 500 << 20
"""What a process may take beside six times the largest leaf in float32."""


def make(folder: Path, layers: int, embed: int, mlp: int, vocab: int, head: int = 128, kv: int = 8) -> None:
  """Writes a random Llama in bfloat16, a shard for each layer, one leaf in memory at a time."""
  from lmcompress.io import safetensors

  folder.mkdir(parents=True)
  rng, index = np.random.default_rng(0), {}

  def shard(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    arrays = {
      key: np.ones(shape, ml_dtypes.bfloat16) if len(shape) == 1
      else (rng.standard_normal(shape, np.float32) * shape[1] ** -0.5).astype(ml_dtypes.bfloat16)
      for key, shape in shapes.items()
    }  # fmt: skip
    safetensors.write(folder / name, arrays)
    index.update(dict.fromkeys(shapes, name))

  shard("ends.safetensors", {"model.embed_tokens.weight": (vocab, embed), "model.norm.weight": (embed,)})
  for i in range(layers):
    at = f"model.layers.{i}"
    shard(f"layer-{i}.safetensors", {
      f"{at}.input_layernorm.weight": (embed,), f"{at}.post_attention_layernorm.weight": (embed,),
      f"{at}.self_attn.q_proj.weight": (embed, embed), f"{at}.self_attn.k_proj.weight": (kv * head, embed),
      f"{at}.self_attn.v_proj.weight": (kv * head, embed), f"{at}.self_attn.o_proj.weight": (embed, embed),
      f"{at}.mlp.gate_proj.weight": (mlp, embed), f"{at}.mlp.up_proj.weight": (mlp, embed),
      f"{at}.mlp.down_proj.weight": (embed, mlp),
    })  # fmt: skip
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
  (folder / "config.json").write_text(json.dumps({
    "model_type": "llama", "hidden_size": embed, "num_attention_heads": embed // head, "head_dim": head,
    "num_hidden_layers": layers, "max_position_embeddings": 2048, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
  }))  # fmt: skip


def compress(folder: Path, out: Path, recipe: str, tokens: int) -> dict[str, Any]:
  """One compression to a saved checkpoint, in this process; its peak."""
  import jax

  import lmcompress as lmc
  from lmcompress.io.checkpoint import WEIGHTS
  from lmcompress.io.store import Store

  begun = time.perf_counter()
  model, params, _ = lmc.load(folder, lazy=True)
  method = {"round_to_nearest": lmc.round_to_nearest, "gptq": lmc.gptq}[recipe](4, 64)
  calibration = np.random.default_rng(1).integers(0, 1000, (max(1, tokens // 256), 256)).astype(np.int32)
  done, report = lmc.compress(
    model, params, method, calibration, jax.random.key(0), store=Store(out / "blocks", {}, mapped=True)
  )
  lmc.save(out / "small", model, done)
  return {
    "seconds": time.perf_counter() - begun, "saved_bytes": (out / "small" / WEIGHTS).stat().st_size,
    "weights": len(report.rows), "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
  }  # fmt: skip


def main() -> int:
  """Makes each model, compresses it in a process of its own, and writes the result."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--embed", type=int, default=3072, help="width of the hidden stream, a multiple of 128")
  parser.add_argument("--mlp", type=int, default=8192, help="neurons of a block")
  parser.add_argument("--vocab", type=int, default=32768, help="tokens")
  parser.add_argument("--depths", type=int, nargs="+", default=[7, 28], help="layers; 28 make 2.9 billion parameters")
  parser.add_argument("--gptq-depths", type=int, nargs="*", default=[], help="layers of the runs with gptq")
  parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens of gptq")
  parser.add_argument("--out", type=Path, default=RESULT, help="result")
  parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.worker:
    folder, out, recipe, tokens = arguments.worker
    print(json.dumps(compress(Path(folder), Path(out), recipe, int(tokens))))
    return 0
  from lmcompress.environment import device, versions

  rows = []
  for recipe, depths in zip(RECIPES, (arguments.depths, arguments.gptq_depths), strict=True):
    for layers in depths:
      with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        make(folder, layers, arguments.embed, arguments.mlp, arguments.vocab)
        print(f"{recipe}, {layers} layers", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--worker", str(folder), place, recipe, str(arguments.tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
          print(done.stderr, file=sys.stderr)
          return 1
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        shutil.rmtree(folder)
      largest = 4 * arguments.embed * max(arguments.mlp, arguments.vocab)
      rows.append({"recipe": recipe, "layers": layers, "folder_bytes": size, "largest_leaf_bytes": largest,
                   "allowed_bytes": 6 * largest + CEILING, **json.loads(done.stdout.strip().splitlines()[-1])})
      row = rows[-1]
      print(f"{recipe:<18}{layers:>4} layers {size / 2**30:>6.2f} GiB  peak {row['peak_bytes'] / 2**30:>5.2f} GiB of "
            f"{row['allowed_bytes'] / 2**30:.2f} allowed, {row['seconds']:.0f} s")
  result = {"format": 1, "embed": arguments.embed, "mlp": arguments.mlp, "vocab": arguments.vocab,
            "tokens": arguments.tokens, "versions": versions(), "device": device(), "rows": rows}
  arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  return 0


if __name__ == "__main__":
  sys.exit(main())
