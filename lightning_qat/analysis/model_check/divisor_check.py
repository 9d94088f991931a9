"""Divisors, and operands of logarithms and roots, that are never zero in float and become zero by rounding."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lightning_qat.analysis.model_check.checked_region import CheckedRegion
from lightning_qat.analysis.model_check.divided_values import LEAST_DIVISOR_PRECISION, zeros_divided_by
from lightning_qat.analysis.model_check.finding import Finding, overrides_yaml, shortened
from lightning_qat.analysis.model_check.model_check_result import Section
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.numerics.dtypes import quant_dtype
from lightning_qat.quantization.overrides import yaml_name
from lightning_qat.quantization.region.effective_dtypes import bits


def check_divisors(checked: CheckedRegion) -> tuple[list[Finding], list[Section]]:
    """Find points whose smallest values become zero although an op divides by them, or takes a logarithm or root."""
    return list(_zero_divisors(checked)), []


def _zero_divisors(checked: CheckedRegion) -> Iterable[Finding]:
    smallest: dict[str, tuple[float, float]] = {}
    rules: list[str] = []
    uses = zeros_divided_by(checked.region)
    for name, plan in checked.plan.by_name.items():
        point = checked.points[name]
        if name not in uses or plan.same_as is not None or point.scale_source is None or not point.enabled:
            continue
        if (found := _rounded_to_zero(point)) is None:
            continue
        nearest, largest, step = found
        smallest[name] = (nearest, step)
        rounding = largest / quant_dtype("int16").quant_max / 2
        if bits(point.dtype) < 16 and rounding <= LEAST_DIVISOR_PRECISION * nearest:
            rules.append(f"match: {yaml_name(name)}, activation: {{dtype: int16}}")
            continue
        # without a rule for the op that reads it, that op would quantize a float result by itself
        inputs = [f"{use.reader}.input{use.operand}" for use in uses[name]]
        rules += [
            f"match: {yaml_name(point_name)}, activation: {{dtype: float32}}"
            for point_name in dict.fromkeys((name, *inputs))
        ]
    if not smallest:
        return
    names = tuple(smallest)
    nearest, step = smallest[names[0]]
    dividing = tuple(dict.fromkeys(use.dividing for name in names for use in uses[name]))
    yield Finding(
        severity="warning",
        kind="zero divisor",
        names=names,
        what=f"{shortened(names)}: the smallest values become zero. At {names[0]} the smallest is {nearest:.3g}, and "
        f"the step is {step:.3g}. {shortened(dividing)} divides by them, or takes their logarithm or root.",
        why="In float none of them is zero. Quantized, the result or its derivative is infinite. Even where that is "
        "clipped again, the gradient is NaN. Clipped by their norm, all gradients are NaN, and then all weights.",
        action="Give these points a type that tells the smallest value from zero, or, in the model, clamp them to at "
        "least one step.",
        yaml=overrides_yaml(dict.fromkeys(rules)),
    )


def _rounded_to_zero(point: FakeQuantize) -> tuple[float, float, float] | None:
    """Return the observed value nearest to zero, the largest one and the step, of the first scale that loses it.

    Only where all values have one sign: of others, it is not known how close to zero they come.
    """
    if not point.statistics.count:
        return None
    low, high = (end.double() for end in point.statistics.range)
    scale = point.scale.detach().double().reshape(-1).to(low.device)
    nearest: Tensor = low.clamp(min=0) + (-high).clamp(min=0)
    # half a step is a tie, and ties round to the even code: zero
    lost = ((low > 0) | (high < 0)) & (nearest <= scale / 2)
    if not bool(lost.any()):
        return None
    index = int(lost.nonzero()[0])
    largest = float(low.abs().maximum(high.abs())[index])
    return float(nearest[index]), largest, float(scale.expand_as(nearest)[index])
