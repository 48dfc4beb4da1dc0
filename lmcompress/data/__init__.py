"""Texts, tokenizers, task data sets and batches."""
