"""Python's garbage collector while many objects are made that stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

OBJECTS = 100_000
"""New objects from one search for garbage to the next. Python's own number, 700 or 2000, is for objects that go."""


@contextmanager
def rare_garbage_collection() -> Iterator[None]:
    """Search for garbage rarely in a block, and as before after it.

    Each search looks at the objects that are there. While a graph of many ops is built, that takes half of the time and
    finds nothing. What forwards leave behind in reference cycles is still freed.

    Example:
        >>> before = gc.get_threshold()
        >>> with rare_garbage_collection():
        ...     gc.get_threshold()[0]
        100000
        >>> gc.get_threshold() == before
        True
    """
    before = gc.get_threshold()
    if 0 < before[0] < OBJECTS:  # 0: somebody has switched it off
        gc.set_threshold(OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
