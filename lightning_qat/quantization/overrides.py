"""Rules that change the configuration of single points, from general to specific.

:mod:`~lightning_qat.quantization.planning.point_config` applies them, and
:mod:`~lightning_qat.quantization.planning.unmatched_overrides` says why a rule matches nothing.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_qat.quantization.config_values import (
    Granularity,
    ObserverChoice,
    SchemeChoice,
    build,
    check_values,
    positive_number,
)
from lightning_qat.quantization.errors import ConfigurationError, shown
from lightning_qat.quantization.numerics.dtypes import DtypeName
from lightning_qat.quantization.shares import count_of

LEADERS = "leaders"
"""``top`` of the points that have broken away from the rest."""


@dataclass
class Split:
    """Groups along an axis, each with its own scale. Use it where one scale for all would round small values away.

    Args:
        axis: the axis; a negative one counts from the end.
        sizes: lengths of the groups, in order; they add up to the length of the axis.

    Raises:
        ConfigurationError: there are fewer than two groups, or a value is not an int, or a size is not positive.

    Example:
        >>> Split(axis=0, sizes=[32, 96]).sizes
        [32, 96]
    """

    axis: int
    sizes: list[int]

    def __post_init__(self) -> None:
        whole = isinstance(self.sizes, (list, tuple)) and all(type(size) is int and size > 0 for size in self.sizes)
        if type(self.axis) is not int or not whole or len(self.sizes) < 2:
            raise ConfigurationError(
                "split needs an axis and the lengths of at least two groups along it, such as split: {axis: 0, sizes: "
                f"[32, 96]}}, got axis {self.axis!r} and sizes {self.sizes!r}."
            )
        self.sizes = list(self.sizes)


@dataclass
class ActivationOverride:
    """Fields to change for the activations an override matches; None means inherit.

    Args:
        dtype, observer, scheme, percentile: as in :class:`ActivationConfig`.
        threshold: largest magnitude to represent: the scale becomes ``threshold / 2**(bits-1)`` for signed types
            (``100`` gives ``100/32768`` for int16) and ``threshold / (2**bits - 1)`` for unsigned ones.
        fixed_scale: the scale itself, a number or an expression such as ``100/32768``.
        split: groups along an axis that each have their own scale: ``{axis: 0, sizes: [32, 96]}``.

    Raises:
        ConfigurationError: a value is not one of the choices, or two fields contradict each other.
    """

    dtype: DtypeName | None = None
    observer: ObserverChoice | None = None
    scheme: SchemeChoice | None = None
    percentile: float | None = None
    threshold: float | str | None = None
    fixed_scale: float | str | None = None
    split: Split | None = None

    def __post_init__(self) -> None:
        check_values(self, optional=True)
        if self.split is not None:
            self.split = build(Split, self.split, "split")
        if self.threshold is not None and self.fixed_scale is not None:
            raise ConfigurationError("give threshold or fixed_scale, not both: threshold is divided by the code range.")
        if self.split is not None and (self.threshold is not None or self.fixed_scale is not None):
            raise ConfigurationError(
                "split finds a scale for each group, but threshold and fixed_scale give one scale for all: write "
                "either split or one of these."
            )
        for name in ("threshold", "fixed_scale"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, positive_number(value, name))


@dataclass
class WeightOverride:
    """Fields to change for the weights an override matches; None means inherit.

    Args:
        dtype, observer, granularity, percentile: as in :class:`WeightConfig`.

    Raises:
        ConfigurationError: a value is not one of the choices.
    """

    dtype: DtypeName | None = None
    observer: ObserverChoice | None = None
    granularity: Granularity | None = None
    percentile: float | None = None

    def __post_init__(self) -> None:
        check_values(self, optional=True)


@dataclass
class Override:
    """A rule that changes the configuration of the points it selects. Later rules win, field by field.

    A rule selects by name or kind, or takes the first points of a sensitivity table. The table is read when the plan is
    made; the plan holds a rule with ``match`` for each point in its place.

    Args:
        match: glob over point names, where only ``*`` and ``?`` are special; a pattern that names an op or a scope
            covers all its points (``decoder.*``, ``layers.0.conv1``, ``*.ref_point*.input0``). Names are relative to
            the target. A pattern may begin with the target's path (``backbone.layers.0.*`` for target ``backbone``):
            it then applies to that target alone. If it matches nothing there, it is read as a relative name.
        op_type: canonical torch function (``softmax``). With ``match`` too, a point must satisfy both.
        activation: the changes for ``output`` and ``inputN`` points.
        weight: the changes for ``weight`` points.
        sensitivity: the path of a ``sensitivity.csv`` of this model, in place of ``match`` and ``op_type``. Of a table
            with epochs the last one counts.
        top: how many of its points, the most sensitive first: a count, a percentage such as ``"0.5%"`` (rounded up), or
            ``leaders`` (those that have broken away from the rest). Activations and weights are ranked together. Rows
            of a kind that the rule does not change (weights, if there is only ``activation``) do not count.

    Raises:
        ConfigurationError: there is no selector or there are two kinds, the rule changes nothing, or ``top`` is neither
            of the three.
    """

    match: str | None = None
    op_type: str | None = None
    activation: ActivationOverride | None = None
    weight: WeightOverride | None = None
    sensitivity: str | None = None
    top: int | str | None = None

    def __post_init__(self) -> None:
        if self.sensitivity is not None or self.top is not None:
            self._check_sensitivity()
        elif self.match is None and self.op_type is None:
            raise ConfigurationError('an override needs a selector: match: "decoder.*" or op_type: softmax.')
        for name, selector in (("match", self.match), ("op_type", self.op_type)):
            if selector is not None and not isinstance(selector, str):  # YAML reads match: 0 as a number
                raise ConfigurationError(f'{name} must be one text in quotes (such as {name}: "0"), got {selector!r}.')
        if self.activation is not None:
            self.activation = build(ActivationOverride, self.activation, f"activation of override {self.label}")
        if self.weight is not None:
            self.weight = build(WeightOverride, self.weight, f"weight of override {self.label}")
        changes = [change for change in (self.activation, self.weight) if change is not None]
        if all(value is None for change in changes for value in vars(change).values()):
            raise ConfigurationError(
                f"override {self.label} changes nothing: add activation: {{dtype: int16}} or weight: {{dtype: int16}}."
            )

    def _check_sensitivity(self) -> None:
        if not isinstance(self.sensitivity, str) or not self.sensitivity or self.top is None:
            raise ConfigurationError(
                'sensitivity and top belong together: write {sensitivity: logs/.../sensitivity.csv, top: "0.5%", '
                f"activation: {{dtype: int16}}}}, got sensitivity {shown(self.sensitivity)} and top {shown(self.top)}."
            )
        if self.match is not None or self.op_type is not None:
            raise ConfigurationError(
                f"override {self.label} has two kinds of selectors: write either sensitivity and top, or match and "
                "op_type."
            )
        if self.top == LEADERS:
            return
        text = str(self.top).strip()
        is_percentage = text.endswith("%") and count_of(text, 100, "top") <= 100
        if isinstance(self.top, bool) or not (is_percentage or text.isdecimal()):
            raise ConfigurationError(
                f"top must be a count of points such as 3, a percentage such as '0.5%', or {LEADERS}, not "
                f"{shown(self.top)}."
            )
        count_of(text, 100, "top")

    @property
    def label(self) -> str:
        """How reports name this rule."""
        if self.sensitivity is not None:
            return f"sensitivity {self.sensitivity!r}, top {self.top!r}"
        parts = [f"match {self.match!r}"] if self.match is not None else []
        parts += [f"op_type {self.op_type!r}"] if self.op_type is not None else []
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the rule as plans store it: all fields but those of a table, which no plan has."""
        return {name: value for name, value in asdict(self).items() if name not in ("sensitivity", "top")}

    @classmethod
    def list_of(cls, values: Iterable[Override | Mapping[str, Any]] | None) -> list[Override]:
        """Return a list of overrides from overrides or their dictionaries; an empty one for None.

        Raises:
            ConfigurationError: it is no list, or one of the rules is wrong.
        """
        if values is None:
            return []
        if isinstance(values, (Mapping, str)) or not isinstance(values, Iterable):
            raise ConfigurationError("overrides is a list: write - {match: ..., activation: {...}} for each rule.")
        return [build(cls, value, f"overrides[{i}]") for i, value in enumerate(values)]

    def selects(self, point: str, op_type: str) -> bool:
        """Whether the rule covers a point."""
        if self.op_type is not None and self.op_type != op_type:
            return False
        return self.match is None or glob_covers(self.match, point)

    def names_exactly(self, point: str) -> bool:
        """Whether the rule names this point or its op in full, without wildcards."""
        return self.match is not None and self.match in (point, point.rpartition(".")[0])


def glob_covers(pattern: str, name: str) -> bool:
    """Whether a glob matches a dotted name or one of its dotted prefixes; only ``*`` and ``?`` are special.

    Example:
        >>> glob_covers("decoder", "decoder.add_0.output"), glob_covers("dec", "decoder.add_0.output")
        (True, False)
    """
    return _glob(pattern).fullmatch(name) is not None


def yaml_name(name: str) -> str:
    """Quote a name for YAML to paste.

    Example:
        >>> print(yaml_name("layers.0.conv1"), yaml_name('say "hi".weight'))
        "layers.0.conv1" "say \\"hi\\".weight"
    """
    return json.dumps(name, ensure_ascii=False)  # whose escapes YAML knows


@functools.lru_cache(maxsize=4096)  # planning asks for every rule at every point
def _glob(pattern: str) -> re.Pattern[str]:
    body = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    return re.compile(rf"{body}(\..*)?", flags=re.DOTALL)
