"""The sensitivity sketch (B1, B2): estimates against isolation and formulas, and what gradients do not reach."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanSquaredError

from lightning_qat.analysis.captured_calls import analysis_mode
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.analysis.sensitivity.sensitivity import sensitivity
from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult
from lightning_qat.analysis.sensitivity.sensitivity_sketch import Sketch
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from tests.benchmarks.trained_models import Trained, digits_vit


def region_of(model: nn.Module, x: Any, dtype: str = "int8", **kwargs: Any) -> Region:
    model.eval()
    config = {"activation": {"dtype": dtype, "observer": "minmax"}, "weight": {"dtype": dtype}}
    region = insert(model, batches=[x], qconfig=config, **kwargs)
    calibrate(region, [x])
    return region


def estimated(region: Region, *calls: Any, output: Any = None, probes: int = 64) -> dict[str, float]:
    """Estimated scores of all points."""
    names = [point.name for point in region.plan.points if point.same_as is None]
    sketch = Sketch(region, names, OutputSelector(output), probes)
    with analysis_mode(region):
        for call in calls:
            sketch.run(Call.of(call))
    return {name: math.sqrt(sketch.mse(name)[0]) for name in names}


def isolated(region: Region, *calls: Any, **kwargs: Any) -> dict[str, float]:
    return {row.point: row.score for row in sensitivity(region, calls, method="isolation", **kwargs).rows}


def assert_close(region: Region, *calls: Any, rel: float = 0.15, **kwargs: Any) -> None:
    """Every estimate is the measured score, within the spread of many probes and of int8's second order."""
    exact = isolated(region, *calls, **kwargs)
    assert estimated(region, *calls, **kwargs) == pytest.approx(exact, rel=rel, abs=1e-9)
    assert max(exact.values()) > 0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.head, self.other = nn.Linear(64, 3), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = F.relu(self.bn(self.conv(x))).flatten(1)
        return {"a": self.head(h), "b": self.other(h).tanh()}


def test_linear_model_equals_the_formula() -> None:
    """B2: the mean over probes of <J^T v, d>^2 is |J d|^2, exactly where the output is linear in the point."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    model, x = Linear(), torch.randn(16, 6)
    region = region_of(model, x, "int4")
    # One output per sample, whose sign drops out in the square: every probe is exact.
    scores = estimated(region, x, probes=1)
    with torch.no_grad():
        d = region.points["fc.input0"](x) - x
        w = region.points["fc.weight"](model.fc.weight) - model.fc.weight
        assert scores["fc.input0"] == pytest.approx(float((d @ model.fc.weight.T).square().mean().sqrt()), rel=1e-5)
        assert scores["fc.weight"] == pytest.approx(float((x @ w.T).square().mean().sqrt()), rel=1e-5)


def test_all_points_are_estimated_over_batches_and_outputs() -> None:
    model, x = Net(), torch.randn(16, 2, 6, 6)
    region = region_of(model, x)
    assert_close(region, x, torch.randn(7, 2, 6, 6))
    assert_close(region, x, output="b")
    assert estimated(region, x, output="b")["head.weight"] == 0


def test_fourfold_probes_halve_the_standard_error() -> None:
    model, x = Net(), torch.randn(16, 2, 6, 6)
    region = region_of(model, x)

    def errors(probes: int) -> dict[str, float]:
        sketch = Sketch(region, list(region.points), OutputSelector(), probes)
        with analysis_mode(region):
            sketch.run(Call.of(x))
        return {name: sketch.mse(name)[1] for name in region.points}

    few, many = errors(32), errors(128)
    assert many == pytest.approx({name: error / 2 for name, error in few.items()}, rel=0.35)


class Refinement(nn.Module):
    """Reference points that are refined step by step, detached as deformable decoders do."""

    def __init__(self, cut: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.start = nn.Linear(6, 4)
        self.steps = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        point = self.start(x).sigmoid()
        for step in self.steps:
            point = (step(point) + torch.logit(self.cut(point), eps=1e-3)).sigmoid()
        return point


def detached_copy(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x * 1.0
    y.requires_grad_(False)
    return y


@pytest.mark.parametrize("cut", [Tensor.detach, lambda x: x.data, detached_copy], ids=["detach", "data", "no_grad"])
def test_gradients_go_through_detach_data_and_no_grad(cut: Callable[[Tensor], Tensor]) -> None:
    """Design 7: the cut would bias the estimate silently."""
    x = torch.randn(32, 6)
    assert_close(region_of(Refinement(cut), x), x)


def test_folded_batches_are_split_by_true_samples_whichever_way_they_are_folded() -> None:
    """Design 7: splitting along a folded axis is biased, as the cameras of a sample add up in its output."""

    class Cameras(nn.Module):
        def __init__(self, inner: bool) -> None:
            super().__init__()
            self.inner = inner
            self.conv, self.head = nn.Conv2d(1, 3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            samples = x.shape[0]
            x = (x.transpose(0, 1) if self.inner else x).flatten(0, 1)
            h = self.conv(x).relu().mean((2, 3))
            h = h.unflatten(0, (-1, samples)).sum(0) if self.inner else h.unflatten(0, (samples, -1)).sum(1)
            return self.head(h)

    for inner in (False, True):
        model, x = Cameras(inner), torch.randn(12, 5, 1, 6, 6) + 1
        region = region_of(model, x)
        names = list(region.points)
        sketch = Sketch(region, names, OutputSelector(), 16)
        with analysis_mode(region):
            sketch.run(Call.of(x))
        assert {sketch.estimates[name].products for name in names} == {16.0 * 12}
        assert_close(region, x)


def test_samples_that_act_on_each_other_are_not_split() -> None:
    """Centring over the batch: most of an error common to all samples cancels."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return y - y.mean(0)

    x = torch.randn(8, 4) * 0.1 + 3
    region = region_of(Centred(), x)
    sketch = Sketch(region, list(region.points), OutputSelector(), 3)
    with analysis_mode(region):
        sketch.run(Call.of(x))
    assert sketch.unsplit == 1
    assert {e.products for e in sketch.estimates.values() if e.products} == {3.0}
    exact, estimate = isolated(region, x), estimated(region, x, probes=512)
    assert estimate["fc.weight"] == pytest.approx(exact["fc.weight"], rel=0.2)


