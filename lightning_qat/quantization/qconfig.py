"""What the user asks for: one default for activations and weights, and overrides from general to specific.

Plain dataclasses, so that LightningCLI shows and validates them. Wrong values raise :class:`ConfigurationError` when
the object is built, with a sentence that says what to write.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from lightning_qat.quantization.errors import ConfigurationError, unknown_choice
from lightning_qat.quantization.numerics.dtypes import DtypeName
from lightning_qat.quantization.numerics.observers import ObserverName
from lightning_qat.quantization.numerics.percentile import DEFAULT_PERCENTILE, check_percentile

Scheme = Literal["symmetric", "affine"]
Granularity = Literal["per_tensor", "per_channel"]

# jsonargparse resolves these annotations at run time on Python 3.10 too, hence Optional/Union instead of "|".


@dataclass
class ActivationConfig:
    """How activations are quantized by default.

    Args:
        dtype: ``int2`` ... ``int16``, ``uint2`` ... ``uint16``, or ``float32`` for not at all.
        observer: how calibration turns statistics into a scale.
        scheme: ``symmetric`` (zero point 0) or ``affine``.
        percentile: share of the values, in percent, that the ``percentile`` observer keeps inside the range.

    Raises:
        ConfigurationError: a value is not one of the choices.
    """

    dtype: DtypeName = "int8"
    observer: ObserverName = "mse"
    scheme: Scheme = "symmetric"
    percentile: float = DEFAULT_PERCENTILE

    def __post_init__(self) -> None:
        _check_values(self)


@dataclass
class WeightConfig:
    """How weights are quantized by default: symmetric codes, ``-127..127`` for int8.

    Args:
        dtype: as for activations.
        observer: as for activations.
        granularity: one scale per output channel, or one for the whole tensor.
        percentile: as for activations, of the values that share a scale: a channel of 64 values has no value beyond
            99.99 %.

    Raises:
        ConfigurationError: a value is not one of the choices.
    """

    dtype: DtypeName = "int8"
    observer: ObserverName = "minmax"
    granularity: Granularity = "per_channel"
    percentile: float = DEFAULT_PERCENTILE

    def __post_init__(self) -> None:
        _check_values(self)


@dataclass
class QConfig:
    """The defaults for every point of a region.

    Args:
        activation: for inputs and outputs of ops; a mapping of its fields will do.
        weight: for weights; a mapping of its fields will do.

    Raises:
        ConfigurationError: a key or value is unknown.

    Example:
        >>> QConfig.of({"activation": {"dtype": "int16"}}).activation.dtype
        'int16'
    """

    activation: ActivationConfig = field(default_factory=ActivationConfig)
    weight: WeightConfig = field(default_factory=WeightConfig)

    def __post_init__(self) -> None:
        self.activation = _build(ActivationConfig, self.activation, "qconfig.activation")
        self.weight = _build(WeightConfig, self.weight, "qconfig.weight")

    @classmethod
    def of(cls, value: QConfig | Mapping[str, Any] | None) -> QConfig:
        """Accept a QConfig, its dictionary or None (the defaults: int8, MSE activations, per-channel weights)."""
        return _build(cls, value, "qconfig") if value is not None else cls()


@dataclass
class Split:
    """Groups along an axis that get a scale each: for data whose small values one scale would round away.

    Args:
        axis: the axis, negative ones count from the end.
        sizes: lengths of the groups, in order; they add up to the length of the axis.

    Raises:
        ConfigurationError: there are not two groups, or one is empty.

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
        split: one scale for each of several groups along an axis: ``{axis: 0, sizes: [32, 96]}``.

    Raises:
        ConfigurationError: a value is not one of the choices, or two fields contradict each other.
    """

    dtype: DtypeName | None = None
    observer: ObserverName | None = None
    scheme: Scheme | None = None
    percentile: float | None = None
    threshold: float | str | None = None
    fixed_scale: float | str | None = None
    split: Split | None = None

    def __post_init__(self) -> None:
        _check_values(self, optional=True)
        if self.split is not None:
            self.split = _build(Split, self.split, "split")
        if self.threshold is not None and self.fixed_scale is not None:
            raise ConfigurationError("give threshold or fixed_scale, not both: threshold is divided by the code range.")
        if self.split is not None and (self.threshold is not None or self.fixed_scale is not None):
            raise ConfigurationError(
                "split finds a scale for each group, threshold and fixed_scale give one scale: write one of the two."
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
    observer: ObserverName | None = None
    granularity: Granularity | None = None
    percentile: float | None = None

    def __post_init__(self) -> None:
        _check_values(self, optional=True)


@dataclass
class Override:
    """A rule that changes the configuration of the points it selects. Later rules win, field by field.

    Args:
        match: glob over point names, where only ``*`` and ``?`` are special; a pattern that names an op or a scope
            covers all its points (``decoder.*``, ``layers.0.conv1``, ``*.ref_point*.input0``). Names are relative to
            the target. Spelled with the target's path in front (``backbone.layers.0.*`` for target ``backbone``), the
            pattern is about that target alone; if it matches nothing there, it is read as relative after all.
        op_type: canonical torch function (``softmax``); with ``match``, both must hold.
        activation: what changes for ``output`` and ``inputN`` points.
        weight: what changes for ``weight`` points.

    Raises:
        ConfigurationError: neither selector or no change is given.
    """

    match: str | None = None
    op_type: str | None = None
    activation: ActivationOverride | None = None
    weight: WeightOverride | None = None

    def __post_init__(self) -> None:
        if self.match is None and self.op_type is None:
            raise ConfigurationError('an override needs a selector: match: "decoder.*" or op_type: softmax.')
        for name, selector in (("match", self.match), ("op_type", self.op_type)):
            if selector is not None and not isinstance(selector, str):  # YAML reads match: 0 as a number
                raise ConfigurationError(f'{name} is one text, in quotes (such as {name}: "0"), got {selector!r}.')
        if self.activation is not None:
            self.activation = _build(ActivationOverride, self.activation, f"activation of override {self.label}")
        if self.weight is not None:
            self.weight = _build(WeightOverride, self.weight, f"weight of override {self.label}")
        changes = [change for change in (self.activation, self.weight) if change is not None]
        if all(value is None for change in changes for value in vars(change).values()):
            raise ConfigurationError(
                f"override {self.label} changes nothing: add activation: {{dtype: int16}} or weight: {{dtype: int16}}."
            )

    @property
    def label(self) -> str:
        """How reports name this rule."""
        parts = [f"match {self.match!r}"] if self.match is not None else []
        parts += [f"op_type {self.op_type!r}"] if self.op_type is not None else []
        return ", ".join(parts)

    @classmethod
    def list_of(cls, values: Iterable[Override | Mapping[str, Any]] | None) -> list[Override]:
        """Accept overrides or their dictionaries; None is no override."""
        if values is None:
            return []
        if isinstance(values, (Mapping, str)) or not isinstance(values, Iterable):
            raise ConfigurationError("overrides is a list: write - {match: ..., activation: {...}} for each rule.")
        return [_build(cls, value, f"overrides[{i}]") for i, value in enumerate(values)]

    def selects(self, point: str, op_type: str) -> bool:
        """Whether the rule covers a point."""
        if self.op_type is not None and self.op_type != op_type:
            return False
        return self.match is None or glob_covers(self.match, point)

    def names_exactly(self, point: str) -> bool:
        """Whether the rule spells out this point or its op, without wildcards."""
        return self.match is not None and self.match in (point, point.rpartition(".")[0])


def glob_covers(pattern: str, name: str) -> bool:
    """Whether a glob matches a dotted name or one of its dotted prefixes; only ``*`` and ``?`` are special.

    Example:
        >>> glob_covers("decoder", "decoder.add_0.output"), glob_covers("dec", "decoder.add_0.output")
        (True, False)
    """
    return _glob(pattern).fullmatch(name) is not None


def positive_number(value: float | int | str, name: str) -> float:
    """Read a positive number or an arithmetic expression of numbers.

    Example:
        >>> positive_number("100/32768", "fixed_scale")
        0.0030517578125
    """
    try:
        if isinstance(value, str):
            number = _evaluate(ast.parse(value.strip(), mode="eval").body)
        else:
            number = math.nan if isinstance(value, bool) else float(value)
    except (SyntaxError, ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise ConfigurationError(f"{name} {value!r} is not a number or an expression such as 100/32768.") from error
    if not (math.isfinite(number) and number > 0):
        raise ConfigurationError(f"{name} must be a positive number, got {value!r}.")
    return number


_OPERATORS: dict[type[ast.operator], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def _evaluate(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return float(node.value)  # floats overflow instead of growing without bound
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return float(_OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right)))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand)
    raise ValueError("not arithmetic")


@functools.lru_cache(maxsize=4096)  # planning asks for every rule at every point
def _glob(pattern: str) -> re.Pattern[str]:
    body = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    return re.compile(rf"{body}(\..*)?", flags=re.DOTALL)


_CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": get_args(DtypeName),
    "observer": get_args(ObserverName),
    "scheme": get_args(Scheme),
    "granularity": get_args(Granularity),
}


def _check_values(config: object, optional: bool = False) -> None:
    """Refuse values outside the closed sets; None too unless the fields are ``optional``."""
    for name, value in vars(config).items():
        if value is None and optional:
            continue
        if name in _CHOICES and value not in _CHOICES[name]:
            raise unknown_choice(name, value, _CHOICES[name])
        if name == "percentile":
            check_percentile(value)


_T = TypeVar("_T")


def _build(cls: type[_T], value: Any, where: str) -> _T:
    """Build a dataclass from a mapping of its fields; unknown keys are named, with near ones."""
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{where} must be a mapping such as {{dtype: int8}}, got {value!r}.")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in value:
        if key not in fields:
            raise unknown_choice(f"key in {where}:", key, fields)
    for name, f in fields.items():
        if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigurationError(f"{where}: {name!r} is missing.")
    return cls(**value)
