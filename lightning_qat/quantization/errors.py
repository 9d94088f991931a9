"""The errors of the quantization layer: one sentence that says what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigurationError(ValueError):
    """A configuration that cannot work. The callbacks turn it into Lightning's ``MisconfigurationException``."""


class PlanMismatchError(ConfigurationError):
    """A stored plan (from a checkpoint) that does not fit the code it is attached to."""


class TracingError(RuntimeError):
    """The target could not be traced, or was never called while tracing."""


def near_names(value: object, choices: Iterable[str], limit: int = 3) -> list[str]:
    """Return up to ``limit`` of ``choices`` that look like ``value``, the nearest first; case does not matter."""
    by_key: dict[str, str] = {}
    for choice in choices:
        by_key.setdefault(choice.lower(), choice)
    near = difflib.get_close_matches(str(value).lower(), list(by_key), n=limit, cutoff=0.5)
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
    return ConfigurationError(f"unknown {what} {value!r}:{hint} Choices: {', '.join(names)}.")
