"""llama.cpp through llama-cpp-python's low-level calls: batches to `llama_decode`, logits of the last token only.

Options: `kind`, the type of every matrix (`Q4_0`, `Q8_0`, `BF16`). The KV cache is float16, flash attention is on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf_files
import llama_cpp as c  # type: ignore
import numpy as np
from protocol import Engine, Setting, rounds, serve

_CACHE_BYTES = 2  # float16
_SLOTS = 256
"""Contexts are multiples of this."""


class Llama(Engine):
  """One model; a context for each number of sequences, made when first asked for."""

  def __init__(self, setting: Setting):
    self.setting = setting
    c.llama_backend_init()
    path = gguf_files.of_type(Path(setting.source), setting.options["kind"], Path(setting.folder))
    model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
    if not model:
      raise RuntimeError(f"llama.cpp cannot load {path.name}")
    self.model = model
    self.vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    self.contexts: dict[int, Any] = {}
    heads, width = c.llama_model_n_head_kv(model), c.llama_model_n_embd(model) // c.llama_model_n_head(model)
    self.about = {
      "versions": {"llama-cpp-python": version("llama-cpp-python")},
      "weight_bytes": c.llama_model_size(model),
      "cache_bytes": 2 * c.llama_model_n_layer(model) * heads * width * _CACHE_BYTES,
      "notes": c.llama_print_system_info().decode().strip(),
    }

  def start(self, batch: int) -> None:
    if batch not in self.contexts:
      self.contexts[batch] = self._context(batch)
    self.context, self.batch, self.length = self.contexts[batch], batch, 0
    c.llama_memory_clear(c.llama_get_memory(self.context), False)

  def read(self, tokens: np.ndarray) -> np.ndarray:
    batch, length = tokens.shape
    if batch == 1:
      ids = np.ascontiguousarray(tokens[0], np.int32)
      pointer = ids.ctypes.data_as(ctypes.POINTER(c.llama_token))
      following = self._decode(c.llama_batch_get_one(pointer, length), [length - 1])
    elif length == 1:
      following = self._sequences(tokens, range(batch))
    else:  # sequence by sequence, as llama.cpp would split a batch of more than 512
      following = [self._sequences(tokens[i : i + 1], [i])[0] for i in range(batch)]
    self.length += length
    return np.asarray(following, np.int32)

  def rewind(self, length: int) -> None:
    c.llama_memory_seq_rm(c.llama_get_memory(self.context), -1, length, -1)
    self.length = length

  def _sequences(self, tokens: np.ndarray, sequences: Sequence[int]) -> list[int]:
    """Appends `tokens: [len(sequences), length]` to these sequences."""
    rows, length = tokens.shape
    batch = c.llama_batch_init(rows * length, 0, 1)
    batch.n_tokens = rows * length
    for n, (i, j) in enumerate(np.ndindex(rows, length)):
      batch.token[n], batch.pos[n] = int(tokens[i, j]), self.length + j
      batch.n_seq_id[n], batch.seq_id[n][0], batch.logits[n] = 1, sequences[i], j == length - 1
    try:
      return self._decode(batch, range(length - 1, rows * length, length))
    finally:
      c.llama_batch_free(batch)

  def _decode(self, batch: Any, last: Sequence[int]) -> list[int]:
    if status := c.llama_decode(self.context, batch):
      raise RuntimeError(f"llama_decode returned {status}")
    return [int(np.argmax(np.ctypeslib.as_array(c.llama_get_logits_ith(self.context, n), (self.vocab,)))) for n in last]

  def _context(self, batch: int) -> Any:
    params = c.llama_context_default_params()
    slots = _SLOTS * -(-(self.setting.prefill + self.setting.decode) // _SLOTS)
    params.n_ctx, params.n_seq_max, params.kv_unified = batch * slots, batch, False
    params.n_batch = params.n_ubatch = max(512, batch)
    params.n_threads = params.n_threads_batch = self.setting.threads
    params.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.type_k = params.type_v = c.GGML_TYPE_F16
    params.no_perf = True
    context = c.llama_init_from_model(self.model, params)
    if not context:
      raise RuntimeError(f"llama.cpp makes no context for {batch} sequences")
    return context


@c.llama_log_callback
def _quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
  """Warnings and errors only; the driver shows the last line of stderr when a worker dies."""
  if level >= 3:
    print(text.decode("utf-8", "replace"), end="", flush=True)


def build(setting: Setting) -> tuple[dict[str, Any], dict[str, Any]]:
  c.llama_log_set(_quiet, None)
  engine = Llama(setting)
  return engine.about, rounds(engine, setting)


if __name__ == "__main__":
  serve(build)
