"""Steps that need what the module's own `on_fit_start` or `on_train_start` sets.

Fake-quant is inserted before these hooks run, and callbacks' hooks run before the module's. Siblings: a step that fails
without them, a step that silently computes something else, hooks that want the optimizers, hooks that do not help,
without a sanity check, checks that run at the start of training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F

from lightning_qat import Calibration, ModelCheck, PipelineCheck, PipelineFingerprint, QuantizationAwareTraining
from lightning_qat.callbacks.trainer.after_hook import AfterHook
from tests.harness.classifier import Classifier
from tests.harness.state import only_region
from tests.harness.trainers import qat_trainer, trainer


class Prepared(Classifier):
    """Both steps use what a hook prepares, and the hook wants the optimizer."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.hook, self.runs = hook, 0

    def prepare(self, name: str) -> None:
        if name == self.hook:
            self.runs += 1
            self.rate = float(self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
            self.weights = torch.ones(4)

    def on_fit_start(self) -> None:
        self.prepare("on_fit_start")

    def on_train_start(self) -> None:
        self.prepare("on_train_start")

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], weight=self.weights)


@pytest.mark.filterwarnings("ignore:PipelineCheck. cannot tell. the float model is no better")
@pytest.mark.parametrize("checks", [False, True])
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
def test_steps_that_fail_without_a_hook_are_traced_and_calibrated_with_it(
    tmp_path: Path, hook: str, checks: bool
) -> None:
    """Without a sanity check, which would fail without us too where `on_train_start` prepares it."""
    callbacks = [ModelCheck(), PipelineCheck(batches=2), PipelineFingerprint()] if checks else []
    module = Prepared(hook)
    qat_trainer(tmp_path, *callbacks, num_sanity_val_steps=0).fit(module)
    assert only_region(module).is_calibrated
    assert not only_region(module).unplanned
    assert module.runs == 1  # the others were undone
    if checks:
        assert "failed" not in callbacks[1].result.note


class Normalized(Classifier):
    """Without its hook the steps run, on other numbers."""

    shift = 0.0

    def on_fit_start(self) -> None:
        self.shift = 100.0

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0] + self.shift), batch[1])


@pytest.mark.parametrize("sanity", [0, 2])
def test_calibration_sees_what_on_fit_start_has_set(tmp_path: Path, sanity: int) -> None:
    module = Normalized()
    qat_trainer(tmp_path, num_sanity_val_steps=sanity).fit(module)
    assert float(only_region(module).points["conv1.input0"].scale) > 0.5  # 100 / 127, against 4 / 127
    assert "on_fit_start" not in vars(module)


class Hopeless(Classifier):
    def on_fit_start(self) -> None:
        self.ready = False

    def loss(self, batch: Any) -> Tensor:
        raise RuntimeError("not now")


def test_hooks_that_do_not_help_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"RuntimeError: not now \(it was run without its own on_fit_start"
    ):
        qat_trainer(tmp_path).fit(Hopeless())


class FailsAtStart(Classifier):
    fails = True

    def on_fit_start(self) -> None:
        if self.fails:
            raise RuntimeError("no connection")


def test_a_run_that_failed_in_its_hook_leaves_nothing_behind(tmp_path: Path) -> None:
    module = FailsAtStart()
    with pytest.raises(RuntimeError, match="no connection"):
        qat_trainer(tmp_path).fit(module)
    assert "on_fit_start" not in vars(module)
    module.fails = False
    qat_trainer(tmp_path).fit(module)
    assert only_region(module).is_calibrated


def test_hooks_are_not_run_ahead_of_time_where_the_steps_need_none(tmp_path: Path) -> None:
    calls: list[str] = []

    class Counting(Classifier):
        def on_fit_start(self) -> None:
            calls.append("fit")

        def on_train_start(self) -> None:
            calls.append("train")

    trainer(tmp_path, QuantizationAwareTraining(), Calibration(batches=2), ModelCheck()).fit(Counting())
    assert calls == ["fit", "train"]


def test_after_hook_puts_back_what_the_object_had() -> None:
    class Owner:
        def hook(self) -> str:
            return "class"

    ran: list[str] = []
    owner = Owner()
    after = AfterHook(owner, "hook", lambda: ran.append("then"))
    assert owner.hook() == "class"
    assert owner.hook() == "class"
    assert ran == ["then"]
    assert not vars(owner)
    after.cancel()
    owner.hook = lambda: "own"  # type: ignore[method-assign]
    own = owner.hook
    AfterHook(owner, "hook", lambda: ran.append("then")).cancel()
    assert owner.hook is own
    assert ran == ["then"]
