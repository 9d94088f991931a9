"""Layer comparison (B3): against the source's row, models quantized by hand, and independent metrics."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchmetrics.functional as tmf
from scipy import spatial, special
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.analysis.comparison import comparison_metrics
from lightning_qat.analysis.comparison.comparison import compare
from lightning_qat.analysis.comparison.comparison_metrics import LayerErrors, TensorErrors
from lightning_qat.analysis.comparison.comparison_result import CHOSEN, LayerComparisonResult
from lightning_qat.analysis.model_check.long_loops import LONG_LOOP
from lightning_qat.analysis.statistics.statistics import layer_statistics
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.interception.dynamic_block import dynamic_block
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from lightning_qat.reporting.files import write_csv, write_json, write_result

B3_COLUMNS = [
    "index", "mod_name", "base_op_type", "analy_op_type", "shape", "quant_dtype", "qscale", "Cosine", "MSE", "L1", "KL",
    "SQNR", "Atol", "Rtol", "base_model_min", "analy_model_min", "base_model_max", "analy_model_max", "base_model_mean",
    "analy_model_mean", "base_model_var", "analy_model_var", "max_atol_diff", "max_qscale_diff",
]  # fmt: skip
INT4 = {"activation": {"dtype": "int4"}, "weight": {"dtype": "int4"}}


class Net(nn.Module):
    """Convolution and ReLU (in place) are fused; a residual addition; the head's result stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = F.relu(self.conv(x), inplace=True)
        h = h + self.other(h)
        return {"map": [self.head(h.mean((2, 3)))], "h": h}


def calibrated(model: nn.Module, *batches: Any, **kwargs: Any) -> Region:
    region = insert(model.eval(), batches=batches, **kwargs)
    calibrate(region, batches)
    return region


@pytest.fixture
def net() -> tuple[Net, Region, list[Tensor]]:
    torch.manual_seed(0)
    model, batches = Net(), [torch.randn(4, 2, 6, 6), torch.randn(3, 2, 6, 6)]
    return model, calibrated(model, *batches, qconfig=INT4), batches


def by_hand(model: Net, region: Region, x: Tensor, on: bool) -> dict[str, Tensor]:
    """The forward written out: every row's tensor."""
    values: dict[str, Tensor] = {}

    def q(name: str, value: Tensor) -> Tensor:
        point = region.points.get(name)
        values[name] = point(value) if on and point is not None else value
        return values[name]

    with torch.no_grad():
        x = q("conv.input0", x)
        h = q("relu_0.output", F.relu(F.conv2d(x, q("conv.weight", model.conv.weight), model.conv.bias, padding=1)))
        branch = F.conv2d(h, q("other.weight", model.other.weight), model.other.bias, padding=1)
        h = q("add_0.output", h + branch)
        mean = q("mean_0.output", h.mean((2, 3)))
        q("head.output", F.linear(mean, q("head.weight", model.head.weight), model.head.bias))
    return values


def test_columns_are_those_of_the_source_in_its_order() -> None:
    """B3."""
    assert list(LayerComparisonResult(()).columns()[: len(B3_COLUMNS)]) == B3_COLUMNS


