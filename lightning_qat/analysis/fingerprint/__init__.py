"""Fingerprints of training pipelines, and the differences between two of them."""
