"""When a difference between two measurements counts, and when it is a collapse."""

STANDARD_ERRORS = 3.0
"""A fall of three standard errors happens by chance in about one of a thousand evaluations."""
COLLAPSE = 0.1
"""A fall by more than this share is a collapse; also the tolerance where there is nothing to estimate noise from."""
ROUNDING = 0.01
"""Relative difference that another device or precision makes of the same samples."""
