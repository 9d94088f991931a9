"""Which models of the zoo stay below 50 dB at int16, and why. Nothing else excuses a low number."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """Why a model is below 50 dB at int16.

    Args:
        least: dB that it must reach.
        why: the reason, for the table.
    """

    least: float
    why: str


LIMITED: dict[str, Limit] = {
    "MobileNetV2": Limit(
        40.0,
        "no fault of the plan: 52 BatchNorms with random weights in a row amplify any noise. In the float model, noise "
        "80 dB below the first activation arrives less than 50 dB below the logits (a test checks it). Pretrained "
        "EfficientNet-Lite0 is made of the same blocks and reaches 64 dB",
    )
}
