"""Reference products of codebooks and sparse weights: a tile of outputs is spread out, multiplied and forgotten."""

from __future__ import annotations

from lmcompress.arrays.bitmap import BitmapArray
from lmcompress.arrays.clustered import ClusteredArray
from lmcompress.arrays.lattice import LatticeArray
from lmcompress.arrays.nested import NestedArray
from lmcompress.arrays.nm_sparse import NMSparseArray
from lmcompress.ops.linear import Rules, gathered_embed, or_pallas, register, tiled_attend, tiled_linear

for _kind in (ClusteredArray, BitmapArray, LatticeArray, NestedArray):
  register(_kind, Rules(tiled_linear, gathered_embed, tiled_attend))
register(NMSparseArray, Rules(or_pallas(tiled_linear, "linear"), gathered_embed, or_pallas(tiled_attend, "attend")))