def test_golden_row() -> None:
    """B3: row 1296 of the source, dim_t at int16, through the whole comparison."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            index = torch.arange(128, dtype=torch.float32)
            dim_t = 10000 ** (2 * torch.div(index, 2, rounding_mode="floor") / 128)
            return (x[..., None] / dim_t).sin()

    x = torch.rand(2, 5)
    fixed = [{"match": "div_*.input1", "activation": {"fixed_scale": "8659.5107422/32767"}}]
    region = calibrated(Model(), x, qconfig={"activation": {"dtype": "int16"}}, overrides=fixed)
    row = next(row for row in compare(region, [x]).rows if row.mod_name.endswith(".input1"))
    assert (row.shape, row.quant_dtype) == ("[128]", "int16")
    assert row.qscale == pytest.approx(0.2642754, rel=1e-6)
    exact = {"Atol": 0.1328125, "Rtol": 0.0845878, "base_model_min": 1.0, "analy_model_min": 1.0571015}
    exact |= {"base_model_max": 8659.6435547, "analy_model_max": 8659.5107422, "base_model_mean": 1009.3834229}
    exact |= {"analy_model_mean": 1009.3997803, "base_model_var": 3694867.5, "analy_model_var": 3694819.5}
    exact |= {"max_atol_diff": 0.1328125, "max_qscale_diff": 0.5025535}
    for name, value in exact.items():
        assert getattr(row, name) == pytest.approx(value, rel=1e-5), name
    for name, value in {"MSE": 0.0058058, "L1": 0.0670551, "SQNR": 89.0683746}.items():
        assert getattr(row, name) == pytest.approx(value, rel=5e-4), name
    assert row.Cosine == pytest.approx(0.9999999, abs=1e-7)
    assert pytest.approx(0.0, abs=5e-8) == row.KL
    assert (row.own_MSE, row.origin) == (row.MSE, "own")


def test_accumulated_errors_are_those_of_the_two_models(net: tuple[Net, Region, list[Tensor]]) -> None:
    """B3: over two batches of different sizes; rows in execution order."""
    model, region, batches = net
    result = compare(region, batches)
    names = ["conv.input0", "conv.weight", "relu_0", "other.weight", "add_0", "mean_0", "head.weight", "head", CHOSEN]
    assert [row.mod_name for row in result.rows] == names
    assert [row.index for row in result.rows] == list(range(len(names)))
    runs = [(by_hand(model, region, x, on=False), by_hand(model, region, x, on=True)) for x in batches]
    for row in result.rows[:-1]:
        key = row.point or f"{row.mod_name}.output"
        b, a = (torch.cat([run[i][key].double().flatten() for run in runs]) for i in (0, 1))
        expected = tmf.mean_squared_error(a, b).item()
        assert pytest.approx(expected, rel=1e-6, abs=1e-15) == row.MSE, row.mod_name
        assert row.analy_model_max == pytest.approx(a.max().item(), rel=1e-6)
        assert row.base_model_var == pytest.approx(b.var().item(), rel=1e-6)
        assert row.max_qscale_diff == (None if row.qscale is None else pytest.approx(row.Atol / row.qscale))
    head = result.by_name["head"]
    assert (head.quant_dtype, head.qscale, head.point) == ("float32", None, "")
    assert (result.by_name["add_0"].analy_op_type, result.by_name["relu_0"].base_op_type) == ("conv2d+add", "relu")


def test_own_error_is_that_of_the_op_on_the_float_models_inputs(net: tuple[Net, Region, list[Tensor]]) -> None:
    """Design 8: only this op's fake-quants, those of everything it is fused with included."""
    model, region, batches = net
    x = batches[0]
    rows = compare(region, [x]).by_name
    base = by_hand(model, region, x, on=False)
    points = region.points
    with torch.no_grad():
        h = F.relu(
            F.conv2d(points["conv.input0"](x), points["conv.weight"](model.conv.weight), model.conv.bias, padding=1)
        )
        relu = points["relu_0.output"](h)
        clean = base["relu_0.output"]
        branch = F.conv2d(clean, points["other.weight"](model.other.weight), model.other.bias, padding=1)
        add = points["add_0.output"](clean + branch)
        head = F.linear(base["mean_0.output"], points["head.weight"](model.head.weight), model.head.bias)
    for name, own in (("relu_0", relu), ("add_0", add), ("head", head)):
        expected = F.mse_loss(own.double(), base[f"{name}.output"].double()).item()
        assert rows[name].own_MSE == pytest.approx(expected, rel=1e-6), name
    assert rows["relu_0"].own_MSE == pytest.approx(rows["relu_0"].MSE, rel=1e-9)
    assert rows["head"].origin == "inherited"
    assert rows["head"].own_MSE < rows["head"].MSE / 2  # type: ignore[operator]


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 4, 3), (2, 3, 4, 5), ()])
def test_every_metric_equals_an_independent_implementation(shape: tuple[int, ...]) -> None:
    """B3: numpy, scipy and torchmetrics."""
    base = torch.randn(shape)
    analy = base + 0.1 * torch.randn(shape)
    errors = LayerErrors(1)
    errors.update(0, base, analy)
    found = errors.errors()[0]
    assert isinstance(found, TensorErrors)
    b, a = np.atleast_1d(base.double().numpy()), np.atleast_1d(analy.double().numpy())
    assert pytest.approx(1 - spatial.distance.cosine(b.ravel(), a.ravel()), rel=1e-12) == found.Cosine
    assert pytest.approx(tmf.mean_squared_error(analy.double(), base.double()).item(), rel=1e-12) == found.MSE
    assert pytest.approx(tmf.mean_absolute_error(analy.double(), base.double()).item(), rel=1e-12) == found.L1
    snr = 20 * math.log10(np.linalg.norm(b.ravel()) / np.linalg.norm((b - a).ravel()))
    assert pytest.approx(snr, rel=1e-12) == found.SQNR
    assert pytest.approx(np.max(np.abs(b - a)), rel=1e-12) == found.Atol
    assert pytest.approx(np.max(np.abs(b - a) / np.abs(b)), rel=1e-12) == found.Rtol
    axis = 1 if len(shape) > 2 else -1
    kl = np.mean(special.rel_entr(special.softmax(b, axis=axis), special.softmax(a, axis=axis)))
    assert pytest.approx(kl, rel=1e-8, abs=1e-17) == found.KL
    assert (found.base_model_min, found.analy_model_max) == (b.min(), a.max())
    assert (found.base_model_mean, found.analy_model_mean) == pytest.approx((b.mean(), a.mean()), rel=1e-12)
    if b.size > 1:
        assert (found.base_model_var, found.analy_model_var) == pytest.approx((b.var(ddof=1), a.var(ddof=1)), rel=1e-12)


