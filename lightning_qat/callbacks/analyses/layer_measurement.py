"""Statistics of every quantization point, measured on a few batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import lightning.pytorch as pl

from lightning_qat.analysis.captured_calls import RepeatableForward, analysis_mode
from lightning_qat.analysis.sensitivity.sample_axes import first_samples
from lightning_qat.analysis.statistics.statistics import (
    LayerStatisticsResult,
    ScaleSnapshot,
    StatisticsCollector,
    WeightCodes,
)
from lightning_qat.callbacks.analyses.epoch_share import batches_of_share, samples_of_share
from lightning_qat.callbacks.analyses.region_inputs import Calls, RegionInputs
from lightning_qat.callbacks.analyses.undisturbed_analysis import sampled_steps, undisturbed_analysis
from lightning_qat.quantization.region.region import Region


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
    inputs: RegionInputs | None = None,
) -> LayerMeasurement:
    """Measure now, in eval mode with quantization on. Call it on all ranks; nothing is written, logged or changed.

    Args:
        trainer: the running trainer.
        pl_module: its module.
        batches: how many, per rank.
        seed: decides which batches are drawn from shuffled data.
        calibrated: the scales that calibration found, by region; drift is measured from them.
        codes: the codes of the weights in an earlier measurement, by region; flips are counted from them.
        inputs: what the regions get in the module's steps. If given, only the regions run, on those first samples of
            each batch that are together a 40th of the samples of an epoch.

    Raises:
        MisconfigurationException: there are no regions, or no data.
    """
    steps = inputs is None or not inputs.are_kept(batches)
    with undisturbed_analysis(trainer, pl_module, "LayerStatistics", seed=seed, steps=steps) as regions:
        collect = partial(_collected, regions, calibrated or {}, codes or {})
        if inputs is None:
            collectors = collect(partial(_run_steps, trainer, pl_module, batches))
        else:
            collectors = _of_share(trainer, regions, inputs.of(trainer, pl_module, regions, batches), collect)
        for collector in collectors.values():
            collector.all_reduce()
        found = {path: c.codes for path, c in collectors.items() if c.region.is_calibrated}
    return LayerMeasurement(
        LayerStatisticsResult.merged({path: collector.result() for path, collector in collectors.items()}), found
    )


_Collectors = dict[str, StatisticsCollector]


def _collected(
    regions: Mapping[str, Region],
    calibrated: Mapping[str, ScaleSnapshot],
    codes: Mapping[str, WeightCodes],
    run: Callable[[], None],
) -> _Collectors:
    """The statistics of what the regions quantize in a function."""
    collectors = {
        path: StatisticsCollector(region, calibrated.get(path), codes.get(path)) for path, region in regions.items()
    }
    with ExitStack() as stack:
        for collector in collectors.values():
            stack.enter_context(collector)
        run()
    return collectors


def _run_steps(trainer: pl.Trainer, pl_module: pl.LightningModule, batches: int) -> None:
    for step in sampled_steps(trainer, pl_module, batches):
        step()


def _of_share(
    trainer: pl.Trainer,
    regions: Mapping[str, Region],
    calls: Calls,
    collect: Callable[[Callable[[], None]], _Collectors],
) -> _Collectors:
    """The statistics of the first samples of some calls; of all samples, where a model does not take fewer."""
    share = batches_of_share(trainer)
    samples = {path: samples_of_share(share, found) for path, found in calls.items()}
    parts = {path: [first_samples(call, samples[path]) for call in found] for path, found in calls.items()}
    with trainer.precision_plugin.forward_context():
        try:
            return collect(partial(_run_calls, regions, parts))
        except Exception:  # a model of one batch size, or whose samples refer to others
            return collect(partial(_run_calls, regions, calls))


def _run_calls(regions: Mapping[str, Region], calls: Calls) -> None:
    for path, region in regions.items():
        with analysis_mode(region, buffers=False):
            for call in calls[path]:
                with RepeatableForward(region.target, call) as forward:
                    forward()
