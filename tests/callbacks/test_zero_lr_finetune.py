"""ZeroLRFinetune: learning rate 0 on a copy (C4, C6), without disturbing the run."""

from __future__ import annotations

import json
from functools import partial, update_wrapper
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR
from torch.utils.data import DataLoader

from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.callbacks.ladder.finetune_copy import finetune_copy
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.callbacks.zero_lr_finetune import ZeroLRFinetune
from tests.harness.noisy_run import Classifier, run, trainer_of
from tests.harness.small_digits import Digits, pretrained
from tests.harness.state import assert_same
from tests.harness.trainers import qat_trainer

AT_CHANCE = "ignore:.*ZeroLRFinetune. cannot tell. the float model is no better than a constant guess"
"""What the check says of the untrained ``Classifier`` on random labels."""
OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": partial(torch.optim.Adam, lr=0.1, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=torch.tensor(0.1), weight_decay=0.1),
}
SCHEDULERS: dict[str, Any] = {
    "linear": partial(LinearLR, start_factor=0.1, total_iters=4),
    "one_cycle": partial(OneCycleLR, max_lr=1.0, total_steps=50),
    "cosine": partial(CosineAnnealingLR, T_max=3),
}


class Configured(Classifier):
    """The small classifier with any optimizer and a scheduler that is stepped with it."""

    def __init__(self, optimizer: Any = OPTIMIZERS["adamw"], scheduler: Any = None) -> None:
        super().__init__()
        self.make_optimizer, self.make_scheduler = optimizer, scheduler

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Finetuned(Callback):
    """Finetunes copies in the middle of the first epoch, where optimizers and schedulers have state."""

    def __init__(self, at: int = 1, **kwargs: Any) -> None:
        self.at = at
        self.settings: dict[str, Any] = {"batches": 7, "eval_batches": 1, "state": "off", "zero_lr": True} | kwargs

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 0 and batch_idx == self.at:
            self.finetune = finetune_copy(trainer, pl_module, **self.settings)


def fitted(directory: Path, model: LightningModule, *callbacks: Callback, **kwargs: Any) -> Trainer:
    trainer = trainer_of(directory, *callbacks, **kwargs)
    trainer.fit(model)
    return trainer


def checked(directory: Path, model: LightningModule, **kwargs: Any) -> PipelineResult:
    """Run the check ahead of one batch of training."""
    check = ZeroLRFinetune(batches=20, **kwargs)
    qat_trainer(directory, check, limit_train_batches=1, limit_val_batches=1.0).fit(model)
    assert check.result is not None
    return check.result


# -- weights at learning rate 0


@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_of_the_copy_stay_bit_identical(optimizer: str, scheduler: str | None, tmp_path: Path) -> None:
    """C4: under momentum, weight decay and schedules that raise the learning rate."""
    callback = Finetuned()
    fitted(tmp_path, Configured(OPTIMIZERS[optimizer], SCHEDULERS.get(scheduler or "")), callback, max_epochs=1)
    assert callback.finetune.batches == 7
    assert callback.finetune.changed_parameters == ()
    assert callback.finetune.learning_rates is not None
    assert callback.finetune.learning_rates[1] > 0  # the schedule went on


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_stay_with_accumulation_and_clipping(accumulate: int, tmp_path: Path) -> None:
    """C4."""
    callback = Finetuned()
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.1}
    fitted(tmp_path, Configured(), callback, max_epochs=1, **settings)
    assert callback.finetune.changed_parameters == ()


def test_batch_norm_drift_and_scale_drift_are_reported_separately(tmp_path: Path) -> None:
    """C4: both move at learning rate 0, and neither is a weight."""
    frozen, moving = Finetuned(freeze_batch_norm=True), Finetuned()
    quantized = Finetuned(state="quantize", updates=("weight", "activation"))
    fitted(tmp_path, Configured(), frozen, moving, quantized, max_epochs=1)
    assert (frozen.finetune.moved_buffers, frozen.finetune.moved_scales) == ({}, {})
    assert set(moving.finetune.moved_buffers) == {"bn.running_mean", "bn.running_var"}
    assert moving.finetune.moved_scales == {}
    assert set(quantized.finetune.moved_buffers) == {"bn.running_mean", "bn.running_var"}
    assert {"conv.input0", "head.output"} & set(quantized.finetune.moved_scales)
    changes = list(moving.finetune.moved_buffers.values())
    assert changes == sorted(changes, reverse=True)


