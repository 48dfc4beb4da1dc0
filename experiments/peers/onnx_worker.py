"""onnxruntime on the CPU: MatMulNBits and GroupQueryAttention, the KV cache float32 and written in place.

Options: `kind`, the type of every matrix (`Q4_0`, `Q8_0`, `F32`).
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import onnxruntime  # type: ignore
from onnx_graph import decoder
from protocol import Engine, Setting, rounds, serve


class Decoder(Engine):
  """One session; the cache of each number of sequences is made when first asked for."""

  def __init__(self, setting: Setting):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = setting.threads, 1
    # Threads spin while a round runs and sleep after it, so that an idle worker takes no CPU.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    path = gguf_files.of_type(Path(setting.source), setting.options["kind"], Path(setting.folder))
    graph, self.sizes = decoder(path, setting.prefill + setting.decode)
    self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    self.caches: dict[int, dict[str, Any]] = {}
    self.about = {
      "versions": {"onnxruntime": version("onnxruntime")},
      "weight_bytes": self.sizes["weight_bytes"],
      "cache_bytes": 2 * self.sizes["layers"] * self.sizes["kv"] * self.sizes["head"] * 4,
    }

  def start(self, batch: int) -> None:
    if batch not in self.caches:
      shape = (batch, self.sizes["kv"], self.sizes["slots"], self.sizes["head"])
      names = [f"{part}.{i}" for i in range(self.sizes["layers"]) for part in ("key", "value")]
      self.caches[batch] = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for name in names
      }
    self.cache, self.length = self.caches[batch], 0

  def read(self, tokens: np.ndarray) -> np.ndarray:
    batch, length = tokens.shape
    self.length += length
    binding = self.session.io_binding()
    binding.bind_cpu_input("tokens", tokens.astype(np.int64))
    binding.bind_cpu_input("last", np.full(batch, self.length - 1, np.int32))
    binding.bind_cpu_input("total", np.array(self.length, np.int32))
    for name, value in self.cache.items():
      binding.bind_ortvalue_input(name, value)
      binding.bind_ortvalue_output(f"{name}.new", value)
    binding.bind_output("next")
    self.session.run_with_iobinding(binding)
    return binding.get_outputs()[-1].numpy().astype(np.int32)

  def rewind(self, length: int) -> None:
    self.length = length


def build(setting: Setting) -> tuple[dict[str, Any], dict[str, Any]]:
  engine = Decoder(setting)
  return engine.about, rounds(engine, setting)


if __name__ == "__main__":
  serve(build)