def test_pieces_batches_and_ranks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """B3: the same numbers, however the tensor is cut; the reduction over ranks is torchmetrics' own."""
    base, analy = 5 + torch.randn(12, 3, 4), 5 + torch.randn(12, 3, 4)
    whole = LayerErrors(1)
    whole.update(0, base, analy)
    expected = whole.compute()
    monkeypatch.setattr(comparison_metrics, "PIECE", 24)
    ranks = [LayerErrors(1), LayerErrors(1), LayerErrors(1)]
    for rank, (start, end) in zip(ranks, [(0, 1), (1, 12), (12, 12)], strict=True):
        rank.update(0, base[start:end], analy[start:end])
    reduced = LayerErrors(1)
    for name, reduction in reduced._reductions.items():
        setattr(reduced, name, reduction(torch.stack([getattr(rank, name) for rank in ranks])))  # as Metric does
    reduced._update_count = 1
    assert torch.allclose(reduced.compute(), expected, rtol=1e-10, equal_nan=True)


def test_values_that_are_infinite_in_float_are_left_out() -> None:
    errors = LayerErrors(2)
    errors.update(0, torch.tensor([1.0, -torch.inf, 3.0]), torch.tensor([1.5, 7.0, 3.0]))
    found = errors.errors()[0]
    assert found is not None
    assert (found.count, found.MSE, found.base_model_min, found.analy_model_max) == (2, 0.125, 1.0, 3.0)
    assert errors.errors()[1] is None


def test_memory_is_bounded_and_the_result_does_not_depend_on_it(net: tuple[Net, Region, list[Tensor]]) -> None:
    """B3: float values of one chunk of rows wait at a time; never those of the whole model."""
    model, region, batches = net
    all_at_once = compare(region, batches)
    sizes = [v.numel() * 4 for v in by_hand(model, region, batches[0], on=False).values()]
    assert all_at_once.kept_bytes == sum(sizes)
    in_rounds = compare(region, batches, keep_bytes=1)
    assert in_rounds.kept_bytes == max(sizes)  # one tensor
    assert in_rounds.rows == all_at_once.rows


