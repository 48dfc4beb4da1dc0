"""What each of several processes holds while a model is read onto a mesh: its part and a tensor, or the whole model.

  python experiments/loading.py --model smollm2-135m
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lmcompress.errors import LmcompressError

RESULT = Path(__file__).parent / "results" / "loading.json"


def memory(key: str) -> int:
  """Bytes of `VmRSS` or `VmHWM` of this process that no file backs."""
  fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
  return int(fields[key].split()[0]) * 1024


def child(folder: Path, address: str, process: int, processes: int) -> None:
  """Loads in one process, and tells."""
  import threading
  import time

  from lmcompress.distributed import processes as many

  many.start(address, process, processes)
  import jax

  from lmcompress import load
  from lmcompress.distributed import make_mesh

  mesh = make_mesh(fsdp=processes)
  jax.block_until_ready(jax.numpy.zeros(8) + 1)
  many.meet("ready")
  before, most, ended = memory("RssAnon"), [0], threading.Event()

  def watch() -> None:
    while not ended.is_set():
      most[0] = max(most[0], memory("RssAnon"))
      time.sleep(0.002)

  watcher = threading.Thread(target=watch)
  watcher.start()
  params = load(folder, mesh)[1]
  jax.block_until_ready(params)
  ended.set()
  watcher.join()
  leaves = jax.tree.leaves(params)
  share = sum(shard.data.nbytes for x in leaves for shard in x.addressable_shards)
  print(json.dumps({
    "process": process, "share": share, "largest": max(x.nbytes for x in leaves),
    "whole": sum(x.nbytes for x in leaves),
    "peak": most[0] - before, "after": memory("RssAnon") - before,
  }), flush=True)  # fmt: skip
  many.meet("done")


def study(source: str, processes: int) -> dict[str, Any]:
  """Writes the model as a Hugging Face folder, then reads it by so many processes."""
  from lmcompress import load
  from lmcompress.environment import device, versions
  from lmcompress.io.huggingface import save_folder

  with tempfile.TemporaryDirectory() as scratch, socket.socket() as free:
    folder = Path(scratch) / "model"
    save_folder(*load(source)[:2], folder)
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
    free.close()
    commands = [[sys.executable, __file__, "--child", str(folder), address, str(n), str(processes)]
                for n in range(processes)]  # fmt: skip
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    rows = [json.loads(one.communicate()[0].splitlines()[-1]) for one in running]
  return {"format": 1, "model": source, "processes": rows, "versions": versions(), "device": device()}


def main() -> int:
  """Runs the study, writes its result and prints it."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="smollm2-135m", help="a known name or a path")
  parser.add_argument("--processes", type=int, default=4, help="that read it")
  parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
  parser.add_argument("--out", type=Path, default=RESULT, help="result")
  arguments = parser.parse_args()
  if arguments.child:
    folder, address, process, processes = arguments.child
    child(Path(folder), address, int(process), int(processes))
    return 0
  try:
    result = study(arguments.model, arguments.processes)
  except LmcompressError as error:
    print(f"loading: {error}", file=sys.stderr)
    return 2
  arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  for row in result["processes"]:
    sizes = {key: row[key] / 2**20 for key in ("whole", "share", "largest", "peak", "after")}
    print(", ".join(f"{key} {size:.0f} MiB" for key, size in sizes.items()))
  return 0


if __name__ == "__main__":
  sys.exit(main())
