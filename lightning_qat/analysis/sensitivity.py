"""Which point, quantized alone, changes the chosen output most (B1, B2): ``sensitivity(region, batches)``."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor

from lightning_qat.analysis.captured_calls import RepeatableForward, analysis_mode
from lightning_qat.analysis.metrics import MetricName, check_metric, error_sums, higher_is_better, metric_of_sums
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.analysis.results import Result, rich_table
from lightning_qat.quantization.errors import ConfigurationError, unknown_choice
from lightning_qat.quantization.histogram import reduce_device
from lightning_qat.quantization.region import Region
from lightning_qat.quantization.tracing import Call

Method = Literal["auto", "isolation"]


@dataclass(frozen=True)
class SensitivityRow:
    """What quantizing one point alone does to the chosen output.

    Args:
        op_name: name of the op.
        sensitive_type: ``activation`` or ``weight``.
        op_type: torch function of the op.
        value: the metric; this column has the metric's name. nan: the output became NaN or changed its shape.
        quant_dtype: quantized type of the point.
        point: name of the point.
        score: root mean square change of the chosen output.
        exact: the metric was measured, not estimated.
        region: path of the target in the model, ``""`` for the model itself.
    """

    op_name: str
    sensitive_type: str
    op_type: str
    value: float
    quant_dtype: str
    point: str
    score: float
    exact: bool
    region: str = ""


@dataclass(frozen=True)
class SensitivityResult(Result[SensitivityRow]):
    """The points that were measured, the most sensitive first.

    Args:
        metric: what the rows are sorted by.
        output: what was looked at, in words.
        method: ``isolation``: each point quantized alone in the float model.
        batches: number of batches, on all ranks that took part.
        points: number of calibrated points there are; a weight that several ops share counts once.
        left_out: points that were not measured because of ``max_points``.
        not_reached: points that the batches never reached.
        uncalibrated: points without a scale.
    """

    title: ClassVar[str] = "Sensitivity"

    metric: MetricName = "MSE"
    output: str = ""
    method: str = "isolation"
    batches: int = 0
    points: int = 0
    left_out: tuple[str, ...] = ()
    not_reached: tuple[str, ...] = ()
    uncalibrated: tuple[str, ...] = ()

    def columns(self) -> tuple[str, ...]:
        """Names of all columns; the fourth is the name of the metric."""
        return tuple(self.metric if n == "value" else n for n in SensitivityRow.__dataclass_fields__)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as dictionaries of primitives."""
        return [dict(zip(self.columns(), dataclasses.astuple(row), strict=True)) for row in self.rows]

    @property
    def note(self) -> str:
        """Say what was looked at, and what was not."""
        text = f"{self.metric} of {self.output}, {len(self.rows)} of {self.points} points by {self.method}"
        missing = {"left out": self.left_out, "never reached": self.not_reached, "not calibrated": self.uncalibrated}
        return text + "".join(f", {len(names)} {why}" for why, names in missing.items() if names)

    def __rich__(self) -> Table:
        table = rich_table(self.title, self.columns()[:5], self.to_dicts())
        table.caption, table.caption_justify = self.note, "left"
        return table

    @classmethod
    def merged(cls, results: Mapping[str, SensitivityResult]) -> SensitivityResult:
        """Put the results of several regions together, by the paths of their targets; sorted anew."""
        first = next(iter(results.values()))
        rows = [dataclasses.replace(row, region=name) for name, result in results.items() for row in result.rows]

        def named(field: str) -> tuple[str, ...]:
            return tuple(f"{n}: {p}" if n else p for n, result in results.items() for p in getattr(result, field))

        return dataclasses.replace(
            first,
            rows=most_sensitive_first(rows, first.metric),
            points=sum(result.points for result in results.values()),
            left_out=named("left_out"),
            not_reached=named("not_reached"),
            uncalibrated=named("uncalibrated"),
        )


