"""Conditions for the fields of a dataclass that is read from a file, beside their types."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args


@dataclass(frozen=True)
class Check:
    """A condition for a field beside its type: ``count: Annotated[int, AT_LEAST_ONE]``.

    Args:
        holds: tells whether a value fits.
        wanted: what it must be, for messages: ``must be <wanted>``.
    """

    holds: Callable[[Any], bool]
    wanted: str


def one_of(choices: Any) -> Check:
    """Return the check for a closed set, such as a ``Literal``."""
    names = get_args(choices) or tuple(choices)
    return Check(lambda value: value in names, f"one of {', '.join(map(str, names))}")


FINITE = Check(math.isfinite, "a finite number")
POSITIVE = Check(lambda value: math.isfinite(value) and value > 0, "a positive number")
AT_LEAST_ZERO = Check(lambda value: not value < 0, "at least 0")  # NaN is
AT_LEAST_ONE = Check(lambda value: value >= 1, "at least 1")
SHARE = Check(lambda value: not (value < 0 or value > 1), "between 0 and 1")  # NaN is