def test_optimizer_that_moves_at_learning_rate_0_is_convicted(tmp_path: Path) -> None:
    """C4, rung 2."""

    class Stubborn(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            if closure is not None:
                closure()
            for parameter in self.param_groups[0]["params"]:
                parameter.mul_(0.999)

    with pytest.warns(UserWarning, match="weights change although the learning rate is 0.*optimizer's own step"):
        fitted(tmp_path, Configured(partial(Stubborn, lr=0.1)), ZeroLRFinetune(batches=3), max_epochs=1)


def test_step_that_writes_weights_is_convicted(tmp_path: Path) -> None:
    """C4, rung 2: an average that is swapped in, a clamp."""

    class Clamped(Classifier):
        def on_train_batch_end(self, *args: Any) -> None:
            self.head.weight.data.clamp_(-0.1, 0.1)

    with pytest.warns(UserWarning, match=r"\(head.weight\): something other than the optimizer"):
        fitted(tmp_path, Clamped(), ZeroLRFinetune(batches=3), max_epochs=1)


def test_hook_that_sets_the_learning_rate_cannot_move_weights(tmp_path: Path) -> None:
    """C4: a warm-up in optimizer_step."""

    class WarmUp(Classifier):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    callback = Finetuned()
    fitted(tmp_path, WarmUp(), callback, max_epochs=1)
    assert callback.finetune.changed_parameters == ()


def test_frozen_layers_stay_in_eval_mode_in_the_copy(tmp_path: Path) -> None:
    """Lightning leaves the modes that the user set."""

    class Frozen(Classifier):
        def on_train_start(self) -> None:
            self.bn.eval()

    callback = Finetuned()
    fitted(tmp_path, Frozen(), callback, max_epochs=1)
    assert callback.finetune.moved_buffers == {}


@pytest.mark.filterwarnings(AT_CHANCE)
@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode at the start of training")
def test_batch_norm_frozen_by_qat_is_not_judged_as_moving(tmp_path: Path) -> None:
    """C4: who has followed the advice must not get it again."""
    check = ZeroLRFinetune(batches=3)
    fitted(
        tmp_path, Classifier(), check, max_epochs=1, quantization=QuantizationAwareTraining(freeze_batch_norm_after=0)
    )
    assert check.result is not None
    assert next(r for r in check.result.rows if r.rung == 3).note == "no batch norm moves in this training"


# -- the run goes on as if nothing had been


class Recorded(Callback):
    """Notes optimizer and schedulers at the end."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        states = [trainer.optimizers[0].state_dict(), [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs]]
        self.states = states
        self.rng = torch.get_rng_state()


@pytest.mark.filterwarnings(AT_CHANCE)
@pytest.mark.parametrize("scheduler", ["one_cycle", "cosine"])
def test_run_is_not_disturbed(scheduler: str, tmp_path: Path) -> None:
    """C4: weights, optimizer, schedule, random state, batch norm and metrics end bit-identical."""
    ends = []
    for checks in ([], [ZeroLRFinetune(batches=5)]):
        torch.manual_seed(0)
        model, recorded = Configured(OPTIMIZERS["adam"], SCHEDULERS[scheduler]), Recorded()
        settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
        trainer = fitted(tmp_path, model, *checks, recorded, **settings)
        modes = [m.training for m in model.modules()]
        ends.append([model.state_dict(), recorded.states, recorded.rng, dict(trainer.callback_metrics), modes])
    assert_same(ends[0], ends[1])


def test_optimizer_bound_to_the_instance_never_steps_the_weights_of_the_run(tmp_path: Path) -> None:
    """C4: LightningCLI builds it from the original parameters and patches configure_optimizers on the instance."""
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def configure_optimizers(self: Classifier, optimizer: Any) -> Any:
        return optimizer

    bound = update_wrapper(partial(configure_optimizers, optimizer=optimizer), configure_optimizers)
    model.configure_optimizers = MethodType(bound, model)  # type: ignore[method-assign]
    seen: dict[str, bool] = {}

    class Watching(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
            finetune = finetune_copy(trainer, pl_module, batches=3, eval_batches=1, state="off", zero_lr=False)
            seen["moved"] = bool(finetune.changed_parameters)
            seen["same"] = all(torch.equal(p, before[name]) for name, p in pl_module.named_parameters())
            seen["fresh"] = not optimizer.state

    fitted(tmp_path, model, Watching(), max_epochs=1, limit_train_batches=1)
    assert seen == {"moved": True, "same": True, "fresh": True}


def test_step_that_asks_for_optimizers_and_schedulers_gets_those_of_the_copy(tmp_path: Path) -> None:
    """C4: otherwise the schedule of the run would be stepped."""

    class Stepping(Configured):
        def on_train_batch_end(self, *args: Any) -> None:
            self.lr_schedulers().step()  # type: ignore[union-attr]
            assert self.optimizers() is not None

    recorded, plain = Recorded(), Recorded()
    fitted(tmp_path, Stepping(scheduler=SCHEDULERS["linear"]), plain, max_epochs=1)
    fitted(tmp_path, Stepping(scheduler=SCHEDULERS["linear"]), ZeroLRFinetune(batches=4), recorded, max_epochs=1)
    assert_same(plain.states[1], recorded.states[1])


# -- the source's story


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_healthy_pipeline_is_found_healthy(seed: int, tmp_path: Path) -> None:
    """C4: no false alarm."""
    result = checked(tmp_path, pretrained(seed))
    assert result.verdict == "healthy", result.note
    assert all(r.status in ("holds", "noted") for r in result.rows), result.rows


def test_normalization_missing_in_training_is_found(tmp_path: Path) -> None:
    """C4, C6: calibration is fine, QAT would collapse, and quantization is innocent."""
    with pytest.warns(UserWarning, match=r"pipeline misaligned \(rung 3, .*\): accuracy collapses at learning rate 0"):
        result = checked(tmp_path, pretrained(normalized_in_training=False))
    assert result.verdict == "pipeline misaligned"
    rows = {(r.rung, r.metric): r for r in result.rows}
    assert rows[2, "val_acc"].status == "holds"
    assert rows[3, "val_acc"].status == "breaks"
    assert rows[3, "val_acc"].value is not None
    assert rows[3, "val_acc"].value < 0.6
    assert "bn1.running" in result.note
    assert "Quantization is not the cause; do not tune learning rate" in result.note  # C2


def test_learning_rate_does_not_matter_at_learning_rate_0(tmp_path: Path) -> None:
    """C6: whatever the learning rate of the run is."""
    assert checked(tmp_path, pretrained(lr=1.0)).verdict == "healthy"


def test_reference_that_is_missed_is_found(tmp_path: Path) -> None:
    """C4, rung 0."""
    with pytest.warns(UserWarning, match="does not reproduce its own accuracy here .val_acc 0.99 -> "):
        result = checked(tmp_path, Digits(), reference={"val_acc": 0.99})  # untrained: the wrong checkpoint
    assert result.verdict == "pipeline misaligned"


def test_reference_of_a_metric_that_is_not_logged_is_an_error_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C4: a slip of the pen must not cost the whole check."""
    monkeypatch.setattr("lightning_qat.callbacks.ladder.ladder.finetune_copy", lambda *_, **__: pytest.fail("trained"))
    message = r"ZeroLRFinetune\(reference=...\).*'val_ac': did you mean 'val_acc'.*Choices: .*val_acc, train_loss"
    with pytest.raises(MisconfigurationException, match=message):
        checked(tmp_path, Digits(), reference={"train_loss": 0.1, "val_ac": 0.98})


def test_such_a_reference_does_not_end_a_run_that_has_begun(tmp_path: Path) -> None:
    check = ZeroLRFinetune(batches=2, at_epoch=1, reference={"val_ac": 0.98})
    trainer = qat_trainer(tmp_path, check, max_epochs=2, limit_train_batches=2)
    with pytest.warns(UserWarning, match=r"cannot tell: .*did you mean 'val_acc'.*Training goes on") as warned:
        trainer.fit(pretrained())
    assert not any("cannot be copied" in str(w.message) for w in warned)
    assert trainer.global_step == 4


# -- modules of all kinds


def test_manual_optimization_is_checked_without_its_optimizers(tmp_path: Path) -> None:
    """C4: what optimizes does nothing, which is learning rate 0."""

    class Manual(Digits):
        automatic_optimization = False

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer: Any = self.optimizers()
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return loss

    model = Manual(normalized_in_training=False)
    model.load_state_dict(pretrained().state_dict())
    with pytest.warns(UserWarning, match="pipeline misaligned"):
        result = checked(tmp_path, model)
    assert result.verdict == "pipeline misaligned"
    assert any(r.metric == "train_loss" for r in result.rows)


@pytest.mark.parametrize("output", ["none", "dict"])
def test_step_may_return_nothing_or_a_dictionary(output: str, tmp_path: Path) -> None:
    class Returning(Digits):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if output == "none" else {"loss": loss, "more": 1}

    model = Returning()
    model.load_state_dict(pretrained().state_dict())
    if output == "none":
        with pytest.warns(UserWarning, match="`training_step` returned `None`"):
            result = checked(tmp_path, model)
    else:
        result = checked(tmp_path, model)
    assert result.verdict == "healthy"
    assert any(r.metric == "train_loss" for r in result.rows) == (output == "dict")


def test_several_validation_loaders_are_judged_one_by_one(tmp_path: Path) -> None:
    class Two(Digits):
        def val_dataloader(self) -> Any:
            return [super().val_dataloader(), super().test_dataloader()]

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            accuracy = (self((batch[0] - 4.884) / 6.017).argmax(1) == batch[1]).float().mean()
            self.log("acc", accuracy)

    model = Two(normalized_in_training=False)
    model.load_state_dict(pretrained().state_dict())
    with pytest.warns(UserWarning, match="pipeline misaligned"):
        result = checked(tmp_path, model)
    names = {r.metric for r in result.rows if r.rung == 3 and r.status == "breaks"}
    assert names == {"acc/dataloader_idx_0", "acc/dataloader_idx_1"}


def test_without_validation_data_the_training_step_is_evaluated(tmp_path: Path) -> None:
    """Its loss is all there is."""

    class TrainingOnly(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 2)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss: Tensor = self.body(batch).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(torch.randn(16, 4), batch_size=4)  # type: ignore[arg-type]

    check = ZeroLRFinetune(batches=3)
    trainer_of(tmp_path, check, max_epochs=1).fit(TrainingOnly())
    assert check.result is not None
    assert check.result.verdict == "healthy", check.result.note
    assert "'loss'" in check.result.note


def test_module_that_cannot_be_copied_gets_no_verdict_and_is_trained(tmp_path: Path) -> None:
    """The check must not take the run with it."""

    class Uncopied(Classifier):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot pickle 'generator' object")

    check = ZeroLRFinetune(batches=3, stop=True)
    with pytest.warns(UserWarning, match="cannot tell: the check failed with TypeError: cannot pickle 'generator'"):
        trainer = fitted(tmp_path, Uncopied(), check, max_epochs=1)
    assert trainer.global_step == 3


def test_without_validation_batches_it_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"no finite number to judge by.*limit_val_batches"):
        run(tmp_path, ZeroLRFinetune(batches=2), max_epochs=1, limit_val_batches=0)


