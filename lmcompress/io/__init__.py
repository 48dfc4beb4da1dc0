"""One file format per file, read and written together."""
