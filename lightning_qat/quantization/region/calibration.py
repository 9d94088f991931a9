"""Calibration: observe a few batches in float, derive the scales, report problems."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from lightning_qat.quantization import ranks
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.fake_quant.call_ranges import repeating_points
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.fake_quant.first_scale import await_values
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.modules.preservation import preserved
from lightning_qat.quantization.region.calibration_findings import (
    CalibrationFinding,
    FindingKind,
    depends_on_data,
    finding,
    messages,
    spread_findings,
    starting,
)
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.region.zero_starts import zero_starts

__all__ = ["CalibrationFinding", "CalibrationPass", "CalibrationResult", "calibrate"]


@dataclass(frozen=True)
class CalibrationResult:
    """The result of a calibration.

    Args:
        batches: number of batches on this rank.
        points: number of points with a scale.
        findings: the problems that it saw.
    """

    batches: int
    points: int
    findings: tuple[CalibrationFinding, ...] = ()

    @property
    def messages(self) -> tuple[str, ...]:
        """The findings as texts: one for NaN or infinities that began at one point, one for each other kind."""
        return messages(self.findings)


class CalibrationPass:
    """Context manager around the forwards of a calibration. Any code may run them, such as a validation step.

    Args:
        regions: the regions to calibrate, by target path.

    Example:
        >>> import torch
        >>> from lightning_qat.quantization.region.insertion import insert
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
        self._not_finite: dict[tuple[str, FindingKind], dict[str, int | None]] = defaultdict(dict)
        self._stack = ExitStack()

    def __enter__(self) -> CalibrationPass:
        for region in self.regions.values():
            region.scales.reset_statistics()
            region.unplanned.clear()
            region.call_ranges.reset()
            self._stack.enter_context(region.state("observe"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def batch_done(self) -> None:
        """Call this after each batch: it notes the batch in which NaN or infinities first appeared."""
        self._note_not_finite(self.batches)
        self.batches += 1

    def _note_not_finite(self, batch: int | None) -> None:
        for path, name, fake_quant in self._points():
            if fake_quant.statistics.nan_count:
                self._not_finite[path, "nan"].setdefault(name, batch)
            if fake_quant.statistics.inf_count:
                self._not_finite[path, "inf"].setdefault(name, batch)

    def finish(self) -> CalibrationResult:
        """Combine the statistics of all ranks and derive the scales.

        Raises:
            ConfigurationError: there was no batch on any rank.
        """
        batches = self._reduce()
        if batches == 0:
            raise ConfigurationError(
                "calibration got no batch: the data loader is empty, or limit_*_batches leaves nothing of it. Give it "
                "at least one batch, or write Calibration(batches=32)."
            )
        self._note_not_finite(None)  # what the other ranks saw
        findings: list[CalibrationFinding] = []
        calibrated = 0
        for path, region in self.regions.items():
            nan, inf = self._not_finite[path, "nan"], self._not_finite[path, "inf"]
            without_data = [name for name in region.compute_scales() if name not in nan and name not in inf]
            findings += spread_findings(path, region, "nan", nan)
            findings += spread_findings(path, region, "inf", inf)
            findings += [finding("no data", path, name) for name in without_data]
            points = region.points
            for name, parameter in zero_starts(region).items():
                await_values(points[name])
                if not region.plan.by_name[name].is_weight:
                    findings.append(starting(path, name, parameter))
            for name, fake_quant in points.items():
                calibrated += fake_quant.scale_source is not None
                if not fake_quant.keeps_scale:
                    fake_quant.outdated = False
                if fake_quant.degenerate and depends_on_data(region, name):
                    findings.append(finding("constant", path, name))
            findings += [finding("unplanned", path, place) for place in region.unplanned]
        return CalibrationResult(self.batches, calibrated, tuple(findings))

    def _points(self) -> Iterator[tuple[str, str, FakeQuantize]]:
        """The points that observe; a frozen one keeps the statistics of an earlier calibration."""
        for path, region in self.regions.items():
            for name, fake_quant in region.points.items():
                if not fake_quant.keeps_scale:
                    yield path, name, fake_quant

    def _reduce(self) -> int:
        if ranks.count() == 1:
            return self.batches
        done: set[int] = set()
        for *_, fake_quant in self._points():
            if id(fake_quant) not in done:  # shared weights once: sums must not be summed twice
                done.add(id(fake_quant))
                fake_quant.statistics.all_reduce()
        for region in self.regions.values():
            region.call_ranges.all_reduce(repeating_points(region.graph, region.plan))
        return int(ranks.summed(torch.tensor(self.batches)))


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
        >>> from lightning_qat.quantization.region.insertion import insert
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
            Call.of(batch).run(target)
            calibration.batch_done()
    result = calibration.finish()
    region.set_state("quantize")
    return result
