"""The work of a stage that does not train: evaluating, searching a mix, asking whether the pipeline is to blame."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_qat.analysis.mixed_precision.measure_errors import measure_regions
from lightning_qat.analysis.mixed_precision.measured_forwards import quantized_by
from lightning_qat.analysis.mixed_precision.merged_errors import naming
from lightning_qat.analysis.mixed_precision.point_quantizers import plans_by_dtype, quantizers_by_dtype
from lightning_qat.analysis.mixed_precision.precision_choice import PrecisionChoice, PrecisionFront
from lightning_qat.analysis.mixed_precision.precision_errors import PrecisionErrors
from lightning_qat.analysis.mixed_precision.region_errors import MeasuringOptions
from lightning_qat.atomic_files import json_value, write_atomically
from lightning_qat.callbacks.analyses.diagnosed_regions import diagnosed_module
from lightning_qat.callbacks.analyses.region_inputs import RegionInputs
from lightning_qat.callbacks.analyses.undisturbed_analysis import sampled_steps, undisturbed_analysis
from lightning_qat.callbacks.model_check import ModelCheck
from lightning_qat.callbacks.pipeline_check import PipelineCheck
from lightning_qat.callbacks.quantized_run import evaluations_of, require_quantization, require_regions
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.reading.files import Document
from lightning_qat.quantization.region.region import Region
from lightning_qat.reporting.files import write_csv, write_json, write_result
from lightning_qat.reporting.precision_figures import error_against_cost
from lightning_qat.reporting.sensitivity_figures import write_figure
from lightning_qat.tuning.manifest import StageOutcome
from lightning_qat.tuning.size_search import smallest_passing
from lightning_qat.tuning.stage_callbacks import WHO, outcome_of
from lightning_qat.tuning.stage_request import StageRequest
from lightning_qat.tuning.target_check import TargetCheck
from lightning_qat.tuning.time_estimate import most_trainings, training_seconds

ERRORS = "errors.json"
EVALUATIONS = "evaluations.json"


def stage_work(trainer: pl.Trainer, module: pl.LightningModule, request: StageRequest) -> StageOutcome:
    """Do the work of a stage on the calibrated module of a run that is about to start.

    Args:
        trainer: the user's trainer.
        module: its module, with fake-quant as the stage asks for.
        request: of the stage.
    """
    regions = require_regions(trainer, module, WHO)
    work = {"float": _float, "calibrated": _calibrated, "search": _search, "ladder": _ladder}[request.kind]
    found = work(trainer, module, regions, request)
    return replace(outcome_of(request, regions), **found)


Regions = Mapping[str, Region]
Found = dict[str, Any]
"""Fields of the outcome."""


def _float(trainer: pl.Trainer, module: pl.LightningModule, regions: Regions, request: StageRequest) -> Found:
    began = time.monotonic()
    metrics = evaluations_of(trainer).evaluate(trainer, module, "off").metrics
    times = {"evaluation": time.monotonic() - began}
    if most_trainings(request.settings):
        training = training_seconds(trainer, module, times["evaluation"])
        times |= {"training": training} if training is not None else {}
    check = ModelCheck().check(trainer, module)
    write_result(check, Path(request.folder), "model_check_result", formats=("txt", "json"))
    return {"metrics": {"float": metrics}, "remarks": (check.note,) if check.note else (), "times": times}


def _calibrated(trainer: pl.Trainer, module: pl.LightningModule, regions: Regions, request: StageRequest) -> Found:
    metrics = evaluations_of(trainer).evaluate(trainer, module, "quantize").metrics
    remarks: tuple[str, ...] = ()
    if TargetCheck(request.settings, request.float_metrics).collapsed(metrics):
        diagnosis = diagnosed_module(trainer, module, WHO)
        write_result(diagnosis, Path(request.folder), "diagnosis", formats=("csv", "txt", "json"))
        remarks = tuple(
            f"{row.point}: {row.verdict}. {row.evidence} {row.action}".strip() for row in diagnosis.rows[:3]
        )
    return {"metrics": {"calibrated": metrics}, "remarks": remarks}


def _ladder(trainer: pl.Trainer, module: pl.LightningModule, regions: Regions, request: StageRequest) -> Found:
    result = PipelineCheck().check(trainer, module)
    write_result(result, Path(request.folder), PipelineCheck.name, formats=("txt", "json"))
    return {"remarks": (result.note,)}


def _search(trainer: pl.Trainer, module: pl.LightningModule, regions: Regions, request: StageRequest) -> Found:
    settings, folder = request.settings, Path(request.folder)
    errors = _errors(trainer, module, regions, request)
    check = TargetCheck(settings, request.float_metrics)
    mixes = distinct_mixes(errors, settings.always)
    evaluate = _Evaluations(trainer, module, regions, request, errors)
    leaders = len(errors.choose(top="leaders", always=settings.always).rows)
    start = next((i for i, mix in enumerate(mixes) if len(mix.rows) >= leaders), 1)
    found = smallest_passing(
        len(mixes) - 1, lambda number: check.passes(evaluate(mixes[number])), max(1, start), settings.evaluations
    )
    best = found.passing or min(found.evaluated, key=lambda number: check.shortfall(evaluate(mixes[number])))
    write_result(mixes[best], folder, "choice", formats=("csv", "txt", "json"))
    front = errors.front(always=settings.always)
    write_csv(front, folder / "front.csv")
    _draw(front, len(mixes[best].rows), folder)
    write_json(errors.front("bops", always=settings.always), folder / "front.json")
    tried = ", ".join(f"{len(mixes[n].rows)} {'passes' if ok else 'fails'}" for n, ok in found.evaluated.items())
    sizes = {"chosen": best, "passing": found.passing, "failing": found.failing}
    return {
        "metrics": {"calibrated": evaluate(mixes[best])},
        "raised": mixes[best].raised,
        "sizes": {name: number for name, number in sizes.items() if number is not None},
        "remarks": (f"Numbers of raised points tried: {tried}.", errors.note),
    }


def _draw(front: PrecisionFront, chosen: int, folder: Path) -> None:
    with suppress(ConfigurationError):  # matplotlib is an extra; the numbers are in the csv
        write_figure(error_against_cost(front, chosen), folder / "front.png")


def distinct_mixes(errors: PrecisionErrors, always: Sequence[str]) -> list[PrecisionChoice]:
    """Return the mixes from the fewest raised points to all of them, each once; the first raises what is always raised.

    Each next one gains most per point. Points that the hardware ties are raised in one step.
    """
    mixes = list(errors.front(always=always).choices)
    if errors.together:
        mixes.append(errors.choose(points=errors.together))
    return list({frozenset(mix.raised): mix for mix in reversed(mixes)}.values())[::-1]


class _Evaluations:
    """Evaluates the calibrated model with mixes; the metrics are kept in a file, so that none is evaluated twice."""

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        regions: Regions,
        request: StageRequest,
        errors: PrecisionErrors,
    ) -> None:
        self._trainer, self._module, self._regions = trainer, module, regions
        self._wide = request.settings.wide
        self._path = Path(request.folder) / EVALUATIONS
        self._model = errors.hashes
        profile = require_quantization(trainer, WHO).profile
        plans = plans_by_dtype(regions, (request.settings.narrow, self._wide), profile)
        self._quantizers = {path: quantizers_by_dtype(region, plans[path]) for path, region in regions.items()}
        remedy = "remove it"
        exists = self._path.exists()
        document = Document(self._path, "a list of evaluations", remedy)
        self._known = document.as_json(dict[str, dict[str, float]]) if exists else {}

    def __call__(self, mix: PrecisionChoice) -> dict[str, float]:
        """Return the metrics of a mix: those of a new calibration with its types."""
        key = hashlib.sha256(json.dumps([dict(self._model), sorted(mix.raised)], sort_keys=True).encode()).hexdigest()
        if key not in self._known:
            self._known[key] = self._evaluated(mix)
            write_atomically(self._path, json.dumps(json_value(self._known), indent=2) + "\n")
        return self._known[key]

    def _evaluated(self, mix: PrecisionChoice) -> dict[str, float]:
        with ExitStack() as stack:
            names = naming(self._regions)
            for path, region in self._regions.items():
                own = self._quantizers[path].items()
                chosen = {point: at[self._wide] for point, at in own if names[path](point) in mix.raised}
                stack.enter_context(quantized_by(region, chosen))
            return evaluations_of(self._trainer).evaluate(self._trainer, self._module, "quantize").metrics


def _errors(
    trainer: pl.Trainer, module: pl.LightningModule, regions: Regions, request: StageRequest
) -> PrecisionErrors:
    path = Path(request.folder) / ERRORS
    if path.exists():
        try:
            return PrecisionErrors.load(path, regions)
        except ConfigurationError:  # of a run that was killed before it changed: measure again
            pass
    settings = request.settings
    options = MeasuringOptions(require_quantization(trainer, WHO).profile)
    with (
        undisturbed_analysis(
            trainer, module, WHO, "off"
        ) as regions,  # a region gets what the float ones before it give
        trainer.precision_plugin.forward_context(),
    ):
        calls = RegionInputs().of(trainer, module, regions, settings.batches)
        steps = sampled_steps(trainer, module, settings.batches)
        types = (settings.narrow, settings.wide)
        errors = measure_regions(regions, calls, steps, types, settings.output, options=options)
    write_json(errors, path)
    write_csv(errors, path.with_suffix(".csv"))
    return errors
