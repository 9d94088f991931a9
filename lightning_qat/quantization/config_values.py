"""Checking the values of a configuration: closed sets, bounds, numbers, and mappings that become dataclasses."""

from __future__ import annotations

import ast
import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

from lightning_qat.quantization.errors import ConfigurationError, shown, unknown_choice
from lightning_qat.quantization.numerics.dtypes import DtypeName
from lightning_qat.quantization.numerics.observers import ObserverName
from lightning_qat.quantization.numerics.percentile import check_percentile

Scheme = Literal["symmetric", "affine"]
Granularity = Literal["per_tensor", "per_channel"]
SchemeChoice = Literal["auto", Scheme]
ObserverChoice = Literal["auto", ObserverName]
"""What a configuration may ask for; ``auto`` depends on the type: see ``planning/point_config.py``."""
_T = TypeVar("_T")

_CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": get_args(DtypeName),
    "observer": get_args(ObserverChoice),
    "scheme": get_args(SchemeChoice),
    "granularity": get_args(Granularity),
}


def check_values(config: object, optional: bool = False) -> None:
    """Refuse values outside the closed sets, and None unless the fields are ``optional``.

    Raises:
        ConfigurationError: a value is not one of the choices.
    """
    for name, value in vars(config).items():
        if value is None and optional:
            continue
        if name in _CHOICES and value not in _CHOICES[name]:
            raise unknown_choice(name, value, _CHOICES[name])
        if name == "percentile":
            check_percentile(value)


def build(cls: type[_T], value: Any, where: str) -> _T:
    """Build a dataclass from a mapping of its fields; an instance is returned as it is.

    Args:
        cls: the dataclass.
        value: the mapping, or an instance.
        where: the place in the configuration, for messages.

    Raises:
        ConfigurationError: it is no mapping, a key is unknown (the message shows near names) or one is missing.
    """
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{where} must be a mapping such as {{dtype: int8}}, got {shown(value)}.")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in value:
        if key not in fields:
            raise unknown_choice(f"key in {where}:", key, fields)
    for name, f in fields.items():
        if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigurationError(f"{where}: {name!r} is missing.")
    return cls(**value)


def positive_number(value: float | int | str, name: str) -> float:
    """Read a positive number or an arithmetic expression of numbers.

    Args:
        value: the number or the expression.
        name: the name of the option, for messages.

    Raises:
        ConfigurationError: it is neither, or not positive and finite.

    Example:
        >>> positive_number("100/32768", "fixed_scale")
        0.0030517578125
    """
    try:
        if isinstance(value, str):
            number = _evaluate(ast.parse(value.strip(), mode="eval").body)
        else:
            number = math.nan if isinstance(value, bool) else float(value)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ConfigurationError(
            f"{name} {shown(value)} is not a number or an expression such as 100/32768."
        ) from error
    if not (math.isfinite(number) and number > 0):
        raise ConfigurationError(f"{name} must be a positive number, got {shown(value)}.")
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
