"""Statistics of every quantization point, measured on a few batches."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import lightning.pytorch as pl

from lightning_qat.analysis.statistics.statistics import (
    LayerStatisticsResult,
    ScaleSnapshot,
    StatisticsCollector,
    WeightCodes,
)
from lightning_qat.callbacks.analyses.undisturbed_analysis import sampled_steps, undisturbed_analysis


@dataclass(frozen=True)
class LayerMeasurement:
    """One measurement of a quantized model.

    Args:
        result: the statistics of every point.
        codes: the integer codes of the weights, by region, to compare the next measurement with; only of regions that
            have scales.
    """

    result: LayerStatisticsResult
    codes: dict[str, WeightCodes]


def measure_layers(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batches: int,
    seed: int = 0,
    calibrated: Mapping[str, ScaleSnapshot] | None = None,
    codes: Mapping[str, WeightCodes] | None = None,
) -> LayerMeasurement:
    """Measure now, in eval mode with quantization on. Call it on all ranks; nothing is written, logged or changed.

    Args:
        trainer: the running trainer.
        pl_module: its module.
        batches: how many, per rank.
        seed: decides which batches are drawn from shuffled data.
        calibrated: the scales that calibration found, by region; drift is measured from them.
        codes: the codes of the weights in an earlier measurement, by region; flips are counted from them.

    Raises:
        MisconfigurationException: there are no regions, or no data.
    """
    calibrated, codes = calibrated or {}, codes or {}
    with undisturbed_analysis(trainer, pl_module, "LayerStatistics", seed=seed) as regions, ExitStack() as stack:
        collectors = {
            path: StatisticsCollector(region, calibrated.get(path), codes.get(path)) for path, region in regions.items()
        }
        for collector in collectors.values():
            stack.enter_context(collector)
        for step in sampled_steps(trainer, pl_module, batches):
            step()
        for collector in collectors.values():
            collector.all_reduce()
        found = {path: c.codes for path, c in collectors.items() if c.region.is_calibrated}
    return LayerMeasurement(
        LayerStatisticsResult.merged({path: collector.result() for path, collector in collectors.items()}), found
    )
