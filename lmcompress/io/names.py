"""Where each parameter lies in foreign checkpoints: a table per architecture."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.arrays import StoredArray
from lmcompress.types import FormatError, Params


@dataclasses.dataclass(frozen=True)
class Name:
  """One parameter: its path here, in Hugging Face folders and in GGUF; `{i}` stands for the layer."""

  path: str
  hf: str
  gguf: str
  optional: bool = False


LLAMA = (
  Name("embed/table", "model.embed_tokens.weight", "token_embd.weight"),
  Name("layers/{i}/attn_norm/scale", "model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight"),
  *(
    name
    for ours, theirs, short in (
      ("q", "q_proj", "attn_q"),
      ("k", "k_proj", "attn_k"),
      ("v", "v_proj", "attn_v"),
      ("o", "o_proj", "attn_output"),
    )
    for name in (
      Name(
        f"layers/{{i}}/attn/{ours}/kernel", f"model.layers.{{i}}.self_attn.{theirs}.weight", f"blk.{{i}}.{short}.weight"
      ),
      Name(
        f"layers/{{i}}/attn/{ours}/bias", f"model.layers.{{i}}.self_attn.{theirs}.bias", f"blk.{{i}}.{short}.bias", True
      ),
    )
  ),
  Name("layers/{i}/mlp_norm/scale", "model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight"),
  *(
    name
    for ours in ("gate", "up", "down")
    for name in (
      Name(
        f"layers/{{i}}/mlp/{ours}/kernel", f"model.layers.{{i}}.mlp.{ours}_proj.weight", f"blk.{{i}}.ffn_{ours}.weight"
      ),
      Name(
        f"layers/{{i}}/mlp/{ours}/bias", f"model.layers.{{i}}.mlp.{ours}_proj.bias", f"blk.{{i}}.ffn_{ours}.bias", True
      ),
    )
  ),
  Name("final_norm/scale", "model.norm.weight", "output_norm.weight"),
  Name("head/table", "lm_head.weight", "output.weight", True),
)

IGNORED = (r".*\.rotary_emb\.inv_freq",)
"""Tensors that hold nothing the config does not say."""


def plan(names: Iterable[Name], field: str, found: Iterable[str], layers: int, where: str) -> dict[str, str]:
  """`{path here: name there}` for the tensors `found` in a checkpoint.

  Raises:
    FormatError: a tensor that the architecture needs is missing, or one is left over.
  """
  available, mapping = set(found), {}
  for name in names:
    for i in range(layers) if "{i}" in name.path else (0,):
      theirs = getattr(name, field).format(i=i)
      if theirs in available:
        mapping[name.path.format(i=i)] = theirs
      elif not name.optional:
        raise FormatError(
          f"{where}: the tensor {theirs!r} is missing ({len(available)} tensors, {layers} layers expected)"
        )
  left = [t for t in sorted(available - set(mapping.values())) if not any(re.fullmatch(p, t) for p in IGNORED)]
  if left:
    raise FormatError(f"{where}: tensor {left[0]!r} ({len(left)} in all) has no place in this architecture")
  return mapping


def lazily(path: str, read: Callable[[], np.ndarray], shape: tuple[int, ...]) -> StoredArray:
  """`orient` of what `read` gives, each time that it is used; the foreign tensor has `shape`."""
  shape = shape[::-1] if path.endswith("kernel") else shape
  size = math.prod(shape)
  return StoredArray(lambda: orient(path, read()), shape, jnp.dtype("float32"), 32 * size, "float32", True)


def orient(path: str, array: np.ndarray) -> jax.Array:
  """Foreign linears are `[out, in]`, kernels here `[in, out]`; the rest keeps its order. Gives float32."""
  x = jax.device_put(np.ascontiguousarray(array, dtype=np.float32))
  return _transpose(x) if path.endswith("kernel") else x


@jax.jit
def _transpose(x: jax.Array) -> jax.Array:
  return jnp.transpose(x)


def check_shapes(params: Params, head_dim: int, where: str) -> None:
  """Refuses a tree whose linears do not fit one another.

  Raises:
    FormatError: names the first parameter that does not fit.
  """

  def rank(path: str) -> int:
    return 2 if path.endswith(("kernel", "table")) else 1

  for path, leaf in tree.flatten(params).items():
    if len(leaf.shape) != rank(path):
      raise FormatError(f"{where}: {path} has shape {list(leaf.shape)}, {rank(path)} axes expected")
  vocab, features = params["embed"]["table"].shape

  def expect(path: str, extent: int, wanted: int, what: str) -> None:
    if extent != wanted:
      raise FormatError(f"{where}: {path} has {extent} {what}, {wanted} expected")

  for path, leaf in tree.flatten(params).items():
    shape, name = leaf.shape, path.split("/")[-2]
    if path.endswith("scale"):
      expect(path, shape[-1], features, "entries")
    elif path.startswith("tasks/") and path.endswith("kernel"):
      expect(path, shape[-2], features, "inputs")
    elif path.endswith("kernel") and name in ("q", "k", "v", "gate", "up"):
      expect(path, shape[-2], features, "inputs")
      if name in "qkv" and shape[-1] % head_dim:
        raise FormatError(f"{where}: {path} has {shape[-1]} outputs, no multiple of the head size {head_dim}")
    elif path.endswith("kernel"):
      source = path.replace("/o/", "/q/").replace("/down/", "/up/")
      expect(path, shape[-1], features, "outputs")
      expect(path, shape[-2], tree.get(params, source).shape[-1], "inputs")
    elif path.endswith("bias"):
      expect(path, shape[-1], tree.get(params, path.replace("/bias", "/kernel")).shape[-1], "entries")
    elif path == "head/table":
      expect(path, shape[-1], features, "features")
      expect(path, shape[0], vocab, "rows")
  for i, layer in params["layers"].items():
    q, k, v, gate, up = (
      layer[a][b]["kernel"].shape[-1]
      for a, b in (("attn", "q"), ("attn", "k"), ("attn", "v"), ("mlp", "gate"), ("mlp", "up"))
    )
    expect(f"layers/{i}/attn/v/kernel", v, k, "outputs")
    expect(f"layers/{i}/mlp/gate/kernel", gate, up, "outputs")
    if q % k:
      raise FormatError(
        f"{where}: layers/{i}/attn has {q // head_dim} query heads, no multiple of {k // head_dim} key heads"
      )
