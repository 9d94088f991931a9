"""A healthy pipeline of the scanned digits, and everything that is planted into it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.pipeline_fingerprint import FILE_NAME, PipelineFingerprint
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.quantization.qconfig import QConfig
from tests.harness.small_digits import MEAN, STD, digits
from tests.harness.trainers import quiet

FLOAT_LR, QAT_LR, WEIGHT_DECAY, CLIP, AUXILIARY = 0.01, 0.001, 0.01, 1.0, 0.003


class Pipeline(LightningModule):
    """Two convolutions with batch norm, dropout, a linear head; two terms of loss; every part can be overridden."""

    def __init__(self, lr: float = QAT_LR, weight_decay: float = WEIGHT_DECAY, batch_size: int = 64) -> None:
        super().__init__()
        self.lr, self.weight_decay, self.batch_size = lr, weight_decay, batch_size
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(256, 10)
        self.val_acc = MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h))).flatten(1)
        logits: Tensor = self.head(self.dropped(h))
        return logits

    def dropped(self, h: Tensor) -> Tensor:
        dropped: Tensor = self.dropout(h)
        return dropped

    def prepared(self, x: Tensor, stage: str) -> Tensor:
        return (x - MEAN) / STD

    def labels(self, y: Tensor, stage: str) -> Tensor:
        return y

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y) + AUXILIARY * logits.square().mean()

    def measured(self, logits: Tensor) -> Tensor:
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        loss = self.loss(self(self.prepared(batch[0], "train")), self.labels(batch[1], "train"))
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self(self.prepared(batch[0], "validate"))
        self.val_acc(self.measured(logits), batch[1])
        self.log("val_loss", self.loss(logits, batch[1]))
        self.log("val_acc", self.val_acc)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)

    def train_dataloader(self) -> DataLoader[Any]:
        images, labels = digits()
        dataset = TensorDataset(images[:1200], labels[:1200])
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        images, labels = digits()
        return DataLoader(TensorDataset(images[1200:1500], labels[1200:1500]), batch_size=50)


class UnnormalizedTraining(Pipeline):
    def prepared(self, x: Tensor, stage: str) -> Tensor:
        return x if stage == "train" else super().prepared(x, stage)


class UnnormalizedEvaluation(Pipeline):
    def prepared(self, x: Tensor, stage: str) -> Tensor:
        return x if stage == "validate" else super().prepared(x, stage)


class Shuffled(Pipeline):
    """The labels of the training set in another order."""

    def train_dataloader(self) -> DataLoader[Any]:
        images, labels = digits()
        order = torch.randperm(1200, generator=torch.Generator().manual_seed(5))
        dataset = TensorDataset(images[:1200], labels[:1200][order])
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=True, drop_last=True)


class ShiftedInStep(Pipeline):
    """The step pairs every image with the label of its neighbour."""

    def labels(self, y: Tensor, stage: str) -> Tensor:
        return y.roll(1)


class TinyBatches(Pipeline):
    """Batches of four that are not shuffled, of data sorted by class: batch norm sees one digit at a time."""

    def __init__(self) -> None:
        super().__init__(batch_size=4)

    def train_dataloader(self) -> DataLoader[Any]:
        images, labels = digits()
        order = labels[:1200].argsort(stable=True)
        return DataLoader(TensorDataset(images[order], labels[order]), batch_size=self.batch_size)


class Decayed(Pipeline):
    """Weight decay as a part of the gradient, which Adam scales up to full steps."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


class Augmented(Pipeline):
    """An augmentation that leaves almost nothing of the image."""

    def prepared(self, x: Tensor, stage: str) -> Tensor:
        x = super().prepared(x, stage)
        return x if stage == "validate" else 0.05 * x + 0.5 * torch.randn_like(x)


class ActiveDropout(Pipeline):
    """``F.dropout`` is active by default, in evaluation too."""

    def dropped(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.6)


class TrainModeDropout(Pipeline):
    """A hook that puts dropout back into train mode for evaluation (Monte Carlo dropout, left over)."""

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.dropout.train()
        self.dropout.p = 0.6


