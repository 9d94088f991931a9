"""The words of notes that were written without knowledge of each other, as one page says them: with one thing to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.analysis.ladder.sentences import RAISE_POINTS
from lightning_qat.analysis.results import Block
from lightning_qat.reporting.html.findings import split_next

_QUESTION = re.compile(
    r"(?:see what PipelineCheck\(\)(?: \(or [^)]*\(\) and [^)]*\(\)\))? says, |(?P<ask>Ask) PipelineCheck\(\) first )"
    r"whether (?P<question>[^.:]*)\."
)
"""A question that the pipeline check of a run answers."""
_STANDS_UNDER_NEXT = "do what stands under Next"


@dataclass(frozen=True)
class PageWords:
    """What a page puts in place of advice that it knows better.

    Args:
        check: the pipeline check of the run; None without one.
        next_action: what the page says to do next; empty as long as it is not known, or if nothing has to be mended.
    """

    check: PipelineResult | None = None
    next_action: str = ""

    def __call__(self, text: str) -> str:
        """Return a text with the answer of the pipeline check where it asks for one, and without another next step.

        Args:
            text: a note, or a cell of a table.

        Example:
            >>> check = PipelineResult((), "pipeline misaligned", rung=2)
            >>> PageWords(check)("Ask PipelineCheck() first whether quantization is to blame.")
            'The pipeline check on this page answers whether quantization is to blame: no, pipeline misaligned.'
            >>> PageWords(next_action="Leave the scale out.")(f"First {RAISE_POINTS}.")
            'First do what stands under Next.'
        """
        if self.next_action and RAISE_POINTS.lower() not in self.next_action.lower():
            text = text.replace(RAISE_POINTS, _STANDS_UNDER_NEXT)
        if self.check is None:
            return text
        text = _QUESTION.sub(self._answered, text)
        here = f"the pipeline check on this page ({self.check.verdict})"
        text = text.replace("PipelineCheck() (or ZeroLRFinetune() and FloatFinetune()) says", f"{here} says")
        text = text.replace("PipelineCheck() says", f"{here} says")
        return f"T{text[1:]}" if text.startswith(here) else text

    def in_tables(self, blocks: Sequence[Block]) -> tuple[Block, ...]:
        """Return tables in these words; their notes say what was found, and leave to the page what to do next."""
        return tuple(
            replace(
                block,
                rows=tuple(tuple(_if_text(self, cell) for cell in row) for row in block.rows),
                note=self(split_next(block.note)[0]),
            )
            for block in blocks
        )

    def _answered(self, found: re.Match[str]) -> str:
        assert self.check is not None
        question, verdict = found["question"], self.check.verdict
        if not self.check.is_bad:
            return f"The pipeline check on this page ({verdict}) says whether {question}." if found["ask"] else found[0]
        answer = "yes" if verdict == "quantization error" else "no"
        article = "The" if found["ask"] else "the"
        return f"{article} pipeline check on this page answers whether {question}: {answer}, {verdict}."


def _if_text(words: Callable[[str], str], cell: Any) -> Any:
    return words(cell) if isinstance(cell, str) else cell
