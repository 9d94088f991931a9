"""The rungs of the pipeline check: their numbers and names, and what a broken one says.

Every rung changes one thing, so the lowest one that breaks names the culprit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FLOAT_MODEL, OFF, BATCH_NORM_FIXED, BATCH_NORM_MOVING, QUANTIZED, FLOAT_FINETUNE, QAT = range(7)
RUNG_NAMES = {
    FLOAT_MODEL: "float model",
    OFF: "inserted, off",
    BATCH_NORM_FIXED: "lr 0, BN fixed",
    BATCH_NORM_MOVING: "lr 0, BN moving",
    QUANTIZED: "lr 0, quantized",
    FLOAT_FINETUNE: "float finetune",
    QAT: "QAT",
}
CALIBRATED = "calibrated"
"""Name of the rows that say what the rung ``QUANTIZED`` starts from."""
RUNGS = tuple(RUNG_NAMES)
ZERO_LR_RUNGS = (BATCH_NORM_FIXED, BATCH_NORM_MOVING, QUANTIZED)
"""Those that finetune with learning rate 0."""
TRAINING_RUNGS = (FLOAT_FINETUNE, QAT)
"""Those that train with the run's own hyperparameters."""

Verdict = Literal[
    "healthy",
    "pipeline misaligned",
    "scales drift",
    "quantization error",
    "hyperparameters",
    "pipeline or hyperparameters",
    "cannot tell",
]


@dataclass(frozen=True)
class BrokenRung:
    """A rung that breaks.

    Args:
        rung: its number.
        verdict: what is to blame.
        text: why.
        next_step: what to do; empty if there is nothing to say.
        cause: the setting that does it, if the text names one; else a difference from the float run may explain it.
        what: name of the rows that break, if it is not that of the rung.
    """

    rung: int
    verdict: Verdict
    text: str
    next_step: str = ""
    cause: str = ""
    what: str = ""
