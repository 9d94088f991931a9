"""The result of a pipeline check: the evidence of its rungs, one verdict, and what differs from the float run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from lightning_qat.analysis.fingerprint.difference import PipelineDifferences
from lightning_qat.analysis.ladder.rows import PipelineRow
from lightning_qat.analysis.ladder.rungs import Verdict
from lightning_qat.analysis.results import Block, Result


def _no_differences() -> PipelineDifferences:
    return PipelineDifferences(())


@dataclass(frozen=True)
class PipelineResult(Result[PipelineRow]):
    """Evidence of the rungs, one verdict, and what differs from the float pipeline.

    Args:
        verdict: what is to blame.
        note: the verdict as a sentence, with the next step.
        rung: number of the rung that breaks first, None if none does.
        cause: the difference that explains it, in words; empty if none does.
        differences: differences from the reference, the most suspicious first.
        stages: differences between the model's inputs in training and in validation.
        finding: what the note says was found, without verdict and cause.
        next_step: what the note says to do.
    """

    verdict: Verdict = "cannot tell"
    note: str = ""
    rung: int | None = None
    cause: str = ""
    differences: PipelineDifferences = field(default_factory=_no_differences)
    stages: PipelineDifferences = field(default_factory=_no_differences)
    finding: str = ""
    next_step: str = ""
    title: ClassVar[str] = "Pipeline check"

    @property
    def is_bad(self) -> bool:
        """Whether something was found that has to be fixed before training makes sense."""
        return self.verdict not in ("healthy", "cannot tell")

    def blocks(self) -> tuple[Block, ...]:
        """The rungs, and the differences.

        What a rung does is said once, and the notes are left to the files: this fits into 80 columns.
        """
        rows = self.to_dicts()
        for before, row in zip([None, *self.rows], rows, strict=False):
            repeated = before is not None and (before.rung, before.what) == (row["rung"], row["what"])
            row["rung"] = "" if repeated else f"{row['rung']} {row['what']}"
            row["metric"] = row["metric"] or row["note"]
        columns = ("rung", "metric", "expected", "value", "tolerance", "status")
        differences = (replace(block, note="") for table in self._tables() for block in table.blocks())
        return (Block.of(self.title, columns, rows, self.note), *differences)

    def full_blocks(self) -> tuple[Block, ...]:
        """The rungs, and the differences."""
        return (*super().full_blocks(), *(block for table in self._tables() for block in table.full_blocks()))

    def _tables(self) -> list[PipelineDifferences]:
        return [table for table in (self.differences, self.stages) if table.rows]


def cannot_tell(reason: str) -> PipelineResult:
    """Return a verdict without evidence: the check could not run."""
    return PipelineResult((), "cannot tell", f"cannot tell: {reason}", finding=reason)
