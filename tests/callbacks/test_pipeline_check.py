"""PipelineCheck: the whole ladder, one verdict, and no trace (C3 to C6)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.callbacks.convergence_monitor import ConvergenceMonitor
from lightning_qat.callbacks.pipeline_check import PipelineCheck
from lightning_qat.callbacks.pipeline_fingerprint import PipelineFingerprint
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.quantization.qconfig import QConfig
from lightning_qat.reporting.console import console_text
from tests.harness.noisy_run import Classifier, run, trainer_of
from tests.harness.planted import DominatingChannel, Planted, Sentinel, SinePlaces, SmallDivisor
from tests.harness.small_digits import Digits, digits, pretrained
from tests.harness.state import assert_same
from tests.harness.trainers import qat_trainer, quiet

AT_CHANCE = "ignore:.*PipelineCheck. cannot tell. the float model is no better than a constant guess"
"""What the check says of the untrained ``Classifier`` on random labels."""


def checked(directory: Path, model: LightningModule, **kwargs: Any) -> PipelineResult:
    """Run the check ahead of one batch of training."""
    trainer_arguments = kwargs.pop("trainer", {})
    check = PipelineCheck(**({"batches": 20} | kwargs))
    qat_trainer(directory, check, **({"max_steps": 1, "limit_val_batches": 1.0} | trainer_arguments)).fit(model)
    assert isinstance(check.result, PipelineResult)
    return check.result


# -- the source's story


def story(directory: Path, normalized: bool, *callbacks: Callback, **kwargs: Any) -> tuple[list[float], Trainer]:
    """QAT as a user runs it; returns the accuracy of the calibrated model and after every epoch."""
    seed_everything(0, verbose=False)
    model = pretrained(normalized_in_training=normalized, lr=3e-3)
    accuracy: list[float] = []

    class Watching(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            accuracy.append(float(trainer.callback_metrics["val_acc"]))

    trainer = qat_trainer(directory, Watching(), *callbacks, num_sanity_val_steps=-1, **kwargs)
    trainer.fit(model)
    return accuracy, trainer


def test_story_of_the_source(tmp_path: Path) -> None:
    """Done-when 2: calibration is fine, QAT, float finetune and lr 0 collapse: the pipeline; repaired, QAT is fine."""
    check = PipelineCheck(batches=20, at_epoch=None)
    with pytest.warns(UserWarning, match="metric collapsed|pipeline misaligned"):
        accuracy, _ = story(tmp_path, False, ConvergenceMonitor(float_batches=4), check, max_epochs=2)
    float_accuracy = 0.97
    assert accuracy[0] > float_accuracy  # calibrated
    assert accuracy[-1] < 0.9 * float_accuracy  # QAT
    result = check.result
    assert isinstance(result, PipelineResult)
    rows = {(row.rung, row.what, row.metric): row for row in result.rows}
    assert rows[4, "calibrated", "val_acc"].status == "holds"
    assert rows[3, "lr 0, BN moving", "val_acc"].status == "breaks"  # lr = 0
    assert rows[5, "float finetune", "val_acc"].status == "breaks"
    assert (result.verdict, result.rung) == ("pipeline misaligned", 3)
    assert "normalization missing here?" in result.cause  # training against validation: no reference is needed
    repaired, _ = story(tmp_path, True, max_epochs=2)
    assert repaired[-1] >= 0.99 * float_accuracy


# -- verdicts


def test_healthy_pipeline_says_what_a_reference_would_add(tmp_path: Path) -> None:
    result = checked(tmp_path, pretrained())
    assert (result.verdict, result.rung) == ("healthy", None)
    assert {row.rung for row in result.rows} == set(range(7))
    assert "python -m lightning_qat fingerprint" in result.note


def test_known_metrics_are_a_reference(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"pipeline misaligned \(rung 0, float model\)"):
        result = checked(tmp_path, Digits(), reference={"val_acc": 0.98}, rungs=[0, 2])
    assert {row.rung for row in result.rows} == {0, 2}


def test_learning_rate_is_told_from_quantization_without_a_reference(tmp_path: Path) -> None:
    """C6: the model's own answers say that the labels are right."""
    with pytest.warns(UserWarning, match=r"hyperparameters \(rung 5, float finetune\)"):
        result = checked(tmp_path, pretrained(lr=0.5), batches=36)
    assert result.rung == 5


