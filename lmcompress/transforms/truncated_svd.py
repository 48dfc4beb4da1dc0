"""Low rank: a weight becomes the product of two thin factors, the best for the outputs on calibration tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.arrays import LowRankArray, MaskedArray, low_rank
from lmcompress.ops.second_order import drift_corrected
from lmcompress.transforms.combine import evidence_for, leafwise, require_dense
from lmcompress.transforms.round_to_nearest import quantize_matrix
from lmcompress.types import Evidence, Params, State, Transform, WeightError

Whitening = Literal["hessian", "activation", "none"]
NEEDS = {"hessian": frozenset({"hessian"}), "activation": frozenset({"mean_abs"}), "none": frozenset()}


def truncated_svd(
  ratio: float | None = None,
  rank: int | None = None,
  energy: float | None = None,
  whitening: Whitening = "hessian",
  scope: Literal["weight", "global"] = "weight",
  bits: int | None = None,
  group_size: int = 64,
  damping: float = 1e-3,
  error_propagation: float = 0.0,
) -> Transform:
  """Factors each weight by a singular value decomposition that is cut off.

  Give exactly one of `ratio`, `rank` and `energy`. A weight of m inputs and n outputs takes `(m + n) * rank` entries,
  so a ratio below 1 needs a rank below `m n / (m + n)`.

  Args:
    ratio: entries of the factors, as a fraction of the weight's.
    rank: of every weight; at most the smaller of its sides, which is exact.
    energy: fraction of the squared singular values that is kept, of the whitened weight.
    whitening: what an error is measured on. `hessian`: the outputs on calibration tokens, for which this is the best
      of its rank (Wang et al. 2024, SVD-LLM, arXiv:2403.12384). `activation`: inputs scaled by the square root of
      their mean magnitude (Yuan et al. 2023, ASVD, arXiv:2312.05821). `none`: the weight itself.
    scope: with `global`, the ratio is met by all selected weights together: singular directions are taken in the order
      of the share of the output's energy that they keep for an entry.
    bits, group_size: quantizes both factors, to nearest, in groups (of the whole rank where it is smaller).
    damping: added to the Hessian's diagonal, as a fraction of its mean.
    error_propagation: with `hessian`, as in `gptq`.

  Raises:
    ValueError: not exactly one of the three, or out of range.
    WeightError (when planned): a rank above full, a masked or quantized weight, NaN or infinity.
  """
  given = [n for n, v in (("ratio", ratio), ("rank", rank), ("energy", energy)) if v is not None]
  if len(given) != 1:
    raise ValueError(f"truncated_svd: give exactly one of ratio, rank and energy; found {given or 'none'}")
  least = {"ratio": ratio, "energy": energy, "rank": rank}[given[0]]
  if not least > 0 or (energy is not None and energy > 1):  # type: ignore[operator]
    raise ValueError(
      f"truncated_svd(ratio={ratio}, rank={rank}, energy={energy}): a ratio above 0, a rank from 1, an energy to 1"
    )
  if whitening not in NEEDS or scope not in ("weight", "global") or (scope == "global" and ratio is None):
    raise ValueError(
      f"truncated_svd(whitening={whitening!r}, scope={scope!r}): whitening is {', '.join(NEEDS)}; scope is weight, or "
      "global with a ratio"
    )
  if (bits is not None and not 2 <= bits <= 8) or group_size < 1 or not 0 < damping < 1:
    raise ValueError(f"truncated_svd(bits={bits}, group_size={group_size}, damping={damping}): bits 2 to 8")
  if (error_propagation and whitening != "hessian") or not 0 <= error_propagation <= 1:
    raise ValueError(f"truncated_svd(error_propagation={error_propagation}): 0 to 1, with whitening='hessian'")
  needs = NEEDS[whitening] | (frozenset({"reference_hessian"}) if error_propagation else frozenset())

  def check(path: str, leaf: Any) -> None:
    require_dense("truncated_svd", path, leaf)
    if isinstance(leaf, MaskedArray):
      raise WeightError(f"truncated_svd at {path}: factors cannot keep what a mask removed at 0; factor first")
    if rank is not None and rank > min(leaf.shape[-2:]):
      raise WeightError(f"truncated_svd(rank={rank}) at {path}: full rank is {min(leaf.shape[-2:])}")
    if whitening != "none" and path.endswith("table"):
      raise WeightError(f"truncated_svd at {path}: a table has no calibration; use whitening='none'")

  def rank_of(leaf: Any, singular: np.ndarray) -> int:
    m, n = leaf.shape[-2:]
    if rank is not None:
      return rank
    if ratio is not None:
      return int(np.clip(int(m * n * ratio / (m + n)), 1, min(m, n)))
    total = np.cumsum(np.square(singular))
    return int(np.searchsorted(total, (energy or 1.0) * total[-1] * (1 - 1e-12)) + 1)

  def factored(path: str, leaf: Any, evidence: Evidence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    given = {need: evidence_for(need, path, evidence, "truncated_svd") for need in sorted(needs)}
    w = leaf
    if error_propagation:
      w = drift_corrected(
        leaf, given["hessian"], given["reference_hessian"], damping=damping, share=error_propagation
      )
    return factor(w, given.get("hessian"), given.get("mean_abs"), damping)

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    chosen = tree.default_selection(params) if evidence.selected is None else evidence.selected

    def visit(path: str, leaf: Any) -> Any:
      left, singular, right = factored(path, leaf, evidence)
      kept = state[path] if isinstance(state, Mapping) else rank_of(leaf, singular)
      return cut(left, singular, right, kept, leaf.dtype, tree.contraction_axis(path), bits, group_size)

    return tree.map_weights(visit, params, chosen), state

  def measure(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    chosen = tree.default_selection(params) if evidence.selected is None else evidence.selected
    found = dict(state)
    for path, leaf in tree.weights(params).items():
      if path in chosen:
        found[path] = (leaf.shape[-2:], np.square(factored(path, leaf, evidence)[1]))
    return params, found

  def plan(state: Mapping[str, tuple[tuple[int, int], np.ndarray]]) -> Transform:
    ranks = allocate_ranks(state, ratio or 1.0)
    return Transform(lambda params, selected=None: ranks, apply, needs, name="truncated_svd")

  init = leafwise(lambda w: w, check=check).init
  if scope == "global":

    def start(params: Params, selected: frozenset[str] | None = None) -> State:
      init(params, selected)
      return {}

    scope_ = "weight" if needs else "model"  # a link that needs nothing is given one weight at a time
    return Transform(start, measure, needs, scope=scope_, name="truncated_svd", plan=plan)
  return Transform(init, apply, needs, name="truncated_svd")


def factor(
  w: jax.Array, hessian: jax.Array | None, mean_abs: jax.Array | None, damping: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """`w == left @ diag(singular) @ right`, so that cutting the last ones off costs their squares in `||X (W - W')||**2`.

  With `H = L L^T`, the singular value decomposition is of `L^T W`, and `left = L^-T U`. In float64.

  Args:
    w: `[in, out]`; hessian: `[in, in]`; mean_abs: `[in]`, whose square root scales inputs instead.
  """
  dense = np.asarray(w, np.float64)
  if hessian is not None:
    h = np.asarray(hessian, np.float64)
    h = h + np.eye(len(h)) * (damping * max(float(np.trace(h)) / len(h), 1e-30))
    root = np.linalg.cholesky(h)
    u, singular, right = np.linalg.svd(root.T @ dense, full_matrices=False)
    return np.linalg.solve(root.T, u), singular, right
  if mean_abs is not None:
    scale = np.sqrt(np.maximum(np.asarray(mean_abs, np.float64), 1e-12))
    scale = np.maximum(scale, 1e-4 * scale.max())
    u, singular, right = np.linalg.svd(scale[:, None] * dense, full_matrices=False)
    return u / scale[:, None], singular, right
  return np.linalg.svd(dense, full_matrices=False)


def cut(
  left: np.ndarray,
  singular: np.ndarray,
  right: np.ndarray,
  rank: int,
  dtype: Any,
  axis: int,
  bits: int | None = None,
  group_size: int = 64,
) -> LowRankArray:
  """The first `rank` directions, each factor with the square root of the singular values; perhaps quantized."""
  root = np.sqrt(singular[:rank])
  parts: list[Any] = [jnp.asarray(left[:, :rank] * root, dtype), jnp.asarray(root[:, None] * right[:rank], dtype)]
  if bits is not None:
    parts = [
      quantize_matrix(part, bits=bits, group_size=min(group_size, part.shape[axis]), axis=axis, clip="mse")
      for part in parts
    ]
  return low_rank(parts[0], parts[1], axis)


def allocate_ranks(weights: Mapping[str, tuple[tuple[int, int], np.ndarray]], ratio: float) -> dict[str, int]:
  """Ranks under a budget: directions in the order of their share of the energy for an entry, one each at least.

  Shares fall along each weight's own directions, so the greedy order is the best for their sum.

  Args:
    weights: shape `(m, n)` and squared singular values, by path.
    ratio: of the entries of all weights.
  """
  budget = ratio * sum(m * n for (m, n), _ in weights.values())
  ranks = dict.fromkeys(weights, 1)
  used = sum(m + n for (m, n), _ in weights.values())
  order = sorted(
    ((float(e / max(squares.sum(), 1e-300)) / sum(shape), path)
     for path, (shape, squares) in weights.items() for e in squares[1:]),
    reverse=True,
  )  # fmt: skip
  for _, path in order:
    cost = sum(weights[path][0])
    if used + cost <= budget:
      ranks[path], used = ranks[path] + 1, used + cost
  return ranks
