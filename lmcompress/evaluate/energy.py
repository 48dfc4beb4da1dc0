"""Energy: a counter of joules, measured where the machine has one, else modelled from a stated power."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lmcompress.errors import ConfigError

WATTS_PER_THREAD = 5.0
"""A server CPU's rated power by core: 4.4 W for an EPYC 7763 (280 W, 64 cores), 6.8 W for a Xeon 8380 (270 W, 40)."""

_POWERCAP = Path("/sys/class/powercap")


class Meter(NamedTuple):
  """A counter of joules.

  Attributes:
    label: `measured` or `modelled`.
    source: what counts, or what the model assumes.
    read: joules since some moment.
    stop: nothing more is read.
  """

  label: str
  source: str
  read: Callable[[], float]
  stop: Callable[[], Any] = lambda: None


def meter(
  watts: float | None = None, threads: int = 1, platform: str = "cpu", powercap: Path = _POWERCAP
) -> Meter | None:
  """The best counter there is: NVML on a GPU, RAPL on a CPU, else the model `watts * seconds`.

  A counter counts all that its device or package does, of other programs too; the model assumes one power for
  as long as the work takes.

  Args:
    watts: of the model; `WATTS_PER_THREAD * threads` for a CPU if None.
    threads: that work.
    platform: JAX's, `cpu`, `gpu` or `tpu`.

  Returns:
    None where nothing counts and no power was stated.

  Raises:
    ValueError: `watts` is not positive.
  """
  if watts is not None and not 0 < watts < float("inf"):
    raise ValueError(f"watts={watts}: a power above 0")
  found = _nvml() if platform == "gpu" else _rapl(powercap) if platform == "cpu" else None
  if found is not None:
    return found
  if watts is not None:
    return modelled(watts, f"{watts:g} W, as stated")
  if platform != "cpu":
    return None
  return modelled(WATTS_PER_THREAD * threads, f"{threads} threads at {WATTS_PER_THREAD:g} W")


class Grid(NamedTuple):
  """A country's electricity.

  Attributes:
    country: ISO 3166 code of three letters.
    grams_per_kwh: of CO2 equivalents, its mix over a year.
    source: of that figure.
  """

  country: str
  grams_per_kwh: float
  source: str

  def said(self, joules: float) -> dict[str, Any]:
    """What a result says of it: `country`, `grams` of CO2 equivalents, and the `grid` that they are of."""
    return {"country": self.country, "grams": joules / 3.6e6 * self.grams_per_kwh, "grid": self.source}


def grid(country: str) -> Grid:
  """The grid of a country, by codecarbon's tables.

  Raises:
    ConfigError: codecarbon is not installed, or has no such country.
  """
  codecarbon = _codecarbon()
  from codecarbon.input import DataSource  # pyright: ignore[reportMissingImports]

  mixes = DataSource().get_global_energy_mix_data()
  if country not in mixes or not mixes[country]["carbon_intensity"] > 0:
    near = ", ".join(difflib.get_close_matches(country.upper(), mixes, 3, 0.4)) or "such as DEU"
    raise ConfigError(f"carbon.country {country!r}: ISO codes of three letters are known ({near})")
  mix = mixes[country]
  return Grid(country, float(mix["carbon_intensity"]), f"codecarbon {codecarbon.__version__}, mix of {mix['year']}")


def estimated(where: Grid) -> Meter:
  """codecarbon's model of this process: its share of the processor's rated power, and the memory of the machine.

  Raises:
    ConfigError: codecarbon is not installed.
  """
  codecarbon = _codecarbon()
  tracker = codecarbon.OfflineEmissionsTracker(
    country_iso_code=where.country, tracking_mode="process", measure_power_secs=15, save_to_file=False,
    allow_multiple_runs=True, log_level="error",
  )  # fmt: skip
  tracker.start()

  def read() -> float:
    tracker.flush()
    return tracker._total_energy.kWh * 3.6e6

  return Meter("modelled", f"codecarbon {codecarbon.__version__}, this process", read, tracker.stop)


def _codecarbon() -> Any:
  try:
    import codecarbon  # pyright: ignore[reportMissingImports]
  except ImportError:
    raise ConfigError("grams of CO2 need codecarbon: pip install 'lmcompress[carbon]'") from None
  return codecarbon


def modelled(watts: float, source: str) -> Meter:
  """A meter that multiplies a power by the time that passes."""
  return Meter("modelled", source, lambda: watts * time.perf_counter())


def _nvml() -> Meter | None:
  """The first GPU's own counter (Volta and later)."""
  try:
    import pynvml  # pyright: ignore[reportMissingImports]
  except ImportError:
    return None
  nvml: Any = pynvml
  try:
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByIndex(0)
    nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
  except nvml.NVMLError:
    return None
  return Meter("measured", "NVML, GPU 0", lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)


def _rapl(root: Path) -> Meter | None:
  """The packages' counters, and those of memory where they are apart."""
  zones = []
  for zone in sorted(root.glob("*rapl:*")) if root.is_dir() else []:
    try:
      name = (zone / "name").read_text().strip()
      int((zone / "energy_uj").read_text())
      if name.startswith("package") or name == "dram":
        zones.append((zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())))
    except (OSError, ValueError):
      continue  # not readable: often root's alone
  if not zones:
    return None
  counters = [_unwrapped(path, most) for path, most in zones]
  return Meter("measured", f"RAPL, {len(zones)} zones", lambda: sum(read() for read in counters) / 1e6)


def _unwrapped(path: Path, most: int) -> Callable[[], int]:
  """Reads a counter that begins anew at `most`, as one that does not."""
  turns, last = 0, 0

  def read() -> int:
    nonlocal turns, last
    now = int(path.read_text())
    turns += now < last
    last = now
    return turns * most + now

  return read