class Picking(nn.Module):
    """Scores pick the values that leave: they have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.value = nn.Linear(6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        best = self.score(x).squeeze(-1).topk(2, dim=1).indices
        return self.value(x).gather(1, best[..., None].expand(-1, -1, 3))


def test_points_that_only_act_through_indices_are_measured_by_isolation() -> None:
    """Design 7: topk in the path."""
    x = torch.randn(16, 8, 6)
    region = region_of(Picking(), x, "int4")
    result = sensitivity(region, [x], method="sketch", confirm=0, probes=64)
    rows, exact = {row.point: row for row in result.rows}, isolated(region, x)
    assert {name for name, row in rows.items() if row.exact} == {name for name in rows if name.startswith("score")}
    assert set(result.without_gradient) == {name for name, row in rows.items() if row.exact}
    assert result.held[0].startswith("topk_0 at ")
    assert "topk_0" in result.note
    for name, row in rows.items():
        assert row.score == pytest.approx(exact[name], rel=0.2), name
        assert (row.value is None) != row.exact


def test_argmax_rounding_and_functions_without_backward_are_found_by_construction() -> None:
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
            self.table = nn.Embedding(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.table(self.a(x).argmax(-1)) + (3 * self.b(x)).round() + Opaque.apply(self.c(x))
            return self.d(y)

    x = torch.randn(32, 4)
    region = region_of(Cut(), x, "int4")
    result = sensitivity(region, [x], method="sketch", confirm=0, probes=64)
    exact = isolated(region, x)
    assert {"a.weight", "b.weight", "c.weight"} <= set(result.without_gradient)
    assert not {"d.weight", "table.weight"} & set(result.without_gradient)
    for row in result.rows:
        assert row.score == pytest.approx(exact[row.point], rel=0.25 if not row.exact else 1e-6), row.point


def test_shared_weights_repeated_ops_in_place_ops_and_checkpointing() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.rnn = nn.Linear(6, 6), nn.LSTM(6, 6, batch_first=True)
            self.table = nn.Parameter(torch.randn(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x).relu_()
            x = self.rnn(x)[0] + self.table
            x = checkpoint(self.fc, x, use_reentrant=True) + checkpoint(self.fc, x, use_reentrant=False)
            x[:, 0] = 0
            return x.mul_(0.5).sum(1) @ self.table.T

    x = torch.randn(24, 5, 6)
    region = region_of(Shared(), x)
    weights = [p.name for p in region.plan.points if p.is_weight and p.same_as is None]
    assert len([name for name in weights if name.startswith("fc")]) == 1
    result = sensitivity(region, [x], method="sketch", confirm=0, probes=64)
    exact = isolated(region, x)
    assert {row.point for row in result.rows} == set(exact)
    for row in result.rows:
        assert row.score == pytest.approx(exact[row.point], rel=0.2), row.point


def test_sketch_leaves_no_trace() -> None:
    """Foundation: gradients, flags, buffers, random state."""

    class Stateful(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(2))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x.mul_(1.5)
            self.calls += x.mean()
            return super().forward(x + 0.1 * torch.rand_like(x))

    model, x = Stateful(), torch.randn(8, 2, 6, 6)
    region = region_of(model, x)
    model.other.weight.requires_grad_(False)
    model.train()
    model.head.weight.grad = grad = torch.ones_like(model.head.weight)
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    flags = [p.requires_grad for p in model.parameters()]
    copy, calls, rng, state = x.clone(), model.calls, torch.get_rng_state(), region.current_state
    sensitivity(region, [x], method="sketch")
    assert torch.equal(x, copy)
    assert not x.requires_grad
    assert model.calls is calls
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.head.weight.grad is grad
    assert model.training
    assert "forward" in model.__dict__
    assert region.current_state == state


def test_confirmed_rows_come_first_with_the_metric_that_was_asked_for() -> None:
    model, x = Net(), torch.randn(16, 2, 6, 6)
    region = region_of(model, x)
    result = sensitivity(region, [x], metric="SQNR", method="sketch", confirm=3)
    assert [row.exact for row in result.rows] == [True] * 3 + [False] * (len(region.points) - 3)
    values = [row.value for row in result.rows[:3]]
    assert values == sorted(values)  # type: ignore[type-var]
    assert all(row.value is None and row.standard_error for row in result.rows[3:] if row.score)
    whole = {row.point: row for row in sensitivity(region, [x], metric="SQNR", method="isolation").rows}
    for row in result.rows[:3]:
        assert (row.value, row.score, row.standard_error) == (whole[row.point].value, whole[row.point].score, 0.0)
    assert "sketch (4 probes), 3 of them measured by isolation" in result.note
    shares = {row.point: row.flops_share for row in result.rows}
    assert shares["conv.weight"] == shares["relu_0.output"]  # the ops of a fused group count together
    assert shares["head.weight"] == pytest.approx(2 * 64 * 3 / (2 * 16 * 18 * 4 + 2 * 64 + 2 * 64 * 5 + 2), rel=1e-3)


def test_functions_and_torchmetrics_are_metrics() -> None:
    model, x = Net(), torch.randn(8, 2, 6, 6)
    region, batches = region_of(model, x, "int4"), [x, torch.randn(8, 2, 6, 6)]

    def largest(base: Tensor, analy: Tensor) -> Tensor:
        return (base - analy).abs().max()

    def rows(metric: Any) -> dict[str, float | None]:
        return {row.point: row.value for row in sensitivity(region, batches, "a", metric=metric).rows}

    assert rows(MeanSquaredError()) == pytest.approx(rows("MSE"), rel=1e-4)
    result = sensitivity(region, batches, "a", metric=largest)
    assert result.columns()[3] == "largest"
    with region.state("quantize"), torch.no_grad():
        expected = []
        for batch in batches:
            with region.only(()):
                base = model(batch)["a"]
            with region.only(("conv.weight",)):
                expected.append(float((model(batch)["a"] - base).abs().max()))
    value = next(row.value for row in result.rows if row.point == "conv.weight")
    assert value == pytest.approx(sum(expected) / 2)


def test_rank_change_counts_the_places_risen() -> None:
    """B9."""
    model, x = Net(), torch.randn(8, 2, 6, 6)
    region = region_of(model, x, "int4")
    first = sensitivity(region, [x])
    assert {row.rank_change for row in first.rows} == {None}
    assert {row.rank_change for row in sensitivity(region, [x], previous=first).rows} == {0}
    turned = SensitivityResult(rows=first.rows[::-1])
    last = len(first.rows) - 1
    changes = [row.rank_change for row in sensitivity(region, [x], previous=turned).rows]
    assert changes == [last - 2 * rank for rank in range(last + 1)]


def test_model_without_gradients_is_measured_by_isolation_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad input: no gradient path."""

    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).argmax(-1).float()

    x = torch.randn(64, 4)
    region = region_of(Classes(), x, "int4")
    monkeypatch.setattr("lightning_qat.analysis.sensitivity.sensitivity.forwards_of_sketch", lambda probes: 0)
    result = sensitivity(region, [x], confirm=0)
    assert result.method == "isolation"
    assert "isolation because no gradient reaches a point" in result.note
    assert {row.point: row.score for row in result.rows} == isolated(region, x)
    with pytest.raises(ConfigurationError, match="a sketch is impossible: no gradient reaches"):
        sensitivity(region, [x], method="sketch")