class MissingTerm(Pipeline):
    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y)


class ScaledLoss(Pipeline):
    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return 4 * super().loss(logits, y)


class WrongOutput(Pipeline):
    def measured(self, logits: Tensor) -> Tensor:
        return logits.flip(1)


class SwappedAverage(Pipeline):
    """An average of the weights that was made before the checkpoint was loaded, and is swapped in after every step."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.average = {name: p.detach().clone() for name, p in self.named_parameters()}

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name in self.average:
                    self.average[name].lerp_(p, 0.001)
                    p.copy_(self.average[name])


class AverageInEvaluation(SwappedAverage):
    """The same average swapped in for evaluation."""

    def on_train_batch_end(self, *args: Any) -> None:
        return

    def on_validation_epoch_start(self) -> None:
        with torch.no_grad():
            self.kept = {name: p.detach().clone() for name, p in self.named_parameters() if name in self.average}
            for name, p in self.named_parameters():
                if name in self.average:
                    p.copy_(self.average[name])

    def on_validation_epoch_end(self) -> None:
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name in self.average:
                    p.copy_(self.kept[name])


class Stubborn(torch.optim.SGD):
    """A step that ignores the learning rate."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                closure()
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.sub_(0.001 * p.grad.sign())


class StubbornPipeline(Pipeline):
    def configure_optimizers(self) -> Any:
        return Stubborn(self.parameters(), lr=self.lr)


class OtherSeed(Pipeline):
    """Loads nothing."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return None


class WithoutHead(Pipeline):
    """Leaves the keys that do not fit out (``strict=False`` after renaming the head)."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        kept = {name: value for name, value in state_dict.items() if not name.startswith("head")}
        return super().load_state_dict(kept, strict=False)


def _set(name: str, **settings: Any) -> Pipeline:
    """Another setting of a layer, which is neither a parameter nor a buffer."""
    pipeline = Pipeline()
    for key, value in settings.items():
        setattr(pipeline.get_submodule(name), key, value)
    return pipeline


