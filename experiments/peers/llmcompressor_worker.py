"""One run of llm-compressor: a GGUF model, calibration tokens, a method; perplexity, seconds and peak memory as JSON.

  python llmcompressor_worker.py MODEL.gguf calibration.npy evaluation.npy gptq4 result.json
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # the peer's AWQ pins memory, which needs an accelerator


@contextlib.contextmanager
def loaded(path: Path):
  """The model dequantized to float32, free of what the GGUF says of its quantization."""
  from transformers import AutoConfig, AutoModelForCausalLM

  given = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
  config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
  if hasattr(config, "quantization_config"):
    del config.quantization_config
  model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
  model.load_state_dict(given.state_dict())
  with tempfile.TemporaryDirectory() as folder:  # the peer looks again at where a model came from
    model.save_pretrained(folder)
    yield AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def perplexity(model, tokens: np.ndarray) -> float:
  """Each row on its own, without a token for the beginning."""
  total = 0.0
  for row in tokens:
    ids = torch.from_numpy(row[None].astype(np.int64))
    logits = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
    total -= logits.gather(1, ids[0, 1:, None]).sum().item()
  return math.exp(total / (tokens.shape[0] * (tokens.shape[1] - 1)))


def recipe(method: str):
  """A modifier as the peer recommends it: every linear of the blocks, GPTQ and AWQ in groups of 64."""
  ignored = ["re:.*lm_head"]
  if method.startswith(("wanda", "sparsegpt")):
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    modifier = WandaPruningModifier if method.startswith("wanda") else SparseGPTModifier
    share = method.removeprefix("wanda").removeprefix("sparsegpt")
    pattern = {"sparsity": 0.5, "mask_structure": "2:4"} if share == "-2of4" else {"sparsity": int(share) / 100}
    return modifier(targets=["Linear"], ignore=ignored, **pattern)
  from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
  from llmcompressor.modifiers.quantization import GPTQModifier

  method, bits = method[:-1], int(method[-1])
  symmetric = method == "gptq" and bits == 4
  weights = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=64)
  groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
  if method == "gptq":
    return GPTQModifier(config_groups=groups, ignore=ignored, actorder="static")
  from llmcompressor.modifiers.awq import AWQModifier

  return AWQModifier(config_groups=groups, ignore=ignored)


def main() -> None:
  """Compresses, scores and writes what it found."""
  gguf, calibration, evaluation, method, out = sys.argv[1:]
  torch.set_num_threads(1)
  tokens, held_out = np.load(calibration), np.load(evaluation)
  with loaded(Path(gguf)) as model:
    found = run(model, tokens, held_out, method)
  Path(out).write_text(json.dumps(found, indent=1) + "\n", "utf-8")
  print(json.dumps(found))


def run(model, tokens: np.ndarray, held_out: np.ndarray, method: str) -> dict:
  """The figures of one method."""
  from datasets import Dataset
  from llmcompressor import oneshot
  from tokenizers import Tokenizer, models
  from transformers import PreTrainedTokenizerFast

  before = perplexity(model, held_out)
  unused = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>")  # rows are tokens
  rows = {"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()}
  begun = time.perf_counter()
  oneshot(
    model=model,
    processor=unused,
    dataset=Dataset.from_dict(rows),
    recipe=recipe(method),
    max_seq_length=tokens.shape[1],
    num_calibration_samples=len(tokens),
  )
  seconds, peak = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  after = perplexity(model, held_out)
  linears = [w for name, w in model.named_parameters() if w.ndim == 2 and "layers." in name]
  zeros = sum(int((w == 0).sum()) for w in linears) / sum(w.numel() for w in linears)
  return {
    "method": method, "float32": before, "perplexity": after, "ratio": after / before, "zeros": zeros,
    "seconds": seconds, "peak_bytes": peak,
  }  # fmt: skip


if __name__ == "__main__":
  main()
