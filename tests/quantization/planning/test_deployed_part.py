"""What only serves training is not quantized, and quantizes nothing; numbers from integers stay exact."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.quantization.planning.deployed_part import LOSS, TRAIN_ONLY
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from tests.quantization.models import MINMAX


def inserted(module: nn.Module, *batches: Any) -> Region:
    return insert(module, batches=batches, qconfig=MINMAX)


def reasons(region: Region) -> dict[str, str]:
    return {op.name: op.reason for op in region.plan.ops if op.status == "float"}


class Residual(nn.Module):
    """Stochastic depth as `timm` and `transformers` write it."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.first, self.branch = nn.Linear(4, 4), nn.Linear(4, 4)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        y = self.branch(x)
        if self.training and self.drop:
            mask = torch.rand(len(y), 1).add(1 - self.drop).floor()
            y = y.div(1 - self.drop) * mask
        return torch.tanh(x + y)


def test_stochastic_depth_leaves_the_plan_as_it_is_without() -> None:
    """foundation 5: points and fusions are those of the deployed model; every point is calibrated."""
    x = torch.randn(6, 4)
    torch.manual_seed(0)
    module = Residual(0.5)
    region, plain = inserted(module, (x,)), inserted(Residual(0.0), (x,))
    names = [p.name.replace("add_1", "add_0") for p in region.plan.points]  # the mask has an add of its own
    assert names == [p.name for p in plain.plan.points]
    assert [f.kinds for f in region.plan.fusions] == [f.kinds for f in plain.plan.fusions] == [("linear", "add")]
    assert set(reasons(region).values()) == {TRAIN_ONLY}
    assert calibrate(region, [(x,)]).findings == ()
    module.train()
    assert torch.isfinite(module(x)).all()
    assert region.unplanned == {}


def test_ops_of_both_modes_are_kept_when_only_training_is_traced() -> None:
    """design 3: without a forward in eval mode nobody knows what only trains."""
    from lightning_qat.quantization.planning.make_plan import make_plan
    from lightning_qat.quantization.tracing.tracer import Tracer

    module = Residual(0.5).train()
    with torch.no_grad(), Tracer(module) as tracer:
        module(torch.randn(6, 4))
    assert TRAIN_ONLY not in {op.reason for op in make_plan(tracer.graph()).ops}


class WithLoss(nn.Module):
    """Returns its loss if it is given labels, as `transformers` models do; matches them outside torch if told to."""

    def __init__(self, matching: bool = False) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.matching = matching

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        probabilities = torch.sigmoid(self.head(torch.tanh(self.body(x))))
        if labels is None:
            return {"boxes": probabilities}
        if self.matching:
            cost = (probabilities.detach() * 2.0 - labels[0]).abs() + labels.exp()
            labels = labels[torch.as_tensor(cost.sum(1).numpy().argsort().copy())]
        error = probabilities - labels
        return {"loss": (error * error).mean() + 0.1 * error.abs().mean(), "boxes": probabilities}


@pytest.mark.parametrize("matching", [False, True])
def test_loss_inside_the_model_is_computed_in_float(matching: bool) -> None:
    """foundation 5: traced with labels, the plan is that of the model without; the loss is that of its outputs."""
    x, labels = torch.randn(6, 4), torch.rand(6, 3)
    torch.manual_seed(0)
    module = WithLoss(matching)
    region, plain = inserted(module, {"x": x, "labels": labels}), inserted(WithLoss(), {"x": x})
    assert [p.name for p in region.plan.points] == [p.name for p in plain.plan.points]
    assert set(reasons(region).values()) == {LOSS}
    calibrate(region, [{"x": x}])
    out = module.eval()(x, labels)
    assert region.unplanned == {}
    if not matching:
        error = out["boxes"] - labels
        torch.testing.assert_close(out["loss"], error.square().mean() + 0.1 * error.abs().mean(), rtol=0, atol=0)


def test_model_that_returns_nothing_but_a_scalar_is_quantized() -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.fc(x)).sum()

    region = inserted(Energy(), (torch.randn(2, 4),))
    assert reasons(region) == {}
    assert [p.name for p in region.plan.points][-1] == "sum_0.output"


