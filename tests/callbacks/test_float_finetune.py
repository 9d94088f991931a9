"""FloatFinetune: QAT's training without fake-quant, on a copy (C3, C6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR, OneCycleLR, StepLR

from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.callbacks.float_finetune import FloatFinetune
from lightning_qat.callbacks.ladder.finetune_copy import finetune_copy
from lightning_qat.callbacks.ladder.pipeline_callback import PipelineCallback
from lightning_qat.callbacks.pipeline_fingerprint import PipelineFingerprint
from lightning_qat.callbacks.zero_lr_finetune import ZeroLRFinetune
from tests.harness.small_digits import Digits, pretrained
from tests.harness.state import assert_same
from tests.harness.trainers import qat_trainer, trainer


def checked(directory: Path, model: LightningModule, *before: Callback, **kwargs: Any) -> PipelineResult:
    """Run the check ahead of one batch of training."""
    return checked_by(FloatFinetune(**({"batches": 36} | kwargs)), directory, model, *before)


def checked_by(check: PipelineCallback, directory: Path, model: LightningModule, *before: Callback) -> PipelineResult:
    qat_trainer(directory, *before, check, limit_train_batches=1.0, max_epochs=1, max_steps=1).fit(model)
    assert check.result is not None
    return check.result


# -- the source's story


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_healthy_training_is_found_healthy(seed: int, tmp_path: Path) -> None:
    """C3, C6: what is left is quantization."""
    result = checked(tmp_path, pretrained(seed))
    assert result.verdict == "healthy", result.note
    assert "36 batches" in result.note
    assert "SensitivityAnalysis()" in result.note


def test_misaligned_pipeline_collapses_in_float_too(tmp_path: Path) -> None:
    """C3: 0 / 0 without quantization as well; alone it cannot tell the pipeline from the hyperparameters."""
    with pytest.warns(
        UserWarning, match=r"pipeline or hyperparameters \(rung 5, float finetune\): the float model collapses too"
    ):
        result = checked(tmp_path, pretrained(normalized_in_training=False), batches=20)
    assert "quantization is not the cause" in result.note
    assert "ZeroLRFinetune(), listed before FloatFinetune(), tells" in result.note


def test_after_zero_lr_finetune_a_misaligned_pipeline_is_called_so(tmp_path: Path) -> None:
    """C4, C6."""
    zero = ZeroLRFinetune(batches=20)
    with pytest.warns(UserWarning, match="pipeline misaligned"):
        result = checked(tmp_path, pretrained(normalized_in_training=False), zero, batches=20)
    assert result.verdict == "pipeline misaligned"


def test_learning_rate_100_times_too_large_is_called_a_hyperparameter(tmp_path: Path) -> None:
    """C3, C6: at learning rate 0 all is well."""
    zero = ZeroLRFinetune(batches=20)
    with pytest.warns(
        UserWarning, match=r"FloatFinetune: hyperparameters \(rung 5, float finetune\): the float model collapses"
    ):
        result = checked(tmp_path, pretrained(lr=0.3), zero)
    assert zero.result is not None
    assert zero.result.verdict == "healthy"
    assert result.verdict == "hyperparameters"
    assert "(lr 0.3)" in result.note
    assert "lower the learning rate" in result.note


def test_real_collapse_of_qat_follows_a_misaligned_pipeline_and_calibration_is_fine(tmp_path: Path) -> None:
    """C1, C4: the story of the source, 73.4 after calibration and 0 after QAT."""
    model = pretrained(normalized_in_training=False)
    accuracy: list[float] = []

    class Watching(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            accuracy.append(float(trainer.callback_metrics["val_acc"]))

    qat_trainer(tmp_path, Watching(), num_sanity_val_steps=-1).fit(model)
    assert accuracy[0] > 0.9  # calibrated
    assert accuracy[-1] < 0.9 * accuracy[0]


# -- the float run as reference

ONE_STEP = "ignore:.*(Float|ZeroLR)Finetune. (cannot tell|pipeline misaligned|hyperparameters)"
CHECKS = pytest.mark.parametrize("check", [FloatFinetune, ZeroLRFinetune])


@pytest.fixture(scope="module")
def float_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Tensor]]:
    """The fingerprint of a float run, and the weights that it ends with."""
    return ended_float_run(tmp_path_factory.mktemp("float"), pretrained(lr=1e-4))


def ended_float_run(directory: Path, model: LightningModule) -> tuple[str, dict[str, Tensor]]:
    trainer(directory, PipelineFingerprint(batches=4), max_steps=1).fit(model)
    return str(directory / "lightning_qat" / "pipeline_fingerprint.json"), model.state_dict()


def loaded(model: Digits, weights: dict[str, Tensor]) -> Digits:
    model.load_state_dict(weights)
    return model


@CHECKS
@pytest.mark.filterwarnings(ONE_STEP)
def test_float_model_at_chance_is_not_called_healthy(check: type[FloatFinetune], tmp_path: Path) -> None:
    """Nothing can break there, in either of the single checks; hardly trained, so that no improvement tells it."""
    result = checked_by(check(batches=4), tmp_path, Digits(lr=1e-7))
    assert result.verdict == "cannot tell"
    assert "the float model is no better than a constant guess" in result.note


@CHECKS
@pytest.mark.filterwarnings(ONE_STEP)
def test_fingerprint_of_the_float_run_is_a_reference(
    check: type[FloatFinetune], float_run: tuple[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    """The same weights are healthy, others are convicted with the cause."""
    reference, weights = float_run
    result = checked_by(check(batches=8, reference=reference), tmp_path, loaded(Digits(lr=1e-4), weights))
    assert result.verdict == "healthy", result.note
    assert "without a reference" not in result.note
    result = checked_by(check(batches=8, reference=reference), tmp_path, Digits(lr=1e-7))
    assert (result.verdict, result.rung) == ("pipeline misaligned", 0)
    assert "weights" in result.cause


@CHECKS
def test_float_run_at_chance_excuses_a_model_at_chance(check: type[FloatFinetune], tmp_path: Path) -> None:
    """No healthy run is called sick: the fingerprint says that the float model was no better."""
    reference, weights = ended_float_run(tmp_path / "float", Digits(lr=1e-7))
    result = checked_by(check(batches=4, reference=reference), tmp_path, loaded(Digits(lr=1e-7), weights))
    assert result.verdict == "healthy", result.note


@pytest.mark.filterwarnings(ONE_STEP)
def test_with_a_fingerprint_a_collapse_has_one_cause(float_run: tuple[str, dict[str, Tensor]], tmp_path: Path) -> None:
    """Without ZeroLRFinetune: what differs from the float run, or the hyperparameters if nothing does."""
    reference, weights = float_run
    result = checked_by(FloatFinetune(batches=20, reference=reference), tmp_path, loaded(Digits(lr=0.3), weights))
    assert result.verdict == "hyperparameters", result.note
    other = loaded(pretrained(normalized_in_training=False), weights)
    result = checked_by(FloatFinetune(batches=20, reference=reference), tmp_path, other)
    assert result.verdict == "pipeline misaligned", result.note
    assert "normalization" in result.cause


@CHECKS
@pytest.mark.parametrize("reference", [["val_acc"], {"val_acc": "high"}, "nowhere.json"])
def test_what_is_no_reference_is_refused(check: type[FloatFinetune], reference: Any, tmp_path: Path) -> None:
    """Before the first step, in one sentence with the callback's name or the file's."""
    with pytest.raises(MisconfigurationException, match=rf"{check.__name__}\(reference=|nowhere\.json"):
        checked_by(check(reference=reference), tmp_path, Digits())


# -- the same training as the run's


class Hooked(Digits):
    """Everything that decides how weights move: accumulation, clipping, schedules, hooks, frozen layers."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        by_step = {"scheduler": LinearLR(optimizer, 0.1, total_iters=9), "interval": "step", "frequency": 2}
        by_epoch = {"scheduler": StepLR(optimizer, 1, gamma=0.5), "interval": "epoch"}
        return [optimizer], [by_step, by_epoch]

    def on_after_backward(self) -> None:
        assert self.head.bias.grad is not None
        self.head.bias.grad *= 0.5

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        with torch.no_grad():
            self.conv1.weight.clamp_(-0.5, 0.5)

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        return torch.utils.data.DataLoader(loader.dataset, batch_size=100)  # in order: both see the same


