"""ConvergenceMonitor: early on sick runs, silent on healthy ones, and without a trace (C1, C2)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat.analysis.fingerprint.fingerprint import weight_digests
from lightning_qat.callbacks.convergence_monitor import ConvergenceMonitor
from lightning_qat.callbacks.ladder.finetune_copy import finetune_copy
from lightning_qat.callbacks.layer_statistics import LayerStatistics
from lightning_qat.callbacks.pipeline_fingerprint import take_fingerprint
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.quantization.qconfig import QConfig
from lightning_qat.quantization.region.parameter_groups import parameter_groups
from lightning_qat.quantization.region.region import find_regions
from tests.harness.small_digits import Digits, pretrained
from tests.harness.trainers import qat_trainer

FLAGGED = "ConvergenceMonitor, epoch"


def monitored(directory: Path, model: Digits, seed: int = 0, **kwargs: Any) -> tuple[ConvergenceMonitor, Trainer]:
    seed_everything(seed, verbose=False)
    monitor = kwargs.pop("monitor", None) or ConvergenceMonitor(float_batches=4)
    trainer = qat_trainer(directory, monitor, **{"max_epochs": 3, **kwargs})
    trainer.fit(model)
    return monitor, trainer


@pytest.mark.parametrize("seed", range(3))
def test_healthy_run_is_silent(seed: int, tmp_path: Path) -> None:
    """C1: warnings are errors here."""
    monitor, trainer = monitored(tmp_path, pretrained(), seed)
    assert monitor.result is not None
    assert monitor.result.verdict == "healthy"
    assert trainer.callback_metrics["convergence/flagged"] == 0
    assert len(monitor.series.losses) == 3 * 18
    assert monitor.series.evaluations == monitor.series.points.epochs == 3
    assert monitor.series.calibrated is not None
    assert monitor.series.calibrated.standard_errors


def test_collapsed_metric_is_flagged_after_the_first_epoch(tmp_path: Path) -> None:
    """C1, C2: training forgets to normalize."""
    with pytest.warns(UserWarning, match="do not sweep learning rate"):
        monitor, trainer = monitored(tmp_path, pretrained(normalized_in_training=False, lr=3e-3), max_epochs=1)
    assert monitor.result is not None
    assert monitor.result.verdict == "metric collapsed"
    assert trainer.callback_metrics["convergence/flagged"] == 1
    stored = json.loads((tmp_path / "lightning_qat" / "convergence.json").read_text())
    assert stored["verdict"] == "metric collapsed"
    assert (tmp_path / "lightning_qat" / "convergence.txt").exists()


def test_stop_ends_training(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=FLAGGED):
        _, trainer = monitored(
            tmp_path,
            pretrained(normalized_in_training=False, lr=3e-3),
            monitor=ConvergenceMonitor(stop=True, float_batches=4),
            max_epochs=5,
        )
    assert trainer.current_epoch == 1


class Dividing(Digits):
    """From some step on, a division by zero in the middle of the model."""

    broken = False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        h = torch.relu(self.bn2(self.conv2(h))).flatten(1)
        h = h / (0.0 if self.broken else 1.0)
        logits: Tensor = self.head(h)
        return logits

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        type(self).broken = batch_idx == 5


def test_loss_that_is_not_finite_names_the_op_and_its_line(tmp_path: Path) -> None:
    """C1: found before the step has turned every weight to NaN."""
    model = Dividing()
    model.load_state_dict(pretrained().state_dict())
    with pytest.warns(UserWarning, match=r"div_\d+.*test_convergence_monitor.py:\d+"):
        monitor, _ = monitored(tmp_path, model, max_epochs=1, limit_train_batches=7, limit_val_batches=0)
    assert monitor.result is not None
    assert monitor.result.verdict == "not finite"
    Dividing.broken = False


class Detached(Digits):
    """The first layers get a gradient of exactly zero."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        h = torch.relu(self.bn2(self.conv2(h))).flatten(1)
        logits: Tensor = self.head(h.detach())
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + 0.0 * self.conv1.weight.sum()


