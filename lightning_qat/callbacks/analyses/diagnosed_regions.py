"""Comparing the regions of a module with their float models, and diagnosing their points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl

from lightning_qat.analysis.comparison.comparison import compare
from lightning_qat.analysis.comparison.comparison_result import LayerComparisonResult
from lightning_qat.analysis.diagnosis.diagnosis import diagnose
from lightning_qat.analysis.diagnosis.diagnosis_result import DiagnosisResult
from lightning_qat.analysis.model_check.checked_region import rules_of
from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult
from lightning_qat.callbacks.analyses.region_inputs import Calls, RegionInputs
from lightning_qat.callbacks.analyses.undisturbed_analysis import undisturbed_analysis
from lightning_qat.callbacks.quantized_run import require_quantization
from lightning_qat.callbacks.trainer.progress import progress
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.overrides import glob_covers
from lightning_qat.quantization.region.region import Region


def diagnosed_regions(
    trainer: pl.Trainer,
    regions: Mapping[str, Region],
    calls: Calls,
    who: str,
    *,
    output: str | None = None,
    post_process: Callable[[Any], Any] | None = None,
    ranges: Mapping[str, Sequence[float]] | None = None,
    sensitivity: SensitivityResult | None = None,
    seed: int = 0,
) -> tuple[LayerComparisonResult, DiagnosisResult]:
    """Compare and diagnose all regions. Call it on all ranks, within an ``undisturbed_analysis``.

    Args:
        trainer: the running trainer.
        regions: by the path of their target.
        calls: their inputs.
        who: the callback, for messages.
        output: path into the output; all of it if not given.
        post_process: applied to that output.
        ranges: declared ranges of points.
        sensitivity: of the points of all regions, if it is known.
        seed: of the random numbers that the forwards draw.
    """
    results, diagnoses = {}, {}
    rules = rules_of(regions)
    profile = require_quantization(trainer, who).profile
    total = sum(map(len, calls.values()))
    with trainer.precision_plugin.forward_context(), progress(trainer, "layer comparison", total) as advance:
        for path, region in regions.items():
            results[path] = compare(
                region,
                _advancing(calls[path], advance),
                output,
                post_process,
                seed=seed,
                across_ranks=trainer.world_size > 1,
                rules=rules[path],
                profile=profile,
            )
            own = {g: e for g, e in (ranges or {}).items() if any(glob_covers(g, name) for name in region.points)}
            diagnoses[path] = diagnose(results[path], _of_region(sensitivity, path), own)
    return LayerComparisonResult.merged(results), DiagnosisResult.merged(diagnoses)


def diagnosed_module(trainer: pl.Trainer, pl_module: pl.LightningModule, who: str) -> DiagnosisResult:
    """Diagnose the points of a module on one batch. Call it on all ranks; nothing is changed.

    Raises:
        MisconfigurationException: the float model computes NaN, or there are no data.
    """
    with undisturbed_analysis(trainer, pl_module, who, "off") as regions:
        calls = RegionInputs().of(trainer, pl_module, regions, 1)
        return diagnosed_regions(trainer, regions, calls, who)[1]


def _of_region(result: SensitivityResult | None, path: str) -> SensitivityResult | None:
    return None if result is None else replace(result, rows=tuple(row for row in result.rows if row.region == path))


def _advancing(calls: Sequence[Call], advance: Callable[[], None]) -> Iterator[Call]:
    for call in calls:
        yield call
        advance()
