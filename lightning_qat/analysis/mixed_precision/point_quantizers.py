"""The fake-quants of a region's points at several types, from one calibration."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.fake_quant.fake_quant_dict import fake_quant_of
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.numerics.dtypes import quant_dtype
from lightning_qat.quantization.planning.hardware_profile import HardwareProfile
from lightning_qat.quantization.planning.make_plan import make_plans
from lightning_qat.quantization.planning.plan import PointPlan, QuantPlan
from lightning_qat.quantization.qconfig import QConfig
from lightning_qat.quantization.region.effective_dtypes import FLOAT, EffectiveDtypes, bits, widest
from lightning_qat.quantization.region.region import Region

Quantizers = dict[str, dict[str, FakeQuantize]]
"""By point, then by type, the narrowest first."""


def ordered_dtypes(dtypes: Sequence[str]) -> tuple[str, ...]:
    """Return types from the narrowest to the widest, each once.

    Raises:
        ConfigurationError: there are fewer than two, or one is no quantized type.

    Example:
        >>> ordered_dtypes(["int16", "int8"])
        ('int8', 'int16')
    """
    given = [dtypes] if isinstance(dtypes, str) else dtypes
    found = tuple(sorted(dict.fromkeys(quant_dtype(dtype).name for dtype in given), key=bits))
    if len(found) < 2:
        raise ConfigurationError(f"dtypes must name at least two types, such as ('int8', 'int16'), not {dtypes!r}.")
    return found


def plans_by_dtype(
    regions: Mapping[str, Region], dtypes: Sequence[str], profile: HardwareProfile | None = None
) -> dict[str, dict[str, QuantPlan]]:
    """Plan regions once for each type, as if it were the default of all points.

    Overrides of the user stay in effect, so points that they give a type keep it.

    Args:
        regions: all regions of a model by the path of their target: overrides may begin with it. The graph, defaults
            and overrides of each are used.
        dtypes: the types.
        profile: the hardware the regions were planned for.

    Returns:
        By region, then by type.
    """
    graphs = {path: region.graph for path, region in regions.items()}
    plans: dict[str, dict[str, QuantPlan]] = {path: {} for path in regions}
    made: dict[str, dict[str, QuantPlan]] = {}  # mostly all regions have one configuration
    for path, region in regions.items():
        for dtype in dtypes:
            qconfig, overrides = QConfig.of(copy.deepcopy(region.plan.qconfig)), region.plan.overrides
            qconfig.activation.dtype = qconfig.weight.dtype = dtype  # type: ignore[assignment]
            key = repr((qconfig, overrides))
            if key not in made:
                made[key] = make_plans(graphs, qconfig, overrides, profile)
            plans[path][dtype] = made[key][path]
    return plans


def quantizers_by_dtype(region: Region, plans: Mapping[str, QuantPlan]) -> Quantizers:
    """Make the fake-quants of all calibrated points for each type, from the statistics that calibration kept.

    The fake-quant that a point has now serves its own type. A point is missing at a type if its overrides or the
    hardware give it another one there. At a type that no reader takes it has the fake-quant of the type that they do.

    Args:
        region: a calibrated region. Only statistics of weights that a checkpoint left out are taken again.
        plans: those of this region that :func:`plans_by_dtype` returns.
    """
    region.scales.refresh_weights()
    region.scales.observe_weights_again()
    points = region.points
    found: Quantizers = {}
    for own in region.plan.points:
        present = points[own.name]
        if own.same_as is not None or present.scale_source is None:
            continue
        at: dict[str, FakeQuantize] = {}
        for plan in plans.values():
            planned = plan.by_name.get(own.name)
            if planned is None or not _same_place(own, planned) or planned.dtype in at:
                continue
            if planned.dtype == present.dtype:
                at[planned.dtype] = present
            elif (made := _calibrated(planned, present)) is not None:
                at[planned.dtype] = made
        found[own.name] = at
    for plan in plans.values():
        for point, dtype in _read_back(region, plan).items():
            types = found.get(point, {})
            if dtype in types:
                types[plan.by_name[point].dtype] = types[dtype]
    return found


def _read_back(region: Region, plan: QuantPlan) -> dict[str, str]:
    """Return the outputs that no reader takes in their type, with the type in which they are read.

    Where the hardware cannot read a wide type, the planner quantizes the tensor once more at each reader. If all
    readers do so, raising the point gains nothing. Readers whose point the region has already are measured on their
    own.
    """
    effective = EffectiveDtypes(region.graph, plan)
    readers: dict[str, list[str]] = {}
    for op in region.graph.ops:
        operands = [] if plan.status[op.name].status == "passes" else op.operands
        for operand in (operand for operand in operands if operand.is_float):
            own = effective.point_of(op, operand)
            converts = own is not None and own not in region.plan.by_name
            read = plan.by_name[own].dtype if converts and own is not None else FLOAT
            for origin in effective.origins(operand.sources):
                readers.setdefault(f"{origin.name}.output", []).append(read)
    for output in region.graph.outputs:
        for origin in effective.origins(output.sources):
            readers.setdefault(f"{origin.name}.output", []).append(FLOAT)
    found = {point: widest(read) for point, read in readers.items() if point in plan.by_name}
    return {point: dtype for point, dtype in found.items() if bits(dtype) < bits(plan.by_name[point].dtype)}


def types_without_scale(region: Region, plans: Mapping[str, QuantPlan]) -> dict[str, tuple[str, ...]]:
    """Return the types, the narrowest first, of the points that calibration gave no scale.

    It saw nothing there but zeros, or nothing at all. Such a point rounds nothing, whatever its type; training gives it
    a scale, and the points that the hardware ties to it depend on its type already now.

    Args:
        region: a calibrated region.
        plans: those of this region that :func:`plans_by_dtype` returns.
    """
    found = {}
    for own in region.plan.points:
        if own.same_as is None and region.points[own.name].scale_source is None:
            planned = (plan.by_name.get(own.name) for plan in plans.values())
            found[own.name] = tuple(dict.fromkeys(p.dtype for p in planned if p is not None and _same_place(own, p)))
    return found


def quantizers_of_regions(
    regions: Mapping[str, Region], plans: Mapping[str, Mapping[str, QuantPlan]]
) -> dict[str, Quantizers]:
    """Make the fake-quants of all calibrated points of all regions for each type.

    Args:
        regions: all regions of a model, calibrated, by the path of their target.
        plans: what :func:`plans_by_dtype` returns.

    Raises:
        ConfigurationError: nothing is calibrated.
    """
    quantizers = {path: quantizers_by_dtype(region, plans[path]) for path, region in regions.items()}
    if not any(quantizers.values()):
        raise ConfigurationError("no point has a scale: calibrate the region before measuring errors.")
    return quantizers


def dtypes_of(quantizers: Quantizers) -> list[str]:
    """Return the types that points have, each once, the narrowest first.

    Example:
        >>> dtypes_of({"a": {"int8": FakeQuantize("int8")}, "b": {"int4": FakeQuantize("int4")}})
        ['int4', 'int8']
    """
    return sorted(dict.fromkeys(dtype for own in quantizers.values() for dtype in own), key=bits)


def at_dtype(quantizers: Quantizers, dtype: str) -> dict[str, FakeQuantize]:
    """Return the fake-quants of a type; of a point that does not have it, those of :func:`type_for` it."""
    return {point: own[type_for(dtype, own)] for point, own in quantizers.items() if own}


def type_for(dtype: str, available: Iterable[str]) -> str:
    """Return the type that a point has where others have ``dtype``: its next wider one, or else its widest.

    Args:
        dtype: a type.
        available: the types of the point, the narrowest first; at least one.

    Example:
        >>> type_for("int4", ["int8", "int16"]), type_for("int16", ["int4", "int8"])
        ('int8', 'int8')
    """
    types = list(available)
    if dtype in types:
        return dtype
    return next((own for own in types if bits(own) >= bits(dtype)), types[-1])


def _same_place(one: PointPlan, other: PointPlan) -> bool:
    """Whether two plans quantize the same tensor with scales of the same shape."""
    fields = ("op", "role", "operand", "axis", "channels", "split_sizes", "groups", "batch_norm", "same_as")
    return all(getattr(one, field) == getattr(other, field) for field in fields)


@torch.no_grad()
def _calibrated(planned: PointPlan, present: FakeQuantize) -> FakeQuantize | None:
    """A fake-quant as planned, with the statistics of the present one; None if these say nothing."""
    made = fake_quant_of(planned).to(present.scale.device)
    made.statistics = present.statistics  # only read
    if made.fixed_scale is not None:
        return made
    if not present.statistics.count or present.starts_at_zero:
        return None
    keeps_method = present.scale_source != "fixed" and planned.observer == present.observer
    made.compute_scale(present.scale_source if keeps_method else None)
    return made
