"""What a report leaves open because another one can tell it: as data, so that a page with both says the answer."""

from __future__ import annotations

from typing import Literal

OpenQuestion = Literal["", "quantization", "training", "points"]
"""What is left open: whether quantization is to blame; whether training goes wrong in float as well; which points to
raise; or nothing."""
QUESTIONS: dict[OpenQuestion, str] = {
    "quantization": "whether it is quantization",
    "training": "whether training goes wrong in float as well",
}
"""The questions that a pipeline check answers."""
RAISE_POINTS = "raise the points that SensitivityAnalysis() puts first to int16 with overrides"
"""The next step against quantization error, in words that fit whether the analysis is listed already or not."""


def with_question(left_open: OpenQuestion, next_step: str = "") -> str:
    """Say where to look for what is left open, and what to do then.

    Args:
        left_open: what is left open.
        next_step: what to do then.

    Example:
        >>> with_question("quantization", "Do not train longer before you know.")
        'PipelineCheck() says whether it is quantization. Do not train longer before you know.'
    """
    if left_open == "points":
        first = f"First {RAISE_POINTS}."
    else:
        first = f"PipelineCheck() says {QUESTIONS[left_open]}." if left_open else ""
    return " ".join(part for part in (first, next_step) if part)
