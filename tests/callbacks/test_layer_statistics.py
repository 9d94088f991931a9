"""LayerStatistics: what it writes and logs, and that training does not notice it (B4, B10, E)."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_qat.callbacks.layer_statistics import LayerStatistics
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.callbacks.sensitivity_analysis import SensitivityAnalysis
from lightning_qat.quantization.region.region import find_regions
from lightning_qat.reporting.tensorboard_tags import LAYER_STATISTICS
from tests.harness.noisy_run import Classifier, assert_same_run, rows_of, run, trainer_of

POINTS = {"conv.input0", "conv.weight", "relu_0.output", "mean_0.output", "head.weight"}


def table(path: Path, epoch: int | None = None) -> dict[str, dict[str, str]]:
    rows = rows_of(path, epoch)
    found = {row["point"]: row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize("kwargs", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}])
def test_training_ends_bit_for_bit_as_without_it(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    """Foundation: leaves no trace in weights, optimizer, random numbers, metrics."""
    assert_same_run(tmp_path, LayerStatistics(batches=2), own_metrics="layer_statistics/", **kwargs)


def test_one_file_holds_every_epoch_and_the_others_the_latest(tmp_path: Path) -> None:
    """E: files under the run's lightning_qat directory."""
    callback = LayerStatistics(every_n_epochs=2)
    run(tmp_path, callback, max_epochs=3)
    names = {path.name for path in (tmp_path / "lightning_qat").iterdir()}
    assert names == {f"layer_statistics.{ending}" for ending in ("csv", "txt", "json")} | {"quant_plan.json"}
    path = tmp_path / "lightning_qat" / "layer_statistics.csv"
    latest, before = table(path), table(path, 1)
    assert set(latest) == set(before) == POINTS
    assert {row["epoch"] for row in latest.values()} == {"2"}  # it is of the end of training
    assert latest["conv.weight"]["mean"] != before["conv.weight"]["mean"]
    data = json.loads(path.with_suffix(".json").read_text())
    assert data["epoch"] == 2
    assert {row["point"]: repr(row["mean"]) for row in data["rows"]} == {p: row["mean"] for p, row in latest.items()}


def test_numbers_are_those_of_the_validation_step_on_the_sampled_batches(tmp_path: Path) -> None:
    """B10: checked against the weights themselves and a forward of our own."""
    callback = LayerStatistics(batches=3)
    model, _ = run(tmp_path, callback)
    assert callback.result is not None
    rows = {row.point: row for row in callback.result.rows}
    weight = model.head.weight.detach().double()
    assert rows["head.weight"].mean == pytest.approx(weight.mean().item(), rel=1e-6)
    assert rows["head.weight"].count == weight.numel()
    assert rows["conv.input0"].count == 24 * 36  # all three batches, once
    scale = find_regions(model)[""].points["relu_0.output"].scale
    assert rows["relu_0.output"].scale == scale.item()
    assert rows["head.weight"].flip_rate is not None
    assert rows["relu_0.output"].scale_drift != 0  # ema scales move
    fixed = LayerStatistics()
    run(tmp_path, fixed, quantization=QuantizationAwareTraining(activation_scales="fixed"))
    assert fixed.result is not None
    assert {row.scale_drift for row in fixed.result.rows if row.role == "activation"} == {0.0}


def test_scalars_tables_and_aggregates_reach_tensorboard(tmp_path: Path) -> None:
    """Foundation 8: read back with tensorboard's reader."""
    callback = LayerStatistics(per_point=True)
    _, trainer = run(tmp_path, callback, logger=TensorBoardLogger(tmp_path))
    assert trainer.log_dir is not None
    events = EventAccumulator(trainer.log_dir).Reload()
    tags = events.Tags()
    for point in POINTS:
        assert [event.step for event in events.Scalars(f"layer_statistics.scale/{point}")] == [3, 6]
    assert callback.result is not None
    value = next(row.sqnr for row in callback.result.rows if row.point == "conv.weight")
    assert events.Scalars("layer_statistics.sqnr/conv.weight")[-1].value == pytest.approx(value, rel=1e-6)
    assert "layer_statistics/text_summary" in tags["tensors"]
    assert "layer_statistics/sqnr" in tags["histograms"]
    assert "layer_statistics/max_clipped_share" in tags["scalars"]
    assert (Path(trainer.log_dir) / "lightning_qat" / "layer_statistics.csv").exists()


def test_csv_logger_gets_the_scalars_and_one_warning(tmp_path: Path) -> None:
    """Foundation 8: other loggers."""
    with pytest.warns(UserWarning, match="CSVLogger shows no tables") as warnings:
        _, trainer = run(tmp_path, LayerStatistics(columns=["scale"]), logger=CSVLogger(tmp_path))
    assert sum("shows no tables" in str(w.message) for w in warnings) == 1
    with open(Path(str(trainer.log_dir)) / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["layer_statistics.scale/conv.weight"]]
    assert len(rows) == 2
    assert not any(name.startswith("layer_statistics.min/") for name in rows[0])


def test_per_layer_logging_can_be_switched_off(tmp_path: Path) -> None:
    _, trainer = run(tmp_path, LayerStatistics(log=False), logger=CSVLogger(tmp_path))
    header = (Path(str(trainer.log_dir)) / "metrics.csv").read_text().splitlines()[0]
    assert "layer_statistics/min_sqnr" in header
    assert "conv.weight" not in header


