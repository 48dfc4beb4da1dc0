"""Energy says whether it was measured, and a counter that begins anew loses nothing."""

from __future__ import annotations

import time

import pytest

from lmcompress.errors import ConfigError
from lmcompress.evaluate import memory
from lmcompress.evaluate.energy import WATTS_PER_THREAD, estimated, grid, meter


def zone(root, where, name, joules):
  path = root / where
  path.mkdir(exist_ok=True)
  (path / "name").write_text(f"{name}\n")
  (path / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
  (path / "max_energy_range_uj").write_text(f"{100 * 10**6}\n")


def test_a_modelled_power_is_labelled(tmp_path):
  found = meter(threads=2, powercap=tmp_path)
  assert found.label == "modelled" and f"{WATTS_PER_THREAD:g} W" in found.source
  stated = meter(20, powercap=tmp_path / "nothing")
  assert stated.label == "modelled" and "20 W" in stated.source
  first = stated.read()
  assert stated.read() >= first


def test_packages_and_memory_are_measured_and_parts_are_not_counted_twice(tmp_path):
  zone(tmp_path, "intel-rapl:0", "package-0", 10)
  zone(tmp_path, "intel-rapl:0:0", "core", 7)
  zone(tmp_path, "intel-rapl:0:1", "dram", 2)
  zone(tmp_path, "intel-rapl:1", "psys", 40)
  found = meter(20, powercap=tmp_path)
  assert found.label == "measured" and "RAPL" in found.source and found.read() == 12


def test_a_counter_begins_anew(tmp_path):
  zone(tmp_path, "intel-rapl:0", "package-0", 98)
  found = meter(powercap=tmp_path)
  before = found.read()
  zone(tmp_path, "intel-rapl:0", "package-0", 3)
  assert found.read() - before == pytest.approx(5)


def test_grams_are_the_joules_by_a_countrys_grid():
  """The figure of a kilowatt hour is what codecarbon says by its own way, and its model counts what a process does."""
  from codecarbon.core.emissions import Emissions
  from codecarbon.core.units import Energy
  from codecarbon.external.geography import GeoMetadata
  from codecarbon.input import DataSource

  found = grid("FRA")
  hour = Emissions(DataSource()).get_country_emissions(Energy.from_energy(kWh=1), GeoMetadata("FRA", "France"))
  assert found.said(3.6e6)["grams"] == pytest.approx(1000 * hour) and found.said(0.0)["country"] == "FRA"
  counter = estimated(found)
  before = counter.read()
  end = time.monotonic() + 20  # the model looks at a process a few times a second: what is quick may be seen later
  while counter.read() <= before and time.monotonic() < end:
    sum(i * i for i in range(10**6))
  assert counter.label == "modelled" and counter.read() > before
  counter.stop()
  with pytest.raises(ConfigError, match="'CAF'"):
    grid("CAF")
  with pytest.raises(ConfigError, match=r"letters are known .*FRA"):
    grid("fra")


def test_nothing_is_made_up_for_an_accelerator(tmp_path):
  assert meter(platform="tpu", powercap=tmp_path) is None
  assert meter(30, platform="tpu", powercap=tmp_path).label == "modelled"


@pytest.mark.parametrize("watts", [0, -1, float("inf"), float("nan")])
def test_a_power_is_positive(watts):
  with pytest.raises(ValueError, match="above 0"):
    meter(watts)


def test_an_empty_process_is_measured_once():
  first = memory.runtime_bytes()
  assert 20e6 < first < 4e9 and memory.runtime_bytes() == first
  assert memory.above_runtime(first + 5) == 5 and memory.above_runtime(0) == 0
