"""What is measured on the ladder that tells the pipeline from quantization: one change per rung (C3 to C6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_qat.analysis.ladder.measurements import Finetune, Measurement

RUNGS = (0, 1, 2, 3, 4, 5, 6)
FINGERPRINT_COMMAND = "python -m lightning_qat fingerprint train.py --config float.yaml --ckpt_path float.ckpt"
HALF_A_STEP = 1 / 254
"""Half a step of a symmetric int8 weight, relative to the largest weight."""
LONG_TRAINING = 1000
"""Steps that a training is taken to have at least when asking how far it can get."""
NAMES = {
    0: "float model",
    1: "inserted, off",
    2: "lr 0, BN fixed",
    3: "lr 0, BN moving",
    4: "lr 0, quantized",
    5: "float finetune",
    6: "QAT",
}


@dataclass(frozen=True)
class OffComparison:
    """The module with fake-quant inserted and off, against a copy from which it was removed (rung 1).

    Args:
        compared: number of tensors compared: outputs of the steps and gradients.
        differing: names of those that are not bit-identical.
        repeatable: whether the float module gives the same bits when it is run again.
    """

    compared: int
    differing: tuple[str, ...] = ()
    repeatable: bool = True


@dataclass(frozen=True)
class Ladder:
    """What was measured on the rungs; None where a rung was not measured.

    Args:
        float_model: evaluation with fake-quant off, before.
        off: rung 1.
        batch_norm_frozen: rung 2, fake-quant off, lr 0, batch norm in eval mode.
        batch_norm_moving: rung 3, the same with batch norm as in training.
        calibrated: evaluation of the quantized model, before.
        quantized: rung 4, quantized, lr 0, as in QAT.
        float_finetune: rung 5, fake-quant off, trained as QAT would.
        qat: rung 6, quantized, trained.
        missing: why a rung that was asked for was not measured.
        points: the points that lose most, in words, the worst first.
        total_steps: optimizer steps that this training will have.
    """

    float_model: Measurement
    off: OffComparison | None = None
    batch_norm_frozen: Finetune | None = None
    batch_norm_moving: Finetune | None = None
    calibrated: Measurement | None = None
    quantized: Finetune | None = None
    float_finetune: Finetune | None = None
    qat: Finetune | None = None
    missing: Mapping[int, str] = field(default_factory=dict)
    points: tuple[str, ...] = ()
    total_steps: int = 0
