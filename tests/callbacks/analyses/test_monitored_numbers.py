"""Numbers of the analyses can be monitored from the first epoch on, also where the first of them comes later."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lightning_qat.callbacks.layer_comparison import LayerComparison
from lightning_qat.callbacks.layer_statistics import LayerStatistics
from lightning_qat.callbacks.sensitivity_analysis import SensitivityAnalysis
from tests.harness.classifier import Classifier
from tests.harness.trainers import qat_trainer

LATE: dict[str, Any] = {"qat": {"start_epoch": 2}, "max_epochs": 4, "num_sanity_val_steps": 0}
ANALYSES: dict[str, type[Callback]] = {
    "sensitivity/max_score": SensitivityAnalysis,
    "layer_statistics/max_clipped_share": LayerStatistics,
    "layer_comparison/output_sqnr": LayerComparison,
}


def fitted(path: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    run = qat_trainer(path, *callbacks, **kwargs)
    run.fit(Classifier())
    return run


@pytest.mark.parametrize("name", ANALYSES)
def test_checkpoint_is_sorted_by_a_number_that_comes_with_start_epoch(tmp_path: Path, name: str) -> None:
    """What was saved before is the worst; the best is one that was quantized, as the checkpoint of each epoch shows."""
    analysis = ANALYSES[name](every_n_epochs=1)  # type: ignore[call-arg]
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", monitor=name, mode="min", save_top_k=4, filename="{epoch}")
    run = fitted(tmp_path, analysis, checkpoint, **LATE)
    saved = {int(re.findall(r"epoch=(\d)", path)[0]): float(score) for path, score in checkpoint.best_k_models.items()}
    assert [saved[epoch] for epoch in (0, 1)] == [float("inf")] * 2  # as ModelCheckpoint takes NaN
    assert min(saved, key=saved.__getitem__) in (2, 3)
    assert run.callback_metrics[name].isfinite()


def test_early_stopping_waits_where_it_was_told_to(tmp_path: Path) -> None:
    stopping = EarlyStopping("sensitivity/max_score", patience=1, strict=False)
    run = fitted(tmp_path, SensitivityAnalysis(), stopping, **LATE)
    assert run.current_epoch == 4
    assert stopping.best_score.isfinite()


@pytest.mark.parametrize("name", ANALYSES)
def test_early_stopping_that_would_end_the_run_is_refused_before_training(tmp_path: Path, name: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"Write EarlyStopping\('{name}', strict=False\), which waits"):
        fitted(tmp_path, ANALYSES[name](every_n_epochs=1), EarlyStopping(name), **LATE)  # type: ignore[call-arg]


def test_so_it_is_where_not_every_epoch_is_analysed(tmp_path: Path) -> None:
    stopping = EarlyStopping("sensitivity/max_score")
    with pytest.raises(MisconfigurationException, match="every_n_epochs"):
        fitted(tmp_path, SensitivityAnalysis(every_n_epochs=2), stopping, max_epochs=2)


def test_early_stopping_after_rare_validations_is_left_alone(tmp_path: Path) -> None:
    """When it looks for the first time, epochs have been analysed."""
    stopping = EarlyStopping("sensitivity/max_score")
    quantized_later = {"qat": {"start_epoch": 1}, "max_epochs": 4, "check_val_every_n_epoch": 4}
    fitted(tmp_path, SensitivityAnalysis(), stopping, num_sanity_val_steps=0, **quantized_later)
    assert stopping.best_score.isfinite()


def test_early_stopping_is_listed_behind(tmp_path: Path) -> None:
    stopping = EarlyStopping("sensitivity/max_score")
    with pytest.raises(MisconfigurationException, match="List it behind SensitivityAnalysis"):
        fitted(tmp_path, stopping, SensitivityAnalysis())


def test_both_cannot_wait_for_the_same_number(tmp_path: Path) -> None:
    """EarlyStopping ends a run on NaN, ModelCheckpoint fails without a number."""
    name = "sensitivity/max_score"
    both = EarlyStopping(name, strict=False), ModelCheckpoint(tmp_path / "ckpt", monitor=name)
    with pytest.raises(MisconfigurationException, match=r"both monitor .* such as val_loss"):
        fitted(tmp_path, SensitivityAnalysis(), *both, **LATE)


@pytest.mark.filterwarnings("ignore:SensitivityAnalysis. training ended before there were scales")
def test_without_somebody_who_monitors_nothing_is_logged_ahead(tmp_path: Path) -> None:
    run = fitted(tmp_path, SensitivityAnalysis(), **{**LATE, "max_epochs": 2})
    assert not any(name.startswith("sensitivity") for name in run.callback_metrics)