def test_bad_input_is_one_clear_error() -> None:
    """Issue 5, 7: NaN, no tensor, an empty batch, wrong numbers."""

    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"log": torch.log(self.fc(x)) + 1, "name": "log"}

    x = torch.randn(16, 4)
    model = Fragile()
    region = region_of(model, x)
    for method in ("sketch", "isolation"):
        with pytest.raises(ConfigurationError, match=r"holds NaN.*first op that made one is log_0 at .*\.py:\d+"):
            sensitivity(region, [x], method=method, post_process=lambda y: y["log"])  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="holds no tensor, but str"):
        sensitivity(region, [x], method="sketch", output="name")
    region = region_of(Net(), torch.randn(4, 2, 6, 6))
    with pytest.raises(ConfigurationError, match="no finite element"):
        sensitivity(region, [torch.empty(0, 2, 6, 6)], method="sketch")
    with pytest.raises(ConfigurationError, match="no batch"):
        sensitivity(region, [], method="sketch")
    with pytest.raises(ConfigurationError, match="probes must be at least 1"):
        sensitivity(region, [torch.randn(4, 2, 6, 6)], probes=0)
    with pytest.raises(ConfigurationError, match="no output 'c'"):
        sensitivity(region, [torch.randn(4, 2, 6, 6)], "c", method="sketch")


