"""Turning the callbacks of the user's run into those of a stage: types, places of files, what is noted at the end."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from lightning_qat.analysis.mixed_precision.merged_errors import naming
from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.convergence_monitor import ConvergenceMonitor
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.callbacks.quantized_run import evaluations_of, require_regions
from lightning_qat.callbacks.trainer.final_report import FinalReport
from lightning_qat.callbacks.trainer.listed_callbacks import listed
from lightning_qat.callbacks.trainer.output_directory import move_outputs
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.overrides import Override
from lightning_qat.quantization.qconfig import QConfig
from lightning_qat.quantization.region.region import Region, find_regions
from lightning_qat.tuning.manifest import StageOutcome
from lightning_qat.tuning.stage_request import StageRequest, raising, write_outcome
from lightning_qat.tuning.tuning_settings import file_hash

WHO = "tune"
LAST = "last.ckpt"


@dataclass(frozen=True)
class Configured:
    """What a stage has made of the user's run.

    Args:
        quantization: the callback that quantizes, with the types of the stage.
        adds_quantization: the run had none.
        adds_calibration: the run had no Calibration.
        ckpt_path: the checkpoint that ``fit`` starts from.
        inputs: SHA-256 of the files that the run reads beside those on its command line.
    """

    quantization: QuantizationAwareTraining
    adds_quantization: bool
    adds_calibration: bool
    ckpt_path: str | None
    inputs: Mapping[str, str]


def configure(trainer: pl.Trainer, request: StageRequest, arguments: dict[str, Any]) -> Configured:
    """Give QuantizationAwareTraining the types of a stage; add it and Calibration if the run lacks them.

    Args:
        trainer: the trainer of the user's run, before it has run.
        request: of the stage.
        arguments: those of ``trainer.fit``; without QuantizationAwareTraining, ``ckpt_path`` holds float weights.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = listed(trainer, QuantizationAwareTraining)
    adds_quantization = not found
    if adds_quantization:
        found = [QuantizationAwareTraining(init_from=arguments.pop("ckpt_path", None))]
        callbacks.insert(0, found[0])
    adds_calibration = not listed(trainer, Calibration)
    if adds_calibration:
        callbacks.insert(callbacks.index(found[0]) + 1, Calibration())
    quantization = found[0]
    qconfig: QConfig = copy.deepcopy(quantization.qconfig)
    qconfig.activation.dtype = qconfig.weight.dtype = request.dtype  # type: ignore[assignment]
    raised = raising(request.raised, request.settings.wide)
    quantization.qconfig = qconfig
    quantization.overrides = [*quantization.overrides, *Override.list_of(raised)]
    quantization.is_configured = True
    ckpt_path = arguments.get("ckpt_path")
    tables = [rule.sensitivity for rule in quantization.overrides]
    files = [name for name in (quantization.init_from, ckpt_path, *tables) if name and Path(name).is_file()]
    inputs = {str(Path(name).resolve()): file_hash(Path(name)) for name in files}
    return Configured(quantization, adds_quantization, adds_calibration, ckpt_path, inputs)


def prepare_training(
    trainer: pl.Trainer,
    request: StageRequest,
    arguments: dict[str, Any],
    inputs: Mapping[str, str],
    started: Callable[[pl.LightningModule], object],
) -> None:
    """Let a fit write everything into the folder of its stage, go on from its own last checkpoint, and note its end.

    Args:
        trainer: the trainer of the user's run, before it has run.
        request: of the stage.
        arguments: those of ``trainer.fit``.
        inputs: SHA-256 of the files that the run reads.
        started: called with the module when fake-quant is in it.
    """
    folder = Path(request.folder)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks[:] = [c for c in callbacks if not isinstance(c, SaveConfigCallback)]  # it refuses a second start
    move_outputs(trainer, folder)
    callbacks.append(LastCheckpoint(folder))
    if not listed(trainer, ConvergenceMonitor):
        callbacks.append(ConvergenceMonitor(stop=True))
    callbacks.append(StageEnd(request, inputs, started))
    if (folder / LAST).exists():  # killed in the middle
        arguments["ckpt_path"] = str(folder / LAST)


class LastCheckpoint(ModelCheckpoint):
    """Keeps the newest checkpoint as ``last.ckpt``, whole at any moment.

    A type of its own: a module that brings a ModelCheckpoint replaces only those of Lightning's type, and two callbacks
    of one type would share their state.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)

    @override
    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        beside = f"{filepath}.part"  # Lightning's own temporary file may be on another disk, and is then copied
        super()._save_checkpoint(trainer, beside)
        if trainer.is_global_zero:
            os.replace(beside, filepath)


class StageEnd(FinalReport):
    """Evaluates the trained model and writes what the stage gave; also where a killed run had only that left to do."""

    def __init__(
        self, request: StageRequest, inputs: Mapping[str, str], started: Callable[[pl.LightningModule], object]
    ) -> None:
        self.request = request
        self.inputs = dict(inputs)
        self._started = started

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._started(pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = evaluations_of(trainer).evaluate(trainer, pl_module, "quantize").metrics
        monitors = [m.result for m in listed(trainer, ConvergenceMonitor) if m.result is not None]
        remarks = tuple(result.note for result in monitors if result.is_bad)
        outcome = replace(
            outcome_of(self.request, require_regions(trainer, pl_module, WHO)),
            metrics={"QAT": metrics},
            inputs=self.inputs,
            remarks=remarks,
        )
        if trainer.is_global_zero:
            write_outcome(self.request.folder, outcome)


def outcome_of(request: StageRequest, regions: Mapping[str, Region]) -> StageOutcome:
    """Return what a stage gave but for its metrics; the types are those in effect, not those that were asked for.

    Raises:
        ConfigurationError: a point did not get the type that was asked for.
    """
    names = naming(regions)
    points = [
        (names[path](point.name), point.dtype)
        for path, region in regions.items()
        for point in region.plan.points
        if point.same_as is None
    ]
    wide = tuple(name for name, dtype in points if dtype == request.settings.wide and dtype != request.dtype)
    missing = [name for name in request.raised if name not in wide]
    if missing:
        raise ConfigurationError(
            f"stage {request.name}: {', '.join(missing[:3])} did not become {request.settings.wide}. Either the model "
            "has changed, or the project inserts fake-quant without QuantizationAwareTraining."
        )
    return StageOutcome(raised=wide, points=len(points))


def rules_in_effect(pl_module: pl.LightningModule) -> list[Override]:
    """Return the overrides that a module was planned with: rules that named a table name its points."""
    regions = find_regions(pl_module)
    return Override.list_of(next(iter(regions.values())).plan.overrides) if regions else []
