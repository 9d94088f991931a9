"""The worst samples of a loader (B11), against a forward per sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.analysis.comparison.bad_cases import find_bad_cases
from lightning_qat.analysis.comparison.comparison import compare
from lightning_qat.analysis.sensitivity.sensitivity import sensitivity
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 8)
        self.a = nn.Linear(8, 3)
        self.b = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.fc(x).relu()
        return {"a": self.a(h), "map": [self.b(h)]}


@pytest.fixture
def heads() -> tuple[TwoHeads, Region, list[Tensor]]:
    torch.manual_seed(0)
    model = TwoHeads().eval()
    loader = list(torch.randn(22, 4).split(5))  # the last batch has 2
    region = insert(model, (loader[0],), qconfig={"activation": {"dtype": "int4"}})
    calibrate(region, loader)
    return model, region, loader


@pytest.mark.parametrize("metric", ["MSE", "L1", "Cosine", "SQNR", "KL"])
def test_positions_are_those_of_the_worst_samples(metric: Any, heads: tuple[TwoHeads, Region, list[Tensor]]) -> None:
    """Per output; each sample is compared alone."""
    from lightning_qat.analysis import metrics

    model, region, loader = heads
    result = find_bad_cases(region, loader, metric, k=3)
    samples = torch.cat(loader)
    with torch.no_grad(), region.state("off"):
        base = model(samples)
    with torch.no_grad(), region.state("quantize"):
        analy = model(samples)
    pairs = {"a": (base["a"], analy["a"]), "map.0": (base["map"][0], analy["map"][0])}
    for name, (b, a) in pairs.items():
        function = getattr(metrics, metric.lower())
        values = torch.stack([function(x[None], y[None]) for x, y in zip(b, a, strict=True)])
        order = values.argsort(descending=metric not in ("Cosine", "SQNR"))[:3].tolist()
        rows = [row for row in result.rows if row.output == name]
        assert [row.position for row in rows] == order
        assert [(row.batch, row.sample) for row in rows] == [divmod(position, 5) for position in order]
        assert [row.value for row in rows] == pytest.approx(values[order].tolist(), rel=1e-5)
    assert result.samples == 22


def test_samples_can_be_given_to_the_other_analyses(heads: tuple[TwoHeads, Region, list[Tensor]]) -> None:
    _, region, loader = heads
    found = find_bad_cases(region, loader, k=2, output="a")
    assert {row.output for row in found.rows} == {"output 'a'"}
    assert torch.equal(found.batches[0].args[0], torch.cat(loader)[found.positions[0]][None])
    assert sensitivity(region, found.batches).batches == 2
    worst, usual = compare(region, found.batches, output="a").rows[-1], compare(region, loader, output="a").rows[-1]
    assert worst.MSE > usual.MSE  # type: ignore[operator]


def test_metric_of_ones_own_sees_the_batch(heads: tuple[TwoHeads, Region, list[Tensor]]) -> None:
    """A loss with labels, on a model without fake-quant too."""
    model, region, loader = heads
    labelled = [(x, torch.arange(len(x)) % 3) for x in loader]

    def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(output, batch[1], reduction="none")

    quantized = find_bad_cases(region, labelled, loss, k=2, output="a", inputs=lambda batch: batch[0])
    model = region.remove()  # type: ignore[assignment]
    found = find_bad_cases(model, labelled, loss, k=2, output="a", inputs=lambda batch: batch[0])
    with torch.no_grad():
        values = torch.cat([loss(model(x)["a"], (x, y)) for x, y in labelled])
    assert [row.position for row in found.rows] == values.argsort(descending=True)[:2].tolist()
    assert found.metric == quantized.metric == "loss"
    assert quantized.rows[0].value != found.rows[0].value


def test_metric_of_ones_own_gets_the_output_as_the_model_returns_it(
    heads: tuple[TwoHeads, Region, list[Tensor]],
) -> None:
    """A dictionary stays one, with what is no float."""
    _, region, loader = heads
    types = []

    def size(output: dict[str, Any], batch: Tensor) -> Tensor:
        types.append({key: type(value) for key, value in output.items()})
        return output["map"][0].norm(dim=1) + output["a"].norm(dim=1)

    found = find_bad_cases(region, loader, size, k=1)
    assert types == [{"a": Tensor, "map": list}] * len(loader)
    assert found.rows[0].output == "the whole output"


def test_only_the_worst_samples_are_kept(heads: tuple[TwoHeads, Region, list[Tensor]]) -> None:
    _, region, loader = heads
    found = find_bad_cases(region, (x for x in loader), k=1)
    assert len(found.batches) == len({row.position for row in found.rows}) <= 2


def test_nan_is_the_worst_there_is(heads: tuple[TwoHeads, Region, list[Tensor]]) -> None:
    _, region, loader = heads
    loader[2][1, 0] = torch.nan
    assert find_bad_cases(region, loader, k=2).rows[0].position == 11


def test_bad_input_is_refused(heads: tuple[TwoHeads, Region, list[Tensor]]) -> None:
    _, region, loader = heads
    with pytest.raises(ConfigurationError, match="there was no sample"):
        find_bad_cases(region, [])
    with pytest.raises(ConfigurationError, match="k must be at least 1"):
        find_bad_cases(region, loader, k=0)
    with pytest.raises(ConfigurationError, match="give a module with fake-quant inserted"):
        find_bad_cases(TwoHeads(), loader)
    with pytest.raises(ConfigurationError, match=r"one number for each of the 5 samples, not \(\)"):
        find_bad_cases(region, loader, lambda output, batch: output["a"].mean())
    with pytest.raises(ConfigurationError, match=r"no output has an entry for each of the 5 samples"):
        find_bad_cases(region, loader, output=lambda output: output["a"].sum(0))
    with pytest.raises(ConfigurationError, match="calibrate the region"):
        find_bad_cases(insert(TwoHeads(), (loader[0],)), loader)
