"""The issue's "Bad input": one clear MisconfigurationException before any training step, with what to write instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_qat.callbacks.accuracy_table import AccuracyTable
from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.insertion.float_checkpoint import load_float_weights
from lightning_qat.callbacks.insertion.quantized_checkpoint import load_quantized
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.callbacks.zero_lr_finetune import ZeroLRFinetune
from tests.harness.classifier import Classifier, loader
from tests.harness.state import file_hash
from tests.harness.trainers import float_checkpoint, qat_trainer, quantized_checkpoint, trainer


class NoTraining(Callback):
    """Fails if a training step runs."""

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a training step ran")


def refused(run: Trainer, message: str, module: LightningModule | None = None, **fit: Any) -> None:
    """Expect exactly this error from a fit, before any training step."""
    run.callbacks.append(NoTraining())
    with pytest.raises(MisconfigurationException, match=message):
        run.fit(module or Classifier(), **fit)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qconfig": {"activation": {"dtype": "int18"}}}, r"unknown dtype 'int18': did you mean .*'int16'.*Choices"),
        ({"qconfig": {"activation": {"observer": "msse"}}}, r"unknown observer 'msse': did you mean 'mse'.*minmax"),
        ({"qconfig": {"activations": {}}}, r"unknown key in qconfig: 'activations': did you mean 'activation'"),
        ({"qconfig": {"weight": {"axis": 0}}}, r"unknown key in qconfig.weight: 'axis'.*granularity"),
        ({"overrides": [{"mach": "head"}]}, r"unknown key in overrides\[0\]: 'mach': did you mean 'match'"),
        ({"overrides": [{"match": "head"}]}, r"changes nothing: add activation: \{dtype: int16\}"),
        ({"overrides": [{"activation": {"dtype": "int4"}}]}, r'needs a selector: match: "decoder.\*"'),
        ({"overrides": {"match": "head"}}, r"overrides is a list: write - \{match:"),
        ({"activation_scales": "moving"}, r"unknown activation_scales 'moving'.*Choices: fixed, ema"),
        ({"start_epoch": -1}, r"start_epoch=-1: epochs count from 0"),
        ({"freeze_observers_after": -1}, r"freeze_observers_after=-1: epochs count from 0"),
        ({"freeze_batch_norm_after": -2}, r"freeze_batch_norm_after=-2: epochs count from 0"),
        ({"trace_batches": 0}, r"trace_batches=0: must be at least 1"),
        ({"freeze": {"head": "three"}}, r"freeze=.*'three'.*write the epoch to freeze from"),
        ({"target": []}, r'target is empty: write the path of a submodule, several, or "auto"'),
    ],
)
def test_wrong_arguments_fail_when_the_callback_is_built(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        QuantizationAwareTraining(**arguments)


def test_an_override_that_matches_nothing_suggests_near_names(tmp_path: Path) -> None:
    overrides = [{"match": "conv3.weight", "weight": {"dtype": "int4"}}]
    message = r"override \(match 'conv3.weight'\) matches no quantization point. Near names: .*conv2.weight"
    refused(qat_trainer(tmp_path, qat={"overrides": overrides}), message)


def test_an_override_of_an_unknown_op_type_suggests_near_names(tmp_path: Path) -> None:
    overrides = [{"op_type": "con2d", "activation": {"dtype": "int4"}}]
    refused(qat_trainer(tmp_path, qat={"overrides": overrides}), r"op_type 'con2d'.*Near names: conv2d")


def test_a_target_that_does_not_exist_suggests_near_names(tmp_path: Path) -> None:
    refused(qat_trainer(tmp_path, qat={"target": "nett"}), r"Classifier has no submodule 'nett'. Near names: net")


class Unused(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


def test_a_target_that_is_not_called_names_those_that_are(tmp_path: Path) -> None:
    message = r"target: 'unused' is not called by the steps of Unused \(they call 'net'.*Write one of these, or auto"
    refused(qat_trainer(tmp_path, qat={"target": "unused"}), message, Unused())


def test_targets_inside_of_each_other(tmp_path: Path) -> None:
    message = r"target: 'net.conv1' lies inside 'net'. Name disjoint submodules"
    refused(qat_trainer(tmp_path, qat={"target": ["net", "net.conv1"]}), message)


def test_a_float_checkpoint_as_ckpt_path_points_to_init_from(tmp_path: Path) -> None:
    checkpoint = float_checkpoint(tmp_path)
    before = file_hash(checkpoint)
    message = r'ckpt_path is a float checkpoint.*write QuantizationAwareTraining\(init_from="<that path>"\)'
    refused(qat_trainer(tmp_path, max_epochs=2), message, ckpt_path=str(checkpoint))
    assert file_hash(checkpoint) == before


def test_a_quantized_checkpoint_as_init_from_points_to_ckpt_path(tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tmp_path)
    message = r"is a quantized checkpoint. To resume it, pass it as ckpt_path to the Trainer"
    refused(qat_trainer(tmp_path, qat={"init_from": str(checkpoint)}), message)


def test_init_from_that_does_not_exist(tmp_path: Path) -> None:
    refused(qat_trainer(tmp_path, qat={"init_from": "no.ckpt"}), r"init_from: there is no file 'no.ckpt'")


def test_init_from_that_does_not_fit_names_the_keys(tmp_path: Path) -> None:
    torch.save(Unused().state_dict(), tmp_path / "other.pt")
    message = (
        r"init_from: '.*other.pt' does not fit Classifier: 2 are unknown to the module \(unused.weight, unused.bias\). "
        r"Is it the checkpoint of another model"
    )
    refused(qat_trainer(tmp_path, qat={"init_from": str(tmp_path / "other.pt")}), message)


def test_init_from_of_another_model_is_a_short_message(tmp_path: Path) -> None:
    """Counts and a few names, however many keys differ."""
    other = {f"backbone.{i}.weight": torch.zeros(1) for i in range(500)}
    own = Classifier().state_dict()
    torch.save({**other, "net.conv1.weight": torch.zeros(2, 3)}, tmp_path / "other.pt")
    with pytest.raises(MisconfigurationException) as caught:
        qat_trainer(tmp_path, qat={"init_from": str(tmp_path / "other.pt")}).fit(Classifier())
    message = str(caught.value).partition("does not fit")[2]
    assert f"{len(own) - 1} weights are missing in the file ({', '.join(list(own)[1:4])}, ...)" in message
    assert "500 are unknown to the module (backbone.0.weight, backbone.1.weight, backbone.2.weight, ...)" in message
    shape = list(own["net.conv1.weight"].shape)
    assert f"1 has another shape (net.conv1.weight: [2, 3] in the file, {shape} in the module)" in message
    assert len(message) < 700


@pytest.mark.parametrize("kind", ["part", "part in a checkpoint", "compiled"])
def test_init_from_with_other_prefixes_says_how_to_rename(tmp_path: Path, kind: str) -> None:
    """What the error says to write makes a file that fits."""
    path, own = tmp_path / "net.pt", Classifier().state_dict()
    part = {name.removeprefix("net."): value for name, value in own.items()}
    compiled = {f"_orig_mod.{name}": value for name, value in own.items()}
    torch.save({"part": part, "part in a checkpoint": {"state_dict": part}, "compiled": compiled}[kind], path)
    with pytest.raises(MisconfigurationException, match="Only the names differ") as caught:
        qat_trainer(tmp_path, qat={"init_from": str(path)}).fit(Classifier())
    code = str(caught.value)
    code = code[code.index("torch.save(") : code.rindex(")") + 1].replace("float_weights.pt", str(tmp_path / "new.pt"))
    exec(code, {"torch": torch, "path": path})
    module = Classifier()
    load_float_weights(module, tmp_path / "new.pt")
    assert all(torch.equal(value, own[name]) for name, value in module.state_dict().items())


def test_init_from_without_weights_by_name(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    refused(qat_trainer(tmp_path, qat={"init_from": str(tmp_path / "list.pt")}), "list.pt' holds no weights by name")


def test_init_from_with_pickled_objects_says_how_to_convert_it(tmp_path: Path) -> None:
    torch.save({"state_dict": Classifier().state_dict(), "object": Path()}, tmp_path / "objects.ckpt")
    message = r"cannot be read as weights only.*torch.save\(torch.load\(path, weights_only=False\)\[\"state_dict\"\]"
    refused(qat_trainer(tmp_path, qat={"init_from": str(tmp_path / "objects.ckpt")}), message)


def test_init_from_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "text.ckpt").write_text("weights")
    message = (
        r"text.ckpt is not a float checkpoint: its 7 bytes are damaged or of another kind of file \(.*Error\); write"
    )
    refused(qat_trainer(tmp_path, qat={"init_from": str(tmp_path / "text.ckpt")}), message)
    (tmp_path / "empty.ckpt").touch()
    message = "empty.ckpt is not a float checkpoint: it is empty; write the path of one that is whole"
    refused(qat_trainer(tmp_path, qat={"init_from": str(tmp_path / "empty.ckpt")}), message)


def test_accuracy_table_before_weight_averaging(tmp_path: Path) -> None:
    """D7: at the end of training, WeightAveraging puts the average in the place of the weights: measure behind it."""
    run = trainer(tmp_path, QuantizationAwareTraining(), Calibration(), AccuracyTable(), EMAWeightAveraging())
    refused(run, r"AccuracyTable is listed before EMAWeightAveraging.*List it after")


def test_values_of_another_type() -> None:
    with pytest.raises(MisconfigurationException, match=r"Calibration\(batches='all'\): write a number"):
        Calibration(batches="all")  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=r"reference=0.98.*path of a fingerprint, or .'val_acc': 0.98"):
        ZeroLRFinetune(reference=0.98)  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=r"got 'Classifier.*give it the class itself"):
        load_quantized(Classifier(), "last.ckpt")  # type: ignore[type-var]
    with pytest.raises(MisconfigurationException, match=r"there is no file 'no.ckpt'"):
        load_quantized(Classifier, "no.ckpt")


def test_two_quantizations(tmp_path: Path) -> None:
    message = r"several QuantizationAwareTraining callbacks: use one, with target: \[a, b\] and overrides"
    refused(trainer(tmp_path, QuantizationAwareTraining(), QuantizationAwareTraining(target="net")), message)


def test_calibration_without_quantization(tmp_path: Path) -> None:
    refused(trainer(tmp_path, Calibration()), r"Calibration needs .*add QuantizationAwareTraining\(\)")


@pytest.mark.parametrize("start_epoch", [0, 3])
def test_quantization_without_scales(tmp_path: Path, start_epoch: int) -> None:
    """With a late start too, rather than after hours."""
    message = r"the fake-quants of net have no scales: add Calibration\(batches=32\).*or pass the checkpoint"
    refused(trainer(tmp_path, QuantizationAwareTraining(start_epoch=start_epoch)), message)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_without_scales(tmp_path: Path, stage: str) -> None:
    run = trainer(tmp_path, QuantizationAwareTraining())
    with pytest.raises(MisconfigurationException, match=r"have no scales: add Calibration\(batches=32\)"):
        getattr(run, stage)(Classifier())


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_shard(tmp_path: Path, strategy: type, monkeypatch: pytest.MonkeyPatch) -> None:
    run = qat_trainer(tmp_path)
    module = Classifier()
    sharding = strategy.__new__(strategy)  # built without its own checks: they want several GPUs, or the package
    monkeypatch.setattr(run._accelerator_connector, "strategy", sharding)
    with pytest.raises(MisconfigurationException, match=rf'{strategy.__name__} yet.*Use Trainer\(strategy="ddp"\)'):
        run.callbacks[0].setup(run, module, "fit")


def test_sync_batchnorm(tmp_path: Path) -> None:
    """It replaces modules after insertion."""
    run = qat_trainer(tmp_path, strategy=DDPStrategy(process_group_backend="gloo"), sync_batchnorm=True)
    with pytest.raises(MisconfigurationException, match=r"sync_batchnorm=False.*freeze_batch_norm_after=0"):
        run.callbacks[0].setup(run, Classifier(), "fit")


class OnlyInTraining(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(4, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.auxiliary(self.net(batch[0])).mean()


@pytest.mark.filterwarnings("ignore:target 'auxiliary' is not called by the validate step")
@pytest.mark.filterwarnings("ignore:Calibration. ")
def test_a_target_that_calibration_does_not_reach(tmp_path: Path) -> None:
    message = r"calibration data never reached target 'auxiliary'.*leave it out of target \(if only training calls it"
    refused(qat_trainer(tmp_path, qat={"target": ["net", "auxiliary"]}), message, OnlyInTraining())


class Broken(Classifier):
    def loss(self, batch: Any) -> Any:
        raise RuntimeError("no such thing")


def test_batches_that_fit_no_step(tmp_path: Path) -> None:
    class Picky(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not self.trainer.training:
                raise RuntimeError("not training")
            return self.loss((batch["images"], batch["labels"]))

        def train_dataloader(self) -> Any:
            return [{"images": images, "labels": labels} for images, labels in loader()]

    message = r"training batches do not fit the validation step of Picky \(.*calibration_dataloader\(\) whose batches"
    refused(
        qat_trainer(tmp_path),
        message,
        Picky(),
        train_dataloaders=DataLoader(Picky().train_dataloader(), batch_size=None),
    )


def test_steps_that_fail_say_why_and_what_helps(tmp_path: Path) -> None:
    message = r"could not be traced: its validate step failed with RuntimeError: no such thing.*example_input_array"
    refused(qat_trainer(tmp_path), message, Broken())


@pytest.mark.parametrize("first", ["qat", "calibration"])
def test_the_tracing_error_is_the_one_that_is_raised(tmp_path: Path, first: str) -> None:
    """Not "add QuantizationAwareTraining", whatever the order."""
    callbacks = [QuantizationAwareTraining(), Calibration()][:: 1 if first == "qat" else -1]
    refused(trainer(tmp_path, *callbacks), "could not be traced", Broken())


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")
def test_loaders_without_data(tmp_path: Path) -> None:
    message = r"could not be traced: the data loaders gave no batch \(empty, or limit_\*_batches leaves nothing"
    empty = DataLoader(torch.utils.data.Subset(loader().dataset, []), batch_size=8)
    refused(qat_trainer(tmp_path, limit_val_batches=0), message, train_dataloaders=empty)


def test_a_module_that_calls_no_submodule(tmp_path: Path) -> None:
    class Bare(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (batch[0].mean() * self.weight).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    message = "its steps call no submodule that has parameters and takes tensors.*Set target"
    refused(qat_trainer(tmp_path), message, Bare(), train_dataloaders=loader())
