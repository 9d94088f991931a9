"""Modules and the tensors in their arguments: walking, calling and restoring them."""
