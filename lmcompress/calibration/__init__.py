"""Calibration: statistics of activations, and the drivers that hand them to a recipe."""

from lmcompress.calibration.compress import Report, compress
from lmcompress.calibration.sequential import weigh_first
from lmcompress.calibration.statistics import Statistic

__all__ = ["Report", "Statistic", "compress", "weigh_first"]
