"""A Llama decoder as an ONNX graph of onnxruntime's own operators, its matrices those of a GGUF file, code for code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf  # type: ignore
import numpy as np
import onnx  # type: ignore
from onnx import TensorProto, helper, numpy_helper  # type: ignore

GROUP = 32
_MICROSOFT = "com.microsoft"
_INT8_ACTIVATIONS = 4
"""`accuracy_level` of MatMulNBits: activations are quantized to int8 in groups, as llama.cpp does."""


def decoder(path: Path, slots: int) -> tuple[bytes, dict[str, int]]:
  """The serialized graph of a `Q4_0`, `Q8_0` or `F32` file, and its sizes.

  Inputs are `tokens: [batch, length]`, `last: [batch]` and `total: []` (the sequences' lengths after this call, less
  one and as they are), and a cache `key.i`, `value.i: [batch, kv heads, slots, head]` for each layer, which outputs of
  the same name with `.new` may share. The output `next: [batch]` is the likeliest token.
  """
  reader = gguf.GGUFReader(path)
  tensors = {tensor.name: tensor for tensor in reader.tensors}

  def number(key: str) -> Any:
    return reader.fields[f"llama.{key}"].contents()

  layers, embed, heads, kv = (
    number(key) for key in ("block_count", "embedding_length", "attention.head_count", "attention.head_count_kv")
  )
  head, epsilon = embed // heads, number("attention.layer_norm_rms_epsilon")
  graph = _Graph(tensors)
  angles = np.outer(np.arange(slots), number("rope.freq_base") ** (-np.arange(0, head, 2) / head))
  cos, sin = (graph.constant(name, f(angles).astype(np.float32)) for name, f in (("cos", np.cos), ("sin", np.sin)))
  hidden = graph.embedding("token_embd.weight", "tokens")
  for i in range(layers):
    block = f"blk.{i}"
    x = graph.norm(f"{block}.attn_norm.weight", hidden, epsilon)
    q, k, v = (graph.linear(f"{block}.attn_{name}.weight", x) for name in "qkv")
    # GGUF keeps the rows of q and k so that a rotation's pair lies side by side: interleaved.
    mixed, *_ = graph.add(
      "GroupQueryAttention",
      [q, k, v, f"key.{i}", f"value.{i}", "last", "total", cos, sin],
      [f"{block}.mixed", f"key.{i}.new", f"value.{i}.new"],
      num_heads=heads,
      kv_num_heads=kv,
      do_rotary=1,
      rotary_interleaved=1,
    )
    hidden = graph.sum(hidden, graph.linear(f"{block}.attn_output.weight", mixed))
    x = graph.norm(f"{block}.ffn_norm.weight", hidden, epsilon)
    gate, up = (graph.linear(f"{block}.ffn_{name}.weight", x) for name in ("gate", "up"))
    (silu,) = graph.add("QuickGelu", [gate], [f"{block}.silu"], alpha=1.0)
    (product,) = graph.add("Mul", [silu, up], [f"{block}.product"], domain="")
    hidden = graph.sum(hidden, graph.linear(f"{block}.ffn_down.weight", product))
  (final,) = graph.add("Gather", [hidden, graph.constant("end", np.int64(-1))], ["final"], domain="", axis=1)
  logits = graph.linear("token_embd.weight", graph.norm("output_norm.weight", final, epsilon))
  graph.add("ArgMax", [logits], ["next"], domain="", axis=-1, keepdims=0)

  caches = [f"{part}.{i}" for i in range(layers) for part in ("key", "value")]
  shape, info = ["batch", kv, slots, head], helper.make_tensor_value_info
  inputs = [
    info("tokens", TensorProto.INT64, ["batch", "length"]),
    info("last", TensorProto.INT32, ["batch"]),
    info("total", TensorProto.INT32, []),
    *(info(name, TensorProto.FLOAT, shape) for name in caches),
  ]
  outputs = [info("next", TensorProto.INT64, ["batch"])]
  outputs += [info(f"{name}.new", TensorProto.FLOAT, shape) for name in caches]
  opsets = [helper.make_opsetid("", 17), helper.make_opsetid(_MICROSOFT, 1)]
  whole = helper.make_graph(graph.nodes, "decoder", inputs, outputs, graph.constants)
  sizes = {"layers": layers, "kv": kv, "head": head, "slots": slots, "weight_bytes": graph.weight_bytes}
  return helper.make_model(whole, opset_imports=opsets, ir_version=10).SerializeToString(), sizes


class _Graph:
  """Nodes and constants under construction."""

  def __init__(self, tensors: dict[str, Any]):
    self.tensors = tensors
    self.nodes: list[onnx.NodeProto] = []
    self.constants: list[onnx.TensorProto] = []
    self.weight_bytes = 0

  def constant(self, name: str, value: Any) -> str:
    self.constants.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
    return name

  def add(
    self, kind: str, inputs: list[str], outputs: list[str], domain: str = _MICROSOFT, **attributes: Any
  ) -> list[str]:
    self.nodes.append(helper.make_node(kind, inputs, outputs, name=outputs[0], domain=domain, **attributes))
    return outputs

  def sum(self, left: str, right: str) -> str:
    return self.add("Add", [left, right], [f"{right}.sum"], domain="")[0]

  def norm(self, name: str, x: str, epsilon: float) -> str:
    scale = self.constant(name, self.tensors[name].data)
    return self.add("SimplifiedLayerNormalization", [x, scale], [f"{name}.out"], "", axis=-1, epsilon=epsilon)[0]

  def linear(self, name: str, x: str) -> str:
    """`x @ w.T` for `w: [out, in]`."""
    tensor = self.tensors[name]
    if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
      # The embedding is there already, [vocab, in], and the head is its transpose.
      self.weight_bytes += tensor.data.nbytes
      weight = self.constant(f"{name}.t", tensor.data.T)
      return self.add("MatMul", [x, weight], [f"{name}.out"], domain="")[0]
    bits, codes, scale = _codes(tensor)
    rows, columns = codes.shape[0], codes.shape[1] * 8 // bits
    inputs = [x, self.constant(f"{name}.codes", codes.reshape(rows, columns // GROUP, -1))]
    inputs.append(self.constant(f"{name}.scale", scale))
    self.weight_bytes += codes.nbytes + scale.nbytes
    sizes = {"K": columns, "N": rows, "bits": bits, "block_size": GROUP}
    return self.add("MatMulNBits", inputs, [f"{name}.out"], _MICROSOFT, accuracy_level=_INT8_ACTIVATIONS, **sizes)[0]

  def embedding(self, name: str, tokens: str) -> str:
    tensor = self.tensors[name]
    if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
      return self.add("Gather", [self.constant(name, tensor.data), tokens], ["embedded"], domain="", axis=0)[0]
    bits, codes, scale = _codes(tensor)
    inputs = [self.constant(f"{name}.rows", codes), tokens, self.constant(f"{name}.rows.scale", scale)]
    axes = {"gather_axis": 0, "quantize_axis": 1}
    return self.add("GatherBlockQuantized", inputs, ["embedded"], _MICROSOFT, bits=bits, block_size=GROUP, **axes)[0]


def _codes(tensor: Any) -> tuple[int, np.ndarray, np.ndarray]:
  """Bits, unsigned codes `[out, in * bits / 8]` (pairs of 4 bits, the first one low) and scales `[out, in / 32]`.

  Both libraries mean `(code - 2**(bits - 1)) * scale`; only the order within a group differs.
  """
  blocks = tensor.data.reshape(tensor.data.shape[0], -1, gguf.GGML_QUANT_SIZES[tensor.tensor_type][1])
  scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
  body = blocks[..., 2:]
  if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
    return 8, (body ^ 0x80).reshape(body.shape[0], -1), scale
  if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0:
    values = np.concatenate([body & 15, body >> 4], axis=-1)  # the first half of a group lies in the low nibbles
    return 4, (values[..., ::2] | values[..., 1::2] << 4).reshape(body.shape[0], -1), scale
  raise ValueError(f"{tensor.name}: no operator of onnxruntime for {tensor.tensor_type.name}")