def test_dead_gradients_are_named(tmp_path: Path) -> None:
    """C1."""
    model = Detached()
    model.load_state_dict(pretrained().state_dict())
    with pytest.warns(UserWarning, match="dead gradients"):
        monitor, _ = monitored(tmp_path, model, max_epochs=1)
    assert "conv1.weight" in monitor.series.zero_gradients
    assert "head.weight" not in monitor.series.zero_gradients


class Oscillating(Digits):
    """Learns nothing, but from the second epoch on half of the head's weights jump away and, an epoch later, back."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch > 0:
            step = 0.02 * self.head.weight.detach().abs().max()
            with torch.no_grad():
                self.head.weight[::2] += step if self.current_epoch % 2 else -self.step
            self.step = step


@pytest.mark.parametrize("listed", ["alone", "before LayerStatistics", "after LayerStatistics"])
def test_weights_that_jump_to_and_fro_are_flagged(tmp_path: Path, listed: str) -> None:
    """C1: nothing is evaluated here, so no metric can excuse it."""
    model = Oscillating(lr=1e-12)
    model.load_state_dict(pretrained().state_dict())
    monitor, statistics = ConvergenceMonitor(float_batches=4), LayerStatistics()
    callbacks = {
        "alone": [monitor],
        "before LayerStatistics": [monitor, statistics],
        "after LayerStatistics": [statistics, monitor],
    }[listed]
    seed_everything(0, verbose=False)
    with pytest.warns(UserWarning, match="weights oscillate"):
        qat_trainer(tmp_path, *callbacks, max_epochs=6, limit_val_batches=0).fit(model)
    assert monitor.result is not None
    row = next(row for row in monitor.result.rows if row.check == "oscillation")
    assert row.names == ("head.weight",)
    health = monitor.series.points.latest["head.weight"]
    assert health.flip_rate == pytest.approx(0.5, abs=0.1)  # half of the rows
    assert health.return_rate == pytest.approx(1.0, abs=0.1)
    assert monitor.series.points.latest["conv1.weight"].return_rate is None  # nothing flips there


def test_quantization_that_destroys_the_model_is_flagged(tmp_path: Path) -> None:
    """C1: real quantization error, and too little training to mend it: a plateau above the float loss."""
    qconfig = QConfig.of({"activation": {"dtype": "int2"}, "weight": {"dtype": "int2"}})
    with pytest.warns(UserWarning, match="not learning"):
        monitor, _ = monitored(
            tmp_path, pretrained(lr=1e-6), quantization=QuantizationAwareTraining(qconfig=qconfig), max_epochs=3
        )
    assert monitor.result is not None
    assert monitor.result.verdict == "not learning"


def test_training_is_bit_identical_with_and_without(tmp_path: Path) -> None:
    """C1: analysis leaves no trace."""

    def trained(*callbacks: Any) -> dict[str, Tensor]:
        seed_everything(0, verbose=False)
        model = pretrained()
        qat_trainer(tmp_path, *callbacks, max_epochs=2).fit(model)
        return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}

    for one, other in zip(trained().values(), trained(ConvergenceMonitor(float_batches=4)).values(), strict=True):
        assert torch.equal(one, other)


def test_table_goes_to_tensorboard_when_something_is_flagged(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    with pytest.warns(UserWarning, match=FLAGGED):
        monitored(tmp_path, pretrained(normalized_in_training=False, lr=3e-3), max_epochs=1, logger=logger)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert any(tag.startswith("convergence") for tag in events.Tags()["tensors"])
    assert "convergence/flagged" in events.Tags()["scalars"]


def test_resume_keeps_what_training_started_from(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    first = ConvergenceMonitor(float_batches=4)
    trainer = qat_trainer(tmp_path, first, max_epochs=1)
    model = pretrained()
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second = ConvergenceMonitor(float_batches=4)
    qat_trainer(tmp_path, second, max_epochs=2).fit(Digits(), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert second.series.calibrated == first.series.calibrated
    assert second.series.float_loss == first.series.float_loss
    assert second.series.losses[:18] == first.series.losses
    assert second.series.steps == 36
    assert second.series.evaluations == second.series.points.epochs == 2
    assert second.series.points.first == first.series.points.first
    assert second.series.points.flip_rates[:1] == first.series.points.flip_rates


def test_drift_is_that_since_calibration_also_after_a_resume(tmp_path: Path) -> None:
    """C1: a run that is interrupted every epoch would never show any other."""
    calibrated: dict[str, Tensor] = {}

    class Noting(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            calibrated.update(scales(pl_module))

    def trainer(*callbacks: Callback, **kwargs: Any) -> Trainer:
        return qat_trainer(
            tmp_path, *callbacks, quantization=QuantizationAwareTraining(activation_scales="ema"), **kwargs
        )

    first = trainer(ConvergenceMonitor(float_batches=1), Noting())
    first.fit(pretrained())
    first.save_checkpoint(tmp_path / "last.ckpt")
    monitor, model = ConvergenceMonitor(float_batches=1), Digits()
    trainer(monitor, max_epochs=2).fit(model, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    now = scales(model)
    for name in ("relu_0.output", "relu_1.output"):
        expected = float(now[name] / calibrated[name]) - 1
        assert monitor.series.points.latest[name].scale_drift == pytest.approx(expected, rel=1e-5)
        assert abs(expected) > 1e-4


def scales(model: nn.Module) -> dict[str, Tensor]:
    return {name: f.scale.detach().clone() for r in find_regions(model).values() for name, f in r.points.items()}


def test_state_does_not_grow_with_the_epochs(tmp_path: Path) -> None:
    """C1: but for one flip rate each, up to 256, and the losses, which are bounded too."""
    sizes = []
    for epochs in (1, 4):
        monitor, _ = monitored(tmp_path, pretrained(), max_epochs=epochs, limit_train_batches=2)
        state = {k: v for k, v in monitor.state_dict().items() if k not in ("losses", "flip_rates")}
        sizes.append(len(json.dumps(state, default=str)))
        assert len(monitor.state_dict()["flip_rates"]) == epochs
    assert sizes[1] < 1.1 * sizes[0]


@pytest.mark.parametrize("name", ["float_batches", "statistics_batches"])
def test_bad_values_are_refused(name: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"{name}=0"):
        ConvergenceMonitor(**{name: 0})


def test_needs_quantization(tmp_path: Path) -> None:
    trainer = Trainer(callbacks=[ConvergenceMonitor()], default_root_dir=tmp_path, logger=False, max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"add QuantizationAwareTraining"):
        trainer.fit(Digits())


def test_model_without_a_loss_or_validation_runs(tmp_path: Path) -> None:
    """Manual optimization may return nothing."""

    class Manual(Digits):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    monitor, _ = monitored(tmp_path, Manual(), max_epochs=1, limit_val_batches=0)
    assert monitor.series.losses == ()


# -- several processes


class OneBadRank(Digits):
    """One rank meets an infinite loss; its gradient reaches the weights of both."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss / 0.0 if self.trainer.global_rank == 1 and batch_idx == 3 else loss


