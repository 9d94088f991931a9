"""Reading what a checkpoint holds of a region. All of it is checked before anything of the region is changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from lightning_qat.quantization.fake_quant.fake_quant_dict import key_of
from lightning_qat.quantization.numerics.dtypes import QuantizedDtypeName, quant_dtype
from lightning_qat.quantization.numerics.observers import ObserverName
from lightning_qat.quantization.numerics.scales import MAX_SCALE, MIN_SCALE
from lightning_qat.quantization.numerics.stored_statistics import check_statistics, numbers
from lightning_qat.quantization.planning.plan import PointPlan, QuantPlan
from lightning_qat.quantization.planning.plan_compatibility import damaged, read_extra_state
from lightning_qat.quantization.reading.checks import AT_LEAST_ZERO, one_of
from lightning_qat.quantization.reading.plain_values import UnreadableValueError
from lightning_qat.quantization.reading.schema import read_as
from lightning_qat.quantization.tracing.op_graph import OpGraph

EXTRA_STATE = "_extra_state"
_MOST = 3.5e38
"""Beyond every float32."""


class StateReader:
    """Reads the extra state of one region. What was checked together with the scales is not read a second time."""

    def __init__(self) -> None:
        self._checked: tuple[Any, OpGraph, QuantPlan] | None = None

    def take(self, state: Any, graph: OpGraph, plan: QuantPlan) -> None:
        """Take what :func:`read_region` has read and checked of this extra state, so that loading reads it no more."""
        self._checked = (state, graph, plan)

    def check(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Check a whole state_dict, if it has an extra state under ``prefix``; what follows will take it.

        Raises:
            PlanMismatchError: it is damaged.
        """
        state = state_dict.get(f"{prefix}{EXTRA_STATE}")
        if self._checked is not None and self._checked[0] is state:
            return
        self._checked = None if state is None else (state, *read_region(state_dict, prefix))

    def read(self, state: Any) -> tuple[OpGraph, QuantPlan]:
        """Return graph and plan of an extra state, once everything in it is checked.

        Raises:
            PlanMismatchError: it is damaged.
        """
        checked, self._checked = self._checked, None
        if checked is not None and checked[0] is state:
            return checked[1:]
        return read_region({EXTRA_STATE: state}, "", with_scales=False)


def read_region(state_dict: Mapping[str, Any], prefix: str, with_scales: bool = True) -> tuple[OpGraph, QuantPlan]:
    """Read graph and plan of a region, and check everything else that a ``state_dict`` holds of it.

    Args:
        state_dict: with the entries of the region.
        prefix: of its keys, such as ``net._quantization.``.
        with_scales: also check scales and zero points.

    Raises:
        PlanMismatchError: something is damaged, missing, or of another release.
    """
    state = state_dict[f"{prefix}{EXTRA_STATE}"]
    graph, plan = read_extra_state(state)
    try:
        stored = read_as(_Extra, state)
        unknown = (stored.statistics.keys() | stored.call_ranges.keys()) - plan.by_name.keys()
        if unknown:
            raise UnreadableValueError(f"is about {sorted(unknown)[0]!r}, which is no point", ".statistics")
        for point in plan.points:
            if point.same_as is None:
                _check_point(point, stored.statistics, state_dict if with_scales else None, prefix)
    except UnreadableValueError as error:
        raise damaged(error) from error
    return graph, plan


@dataclass(frozen=True)
class _Extra:
    version: int
    graph: object
    plan: object
    statistics: dict[str, object]
    call_ranges: dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class _Point:
    dtype: Annotated[str, one_of(QuantizedDtypeName)]
    scale_source: Annotated[str, one_of(ObserverName)] | None
    learned: bool
    outdated: bool
    starts_at_zero: bool = False
    batches_from_zero: Annotated[int, AT_LEAST_ZERO] = 0
    ratio: object = 1.0
    ema_ratio: object = 1.0
    statistics: object = None


def _check_point(
    point: PointPlan, statistics: Mapping[str, Any], state_dict: Mapping[str, Any] | None, prefix: str
) -> None:
    if point.name not in statistics:
        raise UnreadableValueError("is missing", f".statistics[{point.name!r}]")
    scales = len(point.split_sizes) if point.split_sizes is not None else point.channels
    try:
        stored = read_as(_Point, statistics[point.name])
        for name, ratio in (("ratio", stored.ratio), ("ema_ratio", stored.ema_ratio)):
            _check_ratio(ratio, scales or 1, f".{name}")
        if "statistics" in statistics[point.name]:
            check_statistics(stored.statistics, point.channels, point.split_sizes)
        elif not point.is_weight:
            raise UnreadableValueError("is missing", ".statistics")
    except UnreadableValueError as error:
        raise error.inside(f".statistics[{point.name!r}]") from None
    if state_dict is not None:
        _check_scale(point, stored, state_dict, f"{prefix}fake_quants.{key_of(point.name)}.", scales)


def _check_ratio(ratio: object, scales: int, place: str) -> None:
    """One number, row or column may stand for all: see ``packed_ratios``."""
    for shape in ((), (1, 1), (2, 1), (1, scales)):
        try:
            numbers(ratio, shape, place, math.ulp(0.0), _MOST)
        except UnreadableValueError:
            continue
        return
    numbers(ratio, (2, scales), place, math.ulp(0.0), _MOST)


def _check_scale(
    point: PointPlan, stored: _Point, state_dict: Mapping[str, Any], prefix: str, scales: int | None
) -> None:
    found = {}
    for name in ("scale", "zero_point"):
        value = state_dict.get(prefix + name)
        if not isinstance(value, Tensor) or tuple(value.shape) != (() if scales is None else (scales,)):
            raise UnreadableValueError(f"must be a tensor of {scales or 1} numbers", prefix + name)
        found[name] = value.detach()
    if stored.scale_source is None:
        return
    dtype = quant_dtype(stored.dtype)
    if not stored.learned:
        numbers(found["scale"], tuple(found["scale"].shape), prefix + "scale", MIN_SCALE, MAX_SCALE)
    elif not found["scale"].is_floating_point():  # training may take its value anywhere, as that of a weight
        raise UnreadableValueError("must be floating-point numbers", prefix + "scale")
    numbers(
        found["zero_point"], tuple(found["zero_point"].shape), prefix + "zero_point", dtype.quant_min, dtype.quant_max
    )
