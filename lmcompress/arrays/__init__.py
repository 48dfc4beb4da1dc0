"""How a weight is stored: one representation per file."""

from lmcompress.arrays.grids import E2M1, FP8_E4M3, FP8_E5M2, NF4, Float8, Grid, Integer, Table
from lmcompress.arrays.masked import MaskedArray, masked
from lmcompress.arrays.packing import Packed, pack
from lmcompress.arrays.quantized import QuantizedArray, integer

__all__ = [
  "E2M1",
  "FP8_E4M3",
  "FP8_E5M2",
  "NF4",
  "Float8",
  "Grid",
  "Integer",
  "MaskedArray",
  "Packed",
  "QuantizedArray",
  "Table",
  "integer",
  "masked",
  "pack",
]