def test_python_numbers_and_copies_of_tensors_in_the_forward() -> None:
    """What torch refuses for tensors with a gradient works as in a plain forward; numbers act without a gradient."""

    class Numbers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            peak = self.a(x).abs().amax()
            scale = float(peak) + 1 / peak.item() + float(peak.detach().numpy()) + sum(peak.reshape(1).tolist())
            return copy.deepcopy(self.b(x)) * scale

    x = torch.randn(16, 4)
    region = region_of(Numbers(), x, "int4")
    result = sensitivity(region, [x], method="sketch", confirm=0, probes=64)
    exact = isolated(region, x)
    assert "a.weight" in result.without_gradient
    for row in result.rows:
        assert row.score == pytest.approx(exact[row.point], rel=0.2), row.point


def test_errors_that_do_not_fit_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded, the numbers stay."""
    model, x = Net(), torch.randn(16, 2, 6, 6)
    region = region_of(model, x)
    before = estimated(region, x, probes=4)
    monkeypatch.setattr("lightning_qat.analysis.sensitivity.error_products._KEPT_BYTES", 1000)
    assert estimated(region, x, probes=4) == before


def agreement(region: Region, x: Tensor) -> tuple[float, float]:
    """Spearman's correlation of estimates with isolation, and the share of the true top tenth that is reported."""
    exact, scores = isolated(region, x), estimated(region, x, probes=4)
    correlation = spearmanr([exact[name] for name in scores], list(scores.values())).statistic
    top = sorted(exact, key=lambda name: -exact[name])[: math.ceil(0.1 * len(exact))]
    reported = {row.point for row in sensitivity(region, [x], method="sketch").rows[: len(top)]}
    return correlation, len(reported & set(top)) / len(top)


AIMS = pytest.mark.parametrize(("dtype", "correlation", "recall"), [("int8", 0.97, 0.95), ("int4", 0.95, 0.9)])


@AIMS
def test_digits_resnet_is_ranked_as_by_isolation(
    dtype: str, correlation: float, recall: float, digits_float_checkpoint: Path
) -> None:
    """B2, issue 5: R = 4, on the trained digits ResNet."""
    from examples.digits import DigitsClassifier, DigitsDataModule

    data = DigitsDataModule()
    data.setup()
    model = DigitsClassifier()
    model.load_state_dict(torch.load(digits_float_checkpoint, weights_only=True)["state_dict"])
    region = region_of(model, data.train_set.tensors[0][:128], dtype)
    found = agreement(region, data.val_set.tensors[0][:128])
    assert found[0] >= correlation
    assert found[1] >= recall


@pytest.fixture(scope="module")
def small_vit() -> Trained:
    return digits_vit(steps=400, width=32, blocks=2)


@AIMS
def test_digits_vit_is_ranked_as_by_isolation(
    dtype: str, correlation: float, recall: float, small_vit: Trained
) -> None:
    """B2, issue 5: R = 4, on a small ViT; the benchmark has a larger one."""
    assert small_vit.accuracy is not None
    assert small_vit.accuracy > 0.9
    model = copy.deepcopy(small_vit.model)
    found = agreement(region_of(model, small_vit.calibration, dtype), small_vit.inputs)
    assert found[0] >= correlation
    assert found[1] >= recall


def test_nothing_of_the_graph_outlives_the_analysis() -> None:
    """A hook that knows its own tensor would keep every activation alive, where no garbage collection sees it."""
    alive: list[weakref.ref[Tensor]] = []

    class Remembering(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = layer(x)
                alive.append(weakref.ref(x))
            return x

    module = Remembering(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.linspace(-1, 1, 32).reshape(8, 4)
    region = insert(module, (x,))
    calibrate(region, [x])
    alive.clear()
    sensitivity(region, [x], method="sketch", probes=2, confirm=0)
    gc.collect()
    assert alive
    assert [ref() for ref in alive if ref() is not None] == []
