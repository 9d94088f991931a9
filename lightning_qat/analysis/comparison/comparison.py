"""Float model against quantized model, tensor by tensor: ``compare(region, batches)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_qat.analysis.captured_calls import RepeatableForward, analysis_mode
from lightning_qat.analysis.comparison.compared_forward import ComparedForward
from lightning_qat.analysis.comparison.compared_tensors import ComparedTensor, compared_tensors
from lightning_qat.analysis.comparison.comparison_metrics import LayerErrors, TensorErrors
from lightning_qat.analysis.comparison.comparison_result import (
    CHOSEN,
    LayerComparisonResult,
    LayerComparisonRow,
    Origin,
)
from lightning_qat.analysis.comparison.comparison_round import ComparisonRound
from lightning_qat.analysis.comparison.evidence_collector import EvidenceCollector, with_configuration
from lightning_qat.analysis.comparison.output_parts import OutputParts
from lightning_qat.analysis.model_check.checked_region import CheckedRegion, CheckOptions, rules_of
from lightning_qat.analysis.model_check.configuration_check import hardware_styles, hardware_types, unmet_requests
from lightning_qat.analysis.nan_origin import first_nan_op
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.quantization import ranks
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.overrides import Override
from lightning_qat.quantization.planning.hardware_profile import HardwareProfile
from lightning_qat.quantization.planning.hardware_profile_files import hardware_profile
from lightning_qat.quantization.region.region import Region

KEPT_BYTES = 2**28
"""Bytes of float values that may wait for the values of the quantized model."""

_OWN = ("Cosine", "MSE", "L1", "KL", "SQNR", "Atol", "Rtol")


def compare(
    region: Region,
    batches: Iterable[object],
    output: str | Callable[[Any], Any] | None = None,
    post_process: Callable[[Any], Any] | None = None,
    *,
    seed: int = 0,
    keep_bytes: int = KEPT_BYTES,
    across_ranks: bool = False,
    rules: Sequence[Override] | None = None,
    profile: HardwareProfile | str | Path | None = None,
) -> LayerComparisonResult:
    """Compare every tensor of the quantized model with that of the float model, in evaluation mode.

    Two questions, two sets of columns. The *accumulated* error: how far is the tensor off when the whole model is
    quantized. The *own* error: how far is it off when its op gets the inputs of the float model and only its own
    fake-quants are on. Both models get the same inputs, buffers and random numbers. Nothing of the region or its target
    is changed.

    Memory: the values of at most ``keep_bytes`` (or of one tensor, if that is larger) wait at a time. A model with more
    runs in several rounds of two forwards; the activations of both models are never kept together.

    Args:
        region: a calibrated region.
        batches: see :meth:`~lightning_qat.quantization.modules.call.Call.of`.
        output: path into the output such as ``map.layer_3``, or a callable on it; it is the last row. With a path, only
            ops that act on it are compared. None: all outputs.
        post_process: applied to the chosen output in float, such as ``torch.sigmoid``.
        seed: of the random numbers that the forward draws.
        keep_bytes: largest memory for waiting values, in bytes.
        across_ranks: every rank calls this with its own batches; the result is that of all batches, on all ranks.
        rules: the overrides, made relative to this region; needed if the model has several regions.
        profile: the hardware that a diagnosis has to respect; that of the plan if it is a shipped one.

    Raises:
        ConfigurationError: nothing is calibrated, there is no batch, the output does not exist, or it holds NaN.

    Example:
        >>> from lightning_qat.quantization.region.calibration import calibrate
        >>> from lightning_qat.quantization.region.insertion import insert
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> x = torch.linspace(-1, 1, 32).reshape(8, 4)
        >>> region = insert(model, (x,))
        >>> _ = calibrate(region, [x])
        >>> result = compare(region, [x])
        >>> [(row.mod_name, row.analy_op_type, row.quant_dtype) for row in result.rows][:3]
        [('0.input0', 'fake_quantize', 'int8'), ('0.weight', 'fake_quantize', 'int8'), ('1', 'linear+relu', 'int8')]
        >>> result.rows[0].origin, result.by_name["2"].own_MSE < result.by_name["2"].MSE
        ('own', True)
    """
    if not any(point.scale_source is not None for point in region.points.values()):
        raise ConfigurationError("no point has a scale: calibrate the region before comparing it with the float model.")
    if keep_bytes < 1:
        raise ConfigurationError(f"keep_bytes must be a number of bytes such as {KEPT_BYTES}, not {keep_bytes}.")
    comparison = _Comparison(region, OutputSelector(output, post_process), seed, keep_bytes, across_ranks)
    options = CheckOptions(profile=hardware_profile(profile))
    checked = CheckedRegion(region, options, rules_of({"": region})[""] if rules is None else rules)
    with ranks.failing_together(across_ranks), analysis_mode(region):
        for batch in batches:
            comparison.add(Call.of(batch))
    return comparison.result(checked)


class _Comparison:
    """The listener of both forwards, and the sums of the errors."""

    def __init__(self, region: Region, select: OutputSelector, seed: int, keep_bytes: int, across_ranks: bool) -> None:
        self.region = region
        self.select = select
        self.seed = seed
        self.keep_bytes = keep_bytes
        self.across_ranks = across_ranks
        self.subjects = compared_tensors(region, select.output if isinstance(select.output, str) else None)
        self.number = {subject.name: i for i, subject in enumerate(self.subjects)}
        rows = len(self.subjects) + 1
        self.accumulated = LayerErrors(rows, sync_on_compute=across_ranks)
        self.own = LayerErrors(rows, sync_on_compute=across_ranks)
        self.evidence = EvidenceCollector(region)
        self.output_parts = OutputParts()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.diverged: dict[str, None] = {}
        self.batches = 0
        self.most_kept = 0
        self._round = ComparisonRound(0)

    def add(self, call: Call) -> None:
        """Compare the two models on one batch."""
        with RepeatableForward(self.region.target, call, self.seed) as forward:
            start: int | None = 0
            while start is not None:
                self._round = ComparisonRound(start)
                reference = self._float_forward(forward, own=start == 0)
                self.most_kept = max(self.most_kept, self._round.kept_bytes)
                self._round.to_quantized()
                with ComparedForward(self.region, self, quantized=True):
                    analysed = self.select(forward())
                self.diverged |= dict.fromkeys(self._round.uneven())
                if start == 0:
                    self._compare_output(reference, analysed)
                start = self._round.next
        self.batches += 1

    def _float_forward(self, forward: RepeatableForward, own: bool) -> list[Tensor]:
        if not own:
            with self.region.only(()), ComparedForward(self.region, self, quantized=False):
                forward()
            return []
        with ComparedForward(self.region, self, quantized=False, own=True):
            reference = [tensor.clone() for tensor in self.select(forward())]
        if any(bool(t.isnan().any()) for t in reference if t.is_floating_point()):
            raise ConfigurationError(
                f"{self.select.description} of the float model holds NaN, so nothing can be compared with it. "
                f"{first_nan_op(self.region, forward)}"
            )
        return reference

    def _compare_output(self, reference: list[Tensor], analysed: list[Tensor]) -> None:
        last = len(self.subjects)
        for base, analy in zip(reference, analysed, strict=False):
            self.shapes[CHOSEN] = tuple(base.shape)
            if base.shape == analy.shape:
                self.accumulated.update(last, base, analy)
            else:
                self.diverged[CHOSEN] = None
        self.output_parts.add(reference, analysed)
        if len(reference) != len(analysed):
            self.diverged[CHOSEN] = None

    # -- what the forwards show

    def on_value(self, name: str, value: Tensor) -> None:
        """Keep a float value, or compare the quantized one with it."""
        number = self.number.get(name)
        if number is None:
            return
        key = (name, self._round.use(name))
        if not self._round.quantized:
            self._round.keep(key, value, self.keep_bytes)
            self.shapes[name] = tuple(value.shape)
            return
        base = self._round.kept.pop(key, None)
        if base is None:
            return
        if base.shape == value.shape:
            self.accumulated.update(number, base, value)
        else:
            self.diverged[name] = None

    def on_own(self, name: str, base: Tensor, analy: Tensor, direct: Tensor | None) -> None:
        """Compare a float value with the result of only the op's own fake-quants."""
        if direct is not None:
            self.evidence.add(name, direct)
        number = self.number.get(name)
        if number is not None:
            self.own.update(number, base, analy)

    # -- the result

    def result(self, checked: CheckedRegion) -> LayerComparisonResult:
        """Return the table."""
        if self.across_ranks:
            self._all_reduce()
        if self.batches == 0:
            raise ConfigurationError("there was no batch to compare the models on.")
        accumulated, own = _computed(self.accumulated), _computed(self.own)
        rows = [self._row(i, s, accumulated[i], own[i]) for i, s in enumerate(self.subjects)]
        chosen = ComparedTensor(CHOSEN, CHOSEN, "output", "output", "")
        rows.append(self._row(len(rows), chosen, accumulated[-1], None))
        reached = [row for row in rows if row.MSE is not None or row.own_MSE is not None or row.mod_name == CHOSEN]
        mod_names = {s.name: s.mod_name for s in self.subjects}
        return LayerComparisonResult(
            rows=tuple(reached),
            output=self.select.description,
            batches=self.batches,
            diverged=tuple(mod_names.get(name, name) for name in self.diverged),
            kept_bytes=self.most_kept,
            evidence=with_configuration(
                self.evidence.evidence(), _unmet(checked), hardware_types(checked), hardware_styles(checked)
            ),
            lost_output=self.output_parts.are_lost(self.evidence.makers.output_bound),
        )

    def _all_reduce(self) -> None:
        device = ranks.reduce_device()
        self.accumulated.to(device), self.own.to(device)
        self.evidence.all_reduce()
        self.output_parts.all_reduce()
        if ranks.count() > 1:
            names = [*self.number, CHOSEN]
            counts = ranks.summed(torch.tensor([self.batches, *(name in self.diverged for name in names)]))
            self.batches = int(counts[0])
            self.diverged = {name: None for name, count in zip(names, counts[1:].tolist(), strict=True) if count}

    def _row(
        self, index: int, subject: ComparedTensor, errors: TensorErrors | None, own: TensorErrors | None
    ) -> LayerComparisonRow:
        point = self.region.points.get(subject.point)
        quantized = point is not None and point.scale_source is not None and point.enabled
        scale = float(point.scale.detach().max()) if point is not None and quantized else None
        if subject.name in self.diverged:
            errors = None
        values: dict[str, Any] = {name: getattr(errors, name) if errors else None for name in _COLUMNS}
        own_values: dict[str, Any] = {f"own_{name}": getattr(own, name) if own else None for name in _OWN}
        atol = values["Atol"]
        return LayerComparisonRow(
            index=index,
            mod_name=subject.mod_name,
            base_op_type=subject.base_op_type,
            analy_op_type=subject.analy_op_type,
            shape=str(list(self.shapes.get(subject.name, ()))),
            quant_dtype=point.dtype if point is not None and quantized else "float32",
            qscale=scale,
            max_atol_diff=atol,
            max_qscale_diff=atol / scale if atol is not None and scale else None,
            origin=_origin(errors, own) if subject.name != CHOSEN else None,
            point=subject.point,
            loop=subject.loop,
            **values,
            **own_values,
        )


_COLUMNS = (
    *_OWN,
    *(f"{model}_model_{what}" for what in ("min", "max", "mean", "var") for model in ("base", "analy")),
)


def _origin(errors: TensorErrors | None, own: TensorErrors | None) -> Origin | None:
    """Call an error inherited if more than half of its energy comes from before the op."""
    if errors is None or own is None:
        return None
    if errors.MSE == 0:
        return "none"
    if math.isnan(errors.MSE):
        return "own" if math.isnan(own.MSE) else "inherited"
    return "inherited" if own.MSE < errors.MSE / 2 else "own"


def _computed(errors: LayerErrors) -> tuple[TensorErrors | None, ...]:
    errors._update_count = max(1, errors._update_count)  # a rank without a batch has to take part, without a warning
    return errors.errors()


def _unmet(checked: CheckedRegion) -> dict[str, tuple[str, str]]:
    """Map each point to (requested dtype, explanation) where an override's dtype is not in effect."""
    return {
        r.point: (r.requested, f"{r.by} asks for {r.requested}, {r.effective} is in effect: {r.winner}")
        for r in unmet_requests(checked)
        if r.is_lowered and r.by != "default"
    }
