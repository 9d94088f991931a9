"""LayerComparison: what it writes and logs, and that training does not notice it (B3, B4, E)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_qat.analysis.comparison.comparison import compare
from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.layer_comparison import LayerComparison
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.callbacks.sensitivity_analysis import SensitivityAnalysis
from lightning_qat.quantization.overrides import ActivationOverride, Override
from lightning_qat.quantization.region.region import find_regions
from tests.harness.noisy_run import Classifier, assert_same_run, rows_of, run, trainer_of

TENSORS = ["conv.input0", "conv.weight", "relu_0", "mean_0", "head.weight", "head", "<output>"]


def too_wide() -> QuantizationAwareTraining:
    rules = [Override(match="relu_0", activation=ActivationOverride(fixed_scale=2.0))]
    return QuantizationAwareTraining(activation_scales="ema", overrides=rules)


def test_training_ends_bit_for_bit_as_without_it(tmp_path: Path) -> None:
    """Foundation: leaves no trace in weights, optimizer, random numbers, metrics."""
    callback = LayerComparison(every_n_epochs=1, batches=2)
    assert_same_run(tmp_path, callback, own_metrics="layer_comparison/")


def test_files_at_the_end_and_of_epochs(tmp_path: Path) -> None:
    """E: by default only at the end of training."""
    run(tmp_path / "a", LayerComparison())
    names = {path.name for path in (tmp_path / "a" / "lightning_qat").iterdir()}
    last = {f"{stem}.{end}" for stem in ("layer_comparison", "diagnosis") for end in ("csv", "txt", "json")}
    assert names == last | {"quant_plan.json"}
    run(tmp_path / "b", LayerComparison(every_n_epochs=2), max_epochs=3)
    names = {path.name for path in (tmp_path / "b" / "lightning_qat").iterdir()}
    assert names == last | {"quant_plan.json"}
    for epoch, tensors in enumerate(([], TENSORS, TENSORS)):
        rows = rows_of(tmp_path / "b" / "lightning_qat" / "layer_comparison.csv", epoch)
        assert [row["mod_name"] for row in rows] == tensors
        assert len(rows_of(tmp_path / "b" / "lightning_qat" / "diagnosis.csv", epoch)) == (5 if tensors else 0)


def test_rows_are_those_of_the_public_function(tmp_path: Path) -> None:
    """B3: on the inputs that the region gets in the validation step."""
    received: list[Any] = []

    class Kept(LayerComparison):
        def _analyse(self, trainer: Trainer, pl_module: LightningModule, final: bool = False) -> Any:
            result = super()._analyse(trainer, pl_module, final)
            with torch.random.fork_rng():
                region = find_regions(pl_module)[""]
                received.append(compare(region, [torch.randn(8, 1, 6, 6)]).columns())
            return result

    callback = Kept(batches=3)
    run(tmp_path, callback)
    assert callback.result is not None
    assert callback.result.columns() == received[0]
    assert (callback.result.batches, callback.result.rows[0].shape) == (3, "[8, 1, 6, 6]")


def test_what_to_do_is_said_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """B4: in the txt file, on the terminal, in json and in TensorBoard, in the order of the sensitivity."""
    callback = LayerComparison(every_n_epochs=1, per_point=True)
    logger = TensorBoardLogger(tmp_path)
    _, trainer = run(tmp_path, SensitivityAnalysis(), callback, logger=logger, quantization=too_wide())
    line = "1. relu_0.output: rounding."
    directory = Path(str(trainer.log_dir)) / "lightning_qat"
    assert line in (directory / "layer_comparison.txt").read_text()
    assert line in " ".join(capsys.readouterr().out.split())
    assert json.loads((directory / "diagnosis.json").read_text())["rows"][0]["verdict"] == "rounding"
    assert callback.diagnosis is not None
    assert callback.diagnosis.rows[0].score is not None
    events = EventAccumulator(trainer.log_dir).Reload()
    text = events.Tensors("layer_comparison/what_to_do/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "activation: {fixed_scale: " in text
    assert [e.step for e in events.Scalars("layer_comparison.own_SQNR/relu_0")] == [3, 6]
    assert {"layer_comparison/min_own_sqnr", "layer_comparison/output_sqnr"} <= set(events.Tags()["scalars"])
    assert "layer_comparison/sqnr_by_depth" in events.Tags()["images"]


def test_aggregates_can_be_monitored(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="layer_comparison/output_sqnr", mode="max")
    run(tmp_path, checkpoint, LayerComparison(every_n_epochs=1), enable_checkpointing=True)
    assert checkpoint.current_score is not None
    assert checkpoint.current_score > 10


def test_figures_go_to_files_and_tensorboard(tmp_path: Path) -> None:
    """B10: PNG under figures/."""
    callbacks = SensitivityAnalysis(), LayerComparison(figures=True)
    _, trainer = run(tmp_path, *callbacks, logger=TensorBoardLogger(tmp_path), quantization=too_wide())
    drawn = {path.name: path.read_bytes() for path in (Path(str(trainer.log_dir)) / "lightning_qat/figures").iterdir()}
    expected = {"sqnr_by_depth", "sensitivity", "sensitivity_over_epochs", "values_relu_0.output"}
    assert set(drawn) == {f"{name}.png" for name in expected}
    assert all(content.startswith(b"\x89PNG") for content in drawn.values())
    events = EventAccumulator(trainer.log_dir).Reload()
    assert {f"layer_comparison/{name}" for name in expected} == set(events.Tags()["images"])
    assert plt.get_fignums() == []


def test_run_that_never_gets_scales_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="LayerComparison: training ended before there were scales"):
        run(tmp_path, LayerComparison(), quantization=QuantizationAwareTraining(start_epoch=5))


def test_fast_dev_run_leaves_no_files(tmp_path: Path) -> None:
    run(tmp_path, LayerComparison(figures=True), fast_dev_run=True)
    assert not (tmp_path / "lightning_qat").exists()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batches": 0}, r"LayerComparison\(batches=0\): must be at least 1"),
        ({"every_n_epochs": 0}, "must be at least 1"),
        ({"output": "logit"}, "no output 'logit'. Did you mean 'logits'"),
        ({"ranges": {"conv.inptu0": [0, 1]}}, "matches no quantization point. Near names: conv.input0"),
        ({"ranges": {"conv.input0": [2, 1]}}, "must be the two ends of a range"),
    ],
)
def test_bad_arguments_are_refused_before_training(tmp_path: Path, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        run(tmp_path, LayerComparison(**kwargs), max_epochs=1)
    assert not (tmp_path / "lightning_qat" / "layer_comparison.csv").exists()


def test_missing_callback_and_missing_matplotlib_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MisconfigurationException, match=r"pip install 'lightning-qat\[plots\]'"):
        LayerComparison(figures=True)
    trainer = Trainer(
        accelerator="cpu", default_root_dir=tmp_path, logger=False, callbacks=[LayerComparison()], fast_dev_run=True
    )
    with pytest.raises(MisconfigurationException, match=r"LayerComparison needs.*QuantizationAwareTraining"):
        trainer.fit(Classifier())


class Recorded(LayerComparison):
    """Writes each rank's result, to compare."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        assert self.result is not None
        rows = [[row.mod_name, row.SQNR, row.own_SQNR, row.base_model_var] for row in self.result.rows]
        clipped = [[e.point, e.count, e.rounding, e.vanished] for e in self.result.evidence]
        path = Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.json"
        path.write_text(json.dumps([self.result.batches, rows, clipped]))


