"""One thing to do about a point: in words, as YAML to paste, and what the error will be.

Predictions use the error of a step ``s`` that values hit evenly, ``s / sqrt(12)`` (root mean square). A remedy promises
half of the predicted factor: real values do not hit a step evenly, and observers do not use the whole range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lightning_qat.analysis.comparison.point_evidence import PointEvidence
from lightning_qat.quantization.overrides import yaml_name

WORTHWHILE = 4.0
"""A remedy is offered if it promises two bits: less is lost in the noise of the next calibration."""
INT8_MAX, INT16_MAX = 127, 32767


@dataclass(frozen=True)
class Remedy:
    """One thing to do about a point.

    Args:
        action: a sentence that says what to do.
        yaml: the override to paste; empty if it takes more than that.
        factor: the point's root mean square error (relative to every single value if ``relative``) falls at least by
            this factor; None if that cannot be told.
        relative: see ``factor``.
        after: the error after it, relative to the values; None if that cannot be told.
        outcome: a sentence that says what the error falls to.
    """

    action: str
    yaml: str = ""
    factor: float | None = None
    relative: bool = False
    after: float | None = None
    outcome: str = ""


def predicted(
    e: PointEvidence, action: str, yaml: str, error: float, how: Literal["predicted", "measured"] = "predicted"
) -> Remedy:
    """Make a remedy whose root mean square error is known.

    Args:
        e: the point.
        action: what to do.
        yaml: what to paste.
        error: root mean square error after it.
        how: whether it was predicted from what was seen, or tried.
    """
    after = error / e.size if e.size else 0.0
    outcome = f"Its relative error falls from {percent(e.relative_error)} to {percent(after)} ({how})."
    return Remedy(action, yaml, promised(e, error), after=after, outcome=outcome if after < e.relative_error else "")


def override(point: str, is_weight: bool, **fields: object) -> str:
    """Format an override.

    Example:
        >>> print(override("div_0.input1", False, dtype="int16", fixed_scale="100/32768"))
        overrides:
          - {match: "div_0.input1", activation: {dtype: int16, fixed_scale: 100/32768}}
    """
    inner = ", ".join(f"{key}: {_flow(value)}" for key, value in fields.items())
    return f"overrides:\n  - {{match: {yaml_name(point)}, {'weight' if is_weight else 'activation'}: {{{inner}}}}}"


def percent(share: float) -> str:
    """Format a share for a sentence.

    Example:
        >>> percent(0.031), percent(1.0), percent(0.000123)
        ('3.1 %', '100 %', '0.012 %')
    """
    return f"{100 * share:.2g} %" if abs(share) < 0.995 else f"{100 * share:.3g} %"


def rounded_up(value: float, digits: int = 3) -> float:
    """Round up to some significant digits.

    Example:
        >>> rounded_up(3.14159), rounded_up(86.6)
        (3.15, 86.6)
    """
    if value <= 0 or not math.isfinite(value):
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.{digits}g}")


def promised(e: PointEvidence, after: float) -> float | None:
    """Return the factor by which the error falls at least, given the predicted one; None if it does not."""
    factor = math.floor(e.error / after / 2) if after else 0
    return float(factor) if factor > 1 else None


def _flow(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    return str(value)
