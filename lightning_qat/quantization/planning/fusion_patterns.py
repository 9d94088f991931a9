"""Sequences of op kinds that the hardware computes as one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

GEMM_LAYERS = frozenset(
    ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"]
)


@dataclass(frozen=True)
class FusionPatterns:
    """A set of sequences of kinds, such as conv2d, batch_norm, relu. A sequence can stop early only where a shorter
    one of the set ends.

    Args:
        sequences: at least two kinds each.

    Example:
        >>> patterns = FusionPatterns.of([[["conv2d"], ["batch_norm"], ["relu", None]]])
        >>> sorted(patterns.sequences)
        [('conv2d', 'batch_norm'), ('conv2d', 'batch_norm', 'relu')]
        >>> patterns.next_kinds(("conv2d",)), patterns.next_kinds(("conv2d", "relu"))
        (frozenset({'batch_norm'}), frozenset())
    """

    sequences: frozenset[tuple[str, ...]]

    @classmethod
    def of(cls, patterns: Iterable[Sequence[Iterable[str | None]]]) -> FusionPatterns:
        """Expand patterns whose steps are alternatives; ``None`` among them makes a step optional."""
        found: set[tuple[str, ...]] = set()
        for steps in patterns:
            for kinds in itertools.product(*map(list, steps)):
                sequence = tuple(kind for kind in kinds if kind is not None)
                if len(sequence) > 1:
                    found.add(sequence)
        return cls(frozenset(found))

    def next_kinds(self, kinds: tuple[str, ...]) -> frozenset[str]:
        """Return the kinds that can follow."""
        return self._following.get(kinds, frozenset())

    def before(self, kind: str) -> frozenset[str]:
        """Return the kinds that ``kind`` can follow directly."""
        return self._before.get(kind, frozenset())

    @cached_property
    def _following(self) -> dict[tuple[str, ...], frozenset[str]]:
        found: dict[tuple[str, ...], set[str]] = {}
        for sequence in self.sequences:
            for length in range(1, len(sequence)):
                found.setdefault(sequence[:length], set()).add(sequence[length])
        return {kinds: frozenset(following) for kinds, following in found.items()}

    @cached_property
    def _before(self) -> dict[str, frozenset[str]]:
        found: dict[str, set[str]] = {}
        for sequence in self.sequences:
            for kind, following in itertools.pairwise(sequence):
                found.setdefault(following, set()).add(kind)
        return {kind: frozenset(before) for kind, before in found.items()}


_RELUS: tuple[str | None, ...] = ("relu", "relu6", "hardtanh", None)
DEFAULT_PATTERNS = FusionPatterns.of(
    [
        [GEMM_LAYERS, ["batch_norm", None], ["add", None], _RELUS],
        [["batch_norm"], ["add", None], _RELUS],
        [["add"], _RELUS],
    ]
)
"""A GEMM layer, then optionally batch_norm, then add, then a relu; the same from batch_norm or add on."""