@pytest.mark.parametrize("accumulate", [1, 2, 5])
def test_copy_is_trained_as_lightning_trains(accumulate: int, tmp_path: Path) -> None:
    """C3: "same code, data, hyperparameters": bit for bit the weights that two epochs of a float Trainer give."""
    trained: dict[str, Tensor] = {}

    class Comparing(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            original = torch.nn.Module.state_dict

            class Kept(Exception):
                pass

            import lightning_qat.callbacks.ladder.finetune_copy as module

            measure = module.measure

            def keep(trainer: Any, pl_module: Any, limit: float, copy: Any = None) -> Any:
                trained.update({k: v.clone() for k, v in original(copy).items() if isinstance(v, Tensor)})
                return measure(trainer, pl_module, limit, copy)

            module.measure = keep
            try:
                finetune_copy(trainer, pl_module, batches=24, eval_batches=1, state="off", zero_lr=False)
            finally:
                module.measure = measure

    settings: dict[str, Any] = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.3}
    model = Hooked()
    model.load_state_dict(pretrained().state_dict())
    qat_trainer(tmp_path, Comparing(), max_steps=1, **settings).fit(model)

    plain = Hooked()
    plain.load_state_dict(pretrained().state_dict())
    reference = qat_trainer(tmp_path, max_epochs=2, **settings)
    reference.callbacks = []  # type: ignore[attr-defined]
    reference.fit(plain)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(trained[name], tensor), name


