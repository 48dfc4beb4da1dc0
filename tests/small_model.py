"""A tokenizer of bytes and a small Llama's tree, for the tests that save, load and run."""

from __future__ import annotations

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from lmcompress.data.tokenizer import Tokenizer


def byte_level():
  """A tokenizer whose tokens are the 256 bytes and one that ends a text."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  backend = tokenizers.Tokenizer(BPE({c: i for i, c in enumerate(["<|endoftext|>", *alphabet])}, []))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(["<|endoftext|>"])
  return Tokenizer(backend, tokens={"eos_token": "<|endoftext|>"})


def random_params(vocab=264, embed=64, mlp=128, kv=32):
  """A Llama's tree with two layers, drawn without a compiler."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jax.device_put(rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32))

  def linear(inputs, outputs):
    return {"kernel": draw(inputs, outputs)}

  ones = jax.device_put(np.ones(embed, np.float32))
  layers = {
    str(i): {
      "attn_norm": {"scale": ones}, "mlp_norm": {"scale": ones},
      "attn": {"q": linear(embed, embed), "k": linear(embed, kv), "v": linear(embed, kv),
               "o": linear(embed, embed)},
      "mlp": {"gate": linear(embed, mlp), "up": linear(embed, mlp), "down": linear(mlp, embed)},
    } for i in range(2)
  }
  return {"embed": {"table": 4 * draw(vocab, embed)}, "layers": layers, "final_norm": {"scale": ones}}