@pytest.mark.filterwarnings("ignore:this strategy trains in child processes")
@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks")
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
@pytest.mark.filterwarnings("ignore:ConvergenceMonitor, epoch 0")  # in the child processes
def test_two_ranks_agree_and_stop_together(tmp_path: Path) -> None:
    """C1: whichever rank meets it first."""

    class Ranks(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            monitor = next(c for c in trainer.callbacks if isinstance(c, ConvergenceMonitor))  # type: ignore[attr-defined]
            assert monitor.result is not None
            found = [monitor.result.verdict, monitor.result.note, trainer.global_step]
            torch.save(found, tmp_path / f"{trainer.global_rank}.pt")

    model = OneBadRank()
    model.load_state_dict(pretrained().state_dict())
    settings: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2, "max_epochs": 3}
    qat_trainer(tmp_path, ConvergenceMonitor(stop=True, float_batches=2), Ranks(), **settings).fit(model)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one == other
    assert one[0] == "not finite"
    assert one[2] < 3 * 9


class BadSampleOfRankOne(Digits):
    """A sample that only rank 1 meets; its gradient reaches the weights of both."""

    def train_dataloader(self) -> Any:
        data = super().train_dataloader().dataset
        images = data.tensors[0].clone()
        images[71, 0, 3, 3] = float("nan")
        return DataLoader(TensorDataset(images, data.tensors[1]), batch_size=64)  # the sampler deals them out in turn


