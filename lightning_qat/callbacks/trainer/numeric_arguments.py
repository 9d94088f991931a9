"""One check, with one message, for the numeric arguments of all callbacks."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException


def require_at_least(who: str, least: int = 1, **values: int | None) -> None:
    """Refuse numbers that are too small; None stands for "no limit" where it is allowed.

    Args:
        who: the callback, for the message.
        least: the smallest number that makes sense.
        values: by the name of the argument.

    Raises:
        MisconfigurationException: one is smaller.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise MisconfigurationException(f"{who}({name}={value}): must be at least {least}.")


def require_batches(who: str, **values: int | str) -> None:
    """Refuse numbers of batches that are neither at least 1 nor ``auto``.

    Args:
        who: the callback, for the message.
        values: by the name of the argument.

    Raises:
        MisconfigurationException: one is something else.
    """
    for name, value in values.items():
        if value != "auto" and not (isinstance(value, int) and value >= 1):
            raise MisconfigurationException(f"{who}({name}={value!r}): must be at least 1, or 'auto'.")