# -- when it runs and what it leaves


@pytest.mark.filterwarnings(AT_CHANCE)
def test_runs_once_and_resuming_does_not_repeat_it(tmp_path: Path) -> None:
    """Foundation 7."""
    check = ZeroLRFinetune(batches=2)
    _, trainer = run(tmp_path, check, max_epochs=1)
    assert check.result is not None
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = ZeroLRFinetune(batches=2)
    trainer_of(tmp_path, resumed, max_epochs=2).fit(Classifier(), ckpt_path=tmp_path / "one.ckpt")
    assert resumed.result is None


@pytest.mark.filterwarnings(AT_CHANCE)
def test_two_checks_at_different_epochs_are_kept_apart(tmp_path: Path) -> None:
    early, late = ZeroLRFinetune(batches=2), ZeroLRFinetune(batches=2, at_epoch=1)
    with pytest.warns(UserWarning, match=r"ZeroLRFinetune\(at_epoch=1\) did not run"):
        _, trainer = run(tmp_path, early, late, max_epochs=1)
    assert early.result is not None
    assert late.result is None
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    early, late = ZeroLRFinetune(batches=2), ZeroLRFinetune(batches=2, at_epoch=1)
    trainer_of(tmp_path, early, late, max_epochs=2).fit(Classifier(), ckpt_path=tmp_path / "one.ckpt")
    assert early.result is None
    assert late.result is not None