@pytest.mark.filterwarnings("ignore:this strategy trains in child processes")
@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks")
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
@pytest.mark.filterwarnings("ignore:ConvergenceMonitor, epoch 0")  # in the child processes
@pytest.mark.filterwarnings("ignore:Calibration. conv1.input0 is NaN")
def test_a_bad_sample_of_another_rank_is_named_first(tmp_path: Path) -> None:
    """Number nine: rank 0 writes the verdict, and sees only what follows."""

    class Ranks(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            monitor = next(c for c in trainer.callbacks if isinstance(c, ConvergenceMonitor))  # type: ignore[attr-defined]
            assert monitor.result is not None
            torch.save(monitor.result.note, tmp_path / f"{trainer.global_rank}.pt")

    model = BadSampleOfRankOne()
    model.load_state_dict(pretrained().state_dict())
    settings: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2, "max_epochs": 1}
    qat_trainer(tmp_path, ConvergenceMonitor(stop=True, float_batches=2), Ranks(), **settings).fit(model)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one == other
    assert re.search(r"First came the input that the loader delivers, batch \d of epoch 0 on rank 1: 0 holds nan", one)


def test_learned_scales_are_no_weights(tmp_path: Path) -> None:
    """C1, C4: neither dead gradients, nor moved weights at learning rate 0, nor part of the digests."""

    class Learned(Digits):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(parameter_groups(self, lr=1e-4), lr=1e-4)

    class Looking(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            self.zero = finetune_copy(
                trainer, pl_module, batches=3, eval_batches=1, state="quantize", zero_lr=True, updates=()
            )
            self.trained = finetune_copy(
                trainer, pl_module, batches=3, eval_batches=1, state="quantize", zero_lr=False, updates=()
            )
            self.digests = weight_digests(pl_module)
            self.groups = take_fingerprint(trainer, pl_module, batches=1).optimizers[0]["groups"]

    model = Learned()
    model.load_state_dict(pretrained().state_dict())
    float_digests = weight_digests(model)
    looking = Looking()
    quantization = QuantizationAwareTraining(activation_scales="learned", weight_scales="learned")
    monitor = ConvergenceMonitor(float_batches=2)
    qat_trainer(tmp_path, monitor, looking, quantization=quantization, max_epochs=1, limit_train_batches=4).fit(model)
    assert looking.digests == float_digests
    assert looking.zero.changed_parameters == ()
    assert looking.zero.moved_scales == {}
    assert looking.trained.moved_scales
    assert not any("_quantization" in name for name in looking.trained.changed_parameters)
    assert not any("_quantization" in name for name in monitor.series.zero_gradients)
    assert sum(group["parameters"] for group in looking.groups) == sum(p.numel() for p in Digits().parameters())


class Skipping(Digits):
    """Two samples of the data are not finite, and the script skips such losses."""

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        images = loader.dataset.tensors[0].clone()  # type: ignore[attr-defined]
        images[70, 0, 3, 3], images[400, 0, 2, 2] = float("nan"), float("inf")
        return DataLoader(TensorDataset(images, loader.dataset.tensors[1]), batch_size=64)  # type: ignore[attr-defined]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss if torch.isfinite(loss) else None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_data_that_are_not_finite_are_named_before_what_follows(tmp_path: Path) -> None:
    """Number nine: the loss is skipped, so the statistics and the evaluation show it; the input was first."""
    model = Skipping()
    model.load_state_dict(pretrained().state_dict())
    with pytest.warns(UserWarning, match="not finite: .*First came the input that the loader delivers, batch 1 of"):
        monitor, _ = monitored(tmp_path, model, max_epochs=1, limit_val_batches=1.0)
    assert monitor.result is not None
    assert "clean them" in monitor.result.note
    assert any("running_mean" in name for name in monitor.series.bad_buffers)