def test_aggregates_can_be_monitored(tmp_path: Path) -> None:
    """E: EarlyStopping and ModelCheckpoint."""
    checkpoint = ModelCheckpoint(tmp_path, monitor="layer_statistics/max_clipped_share")
    stopping = EarlyStopping("layer_statistics/min_sqnr", mode="max", check_on_train_epoch_end=True)
    callback = LayerStatistics()
    run(tmp_path, callback, checkpoint, stopping, enable_checkpointing=True)
    assert callback.result is not None
    clipped = [row.clipped_share for row in callback.result.rows if row.clipped_share is not None]
    assert checkpoint.current_score is not None
    assert checkpoint.current_score.item() == pytest.approx(max(clipped))


def test_run_that_is_float_at_first_is_measured_throughout(tmp_path: Path) -> None:
    """`start_epoch`: calibration waits for it, so before there are only values."""
    results: list[Any] = []

    class Kept(LayerStatistics):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            results.append({row.point: row for row in self.result.rows})  # type: ignore[union-attr]

    quantization = QuantizationAwareTraining(start_epoch=1, activation_scales="ema")
    run(tmp_path, Kept(), SensitivityAnalysis(), quantization=quantization, max_epochs=2)
    before, after = results
    assert before["relu_0.output"].mean is not None
    assert before["relu_0.output"].sqnr is before["head.weight"].flip_rate is None
    assert after["relu_0.output"].sqnr is not None
    assert after["relu_0.output"].scale_drift not in (None, 0.0)
    assert after["head.weight"].flip_rate is not None
    directory = tmp_path / "lightning_qat"
    assert not rows_of(directory / "sensitivity.csv", 0)
    assert rows_of(directory / "sensitivity.csv", 1)
    assert [len(rows_of(directory / "layer_statistics.csv", epoch)) for epoch in (0, 1)] == [5, 5]


def test_drift_is_since_calibration_also_after_a_resume(tmp_path: Path) -> None:
    """Foundation 7: callback state restores under weights_only."""
    first = LayerStatistics()
    _, trainer = run(tmp_path, first, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    calibrated = first.state_dict()["calibrated"][""]
    second = LayerStatistics()
    trainer_of(tmp_path, second, max_epochs=2).fit(model := Classifier(), ckpt_path=tmp_path / "one.ckpt")
    assert second.result is not None
    for row in second.result.rows:
        now = find_regions(model)[""].points[row.point].scale
        changes = (now / calibrated[row.point]["scale"] - 1).flatten().tolist()
        assert row.scale_drift == pytest.approx(max(changes, key=abs), rel=1e-4, abs=1e-6)


def test_fast_dev_run_leaves_no_files(tmp_path: Path) -> None:
    run(tmp_path, LayerStatistics(), SensitivityAnalysis(), fast_dev_run=True)
    assert not (tmp_path / "lightning_qat").exists()


def test_schedule_can_be_overridden(tmp_path: Path) -> None:
    class Second(LayerStatistics):
        def should_analyse(self, trainer: Trainer) -> bool:
            return trainer.current_epoch == 1

    run(tmp_path, Second(), max_epochs=3)
    assert {p.stem for p in (tmp_path / "lightning_qat").iterdir()} == {"layer_statistics", "quant_plan"}
    path = tmp_path / "lightning_qat" / "layer_statistics.csv"
    assert [len(rows_of(path, epoch)) for epoch in range(3)] == [0, 5, 5]


def test_bad_arguments_and_a_missing_callback_are_refused(tmp_path: Path) -> None:
    """Bad input: one clear error before training."""
    with pytest.raises(MisconfigurationException, match=r"batches=0\): must be at least 1"):
        LayerStatistics(batches=0)
    with pytest.raises(MisconfigurationException, match=r"no column 'median'. Choices: scale"):
        LayerStatistics(columns=["median"])
    assert "sqnr" in LAYER_STATISTICS.curves
    trainer = Trainer(
        accelerator="cpu", default_root_dir=tmp_path, logger=False, callbacks=[LayerStatistics()], fast_dev_run=True
    )
    with pytest.raises(MisconfigurationException, match=r"LayerStatistics needs.*QuantizationAwareTraining"):
        trainer.fit(Classifier())


class Recorded(LayerStatistics):
    """Writes each rank's result, to compare."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if "/" in k}
        sensitivity = next(c.result for c in trainer.callbacks if isinstance(c, SensitivityAnalysis))  # type: ignore[attr-defined]
        results = (self.result.to_dicts(), sensitivity.to_dicts(), metrics)  # type: ignore[union-attr]
        torch.save(results, Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.pt")


def test_two_processes_agree(tmp_path: Path) -> None:
    """Foundation 7: ranks share the batches and have the same results."""
    run(
        tmp_path,
        SensitivityAnalysis(max_points=2),
        Recorded(batches=3),
        quantization=QuantizationAwareTraining(),
        strategy="ddp_spawn",
        devices=2,
        max_epochs=2,
    )
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert repr(first) == repr(second)
    counts = {row["point"]: row["count"] for row in first[0]}
    assert counts["conv.input0"] == 24 * 36  # twelve images on each rank
    assert counts["head.weight"] == 12
    assert len(table(tmp_path / "lightning_qat" / "sensitivity.csv", 0)) == 2
    assert set(table(tmp_path / "lightning_qat" / "sensitivity.csv")) == POINTS
    assert "sensitivity/max" in first[2]