class Positions(nn.Module):
    """Sine position embedding from a mask, as in DETR: cumulative sums, divided by their last value."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        position = mask.cumsum(1, dtype=torch.float32)
        position = position / (position[:, -1:] + 1e-6) * 2 * math.pi
        angle = position[:, :, None] / 10000 ** (torch.arange(4) / 4)
        return self.fc(x + torch.cat([angle.sin(), angle.cos()], -1))


def test_positions_computed_from_integers_are_exact_until_they_meet_data() -> None:
    """design 4: like constant subgraphs; one input point where they join."""
    x, mask = torch.randn(2, 300, 8), torch.ones(2, 300, dtype=torch.long)
    module = Positions()
    region = inserted(module, {"x": x, "mask": mask})
    assert {p.name for p in region.plan.points if p.role == "input"} == {"add_1.input0", "add_1.input1"}
    assert set(reasons(region).values()) == {"computed from integer inputs alone (positions, masks): exact"}
    reference = module(x, mask)
    calibrate(region, [{"x": x, "mask": mask}])
    assert (module(x, mask) - reference).norm() < 0.05 * reference.norm()


def test_embeddings_one_hot_products_and_pixels_are_data() -> None:
    """design 4: a parameter or floating-point numbers make data of integers."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4)
            self.weight = nn.Parameter(torch.randn(5, 4))

        def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
            picked = F.one_hot(ids, 5).float() @ self.weight
            return torch.tanh(self.table(ids) + picked) * (pixels.float() / 255)

    region = inserted(Net(), (torch.tensor([0, 3]), torch.randint(0, 256, (2, 4), dtype=torch.uint8)))
    names = {p.name for p in region.plan.points}
    assert {"table.weight", "matmul_0.weight", "matmul_0.input0", "matmul_0.output", "div_0.input0"} <= names
    assert reasons(region) == {"one_hot_0": "returns no floating-point tensor"}


def test_zeros_of_weights_and_constants_are_no_finding() -> None:
    """A dead channel and a bias of zeros are exact; data that are always zero are worth a word."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.fc.weight.data[1] = 0
            self.register_buffer("shift", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(torch.tanh(self.fc(x)) * 0.5 + self.shift)

    region = inserted(Net(), (torch.randn(3, 4),))
    assert calibrate(region, [torch.randn(3, 4)]).findings == ()
    assert [f.point for f in calibrate(region, [torch.zeros(3, 4)]).findings][:1] == ["fc.input0"]


def test_branch_without_calibration_data_is_a_finding() -> None:
    """Traced in eval mode, so part of the deployed model, and never reached by the calibration data."""

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x * 2.0) if x.sum() > 0 else x * 2.0

    region = inserted(Net(), (torch.ones(3),), (-torch.ones(3),))
    found = calibrate(region, [(-torch.ones(3),)]).findings
    assert {(f.kind, f.point.split(".")[0]) for f in found} == {("no data", "mul_1"), ("no data", "tanh_0")}


class Cached(nn.Module):
    """A forward that appends to an object of its caller, as a key-value cache."""

    class Cache:
        def __init__(self) -> None:
            self.rows: list[Tensor] = []

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Cached.Cache) -> Tensor:
        cache.rows.append(torch.tanh(self.fc(x)))
        return torch.cat(cache.rows).sum(0) * 0.5


def test_objects_that_forwards_change_are_left_alone_by_tracing_and_calibration() -> None:
    """design 3: module and batches are left exactly as they were."""
    cache = Cached.Cache()
    cache.rows.append(torch.randn(2, 4))
    batch = {"x": torch.randn(3, 4), "cache": cache}
    region = inserted(Cached(), batch)
    calibrate(region, [batch])
    assert len(cache.rows) == 1
    cat = region.graph.by_name["cat_0"]
    assert {operand.shape for operand in cat.operands} == {(2, 4), (3, 4)}
    assert [p.name for p in region.plan.points if p.op == "cat_0"] == ["cat_0.output"]