@pytest.mark.filterwarnings(AT_CHANCE)
def test_a_second_fit_that_goes_on_does_not_miss_a_check_of_the_first(tmp_path: Path) -> None:
    """A third one neither; a check that has never run is missed."""
    check, missed = ZeroLRFinetune(batches=2), ZeroLRFinetune(batches=2, at_epoch=7)
    with pytest.warns(UserWarning, match=r"ZeroLRFinetune\(at_epoch=7\) did not run"):
        module, trainer = run(tmp_path, check, missed, max_epochs=1)
    result = check.result
    for epochs in (2, 3):
        trainer.fit_loop.max_epochs = epochs
        with pytest.warns(UserWarning, match="did not run") as caught:
            trainer.fit(module)
        said = [str(w.message) for w in caught if "did not run" in str(w.message)]
        assert len(said) == 1
        assert "at_epoch=7" in said[0]
    assert check.result is result
    assert check.state_dict() == {"done": True}


def test_epoch_that_never_comes_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"ZeroLRFinetune\(at_epoch=7\) did not run"):
        run(tmp_path, ZeroLRFinetune(at_epoch=7), max_epochs=1)


def test_stop_ends_the_run_before_the_first_step(tmp_path: Path) -> None:
    """C4, with callbacks that monitor what was never logged."""
    check = ZeroLRFinetune(batches=20, stop=True)
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_acc")
    trainer = qat_trainer(tmp_path, check, checkpoint, max_epochs=3, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="pipeline misaligned"):
        trainer.fit(pretrained(normalized_in_training=False))
    assert trainer.global_step == 0


