"""What is wrong with a quantized model before it is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lightning_qat.analysis.model_check.calls_check import check_call_ranges, check_calls
from lightning_qat.analysis.model_check.checked_region import Check, CheckedRegion, CheckOptions, rules_of
from lightning_qat.analysis.model_check.configuration_check import check_configuration, check_profile
from lightning_qat.analysis.model_check.divisor_check import check_divisors
from lightning_qat.analysis.model_check.dtype_check import check_dtype_statistics, check_layer_configuration
from lightning_qat.analysis.model_check.export_check import check_export
from lightning_qat.analysis.model_check.finding import Finding, in_region, sorted_findings
from lightning_qat.analysis.model_check.float_ops_check import check_float_ops
from lightning_qat.analysis.model_check.fusion_check import check_fusion, check_varying_code
from lightning_qat.analysis.model_check.learned_scales_check import check_learned_scales
from lightning_qat.analysis.model_check.model_check_result import ModelCheckResult, Section
from lightning_qat.analysis.model_check.output_check import check_outputs
from lightning_qat.analysis.model_check.scale_check import check_scales
from lightning_qat.analysis.model_check.training_check import check_training
from lightning_qat.analysis.model_check.weight_check import check_weights
from lightning_qat.analysis.model_check.written_check import check_written_outputs
from lightning_qat.quantization.planning.hardware_profile import HardwareProfile
from lightning_qat.quantization.planning.hardware_profile_files import hardware_profile
from lightning_qat.quantization.region.region import Region

__all__ = ["ModelCheckResult", "Section", "check"]

CHECKS: tuple[Check, ...] = (
    check_fusion,
    check_varying_code,
    check_calls,
    check_call_ranges,
    check_dtype_statistics,
    check_layer_configuration,
    check_outputs,
    check_written_outputs,
    check_float_ops,
    check_configuration,
    check_profile,
    check_scales,
    check_learned_scales,
    check_divisors,
    check_weights,
    check_training,
    check_export,
)
"""In the order of the report."""


def check(
    region: Region | Mapping[str, Region],
    *,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    precision: str = "32-true",
    batch_size: int | None = None,
    profile: HardwareProfile | str | Path | None = None,
    extra_findings: Iterable[Finding] = (),
) -> ModelCheckResult:
    """Find what is wrong with a quantized model before it is trained.

    Runs nothing of the model and changes nothing. Works at any time after fake-quant was inserted; the checks that need
    the ranges of the data say so until the region is calibrated. Takes time in proportion to the number of ops.

    Args:
        region: the region to check, or several by the path of their target.
        optimizers: those that will train the model; learned scales have to be in one of them. Not checked if none is
            given.
        precision: the Trainer's ``precision``.
        batch_size: samples per batch and device in training; None if not known.
        profile: the hardware to check against: a profile, the name of a shipped one, or the path of a YAML file.
        extra_findings: findings of the caller, to be sorted in.

    Returns:
        The findings, most severe first, and the tables of the report.

    Example:
        >>> from lightning_qat.quantization.region.insertion import insert
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sigmoid())
        >>> (finding,) = check(insert(model, (torch.ones(2, 4),))).findings
        >>> finding.severity, finding.kind, finding.names
        ('warning', 'low-precision output', ('1',))
        >>> print(finding.yaml, end="")
        overrides:
          - {match: "1.output", activation: {dtype: int16}}
    """
    regions = {"": region} if isinstance(region, Region) else dict(region)
    options = CheckOptions(tuple(optimizers), precision, batch_size, hardware_profile(profile))
    findings: list[Finding] = list(extra_findings)
    sections: list[Section] = []
    rules = rules_of(regions)
    for path, one in regions.items():
        checked = CheckedRegion(one, options, rules[path])
        for run in CHECKS:
            found, tables = run(checked)
            findings += in_region(found, path, alone=len(regions) == 1)
            sections += [replace(section, region=path) for section in tables]
    return ModelCheckResult(sorted_findings(findings), tuple(sections))
