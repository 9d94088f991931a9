"""In which mode a target runs while it is traced.

Siblings: batch norm on one value, targets that only training has, an output that is a dictionary of losses in training
and a list in evaluation, ops of one mode only, parts that stay in eval mode, an example that fails half-way.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.quantization.errors import TracingError
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.tracing.op_graph import OpGraph
from lightning_qat.quantization.tracing.tracer import trace


class Detector(nn.Module):
    """The contract of torchvision's detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)
        self.seen: list[bool] = []

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        self.seen.append(self.training)
        if self.training and targets is None:
            raise ValueError("targets should be passed")
        scores = self.head(self.body(x))
        if self.training:
            return {"loss": F.mse_loss(torch.tanh(scores), targets)}  # type: ignore[arg-type]
        return [{"score": torch.sigmoid(row)} for row in scores]


def call(module: nn.Module, *args: Any, training: bool, **parts: bool) -> Call:
    """A call as it is seen in a run."""
    return Call(args, {}, {name: parts.get(name, training) for name, _ in module.named_modules()})


def kinds(graph: OpGraph) -> set[str]:
    return {op.kind for op in graph.ops}


def train_only(graph: OpGraph) -> set[str]:
    """Kinds of the ops of training, but for the counter of batch norm."""
    return {op.kind for op in graph.ops if op.train_only} - {"add"}


@pytest.mark.filterwarnings("error")
def test_a_call_is_replayed_in_the_mode_it_was_made_in_and_the_graph_is_the_union() -> None:
    """The eval call has one sample and no target: in train mode it would fail, in both places."""
    module = Detector()
    graph = trace(
        module,
        [
            call(module, torch.randn(1, 4), training=False),
            call(module, torch.randn(8, 4), torch.zeros(8, 2), training=True),
        ],
    )
    assert module.seen == [False, False, True, True]  # twice each: what is met again is a constant
    assert {"linear", "batch_norm", "relu", "sigmoid", "tanh", "mse_loss"} <= kinds(graph)
    assert train_only(graph) == {"tanh", "mse_loss"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("training", [False, True])
def test_a_mode_in_which_no_call_was_made_is_tried_with_those_of_the_other(training: bool) -> None:
    """A run that only validates, or a part that only training calls in one mode, may train later."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    assert trace(module, [call(module, torch.randn(2, 4), training=training)]).forwards == 4
    detector = Detector()
    arguments = (torch.randn(8, 4), torch.zeros(8, 2))[: 1 + training]
    graph = trace(detector, [call(detector, *arguments, training=training)])
    assert "sigmoid" in kinds(graph)
    assert ("tanh" in kinds(graph)) == training


def test_parts_that_were_in_eval_mode_are_replayed_so() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x) if self.training else torch.sigmoid(x)

    module = nn.Sequential(nn.Linear(4, 4), Noise(), Noise())
    train = call(module, torch.randn(2, 4), training=True, **{"1": False})
    graph = trace(module, [train, call(module, torch.randn(2, 4), training=False)])
    assert [op.name for op in graph.ops if op.kind == "tanh"] == ["2.tanh_0"]
    assert all(m.training for m in module.modules())


@pytest.mark.parametrize("module", [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), Detector()])
def test_an_example_that_only_evaluation_can_read_is_traced_there_and_it_says_so(module: nn.Module) -> None:
    with pytest.warns(UserWarning, match=r"does not run on the example in train mode \(ValueError: .*train_mode=False"):
        region = insert(module, (torch.randn(1, 4),))
    assert "batch_norm" in kinds(region.graph)
    assert not train_only(region.graph)
    region.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        insert(module, (torch.randn(1, 4),), train_mode=False)


def test_what_a_failing_example_reached_first_is_known_as_training_only() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.body(torch.tanh(x) if self.training else x)
            return result

    with pytest.warns(UserWarning, match="train mode"):
        graph = trace(Noisy(), [torch.randn(1, 4)])
    assert train_only(graph) == {"tanh"}


def test_train_mode_false_never_trains() -> None:
    module = Detector()
    trace(module, [torch.randn(3, 4), call(module, torch.randn(3, 4), torch.zeros(3, 2), training=True)], False)
    assert module.seen == [False, False]


def test_a_call_that_does_not_run_in_its_own_mode_is_an_error() -> None:
    module = Detector()
    with pytest.raises(TracingError, match="in train mode failed: ValueError: targets should be passed"):
        trace(module, [call(module, torch.randn(3, 4), training=training) for training in (False, True)])
