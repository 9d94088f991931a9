"""Quantization together with everything a Trainer has: one case for each row of the README's table.

Each case trains with fake-quant and five analysing callbacks. What holds for every run is checked in ``fit``, what the
feature promises in the case. The long variant trains every case twice, with and without everything that analyses, and
compares every batch bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch import callbacks as of_lightning
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

import lightning_qat
from tests.harness.classifier import Classifier, Net, dataset, loader
from tests.harness.state import assert_same, state_of
from tests.harness.trainers import qat_trainer
from tests.harness.trajectories import Trajectory, analysers, assert_same_trajectory

README = Path(__file__).parents[2] / "README.md"
IMAGES = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))
PACKAGE = Path(lightning_qat.__file__).parent
LR = 0.005


def analyses() -> list[Callback]:
    return [
        lightning_qat.ModelCheck(show=False),
        lightning_qat.LayerStatistics(),
        lightning_qat.SensitivityAnalysis(),
        lightning_qat.ConvergenceMonitor(),
        lightning_qat.AccuracyTable(),
    ]


class Watch(Callback):
    """Notes what every training step runs on, and what training moves."""

    def __init__(self) -> None:
        self.states: list[str] = []
        self.start: dict[str, Tensor] = {}
        self.epochs: list[dict[str, Tensor]] = []
        self.gradient_norms: list[float] = []
        self.rates: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = state_of(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.states += [region.current_state for region in lightning_qat.find_regions(pl_module).values()]
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        self.gradient_norms.append(float(torch.cat(gradients).norm()) if gradients else 0.0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(state_of(pl_module))


class Calm(Classifier):
    """With a learning rate at which its training stays healthy."""

    def __init__(self) -> None:
        super().__init__(lr=LR)


@dataclass(frozen=True)
class Run:
    """A training that is over."""

    path: Path
    trainer: Trainer
    module: LightningModule
    watch: Watch
    printed: str = ""

    def files(self) -> set[str]:
        return {str(p.relative_to(self.path)) for p in self.path.rglob("*") if p.is_file()}

    def callback(self, kind: type[Callback]) -> Any:
        (found,) = [c for c in self.trainer.callbacks if isinstance(c, kind)]  # type: ignore[attr-defined]
        return found

    def moved(self, name: str, epoch: int | None = None) -> bool:
        """Whether training has changed a tensor of the state, until the end of an epoch or until now."""
        end = state_of(self.module) if epoch is None else self.watch.epochs[epoch]
        return not torch.equal(self.watch.start[name], end[name])


@dataclass(frozen=True)
class Case:
    """A feature of the Trainer.

    Attributes:
        check: looks at the run; what the feature promises.
        options: arguments of the Trainer, from the folder of the run.
        callbacks: more callbacks, from the folder of the run; they stand behind those of quantization.
        module: what is trained.
        data: arguments of ``fit``.
        warns: what our own warning says; none of ours if not given.
        error: what the clear error says, instead of a training.
        strategy: in the place of the Trainer's; its own checks want several GPUs, or a package.
        needs_cuda: whether Lightning offers it on a GPU alone.
    """

    check: Callable[[Run], object] = lambda run: None
    options: Callable[[Path], dict[str, Any]] = lambda path: {}
    callbacks: Callable[[Path], list[Callback]] = lambda path: []
    module: Callable[[], LightningModule] = Calm
    data: Callable[[], dict[str, Any]] = dict
    warns: str = ""
    error: str = ""
    strategy: type | None = None
    needs_cuda: bool = False

    @property
    def answer(self) -> str:
        return "clear error" if self.error else "works"


def fit(case: Case, path: Path, *more: Callback) -> Run:
    """Train for two epochs; it is QAT, with every point calibrated and quantized in every step."""
    seed_everything(3, verbose=False)
    module, watch = case.module(), Watch()
    callbacks = [*case.callbacks(path), *more, watch]
    run = qat_trainer(path, *callbacks, **{"max_epochs": 2, **case.options(path)})
    run.fit(module, **case.data())
    regions = lightning_qat.find_regions(module).values()
    assert regions
    for region in regions:
        assert region.is_calibrated
        assert len(region.points) >= 2
        assert all(bool((point.scale > 0).all()) for point in region.points.values())
        module.eval()
        images = IMAGES.to(next(module.parameters()))
        quantized = module(images)
        with region.state("off"):
            assert not torch.equal(module(images), quantized)
    assert watch.states
    assert set(watch.states) == {"quantize"}
    assert any(not torch.equal(watch.start[name], p.detach()) for name, p in module.named_parameters())
    return Run(path, run, module, watch)


# -- modules that a feature needs


class TwoOptimizers(Calm):
    """The convolutions and the head are trained by optimizers and schedulers of their own, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss = self.loss(batch)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):  # type: ignore[arg-type]
            optimizer.step()
            scheduler.step()  # type: ignore[call-arg]

    def configure_optimizers(self) -> Any:
        head = [*self.net.head.parameters()]
        rest = [p for p in self.parameters() if not any(p is h for h in head)]
        optimizers = [torch.optim.SGD(rest, LR), torch.optim.Adam(head, LR)]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimizers]


