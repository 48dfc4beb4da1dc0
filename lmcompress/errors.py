"""Errors that a user can mend."""

from __future__ import annotations


class LmcompressError(Exception):
  """Base of the errors that a user can mend; the command line prints them in one line and exits with 2."""


class FormatError(LmcompressError, ValueError):
  """A file does not hold what its format promises; the message names the file."""


class ConfigError(LmcompressError, ValueError):
  """A config asks for something that does not exist; the message shows what would do."""


class SourceError(LmcompressError, FileNotFoundError):
  """A model or a text cannot be had; the message says which and what to do."""

  def __str__(self) -> str:
    return str(self.args[0]) if self.args else ""


class WeightError(LmcompressError, ValueError):
  """A weight cannot be compressed as asked; the message names the path, what was asked and what would do."""


class GateError(LmcompressError, ValueError):
  """A run lost more quality than its config allows; the message says how much, and names the worst weights."""
