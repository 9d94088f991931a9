"""The words of the report, for readers who see one for the first time."""

from __future__ import annotations

import re

from lightning_qat.reporting.html.point_table import COLUMNS

_TERMS = (
    ("point", "a tensor that is quantized: the output or an input of an op, or its weight"),
    ("op", "one call of a torch function in the model; what runs as one (conv2d and relu) counts as one"),
    (
        "fake-quant",
        "computes in float what the integer type would hold: code = round(value / scale), clipped to its range",
    ),
    ("calibration", "a pass over data that finds the scales; nothing is trained"),
    ("QAT", "quantization-aware training: training with fake-quant on"),
    ("float", "the same model without quantization, before training"),
    ("clipping", "values outside the range of the type become its end: a wider range helps"),
    ("rounding", "values inside the range are off by up to half a step: a smaller scale or a wider type helps"),
    ("SQNR", "signal to quantization noise ratio in decibels; 6 dB are one bit, and less is worse"),
    ("inherited", "the error of a tensor that comes from the ops before it, not from the op itself"),
    ("override", "a rule in the configuration that gives single points another type or scale; to be pasted from here"),
    ("rung", "a step of the pipeline check; each changes one thing, so the first that breaks names the cause"),
    ("holds", "the number is as good as before, within the tolerance"),
    ("falls", "the number is worse than before by more than the tolerance, but it has not collapsed"),
    (
        "breaks",
        "the number is worse by more than the tolerance and by more than a tenth; where nothing may change, or of a "
        "training loss, by more than the tolerance",
    ),
    ("noted", "evidence that is not judged"),
    ("flagged", "the check has found what it looks for, and something has to be done"),
    ("tolerance", "how much worse the number may be, in its own unit: what other batches, or rounding, would change"),
    ("expected", "what the number was before, or in the float run; in its own unit, as the value is"),
    ("limit", "what the value of a check is compared with; the sentence beside it says in which direction"),
    ("BN fixed", "batch norm keeps its statistics while the check trains"),
    ("BN moving", "batch norm updates its statistics while the check trains"),
    ("own", "the error that an op makes itself when it gets the inputs of the float model"),
    ("region", "the part of the model that is quantized, such as a target that the configuration names"),
    ("segment", "ops behind each other that compute in the same type"),
    ("scope", "the modules of the model, one inside the other, as their names say"),
)

GLOSSARY: tuple[tuple[str, str], ...] = (
    *_TERMS,
    *((f"column {column.label}", column.help) for column in COLUMNS if column.label not in dict(_TERMS)),
)
"""Word and meaning."""
MEANINGS = {word.removeprefix("column "): meaning for word, meaning in GLOSSARY}
"""Meaning by word, for the places where the words stand."""


def anchor(word: str) -> str:
    """Return the id of a word in the glossary, to link to it.

    Args:
        word: as it stands in the glossary.

    Example:
        >>> anchor("BN fixed"), anchor("column SQNR (dB)")
        ('term-bn-fixed', 'term-column-sqnr-db')
    """
    return f"term-{re.sub('[^a-z0-9]+', '-', word.lower()).strip('-')}"


ANCHORS = {word.removeprefix("column "): anchor(word) for word, _ in GLOSSARY}
"""Id in the glossary by word, for the same places."""