class ByHand(Calm):
    """One optimizer, stepped every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch))
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


class Scheduled(Calm):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        by_step = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return [optimizer], [{"scheduler": by_step, "interval": "step"}]


class OnPlateau(Calm):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, threshold=9.0, threshold_mode="abs", factor=0.5, patience=0
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


class Parts(Calm):
    """A backbone and a head that the steps call one after the other."""

    def __init__(self) -> None:
        super().__init__()
        del self.net
        self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(144, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(images))
        return logits

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=LR)


class Unfreezes(of_lightning.BaseFinetuning):
    """Trains the head alone in the first epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=LR)


class Sized(Calm):
    """With what BatchSizeFinder looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 4

    def train_dataloader(self) -> Any:
        return loader(32, self.batch_size, shuffle=True)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(dataset())


class SeveralLoaders(Calm):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["one"], batch_idx) + self.loss(batch["other"])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)

    def calibration_dataloader(self) -> Any:
        return loader()

    def train_dataloader(self) -> Any:
        return CombinedLoader({"one": loader(shuffle=True), "other": loader(seed=3)}, "min_size")

    def val_dataloader(self) -> Any:
        return [loader(16, seed=1), loader(16, seed=2)]


class TrainsOnly(LightningModule):
    """No validation step and no loader for one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    loss, training_step, train_dataloader = Classifier.loss, Classifier.training_step, Classifier.train_dataloader

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), LR)


class BlockNet(Net):
    """The blocks behind the batch norm may be computed once more in backward."""

    checkpointing = True

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointing else self.block(x)
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits

    def block(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(x) + x)


class Checkpointed(Calm):
    def __init__(self, checkpointing: bool = True) -> None:
        super().__init__()
        self.net = BlockNet()
        self.net.checkpointing = checkpointing


class AdaptedNet(nn.Module):
    """A frozen layer with an adapter of two small matrices, the second of which starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = nn.Linear(36, 8), nn.Linear(8, 4)
        self.a, self.b = nn.Linear(36, 4, bias=False), nn.Linear(4, 8, bias=False)
        nn.init.zeros_(self.b.weight)
        self.base.requires_grad_(False)
        self.head.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        logits: Tensor = self.head((self.base(x) + 2.0 * self.b(self.a(x))).tanh())
        return logits


class Adapted(Calm):
    def __init__(self) -> None:
        super().__init__()
        self.net: Any = AdaptedNet()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], LR)


class Steps(DummyLogger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.values.update(metrics)


class SaidSummary(of_lightning.ModelSummary):
    """Keeps the number of parameters."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.total = ModelSummary(pl_module).total_parameters
        super().on_fit_start(trainer, pl_module)


# -- what the features promise


def is_loaded(run: Run, name: str) -> None:
    """The checkpoint of a run gives its model back, without a Trainer."""
    loaded = lightning_qat.load_quantized(Classifier, run.path / name)
    content = torch.load(run.path / name)["state_dict"]
    assert_same(state_of(loaded), {k: v for k, v in content.items() if isinstance(v, Tensor)})
    assert loaded(IMAGES).isfinite().all()


