"""Calibration: observe a few batches in float, derive the scales, say what looks wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist

from lightning_qat.quantization.call_ranges import repeating_points
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.preservation import preserved
from lightning_qat.quantization.region import Region
from lightning_qat.quantization.tensor_origins import TensorOrigins
from lightning_qat.quantization.tracing import Call

FindingKind = Literal["nan", "inf", "constant", "no data", "unplanned"]


@dataclass(frozen=True)
class CalibrationFinding:
    """Something calibration saw that will hurt later.

    Args:
        kind: ``nan``, ``inf``: activations that are not finite. ``constant``: only zeros, so there is no scale.
            ``no data``: the point was never reached. ``unplanned``: an op that was not seen while tracing.
        point: point name (or place in the code).
        batch: the batch in which it was first seen, if that can be told.
        message: what it means and what to do.
    """

    kind: FindingKind
    point: str
    batch: int | None
    message: str


@dataclass(frozen=True)
class CalibrationResult:
    """What calibration did.

    Args:
        batches: number of batches on this rank.
        points: number of points with a scale.
        findings: what looks wrong.
    """

    batches: int
    points: int
    findings: tuple[CalibrationFinding, ...] = ()


class CalibrationPass:
    """Context manager around the forwards of a calibration; they may be run by anybody (a validation step).

    Args:
        regions: the regions to calibrate, by target path.

    Example:
        >>> import torch
        >>> from lightning_qat.quantization.insertion import insert
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU())
        >>> region = insert(model, (torch.ones(1, 4),))
        >>> with CalibrationPass({"": region}) as calibration:
        ...     for batch in torch.randn(3, 8, 4):
        ...         _ = model(batch)
        ...         calibration.batch_done()
        >>> calibration.finish().batches
        3
    """

    def __init__(self, regions: Mapping[str, Region]) -> None:
        self.regions = dict(regions)
        self.batches = 0
        self._first_bad: dict[tuple[str, str], int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> CalibrationPass:
        for region in self.regions.values():
            region.reset_statistics()
            region.unplanned.clear()
            region.call_ranges.reset()
            self._stack.enter_context(region.state("observe"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def batch_done(self) -> None:
        """Call after each batch: notes in which one values that are not finite first appeared."""
        for name, fake_quant in self._points():
            statistics = fake_quant.statistics
            if statistics.nan_count:
                self._first_bad.setdefault((name, "nan"), self.batches)
            if statistics.inf_count:
                self._first_bad.setdefault((name, "inf"), self.batches)
        self.batches += 1

    def finish(self) -> CalibrationResult:
        """Combine the statistics of all ranks and derive the scales.

        Raises:
            ConfigurationError: there was no batch on any rank.
        """
        batches = self._reduce()
        if batches == 0:
            raise ConfigurationError(
                "calibration got no batch: the data loader is empty, or limit_*_batches leaves nothing of it. Give it "
                "at "
                "least one batch, or write Calibration(batches=32)."
            )
        findings = [self._finding(kind, name, batch) for (name, kind), batch in self._first_bad.items()]
        not_finite = {name for name, _ in self._first_bad}
        calibrated = 0
        for path, region in self.regions.items():
            for point in region.compute_scales():
                if _qualified(path, point) in not_finite:
                    continue  # it was reached: that finding says why it has no scale
                findings.append(self._finding("no data", _qualified(path, point), None))
            for point, fake_quant in region.points.items():
                calibrated += fake_quant.scale_source is not None
                if fake_quant.degenerate and _depends_on_data(region, point):
                    findings.append(self._finding("constant", _qualified(path, point), None))
            for place in region.unplanned:
                findings.append(self._finding("unplanned", _qualified(path, place), None))
        return CalibrationResult(self.batches, calibrated, tuple(findings))

    def _points(self) -> Iterable[tuple[str, Any]]:
        for path, region in self.regions.items():
            for name, fake_quant in region.points.items():
                yield _qualified(path, name), fake_quant

    def _reduce(self) -> int:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self.batches
        done: set[int] = set()
        for _, fake_quant in self._points():
            # shared weights once: sums must not be summed twice
            if id(fake_quant) not in done and not fake_quant.keeps_scale:
                done.add(id(fake_quant))
                fake_quant.statistics.all_reduce()
        for region in self.regions.values():
            region.call_ranges.all_reduce(repeating_points(region.graph, region.plan))
        device = next((f.scale.device for _, f in self._points()), torch.device("cpu"))
        total = torch.tensor([self.batches], device=device)
        dist.all_reduce(total)
        return int(total)

    def _finding(self, kind: str, name: str, batch: int | None) -> CalibrationFinding:
        messages = {
            "nan": f"{name} is NaN in calibration batch {batch}: the float model computes NaN here. Look at the op's "
            "inputs (division by zero, log of a negative number) before quantizing.",
            "inf": f"{name} is infinite in calibration batch {batch}; infinities were left out of its range. If they "
            "are "
            "a mask, keep the point in float: activation: {dtype: float32}.",
            "constant": f"{name} was zero in every batch, so it has no meaningful scale. Calibrate with data that "
            "reach it, "
            "or keep it in float: activation: {dtype: float32}.",
            "no data": f"{name} was never reached by the calibration data and stays float. Calibrate with batches that "
            "take this branch, or give it a fixed_scale.",
            "unplanned": f"{name} ran in calibration but not while tracing, and stays float. Trace more batches, or "
            "mark "
            "the code with dynamic_block.",
        }
        return CalibrationFinding(kind, name, batch, messages[kind])  # type: ignore[arg-type]


def calibrate(region: Region, batches: Iterable[Any]) -> CalibrationResult:
    """Calibrate a region without a Trainer and leave it quantizing.

    The module runs in eval mode; its modes, buffers and the random state are left as they were.

    Args:
        region: from :func:`lightning_qat.insert`.
        batches: an iterable of a tensor, a tuple of args, a dict of kwargs, or ``(args, kwargs)``.

    Raises:
        ConfigurationError: there was no batch.

    Example:
        >>> import torch
        >>> from lightning_qat.quantization.insertion import insert
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU())
        >>> region = insert(model, (torch.ones(1, 4),))
        >>> calibrate(region, torch.randn(3, 8, 4)).findings
        ()
    """
    target = region.target
    calibration = CalibrationPass({"": region})
    with calibration, preserved(target), torch.inference_mode(False), torch.no_grad():
        target.eval()
        for batch in batches:
            call = Call.of(batch).copied()
            target(*call.args, **call.kwargs)
            calibration.batch_done()
    result = calibration.finish()
    region.set_state("quantize")
    return result


def _depends_on_data(region: Region, name: str) -> bool:
    """Whether a point quantizes data. Zeros in weights and constants are exact, and no sign of missing data."""
    point = region.plan.by_name[name]
    if point.role != "input":
        return not point.is_weight
    operand = next(o for o in region.graph.by_name[point.op].operands if o.index == point.operand)
    return not TensorOrigins(region.graph, ()).is_constant(operand)


def _qualified(path: str, name: str) -> str:
    return f"{path}:{name}" if path else name