def test_quantization_error_names_points_and_next_step(tmp_path: Path) -> None:
    """C6, F: calibration that collapses."""
    qconfig = QConfig.of({"activation": {"dtype": "int2"}, "weight": {"dtype": "int2"}})
    quantization = QuantizationAwareTraining(qconfig=qconfig)
    with pytest.warns(UserWarning, match="quantization error.*Worst points: .*SensitivityAnalysis"):
        result = checked(tmp_path, pretrained(lr=1e-6), trainer={"quantization": quantization})
    assert result.rung == 4


@pytest.mark.parametrize(
    ("model", "point"),
    [(SinePlaces, "div_0.input1"), (SmallDivisor, "div_0.input1"), (DominatingChannel, "hidden.weight")],
)
def test_worst_points_are_causes(model: type[Planted], point: str, tmp_path: Path) -> None:
    """The divisor is named, and not the quotient, which is off because of it.

    Siblings: a divisor of other values; a weight whose results are off.
    """
    quantization = QuantizationAwareTraining(qconfig=QConfig.of({"weight": {"granularity": "per_tensor"}}))
    with pytest.warns(UserWarning, match=rf"quantization error.*Worst points: {re.escape(point)} \(non-uniform: "):
        checked(tmp_path, model.pretrained(lr=1e-6), batches=5, trainer={"quantization": quantization})


def test_task_whose_error_doubles_is_not_healthy(tmp_path: Path) -> None:
    """-99 for what is missing sets the step of an input: the accuracy of one task holds, the error of the other not."""
    with pytest.warns(UserWarning, match=r"quantization error.*val_mae .* -> .*Worst points: .*input0 \(non-uniform"):
        result = checked(tmp_path, Sentinel.pretrained(lr=1e-6), batches=5)
    status = {row.metric: row.status for row in result.rows if row.what == "calibrated"}
    assert status == {"val_acc": "holds", "val_mae": "breaks"}


def test_fake_quant_that_changes_the_module_while_off_is_found(tmp_path: Path) -> None:
    """Rung 1: code that looks at its submodules."""

    class Counting(Digits):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.0 + 1e-3 * len(list(self.children())))

    model = Counting()
    model.load_state_dict(pretrained().state_dict())
    with pytest.warns(UserWarning, match=r"rung 1, inserted, off\): fake-quant that is inserted and off changes"):
        checked(tmp_path, model, rungs=[1])


def test_manual_optimization_with_several_optimizers_says_what_cannot_run(tmp_path: Path) -> None:
    class Manual(Digits):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            body, head = self.optimizers()  # type: ignore[misc]
            body.zero_grad()
            head.zero_grad()
            self.manual_backward(loss)
            body.step()
            head.step()
            return loss

        def configure_optimizers(self) -> Any:
            head = list(self.head.parameters())
            body = [p for p in self.parameters() if all(p is not q for q in head)]
            return torch.optim.SGD(body, lr=1e-3), torch.optim.Adam(head, lr=1e-3)

    model = Manual()
    model.load_state_dict(pretrained().state_dict())
    result = checked(tmp_path, model)
    assert result.verdict == "healthy", result.note
    assert {row.rung for row in result.rows if "optimizes manually" in row.note} == {5, 6}


def test_accumulation_and_several_loaders_work(tmp_path: Path) -> None:
    class Several(Digits):
        def val_dataloader(self) -> Any:
            return [super().val_dataloader(), super().test_dataloader()]

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            accuracy = (self((batch[0] - 4.884) / 6.017).argmax(1) == batch[1]).float().mean()
            self.log("acc", accuracy)

    model = Several()
    model.load_state_dict(pretrained().state_dict())
    result = checked(tmp_path, model, batches=8, trainer={"accumulate_grad_batches": 2})
    assert result.verdict == "healthy", result.note
    assert {row.metric for row in result.rows if row.rung == 6} >= {"acc/dataloader_idx_0", "acc/dataloader_idx_1"}


@pytest.mark.filterwarnings("ignore:Found 2 module.s. in eval mode at the start of training")
def test_batch_norm_that_qat_freezes_is_no_suspicious_difference(tmp_path: Path) -> None:
    """C5: asked for, so no misalignment."""
    fingerprint = PipelineFingerprint(batches=4)
    settings = quiet() | {"max_steps": 1, "limit_val_batches": 0, "default_root_dir": tmp_path / "float"}
    Trainer(callbacks=[fingerprint], **settings).fit(pretrained(lr=0.0))
    quantization = QuantizationAwareTraining(freeze_batch_norm_after=0)
    reference = str(tmp_path / "float" / "lightning_qat" / "pipeline_fingerprint.json")
    result = checked(tmp_path, pretrained(), reference=reference, rungs=[2], trainer={"quantization": quantization})
    assert not any(row.part == "modes" for row in result.differences.rows)


