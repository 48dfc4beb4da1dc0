"""lmcompress."""
