"""Putting back what steps change: the module, its copies, optimizers, loaders, the trainer."""
