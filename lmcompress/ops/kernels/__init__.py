"""Fast products of compressed weights, each beside the reference that it must agree with."""