class Shuffled(Digits):
    """The labels of the training set in another order."""

    def train_dataloader(self) -> Any:
        images, labels = digits()
        order = torch.randperm(1200, generator=torch.Generator().manual_seed(5))
        return DataLoader(TensorDataset(images[:1200], labels[:1200][order]), batch_size=64, shuffle=True)


def test_shuffled_labels_are_convicted_before_they_do_harm(tmp_path: Path) -> None:
    """C5: no reference, and no rung breaks at so small a learning rate."""
    model = Shuffled(lr=1e-6)
    model.load_state_dict(pretrained().state_dict())
    with pytest.warns(UserWarning, match=r"pipeline misaligned: no rung breaks so soon.*labels \(train, 1\)"):
        result = checked(tmp_path, model, batches=4)
    assert "do labels and inputs belong together" in result.cause


def test_float_model_that_was_not_loaded_is_not_called_healthy(tmp_path: Path) -> None:
    """C5: at chance nothing can break; hardly trained, so that no improvement gives it away."""
    with pytest.warns(UserWarning, match="cannot tell: the float model is no better than a constant guess"):
        checked(tmp_path, Digits(lr=1e-7), batches=2)


# -- when it runs, and that nothing is changed


class Recorded(Callback):
    """Notes optimizer, schedule and random state at the end."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        schedules = [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs]
        self.states = [trainer.optimizers[0].state_dict(), schedules, torch.get_rng_state()]


class Scheduled(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": CosineAnnealingLR(optimizer, 5), "interval": "step"},
        }


@pytest.mark.filterwarnings(AT_CHANCE)
@pytest.mark.parametrize("at_epoch", [0, 1])
def test_training_with_a_check_in_the_middle_ends_bit_identical(at_epoch: int, tmp_path: Path) -> None:
    """Done-when 4; a later check looks at the start, and puts the present back."""
    ends = []
    for checks in ([], [PipelineCheck(batches=4, at_epoch=at_epoch)]):
        torch.manual_seed(0)
        model, recorded = Scheduled(), Recorded()
        trainer = trainer_of(tmp_path, *checks, recorded, max_epochs=2)
        trainer.fit(model)
        ends.append([model.state_dict(), recorded.states, dict(trainer.callback_metrics)])
    assert_same(ends[0], ends[1])


def test_later_check_looks_at_what_training_started_from(tmp_path: Path) -> None:
    """By then training has destroyed the weights; those that it started from are good."""
    check = PipelineCheck(batches=4, at_epoch=1, rungs=[2])
    accuracy: list[Any] = []

    class Watching(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            accuracy.append(trainer.callback_metrics.get("val_acc"))

    qat_trainer(tmp_path, Watching(), check, max_epochs=2, limit_val_batches=1.0).fit(pretrained(lr=0.5))
    assert accuracy[1] < 0.5
    assert check.result is not None
    assert {row.rung for row in check.result.rows} == {0, 2}
    (start,) = (row.value for row in check.result.rows if (row.rung, row.metric) == (0, "val_acc"))
    assert start > 0.95


def test_flag_at_the_end_of_training_is_followed_by_a_check(tmp_path: Path) -> None:
    """C1, C2: the monitor stops the training, and the check still runs, once."""
    check = PipelineCheck(batches=20, at_epoch=None)
    monitor = ConvergenceMonitor(stop=True, float_batches=4)
    with pytest.warns(UserWarning, match="metric collapsed|pipeline misaligned"):
        _, trainer = story(tmp_path, False, check, monitor, max_epochs=3)
    assert trainer.current_epoch == 1
    assert check.result is not None
    assert check.state_dict()["flag_done"]


def test_healthy_run_is_not_checked_after_the_fact(tmp_path: Path) -> None:
    check = PipelineCheck(batches=20, at_epoch=None)
    story(tmp_path, True, check, ConvergenceMonitor(float_batches=4), max_epochs=1)
    assert check.result is None


def test_files_tensorboard_and_both_widths_of_terminal(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    with pytest.warns(UserWarning, match="pipeline misaligned"):
        result = checked(tmp_path, pretrained(normalized_in_training=False), trainer={"logger": logger})
    data = json.loads((tmp_path / "lightning_qat" / "pipeline_check.json").read_text())
    assert (data["verdict"], data["rung"], data["cause"]) == (result.verdict, result.rung, result.cause)
    assert data["stages"]["rows"]
    text = (tmp_path / "lightning_qat" / "pipeline_check.txt").read_text()
    assert result.note in text
    assert "Training against validation" in text
    events = EventAccumulator(str(tmp_path)).Reload()
    shown = events.Tensors("pipeline_check/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "lr 0, BN moving" in shown
    assert "Training against validation" in shown
    for width in (80, 120):
        lines = console_text(result, width).splitlines()
        assert max(map(len, lines)) <= width
        assert "…" not in "".join(lines)
        assert "Training against validation" in [line.strip() for line in lines]


@pytest.mark.filterwarnings(AT_CHANCE)
@pytest.mark.parametrize(
    "settings",
    [
        {"fast_dev_run": True},
        {"limit_val_batches": 0},
        {"quantization": QuantizationAwareTraining(start_epoch=1)},
        {"precision": "bf16-mixed"},
    ],
    ids=["fast_dev_run", "no validation", "not calibrated yet", "bf16"],
)
def test_unusual_runs_are_checked_without_an_error(settings: dict[str, Any], tmp_path: Path) -> None:
    check = PipelineCheck(batches=2)
    if "limit_val_batches" in settings:
        with pytest.warns(UserWarning, match="no finite number to judge by"):
            run(tmp_path, check, max_epochs=1, **settings)
    else:
        run(tmp_path, check, max_epochs=1, **settings)
    assert check.result is not None
    assert "failed" not in check.result.note
    if "fast_dev_run" in settings:
        assert not list(tmp_path.rglob("*.json"))


@pytest.mark.filterwarnings(AT_CHANCE)
def test_resumed_run_is_not_compared_with_the_reference(tmp_path: Path) -> None:
    _, trainer = run(tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    check = PipelineCheck(batches=2, at_epoch=1, reference={"val_accuracy": 1.0}, rungs=[2])
    with pytest.warns(UserWarning, match="does not compare this run with the reference"):
        trainer_of(tmp_path, check, max_epochs=2).fit(Classifier(), ckpt_path=tmp_path / "one.ckpt")
    assert check.result is not None
    assert all(row.status in ("holds", "noted") for row in check.result.rows)
    assert check.result.verdict == "cannot tell"  # untrained, on random labels


# -- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": 0}, r"batches=0\): must be at least 1"),
        ({"rungs": [7]}, r"rungs=\[7\]\): write numbers from 0 to 6"),
        ({"rungs": []}, r"rungs=\[\]\): write numbers"),
        ({"at_epoch": None, "after_flag": False}, "never runs"),
        ({"reference": 0.98}, "write the path of a fingerprint"),
        ({"reference": {"val_acc": "0.98"}}, r"reference=\{'val_acc': '0.98'\}\): write a number"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        PipelineCheck(**arguments)


def test_metric_that_is_not_logged_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C4: the same early error as that of ZeroLRFinetune."""
    monkeypatch.setattr("lightning_qat.callbacks.ladder.ladder.finetune_copy", lambda *_, **__: pytest.fail("trained"))
    message = r"PipelineCheck\(reference=...\).*'val_ac': did you mean 'val_acc'.*Choices: .*val_acc, train_loss"
    with pytest.raises(MisconfigurationException, match=message):
        checked(tmp_path, pretrained(), reference={"train_loss": 0.1, "val_ac": 0.98})


def test_missing_fingerprint_is_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(
        MisconfigurationException,
        match=r"nowhere.json is not a fingerprint: there is no such file; make it in the float",
    ):
        checked(tmp_path, pretrained(), reference="nowhere.json")


# -- several processes


@pytest.mark.filterwarnings(AT_CHANCE)
@pytest.mark.filterwarnings("ignore:this strategy trains in child processes")
@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks")
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
def test_two_ranks_have_one_verdict_and_stay_in_sync(tmp_path: Path) -> None:
    """Done-when 4."""

    class Ranks(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            check = next(c for c in trainer.callbacks if isinstance(c, PipelineCheck))  # type: ignore[attr-defined]
            assert check.result is not None
            weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
            torch.save([check.result.note, weights], tmp_path / f"{trainer.global_rank}.pt")

    check = PipelineCheck(batches=4)
    settings: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2, "max_epochs": 1}
    trainer_of(tmp_path, check, Ranks(), **settings).fit(Classifier())
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])