class OtherActivation(Pipeline):
    """Another activation in the code of the model."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.bn1(self.conv1(x)), 0.8)
        h = F.leaky_relu(self.bn2(self.conv2(h)), 0.8).flatten(1)
        logits: Tensor = self.head(self.dropped(h))
        return logits


class Scheduled(Pipeline):
    """A schedule that steps after every batch."""

    def __init__(self, schedule: Callable[[Any], Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"},
        }


def _falls_per_batch() -> Pipeline:
    return Scheduled(lambda optimizer: StepLR(optimizer, 1, 0.1))


def _from_ten_times() -> Pipeline:
    return Scheduled(lambda optimizer: LambdaLR(optimizer, lambda step: max(1.0, 10.0 - 0.3 * step)))


class SlowMomentum(Pipeline):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=10 * self.lr, momentum=0.999)


def _frozen_head() -> Pipeline:
    pipeline = Pipeline()
    pipeline.head.requires_grad_(False)
    return pipeline


def _low_bits(dtype: str) -> QuantizationAwareTraining:
    activation = {"dtype": dtype, "scheme": "symmetric"}
    weight = {"dtype": dtype, "observer": "minmax", "granularity": "per_tensor"}
    return QuantizationAwareTraining(QConfig.of({"activation": activation, "weight": weight}))


def _wrong_scale() -> QuantizationAwareTraining:
    overrides: Any = [{"match": "conv1.input0", "activation": {"fixed_scale": 10.0}}]
    return QuantizationAwareTraining(overrides=overrides)


@dataclass(frozen=True)
class Sabotage:
    """Something planted into the healthy pipeline.

    Args:
        name: what.
        verdict: the right verdict.
        cause: words of which one has to be in the note.
        module: makes the module.
        quantization: makes QuantizationAwareTraining.
        trainer: arguments of the Trainer.
        batches: of the check, per rung.
        quick: belongs to the representative part of the suite.
    """

    name: str
    verdict: str
    cause: tuple[str, ...]
    module: Callable[[], Pipeline] = Pipeline
    quantization: Callable[[], QuantizationAwareTraining] = QuantizationAwareTraining
    trainer: dict[str, Any] = field(default_factory=dict)
    batches: int = 40
    quick: bool = False


MISALIGNED, HYPER, QUANTIZATION = "pipeline misaligned", "hyperparameters", "quantization error"

SABOTAGES = (
    Sabotage(
        "normalization missing in training",
        MISALIGNED,
        ("(train), model: mean 0", "normalization missing"),
        UnnormalizedTraining,
        quick=True,
    ),
    Sabotage("normalization missing in evaluation", MISALIGNED, ("(validate)",), UnnormalizedEvaluation),
    Sabotage("labels shuffled", MISALIGNED, ("labels and inputs belong together",), Shuffled, quick=True),
    Sabotage("labels shifted in the step", MISALIGNED, ("labels that belong to other inputs?",), ShiftedInStep),
    Sabotage("another checkpoint", MISALIGNED, ("another checkpoint?",), OtherSeed),
    Sabotage("checkpoint partly loaded", MISALIGNED, ("(head): partly loaded?",), WithoutHead, quick=True),
    Sabotage(
        "batch norm moving, batches of 4 sorted by class",
        MISALIGNED,
        ("batch_size: 64 -> 4", "labels are distributed differently"),
        TinyBatches,
    ),
    Sabotage(
        "dropout active in evaluation (function)",
        MISALIGNED,
        ("random layer, active in evaluation",),
        ActiveDropout,
        quick=True,
    ),
    Sabotage(
        "dropout active in evaluation (train mode)",
        MISALIGNED,
        ("in train mode while evaluating", "random layer, active"),
        TrainModeDropout,
    ),
    Sabotage("loss term missing", MISALIGNED, ("a term missing",), MissingTerm),
    Sabotage("loss scaled", MISALIGNED, ("scaled by 4?",), ScaledLoss, quick=True),
    Sabotage(
        "augmentation destroys the input",
        MISALIGNED,
        ("augmentation that destroys the input", "input is destroyed"),
        Augmented,
    ),
    Sabotage("learning rate 100 times", HYPER, ("lr: 0.01 -> 0.1",), lambda: Pipeline(lr=100 * QAT_LR), quick=True),
    Sabotage(
        "weight decay 100 times (Adam)",
        HYPER,
        ("weight_decay: 0.01 -> 1",),
        lambda: Decayed(weight_decay=100 * WEIGHT_DECAY),
        batches=400,
    ),
    Sabotage(
        "weight decay 100 times (AdamW)",
        HYPER,
        ("weight_decay: 0.01 -> 1",),
        lambda: Pipeline(weight_decay=100 * WEIGHT_DECAY),
    ),
    Sabotage("clipping to almost nothing", HYPER, ("Raise gradient_clip_val",), trainer={"gradient_clip_val": 1e-12}),
    Sabotage(
        "batch norm with another eps",
        MISALIGNED,
        ("bn1 (BatchNorm2d) computes something else",),
        lambda: _set("bn1", eps=1.0),
        quick=True,
    ),
    Sabotage("dropout .9", MISALIGNED, ("Dropout p: 0.2 -> 0.9",), lambda: _set("dropout", p=0.9)),
    Sabotage("another activation in the code", MISALIGNED, ("before conv2",), OtherActivation),
    Sabotage("average swapped in after every step", MISALIGNED, ("an average that is swapped in",), SwappedAverage),
    Sabotage("average swapped in for evaluation", MISALIGNED, ("an average that is swapped in",), AverageInEvaluation),
    Sabotage("metric of another output", MISALIGNED, ("computed from another output",), WrongOutput),
    Sabotage(
        "optimizer moves at learning rate 0",
        MISALIGNED,
        ("the optimizer's own step moves them",),
        StubbornPipeline,
        quick=True,
    ),
    Sabotage(
        "one scale fixed at a wrong value",
        QUANTIZATION,
        ("conv1.input0 (bad scale",),
        quantization=_wrong_scale,
        quick=True,
    ),
    Sabotage("int2", QUANTIZATION, ("SensitivityAnalysis",), quantization=lambda: _low_bits("int2"), quick=True),
    Sabotage("int3, which QAT mends", "healthy", ("falls a little",), quantization=lambda: _low_bits("int3")),
)
_LONG = {"max_epochs": 10}
_KINDS: tuple[tuple[str, str, Callable[[], Pipeline], dict[str, Any]], ...] = (
    ("gradients clipped away", "gradient_clip_val 1e-09", Pipeline, {"gradient_clip_val": 1e-9}),
    ("accumulation 32 times", "accumulate_grad_batches 1 -> 32", Pipeline, {"accumulate_grad_batches": 32}),
    ("schedule that falls per batch", "StepLR per step", _falls_per_batch, {}),
    ("momentum .999", "momentum averages over 1e+03 steps", SlowMomentum, {}),
    ("weight decay 50 times", "weight_decay: 0.01 -> 0.5", lambda: Pipeline(weight_decay=50 * WEIGHT_DECAY), {}),
    ("warm-up from ten times", "begins at 0.01, 10 times the learning rate", _from_ten_times, {}),
    ("head frozen", "does not update head.weight, head.bias", _frozen_head, {}),
)
"""Hyperparameters that keep training from moving the model; none of them destroys it."""
_PREVENTS = {
    "gradients clipped away": ("int3", "int2"),
    "accumulation 32 times": ("int2",),
    "schedule that falls per batch": ("int3", "int2"),
    "momentum .999": ("int3", "int2"),
    "head frozen": ("int2",),
}
"""The types whose loss ten epochs of QAT then do not win back, and win back without (run once, see the README)."""
PREVENTING = tuple(
    Sabotage(
        f"{name}, {dtype}",
        HYPER if dtype in _PREVENTS.get(name, ()) else "healthy",
        (cause,),
        module,
        QuantizationAwareTraining if dtype == "int8" else functools.partial(_low_bits, dtype),
        {**_LONG, **trainer},
        quick=(name, dtype) in {("accumulation 32 times", "int2"), ("schedule that falls per batch", "int8")},
    )
    for name, cause, module, trainer in _KINDS
    for dtype in ("int8", "int3", "int2")
    if dtype != "int2" or dtype in _PREVENTS.get(name, ())
)
HEALTHY = Sabotage("healthy", "healthy", ("every rung holds",))
HEALTHY_SEEDS = 10


def float_run(directory: Path, seed: int = 0) -> tuple[Path, dict[str, Tensor]]:
    """Train the healthy float pipeline and write its fingerprint; returns its path and the weights."""
    seed_everything(seed, verbose=False)
    model = Pipeline(lr=FLOAT_LR)
    settings = quiet() | {
        "max_epochs": 6,
        "limit_val_batches": 1.0,
        "default_root_dir": directory,
        "gradient_clip_val": CLIP,
    }
    Trainer(callbacks=[PipelineFingerprint()], **settings).fit(model)
    return directory / "lightning_qat" / FILE_NAME, copy.deepcopy(model.state_dict())


def qat_run(
    sabotage: Sabotage, weights: dict[str, Tensor], directory: Path, *callbacks: Callback, **kwargs: Any
) -> Trainer:
    """Start QAT of the sabotaged pipeline from the float weights."""
    seed_everything(1, verbose=False)
    model = sabotage.module()
    model.load_state_dict(weights)
    settings = (
        quiet()
        | {"max_epochs": 1, "default_root_dir": directory, "gradient_clip_val": CLIP}
        | sabotage.trainer
        | kwargs
    )
    trainer = Trainer(callbacks=[sabotage.quantization(), Calibration(batches=8), *callbacks], **settings)
    trainer.fit(model)
    return trainer


class StopBeforeTraining(Callback):
    """The check is all that is wanted."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True
