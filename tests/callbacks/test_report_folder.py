"""The report folder of a long run with every callback: few files, which a person can open."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger

import lightning_qat
from tests.harness.noisy_run import Classifier, rows_of, run, trainer_of

EPOCHS = 20
CONFIG = Path(__file__).parents[2] / "configs" / "all_callbacks.yaml"


def callbacks_of_the_example() -> list[Callback]:
    """Those of configs/all_callbacks.yaml but for the two that every run of these tests has; with all figures."""
    found: list[Callback] = []
    for entry in yaml.safe_load(CONFIG.read_text())["trainer"]["callbacks+"]:
        name = entry["class_path"].removeprefix("lightning_qat.")
        options = entry.get("init_args", {})
        options |= {"figures": True, "every_n_epochs": 1} if name == "LayerComparison" else {}
        options |= {"batches": 1} if name == "PipelineCheck" else {}
        if name not in ("QuantizationAwareTraining", "Calibration"):
            found.append(getattr(lightning_qat, name)(**options))
    return found


@pytest.mark.filterwarnings("ignore")
def test_twenty_epochs_leave_at_most_25_files(tmp_path: Path) -> None:
    """E: one growing file per analysis, not three per epoch."""
    pytest.importorskip("matplotlib")
    logger = TensorBoardLogger(tmp_path / "logs")
    _, trainer = run(tmp_path, *callbacks_of_the_example(), max_epochs=EPOCHS, logger=logger)
    directory = Path(str(trainer.log_dir)) / "lightning_qat"
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert len(files) <= 25, sorted(files)
    assert {"sensitivity.csv", "layer_statistics.csv", "layer_comparison.csv", "diagnosis.csv"} < files
    assert {"model_check_result.txt", "pipeline_check.txt", "convergence.txt", "figures/sqnr_by_depth.png"} < files
    for name in ("sensitivity", "layer_statistics", "layer_comparison", "diagnosis"):
        counts = [len(rows_of(directory / f"{name}.csv", epoch)) for epoch in range(EPOCHS + 1)]
        assert counts == [counts[0]] * EPOCHS + [0], name
        assert counts[0] >= 5


def test_epoch_of_the_end_of_training_is_the_last_one_whatever_ends_it(tmp_path: Path) -> None:
    """A run that max_steps ends in the middle of an epoch."""
    trainer = trainer_of(tmp_path, lightning_qat.SensitivityAnalysis(max_points=2), max_epochs=9, max_steps=4)
    trainer.fit(Classifier())
    counts = [len(rows_of(tmp_path / "lightning_qat" / "sensitivity.csv", epoch)) for epoch in range(3)]
    assert counts == [2, 5, 0]
