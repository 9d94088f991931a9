"""Outputs that are written part by part: a part that one scale for all would destroy is named.

Issue 12, number five. Siblings: assignment to a slice, by an ellipsis, by an index; `copy_` into a view; `index_copy_`;
behind a view, in a dictionary. `slice_scatter` and `cat` are quantized as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.analysis.model_check.finding import Finding
from lightning_qat.analysis.model_check.model_check import check
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


class Head(nn.Module):
    """Boxes and scores, and a function that puts them together."""

    def __init__(self, write: Callable[..., Any], unit: float = 640.0) -> None:
        super().__init__()
        self.box, self.score = nn.Linear(8, 4), nn.Linear(8, 4)
        self.write, self.unit = write, unit

    def forward(self, x: Tensor) -> Any:
        return self.write(x.new_zeros(len(x), 8), self.box(x).sigmoid() * self.unit, self.score(x).sigmoid())


def by_slice(out: Tensor, box: Tensor, score: Tensor) -> Tensor:
    out[:, :4] = box
    out[:, 4:] = score
    return out


def by_ellipsis(out: Tensor, box: Tensor, score: Tensor) -> dict[str, Tensor]:
    out[..., 4:] = score
    out[..., :4] = box
    return {"out": out.view(-1, 2, 4).transpose(1, 2)}


def by_index(out: Tensor, box: Tensor, score: Tensor) -> Tensor:
    out[:, torch.arange(4)] = box
    out[:, torch.arange(4, 8)] = score
    return out


def by_copy(out: Tensor, box: Tensor, score: Tensor) -> Tensor:
    out[:, :4].copy_(box)
    out[:, 4:].copy_(score)
    return out


def by_index_copy(out: Tensor, box: Tensor, score: Tensor) -> Tensor:
    out.index_copy_(1, torch.arange(4), box)
    out.index_copy_(1, torch.arange(4, 8), score)
    return out


def scattered(out: Tensor, box: Tensor, score: Tensor) -> Tensor:
    return out.slice_scatter(box, 1, 0, 4).slice_scatter(score, 1, 4, 8)


def one_more(out: Tensor, box: Tensor, score: Tensor) -> Tensor:
    out[:, :4] = box
    out[:, 4:6] = score[:, :2]
    out[:, 6:] = score[:, 2:] * 0.5
    return out


WAYS = [by_slice, by_ellipsis, by_index, by_copy, by_index_copy, one_more]


def joined(out: Tensor, box: Tensor, score: Tensor) -> Tensor:
    return torch.cat([box, score], 1)


def used_on(out: Tensor, box: Tensor, score: Tensor) -> Tensor:
    return by_slice(out, box, score) * 2.0


def written_findings(module: nn.Module, calibrated: bool = True) -> list[Finding]:
    torch.manual_seed(0)
    region = insert(module, (X,))
    if calibrated:
        calibrate(region, [X])
    return [finding for finding in check(region).findings if finding.kind == "written output"]


@pytest.mark.parametrize("write", WAYS)
def test_a_part_that_one_scale_would_destroy_is_named(write: Callable[..., Any]) -> None:
    """The numbers are those of the parts; with the step they give, rounding leaves nothing of the scores."""
    module = Head(write)
    boxes, scores = module.box(X).detach().sigmoid() * 640, module.score(X).detach().sigmoid()
    assert not (scores / (boxes.max() / 127) / 2).round().any()
    (finding,) = written_findings(module)
    assert f"up to {float(boxes.max()):.3g}" in finding.what
    assert finding.severity == "warning"
    assert "mul_0" in finding.names
    assert len(finding.names) == (3 if write is one_more else 2)


@pytest.mark.parametrize("write", WAYS)
def test_parts_of_one_unit_are_fine(write: Callable[..., Any]) -> None:
    assert not written_findings(Head(write, unit=2.0))


@pytest.mark.parametrize("write", [joined, scattered, used_on])
def test_what_is_quantized_as_a_whole_is_no_such_case(write: Callable[..., Any]) -> None:
    """The diagnosis measures what is lost there."""
    assert not written_findings(Head(write))


def test_before_calibration_nothing_is_known() -> None:
    assert not written_findings(Head(by_slice), calibrated=False)
