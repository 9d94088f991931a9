"""Numbers of things in sentences: ``1 batch``, ``2 batches``."""

from __future__ import annotations

_ES = ("s", "x", "z", "ch", "sh")


def number_of(number: int, thing: str) -> str:
    """Return a number and its noun, which has its plural unless there is one thing.

    Args:
        number: how many there are.
        thing: the noun of one, with a regular plural.

    Example:
        >>> number_of(1, "batch"), number_of(2, "batch"), number_of(0, "point")
        ('1 batch', '2 batches', '0 points')
    """
    return f"{number} {thing if number == 1 else thing + ('es' if thing.endswith(_ES) else 's')}"
