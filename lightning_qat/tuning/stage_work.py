"""The work of a stage that does not train: evaluating, searching a mix, asking whether the pipeline is to blame."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_qat.analysis.mixed_precision.measure_errors import measure_errors
from lightning_qat.analysis.mixed_precision.measured_forwards import quantized_by
from lightning_qat.analysis.mixed_precision.point_quantizers import plans_by_dtype, quantizers_by_dtype
from lightning_qat.analysis.mixed_precision.precision_choice import PrecisionChoice
from lightning_qat.analysis.mixed_precision.precision_errors import PrecisionErrors
from lightning_qat.atomic_files import write_atomically
from lightning_qat.callbacks.analyses.diagnosed_regions import diagnosed_module
from lightning_qat.callbacks.analyses.region_inputs import RegionInputs
from lightning_qat.callbacks.analyses.undisturbed_analysis import undisturbed_analysis
from lightning_qat.callbacks.model_check import ModelCheck
from lightning_qat.callbacks.pipeline_check import PipelineCheck
from lightning_qat.callbacks.quantized_run import evaluations_of, require_quantization
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.reading.files import Document
from lightning_qat.quantization.region.region import Region
from lightning_qat.reporting.files import write_csv, write_json, write_result
from lightning_qat.tuning.manifest import StageOutcome
from lightning_qat.tuning.size_search import smallest_passing
from lightning_qat.tuning.stage_callbacks import WHO, outcome_of, the_region
from lightning_qat.tuning.stage_request import StageRequest
from lightning_qat.tuning.target_check import TargetCheck

ERRORS = "errors.json"
EVALUATIONS = "evaluations.json"


def stage_work(trainer: pl.Trainer, module: pl.LightningModule, request: StageRequest) -> StageOutcome:
    """Do the work of a stage on the calibrated module of a run that is about to start.

    Args:
        trainer: the user's trainer.
        module: its module, with fake-quant as the stage asks for.
        request: of the stage.
    """
    began = time.monotonic()
    region = the_region(trainer, module)
    work = {"float": _float, "calibrated": _calibrated, "search": _search, "ladder": _ladder}[request.kind]
    found = work(trainer, module, region, request)
    return replace(outcome_of(request, region), seconds=time.monotonic() - began, **found)


Found = dict[str, Any]
"""Fields of the outcome."""


def _float(trainer: pl.Trainer, module: pl.LightningModule, region: Region, request: StageRequest) -> Found:
    metrics = evaluations_of(trainer).evaluate(trainer, module, "off").metrics
    check = ModelCheck().check(trainer, module)
    write_result(check, Path(request.folder), "model_check_result", formats=("txt", "json"))
    return {"metrics": {"float": metrics}, "remarks": (check.note,) if check.note else ()}


def _calibrated(trainer: pl.Trainer, module: pl.LightningModule, region: Region, request: StageRequest) -> Found:
    metrics = evaluations_of(trainer).evaluate(trainer, module, "quantize").metrics
    remarks: tuple[str, ...] = ()
    if TargetCheck(request.settings, request.float_metrics).collapsed(metrics):
        diagnosis = diagnosed_module(trainer, module, WHO)
        write_result(diagnosis, Path(request.folder), "diagnosis", formats=("csv", "txt", "json"))
        remarks = tuple(
            f"{row.point}: {row.verdict}. {row.evidence} {row.action}".strip() for row in diagnosis.rows[:3]
        )
    return {"metrics": {"calibrated": metrics}, "remarks": remarks}


def _ladder(trainer: pl.Trainer, module: pl.LightningModule, region: Region, request: StageRequest) -> Found:
    result = PipelineCheck().check(trainer, module)
    write_result(result, Path(request.folder), PipelineCheck.name, formats=("txt", "json"))
    return {"remarks": (result.note,)}


def _search(trainer: pl.Trainer, module: pl.LightningModule, region: Region, request: StageRequest) -> Found:
    settings, folder = request.settings, Path(request.folder)
    errors = _errors(trainer, module, region, request)
    check = TargetCheck(settings, request.float_metrics)
    known = _known_evaluations(folder)
    most = len(errors.together)
    leaders = errors.choose(top="leaders", always=settings.always)
    choices: dict[int, PrecisionChoice] = {}

    def passes(size: int) -> bool:
        choices[size] = errors.choose(top=size, always=settings.always)
        if str(size) not in known:
            known[str(size)] = _evaluated(trainer, module, region, request, choices[size].raised)
            write_atomically(folder / EVALUATIONS, json.dumps(known, indent=2) + "\n")
        return check.passes(known[str(size)])

    found = smallest_passing(most, passes, max(1, len(leaders.rows)), settings.evaluations)
    best = found.passing or max(found.evaluated, key=lambda size: _worst_ratio(check, known[str(size)]))
    write_result(choices[best], folder, "choice", formats=("csv", "txt", "json"))
    write_csv(errors.front(), folder / "front.csv")
    write_json(errors.front("bops"), folder / "front.json")
    tried = ", ".join(f"{n} {'passes' if ok else 'fails'}" for n, ok in found.evaluated.items())
    sizes = {"chosen": best, "passing": found.passing, "failing": found.failing}
    return {
        "metrics": {"calibrated": known[str(best)]},
        "raised": choices[best].raised,
        "sizes": {name: size for name, size in sizes.items() if size is not None},
        "remarks": (f"Sizes tried: {tried}.", errors.note),
    }


def _errors(trainer: pl.Trainer, module: pl.LightningModule, region: Region, request: StageRequest) -> PrecisionErrors:
    path = Path(request.folder) / ERRORS
    if path.exists():
        try:
            return PrecisionErrors.load(path, region)
        except ConfigurationError:  # of a run that was killed before it changed: measure again
            pass
    settings = request.settings
    with undisturbed_analysis(trainer, module, WHO, "quantize") as regions:
        calls = RegionInputs().of(trainer, module, regions, settings.batches)
        errors = measure_errors(
            region,
            next(iter(calls.values())),
            (settings.narrow, settings.wide),
            settings.output,
            profile=require_quantization(trainer, WHO).profile,
        )
    write_json(errors, path)
    write_csv(errors, path.with_suffix(".csv"))
    return errors


def _evaluated(
    trainer: pl.Trainer, module: pl.LightningModule, region: Region, request: StageRequest, raised: tuple[str, ...]
) -> dict[str, float]:
    """Evaluate the calibrated model with some points at the wide type; their scales are those of a new calibration."""
    narrow, wide = request.settings.narrow, request.settings.wide
    plans = plans_by_dtype(region, (narrow, wide), require_quantization(trainer, WHO).profile)
    quantizers = quantizers_by_dtype(region, plans)
    chosen = {name: quantizers[name][wide] for name in raised}
    with quantized_by(region, chosen):
        return evaluations_of(trainer).evaluate(trainer, module, "quantize").metrics


def _known_evaluations(folder: Path) -> dict[str, dict[str, float]]:
    path = folder / EVALUATIONS
    if not path.exists():
        return {}
    return Document(path, "a list of evaluations", "remove it").as_json(dict[str, dict[str, float]])


def _worst_ratio(check: TargetCheck, metrics: Mapping[str, float]) -> float:
    """How near metrics come to their targets: the worst of them, 1 at the target."""
    ratios = []
    for name, target in check.targets.items():
        value, reference = metrics.get(name, math.nan), check.float_metrics[name]
        distance = abs(value - reference) / max(abs(target - reference), 1e-12)
        ratios.append(-distance if math.isfinite(distance) else -math.inf)
    return min(ratios)
