"""How a weight is stored: one representation per file."""

from lmcompress.arrays.bitmap import BitmapArray, bitmap
from lmcompress.arrays.clustered import ClusteredArray, clustered
from lmcompress.arrays.dictionary import DictionaryArray, dictionary
from lmcompress.arrays.direction import DirectionArray, direction
from lmcompress.arrays.fake_quant import FakeQuantArray, fake_quant
from lmcompress.arrays.gated import GatedArray, gated
from lmcompress.arrays.grids import E2M1, FP8_E4M3, FP8_E5M2, NF4, Float8, Grid, Integer, Table
from lmcompress.arrays.input import (
  ACTS,
  Act,
  FixedStep,
  Float8PerToken,
  InputArray,
  Int8PerGroup,
  Int8PerToken,
  Int8Static,
  StaticStep,
  Threshold,
  Uint8PerTensor,
  with_act,
)
from lmcompress.arrays.lattice import LatticeArray, lattice
from lmcompress.arrays.learned_input import LearnedInputArray, learned_input
from lmcompress.arrays.low_rank import LowRankArray, low_rank
from lmcompress.arrays.masked import MaskedArray, masked
from lmcompress.arrays.nested import NestedArray, nested
from lmcompress.arrays.nm_sparse import NMSparseArray, nm_mask, nm_sparse
from lmcompress.arrays.outliers import OutlierArray, outliers
from lmcompress.arrays.packing import Packed, pack
from lmcompress.arrays.quantized import QuantizedArray, integer
from lmcompress.arrays.scored import ScoredArray, scored
from lmcompress.arrays.shared import SharedRef, refer, resolve
from lmcompress.arrays.split import SplitArray, split
from lmcompress.arrays.stored import StoredArray, fetch
from lmcompress.arrays.sum import SumArray, added

__all__ = [
  "ACTS",
  "E2M1",
  "FP8_E4M3",
  "FP8_E5M2",
  "NF4",
  "Act",
  "BitmapArray",
  "ClusteredArray",
  "DictionaryArray",
  "DirectionArray",
  "FakeQuantArray",
  "FixedStep",
  "Float8",
  "Float8PerToken",
  "GatedArray",
  "Grid",
  "InputArray",
  "Int8PerGroup",
  "Int8PerToken",
  "Int8Static",
  "Integer",
  "LatticeArray",
  "LearnedInputArray",
  "LowRankArray",
  "MaskedArray",
  "NMSparseArray",
  "NestedArray",
  "OutlierArray",
  "Packed",
  "QuantizedArray",
  "ScoredArray",
  "SharedRef",
  "SplitArray",
  "StaticStep",
  "StoredArray",
  "SumArray",
  "Table",
  "Threshold",
  "Uint8PerTensor",
  "added",
  "bitmap",
  "clustered",
  "dictionary",
  "direction",
  "fake_quant",
  "fetch",
  "gated",
  "integer",
  "lattice",
  "learned_input",
  "low_rank",
  "masked",
  "nested",
  "nm_mask",
  "nm_sparse",
  "outliers",
  "pack",
  "refer",
  "resolve",
  "scored",
  "split",
  "with_act",
]