def test_gradients_scaled_for_float16_train_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C3: the gradient scaler's factor is taken out again; where it overflows the step is skipped and it is halved."""
    finetunes = []

    class Finetuned(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            for scale in (1.0, 2.0**10, 2.0**140):
                monkeypatch.setattr("lightning_qat.callbacks.ladder.training_copy._loss_scale", lambda trainer: scale)  # noqa: B023
                finetunes.append(
                    finetune_copy(trainer, pl_module, batches=5, eval_batches=9, state="off", zero_lr=False)
                )

    qat_trainer(tmp_path, Finetuned(), max_steps=1).fit(pretrained())
    plain, scaled, overflown = finetunes
    assert scaled.after.metrics == plain.after.metrics
    assert scaled.train_loss == plain.train_loss
    assert overflown.changed_parameters == ()


def test_run_is_not_disturbed(tmp_path: Path) -> None:
    """C3: it ends bit-identical with and without the check."""
    ends = []
    for checks in ([], [FloatFinetune(batches=5)]):
        torch.manual_seed(0)
        model = pretrained()
        trainer = qat_trainer(tmp_path, *checks, limit_train_batches=4, max_epochs=2)
        states: list[Any] = []

        class Watching(Callback):
            def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
                states.append([trainer.optimizers[0].state_dict(), torch.get_rng_state()])  # noqa: B023

        trainer.callbacks.append(Watching())  # type: ignore[attr-defined]
        trainer.fit(model)
        ends.append([model.state_dict(), states, dict(trainer.callback_metrics)])
    assert_same(ends[0], ends[1])


def test_closure_of_lbfgs_is_served(tmp_path: Path) -> None:
    """C3: automatic optimization knows optimizers that call the closure themselves."""

    class Second(Digits):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=1e-3, max_iter=2)

    model = Second()
    model.load_state_dict(pretrained().state_dict())
    assert checked(tmp_path, model, batches=2).verdict == "healthy"


def test_warm_up_from_zero_is_no_verdict(tmp_path: Path) -> None:
    """C3: nothing was trained, so nothing was tested."""

    class WarmUp(Digits):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    model = WarmUp()
    model.load_state_dict(pretrained().state_dict())
    with pytest.warns(UserWarning, match="cannot tell: 36 batches .*changed no weight at all"):
        checked(tmp_path, model)


def test_manual_optimization_is_told_what_to_do_instead_and_trained(tmp_path: Path) -> None:
    """The check cannot run, and the run goes on."""

    class Manual(Digits):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    model = Manual()
    model.load_state_dict(pretrained().state_dict())
    check = FloatFinetune(stop=True)
    trainer = qat_trainer(tmp_path, check, limit_train_batches=2)
    with pytest.warns(UserWarning, match="FloatFinetune: cannot tell: Manual optimizes manually.*ZeroLRFinetune works"):
        trainer.fit(model)
    assert trainer.global_step == 2


def test_stop_ends_the_run(tmp_path: Path) -> None:
    """C3."""
    trainer = qat_trainer(tmp_path, FloatFinetune(batches=20, stop=True), max_epochs=3)
    with pytest.warns(UserWarning, match="collapses too"):
        trainer.fit(pretrained(lr=0.3))
    assert trainer.global_step == 0


def test_files_are_written(tmp_path: Path) -> None:
    """Foundation 8."""
    result = checked(tmp_path, pretrained())
    assert result.note in (tmp_path / "lightning_qat" / "float_finetune.txt").read_text()
    assert (tmp_path / "lightning_qat" / "float_finetune.json").is_file()


def test_a_copy_trains_longer_than_a_schedule_that_knows_its_length(tmp_path: Path) -> None:
    """C3: OneCycleLR raises behind its last step; a check before a short run takes more batches than the run has."""

    class OneCycle(Digits):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            scheduler = OneCycleLR(optimizer, 0.01, total_steps=int(self.trainer.estimated_stepping_batches))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    model = OneCycle()
    model.load_state_dict(pretrained().state_dict())
    check = FloatFinetune(batches=5)
    qat_trainer(tmp_path, check, max_epochs=1, max_steps=2).fit(model)
    assert check.result is not None
    assert "5 batches" in check.result.note, check.result.note
    assert not check.failures
