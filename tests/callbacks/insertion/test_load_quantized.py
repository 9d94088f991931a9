"""load_quantized: a quantized module from a checkpoint, without a Trainer (#6457)."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_qat.callbacks.insertion.quantized_checkpoint import load_quantized
from lightning_qat.quantization.errors import PlanMismatchError
from lightning_qat.quantization.region import stored_state
from tests.callbacks.test_resume import Changed
from tests.harness.classifier import Classifier, SelfClassifier
from tests.harness.state import assert_same, file_hash, only_region, state_of
from tests.harness.trainers import float_checkpoint, qat_trainer, quantized_checkpoint, trainer

IMAGES = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("module_class", [Classifier, SelfClassifier])
def test_outputs_are_those_of_the_trained_module(tmp_path: Path, module_class: type[Classifier]) -> None:
    """#6457: `load_from_checkpoint` knows no callbacks and fails on the new keys."""
    module = module_class()
    checkpoint = quantized_checkpoint(tmp_path, module)
    loaded = load_quantized(module_class, checkpoint)
    assert torch.equal(loaded(IMAGES), module.eval()(IMAGES))
    assert_same(state_of(loaded), state_of(module))


def test_it_is_in_eval_mode_and_quantizes(tmp_path: Path) -> None:
    loaded = load_quantized(Classifier, quantized_checkpoint(tmp_path))
    assert not any(module.training for module in loaded.modules())
    assert only_region(loaded).current_state == "quantize"


def test_it_can_be_trained_copied_and_pickled(tmp_path: Path) -> None:
    loaded = load_quantized(Classifier, quantized_checkpoint(tmp_path))
    expected = loaded(IMAGES)
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(twin(IMAGES), expected)
    loaded.train()
    loaded(IMAGES).sum().backward()
    assert loaded.net.conv1.weight.grad is not None


def test_it_can_go_on_training(tmp_path: Path) -> None:
    loaded = load_quantized(Classifier, quantized_checkpoint(tmp_path)).train()
    before = state_of(loaded)
    qat_trainer(tmp_path).fit(loaded)
    assert not torch.equal(before["net.conv1.weight"], loaded.net.conv1.weight)
    assert torch.equal(
        before["net._quantization.fake_quants.conv1/input0.scale"], only_region(loaded).points["conv1.input0"].scale
    )


def test_constructor_arguments_come_from_the_checkpoint_or_the_call(tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tmp_path, Classifier(lr=0.25))
    assert load_quantized(Classifier, checkpoint).lr == 0.25
    assert load_quantized(Classifier, checkpoint, lr=0.5).lr == 0.5


