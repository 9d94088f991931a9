"""What the analyses of a region need not find out again each epoch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")

_REMEMBERED = 64
"""So many things are remembered: inputs may have a new shape in every batch."""


class RegionMemory:
    """Remembers what follows from the code of a region's target, such as where in a tensor the samples are.

    It holds for all weights, as long as the region's plan is the same object and the analyses look at the same output.

    Example:
        >>> memory = RegionMemory()
        >>> memory.find("plan", (8, 3), lambda: "found"), memory.find("plan", (8, 3), lambda: "not needed")
        ('found', 'found')
    """

    def __init__(self) -> None:
        self._plan: object = None
        self._found: dict[Hashable, Any] = {}

    def find(self, plan: object, what: Hashable, search: Callable[[], T]) -> T:
        """Return what is known, or what ``search`` finds."""
        if plan is not self._plan or what not in self._found:
            self.note(plan, what, search())
        found: T = self._found[what]
        return found

    def note(self, plan: object, what: Hashable, found: object) -> None:
        """Remember what was found out in another way."""
        if plan is not self._plan or len(self._found) >= _REMEMBERED:
            self._plan, self._found = plan, {}
        self._found[what] = found
