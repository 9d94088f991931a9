"""A metric that the validation step logs, measured with single points quantized in the float model."""

from __future__ import annotations

import dataclasses
import math
from contextlib import ExitStack
from typing import get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_qat.analysis.metric_direction import higher_is_better
from lightning_qat.analysis.metrics import MetricName
from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult, most_sensitive_first
from lightning_qat.callbacks.passes.evaluation import Evaluation, evaluate
from lightning_qat.callbacks.quantized_run import require_regions
from lightning_qat.callbacks.trainer.progress import progress
from lightning_qat.callbacks.trainer.seeding import seeded
from lightning_qat.quantization.errors import near_names
from lightning_qat.quantization.region.region import Region


class TaskMetric:
    """Replaces the metric of the measured rows of a sensitivity table by one that the validation step logs.

    Every rank evaluates the same points in the same order, as evaluation is collective.

    Args:
        name: what the step logs, such as ``val_acc``; smaller is worse unless its name is that of a cost.
        batches: validation batches per rank and point, always the same ones; None for all.
        seed: of what the steps draw.
    """

    def __init__(self, name: str, batches: int | None, seed: int) -> None:
        self.name = name
        self.batches = batches
        self.seed = seed
        self.higher_is_better = higher_is_better(name)

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate the float model on one batch, to check that the step logs the metric.

        Raises:
            MisconfigurationException: the step does not log it.
        """
        self._evaluated(trainer, pl_module, None, 1)

    def without_values(self, result: SensitivityResult) -> SensitivityResult:
        """Return a table of this metric in which only the scores are known."""
        rows = [dataclasses.replace(row, value=None) for row in result.rows]
        return dataclasses.replace(
            result,
            rows=most_sensitive_first(rows, self.name, self.higher_is_better),
            metric=self.name,
            ascending=self.higher_is_better,
            task=True,
        )

    def measured(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, result: SensitivityResult
    ) -> SensitivityResult:
        """Return a table in which the rows that were measured (``exact``) have this metric."""
        order = {
            (path, point.name): number
            for path, region in require_regions(trainer, pl_module, "SensitivityAnalysis").items()
            for number, point in enumerate(region.plan.points)
        }
        points = sorted(((row.region, row.point) for row in result.rows if row.exact), key=lambda key: order[key])
        limit = math.inf if self.batches is None else self.batches
        with progress(trainer, f"Sensitivity: {self.name}", len(points) + 1) as advance:
            base = self._evaluated(trainer, pl_module, None, limit)
            advance()
            values = {}
            for key in points:
                values[key] = self._evaluated(trainer, pl_module, key, limit).metrics[self.name]
                advance()
        plain = self.without_values(result)
        rows = [dataclasses.replace(row, value=values.get((row.region, row.point))) for row in plain.rows]
        return dataclasses.replace(
            plain,
            rows=most_sensitive_first(rows, self.name, self.higher_is_better),
            float_value=base.metrics[self.name],
            evaluated_batches=base.batches,
        )

    def _evaluated(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, only: tuple[str, str] | None, limit: float
    ) -> Evaluation:
        """Evaluate the float model, with one point quantized."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            for path, region in require_regions(trainer, pl_module, "SensitivityAnalysis").items():
                _quantize_only(stack, region, only[1] if only and only[0] == path else None)
            stack.enter_context(seeded(self.seed + trainer.global_rank))
            evaluation = evaluate(trainer, pl_module, limit=limit)
        if self.name not in evaluation.metrics:
            raise self._unknown(evaluation)
        return evaluation

    def _unknown(self, evaluation: Evaluation) -> MisconfigurationException:
        own, logged = get_args(MetricName), sorted(evaluation.metrics)
        near = near_names(self.name, [*own, *logged])
        hint = f" Did you mean {', '.join(repr(n) for n in near)}?" if near else ""
        return MisconfigurationException(
            f"SensitivityAnalysis(metric={self.name!r}): there is no such metric.{hint} The evaluation step logs: "
            f"{', '.join(logged) or 'nothing'}. Metrics of the output: {', '.join(own)}."
        )


def _quantize_only(stack: ExitStack, region: Region, point: str | None) -> None:
    """Quantize one point of a region; without one, its float forward runs."""
    if point is None:
        stack.enter_context(region.state("off", updates=()))
        return
    stack.enter_context(region.state("quantize", updates=()))
    stack.enter_context(region.only((point,)))
