"""Training series that were recorded from real runs, and judging them as they came in."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_qat.analysis.convergence import FIRST_LOOK, judge_convergence
from lightning_qat.analysis.convergence_rows import PointHealth, TrainingSeries
from lightning_qat.analysis.pipeline_rows import Measurement

DIRECTORY = Path(__file__).parent / "recorded_runs"


@dataclass(frozen=True)
class RecordedRun:
    """One run of the digits pipeline.

    Args:
        name: what was planted, or the seed of a healthy run.
        is_sick: whether something was planted that training suffers from.
        steps_per_epoch: optimizer steps per epoch.
        series: everything up to the end.
        zero_gradients: by epoch.
    """

    name: str
    is_sick: bool
    steps_per_epoch: int
    series: TrainingSeries
    zero_gradients: tuple[tuple[str, ...], ...]

    def looks(self) -> Iterator[tuple[int, TrainingSeries]]:
        """What the monitor knew at each of its looks: after 32, 64, ... steps and at the end of every epoch."""
        epochs = {n * self.steps_per_epoch: n for n in range(1, len(self.series.points) + 1)}
        looks = {FIRST_LOOK * 2**n for n in range(10)} | set(epochs)
        bad = next((i + 1 for i, loss in enumerate(self.series.losses) if not math.isfinite(loss)), None)
        for step in sorted({*looks, *([bad] if bad else [])}):
            if step > len(self.series.losses):
                return
            done = step // self.steps_per_epoch
            yield (
                step,
                dataclasses.replace(
                    self.series,
                    losses=self.series.losses[:step],
                    steps=step,
                    metrics=self.series.metrics[:done],
                    points=self.series.points[:done],
                    zero_gradients=self.zero_gradients[done - 1] if done else (),
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
        "metrics": [_short(dict(m.metrics)) for m in series.metrics],
        "calibrated": _measurement(series.calibrated),
        "float_model": _measurement(series.float_model),
        "points": [{name: _short(dataclasses.asdict(h)) for name, h in epoch.items()} for epoch in series.points],
        "zero_gradients": [list(names) for names in run.zero_gradients],
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data, separators=(",", ":")) + "\n")


def _load(path: Path) -> RecordedRun:
    data = json.loads(path.read_text())
    series = TrainingSeries(
        losses=tuple(map(float, data["losses"])),
        steps=len(data["losses"]),
        float_loss=tuple(map(float, data["float_loss"])) if data["float_loss"] else None,  # type: ignore[arg-type]
        metrics=tuple(Measurement(_floats(m)) for m in data["metrics"]),
        calibrated=Measurement(*map(_floats, data["calibrated"])),
        float_model=Measurement(*map(_floats, data["float_model"])),
        points=tuple(
            {n: PointHealth(**{k: _number(v) for k, v in h.items()}) for n, h in e.items()} for e in data["points"]
        ),
    )
    zero = tuple(map(tuple, data["zero_gradients"]))
    return RecordedRun(data["name"], data["is_sick"], data["steps_per_epoch"], series, zero)


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
