"""Results that the analyses of a region keep, so that they are not searched again in each epoch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")

_REMEMBERED = 64
"""Number of results that are kept: inputs may have a new shape in every batch."""


class RegionMemory:
    """Remembers facts that follow from the code of a region's target, such as the sample axis of a tensor.

    The facts hold for all weights, as long as the region's plan is the same object and the analyses look at the same
    output.

    Example:
        >>> memory = RegionMemory()
        >>> memory.find("plan", (8, 3), lambda: "found"), memory.find("plan", (8, 3), lambda: "not needed")
        ('found', 'found')
    """

    def __init__(self) -> None:
        self._plan: object = None
        self._found: dict[Hashable, Any] = {}

    def find(self, plan: object, what: Hashable, search: Callable[[], T]) -> T:
        """Return the remembered result; if there is none, call ``search`` and remember its result."""
        if plan is not self._plan or what not in self._found:
            self.note(plan, what, search())
        found: T = self._found[what]
        return found

    def note(self, plan: object, what: Hashable, found: object) -> None:
        """Remember a result that was found in another way."""
        if plan is not self._plan or len(self._found) >= _REMEMBERED:
            self._plan, self._found = plan, {}
        self._found[what] = found
