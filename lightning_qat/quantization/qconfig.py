"""The defaults for activations and weights that the user asks for. Rules for single points are in ``overrides.py``.

Plain dataclasses, so that LightningCLI shows and validates them. Wrong values raise :class:`ConfigurationError` when
the object is built, with a sentence that says what to write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_qat.quantization.config_values import Granularity, ObserverChoice, SchemeChoice, build, check_values
from lightning_qat.quantization.numerics.dtypes import DtypeName
from lightning_qat.quantization.numerics.percentile import DEFAULT_PERCENTILE


@dataclass
class ActivationConfig:
    """How activations are quantized by default.

    Args:
        dtype: ``int2`` ... ``int16``, ``uint2`` ... ``uint16``, or ``float32`` to leave activations unquantized.
        observer: how calibration turns statistics into a scale. ``auto``, the default, is ``mse``.
        scheme: ``symmetric`` (zero point 0) or ``affine``. ``auto``, the default, is affine for signed types of 4 bits
            and fewer, if the hardware has it, and symmetric for all others: the fewer codes there are, the more it
            costs that values of one sign, such as those behind a relu, leave half of them unused.
        percentile: share of the values, in percent, that the ``percentile`` observer keeps inside the range. Its
            default and bounds are in ``numerics/percentile.py``.

    Raises:
        ConfigurationError: a value is not one of the choices.
    """

    dtype: DtypeName = "int8"
    observer: ObserverChoice = "auto"
    scheme: SchemeChoice = "auto"
    percentile: float = DEFAULT_PERCENTILE

    def __post_init__(self) -> None:
        check_values(self)


@dataclass
class WeightConfig:
    """How weights are quantized by default: symmetric codes, ``-127..127`` for int8.

    Args:
        dtype: as for activations.
        observer: as for activations, but ``auto`` is ``minmax``, and ``mse`` for 2 bits.
        granularity: ``per_channel`` (one scale per output channel) or ``per_tensor``.
        percentile: as for activations. It applies to the values that share a scale: in a channel of 64 values, no
            value lies beyond 99.99 %.

    Raises:
        ConfigurationError: a value is not one of the choices.
    """

    dtype: DtypeName = "int8"
    observer: ObserverChoice = "auto"
    granularity: Granularity = "per_channel"
    percentile: float = DEFAULT_PERCENTILE

    def __post_init__(self) -> None:
        check_values(self)


@dataclass
class QConfig:
    """The defaults for every point of a region.

    Args:
        activation: for inputs and outputs of ops; an ``ActivationConfig`` or a mapping of its fields.
        weight: for weights; a ``WeightConfig`` or a mapping of its fields.

    Raises:
        ConfigurationError: a key or value is unknown.

    Example:
        >>> QConfig.of({"activation": {"dtype": "int16"}}).activation.dtype
        'int16'
    """

    activation: ActivationConfig = field(default_factory=ActivationConfig)
    weight: WeightConfig = field(default_factory=WeightConfig)

    def __post_init__(self) -> None:
        self.activation = build(ActivationConfig, self.activation, "qconfig.activation")
        self.weight = build(WeightConfig, self.weight, "qconfig.weight")

    @classmethod
    def of(cls, value: QConfig | Mapping[str, Any] | None) -> QConfig:
        """Return a QConfig from a QConfig, its dictionary or None.

        None gives the defaults: int8, the ``mse`` observer for activations, per-channel weights.
        """
        return build(cls, value, "qconfig") if value is not None else cls()