def sensitivity(
    region: Region,
    batches: Iterable[object],
    output: str | Callable[[Any], Any] | None = None,
    post_process: Callable[[Any], Any] | None = None,
    metric: MetricName = "MSE",
    *,
    method: Method = "auto",
    max_points: int | None = None,
    turn: int = 0,
    seed: int = 0,
    across_ranks: bool = False,
) -> SensitivityResult:
    """Quantize one point at a time in the float model and measure the change of the chosen output.

    One float forward and one forward per measured point and batch, in evaluation mode, with the same inputs, buffers
    and random numbers each time. Several batches, and several tensors of the output, are one long vector to the metric.
    Elements that are not finite in the float output are left out. Nothing of the region or its target is changed.

    Args:
        region: a calibrated region.
        batches: see :meth:`~lightning_qat.quantization.tracing.Call.of`.
        output: path into the output such as ``map.layer_3``, or a callable on it; None: all its tensors.
        post_process: applied to the chosen output in float, such as ``torch.sigmoid``.
        metric: ``L1``, ``MSE``, ``Cosine``, ``SQNR`` or ``KL``; see :mod:`lightning_qat.analysis.metrics`.
        method: ``isolation`` as described; ``auto`` chooses (at present always isolation).
        max_points: measure at most this many points; see :func:`choose_points`.
        turn: which points, if not all can be measured: after ``ceil(points / max_points)`` turns in a row all were.
        seed: of the order in which points take turns, and of the random numbers that the forward draws.
        across_ranks: every rank calls this with its own batches; the result is that of all batches, on all ranks.

    Raises:
        ConfigurationError: nothing is calibrated, there is no batch, or the output does not exist.

    Example:
        >>> from lightning_qat.quantization.insertion import insert
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> region = insert(model, (torch.randn(8, 4),), qconfig={"weight": {"dtype": "int2"}})
        >>> with region.state("observe"):
        ...     _ = model(torch.randn(8, 4))
        >>> _ = region.compute_scales()
        >>> result = sensitivity(region, [torch.randn(8, 4)], metric="SQNR")
        >>> result.columns()[:5], {row.sensitive_type for row in result.rows[:2]}
        (('op_name', 'sensitive_type', 'op_type', 'SQNR', 'quant_dtype'), {'weight'})
    """
    check_metric(metric)
    if method not in get_args(Method):
        raise unknown_choice("method", method, get_args(Method))
    if max_points is not None and max_points < 1:
        raise ConfigurationError(f"max_points must be at least 1, or None for all, not {max_points}.")
    owners = [point.name for point in region.plan.points if point.same_as is None]
    points = region.points
    calibrated = [name for name in owners if points[name].scale_source is not None]
    if not calibrated:
        raise ConfigurationError("no point has a scale: calibrate the region before measuring its sensitivity.")
    chosen = choose_points(calibrated, max_points, seed, turn)
    measurement = _Measurement(region, chosen, OutputSelector(output, post_process), metric == "KL", seed)
    with analysis_mode(region):
        for batch in batches:
            measurement.run(Call.of(batch))
    if across_ranks:
        measurement.all_reduce()
    if measurement.batches == 0:
        raise ConfigurationError("there was no batch to measure the sensitivity on.")
    rows = [_row(region, name, metric, measurement.sums[name]) for name in chosen if name in measurement.reached]
    return SensitivityResult(
        rows=most_sensitive_first(rows, metric),
        metric=metric,
        output=measurement.select.description,
        batches=measurement.batches,
        points=len(calibrated),
        left_out=tuple(name for name in calibrated if name not in set(chosen)),
        not_reached=tuple(name for name in chosen if name not in measurement.reached),
        uncalibrated=tuple(name for name in owners if name not in set(calibrated)),
    )


