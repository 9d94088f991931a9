"""The sensitivity table: its rows, their order, and its note."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_qat.analysis.metric_direction import higher_is_better
from lightning_qat.analysis.results import Block, Result
from lightning_qat.quantization.counts import number_of


@dataclass(frozen=True)
class SensitivityRow:
    """What quantizing one point alone does to the chosen output.

    Args:
        op_name: name of the op.
        role: ``activation`` or ``weight``; the column is called ``sensitive_type``.
        op_type: torch function of the op.
        value: the metric; this column has the metric's name. None: only the score is known. nan: the output became NaN
            or has another number of tensors or dimensions.
        quant_dtype: quantized type of the point.
        point: name of the point.
        score: root mean square change of the chosen output.
        exact: metric and score were measured, not estimated.
        standard_error: of an estimated score; 0 if it is exact, None if there was a single sample and probe.
        flops_share: share of the op (with what is fused to it) of all floating-point operations of the region.
        rank_change: how many places the row rose since the table it was compared with; None without one.
        region: path of the target in the model, ``""`` for the model itself.
    """

    op_name: str
    role: str
    op_type: str
    value: float | None
    quant_dtype: str
    point: str
    score: float
    exact: bool
    standard_error: float | None = 0.0
    flops_share: float = 0.0
    rank_change: int | None = None
    region: str = ""


@dataclass(frozen=True)
class SensitivityResult(Result[SensitivityRow]):
    """The points that were measured or estimated: measured ones first, in both parts the most sensitive first.

    Args:
        metric: what the measured rows are sorted by; the estimated ones are sorted by their score.
        ascending: a small value of the metric means a sensitive point (Cosine, SQNR).
        output: description of the chosen output.
        method: ``isolation``: each point quantized alone in the float model. ``sketch``: estimated from gradients, the
            exact rows by isolation.
        reason: why this method was used, if the user did not choose it.
        probes: backward passes per batch of the sketch.
        batches: number of batches, on all ranks that took part.
        points: number of calibrated points there are; a weight that several ops share counts once.
        left_out: points that were not measured because of ``max_points``.
        not_reached: points that the batches never reached.
        uncalibrated: points without a scale.
        without_gradient: points that act on the output without a gradient (through indices, rounding, opaque code):
            they were measured by isolation.
        task: True if the metric is one that the validation step logs; then only the score is about the output.
        float_value: value of such a metric for the float model.
        evaluated_batches: number of batches per rank on which such a metric was measured.
        held: ops whose result jumps (indices, comparisons, rounding): an estimate holds it at its float value.
        custom_backward: custom ``autograd.Function`` classes on the way to the output: an estimate takes their backward
            for the derivative, which that of a straight-through estimator or a gradient reversal is not.
        reshaped: measured points that change the shape of the output: elements that only one of the two outputs has
            count as zero in the other.
        remark: which model the table is about, if that is not what is expected; begins the note.
    """

    title: ClassVar[str] = "Sensitivity"

    metric: str = "MSE"
    ascending: bool = False
    output: str = ""
    method: str = "isolation"
    reason: str = ""
    probes: int = 0
    batches: int = 0
    points: int = 0
    left_out: tuple[str, ...] = ()
    not_reached: tuple[str, ...] = ()
    uncalibrated: tuple[str, ...] = ()
    without_gradient: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    custom_backward: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    task: bool = False
    float_value: float | None = None
    evaluated_batches: int = 0
    remark: str = ""

    def columns(self) -> tuple[str, ...]:
        """Names of all columns; the fourth is the name of the metric."""
        names = {"value": self.metric, "role": "sensitive_type"}
        return tuple(names.get(n, n) for n in SensitivityRow.__dataclass_fields__)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as dictionaries of primitives."""
        names = self.columns()
        return [dict(zip(names, vars(row).values(), strict=True)) for row in self.rows]  # in the order of the fields

    @property
    def short_columns(self) -> tuple[str, ...]:
        """The columns to show where there is little room."""
        return (
            self.columns()[:5]
            if self.method == "isolation" and not self.task
            else (*self.columns()[:5], "score", "exact")
        )

    @property
    def note(self) -> str:
        """Say what was measured, how, and what was left out."""
        text = f"{self.metric} of {self.output}"
        lead = f"{self.remark} " if self.remark else ""
        if self.task and self.float_value is None:
            text = f"score of {self.output} ({self.metric} at the end of training)"
        elif self.task:
            text = f"{self.metric} on {number_of(self.evaluated_batches, 'batch')} (float: {self.float_value:.4g}), "
            text += f"score of {self.output}"
        text += f", {len(self.rows)} of {self.points} points by {self.method}"
        if self.method == "sketch":
            exact = sum(row.exact for row in self.rows)
            text += f" ({self.probes} probe{'s' * (self.probes != 1)}), {exact} of them measured by isolation"
        missing = {
            "left out": self.left_out,
            "never reached": self.not_reached,
            "not calibrated": self.uncalibrated,
            "without a gradient": self.without_gradient,
        }
        text += "".join(f", {len(names)} {why}" for why, names in missing.items() if names)
        if self.held:
            text += f"; estimates hold {_first_three(self.held)} at their float results"
        if self.custom_backward:
            text += f"; estimates take the backward of {_first_three(self.custom_backward)} for the derivative"
        if self.reshaped:
            text += f"; with {_first_three(self.reshaped)} quantized the output has another shape, and missing "
            text += "elements count as zero: choose an output before the selection"
        return f"{lead}{text}; {self.reason}" if self.reason else f"{lead}{text}"

    def blocks(self) -> tuple[Block, ...]:
        """Return the columns that fit on a terminal."""
        return (Block.of(self.title, self.short_columns, self.to_dicts(), self.note),)

    def compared_with(self, previous: SensitivityResult | None) -> SensitivityResult:
        """Return the same table with ``rank_change`` since an earlier one; rows that are new there have none."""
        return self if previous is None else self.ranked_since(previous.order)

    @property
    def is_complete(self) -> bool:
        """Whether every point was isolated, with a metric of the output: another method would say nothing new."""
        return self.method == "isolation" and not self.left_out and not self.task

    @property
    def order(self) -> tuple[tuple[str, str], ...]:
        """Region and point of every row, most sensitive first: all that :meth:`ranked_since` needs to know."""
        return tuple((row.region, row.point) for row in self.rows)

    def ranked_since(self, order: Iterable[tuple[str, str]]) -> SensitivityResult:
        """Return the same table with ``rank_change`` since the :attr:`order` of an earlier one."""
        ranks = {place: rank for rank, place in enumerate(order)}
        rows = []
        for rank, row in enumerate(self.rows):
            before = ranks.get((row.region, row.point))
            rows.append(dataclasses.replace(row, rank_change=None if before is None else before - rank))
        return dataclasses.replace(self, rows=tuple(rows))

    @classmethod
    def merged(cls, results: Mapping[str, SensitivityResult]) -> SensitivityResult:
        """Put the results of several regions together, by the paths of their targets; sorted anew."""
        first = next(iter(results.values()))
        rows = [
            row if row.region == name else dataclasses.replace(row, region=name)
            for name, result in results.items()
            for row in result.rows
        ]

        def named(field: str) -> tuple[str, ...]:
            return tuple(f"{n}: {p}" if n else p for n, result in results.items() for p in getattr(result, field))

        methods = {result.method for result in results.values()}
        return dataclasses.replace(
            first,
            rows=most_sensitive_first(rows, first.metric, first.ascending),
            method="sketch" if "sketch" in methods else first.method,
            probes=max(result.probes for result in results.values()),
            reason="; ".join(dict.fromkeys(result.reason for result in results.values() if result.reason)),
            points=sum(result.points for result in results.values()),
            left_out=named("left_out"),
            not_reached=named("not_reached"),
            uncalibrated=named("uncalibrated"),
            without_gradient=named("without_gradient"),
            held=named("held"),
            custom_backward=named("custom_backward"),
            reshaped=named("reshaped"),
        )


def most_sensitive_first(
    rows: Iterable[SensitivityRow], metric: str, ascending: bool | None = None
) -> tuple[SensitivityRow, ...]:
    """Sort rows: an output that became NaN first, then by the metric, then those with an estimated score only.

    Args:
        rows: in execution order, which decides about ties.
        metric: name of the metric.
        ascending: whether a small value means a sensitive point; by default, if a larger value of the metric is better.
    """
    sign = 1.0 if (higher_is_better(metric) if ascending is None else ascending) else -1.0

    def order(row: SensitivityRow) -> tuple[bool, float]:
        if row.value is None:
            return True, -row.score
        return False, -math.inf if math.isnan(row.value) else sign * row.value

    return tuple(sorted(rows, key=order))


def _first_three(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
