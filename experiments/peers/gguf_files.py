"""The source GGUF again with every matrix in one type: the same weights for each llama.cpp contender."""

from __future__ import annotations

import os
from pathlib import Path

# The packages of the peers' environment, which the library's own need not have.
import gguf  # type: ignore
import numpy as np


def of_type(source: Path, kind: str, folder: Path) -> Path:
  """The file whose matrices, the embedding (also the head) included, are `kind`; vectors stay float32.

  Args:
    kind: a name of `gguf.GGMLQuantizationType` that `gguf.quants` can write, such as `Q4_0`, `Q8_0`, `BF16` or `F32`.
  """
  target = folder / f"{source.stem.rsplit('.', 1)[0]}.{kind}.gguf"
  if target.is_file() and target.stat().st_mtime >= source.stat().st_mtime:
    return target
  folder.mkdir(parents=True, exist_ok=True)
  partial = target.with_suffix(".partial")
  reader = gguf.GGUFReader(source)
  writer = gguf.GGUFWriter(partial, str(reader.fields["general.architecture"].contents()))
  for name, field in reader.fields.items():
    if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
      continue
    of = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
    writer.add_key_value(name, field.contents(), field.types[0], of)
  writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
  wanted = gguf.GGMLQuantizationType[kind]
  for tensor in reader.tensors:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    of_tensor = wanted if values.ndim > 1 else gguf.GGMLQuantizationType.F32
    writer.add_tensor(tensor.name, gguf.quants.quantize(values, of_tensor), raw_dtype=of_tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  os.replace(partial, target)
  return target
