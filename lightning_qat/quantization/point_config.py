"""What the defaults and overrides say about one quantization point."""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning_qat.quantization.dtypes import quant_dtype
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.plan import PointRole
from lightning_qat.quantization.qconfig import Override, QConfig


@dataclasses.dataclass(frozen=True)
class PointConfig:
    """The configuration of one point after all rules.

    Args:
        dtype: quantized type, or ``float32``.
        scheme: ``symmetric`` or ``affine``.
        observer: how the scale is found.
        percentile: for the percentile observer.
        per_channel: one scale per channel, where there is a channel axis.
        fixed_scale: scale given by the user.
        rule: the rule that changed it last, in words.
    """

    dtype: str
    scheme: str
    observer: str
    percentile: float
    per_channel: bool
    fixed_scale: float | None
    rule: str


class PointConfigs:
    """Applies overrides from general to specific, field by field, and remembers which ones matched.

    Args:
        qconfig: the defaults.
        overrides: the rules; the last one that matches wins.
    """

    def __init__(self, qconfig: QConfig, overrides: list[Override]) -> None:
        self.qconfig = qconfig
        self.overrides = overrides
        self.used_overrides: set[int] = set()

    def resolve(self, point: str, op_type: str, role: PointRole) -> PointConfig:
        """Return the configuration of a point.

        Args:
            point: its name.
            op_type: canonical kind of its op.
            role: what it quantizes.

        Raises:
            ConfigurationError: the rules leave it without what it needs.
        """
        activation, weight = self.qconfig.activation, self.qconfig.weight
        values: dict[str, Any] = {
            "scheme": "symmetric",
            "percentile": activation.percentile,
            "granularity": "per_tensor",
        }
        values |= {"threshold": None, "fixed_scale": None}
        values |= dataclasses.asdict(weight if role == "weight" else activation)
        rule = "default"
        for index, override in enumerate(self.overrides):
            change = override.weight if role == "weight" else override.activation
            if not override.selects(point, op_type) or change is None:
                continue
            self.used_overrides.add(index)
            given = {key: value for key, value in dataclasses.asdict(change).items() if value is not None}
            if "threshold" in given or "fixed_scale" in given:
                values |= {"threshold": None, "fixed_scale": None}
            values |= given
            rule = f"override {index + 1} ({override.label})"
        return _checked(point, values, rule)


def _checked(point: str, values: dict[str, Any], rule: str) -> PointConfig:
    fixed = values["fixed_scale"]
    if values["threshold"] is not None and values["dtype"] != "float32":
        dtype = quant_dtype(values["dtype"])
        fixed = values["threshold"] / (2 ** (dtype.bits - 1) if dtype.signed else 2**dtype.bits - 1)
    if values["observer"] == "fixed" and fixed is None and values["dtype"] != "float32":
        raise ConfigurationError(
            f"{point}: observer fixed needs a scale: write threshold: 100 or fixed_scale: 100/32768 beside it."
        )
    return PointConfig(
        dtype=values["dtype"],
        scheme=values["scheme"],
        observer=values["observer"],
        percentile=values["percentile"],
        per_channel=values["granularity"] == "per_channel",
        fixed_scale=fixed,
        rule=rule,
    )