def test_ranks_have_the_same_table(tmp_path: Path) -> None:
    """DDP: errors of all ranks, on all ranks; the evidence too."""
    trainer_of(tmp_path, Recorded(), devices=2, strategy="ddp_spawn", max_epochs=1).fit(Classifier())
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[0] == 2
    assert first[1][0][0] == "conv.input0"


class TwoTargets(LightningModule):
    """Both parts have points of the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
        self.head = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        out: torch.Tensor = self.head(self.backbone(batch))
        return out.square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_two_targets_with_the_same_names(tmp_path: Path) -> None:
    """Rules that name a target are looked for there, and what is printed is about one target."""
    torch.manual_seed(0)
    rules = [
        Override(match="head.1", activation=ActivationOverride(fixed_scale=1.0)),
        Override(match="backbone.1", activation=ActivationOverride(dtype="int16")),
        Override(match="backbone.*", activation=ActivationOverride(dtype="int8")),
    ]
    callback = LayerComparison()
    data = DataLoader(torch.randn(16, 4), batch_size=8)
    trainer = Trainer(
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[QuantizationAwareTraining(target=["backbone", "head"], overrides=rules), Calibration(), callback],
    )
    trainer.fit(TwoTargets(), data, data)
    assert callback.diagnosis is not None
    found = {row.region: row for row in callback.diagnosis.culprits}
    assert {name: (row.point, row.verdict) for name, row in found.items()} == {
        "backbone": ("1.output", "config not applied"),
        "head": ("1.output", "rounding"),
    }
    assert 'match: "backbone.1.output"' in found["backbone"].yaml
    assert 'match: "head.1.output"' in found["head"].yaml
