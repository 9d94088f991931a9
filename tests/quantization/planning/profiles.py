"""Hardware profiles for tests."""

from __future__ import annotations

import functools
from typing import Any

from lightning_qat.quantization.planning.hardware_profile import HardwareProfile
from lightning_qat.quantization.planning.hardware_profile_files import hardware_profile


@functools.cache
def shipped(name: str) -> HardwareProfile:
    """Read a shipped profile once."""
    profile = hardware_profile(name)
    assert profile is not None
    return profile


NARROW: dict[str, Any] = {
    "name": "narrow",
    "ops": [
        {"kinds": ["conv2d"], "signatures": [{"input": "int8", "weight": "int8", "output": ["int8", "int16"]}]},
        {"kinds": ["linear"], "signatures": [{"input": "int8", "weight": "int8", "output": ["int8", "float32"]}],
         "weight_granularity": ["per_tensor"]},
        {"kinds": ["softmax"], "signatures": [{"input": ["int8", "int16"], "output": "int16"}]},
        {"kinds": ["add", "cat"], "signatures": [{"input": "int8", "output": "int8"},
                                                 {"input": "int16", "output": "int16"}]},
        {"kinds": ["max_pool2d"], "signatures": [{"input": "int8", "output": "int8"}]},
        {"kinds": ["relu", "sigmoid"], "signatures": [{"input": ["int8", "int16"], "output": ["int8", "int16"]}]},
    ],
    "unsupported": {"tanh": "no table for it"},
    "fusions": ["conv2d + relu"],
}  # fmt: skip