class Renames(Classifier):
    """Reads checkpoints of an older release, whose keys were others."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        for key in [key for key in state if key.startswith("net.head_old")]:
            state[key.replace("head_old", "head")] = state.pop(key)


def test_the_module_s_own_on_load_checkpoint_is_heard(tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tmp_path)
    content = torch.load(checkpoint)
    state = content["state_dict"]
    for key in [key for key in state if key.startswith("net.head.")]:
        state[key.replace("head", "head_old")] = state.pop(key)
    torch.save(content, tmp_path / "old.ckpt")
    loaded = load_quantized(Renames, tmp_path / "old.ckpt")
    assert torch.equal(loaded(IMAGES), load_quantized(Classifier, checkpoint)(IMAGES))


class Lazy(Classifier):
    """Builds its layers in configure_model."""

    def __init__(self) -> None:
        super().__init__()
        del self.net
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Classifier().net


def test_layers_built_in_configure_model(tmp_path: Path) -> None:
    module = Lazy()
    checkpoint = quantized_checkpoint(tmp_path, module)
    assert torch.equal(load_quantized(Lazy, checkpoint)(IMAGES), module.eval()(IMAGES))


def test_a_float_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"float checkpoint. Use Classifier.load_from_checkpoint"):
        load_quantized(Classifier, float_checkpoint(tmp_path))


def test_a_checkpoint_from_before_calibration_is_refused(tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tmp_path, qat={"start_epoch": 5})
    with pytest.raises(MisconfigurationException, match=r"saved before calibration.*Use a later checkpoint"):
        load_quantized(Classifier, checkpoint)


class Criterion(nn.Module):
    pass


class WithObject(Classifier):
    def __init__(self, criterion: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.filterwarnings("ignore:Attribute 'criterion' is an instance of `nn.Module`")
def test_hyperparameters_of_other_classes_need_trust(tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tmp_path, WithObject(Criterion()))
    with pytest.raises(MisconfigurationException, match=r"load_quantized\(WithObject, path, weights_only=False\)"):
        load_quantized(WithObject, checkpoint)
    assert isinstance(load_quantized(WithObject, checkpoint, weights_only=False), WithObject)


def test_code_that_changed_is_refused_when_it_runs(tmp_path: Path) -> None:
    loaded = load_quantized(Changed, quantized_checkpoint(tmp_path))
    with pytest.raises(PlanMismatchError, match="the code differs from the one the checkpoint was made with"):
        loaded(IMAGES)


def test_a_target_that_is_gone_is_refused(tmp_path: Path) -> None:
    class Renamed(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.model = self.net
            del self.net

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state = checkpoint["state_dict"]
            for key in list(state):
                state[key.replace("net.", "model.", 1)] = state.pop(key)

    with pytest.raises(MisconfigurationException, match=r"fake-quants on 'net', which Renamed does not have"):
        load_quantized(Renamed, quantized_checkpoint(tmp_path))


def test_the_file_is_not_changed(tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tmp_path)
    before = file_hash(checkpoint)
    load_quantized(Classifier, checkpoint)
    assert file_hash(checkpoint) == before


LOADS: dict[str, Any] = {
    "load_from_checkpoint": lambda path: Classifier.load_from_checkpoint(path),
    "test": lambda path: trainer(path.parent).test(Classifier(), ckpt_path=str(path)),
    "fit": lambda path: trainer(path.parent).fit(Classifier(), ckpt_path=str(path)),
    "load_state_dict": lambda path: Classifier().load_state_dict(torch.load(path, weights_only=True)["state_dict"]),
}


@pytest.mark.parametrize("module_class", [Classifier, SelfClassifier])
@pytest.mark.parametrize("way", LOADS)
def test_loading_without_fake_quants_names_load_quantized(
    tmp_path: Path, way: str, module_class: type[Classifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch lists the keys that it does not know, and the first of them says what to write: in a program too that does
    not import this package."""
    checkpoint = quantized_checkpoint(tmp_path, module_class())
    monkeypatch.setitem(globals(), "Classifier", module_class)
    with pytest.raises(RuntimeError) as caught:
        LOADS[way](checkpoint)
    unexpected = str(caught.value).partition("Unexpected key(s)")[2]
    assert "lightning_qat.load_quantized(YourModule, path)" in unexpected[:200]


def test_the_note_is_for_strangers_only(tmp_path: Path) -> None:
    """It is no tensor of the model, an average of two states keeps it, and states that do not have it load."""
    module = load_quantized(Classifier, quantized_checkpoint(tmp_path))
    state = module.state_dict()
    notes = [key for key in state if "load_quantized" in key]
    assert len(notes) == 1
    assert state[notes[0]].numel() == 0
    assert not module.load_state_dict(state).unexpected_keys
    assert notes[0] in state  # what was given is left alone
    del state[notes[0]]
    module.load_state_dict(state)


def test_the_stored_state_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading and checking is most of the work of loading a large model; another state is read again."""
    checkpoint = quantized_checkpoint(tmp_path)
    read: list[object] = []
    original = stored_state.read_extra_state

    def counted(state: Any) -> Any:
        read.append(state)
        return original(state)

    monkeypatch.setattr(stored_state, "read_extra_state", counted)
    loaded = load_quantized(Classifier, checkpoint)
    assert len(read) == 1
    only_region(loaded).load_state_dict(only_region(loaded).state_dict())
    assert len(read) == 2
