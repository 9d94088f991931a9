"""The errors of the quantization layer: one sentence that says what to write instead."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class ConfigurationError(ValueError):
    """A configuration that cannot work. The callbacks turn it into Lightning's ``MisconfigurationException``."""


class DamagedFileError(ConfigurationError):
    """A file that does not hold what it should: it is damaged, or it is another one."""


class SensitivityTableError(ConfigurationError):
    """A rule that names a sensitivity table from which no points can be taken."""


class PlanMismatchError(ConfigurationError):
    """A stored plan (from a checkpoint) that does not fit the code it is attached to."""


class TracingError(RuntimeError):
    """The target could not be traced, or was never called while tracing."""


def near_names(value: object, choices: Iterable[str], limit: int = 3) -> list[str]:
    """Return up to ``limit`` of ``choices`` that look like ``value``, the nearest first; case does not matter."""
    by_key: dict[str, str] = {}
    for choice in choices:
        by_key.setdefault(choice.lower(), choice)
    text = value if isinstance(value, str) else shown(value)
    near = difflib.get_close_matches(text[:200].lower(), list(by_key), n=limit, cutoff=0.5)
    return [by_key[key] for key in near]


def unknown_choice(what: str, value: object, choices: Iterable[str]) -> ConfigurationError:
    """Build the error for a value outside a closed set.

    Example:
        >>> str(unknown_choice("dtype", "int18", ["int8", "int16"]))
        "unknown dtype 'int18': did you mean 'int8', 'int16'? Choices: int8, int16."
    """
    names = list(choices)
    near = near_names(value, names)
    hint = f" did you mean {', '.join(repr(n) for n in near)}?" if near else ""
    return ConfigurationError(f"unknown {what} {shown(value)}:{hint} Choices: {', '.join(names)}.")


def shown(value: object) -> str:
    """Write a value for a message, in one line and at most some dozens of characters, however large or nested it is.

    Example:
        >>> shown(-1.5), shown([[[[[[1]]]]]]), len(shown("x" * 1000)) < 80
        ('-1.5', '[[[[...]]]]', True)
    """
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"a number of {value.bit_length()} bits"  # Python refuses to write very long ones
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 4, 60, 60, 40
    return " ".join(short.repr(value).split())
