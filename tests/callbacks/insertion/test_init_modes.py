"""Insertion does not run in the modes in which Lightning builds layers: they see, and slow down, every torch function.

The kind is cost of insertion that the library alone does not have: function modes, further runs of the steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.init import _EmptyInit
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

import lightning_qat
from lightning_qat.callbacks.insertion.init_modes import without_init_modes
from tests.harness.classifier import Classifier, loader
from tests.harness.trainers import qat_trainer

CPU = torch.device("cpu")


class Own(TorchFunctionMode):
    """A mode of the user."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_steps_are_run_and_traced_without_them(tmp_path: Path) -> None:
    """Each of two batches of validation and of training runs once to find the calls, and once to learn the ops."""
    seen: list[set[type]] = []

    class Watched(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.register_forward_pre_hook(lambda *_: self.note())
            self.is_inserting = False

        def note(self) -> None:
            if self.is_inserting:
                seen.append({type(mode) for mode in _get_current_function_mode_stack()})

        def setup(self, stage: str) -> None:
            self.is_inserting = True

        def on_fit_start(self) -> None:
            self.is_inserting = False

    module = Watched()
    insertion = lightning_qat.QuantizationAwareTraining(target="net", trace_batches=2)
    qat_trainer(tmp_path, quantization=insertion, max_epochs=1).fit(module, loader(), loader())
    assert len(seen) == 2 * (2 + 2 + 2)  # those that calibration will run, too
    assert not set().union(*seen) & {_EmptyInit, DeviceContext}


def test_modes_of_the_user_stay_and_all_come_back() -> None:
    with Own(), CPU, _EmptyInit():
        before = _get_current_function_mode_stack()
        assert {type(mode) for mode in before} == {Own, DeviceContext, _EmptyInit}
        with without_init_modes(CPU):
            assert [type(mode) for mode in _get_current_function_mode_stack()] == [Own]
        assert _get_current_function_mode_stack() == before
        with pytest.raises(KeyError), without_init_modes(CPU):
            raise KeyError
        assert _get_current_function_mode_stack() == before
    assert _get_current_function_mode_stack() == []


def test_a_default_device_of_the_user_stays() -> None:
    """Entered by ``with``, or set for the whole program, also if it is the device that Lightning enters."""
    for device in (CPU, torch.device("meta")):
        with device, CPU, _EmptyInit(), without_init_modes(CPU):
            assert torch.empty(1).device == device
        torch.set_default_device(device)
        try:
            with CPU, _EmptyInit(), without_init_modes(CPU):
                assert torch.empty(1).device == device
            assert torch.empty(1).device == device
        finally:
            torch.set_default_device(None)


def test_without_layers_being_built_nothing_changes() -> None:
    with Own(), CPU:
        before = _get_current_function_mode_stack()
        with without_init_modes(CPU):
            assert _get_current_function_mode_stack() == before
