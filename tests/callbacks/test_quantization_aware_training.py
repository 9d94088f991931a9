"""QuantizationAwareTraining: what is inserted when, and how states and scales move during a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import find_regions
from tests.harness.classifier import Classifier, Net, SelfClassifier
from tests.harness.state import assert_same, file_hash, only_region, scales, state_of
from tests.harness.trainers import float_checkpoint, qat_trainer, trainer


class States(Callback):
    """Notes the state of the region at some hooks."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, str]] = []

    def _note(self, hook: str, trainer: Trainer, module: LightningModule) -> None:
        self.seen.append((hook, trainer.current_epoch, only_region(module).current_state))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._note("train", trainer, pl_module)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._note("validation", trainer, pl_module)

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._note("test", trainer, pl_module)


def test_training_quantizes_in_every_stage(tmp_path: Path) -> None:
    states = States()
    run = qat_trainer(tmp_path, states)
    module = Classifier()
    run.fit(module)
    run.test(module, verbose=False)
    assert {hook for hook, _, _ in states.seen} == {"train", "validation", "test"}
    assert {state for _, _, state in states.seen} == {"quantize"}


def test_a_fit_that_trains_nothing_writes_no_plan(tmp_path: Path) -> None:
    """Nothing was made that it could describe, and one that is there may be that of a training."""
    qat_trainer(tmp_path, max_steps=0).fit(Classifier())
    assert not (tmp_path / "lightning_qat").exists()
    qat_trainer(tmp_path).fit(Classifier())
    assert (tmp_path / "lightning_qat" / "quant_plan.json").exists()


def test_steps_that_call_a_submodule_make_it_the_target(tmp_path: Path) -> None:
    """`target: auto` (design.md section 2)."""
    module = Classifier()
    qat_trainer(tmp_path, fast_dev_run=True).fit(module)
    assert list(find_regions(module)) == ["net"]


def test_steps_that_call_the_module_make_it_the_target(tmp_path: Path) -> None:
    """`target: auto` (design.md section 2)."""
    module = SelfClassifier()
    qat_trainer(tmp_path, fast_dev_run=True).fit(module)
    assert list(find_regions(module)) == [""]


def test_float_state_dict_keys_stay(tmp_path: Path) -> None:
    module = Classifier()
    before = list(module.state_dict())
    qat_trainer(tmp_path, fast_dev_run=True).fit(module)
    assert [key for key in module.state_dict() if "_quantization" not in key] == before


def test_training_moves_weights_and_follows_them_with_weight_scales(tmp_path: Path) -> None:
    """The validation behind the last step sees the present weights, and so do the scales."""
    module = Classifier()
    before = module.net.conv2.weight.detach().clone()
    qat_trainer(tmp_path, max_epochs=2).fit(module)
    region = only_region(module)
    weight = region.target.conv2.weight.detach()
    assert not torch.equal(weight, before)
    assert torch.equal(region.points["conv2.weight"].scale, weight.abs().amax(dim=(1, 2, 3)) / 127)


class ScaleLog(Callback):
    def __init__(self) -> None:
        self.scales: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.scales.append(scales(pl_module))


def moved(log: ScaleLog, kind: str, first: int = 0, last: int = -1) -> bool:
    names = [name for name in log.scales[0] if name.endswith("weight") == (kind == "weight")]
    return any(not torch.equal(log.scales[first][name], log.scales[last][name]) for name in names)


def test_fixed_activation_scales_stay_as_calibrated(tmp_path: Path) -> None:
    log = ScaleLog()
    qat_trainer(tmp_path, log, max_epochs=2).fit(Classifier())
    assert not moved(log, "activation")
    assert moved(log, "weight")


def test_ema_activation_scales_follow_the_data(tmp_path: Path) -> None:
    log = ScaleLog()
    qat_trainer(tmp_path, log, max_epochs=2, qat={"activation_scales": "ema"}).fit(Classifier())
    assert moved(log, "activation")


def test_no_scale_moves_from_freeze_observers_after(tmp_path: Path) -> None:
    """freeze_observers_after counts epochs from 0."""
    log = ScaleLog()
    options = {"activation_scales": "ema", "freeze_observers_after": 1}
    qat_trainer(tmp_path, log, max_epochs=3, qat=options).fit(Classifier())
    assert moved(log, "activation", 0, 3)
    assert moved(log, "weight", 0, 3)
    assert_same(log.scales[4], log.scales[-1])  # epochs 1 and 2, after the validation of epoch 0
    activations = [{n: s for n, s in log.scales[i].items() if not n.endswith("weight")} for i in (3, -1)]
    assert_same(*activations)


