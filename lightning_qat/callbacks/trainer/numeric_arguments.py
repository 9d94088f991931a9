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
