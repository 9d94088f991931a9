"""Where quantization callbacks broke before: issues of the old callback, and the lines of lightning-facts.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_qat.callbacks.insertion.quantized_checkpoint import load_quantized
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.quantization.region.region import find_regions
from tests.harness.classifier import Classifier, Net, SelfClassifier, dataset, loader
from tests.harness.state import assert_same, only_region, scales, state_of
from tests.harness.trainers import qat_trainer, quantized_checkpoint, trainer

IMAGES = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))


# -- issues of the old callback


def test_6457_a_quantized_checkpoint_loads_without_a_trainer(tmp_path: Path) -> None:
    module = Classifier()
    checkpoint = quantized_checkpoint(tmp_path, module)
    assert torch.equal(load_quantized(Classifier, checkpoint)(IMAGES), module.eval()(IMAGES))


def test_8485_training_resumes(tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tmp_path)
    module = Classifier()
    run = qat_trainer(tmp_path, max_epochs=2)
    run.fit(module, ckpt_path=str(checkpoint))
    assert run.current_epoch == 2


def test_12896_test_with_a_checkpoint_path_works_after_fit(tmp_path: Path) -> None:
    module = Classifier()
    run = qat_trainer(tmp_path, ModelCheckpoint(tmp_path))
    run.fit(module)
    weights = module.net.conv2.weight.detach().clone()
    (metrics,) = run.test(ckpt_path="best", verbose=False)
    assert metrics
    assert torch.equal(module.net.conv2.weight, weights)  # the only checkpoint is the last one


def test_7427_a_second_fit_works(tmp_path: Path) -> None:
    """With the same Trainer, and with another one; insertion is idempotent."""
    module = Classifier()
    run = qat_trainer(tmp_path)
    run.fit(module)
    region = only_region(module)
    run.fit_loop.max_epochs = 2
    run.fit(module)
    qat_trainer(tmp_path).fit(module)
    assert only_region(module) is region


def test_7926_and_15862_forward_with_several_or_keyword_arguments(tmp_path: Path) -> None:
    class Keywords(Classifier):
        def forward(self, images: Tensor, gain: float = 1.0, *, shift: Tensor | None = None) -> Tensor:  # type: ignore[override]
            logits: Tensor = self.net(images * gain)
            return logits if shift is None else logits + shift

        def loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self(batch[0], gain=2.0, shift=torch.ones(4)), batch[1])

    module = Keywords()
    qat_trainer(tmp_path).fit(module)
    assert list(find_regions(module)) == [""]
    assert module(IMAGES, 1.0, shift=torch.zeros(4)).shape == (4, 4)


def test_12890_fusion_is_aware_of_training(tmp_path: Path) -> None:
    """Conv and batch norm are one group for quantization, while batch norm goes on training with its own parameters."""
    module = Classifier()
    qat_trainer(tmp_path, max_epochs=2).fit(module)
    region = only_region(module)
    assert any(group.kinds[:2] == ("conv2d", "batch_norm") for group in region.plan.fusions)
    assert "conv1.output" not in region.points
    assert not torch.equal(module.net.bn1.running_mean, torch.zeros(4))
    assert not torch.equal(module.net.bn1.weight, torch.ones(4))


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_11047_together_with_pruning(tmp_path: Path) -> None:
    """Pruning replaces `weight` by a product that a hook computes: it stays quantized by the same fake-quant."""
    module = Classifier()
    pruning = ModelPruning("l1_unstructured", amount=0.5, parameter_names=["weight"])
    run = qat_trainer(tmp_path, pruning, max_epochs=2)
    run.fit(module)
    run.save_checkpoint(tmp_path / "pruned.ckpt")
    weight = module.net.conv2.weight.detach()
    assert (weight == 0).float().mean() > 0.3
    by_fit = module.eval()(IMAGES)
    with only_region(module).state("off"):
        assert not torch.equal(module(IMAGES), by_fit)
    assert torch.equal(load_quantized(Classifier, tmp_path / "pruned.ckpt")(IMAGES), by_fit)


def test_10968_the_result_takes_float_input(tmp_path: Path) -> None:
    module = Classifier()
    qat_trainer(tmp_path).fit(module)
    assert module.eval()(IMAGES).dtype == torch.float32


@pytest.mark.parametrize("activation_scales", ["fixed", "ema"])
def test_8507_and_8540_no_scale_moves_in_validation_and_sanity_check(tmp_path: Path, activation_scales: str) -> None:
    """With the data. The scale of a weight is taken once more, as the optimizer has stepped since."""
    before: list[dict[str, Tensor]] = []

    class Watch(Callback):
        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before.append(scales(pl_module))

        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            after = scales(pl_module)
            assert_same(
                *({n: s for n, s in found.items() if not n.endswith("weight")} for found in (after, before[-1]))
            )
            weights = {name: scale for name, scale in after.items() if name.endswith("weight")}
            assert_same(weights, {name: min_max(pl_module, name) for name in weights})

    def min_max(pl_module: LightningModule, name: str) -> Tensor:
        weight = pl_module.get_parameter(name.replace(":", ".").removeprefix("."))
        return (weight.detach().flatten(1).abs().amax(1).double() / 127).float()

    options = {"activation_scales": activation_scales}
    qat_trainer(tmp_path, Watch(), qat=options, max_epochs=2).fit(Classifier())
    assert len(before) == 3


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_training_works_after_calibrating_and_testing_under_inference_mode(tmp_path: Path, stage: str) -> None:
    """A known crash of another tool: buffers born under inference_mode."""
    module = Classifier()
    run = qat_trainer(tmp_path)
    getattr(run, stage)(module)
    module.train()
    qat_trainer(tmp_path, qat={"activation_scales": "ema"}).fit(module)
    module.zero_grad()
    module.net(IMAGES).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.net.parameters())


# -- lightning-facts.md: where to insert


def test_configure_model_counts_as_overridden_while_a_run_is_set_up(tmp_path: Path) -> None:
    """`functools.wraps` would hide it: `is_overridden` follows `__wrapped__`."""
    module = Classifier()
    run = qat_trainer(tmp_path)
    run.callbacks[0].setup(run, module, "fit")
    assert is_overridden("configure_model", module)
    run.callbacks[0].teardown(run, module, "fit")
    assert not is_overridden("configure_model", module)


class BuiltInSetup(Classifier):
    def __init__(self) -> None:
        super().__init__()
        del self.net
        self.net: Any = None

    def setup(self, stage: str) -> None:
        self.net = self.net or Net()


class BuiltInConfigureModel(BuiltInSetup):
    def setup(self, stage: str) -> None:
        pass

    def configure_model(self) -> None:
        self.net = self.net or Net()


@pytest.mark.parametrize("module_class", [BuiltInSetup, BuiltInConfigureModel])
def test_layers_built_in_setup_or_configure_model(tmp_path: Path, module_class: type[Classifier]) -> None:
    module = module_class()
    run = qat_trainer(tmp_path)
    run.fit(module)
    run.save_checkpoint(tmp_path / "built.ckpt")
    assert only_region(module).is_calibrated
    tested = module_class()
    trainer(tmp_path, QuantizationAwareTraining()).test(tested, ckpt_path=str(tmp_path / "built.ckpt"), verbose=False)
    assert torch.equal(tested.eval()(IMAGES), module.eval()(IMAGES))


def test_log_is_muted_while_tracing(tmp_path: Path) -> None:
    """It raises there."""

    class LogsEverywhere(Classifier):
        def loss(self, batch: Any) -> Tensor:
            loss = super().loss(batch)
            self.log("a", loss)
            self.log_dict({"b": loss}, prog_bar=True, on_epoch=True)
            return loss

    qat_trainer(tmp_path).fit(LogsEverywhere())


def test_predict_with_the_module_as_target(tmp_path: Path) -> None:
    """`trainer.predict` looks at `forward.__code__`."""

    class DefaultPredict(SelfClassifier):
        predict_step = LightningModule.predict_step

        def predict_dataloader(self) -> Any:
            return DataLoader(dataset(16, 2).tensors[0], batch_size=8)

    module = DefaultPredict()
    run = qat_trainer(tmp_path)
    run.fit(module)
    predictions = run.predict(module)
    assert predictions is not None
    images = dataset(16, 2).tensors[0][:8]
    assert torch.equal(predictions[0], module.eval()(images))  # type: ignore[arg-type]


def test_insertion_adds_no_parameters(tmp_path: Path) -> None:
    """LightningCLI's optimizer has the parameters of the moment the CLI is instantiated: none may be missing in it."""

    class EarlyOptimizer(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.early = torch.optim.SGD(self.parameters(), 0.1)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.early

    module = EarlyOptimizer()
    qat_trainer(tmp_path).fit(module)
    held = {id(p) for group in module.early.param_groups for p in group["params"]}
    assert {id(p) for p in module.parameters()} == held


def test_save_weights_only_keeps_the_plan(tmp_path: Path) -> None:
    module = Classifier()
    qat_trainer(tmp_path, ModelCheckpoint(tmp_path, filename="w", save_weights_only=True)).fit(module)
    assert torch.equal(load_quantized(Classifier, tmp_path / "w.ckpt")(IMAGES), module.eval()(IMAGES))


@pytest.mark.filterwarnings(
    "ignore:You're using the WeightAveraging callback with a model that overrides the configure_m"
)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
@pytest.mark.parametrize("averaging", [WeightAveraging, EMAWeightAveraging])
@pytest.mark.parametrize("start", ["at once", "late"])
def test_weight_averaging_listed_after_works(tmp_path: Path, averaging: type[WeightAveraging], start: str) -> None:
    """It deep-copies in setup and swaps the copy in for validation: the copy has scales before its first update."""

    class Late(averaging):  # type: ignore[misc,valid-type]
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return step_idx is not None and step_idx >= (0 if start == "at once" else 2)

    losses: list[float] = []

    class Losses(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            losses.append(float(trainer.callback_metrics.get("val_loss", torch.nan)))

    module = Classifier(lr=1e-3)
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = qat_trainer(tmp_path, Late(), checkpoint, Losses(), max_epochs=2)
    run.fit(module)
    assert len(losses) == 3  # sanity check, two epochs
    assert all(loss < 2 for loss in losses[1:])
    for step in (1, 8):
        loaded = load_quantized(Classifier, tmp_path / f"step={step}.ckpt")
        with only_region(loaded).state("off"):
            reference = loaded(IMAGES)
        assert torch.allclose(loaded(IMAGES), reference, atol=0.2)
    again = Classifier()
    resumed = qat_trainer(tmp_path, Late(), max_epochs=3)
    resumed.fit(again, ckpt_path=str(tmp_path / "step=8.ckpt"))
    assert only_region(again).is_calibrated


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_stochastic_weight_averaging_works(tmp_path: Path) -> None:
    """It averages parameters only, and fake-quant adds none."""
    module = Classifier()
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    qat_trainer(tmp_path, swa, max_epochs=3).fit(module)
    assert torch.isfinite(module.eval()(IMAGES)).all()


@pytest.mark.filterwarnings("ignore:.*is smaller than")
@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
def test_tuner_callbacks_run_on_the_float_model_and_it_says_so(tmp_path: Path, finder: Any) -> None:
    """They run first, on uncalibrated scales."""

    class Tuned(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = 2
            self.states: list[str] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if find_regions(self) and self.trainer.training:
                self.states.append(only_region(self).current_state)
            return super().training_step(batch, batch_idx)

        def train_dataloader(self) -> Any:
            return loader(32, self.batch_size, shuffle=True)

    module = Tuned()
    tuner = finder(num_training_steps=5) if finder is LearningRateFinder else finder(max_trials=2, steps_per_trial=1)
    with pytest.warns(UserWarning, match=f"{finder.__name__} runs before calibration: .* for the float model"):
        qat_trainer(tmp_path, tuner).fit(module)
    assert module.states[0] == "off"
    assert module.states[-1] == "quantize"
    assert only_region(module).is_calibrated


# -- what the run may look like


def test_several_validation_loaders(tmp_path: Path) -> None:
    class Several(Classifier):
        def val_dataloader(self) -> Any:
            return [loader(16, seed=1), loader(8, seed=2)]

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:  # type: ignore[override]
            self.log("val_loss", self.loss(batch))

    module = Several()
    run = qat_trainer(tmp_path)
    run.fit(module)
    assert {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"} <= set(run.callback_metrics)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(dataset())


def test_iterable_dataset(tmp_path: Path) -> None:
    module = Classifier()
    qat_trainer(tmp_path).fit(module, DataLoader(Stream(), batch_size=8))
    assert only_region(module).is_calibrated


@pytest.mark.parametrize(
    "options",
    [
        {"fast_dev_run": True},
        {"fast_dev_run": 3},
        {"limit_train_batches": 2, "limit_val_batches": 1},
        {"overfit_batches": 1},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"val_check_interval": 1},
        {"check_val_every_n_epoch": None, "val_check_interval": 3, "max_epochs": 2},
        {"num_sanity_val_steps": 0},
        {"reload_dataloaders_every_n_epochs": 1},
        {"inference_mode": False},
        {"detect_anomaly": True},
        {"max_steps": 3, "max_epochs": -1},
        {"enable_progress_bar": True},
        {"precision": "bf16-mixed"},
        {"profiler": "simple"},
    ],
    ids=lambda options: " ".join(options),
)
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_options_of_the_trainer(tmp_path: Path, options: dict[str, Any]) -> None:
    module = Classifier()
    run = qat_trainer(tmp_path, **options)
    run.fit(module)
    run.test(module, verbose=False)
    assert only_region(module).is_calibrated


def test_csv_logger(tmp_path: Path) -> None:
    run = qat_trainer(tmp_path, logger=CSVLogger(tmp_path, flush_logs_every_n_steps=1), log_every_n_steps=1)
    run.fit(Classifier())
    assert "val_loss" in (Path(run.log_dir or "") / "metrics.csv").read_text()


def test_the_boring_model(tmp_path: Path) -> None:
    module = BoringModel()
    qat_trainer(tmp_path, limit_train_batches=2, limit_val_batches=2).fit(module, datamodule=BoringDataModule())
    assert list(find_regions(module)) == [""]
    assert set(only_region(module).points) == {"layer.input0", "layer.weight"}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo itself
def test_a_compiled_target_trains(tmp_path: Path) -> None:
    """`torch.compile(LightningModule)` with `self.log` crashes upstream: compile the target instead."""

    class Compiled(Classifier):
        def on_fit_start(self) -> None:
            self.net.compile(backend="eager")

    module = Compiled()
    qat_trainer(tmp_path, limit_train_batches=2, limit_val_batches=1).fit(module)
    expected = module.eval()(IMAGES)
    torch._dynamo.reset()
    assert torch.equal(module(IMAGES), expected)


def test_validation_inside_fit_and_alone_give_the_same_number(tmp_path: Path) -> None:
    """One runs under no_grad, the other under inference_mode."""
    module = Classifier()
    run = qat_trainer(tmp_path)
    run.fit(module)
    inside = float(run.callback_metrics["val_loss"])
    before = state_of(module)
    assert run.validate(module, verbose=False)[0]["val_loss"] == inside
    assert_same(state_of(module), before)
