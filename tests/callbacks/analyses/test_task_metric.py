"""SensitivityAnalysis with a metric that the validation step logs (B2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor
from torch.nn import functional as F

from lightning_qat.callbacks.analyses.task_metric import TaskMetric
from lightning_qat.callbacks.sensitivity_analysis import SensitivityAnalysis
from lightning_qat.quantization.region.region import find_regions
from lightning_qat.reporting.files import write_json
from tests.harness.noisy_run import Classifier, RandomNumbers, assert_same_run, rows_of, run, trainer_of


class Quiet(Classifier):
    """A step without noise, so that its metrics can be computed again."""

    def step(self, batch: tuple[Tensor, Tensor], name: str) -> Tensor:
        x, y = batch
        logits = self(x)["logits"]
        self.log(f"{name}_loss", loss := F.cross_entropy(logits, y))
        self.log(f"{name}_spread", logits.std())
        return loss


def loss_with(module: Classifier, point: str | None, batches: int) -> float:
    """The validation loss with one point quantized, in plain torch."""
    region = find_regions(module)[""]
    x, y = (torch.cat(parts) for parts in zip(*list(module.val_dataloader())[:batches], strict=True))
    module.eval()
    with torch.no_grad(), region.state("quantize" if point else "off", updates=()), region.only({point} - {None}):
        return float(F.cross_entropy(module(x)["logits"], y))


@pytest.mark.parametrize("batches", [2, None])
def test_confirmed_rows_have_the_metric_of_the_validation_step(tmp_path: Path, batches: int | None) -> None:
    """B2: against the loss computed by hand; larger losses first, then the estimated rows by score."""
    callback = SensitivityAnalysis(metric="val_loss", method="sketch", top_k=1, evaluation_batches=batches)
    torch.manual_seed(0)
    module = Quiet()
    trainer_of(tmp_path, callback).fit(module)
    result = callback.result
    assert result is not None
    assert (result.metric, result.ascending, result.task, result.evaluated_batches) == (
        "val_loss",
        False,
        True,
        batches or 3,
    )
    measured = [row for row in result.rows if row.exact]
    assert [row.exact for row in result.rows] == [True] * 3 + [False] * 2
    for row in measured:
        assert row.value == pytest.approx(loss_with(module, row.point, batches or 3), rel=1e-5)
    assert result.float_value == pytest.approx(loss_with(module, None, batches or 3), rel=1e-5)
    assert len({row.value for row in measured} | {result.float_value}) > 2  # the points differ
    values = [row.value for row in measured]
    assert values == sorted(values, reverse=True)  # type: ignore[type-var]
    assert [row.value for row in result.rows[3:]] == [None] * 2
    assert f"val_loss on {batches or 3} batches (float: " in result.note
    final = rows_of(tmp_path / "lightning_qat" / "sensitivity.csv")
    assert [float(row["val_loss"] or "nan") for row in final][:3] == pytest.approx(values)
    rows = rows_of(tmp_path / "lightning_qat" / "sensitivity.csv", 0)
    assert {row["val_loss"] for row in rows} == {""}  # in epochs nothing is confirmed
    assert all(float(row["score"]) >= 0 for row in rows)


def test_small_scores_are_bad_unless_the_metric_is_a_cost() -> None:
    assert TaskMetric("val_acc", 8, 0).higher_is_better
    assert not TaskMetric("val/RMSE", 8, 0).higher_is_better


@pytest.mark.parametrize("method", ["sketch", "isolation"])
def test_training_ends_bit_for_bit_as_without_it(tmp_path: Path, method: Any) -> None:
    """Foundation: leaves no trace, although evaluation steps draw random numbers and update metrics."""
    callback = SensitivityAnalysis(metric="val_accuracy", method=method)
    assert_same_run(tmp_path, callback, own_metrics="sensitivity/")
    assert callback.result is not None
    assert callback.result.rows[0].value is not None


def test_unknown_metric_is_an_error_before_the_first_training_step(tmp_path: Path) -> None:
    """Bad input: what the step logs, and the metrics of the output."""
    steps = RandomNumbers()
    expected = r"no such metric. Did you mean 'val_accuracy'.*logs: val_accuracy, val_loss.*L1, MSE, Cosine, SQNR, KL"
    with pytest.raises(MisconfigurationException, match=expected):
        run(tmp_path, SensitivityAnalysis(metric="val_acuracy"), steps)
    with pytest.raises(MisconfigurationException, match=r"Did you mean 'SQNR'"):
        run(tmp_path, SensitivityAnalysis(metric="SQRN"), steps)
    assert not steps.drawn


def test_progress_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Bar(RichProgressBar):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            added = self.progress.add_task

            def add_task(what: str, **kwargs: Any) -> Any:
                shown.append(f"{what} {kwargs['total']}")
                return added(what, **kwargs)

            monkeypatch.setattr(self.progress, "add_task", add_task)

    run(tmp_path, Bar(), SensitivityAnalysis(metric="val_loss"), max_epochs=1, enable_progress_bar=True)
    assert shown == ["Sensitivity: val_loss 6"]  # five points and the float model


class Dump(Callback):
    """Every rank writes its table."""

    def __init__(self, path: Path, analysis: SensitivityAnalysis) -> None:
        self.path, self.analysis = path, analysis

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.analysis.result is not None
        write_json(self.analysis.result, self.path / f"rank{trainer.global_rank}.json")


@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks")
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
@pytest.mark.filterwarnings("ignore:this strategy trains in child processes")
def test_ranks_evaluate_the_same_points_and_agree(tmp_path: Path) -> None:
    """DDP: evaluation is collective."""
    analysis = SensitivityAnalysis(metric="val_loss", method="sketch", top_k=1)
    torch.manual_seed(0)
    trainer_of(tmp_path, analysis, Dump(tmp_path, analysis), max_epochs=1, devices=2, strategy="ddp_fork").fit(Quiet())
    tables = [(tmp_path / f"rank{rank}.json").read_text() for rank in (0, 1)]
    assert tables[0] == tables[1]
    assert '"exact": true' in tables[0]