def test_both_models_see_the_same_random_numbers() -> None:
    """The op that draws is not a source of error; nor does running an op twice draw more."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = F.dropout(self.fc(x).relu(), 0.5, training=True)
            return h + torch.randn_like(h)

    x = torch.rand(8, 4)
    wide = [{"match": "*", "activation": {"threshold": 10}}]  # the noise is not that of calibration
    int16 = {"activation": {"dtype": "int16"}, "weight": {"dtype": "int16"}}
    region = calibrated(Noisy(), x, qconfig=int16, overrides=wide)
    assert compare(region, [x]).rows[-1].SQNR > 60  # type: ignore[operator]


def test_nothing_is_changed(net: tuple[Net, Region, list[Tensor]]) -> None:
    model, region, batches = net
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    state = region.current_state
    random, copies = torch.get_rng_state(), [x.clone() for x in batches]
    compare(region, batches)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(x, y) for x, y in zip(batches, copies, strict=True))
    assert model.training
    assert region.current_state == state
    assert model.forward is region._intercepted
    assert not region.switches.taps


def test_chosen_output_after_post_processing_is_the_last_row(net: tuple[Net, Region, list[Tensor]]) -> None:
    """B1: the metric sees what follows; only what acts on the output is compared."""
    model, region, batches = net
    result = compare(region, batches[:1], output="h", post_process=torch.sigmoid)
    assert [row.mod_name for row in result.rows][-2:] == ["add_0", CHOSEN]
    base, analy = (by_hand(model, region, batches[0], on=on)["add_0.output"].sigmoid() for on in (False, True))
    assert pytest.approx(F.mse_loss(analy, base).item(), rel=1e-5) == result.rows[-1].MSE
    assert "output 'h' after sigmoid" in result.note


def test_model_whose_ops_follow_the_data_is_compared_as_far_as_possible() -> None:
    """Shapes that differ between the two models: the row says so, and the others are there."""

    class Selecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x).relu()
            return h[h > 0.45].sqrt()

    x = torch.rand(64, 4, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    region = calibrated(Selecting(), x, qconfig={"activation": {"dtype": "int2"}, "weight": {"dtype": "int2"}})
    result = compare(region, [x])
    assert "sqrt_0" in result.diverged
    assert result.by_name["sqrt_0"].MSE is None
    assert result.by_name["sqrt_0"].own_MSE is not None
    assert result.by_name["relu_0"].MSE is not None
    assert "cannot be compared" in result.note


class Branching(nn.Module):
    """A branch that tracing did not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return torch.sigmoid(x) if x.shape[0] > 2 else torch.tanh(x)


def test_op_that_tracing_did_not_reach_is_said_and_runs_in_float() -> None:
    """A3, B3: as in the region's own forward, in both models."""
    region = calibrated(Branching(), torch.linspace(-1, 1, 12).reshape(4, 3))
    with pytest.warns(UserWarning, match="tanh at .*test_comparison.py.* was not seen while tracing"):
        rows = compare(region, [torch.linspace(-1, 1, 6).reshape(2, 3)]).rows
    assert [row.mod_name for row in rows] == ["fc.input0", "fc.weight", "fc", "<output>"]
    assert [place.partition(" ")[0] for place in region.unplanned] == ["tanh"]


def test_bad_input_is_refused(net: tuple[Net, Region, list[Tensor]]) -> None:
    _, region, batches = net
    with pytest.raises(ConfigurationError, match="there was no batch"):
        compare(region, [])
    with pytest.raises(ConfigurationError, match=r"has no output 'map\.1'"):
        compare(region, batches, output="map.1")
    with pytest.raises(ConfigurationError, match=r"holds NaN.*No op of the region made it"):
        compare(region, [torch.full_like(batches[0], torch.nan)])
    with pytest.raises(ConfigurationError, match="keep_bytes must be"):
        compare(region, batches, keep_bytes=0)
    with pytest.raises(ConfigurationError, match="calibrate the region"):
        compare(insert(Net(), (batches[0],)), batches)