@pytest.mark.parametrize("settings", [{"stop": False}, {"stop": True, "batches": 3}])
def test_run_goes_on_without_stop_or_without_a_bad_verdict(settings: Any, tmp_path: Path) -> None:
    model = pretrained(normalized_in_training=settings["stop"])
    trainer = qat_trainer(tmp_path, ZeroLRFinetune(**{"batches": 20, **settings}), limit_train_batches=2)
    if settings["stop"]:
        trainer.fit(model)
    else:
        with pytest.warns(UserWarning, match="pipeline misaligned"):
            trainer.fit(model)
    assert trainer.global_step == 2


@pytest.mark.filterwarnings(AT_CHANCE)
def test_files_and_tensorboard_hold_evidence_and_verdict(tmp_path: Path) -> None:
    """Foundation 8."""
    check = ZeroLRFinetune(batches=2)
    _, trainer = run(tmp_path, check, max_epochs=1, logger=TensorBoardLogger(tmp_path))
    directory = Path(str(trainer.log_dir)) / "lightning_qat"
    assert {p.name for p in directory.iterdir()} == {
        "zero_lr_finetune.txt",
        "zero_lr_finetune.json",
        "quant_plan.json",
    }
    data = json.loads((directory / "zero_lr_finetune.json").read_text())
    assert check.result is not None
    assert (data["verdict"], data["note"]) == (check.result.verdict, check.result.note)
    assert len(data["rows"]) == len(check.result.rows)
    assert check.result.note in (directory / "zero_lr_finetune.txt").read_text()
    events = EventAccumulator(str(trainer.log_dir)).Reload()
    text = events.Tensors("zero_lr_finetune/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "no better than a constant guess" in text
    assert "lr 0, BN moving" in text


@pytest.mark.filterwarnings(AT_CHANCE)
def test_fast_dev_run_leaves_no_files(tmp_path: Path) -> None:
    run(tmp_path, ZeroLRFinetune(), fast_dev_run=True)
    assert not list(tmp_path.rglob("*.json"))


def test_bad_arguments_are_refused() -> None:
    """Bad input."""
    with pytest.raises(MisconfigurationException, match=r"ZeroLRFinetune\(batches=0\): must be at least 1"):
        ZeroLRFinetune(batches=0)
    with pytest.raises(MisconfigurationException, match=r"at_epoch=-1\): must be at least 0"):
        ZeroLRFinetune(at_epoch=-1)
    with pytest.raises(MisconfigurationException, match=r"'val_acc': '98%'.*write a number, such as 0.98"):
        ZeroLRFinetune(reference={"val_acc": "98%"})  # type: ignore[dict-item]


def test_without_fake_quants_it_says_what_to_list(tmp_path: Path) -> None:
    """Bad input."""
    trainer = Trainer(
        accelerator="cpu", default_root_dir=tmp_path, logger=False, callbacks=[ZeroLRFinetune()], fast_dev_run=True
    )
    with pytest.raises(MisconfigurationException, match="ZeroLRFinetune needs fake-quants"):
        trainer.fit(Classifier())


# -- several processes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this strategy trains in child processes")
def test_two_ranks_agree_and_stay_in_sync(tmp_path: Path) -> None:
    """Foundation 7: one verdict on all ranks, and the replicas are not disturbed."""

    class Ranks(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            check = next(c for c in trainer.callbacks if isinstance(c, ZeroLRFinetune))  # type: ignore[attr-defined]
            weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
            state = {"result": check.result, "weights": weights}
            torch.save(state, tmp_path / f"{trainer.global_rank}.pt")

    trainer = qat_trainer(
        tmp_path, ZeroLRFinetune(batches=4), Ranks(), devices=2, strategy="ddp_fork", limit_train_batches=3
    )
    trainer.fit(pretrained())
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert one["result"] == two["result"]
    assert one["result"].verdict == "healthy", one["result"].note
    assert torch.equal(one["weights"], two["weights"])


def test_float_model_that_was_not_loaded_is_not_called_healthy(tmp_path: Path) -> None:
    """At chance nothing can break, whatever the training code does."""
    with pytest.warns(UserWarning, match="cannot tell: the float model is no better than a constant guess"):
        result = checked(tmp_path, Digits(lr=1e-7))
    assert result.verdict == "cannot tell"
