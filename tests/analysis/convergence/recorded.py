"""Training series that were recorded from real runs, and judging them as they came in."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_qat.analysis.convergence.convergence import FIRST_LOOK, judge_convergence
from lightning_qat.analysis.convergence.point_history import PointHealth, PointHistory
from lightning_qat.analysis.convergence.training_series import TrainingSeries
from lightning_qat.analysis.ladder.measurements import Measurement

DIRECTORY = Path(__file__).parent / "recorded_runs"


@dataclass(frozen=True)
class RecordedEpoch:
    """The end of an epoch.

    Args:
        metrics: its evaluation; None if training ended before it.
        points: health of every point.
        zero_gradients: parameters whose gradient was zero.
    """

    metrics: Measurement | None
    points: Mapping[str, PointHealth]
    zero_gradients: tuple[str, ...]


@dataclass(frozen=True)
class RecordedRun:
    """One run of the digits pipeline.

    Args:
        name: what was planted, or the seed of a healthy run.
        is_sick: whether something was planted that training suffers from.
        steps_per_epoch: optimizer steps per epoch.
        series: losses, and what is known before the first step.
        epochs: what is known at the end of every epoch.
    """

    name: str
    is_sick: bool
    steps_per_epoch: int
    series: TrainingSeries
    epochs: tuple[RecordedEpoch, ...]

    def looks(self) -> Iterator[tuple[int, TrainingSeries]]:
        """What the monitor knew at each of its looks: after 32, 64, ... steps and at the end of every epoch."""
        looks = {FIRST_LOOK * 2**n for n in range(10)} | {
            n * self.steps_per_epoch for n in range(1, len(self.epochs) + 1)
        }
        bad = next((i + 1 for i, loss in enumerate(self.series.losses) if not math.isfinite(loss)), None)
        for step in sorted({*looks, *([bad] if bad else [])}):
            if step > len(self.series.losses):
                return
            done = self.epochs[: step // self.steps_per_epoch]
            evaluated = [epoch.metrics for epoch in done if epoch.metrics is not None]
            yield (
                step,
                dataclasses.replace(
                    self.series,
                    losses=self.series.losses[:step],
                    steps=step,
                    metrics=evaluated[-1] if evaluated else None,
                    evaluations=len(evaluated),
                    points=functools.reduce(PointHistory.after, (epoch.points for epoch in done), PointHistory()),
                    zero_gradients=done[-1].zero_gradients if done else (),
                ),
            )

    def detection(self) -> tuple[int, str] | None:
        """The step at which something is flagged first, and the verdict."""
        for step, known in self.looks():
            result = judge_convergence(known)
            if result.is_bad:
                return step, result.verdict
        return None


def recorded_runs() -> list[RecordedRun]:
    return [_load(path) for path in sorted(DIRECTORY.glob("*.json"))]


def save(run: RecordedRun, path: Path) -> None:
    """Write a run with four digits: enough to judge it, and small."""
    series = run.series
    data = {
        "name": run.name,
        "is_sick": run.is_sick,
        "steps_per_epoch": run.steps_per_epoch,
        "losses": _short(series.losses),
        "float_loss": _short(series.float_loss),
        "metrics": [_short(dict(epoch.metrics.metrics)) for epoch in run.epochs if epoch.metrics is not None],
        "calibrated": _measurement(series.calibrated),
        "float_model": _measurement(series.float_model),
        "points": [
            {name: _short(dataclasses.asdict(health)) for name, health in epoch.points.items()} for epoch in run.epochs
        ],
        "zero_gradients": [list(epoch.zero_gradients) for epoch in run.epochs],
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data, separators=(",", ":")) + "\n")


def _load(path: Path) -> RecordedRun:
    data = json.loads(path.read_text())
    series = TrainingSeries(
        losses=tuple(map(float, data["losses"])),
        steps=len(data["losses"]),
        float_loss=tuple(map(float, data["float_loss"])) if data["float_loss"] else None,  # type: ignore[arg-type]
        calibrated=Measurement(*map(_floats, data["calibrated"])),
        float_model=Measurement(*map(_floats, data["float_model"])),
    )
    metrics = [Measurement(_floats(m)) for m in data["metrics"]]
    epochs = tuple(
        RecordedEpoch(
            metrics[number] if number < len(metrics) else None,
            {name: PointHealth(**{k: _number(v) for k, v in health.items()}) for name, health in points.items()},
            tuple(data["zero_gradients"][number]),
        )
        for number, points in enumerate(data["points"])
    )
    return RecordedRun(data["name"], data["is_sick"], data["steps_per_epoch"], series, epochs)


def _measurement(measurement: Measurement | None) -> list[Any]:
    return [_short(dict(measurement.metrics)), _short(dict(measurement.standard_errors))] if measurement else [{}, {}]


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _short(v) for name, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_short(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


def _floats(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
