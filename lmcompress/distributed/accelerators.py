"""Accelerators as their makers describe them, for estimates."""

from __future__ import annotations

from typing import NamedTuple


class Accelerator(NamedTuple):
  """One device of a kind, by its maker's data sheet; dense figures, without sparsity.

  Attributes:
    operations: bfloat16 products, a second.
    memory: bytes.
    bandwidth: of that memory, bytes a second.
    link: to the devices of its group, bytes a second one way.
    group: how many devices such links join.
    network: to devices of other groups, bytes a second one way.
    watts: at most; None where it is not published.
  """

  operations: float
  memory: float
  bandwidth: float
  link: float
  group: int
  network: float
  watts: float | None


ACCELERATORS = {
  "h100": Accelerator(989e12, 80e9, 3.35e12, 450e9, 8, 50e9, 700),
  "h200": Accelerator(989e12, 141e9, 4.8e12, 450e9, 8, 50e9, 700),
  "b200": Accelerator(2250e12, 180e9, 7.7e12, 900e9, 8, 50e9, 1000),
  "tpu-v5e": Accelerator(197e12, 16e9, 819e9, 200e9, 256, 6.25e9, None),
  "tpu-v5p": Accelerator(459e12, 95e9, 2765e9, 600e9, 8960, 6.25e9, None),
  "tpu-v6e": Accelerator(918e12, 32e9, 1640e9, 448e9, 256, 6.25e9, None),
}
"""By name: SXM modules on NVLink with a 400 Gbit/s adapter each; TPUs within a pod, 50 Gbit/s a chip out of it."""