def is_the_best(run: Run) -> None:
    kept = run.callback(of_lightning.ModelCheckpoint)
    assert {"best.ckpt", "last.ckpt"} <= run.files()
    assert float(kept.best_model_score) <= float(run.trainer.callback_metrics["val_loss"])
    (tested,) = run.trainer.validate(ckpt_path="best", verbose=False)
    assert tested["val_loss"] == pytest.approx(float(kept.best_model_score), rel=1e-6)


def goes_on(run: Run) -> None:
    """``last.ckpt`` resumes: with the same scales, calibrated once."""
    module = Classifier()
    qat_trainer(run.path / "more", max_epochs=3).fit(module, ckpt_path=run.path / "last.ckpt")
    (region,) = lightning_qat.find_regions(module).values()
    fixed = [name for name in region.points if not name.endswith("weight")]
    (first,) = lightning_qat.find_regions(run.module).values()
    assert_same({n: region.points[n].scale for n in fixed}, {n: first.points[n].scale for n in fixed})


def is_averaged(run: Run) -> None:
    average = run.callback(of_lightning.WeightAveraging)._average_model.module
    assert_same(dict(run.module.named_parameters()), dict(average.named_parameters()))
    assert not torch.equal(run.watch.epochs[-1]["net.head.weight"], run.module.net.head.weight)  # type: ignore[union-attr, arg-type]


def is_stochastically_averaged(run: Run) -> None:
    """Lightning takes the weights at the beginning of the epochs 0, 1 and 2."""
    begins = [epoch["net.head.weight"] for epoch in (run.watch.start, *run.watch.epochs[:2])]
    assert torch.allclose(run.module.net.head.weight, sum(begins) / 3, atol=1e-6)  # type: ignore[union-attr, arg-type]


def is_pruned(run: Run) -> None:
    weight = run.module.net.conv2.weight.detach()  # type: ignore[union-attr]
    assert float((weight == 0).float().mean()) > 0.4
    (region,) = lightning_qat.find_regions(run.module).values()
    assert bool((region.points["conv2.weight"](weight)[weight == 0] == 0).all())


def is_unfrozen(run: Run) -> None:
    assert not run.moved("backbone.0.weight", 0)
    assert run.moved("head.weight", 0)
    assert run.moved("backbone.0.weight")
    assert set(lightning_qat.find_regions(run.module)) == {"backbone", "head"}


def same_under_checkpointing(run: Run) -> None:
    other = fit(Case(module=lambda: Checkpointed(False)), run.path / "plain", *analyses())
    assert_same(state_of(run.module), state_of(other.module))


def has_frozen_base(run: Run) -> None:
    for name in ("base", "head"):
        assert not run.moved(f"net.{name}.weight")
        assert not run.moved(f"net._quantization.fake_quants.{name}/weight.scale")
    assert run.moved("net.a.weight")
    assert run.moved("net.b.weight")
    net: Any = run.module.net
    assert net.b.weight.abs().max() > 0
    points = net._quantization.points
    assert all(points[f"{name}.weight"].scale.numel() for name in ("base", "head", "a", "b"))


def evaluates_alike(run: Run) -> None:
    """What validation gave inside ``fit``, and the same under ``no_grad``."""
    inside = float(run.trainer.callback_metrics["val_loss"])
    assert run.trainer.validate(run.module, verbose=False)[0]["val_loss"] == inside


