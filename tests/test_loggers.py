"""What reaches the loggers: TensorBoard read back with its own reader, CSV, and none at all (foundation 8)."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from examples.digits import DigitsClassifier, DigitsDataModule
from lightning_qat import (
    AccuracyTable,
    Calibration,
    FloatFinetune,
    LayerStatistics,
    QuantizationAwareTraining,
    SensitivityAnalysis,
    ZeroLRFinetune,
)
from lightning_qat.quantization.region.region import find_regions


def run(root: Path, checkpoint: Path, logger: Logger | bool) -> DigitsClassifier:
    """Two short epochs with every callback."""
    module = DigitsClassifier(lr=4e-4)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        limit_train_batches=2,
        limit_val_batches=1,
        log_every_n_steps=1,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        callbacks=[
            QuantizationAwareTraining(init_from=str(checkpoint)),
            Calibration(batches=2),
            ZeroLRFinetune(batches=2),
            FloatFinetune(batches=2),
            LayerStatistics(per_point=True),
            SensitivityAnalysis(per_point=True),
            AccuracyTable(),
        ],
    )
    trainer.fit(module, datamodule=DigitsDataModule())
    return module


def test_tensorboard_holds_the_scalars_of_every_layer(tmp_path: Path, digits_float_checkpoint: Path) -> None:
    """Foundation 8: each point has its scale in the event file, one value per epoch, beside the run's own metrics."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(str(tmp_path), name="tb")
    module = run(tmp_path, digits_float_checkpoint, logger)
    events = event_accumulator.EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {"train_loss", "val_acc"} <= set(scalars)
    (region,) = find_regions(module).values()
    for point, fake_quant in region.points.items():
        values = events.Scalars(f"layer_statistics.scale/{point}")
        assert len(values) == 2
        if fake_quant.axis is None and not point.endswith("weight"):
            assert values[-1].value == pytest.approx(float(fake_quant.scale), rel=1e-6)
    texts = " ".join(events.Tags()["tensors"])
    for table in ("zero_lr_finetune", "float_finetune", "result_table"):
        assert table in texts


@pytest.mark.filterwarnings("ignore:CSVLogger shows no tables")
def test_csv_logger_keeps_its_columns(tmp_path: Path, digits_float_checkpoint: Path) -> None:
    """Foundation 8: stable keys; CSVLogger rewrites its whole file when a new one appears."""
    logger = CSVLogger(str(tmp_path), name="csv")
    run(tmp_path, digits_float_checkpoint, logger)
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    column = next(c for c in rows[0] if c.startswith("layer_statistics.scale/"))
    assert sum(bool(row[column]) for row in rows) == 2


def test_without_a_logger_the_files_are_written(tmp_path: Path, digits_float_checkpoint: Path) -> None:
    """Foundation 8."""
    run(tmp_path, digits_float_checkpoint, False)
    written = {path.name for path in (tmp_path / "lightning_qat").iterdir()}
    expected = {"layer_statistics.csv", "sensitivity.csv", "zero_lr_finetune.txt", "float_finetune.txt"}
    assert expected | {"result_table.json", "result_table.md"} <= written
