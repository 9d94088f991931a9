"""What LayerStatistics and ConvergenceMonitor look at by default: less in short epochs, the same as ever in others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from lightning_qat.analysis.statistics.statistics import LayerStatisticsResult, LayerStatisticsRow
from lightning_qat.callbacks.analyses import epoch_share, region_inputs
from lightning_qat.callbacks.convergence_monitor import ConvergenceMonitor
from lightning_qat.callbacks.layer_statistics import LayerStatistics
from tests.harness.classifier import Classifier, dataset, loader
from tests.harness.state import assert_same
from tests.harness.trainers import qat_trainer

ran: list[str] = []


class Short(Classifier):
    """Its epoch has four batches of 24; a 40th is fewer than 16 samples, so 16 are looked at."""

    def train_dataloader(self) -> Any:
        return loader(96, 24)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        ran.append("step")
        super().validation_step(batch, batch_idx)


class OfOneSize(Short):
    """Takes batches of 24 only."""

    def __init__(self) -> None:
        super().__init__()
        self.net.head = nn.Sequential(Rolled(), self.net.head)


class Rolled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(24, 4)


class Growing(Short):
    """A second target takes part in the steps of tracing, calibration, and of all epochs but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(6, 2)
        self.left_out = False

    def on_train_start(self) -> None:
        self.left_out = True

    def on_train_epoch_end(self) -> None:
        self.left_out = False

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        return loss if self.left_out else loss + self.second(batch[0]).square().mean()


def fit(path: Path, callback: Any, kind: type[Short] = Short, **settings: Any) -> Short:
    ran.clear()
    seed_everything(0, verbose=False)
    model = kind()
    qat = {"activation_scales": "ema", **settings.pop("qat", {})}
    settings = {"max_epochs": 3, "limit_val_batches": 0, **settings}
    qat_trainer(path, callback, qat=qat, calibration_batches=2, **settings).fit(model)
    return model


def rows(result: LayerStatisticsResult | None) -> dict[str, LayerStatisticsRow]:
    assert result is not None
    return {row.point: row for row in result.rows}


def test_short_epoch_is_measured_on_the_first_samples_of_a_batch(tmp_path: Path) -> None:
    """Against the images themselves, and a forward of the quantized model on them."""
    callback = LayerStatistics()
    model = fit(tmp_path, callback)
    images = dataset(96)[:16][0]
    given = rows(callback.result)["conv1.input0"]
    assert given.count == images.numel()
    assert (given.min, given.max) == (images.min().item(), images.max().item())
    assert given.mean == pytest.approx(images.double().mean().item(), rel=1e-9)
    seen: list[Tensor] = []
    model.net.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(images)
    assert rows(callback.result)["head.weight"].count == model.net.head.weight.numel()
    assert rows(callback.result)["mean_0.output"].count == seen[0].numel()


@pytest.mark.parametrize(("divisor", "expected"), [(40, 16), (4, 24), (3, 24), (2, 48), (1, 48)])
def test_epochs_share_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, divisor: int, expected: int) -> None:
    """A share of less than a batch is part of it; then one whole batch, and two from two on, however many it is."""
    monkeypatch.setattr(epoch_share, "EPOCHS_SHARE", divisor)
    callback = LayerStatistics()
    fit(tmp_path, callback, max_epochs=1)
    assert rows(callback.result)["conv1.input0"].count == expected * 36


