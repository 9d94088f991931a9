"""One round of the layer comparison: float values wait here for those of the quantized model."""

from __future__ import annotations

from collections import Counter

from torch import Tensor


class ComparisonRound:
    """One float forward and the quantized forward after it.

    It keeps the float values until the quantized model shows its values. Values that exceed the memory are left to the
    next round.

    Args:
        start: position of the first value to keep, in execution order.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self.next: int | None = None
        self.quantized = False
        self.kept: dict[tuple[str, int], Tensor] = {}
        self.kept_bytes = 0
        self._position = 0
        self._uses: Counter[str] = Counter()
        self._float_uses: Counter[str] = Counter()

    def to_quantized(self) -> None:
        """End the float forward: what is shown from now on are values of the quantized model."""
        self.quantized = True
        self._float_uses, self._uses = self._uses, Counter()

    def uneven(self) -> list[str]:
        """Return the rows that the two models showed a different number of times."""
        return [name for name in self._float_uses | self._uses if self._float_uses[name] != self._uses[name]]

    def use(self, name: str) -> int:
        """Count how often a row was shown in this forward."""
        self._uses[name] += 1
        return self._uses[name] - 1

    def keep(self, key: tuple[str, int], value: Tensor, keep_bytes: int) -> None:
        """Keep a copy of a float value, or leave it to the next round."""
        position, self._position = self._position, self._position + 1
        if position < self.start or self.next is not None:
            return
        size = value.numel() * value.element_size()
        if self.kept and self.kept_bytes + size > keep_bytes:
            self.next = position
            return
        self.kept[key] = value.detach().clone()
        self.kept_bytes += size
