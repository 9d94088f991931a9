"""Callbacks that copy weights or the module in their `setup`, in front of QuantizationAwareTraining or behind it.

A command line appends ours (`callbacks+`), so that the user's stand in front. Siblings: WeightAveraging,
EMAWeightAveraging and StochasticWeightAveraging, with scales that are parameters and with ones that are not;
ModelPruning, which resets weights to those of its `setup`; callbacks of other packages that copy weights; layers that
are built late.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from lightning_qat import Calibration, QuantizationAwareTraining, parameter_groups
from lightning_qat.callbacks.insertion.quantized_checkpoint import load_quantized
from tests.harness.classifier import Classifier
from tests.harness.state import assert_same, only_region, state_of
from tests.harness.trainers import float_checkpoint, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
]
IMAGES = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))


class Plain(Classifier):
    """Without batch norm, whose statistics StochasticWeightAveraging takes anew in an epoch of its own."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__(lr)
        self.net.bn1 = nn.Identity()  # type: ignore[assignment]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(parameter_groups(self, self.lr), lr=self.lr)


def run(path: Path, module: LightningModule, other: Callback, first: bool, **qat: Any) -> Trainer:
    """A short QAT run with another callback in front or behind."""
    ours = [QuantizationAwareTraining(**qat), Calibration(batches=4)]
    result = trainer(path, *([other, *ours] if first else [*ours, other]), max_epochs=3)
    result.fit(module)
    return result


AVERAGES: dict[str, Callable[[], Callback]] = {
    "mean": WeightAveraging,
    "exponential": lambda: EMAWeightAveraging(decay=0.5),
    "stochastic": lambda: StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1),
}


@pytest.mark.parametrize("scales", ["fixed", "learned"])
@pytest.mark.parametrize("average", AVERAGES)
def test_averages_are_the_same_in_front_and_behind(tmp_path: Path, average: str, scales: str) -> None:
    """The copy that is averaged has the fake-quants, and with learned scales as many parameters as the module."""
    states: list[dict[str, Tensor]] = []
    for first in (True, False):
        torch.manual_seed(0)
        module, callback = Plain(), AVERAGES[average]()
        run(tmp_path, module, callback, first, activation_scales=scales)
        copied = callback._average_model  # type: ignore[attr-defined]
        assert len(list(copied.parameters())) == len(list(module.parameters()))
        states.append(state_of(module))
    assert_same(*states)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
def test_a_run_with_an_average_in_front_resumes_and_loads(tmp_path: Path) -> None:
    module = Plain()
    run(tmp_path, module, EMAWeightAveraging(decay=0.5), True).save_checkpoint(tmp_path / "q.ckpt")
    assert torch.equal(load_quantized(Plain, tmp_path / "q.ckpt")(IMAGES), module.eval()(IMAGES))
    again = Plain()
    callbacks = [EMAWeightAveraging(decay=0.5), QuantizationAwareTraining(), Calibration(batches=4)]
    trainer(tmp_path, *callbacks, max_epochs=4).fit(again, ckpt_path=str(tmp_path / "q.ckpt"))
    assert only_region(again).is_calibrated


@pytest.mark.parametrize("first", [True, False])
def test_layers_that_are_built_in_setup_are_averaged_too(tmp_path: Path, first: bool) -> None:
    class Late(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.made, self.net = self.net, None  # type: ignore[assignment]
            del self._modules["made"]

        def setup(self, stage: str) -> None:
            self.net = Plain().net if self.net is None else self.net

    module, callback = Late(), EMAWeightAveraging(decay=0.5)
    run(tmp_path, module, callback, first)
    assert only_region(callback._average_model).is_calibrated  # type: ignore[arg-type]


class Snapshot(Callback):
    """Of another package: keeps the weights that it finds in `setup`."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_pruning_resets_to_the_weights_of_init_from(tmp_path: Path, first: bool) -> None:
    """Its lottery ticket is what it has found in its `setup`: of random weights it would make a random model."""
    source, module = Plain(), Plain()
    checkpoint = float_checkpoint(tmp_path, source)
    kept: list[Tensor] = []

    class Pruning(ModelPruning):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            (layer,) = self._original_layers.values()  # type: ignore[union-attr]
            kept.append(layer["data"].weight.detach().clone())  # type: ignore[union-attr]

    pruning = Pruning("l1_unstructured", [(module.net.conv2, "weight")], amount=0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not seen while tracing")
        run(tmp_path, module, pruning, first, init_from=str(checkpoint))
    weight, float_weight = module.net.conv2.weight.detach(), source.net.conv2.weight.detach()
    assert torch.equal(kept[0], float_weight)
    assert 0.4 < float((weight == 0).float().mean()) < 0.99
    assert torch.allclose(weight[weight != 0], float_weight[weight != 0], atol=0.02)


def test_callbacks_of_other_packages_that_stand_behind_find_the_weights_of_init_from(tmp_path: Path) -> None:
    source = Plain()
    checkpoint = float_checkpoint(tmp_path, source)
    snapshot = Snapshot()
    run(tmp_path, Plain(), snapshot, False, init_from=str(checkpoint))
    assert_same(snapshot.weights, {name: p.detach() for name, p in source.named_parameters()})


def test_a_second_fit_does_not_load_the_weights_again(tmp_path: Path) -> None:
    checkpoint = float_checkpoint(tmp_path, Plain())
    module, snapshot = Plain(lr=0.1), Snapshot()
    result = run(tmp_path, module, snapshot, False, init_from=str(checkpoint))
    trained = {name: p.detach().clone() for name, p in module.named_parameters()}
    result.fit_loop.max_epochs = 4
    result.fit(module)
    assert_same(snapshot.weights, trained)
