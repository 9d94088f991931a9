"""The configuration of one quantization point, from the defaults and the overrides."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.numerics.dtypes import is_float, quant_dtype
from lightning_qat.quantization.overrides import ActivationOverride, Override, Split, WeightOverride
from lightning_qat.quantization.planning.plan import PointRole
from lightning_qat.quantization.qconfig import QConfig


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
        split: one scale for each of these groups along an axis.
        rule: a text that names the last rule that changed it.
    """

    dtype: str
    scheme: str
    observer: str
    percentile: float
    per_channel: bool
    fixed_scale: float | None
    split: Split | None
    rule: str

    def split_sizes(self, point: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the lengths of the groups along ``split.axis`` that have a scale each, if there are any.

        Args:
            point: name of the point, for the message.
            shape: shape of the tensor, as traced.

        Raises:
            ConfigurationError: the tensor has no such axis, or the groups do not add up to its length.
        """
        if self.split is None:
            return None
        axis, sizes = self.split.axis, self.split.sizes
        if not -len(shape) <= axis < len(shape):
            problem = f"has no axis {axis}: write one from {-len(shape)} to {len(shape) - 1}"
        elif sum(sizes) != shape[axis]:
            problem = (
                f"has {shape[axis]} channels along axis {axis}, and the sizes {sizes} add up to {sum(sizes)}: write "
                f"sizes that add up to {shape[axis]}"
            )
        else:
            return tuple(sizes)
        raise ConfigurationError(f"split of {point} ({self.rule}): its tensor of shape {shape} {problem}.")


@dataclasses.dataclass(frozen=True)
class FirstUse:
    """The first use of a parameter that other ops use too.

    Args:
        point: its weight point.
        op_type: canonical kind of its op.
    """

    point: str
    op_type: str


class PointConfigs:
    """Applies overrides from general to specific, field by field, and remembers which ones matched.

    A rule that names a weight holds for the later uses of the parameter too, up to the first rule that covers only one
    of the two: the name stands for the quantizer that they share.

    Args:
        qconfig: the defaults.
        overrides: the rules; the last one that matches wins.

    Attributes:
        used_overrides: numbers of the rules that matched a point.
        first_uses: for a weight that could share the quantizer of an earlier use: that use.
    """

    def __init__(self, qconfig: QConfig, overrides: list[Override]) -> None:
        self.qconfig = qconfig
        self.overrides = overrides
        self.used_overrides: set[int] = set()
        self.first_uses: dict[str, FirstUse] = {}

    def resolve(
        self, point: str, op_type: str, role: PointRole, required: Mapping[str, Any] | None = None
    ) -> PointConfig:
        """Return the configuration of a point.

        Args:
            point: its name.
            op_type: canonical kind of its op.
            role: ``output``, ``weight`` or ``input``.
            required: fields that the hardware decides.

        Raises:
            ConfigurationError: the observer is ``fixed``, and no rule gives a scale.
        """
        defaults = self.qconfig.weight if role == "weight" else self.qconfig.activation
        values: dict[str, Any] = {
            "scheme": "symmetric",  # of weights
            "granularity": "per_tensor",
            **_NO_GIVEN_SCALE,
            **vars(defaults),
        }
        rule = "default"
        for index, change in self._changes(point, op_type, role):
            self.used_overrides.add(index)
            given = {key: value for key, value in vars(change).items() if value is not None}
            if given.keys() & _NO_GIVEN_SCALE.keys():
                values |= _NO_GIVEN_SCALE  # of these the last rule's holds
            values |= given
            rule = self._in_words(index)
        return _checked(point, values | dict(required or {}), rule, is_weight=role == "weight")

    def is_float(self, point: str, op_type: str, role: PointRole) -> bool:
        """Whether the rules leave a point in float32. Unlike :meth:`resolve` it counts as no use of a rule."""
        defaults = self.qconfig.weight if role == "weight" else self.qconfig.activation
        given = [change.dtype for _, change in self._changes(point, op_type, role) if change.dtype is not None]
        return (given[-1] if given else defaults.dtype) == "float32"

    def explicit_rule(self, field: str, point: str, op_type: str, role: PointRole) -> str | None:
        """Return a text that names the override that decides a field of a point; None if the default does.

        A rule for the first use of a parameter asks for nothing at a later one, where the hardware may be another.
        """
        changes = self._changes(point, op_type, role)
        deciding = [
            index
            for index, change in changes
            if getattr(change, field) is not None and self.overrides[index].selects(point, op_type)
        ]
        return self._in_words(deciding[-1]) if deciding else None

    def _changes(
        self, point: str, op_type: str, role: PointRole
    ) -> Iterator[tuple[int, ActivationOverride | WeightOverride]]:
        """What the overrides that cover a point change, with their numbers."""
        first = self.first_uses.get(point) if role == "weight" else None
        for index, override in enumerate(self.overrides):
            change = override.weight if role == "weight" else override.activation
            if change is None:
                continue
            selects = override.selects(point, op_type)
            if first is not None and override.selects(first.point, first.op_type) != selects:
                if selects or not override.names_exactly(first.point):
                    first = None  # from here on the two differ
                else:
                    selects = True
            if selects:
                yield index, change

    def _in_words(self, index: int) -> str:
        return f"override {index + 1} ({self.overrides[index].label})"


_NO_GIVEN_SCALE = {"threshold": None, "fixed_scale": None, "split": None}


def _checked(point: str, values: dict[str, Any], rule: str, is_weight: bool) -> PointConfig:
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
        scheme=_scheme(values["scheme"], "float32" if fixed is not None else values["dtype"]),
        observer=_observer(values["observer"], values["dtype"], is_weight),
        percentile=values["percentile"],
        per_channel=values["granularity"] == "per_channel",
        fixed_scale=fixed,
        split=values["split"],
        rule=rule,
    )


FEW_BITS = 4
"""Up to here ``scheme: auto`` is affine. Measured: tests/benchmarks/accuracy.md."""


def _scheme(chosen: str, dtype: str) -> str:
    """What ``auto`` means: affine for narrow signed types whose scale is not given."""
    if chosen != "auto":
        return chosen
    found = None if is_float(dtype) else quant_dtype(dtype)
    return "affine" if found is not None and found.signed and found.bits <= FEW_BITS else "symmetric"


def _observer(chosen: str, dtype: str, is_weight: bool) -> str:
    """What ``auto`` means: of a weight of 2 bits, whose codes are -1, 0 and 1, a range up to the largest value would
    leave little but zeros."""
    if chosen != "auto":
        return chosen
    return "mse" if not is_weight or (not is_float(dtype) and quant_dtype(dtype).bits == 2) else "minmax"
