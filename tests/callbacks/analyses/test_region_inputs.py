"""RegionInputs: what the regions are called with, and when it need not be looked for again (B2, cost per epoch)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import Tensor

from lightning_qat.callbacks.analyses import region_inputs
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.callbacks.sensitivity_analysis import SensitivityAnalysis
from lightning_qat.quantization.modules.call import Call
from tests.harness.classifier import Classifier
from tests.harness.noisy_run import trainer_of

ran: list[str] = []


class Counting(Classifier):
    """Notes every validation step; there is none but those of analyses."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        ran.append("step")
        super().validation_step(batch, batch_idx)


class Watching(SensitivityAnalysis):
    """Keeps what each analysis looked at."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[list[Tensor]] = []
        self.rows: list[Any] = []

    def _captured(self, *args: Any, **kwargs: Any) -> Any:
        calls = super()._captured(*args, **kwargs)
        self.seen.append([call.args[0].clone() for found in calls.values() for call in found])
        return calls

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        assert self.result is not None
        self.rows.append([(row.point, row.score, row.value) for row in self.result.rows])


def steps(directory: Path, kind: type[LightningModule], epochs: int = 3, **settings: Any) -> tuple[int, Watching]:
    """Train, and return how many validation steps ran for the analyses, of two batches each."""
    counts: list[int] = []

    class Starting(Callback):
        def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
            counts.append(len(ran))  # tracing and calibration

    ran.clear()
    seed_everything(0, verbose=False)
    callback = Watching(batches=2)
    trainer_of(directory, Starting(), callback, max_epochs=epochs, limit_val_batches=0, **settings).fit(kind())
    return len(ran) - counts[0], callback


def test_step_runs_once_where_it_hands_the_batch_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B2: two batches, three epochs and the end of training."""
    once, kept = steps(tmp_path / "kept", Counting)
    monkeypatch.setattr(region_inputs, "_KEPT_BYTES", 0)
    each_time, looked_for = steps(tmp_path / "looked_for", Counting)
    assert (once, each_time) == (2, 4 * 2)
    assert kept.rows == looked_for.rows
    for first, second in zip(kept.seen, looked_for.seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_training_ends_bit_for_bit_as_without_it(tmp_path: Path) -> None:
    """Foundation: with inputs that are kept, less is put back after an analysis; nothing may be missing."""
    ends = []
    for name, callbacks in (("plain", []), ("analysed", [SensitivityAnalysis(batches=2)])):
        seed_everything(0, verbose=False)
        model = Counting()
        trainer = trainer_of(tmp_path / name, *callbacks, max_epochs=3)
        trainer.fit(model)
        states = torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64))
        metrics = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("sensitivity/")}
        tensors = [t for t in model.state_dict().values() if isinstance(t, Tensor)]
        modes = torch.tensor([m.training for m in model.modules()])
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        ends.append([*states, *tensors, *metrics.values(), modes, *gradients])
    assert len(ends[0]) == len(ends[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class InPlace(Counting):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        batch[0].add_(self.net.head.weight.mean())
        super().validation_step(batch, batch_idx)


class WithTransferHook(Counting):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class WithEvaluationHook(Counting):
    def on_validation_epoch_start(self) -> None:
        """Could swap averaged weights in."""


@pytest.mark.parametrize("kind", [InPlace, WithTransferHook, WithEvaluationHook])
def test_step_runs_each_time_where_weights_may_decide(tmp_path: Path, kind: type[Counting]) -> None:
    assert steps(tmp_path, kind)[0] == 4 * 2


def test_step_runs_each_time_where_loaders_are_made_anew(tmp_path: Path) -> None:
    assert steps(tmp_path, Counting, reload_dataloaders_every_n_epochs=1)[0] == 4 * 2


def test_inputs_that_trained_layers_compute_are_those_of_the_epoch(tmp_path: Path) -> None:
    count, callback = steps(tmp_path, Counting, quantization=QuantizationAwareTraining(target="net.head"))
    assert count == 3 * 2  # isolation of two points is complete: not again at the end
    assert not any(torch.equal(a, b) for a, b in zip(callback.seen[0], callback.seen[1], strict=True))


@pytest.mark.parametrize("value", [None, True, "mask", (None, "a")])
def test_constants_may_be_among_the_arguments(value: Any) -> None:
    x = torch.ones(2)
    kept = region_inputs._of_copies(Call((x, value)), {id(x): x.clone()})
    assert kept is not None
    assert kept.args[1] == value
    assert kept.args[0] is not x


@pytest.mark.parametrize("value", [3, 0.5, object(), torch.ones(2), [1]])
def test_anything_else_may_change(value: Any) -> None:
    x = torch.ones(2)
    assert region_inputs._of_copies(Call((x, value)), {id(x): x.clone()}) is None


@pytest.mark.parametrize(
    ("batches", "batch_size", "expected"), [(16, 64, 26), (2, 64, 16), (40, 64, None), (39, 8, 16)]
)
def test_short_epochs_are_analysed_on_few_samples(batches: float, batch_size: int, expected: int | None) -> None:
    """B2, cost per epoch: a 40th of what the epoch trains on, and at least 16."""

    class Epoch:
        num_training_batches = batches

    calls = [Call.of(torch.zeros(batch_size, 1))]
    assert SensitivityAnalysis()._samples(Epoch(), calls) == expected  # type: ignore[arg-type]
    assert SensitivityAnalysis(max_samples=None)._samples(Epoch(), calls) is None  # type: ignore[arg-type]
    assert SensitivityAnalysis(max_samples=5)._samples(Epoch(), calls) == 5  # type: ignore[arg-type]


def test_epoch_of_unknown_length_is_analysed_on_all_samples() -> None:
    class Epoch:
        num_training_batches = math.inf

    assert SensitivityAnalysis()._samples(Epoch(), [Call.of(torch.zeros(8, 1))]) is None  # type: ignore[arg-type]


def test_number_of_samples_is_refused_with_what_to_write() -> None:
    with pytest.raises(MisconfigurationException, match=r"max_samples='all'\): must be at least 2, 'auto', or None"):
        SensitivityAnalysis(max_samples="all")  # type: ignore[arg-type]