def choose_points(names: list[str], max_points: int | None, seed: int = 0, turn: int = 0) -> list[str]:
    """Choose which points are measured: all, or the next ``max_points`` of a fixed random order.

    The order depends on the seed only, and a turn continues where the one before ended, from the end on at the start.
    So every point is measured equally often, and no part of the model (and no order in it) is preferred.

    Args:
        names: all points.
        max_points: how many to choose; None for all.
        seed: of the order.
        turn: counts the choices.

    Returns:
        The chosen names, in the order of ``names``.

    Example:
        >>> [choose_points(["a", "b", "c"], 2, turn=turn) for turn in range(3)]
        [['b', 'c'], ['a', 'b'], ['a', 'c']]
    """
    if max_points is None or max_points >= len(names):
        return list(names)
    order = random.Random(seed).sample(names, len(names))
    chosen = {order[(turn * max_points + index) % len(order)] for index in range(max_points)}
    return [name for name in names if name in chosen]


def most_sensitive_first(rows: Iterable[SensitivityRow], metric: MetricName) -> tuple[SensitivityRow, ...]:
    """Sort rows: an output that became NaN first, then by the metric, ties in execution order."""
    sign = 1.0 if higher_is_better(metric) else -1.0
    return tuple(sorted(rows, key=lambda row: -math.inf if math.isnan(row.value) else sign * row.value))


class _Measurement:
    """The sums of every chosen point, batch by batch."""

    def __init__(self, region: Region, names: list[str], select: OutputSelector, with_kl: bool, seed: int) -> None:
        self.region = region
        self.select = select
        self.with_kl = with_kl
        self.seed = seed
        self.sums = {name: torch.zeros(7, dtype=torch.float64) for name in names}
        self.reached: set[str] = set()
        self.batches = 0
        self._owner = {point.name: point.same_as or point.name for point in region.plan.points}

    def run(self, call: Call) -> None:
        seen: set[str] = set()
        with RepeatableForward(self.region.target, call, self.seed) as forward:
            with self.region.only(()), self.region.tap(lambda name, *_: seen.add(self._owner[name])):
                reference = [tensor.clone() for tensor in self.select(forward())]
            unchanged = self._error(reference, reference)
            for name, sums in self.sums.items():
                if name not in seen:  # quantizing it changes nothing here
                    sums += unchanged
                    continue
                with self.region.only((name,)):
                    sums += self._error(reference, self.select(forward()))
        self.reached |= seen
        self.batches += 1

    def all_reduce(self) -> None:
        """Add the sums of all ranks."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        rows = [[*sums.tolist(), float(name in self.reached)] for name, sums in self.sums.items()]
        rows.append([0.0] * 7 + [float(self.batches)])
        table = torch.tensor(rows, dtype=torch.float64, device=reduce_device(None))
        dist.all_reduce(table)
        self.batches = int(table[-1, -1])
        for (name, sums), row in zip(self.sums.items(), table.cpu(), strict=False):
            sums.copy_(row[:7])
            if row[7]:
                self.reached.add(name)

    def _error(self, reference: list[Tensor], analysed: list[Tensor]) -> Tensor:
        if [t.shape for t in reference] != [t.shape for t in analysed]:
            return torch.full((7,), torch.nan, dtype=torch.float64)
        total = torch.zeros(7, dtype=torch.float64)
        for base, analy in zip(reference, analysed, strict=True):
            finite = base.isfinite()
            if not bool(finite.all()):
                base, analy = torch.where(finite, base, 0), torch.where(finite, analy, 0)
            sums = error_sums(base, analy, self.with_kl).cpu()
            sums[0] = finite.sum()
            total += sums
        return total


def _row(region: Region, name: str, metric: MetricName, sums: Tensor) -> SensitivityRow:
    point = region.plan.by_name[name]
    return SensitivityRow(
        op_name=point.op,
        sensitive_type="weight" if point.is_weight else "activation",
        op_type=region.graph.by_name[point.op].kind,
        value=float(metric_of_sums(metric, sums)),
        quant_dtype=region.points[name].dtype,
        point=name,
        score=math.sqrt(float(metric_of_sums("MSE", sums))),
        exact=True,
    )
