"""What a page says in place of what one report leaves open and another one tells."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.analysis.open_question import QUESTIONS, OpenQuestion, with_question


@dataclass(frozen=True)
class Answers:
    """What a page knows better than a single report.

    Args:
        check: the pipeline check of the run; None without one.
        has_next: the page says what to do next, and it is not to raise the most sensitive points.
    """

    check: PipelineResult | None = None
    has_next: bool = False

    def __call__(self, left_open: OpenQuestion, next_step: str = "") -> str:
        """Return what to do about a finding, with the answer to what it leaves open.

        Args:
            left_open: what is left open.
            next_step: what to do then.

        Example:
            >>> check = PipelineResult((), "pipeline misaligned", rung=2)
            >>> Answers(check)("quantization")
            'The pipeline check on this page answers whether it is quantization: no, pipeline misaligned.'
        """
        if left_open == "points" and self.has_next:
            known = "First do what stands under Next."
        elif left_open in QUESTIONS and self.check is not None:
            known = self._answer(self.check, left_open)
        else:
            return with_question(left_open, next_step)
        return f"{known} {next_step}".rstrip()

    def _answer(self, check: PipelineResult, left_open: OpenQuestion) -> str:
        if not check.is_bad:
            return f"The pipeline check on this page ({check.verdict}) says {QUESTIONS[left_open]}."
        answer = "yes" if (check.verdict == "quantization error") == (left_open == "quantization") else "no"
        return f"The pipeline check on this page answers {QUESTIONS[left_open]}: {answer}, {check.verdict}."
