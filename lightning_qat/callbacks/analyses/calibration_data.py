"""Whether the calibration data look like the data that the model is trained and evaluated on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_debug  # type: ignore[attr-defined]

from lightning_qat.analysis.captured_calls import capture_calls
from lightning_qat.analysis.comparison.foreign_data import ForeignPoints, Moments, foreign_points, moments_of
from lightning_qat.analysis.comparison.tensor_makers import TensorMakers
from lightning_qat.analysis.diagnosis.diagnosis_result import DiagnosisResult
from lightning_qat.callbacks.analyses.undisturbed_analysis import undisturbed_analysis
from lightning_qat.callbacks.passes.calibration_batches import calibration_owner
from lightning_qat.callbacks.passes.extra_batches import extra_batches
from lightning_qat.callbacks.passes.fresh_loaders import Stage
from lightning_qat.callbacks.passes.run_step import run_step
from lightning_qat.callbacks.quantized_run import evaluations_of
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.quantization.region.region import Region

_BATCHES = 4
_DATA: Mapping[Stage, str] = {"train": "training data", "validate": "validation data"}


@dataclass(frozen=True)
class ForeignData:
    """Calibration data that are not those the model is for.

    Args:
        text: what differs, and what to do, as a sentence.
        action: what to do, in short.
        stage: whose data to analyse instead.
        regions: the points that differ, by the path of the region.
    """

    text: str
    action: str
    stage: Stage
    regions: Mapping[str, ForeignPoints]

    def blamed(self, diagnosis: DiagnosisResult, regions: Mapping[str, Region]) -> DiagnosisResult:
        """Return a diagnosis that blames these data for all activations that are off."""
        held = {
            path: {
                name: f"It has {calibration} in calibration, and {data} in the data that the model is for."
                for name, (calibration, data) in points.differing.items()
            }
            for path, points in self.regions.items()
        }
        calibrated = {
            (path, plan.name)
            for path, region in regions.items()
            for plan in region.plan.points
            if not plan.is_weight and plan.fixed_scale is None
        }
        return diagnosis.with_foreign_data(self.text, self.action, held, calibrated)


def foreign_data(trainer: pl.Trainer, pl_module: pl.LightningModule, who: str) -> ForeignData | None:
    """Compare the calibration data with those of training and validation, on a few batches; nothing is changed.

    Data of a ``calibration_dataloader()`` are foreign if they are like neither; training data, if validation gets
    others. All are shown to the float model in evaluation mode, so that dropout and batch norm make no difference.
    Data that the validation step cannot read (two views of each image) are left out.
    Call it on all ranks; the result is that of rank zero, and callbacks share it.

    Args:
        trainer: the running trainer.
        pl_module: its module.
        who: the callback, for messages.

    Returns:
        None if the data are alike, or nothing is known of them.
    """
    compare = partial(_compared, trainer, pl_module, who)
    return evaluations_of(trainer).once(trainer, pl_module, "foreign data", compare)


def _compared(trainer: pl.Trainer, pl_module: pl.LightningModule, who: str) -> ForeignData | None:
    owner = calibration_owner(trainer)
    wanted: tuple[Stage, ...] = ("train", "validate") if owner is not None else ("validate",)
    stages = [stage for stage in wanted if _gives_batches_again(_compat.attached_loader(trainer, stage))]
    others: dict[Stage, dict[str, ForeignPoints]] = {}
    with undisturbed_analysis(trainer, pl_module, who, "off") as regions:
        own = _readable_moments(trainer, pl_module, regions, "calibration") if stages else None
        for stage in stages:
            data = _readable_moments(trainer, pl_module, regions, stage) if own is not None else None
            if own is not None and data is not None:
                others[stage] = _foreign(regions, own, data)
    found = None
    if others and all(others.values()):
        loader = f"calibration_dataloader() of {type(owner).__name__}" if owner is not None else "train_dataloader()"
        stage, points = next(iter(others.items()))
        found = _described(points, stage, loader)
    shared: ForeignData | None = trainer.strategy.broadcast(found)
    return shared


def _gives_batches_again(loader: Any) -> bool:
    """Whether there is a loader, and looking at its batches takes none away from the run."""
    if loader is None:
        return False
    parts = (loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader)).flattened
    return not any(isinstance(part, Iterator) for part in parts)


def _readable_moments(
    trainer: pl.Trainer, pl_module: pl.LightningModule, regions: Mapping[str, Region], stage: Stage
) -> dict[str, dict[str, Moments]] | None:
    """The moments of a stage; None on all ranks if the step fails on its batches on one of them."""
    try:
        found = _moments(trainer, pl_module, regions, stage)
    except Exception as error:  # nobody asked for this step on these batches
        rank_zero_debug(f"the {stage} data are not compared with others: {error!r}")
        found = None
    return found if trainer.strategy.reduce_boolean_decision(found is not None, all=True) else None


def _moments(
    trainer: pl.Trainer, pl_module: pl.LightningModule, regions: Mapping[str, Region], stage: Stage
) -> dict[str, dict[str, Moments]]:
    """What the points of all regions hold in some batches of a stage."""
    calls = [
        capture_calls(regions, partial(run_step, trainer, pl_module, extra))
        for extra in extra_batches(trainer, pl_module, _BATCHES, stage)
    ]
    with trainer.precision_plugin.forward_context():
        return {
            path: moments_of(region, [c for found in calls for c in found[path]]) for path, region in regions.items()
        }


def _foreign(
    regions: Mapping[str, Region], own: Mapping[str, dict[str, Moments]], data: Mapping[str, dict[str, Moments]]
) -> dict[str, ForeignPoints]:
    found = {}
    for path, region in regions.items():
        makers = TensorMakers(region)
        given = [plan.name for plan in region.plan.points if makers.given(plan)]
        if (points := foreign_points(own[path], data[path], given)) is not None:
            found[path] = points
    return found


def _described(regions: Mapping[str, ForeignPoints], stage: Stage, loader: str) -> ForeignData:
    others_are = _DATA[stage]
    path, points = next(iter(regions.items()))
    name, (calibration, data) = next(iter(points.differing.items()))
    differing = sum(len(p.differing) for p in regions.values())
    compared = sum(len(p.compared) for p in regions.values())
    action = f"Let {loader} prepare its data as the {others_are} are: the same samples, transforms and normalization."
    text = (
        f"Calibration data are not the {others_are}: what {loader} gives makes other values at {differing} of "
        f"{compared} points. {f'{path}.{name}' if path else name} has {calibration} there, and {data} in the "
        f"{others_are}. {action} Then calibrate again: overrides of single points do not repair this."
    )
    return ForeignData(text, action, stage, regions)
