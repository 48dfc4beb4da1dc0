"""What a run may lose, and whether it did."""

from __future__ import annotations

from typing import Any

from lmcompress.config import Config
from lmcompress.errors import GateError


def through_gates(config: Config, result: dict[str, Any]) -> dict[str, Any]:
  """The result, if it lost no more than the config allows; all of it is written already.

  Raises:
    GateError: what was lost, what is allowed, and the three weights with the largest errors.
  """
  if config.gates is None:
    return result
  first, last = result["stages"][0], result["stages"][-1]
  broken = []
  for text, perplexity in last["perplexity"].items():
    ratio, kl = perplexity / first["perplexity"][text], last["kl"][text]
    for name, found, most in (
      ("max_perplexity_ratio", ratio, config.gates.max_perplexity_ratio), ("max_kl", kl, config.gates.max_kl)
    ):  # fmt: skip
      if most is not None and not found <= most:  # NaN breaks a gate
        broken.append(f"{name} is {found:.4g} on {text}, {most:g} is allowed")
  if not broken:
    return result
  latest = {row["path"]: row for row in result["weights"]}
  error = lambda row: row["weight_error"] if row.get("output_error") is None else row["output_error"]  # noqa: E731
  errors = {path: error(row) for path, row in latest.items()}
  worst = ", ".join(f"{path} ({errors[path]:.3f})" for path in sorted(errors, key=lambda path: -errors[path])[:3])
  raise GateError(
    f"{config.name}: {'; '.join(broken)}; the largest errors are at {worst or 'no weight'}. Give those more bits, or "
    "allow more"
  )
