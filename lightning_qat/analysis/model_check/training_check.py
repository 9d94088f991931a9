"""Training settings that harm a quantized model: batch statistics of tiny batches, dropout in evaluation."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_qat.analysis.model_check.checked_region import CheckedRegion
from lightning_qat.analysis.model_check.findings import Finding, shortened
from lightning_qat.analysis.model_check.model_check_result import Section
from lightning_qat.quantization.modules.batch_norms import is_batch_norm

MIN_BATCH_NORM_SAMPLES = 8
"""Below it, errors rise steeply: ResNet-50 on ImageNet, 23.6 % with 32 samples per device, 24.8 % with 8, 27.3 % with
4, 34.7 % with 2 (Wu and He, "Group Normalization", 2018, table 2)."""


def check_training(checked: CheckedRegion) -> tuple[list[Finding], list[Section]]:
    """Look at batch norm and dropout."""
    return [*_batch_norm(checked), *_active_dropout(checked)], []


def _batch_norm(checked: CheckedRegion) -> Iterable[Finding]:
    size, target = checked.options.batch_size, checked.region.target
    if size is None or size >= MIN_BATCH_NORM_SAMPLES:
        return
    names = tuple(
        name
        for name, module in target.named_modules()
        if is_batch_norm(module) and (module.training or not target.training)
    )
    if names:
        yield Finding(
            severity="warning",
            kind="tiny batch",
            names=names,
            what=f"{len(names)} batch norms ({shortened(names)}) take their statistics from {size} samples.",
            why="Such statistics are noise, which moves the ranges that the scales were calibrated for "
            "(Wu and He, 2018, arXiv:1803.08494: below 8 samples the error rises steeply).",
            action="Keep batch norm in eval mode during quantized training, use SyncBatchNorm, or larger batches.",
        )


def _active_dropout(checked: CheckedRegion) -> Iterable[Finding]:
    ops = [op for op in checked.whole_graph.ops if op.options.get("random_in_eval")]
    if ops:
        names = tuple(op.name for op in ops)
        places = dict.fromkeys(op.location for op in ops)
        yield Finding(
            severity="warning",
            kind="active dropout",
            names=names,
            what=f"{shortened(names)} drops values in eval mode ({shortened(places)}).",
            why="Calibration sees inflated and zeroed values, and every evaluation gives another result.",
            action="Write training=self.training in the call, or use nn.Dropout.",
            location=next(iter(places)),
        )
