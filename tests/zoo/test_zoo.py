"""Models that nobody here wrote are quantized at the first try (issue 3, done when 1; foundation 1)."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.analysis.metrics import sqnr
from lightning_qat.quantization.modules.module_walk import REGION_NAME
from lightning_qat.quantization.modules.tensor_leaves import leaves
from lightning_qat.quantization.planning.deployed_part import LOSS, TRAIN_ONLY
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.region import Region
from tests.quantization.region.test_off_is_float import assert_identical
from tests.zoo.limits import LIMITED
from tests.zoo.measure import CALIBRATION, FLOOR, calibrated, float_ops, training_losses, worst_sqnr
from tests.zoo.models import ZOO, Batch, ZooModel, inputs

pytest.importorskip("transformers", reason="transformers needs Python 3.11 or newer")


def models(*heavy: str) -> pytest.MarkDecorator:
    """Parametrize over the zoo; these models, and those with eager attention, in ``make test-full`` only."""
    parameters = [
        pytest.param(name, id=name, marks=[pytest.mark.full] if m.full or name in heavy else [])
        for name, m in ZOO.items()
    ]
    return pytest.mark.parametrize("name", parameters)


EFFICIENTNET = "EfficientNet-Lite0, pretrained"
REASONS = (
    LOSS,
    TRAIN_ONLY,
    "computed from integer inputs alone (positions, masks): exact",
    "mask: holds additive mask values",
)
"""Why an op may stay in float. Nothing else may be in the way of any model of the zoo."""


def step(zoo_model: ZooModel, model: nn.Module, batch: Batch, train: bool) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Outputs, loss and gradients of one step, with the same random numbers each time."""
    model.train(train)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    outputs = leaves(model(**(batch if zoo_model.own_loss else inputs(batch))))
    torch.manual_seed(7)
    loss = zoo_model.loss(model, batch)
    loss.backward()
    return outputs, loss, [p.grad for p in model.parameters() if p.grad is not None]


@models()
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_off_is_bit_identical(name: str, train: bool) -> None:
    """foundation 1: outputs, loss, gradients and buffers; the only new keys are the region's."""
    zoo_model = ZOO[name]
    model = zoo_model.make()
    reference = copy.deepcopy(model)
    zoo_model.insert(model)
    batch = zoo_model.batches(1, 4)[0]
    assert_identical(step(zoo_model, model, batch, train), step(zoo_model, reference, batch, train))
    state = {name: t for name, t in model.state_dict().items() if not name.startswith(REGION_NAME)}
    assert list(state) == list(reference.state_dict())
    assert_identical(list(state.values()), list(reference.state_dict().values()))


@models()
def test_remove_gives_the_float_model_back(name: str) -> None:
    """foundation 1."""
    zoo_model = ZOO[name]
    model = zoo_model.make()
    reference = copy.deepcopy(model)
    region = calibrated_once(zoo_model, model)
    assert region.remove() is model
    assert list(model.state_dict()) == list(reference.state_dict())
    batch = zoo_model.batches(1, 2)[0]
    assert_identical(step(zoo_model, model, batch, False), step(zoo_model, reference, batch, False))


def calibrated_once(zoo_model: ZooModel, model: nn.Module) -> Region:
    """Calibrated to int8 on a small batch."""
    region = zoo_model.insert(model, observer="minmax")
    calibrate(region, [inputs(zoo_model.batches(1, 2)[0])])
    return region


@models("Deformable-DETR", "DETR", EFFICIENTNET)
@pytest.mark.parametrize(
    "copier",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda m: pickle.loads(pickle.dumps(m)), id="pickle"),
    ],
)
def test_copies_are_independent(name: str, copier: Callable[[nn.Module], nn.Module]) -> None:
    """foundation 1: training a copy leaves the original alone."""
    zoo_model = ZOO[name]
    model = zoo_model.make()
    calibrated_once(zoo_model, model)
    batch = zoo_model.batches(1, 2)[0]
    with torch.no_grad():
        before = leaves(model.eval()(**inputs(batch)))
    other = copier(model)
    with torch.no_grad():
        assert_identical(leaves(other.eval()(**inputs(batch))), before)
    zoo_model.loss(other, batch).backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    with torch.no_grad():
        assert_identical(leaves(model(**inputs(batch))), before)
        assert any(not torch.equal(a, b) for a, b in zip(leaves(other(**inputs(batch))), before, strict=True))


@models()
def test_no_op_stays_float_without_a_reason(name: str) -> None:
    """done when 1: coverage; nothing is opaque, and every calibration point is reached."""
    zoo_model = ZOO[name]
    region = zoo_model.insert(zoo_model.make())
    assert {name: reason for name, reason in float_ops(region).items() if reason not in REASONS} == {}
    assert [p.name for p in region.plan.points if "cannot be traced" in p.reason] == []
    assert {p.op for p in region.plan.points if p.role == "output"} <= {op.name for op in region.graph.ops}
    assert len(region.plan.points) > 30


@models()
def test_ordinary_uses_meet_no_unplanned_op(name: str) -> None:
    """done when 1: other sizes and lengths, with and without cache, masks and labels, in both modes."""
    zoo_model = ZOO[name]
    model = zoo_model.make()
    region = calibrated_once(zoo_model, model)
    for train in (False, True):
        model.train(train)
        for use in zoo_model.uses.values():
            with torch.set_grad_enabled(train):
                use(model)
    assert region.unplanned == {}


@models()
def test_calibration_has_nothing_to_complain_about(name: str) -> None:
    """done when 1: no point without data, no NaN, no scale of zero."""
    zoo_model = ZOO[name]
    region = zoo_model.insert(zoo_model.make(), observer="minmax")
    assert calibrate(region, [inputs(zoo_model.batches(1, 4)[0]), *zoo_model.traced()]).findings == ()


@models()
def test_int16_is_nearly_float(name: str) -> None:
    """done when 1: int16 >= 50 dB, or the op and the reason are listed."""
    zoo_model = ZOO[name]
    model = zoo_model.make()
    region = calibrated(zoo_model, model, "int16")
    noise = worst_sqnr(zoo_model, model, region, zoo_model.batches(*CALIBRATION))
    assert noise >= (LIMITED[name].least if name in LIMITED else FLOOR)
    assert name not in LIMITED or noise < FLOOR, f"{name} is not limited any more: take it off the list"


def test_what_limits_mobilenet_is_the_float_model() -> None:
    """done when 1: noise far below one activation comes out as large as the table says, without any quantization."""
    zoo_model = ZOO["MobileNetV2"]
    model = zoo_model.make()
    batch = inputs(zoo_model.batches(1, 8)[0])

    def noisy(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return output + 1e-4 * output.square().mean().sqrt() * torch.randn_like(output)

    with torch.no_grad():
        exact = model(**batch).logits
        model.mobilenet_v2.conv_stem.first_conv.register_forward_hook(noisy)  # type: ignore[operator, union-attr]
        assert sqnr(exact, model(**batch).logits) < FLOOR


@models("Deformable-DETR", EFFICIENTNET)
def test_training_steps_reduce_the_loss(name: str) -> None:
    """done when 1: 20 steps at int8 on one batch."""
    zoo_model = ZOO[name]
    losses = training_losses(zoo_model, zoo_model.make())
    assert sum(losses[-5:]) < sum(losses[:5])
