"""Runs pytest with kernels built under a sanitizer: `python native/tests/sanitized.py MODULE.so [pytest arguments]`."""

import importlib.machinery
import importlib.util
import sys

import pytest

import lmcompress


def main() -> int:
  loader = importlib.machinery.ExtensionFileLoader("lmcompress._native", sys.argv[1])
  spec = importlib.util.spec_from_file_location("lmcompress._native", sys.argv[1], loader=loader)
  assert spec is not None
  module = importlib.util.module_from_spec(spec)
  loader.exec_module(module)
  sys.modules["lmcompress._native"] = module
  lmcompress._native = module
  return pytest.main(["-p", "no:xdist", "-o", "addopts=-q --strict-markers", *sys.argv[2:]])


if __name__ == "__main__":
  raise SystemExit(main())