class BatchNormLog(Callback):
    def __init__(self) -> None:
        self.means: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.means.append(pl_module.net.bn1.running_mean.clone())


class TurnsEverythingOn(Classifier):
    def on_validation_model_train(self) -> None:
        self.train()


@pytest.mark.parametrize("module_class", [Classifier, TurnsEverythingOn])
def test_batch_norm_statistics_stay_from_freeze_batch_norm_after(
    tmp_path: Path, module_class: type[Classifier]
) -> None:
    """Also where the module itself turns train mode on again after a validation in the middle of an epoch."""
    log = BatchNormLog()
    options = {"freeze_batch_norm_after": 1}
    qat_trainer(tmp_path, log, max_epochs=3, qat=options, val_check_interval=2).fit(module_class())
    assert not torch.equal(log.means[0], log.means[3])
    assert all(torch.equal(log.means[3], mean) for mean in log.means[4:])


def test_start_epoch_trains_in_float_until_then(tmp_path: Path) -> None:
    """Bit for bit the float run; its scales are those of the weights it starts to quantize."""
    torch.manual_seed(1)
    float_module = Classifier()
    initial = state_of(float_module)
    torch.manual_seed(2)
    trainer(tmp_path, max_epochs=2).fit(float_module)

    module = Classifier()
    module.load_state_dict(initial)
    states, calibration = States(), Calibration(batches=4)
    at_start: dict[str, Tensor] = {}

    class AtStart(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 2:
                at_start.update({k: v for k, v in state_of(pl_module).items() if "_quantization" not in k})
                at_start["scale"] = only_region(pl_module).points["conv2.weight"].scale.clone()

    torch.manual_seed(2)
    qat = QuantizationAwareTraining(start_epoch=2)
    trainer(tmp_path, qat, calibration, AtStart(), states, max_epochs=3).fit(module)
    assert_same({k: v for k, v in at_start.items() if k != "scale"}, state_of(float_module))
    weight = float_module.net.conv2.weight.detach()
    assert torch.allclose(at_start["scale"], weight.abs().amax(dim=(1, 2, 3)) / 127)
    assert {(epoch, state) for hook, epoch, state in states.seen if hook == "train"} == {
        (0, "off"),
        (1, "off"),
        (2, "quantize"),
    }
    assert calibration.result is not None


@pytest.mark.parametrize("first", ["qat", "calibration"])
def test_the_order_of_quantization_and_calibration_does_not_matter(tmp_path: Path, first: str) -> None:
    callbacks = [QuantizationAwareTraining(), Calibration(batches=4)]
    module = Classifier()
    trainer(tmp_path, *(callbacks if first == "qat" else callbacks[::-1])).fit(module)
    assert only_region(module).is_calibrated


def test_a_subclass_can_change_the_schedule(tmp_path: Path) -> None:
    class Late(QuantizationAwareTraining):
        def should_quantize(self, trainer: Trainer) -> bool:
            return trainer.state.fn != "fit" or trainer.global_step >= 6

    states = States()
    calibration = Calibration(batches=4)
    trainer(tmp_path, Late(), calibration, states, max_epochs=3, limit_val_batches=0).fit(Classifier())
    assert [state for _, _, state in states.seen] == ["off"] * 6 + ["quantize"] * 6
    assert calibration.result is not None


def test_init_from_starts_with_the_float_weights_and_leaves_the_file_alone(tmp_path: Path) -> None:
    checkpoint = float_checkpoint(tmp_path)
    before = file_hash(checkpoint)
    seen: dict[str, Tensor] = {}

    class Weights(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.update({k: v for k, v in state_of(pl_module).items() if "_quantization" not in k})
            assert trainer.global_step == trainer.current_epoch == 0

    qat_trainer(tmp_path, Weights(), qat={"init_from": str(checkpoint)}).fit(Classifier())
    assert_same(seen, torch.load(checkpoint, weights_only=True)["state_dict"])
    assert file_hash(checkpoint) == before


def test_init_from_takes_a_bare_state_dict(tmp_path: Path) -> None:
    module = Classifier()
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    quantized = Classifier()
    qat_trainer(tmp_path, qat={"init_from": str(tmp_path / "weights.pt")}).validate(quantized, verbose=False)
    assert_same({k: v for k, v in state_of(quantized).items() if "_quantization" not in k}, state_of(module))


def test_init_from_is_loaded_once(tmp_path: Path) -> None:
    """A second fit with the same callback goes on from the weights of the first, even if nothing was calibrated yet."""
    checkpoint = float_checkpoint(tmp_path)
    qat = QuantizationAwareTraining(init_from=str(checkpoint), start_epoch=5)
    module = Classifier()
    trainer(tmp_path, qat, Calibration(batches=2)).fit(module)
    trained = module.net.conv1.weight.detach().clone()
    seen: list[Tensor] = []

    class Weights(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(pl_module.net.conv1.weight.detach().clone())

    trainer(tmp_path, qat, Calibration(batches=2), Weights()).fit(module)
    assert torch.equal(seen[0], trained)


def test_init_from_of_a_module_that_is_quantized_already_is_not_used_and_says_so(tmp_path: Path) -> None:
    checkpoint = float_checkpoint(tmp_path)
    module = Classifier()
    qat_trainer(tmp_path).fit(module)
    with pytest.warns(
        UserWarning, match="init_from is not used: to start from the float checkpoint, create the module"
    ):
        qat_trainer(tmp_path, qat={"init_from": str(checkpoint)}).fit(module)


def test_a_module_quantized_without_a_trainer_is_taken_as_it_is(tmp_path: Path) -> None:
    module = Classifier()
    region = insert(module.net, (torch.randn(2, 1, 6, 6),))
    qat_trainer(tmp_path).fit(module)
    assert only_region(module).plan == region.plan
    assert only_region(module).is_calibrated


class TwoNets(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def loss(self, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.other(self.net(images)), labels)


def test_several_targets_share_one_configuration(tmp_path: Path) -> None:
    """An override has to match in one of them only."""
    module = TwoNets()
    overrides = [{"op_type": "gelu", "activation": {"dtype": "int16"}}, {"match": "conv1", "weight": {"dtype": "int4"}}]
    qat_trainer(tmp_path, qat={"target": ["net", "other"], "overrides": overrides}).fit(module)
    regions = find_regions(module)
    assert list(regions) == ["net", "other"]
    assert regions["other"].plan.by_name["1.output"].dtype == "int16"
    assert regions["net"].plan.by_name["conv1.weight"].dtype == "int4"


def test_an_override_that_matches_in_no_target_is_an_error(tmp_path: Path) -> None:
    run = qat_trainer(
        tmp_path, qat={"target": ["net", "other"], "overrides": [{"match": "conv9", "weight": {"dtype": "int4"}}]}
    )
    with pytest.raises(MisconfigurationException, match=r"match 'conv9'.*matches no quantization point.*conv1"):
        run.fit(TwoNets())


def test_a_run_after_a_failed_one_starts_afresh(tmp_path: Path) -> None:
    """The hooks of a run that raised are gone, and what it inserted does not win over a corrected configuration."""
    module = Classifier()
    with pytest.raises(MisconfigurationException, match="have no scales"):
        trainer(tmp_path, QuantizationAwareTraining()).fit(module)
    assert not {"configure_model", "on_load_checkpoint"} & set(module.__dict__)
    qat_trainer(tmp_path, qat={"qconfig": {"activation": {"dtype": "int16"}}}).fit(module)
    assert {p.dtype for p in only_region(module).plan.points if not p.is_weight} == {"int16"}


def test_nothing_stays_patched_after_a_run(tmp_path: Path) -> None:
    module = Classifier()
    before = set(module.__dict__)
    qat_trainer(tmp_path).fit(module)
    assert set(module.__dict__) - before <= {"_trainer"}


def test_ordinary_use_after_training_works(tmp_path: Path) -> None:
    """#10968: the result takes float input, in training too."""
    module = Classifier()
    qat_trainer(tmp_path).fit(module)
    module.train()
    module.net(torch.randn(2, 1, 6, 6)).sum().backward()
    assert module.net.conv1.weight.grad is not None
    module.eval()
    off, on = only_region(module), module.net(torch.ones(2, 1, 6, 6))
    with off.state("off"):
        assert not torch.equal(module.net(torch.ones(2, 1, 6, 6)), on)
    assert isinstance(module.net, Net)
