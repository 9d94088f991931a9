"""Whether metrics meet the target, and whether the target makes sense."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_qat.analysis.metric_direction import higher_is_better
from lightning_qat.analysis.runs.accuracy import AccuracyRow, ResultTable
from lightning_qat.quantization.errors import ConfigurationError, near_names
from lightning_qat.tuning.tuning_settings import TuningSettings

COLLAPSED = 0.9
"""Share of the float score below which a calibrated model is debugged and not trained (the source document, 1.3)."""


class TargetCheck:
    """Judges metrics by the target.

    Args:
        settings: with target and metrics.
        float_metrics: of the float model.

    Raises:
        ConfigurationError: a metric is not logged or is NaN in float, or float itself misses the target.

    Example:
        >>> settings = TuningSettings("train.py", (), target="1%")
        >>> check = TargetCheck(settings, {"val_acc": 0.9, "val_loss": 0.3, "epoch_seconds": 7.1})
        >>> check.passes({"val_acc": 0.895, "val_loss": 0.9}), check.passes({"val_acc": 0.7, "val_loss": 0.3})
        (True, False)
    """

    def __init__(self, settings: TuningSettings, float_metrics: Mapping[str, float]) -> None:
        self.settings = settings
        self.float_metrics = dict(float_metrics)
        wanted = [*settings.metrics, *(settings.target if isinstance(settings.target, dict) else ())]
        logged = ", ".join(float_metrics) or "nothing"
        for name in wanted:
            if name not in float_metrics:
                near = near_names(name, float_metrics)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ConfigurationError(f"metric {name!r} is not logged.{hint} Validation logs: {logged}.")
        self.names = list(dict.fromkeys(wanted)) or list(float_metrics)
        self.rows = [row for row in self._rows(float_metrics) if row.target is not None]
        if not self.rows:
            raise ConfigurationError(f"there is no metric to judge by. Validation logs: {logged}.")
        for row in self.rows:
            value = float_metrics[row.metric]
            if not math.isfinite(value):
                raise ConfigurationError(
                    f"{row.metric} of the float model is {value}: check the checkpoint, or name another --metric."
                )
            if not row.passed:
                raise ConfigurationError(
                    f"the float model itself has {row.metric} {value:.5g}, and the target is {row.target:.5g}: write a "
                    "target that float meets, such as 1%."
                )

    @property
    def targets(self) -> dict[str, float]:
        """The value to reach, by metric."""
        return {row.metric: row.target for row in self.rows if row.target is not None}

    def passes(self, metrics: Mapping[str, float]) -> bool:
        """Whether all judged metrics reach their targets; NaN does not."""
        return all(row.passed for row in self._rows(metrics) if row.metric in self.targets) and all(
            name in metrics for name in self.targets
        )

    def shortfall(self, metrics: Mapping[str, float]) -> float:
        """Return how far the worst metric is below float, in parts of what the target allows; inf if it is NaN."""
        worst = 0.0
        for name, target in self.targets.items():
            sign = 1 if higher_is_better(name) else -1
            reference = self.float_metrics[name]
            missing = sign * (reference - metrics.get(name, math.nan)) / max(abs(reference - target), 1e-12)
            worst = max(worst, missing if math.isfinite(missing) else math.inf)
        return worst

    def collapsed(self, metrics: Mapping[str, float]) -> list[str]:
        """Return the metrics that are below 90 % of float (costs: above it by as much)."""
        found = []
        for name in self.targets:
            value, reference = metrics.get(name, math.nan), self.float_metrics[name]
            if higher_is_better(name):
                holds = value >= COLLAPSED * reference - (1 - COLLAPSED) * abs(reference) * (reference < 0)
            else:
                holds = value <= reference + abs(reference) * (1 - COLLAPSED)
            if not holds and not self._reaches(name, value):
                found.append(name)
        return found

    def _reaches(self, name: str, value: float) -> bool:
        return next(bool(row.passed) for row in self._rows({name: value}) if row.metric == name)

    def _rows(self, metrics: Mapping[str, float]) -> tuple[AccuracyRow, ...]:
        target = self.settings.target
        if self.settings.metrics and not isinstance(target, dict):  # named ones count, costs too
            target = dict.fromkeys(self.settings.metrics, target)
        table = ResultTable({"tuning": {"float": self.float_metrics, "now": dict(metrics)}})
        return table.result("tuning", self.names, target).rows
