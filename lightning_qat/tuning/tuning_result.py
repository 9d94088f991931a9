"""What a tuning found: the result table, the recommended configuration, and the sentence for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

from lightning_qat.analysis.mixed_precision.op_costs import CostName
from lightning_qat.analysis.mixed_precision.precision_errors import PrecisionErrors
from lightning_qat.analysis.results import Block
from lightning_qat.analysis.runs.accuracy import AccuracyRow, StageTable
from lightning_qat.tuning.manifest import Manifest
from lightning_qat.tuning.target_check import TargetCheck
from lightning_qat.tuning.tuning_settings import TuningSettings


@dataclass(frozen=True)
class TuningResult(StageTable):
    """The outcome of a tuning; made by :func:`lightning_qat.tune`.

    Args:
        rows: one for each metric.
        recommended: the stage that meets the target at the least cost; empty if none does.
        folder: where everything is.
        raised: points at the wide type in the recommended stage.
        points: number of points.
        wide: the wide type.
        narrow: the narrow type.
        shares: at the wide type in the recommended stage: of the ``points`` and ``ops``, and the bit operations
            (``bops``) relative to the narrow type.
        remarks: by stage, what was noticed.
        stopped: why it ended before all stages were run; empty otherwise.
    """

    recommended: str = ""
    folder: str = ""
    raised: tuple[str, ...] = ()
    points: int = 0
    wide: str = "int16"
    narrow: str = "int8"
    shares: Mapping[str, float] = field(default_factory=dict)
    remarks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stopped: str = ""
    title: ClassVar[str] = "Tuning"

    @property
    @override
    def verdict(self) -> str:
        """``target met`` or ``target missed``."""
        return "target met" if self.recommended else "target missed"

    @property
    @override
    def note(self) -> str:
        """The sentence that a person would write into the report."""
        if not self.recommended:
            return f"target missed: {self.stopped or 'no mix that was tried meets it.'}"
        judged = [row for row in self.rows if row.target is not None]
        values = ", ".join(
            f"{row.metric} {row.values[self.recommended]:.4g} (float {row.float_value:.4g}, target {row.target:.4g})"
            for row in judged
        )
        mix = (
            f"with {len(self.raised)} of {self.points} points at {self.wide} ({len(self.raised) / self.points:.1%}) "
            f"and the rest at {self.narrow}"
            if self.raised and self.points
            else f"with all points at {self.narrow if 'narrow' in self.recommended else self.wide}"
        )
        after = f" Then it stopped: {self.stopped}" if self.stopped else ""
        bops = f"; {self.shares['bops']:.2f} times the bit operations of {self.narrow}" if "bops" in self.shares else ""
        untrained = "" if "QAT" in self.recommended else " This is by calibration alone: fit trains on from there."
        where = f"Configuration: recommended.yaml.{untrained}{after}"
        return f"target met: {self.recommended} {mix} reaches {values}{bops}. {where}"

    @override
    def blocks(self) -> tuple[Block, ...]:
        """Return the table with one row per stage, which fits a terminal however many stages there are."""
        metrics = [row.metric for row in self.rows]
        rows: list[tuple[Any, ...]] = [("float", "", *(row.float_value for row in self.rows))]
        rows.append(("target", "", *(row.target for row in self.rows)))
        for stage in self.stages:
            chosen = "recommended" if stage == self.recommended else ""
            rows.append((stage, chosen, *(row.values.get(stage) for row in self.rows)))
        return (Block(self.title, ("stage", "", *metrics), tuple(rows) if self.rows else (), self.note),)

    @override
    def full_blocks(self) -> tuple[Block, ...]:
        """The table, then what was noticed in each stage, then the raised points."""
        (table,) = super().full_blocks()
        noticed = [(stage, remark) for stage, remarks in self.remarks.items() for remark in remarks]
        blocks = [table, Block("What was noticed", ("stage", "remark"), tuple(noticed))] if noticed else [table]
        if self.raised:
            blocks.append(Block(f"Points at {self.wide}", ("point",), tuple((name,) for name in self.raised)))
        return tuple(blocks)


def tuning_result(
    manifest: Manifest, settings: TuningSettings, folder: Path, recommended: str, stopped: str
) -> TuningResult:
    """Put together what the manifest knows.

    Args:
        manifest: the stages that are done.
        settings: of the tuning.
        folder: of the tuning.
        recommended: the stage that meets the target; empty if none does.
        stopped: why it ended.
    """
    outcomes = {name: outcome for name, outcome in manifest.stages.items() if outcome.metrics}
    shown = {name: o for name, o in outcomes.items() if name not in ("float", "search")}
    values = {name: next(iter(o.metrics.values())) for name, o in shown.items()}
    float_metrics = dict(outcomes["float"].metrics["float"]) if "float" in outcomes else {}
    rows = []
    if float_metrics:
        check = TargetCheck(settings, float_metrics)
        for name, value in float_metrics.items():
            target = check.targets.get(name)
            by_stage = {stage: metrics[name] for stage, metrics in values.items() if name in metrics}
            passed = None if target is None else bool(recommended) and check.passes(values[recommended])
            rows.append(AccuracyRow(name, value, target, by_stage, passed))
    chosen = manifest.stages.get(recommended)
    raised = chosen.raised if chosen is not None else ()
    return TuningResult(
        tuple(rows),
        stages=tuple(values),
        recommended=recommended,
        folder=str(folder),
        raised=raised,
        points=max((o.points for o in manifest.stages.values()), default=0),
        wide=settings.wide,
        narrow=settings.narrow,
        shares=_shares(folder / "search" / "errors.json", raised, recommended.startswith("wide")),
        remarks={name: o.remarks for name, o in manifest.stages.items() if o.remarks},
        stopped=stopped,
    )


def _shares(errors_file: Path, raised: tuple[str, ...], is_wide: bool) -> dict[str, float]:
    if not errors_file.exists():
        return {}
    errors = PrecisionErrors.load(errors_file)
    known = [name for name in errors.together if is_wide or name in raised]
    names: tuple[CostName, ...] = ("points", "ops")
    if any(op.is_product for op in errors.ops):
        names += ("bops",)
    return {name: errors.choose(points=known, cost=name).cost for name in names}