@pytest.mark.parametrize(("divisor", "expected"), [(40, 16), (4, 24), (1, 24)])
def test_monitor_alone_looks_at_one_batch_or_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, divisor: int, expected: int
) -> None:
    monkeypatch.setattr(epoch_share, "EPOCHS_SHARE", divisor)
    results: list[LayerStatisticsResult] = []
    original = LayerStatistics.measure

    def kept(*args: Any, **kwargs: Any) -> LayerStatisticsResult:
        results.append(original(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(LayerStatistics, "measure", kept)
    fit(tmp_path, ConvergenceMonitor(float_batches=1), max_epochs=1)
    assert {rows(result)["conv1.input0"].count for result in results} == {expected * 36}


@pytest.mark.parametrize("auto", [True, False])
def test_epoch_of_usual_length_is_measured_as_with_two_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, auto: bool
) -> None:
    """Number for number; and a number of batches that is given is obeyed in a short epoch."""
    if auto:
        monkeypatch.setattr(epoch_share, "EPOCHS_SHARE", 1)
    callback, given = LayerStatistics() if auto else LayerStatistics(batches=2), LayerStatistics(batches=2)
    fit(tmp_path / "one", callback)
    fit(tmp_path / "other", given)
    assert rows(callback.result) == rows(given.result)
    assert rows(given.result)["conv1.input0"].count == 48 * 36


def test_first_samples_have_the_numbers_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all of a batch is looked at, it makes no difference that only the region runs."""
    monkeypatch.setattr(epoch_share, "FEWEST_SAMPLES", 24)
    of_region, of_step = LayerStatistics(), LayerStatistics(batches=1)
    fit(tmp_path / "region", of_region)
    fit(tmp_path / "step", of_step)
    assert rows(of_region.result) == rows(of_step.result)


def test_step_runs_once_in_a_training_and_the_numbers_are_the_same_without_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, looked_for = LayerStatistics(), LayerStatistics()
    fit(tmp_path / "kept", kept)
    once = len(ran)
    monkeypatch.setattr(region_inputs, "_KEPT_BYTES", 0)
    fit(tmp_path / "looked for", looked_for)
    assert len(ran) - once == 3
    assert rows(kept.result) == rows(looked_for.result)


def test_model_of_one_batch_size_is_measured_on_all_samples(tmp_path: Path) -> None:
    """What the shortened batch had shown before it failed is not counted."""
    callback, given = LayerStatistics(), LayerStatistics(batches=1)
    fit(tmp_path / "auto", callback, OfOneSize)
    fit(tmp_path / "given", given, OfOneSize)
    assert rows(callback.result)["conv1.input0"].count == 24 * 36
    assert rows(callback.result) == rows(given.result)


def test_target_that_is_called_from_a_later_epoch_on_is_measured_then(tmp_path: Path) -> None:
    """Inputs are kept only once every target has been called."""
    counts: list[int] = []

    class Noting(LayerStatistics):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            assert self.result is not None
            counts.append(sum(row.count for row in self.result.rows if row.region == "second"))

    fit(tmp_path, Noting(), Growing, qat={"target": ["net", "second"]}, max_epochs=2)
    assert counts[0] == 0
    assert counts[1] >= 16 * 36


@pytest.mark.parametrize("callback", [LayerStatistics, ConvergenceMonitor])
def test_training_ends_bit_for_bit_as_without_it(tmp_path: Path, callback: type[Any]) -> None:
    """Foundation: where only regions run, less is put back after a measurement; nothing may be missing."""
    ends = []
    for name, callbacks in (("plain", []), ("analysed", [callback()])):
        seed_everything(0, verbose=False)
        model = Short()
        trainer = qat_trainer(tmp_path / name, *callbacks, max_epochs=3)
        trainer.fit(model)
        gradients = [p.grad for p in model.parameters()]
        modes = [m.training for m in model.modules()]
        ends.append([model.state_dict(), trainer.optimizers[0].state_dict(), torch.get_rng_state(), gradients, modes])
    assert_same(ends[0], ends[1])


@pytest.mark.parametrize("value", [0, "all", 1.5])
def test_anything_but_a_number_or_auto_is_refused(value: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"LayerStatistics\(batches=.*must be at least 1, or 'auto'"):
        LayerStatistics(batches=value)
    with pytest.raises(MisconfigurationException, match=r"statistics_batches=.*must be at least 1, or 'auto'"):
        ConvergenceMonitor(statistics_batches=value)
