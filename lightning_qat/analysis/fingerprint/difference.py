"""One difference between two training pipelines, and the list of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from typing_extensions import Self

from lightning_qat.analysis.model_check.finding import shortened
from lightning_qat.analysis.results import Result

Suspicion = Literal["strong", "possible", "unlikely"]
_ORDER: tuple[Suspicion, ...] = ("strong", "possible", "unlikely")


@dataclass(frozen=True)
class PipelineDifference:
    """Something that is not the same in two pipelines.

    Args:
        suspicion: ``strong``: alone enough to ruin training. ``possible``: may be. ``unlikely``: it differs in most
            healthy QAT runs.
        part: which part of the pipeline.
        name: what in it.
        reference: its value in the reference.
        value: its value here.
        what: description of the difference, with a guess at the cause.
    """

    suspicion: Suspicion
    part: str
    name: str
    reference: str
    value: str
    what: str


@dataclass(frozen=True)
class PipelineDifferences(Result[PipelineDifference]):
    """All differences, the most suspicious first.

    Args:
        note: the first ones in a sentence.
    """

    note: str = ""
    title: ClassVar[str] = "Pipeline differences"
    shown: ClassVar[tuple[str, ...]] = ("suspicion", "what")

    @classmethod
    def of(cls, rows: Iterable[PipelineDifference]) -> Self:
        """Sort differences, the most suspicious first; those of one suspicion stay in their order."""
        ordered = tuple(sorted(rows, key=lambda row: _ORDER.index(row.suspicion)))
        strong = [row.what for row in ordered if row.suspicion == "strong"][:3]
        if strong:
            return cls(ordered, note="; ".join(strong))
        if len(ordered) > 1:
            return cls(ordered, note=f"{len(ordered)} differences, none of which alone explains a collapse")
        return cls(ordered, note="one difference, which alone explains no collapse" if ordered else "no difference")

    @property
    def strong(self) -> tuple[PipelineDifference, ...]:
        """Differences that are alone enough to ruin training."""
        return tuple(row for row in self.rows if row.suspicion == "strong")


@dataclass(frozen=True)
class StageDifferences(PipelineDifferences):
    """How the training data of one pipeline differ from its validation data."""

    title: ClassVar[str] = "Training against validation"


def module_names(names: Iterable[str]) -> str:
    """Format the paths of modules for a sentence.

    Example:
        >>> module_names(["", "net.conv"])
        '(the module itself), net.conv'
    """
    return shortened(name or "(the module itself)" for name in names)
