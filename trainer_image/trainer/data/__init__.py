"""Corpus, token streams and batches."""
