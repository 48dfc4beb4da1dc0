"""What llm-compressor makes of one matrix: the file that `tests/transforms/test_peers.py` compares ours with.

Run by the Python of `quantization-requirements.txt`:

  PEER/bin/python experiments/peers/one_matrix.py tests/transforms/llmcompressor.npz
"""

# pyright: reportMissingImports=false, reportArgumentType=false

from __future__ import annotations

import sys
import types

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.transform.awq.base import AWQModifier
from llmcompressor.modifiers.transform.smoothquant.base import SmoothQuantModifier

INPUTS, OUTPUTS, TOKENS, GROUP = 96, 24, 512, 32


def main() -> None:
  """Writes inputs, weights, and what GPTQ and rounding give, all `[out, in]` as the peer has them."""
  rng = np.random.default_rng(0)
  mixing = rng.normal(size=(INPUTS, INPUTS)) / np.sqrt(INPUTS) + np.diag(np.exp(rng.normal(size=INPUTS)))
  x = (rng.normal(size=(TOKENS, INPUTS)) @ mixing).astype(np.float32)
  w = rng.normal(0, 0.5, (OUTPUTS, INPUTS)).astype(np.float32)
  hessian = torch.from_numpy(2 / TOKENS * x.T @ x)
  found: dict[str, np.ndarray] = {"hessian": hessian.numpy(), "w": w}
  for name, symmetric in (("symmetric", True), ("asymmetric", False)):
    arguments = QuantizationArgs(
      num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=GROUP, actorder="static"
    )
    weight = torch.from_numpy(w.copy())
    groups = weight.reshape(OUTPUTS, -1, GROUP)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    rounded = fake_quantize(weight, scale, zero, arguments)
    solved, _, fallback = quantize_weight(
      weight[None].clone(), hessian[None].clone(), scale[None], zero[None], None, arguments
    )
    assert not bool(fallback.any())
    found |= {
      f"{name}_scale": scale.numpy(), f"{name}_zero": zero.numpy().astype(np.int32),
      f"{name}_rounded": rounded.numpy(), f"{name}_gptq": solved[0].numpy(),
    }  # fmt: skip
  linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
  linear.weight.data = torch.from_numpy(w.copy())
  linear.quantization_scheme = types.SimpleNamespace(weights=arguments)
  smooth = types.SimpleNamespace(algorithm="smoothquant", smoothing_strength=0.6)
  peak = torch.from_numpy(np.abs(x).max(0))
  found["absmax"] = peak.numpy()
  found["smooth"] = SmoothQuantModifier._calculate_smoothing_scales(smooth, [linear], peak).detach().numpy()
  found["awq_weight_mean"] = AWQModifier._compute_layer_means([linear]).detach().numpy()
  np.savez_compressed(sys.argv[1], **found)


if __name__ == "__main__":
  main()