def computes_codes_in_float32(run: Run) -> None:
    """What every quantizer of a step gives is what numpy makes of the same input in float32."""
    (region,) = lightning_qat.find_regions(run.module).values()
    points = {name: point for name, point in region.points.items() if point.axis is None}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def noted(name: str, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(value: Tensor) -> Tensor:
            seen[name] = value, forward(value)
            return seen[name][1]

        return call

    for name, point in points.items():
        point.forward = noted(name, point.forward)  # type: ignore[method-assign]
    run.trainer.validate(run.module, verbose=False)
    assert len(seen) == len(points) > 2
    for name, (value, out) in seen.items():
        scale = points[name].scale.cpu().numpy()
        codes = np.clip(np.rint(value.detach().float().cpu().numpy() / scale), -128, 127)
        assert scale.dtype == codes.dtype == np.float32
        assert out.dtype == value.dtype
        assert torch.equal(out.detach().cpu(), torch.from_numpy(codes * scale).to(value.dtype)), name


def logged(run: Run) -> None:
    """The loss and the numbers and texts of analyses are in every logger."""
    for log in run.trainer.loggers:
        if isinstance(log, CSVLogger):
            heading = (Path(log.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
            assert {"val_loss", "sensitivity/max_score"} <= set(heading)
        else:
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

            tags = EventAccumulator(str(log.log_dir)).Reload().Tags()
            assert {"val_loss", "sensitivity/max_score"} <= set(tags["scalars"])
            assert "model_check/text_summary" in tags["tensors"]
    assert (Path(str(run.trainer.log_dir)) / "lightning_qat" / "sensitivity.csv").exists()


def finished(run: Run) -> None:
    """It ended by itself, with the reports of the end."""
    assert run.trainer.should_stop
    assert {"lightning_qat/sensitivity.csv", "lightning_qat/result_table.json"} <= run.files()
    stages = run.callback(lightning_qat.AccuracyTable).result.stages
    assert any(stage.endswith("QAT") for stage in stages)


def steps(count: int) -> Callable[[Run], None]:
    def check(run: Run) -> None:
        assert run.trainer.global_step == count

    return check


def batches(train: int) -> Callable[[Run], None]:
    def check(run: Run) -> None:
        assert len(run.watch.states) == train

    return check


def true(*conditions: Callable[[Run], object]) -> Callable[[Run], None]:
    """All conditions hold."""

    def check(run: Run) -> None:
        for condition in conditions:
            found = condition(run)
            assert found is None or found

    return check


def options(**values: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda path: values


def one(make: Callable[[], Callback]) -> Callable[[Path], list[Callback]]:
    return lambda path: [make()]


def checkpoints(**values: Any) -> Callable[[Path], list[Callback]]:
    return lambda path: [of_lightning.ModelCheckpoint(path, **values)]


CASES: dict[str, Case] = {
    "`accumulate_grad_batches`": Case(steps(4), options(accumulate_grad_batches=3)),
    "`gradient_clip_val`": Case(
        lambda run: max(run.watch.gradient_norms) < 0.011,
        options(gradient_clip_val=0.01),
    ),
    "manual optimization": Case(steps(4), module=ByHand),
    "several optimizers": Case(
        true(steps(16), lambda run: run.moved("net.conv1.weight") and run.moved("net.head.weight")),
        module=TwoOptimizers,
    ),
    "schedulers, by step": Case(
        lambda run: run.watch.rates == pytest.approx([LR * 0.5**n for n in range(8)]), module=Scheduled
    ),
    "`ReduceLROnPlateau`": Case(
        lambda run: run.watch.rates == pytest.approx([LR] * 8 + [LR / 2] * 4), options(max_epochs=3), module=OnPlateau
    ),
    "`EarlyStopping`": Case(
        true(finished, steps(8)),
        options(max_epochs=9),
        one(lambda: of_lightning.EarlyStopping("val_loss", min_delta=9.0, patience=1)),
    ),
    "`ModelCheckpoint`, best": Case(
        is_the_best, callbacks=checkpoints(monitor="val_loss", filename="best", save_last=True)
    ),
    "`ModelCheckpoint`, last": Case(
        true(lambda run: is_loaded(run, "last.ckpt"), goes_on), callbacks=checkpoints(save_last=True)
    ),
    "`ModelCheckpoint`, weights only": Case(
        lambda run: is_loaded(run, "w.ckpt"), callbacks=checkpoints(filename="w", save_weights_only=True)
    ),
    "`WeightAveraging`, `EMAWeightAveraging`": Case(
        is_averaged, callbacks=one(lambda: of_lightning.EMAWeightAveraging(decay=0.5))
    ),
    "`StochasticWeightAveraging`": Case(
        is_stochastically_averaged,
        options(max_epochs=3),
        one(lambda: of_lightning.StochasticWeightAveraging(LR, swa_epoch_start=1, annealing_epochs=1)),
    ),
    "`BaseFinetuning`, `BackboneFinetuning`": Case(is_unfrozen, callbacks=one(Unfreezes), module=Parts),
    "`LearningRateFinder`": Case(
        lambda run: run.module.lr != LR,
        callbacks=one(lambda: of_lightning.LearningRateFinder(num_training_steps=20, early_stop_threshold=None)),
        data=lambda: {"train_dataloaders": loader(batch_size=2)},
        warns="LearningRateFinder runs before calibration",
    ),
    "`BatchSizeFinder`": Case(
        lambda run: run.module.batch_size > 4,
        callbacks=one(lambda: of_lightning.BatchSizeFinder(init_val=4, max_trials=2, steps_per_trial=1)),
        module=Sized,
        warns="BatchSizeFinder runs before calibration",
    ),
    "`TQDMProgressBar`": Case(
        lambda run: "Epoch 1" in run.printed,
        options(enable_progress_bar=True),
        one(of_lightning.TQDMProgressBar),
    ),
    "`RichProgressBar`": Case(
        lambda run: "Epoch 1" in run.printed,
        options(enable_progress_bar=True),
        one(of_lightning.RichProgressBar),
    ),
    "`ModelSummary`, `RichModelSummary`": Case(
        lambda run: run.callback(SaidSummary).total == sum(p.numel() for p in Classifier().parameters()),
        options(enable_model_summary=True),
        one(SaidSummary),
    ),
    "`DeviceStatsMonitor`": Case(
        lambda run: any("DeviceStatsMonitor.on_train_batch_end" in name for name in run.trainer.logger.values),
        lambda path: {"logger": Steps()},
        one(lambda: of_lightning.DeviceStatsMonitor(cpu_stats=True)),
    ),
    "`ModelPruning`": Case(
        is_pruned,
        callbacks=one(lambda: of_lightning.ModelPruning("l1_unstructured", amount=0.5, parameter_names=["weight"])),
    ),
    "`fast_dev_run`": Case(true(batches(1), lambda run: not run.files()), options(fast_dev_run=True)),
    "`overfit_batches`": Case(true(batches(2), steps(2)), options(overfit_batches=1)),
    "`limit_train_batches`, `limit_val_batches`": Case(
        batches(6), options(limit_train_batches=3, limit_val_batches=0.5)
    ),
    "several loaders": Case(
        true(batches(8), lambda run: "val_loss/dataloader_idx_1" in run.trainer.callback_metrics), module=SeveralLoaders
    ),
    "`IterableDataset` without length": Case(
        batches(8), data=lambda: {"train_dataloaders": DataLoader(Stream(), batch_size=8)}
    ),
    "`max_time`": Case(finished, options(max_time=timedelta(milliseconds=100), max_epochs=-1)),
    "`val_check_interval`": Case(batches(8), options(val_check_interval=3, check_val_every_n_epoch=None)),
    "no validation": Case(batches(8), module=TrainsOnly),
    "`barebones`": Case(
        true(batches(8), lambda run: not run.trainer.loggers),
        lambda path: (
            {"barebones": True}
            | dict.fromkeys(
                ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "log_every_n_steps")
            )
        ),
        module=Scheduled,
    ),
    "`inference_mode=True`": Case(evaluates_alike, options(inference_mode=True)),
    "`inference_mode=False`": Case(evaluates_alike, options(inference_mode=False)),
    "activation checkpointing": Case(same_under_checkpointing, module=Checkpointed),
    "`CSVLogger`": Case(logged, lambda path: {"logger": CSVLogger(path)}, warns="CSVLogger shows no"),
    "`TensorBoardLogger`": Case(logged, lambda path: {"logger": TensorBoardLogger(path)}),
    "several loggers": Case(
        logged, lambda path: {"logger": [CSVLogger(path), TensorBoardLogger(path)]}, warns="CSVLogger shows no"
    ),
    "no logger": Case(lambda run: {"lightning_qat/sensitivity.csv"} < run.files()),
    "`profiler`": Case(
        lambda run: any("QuantizationAwareTraining" in name for name in run.trainer.profiler.recorded_durations),
        options(profiler="simple"),
    ),
    "`detect_anomaly`": Case(batches(8), options(detect_anomaly=True)),
    "LoRA adapters": Case(has_frozen_base, module=Adapted, warns="does not vary as long as"),
    "`precision: 32-true`": Case(computes_codes_in_float32, options(precision="32-true")),
    "`precision: bf16-mixed`": Case(computes_codes_in_float32, options(precision="bf16-mixed")),
    "`precision: 16-mixed`": Case(
        computes_codes_in_float32, options(precision="16-mixed", accelerator="auto"), needs_cuda=True
    ),
    "`precision: bf16-true`": Case(
        computes_codes_in_float32, options(precision="bf16-true"), warns="keeps the weights in bfloat16"
    ),
    "`sync_batchnorm`": Case(
        options=lambda path: {"strategy": DDPStrategy(process_group_backend="gloo"), "sync_batchnorm": True},
        error=r"sync_batchnorm=False.*freeze_batch_norm_after=0",
    ),
    "`ModelParallelStrategy` (FSDP2)": Case(error="ModelParallelStrategy yet.*ddp", strategy=ModelParallelStrategy),
    "`FSDPStrategy`": Case(error="FSDPStrategy yet.*ddp", strategy=FSDPStrategy),
    "`DeepSpeedStrategy`": Case(error="DeepSpeedStrategy yet.*ddp", strategy=DeepSpeedStrategy),
}


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="Lightning computes in float16 on a GPU alone")
WORKING = [
    pytest.param(name, id=name, marks=NO_CUDA if case.needs_cuda else ())
    for name, case in CASES.items()
    if not case.error
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WORKING)
def test_feature_works(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no warning of ours but the one that the case expects: these are healthy runs."""
    monkeypatch.setattr("lightning.pytorch.accelerators.cpu.get_cpu_stats", lambda: {"cpu_percent": 1.0})  # psutil
    case = CASES[name]
    with pytest.warns() as caught:  # Lightning warns of more than one thing in runs as small as these
        run = fit(case, tmp_path, *analyses())
    ours = [
        str(w.message) for w in caught if "lightning_qat" in Path(w.filename).parts[:-1] and "tests" not in w.filename
    ]
    assert bool(ours) == bool(case.warns), ours
    assert all(re.search(case.warns, text) for text in ours), ours
    assert case.check(Run(run.path, run.trainer, run.module, run.watch, capsys.readouterr().out)) in (None, True)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.error])
def test_feature_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one error, before anything is trained, that says what to write instead."""
    case = CASES[name]
    run = qat_trainer(tmp_path, **case.options(tmp_path))
    if case.strategy is not None:
        monkeypatch.setattr(run._accelerator_connector, "strategy", case.strategy.__new__(case.strategy))
    with pytest.raises(MisconfigurationException, match=case.error):
        run.callbacks[0].setup(run, case.module(), "fit")  # type: ignore[attr-defined]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [case for case in WORKING if case.id != "`max_time`"])
def test_no_analysis_leaves_a_trace(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch of training is the same with and without all callbacks that analyse.

    ``max_time`` is left out: which batch is the last depends on the time.
    """
    monkeypatch.setattr("lightning.pytorch.accelerators.cpu.get_cpu_stats", lambda: {"cpu_percent": 1.0})
    events = []
    for folder, more in (("plain", []), ("other", analysers())):
        record = Trajectory()
        fit(CASES[name], tmp_path / folder, *more, record)
        events.append(record.events)
    assert_same_trajectory(*events)


def test_the_table_of_the_readme_has_a_row_for_each_case() -> None:
    section = README.read_text().split("## Together with the rest of a Trainer")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| (.+?) \| (works|clear error|does not apply) \|", section, re.MULTILINE))
    assert rows == {name: case.answer for name, case in CASES.items()}
