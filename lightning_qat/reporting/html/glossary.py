"""The words of the report, for readers who see one for the first time."""

from __future__ import annotations

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
)

GLOSSARY: tuple[tuple[str, str], ...] = (
    *_TERMS,
    *((f"column {column.label}", column.help) for column in COLUMNS if column.label not in dict(_TERMS)),
)
"""Word and meaning."""