def test_files_hold_every_column(net: tuple[Net, Region, list[Tensor]], tmp_path: Path) -> None:
    _, region, batches = net
    result = compare(region, batches)
    with open(write_csv(result, tmp_path / "c.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(result.columns())
    assert float(rows[2]["SQNR"]) == result.rows[2].SQNR
    data = json.loads(write_json(result, tmp_path / "c.json").read_text())
    assert data["rows"][2]["mod_name"] == "relu_0"
    assert data["evidence"] == []


def test_op_that_draws_random_numbers_draws_the_same_twice() -> None:
    """Its own error is that of its fake-quants; and what follows draws what it would have drawn."""

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(F.dropout(x, 0.5, training=True) * 2, 0.5, training=True) + 1

    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    region = insert(Noisy(), (x,))
    calibrate(region, [x])
    result = compare(region, [x])
    assert all(row.own_SQNR is None or row.own_SQNR > 30 for row in result.rows)
    assert all(row.SQNR > 30 for row in result.rows)  # type: ignore[operator]


def test_model_in_float64_stays_as_it_is() -> None:
    """What looks at float64 values must not write into them."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    x = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    region = insert(model, (x,))
    calibrate(region, [x])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = x.clone()
    result = compare(region, [x])
    rows = {row.point: row for row in layer_statistics(region, [x]).rows}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(x, seen)
    weight = before["0.weight"]
    assert rows["0.weight"].var == pytest.approx(weight.var().item())
    quantized = region.points["0.weight"].forward(weight)
    assert rows["0.weight"].rounding_energy == pytest.approx((quantized - weight).square().sum().item())
    assert result.by_name["0.weight"].own_MSE == pytest.approx((quantized - weight).square().mean().item())


class Loop(nn.Module):
    """Post-processing in a loop of Python: every round is an op of its own."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.rounds = rounds

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(x)
        for i in range(self.rounds):
            h = h * (1.0 + 0.001 * i)
        return h + 1.0


@pytest.mark.parametrize("rounds", [LONG_LOOP - 1, LONG_LOOP])
def test_rounds_of_a_long_loop_are_one_row_for_people(rounds: int, tmp_path: Path) -> None:
    """B3: thousands of rounds would bury the rest; csv and json hold them all."""
    x = torch.linspace(-1, 1, 32).reshape(8, 4)
    wide = [{"match": "mul_7.output", "activation": {"fixed_scale": 0.1}}]
    region = insert(Loop(rounds), (x,), overrides=wide)
    calibrate(region, [x])
    result = compare(region, [x])
    every = [row.mod_name for row in result.rows]
    (shown,) = result.full_blocks()
    names = [row[shown.columns.index("mod_name")] for row in shown.rows]
    assert len([name for name in every if name.startswith("mul_")]) == rounds
    if rounds < LONG_LOOP:
        assert names == every
        return
    assert names == ["head.input0", "head.weight", "head", f"mul_7 (worst of {rounds} rounds)", "add_0", CHOSEN]
    assert result.by_name["mul_7"].loop.startswith("mul in ")
    assert ".py:" in result.by_name["mul_7"].loop
    assert result.by_name["head"].loop == ""
    assert len(write_csv(result, tmp_path / "c.csv").read_text().splitlines()) == len(every) + 1
    text = write_result(result, tmp_path, "c", formats=("txt",))[0].read_text()
    assert f"mul_7 (worst of {rounds} rounds)" in text
    assert "mul_8" not in text


class Repeating(nn.Module):
    """How often the block runs follows the values."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.relu()
        for _ in range(2 if float(h.detach().max()) > 0.8 else 1):
            with dynamic_block(self, "again"):
                h = h * 0.5
        return h.sum(1)


def test_more_rounds_in_the_quantized_model_cannot_be_compared() -> None:
    """B3: 0.6 is rounded to 1, and the block runs once more than in float."""
    x = torch.full((2, 4), 0.6)
    region = insert(Repeating(), (x,), overrides=[{"match": "relu_0.output", "activation": {"fixed_scale": 1.0}}])
    calibrate(region, [x])
    result = compare(region, [x])
    (name,) = result.diverged
    assert name.endswith("mul_0")
    assert result.by_name[name].MSE is None
    assert result.by_name[name].own_MSE is not None


def _compare_on_rank(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    try:
        region = insert(
            Repeating(), (torch.ones(2, 4),), overrides=[{"match": "relu_0.output", "activation": {"fixed_scale": 1.0}}]
        )
        calibrate(region, [torch.full((2, 4), 0.6)])
        result = compare(region, [torch.full((2, 4), (0.2, 0.6)[rank])], across_ranks=True)
        Path(directory, f"{rank}.json").write_text(json.dumps([result.diverged, result.batches]))
    finally:
        dist.destroy_process_group()


@pytest.mark.full
def test_rows_that_diverge_on_one_rank_are_left_out_on_all(tmp_path: Path) -> None:
    """B3: only the values of rank 1 make the quantized model run the block once more."""
    torch.multiprocessing.spawn(_compare_on_rank, (str(tmp_path),), nprocs=2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    (name,), batches = found[0]
    assert name.endswith("mul_0")
    assert batches == 2
