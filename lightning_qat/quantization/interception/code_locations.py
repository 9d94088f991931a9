"""Where code comes from: the user, an installed library, torch, or this package."""

from __future__ import annotations

import os
from types import FrameType

import torch

TORCH_DIRECTORY = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
OWN_DIRECTORY = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")) + os.sep
_WEIGHT_FILES = frozenset(
    os.path.join(TORCH_DIRECTORY, "nn", "utils", name + ".py")
    for name in ("parametrizations", "parametrize", "prune", "spectral_norm", "weight_norm")
)


def user_location(frame: FrameType | None) -> str:
    """Return ``file.py:line`` of the innermost frame that belongs neither to torch nor to this package."""
    while frame is not None:
        file = frame.f_code.co_filename
        if is_user_code(file):
            return f"{shown_file(file)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def is_user_code(file: str) -> bool:
    """Whether code belongs neither to torch nor to this package."""
    return not file.startswith((TORCH_DIRECTORY, OWN_DIRECTORY))


def shown_file(file: str) -> str:
    """Return a path for people: relative to the working directory, if it is below it."""
    return file.removeprefix(os.getcwd() + os.sep)


def is_installed(location: str) -> bool:
    """Whether code is part of an installed library, which nobody wants to edit.

    Args:
        location: see :func:`user_location`.

    Example:
        >>> is_installed("/venv/lib/python3.11/site-packages/transformers/modeling.py:12"), is_installed("net.py:3")
        (True, False)
    """
    return "site-packages" in location or "dist-packages" in location


def is_weight_hook(frame: FrameType | None) -> bool:
    """Whether code of torch that computes a weight runs: pruning, a parametrization, weight and spectral norm."""
    while frame is not None:
        if frame.f_code.co_filename in _WEIGHT_FILES:
            return True
        frame = frame.f_back
    return False
