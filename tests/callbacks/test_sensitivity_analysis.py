"""SensitivityAnalysis: what it writes and logs, and that training does not notice it (B1, B2, E)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_qat.analysis.sensitivity.sensitivity import sensitivity
from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.callbacks.sensitivity_analysis import SensitivityAnalysis
from lightning_qat.quantization.region.region import find_regions
from tests.harness.noisy_run import Classifier, RandomNumbers, assert_same_run, rows_of, run, trainer_of

POINTS = {"conv.input0", "conv.weight", "relu_0.output", "mean_0.output", "head.weight"}


class Kept(SensitivityAnalysis):
    """Keeps the result of every epoch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.results: list[SensitivityResult] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self.result is not None:
            self.results.append(self.result)


@pytest.mark.parametrize(
    "kwargs", [{}, {"quantization": None, "accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}]
)
def test_training_ends_bit_for_bit_as_without_it(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    """Foundation: leaves no trace in weights, optimizer, random numbers, metrics."""
    callback = SensitivityAnalysis(batches=2, output="logits", max_points=2)
    assert_same_run(tmp_path, callback, own_metrics="sensitivity/", **kwargs)


def test_files_per_epoch_within_the_budget_and_complete_at_the_end(tmp_path: Path) -> None:
    """B2: one file, with an epoch column; the rows of the last epoch are those of the end of training."""
    run(tmp_path, SensitivityAnalysis(max_points=2, metric="SQNR"), max_epochs=4)
    directory = tmp_path / "lightning_qat"
    assert {p.name for p in directory.iterdir()} == {f"sensitivity.{e}" for e in ("csv", "txt", "json")} | {
        "quant_plan.json"
    }
    measured = [{row["point"] for row in rows_of(directory / "sensitivity.csv", n)} for n in range(3)]
    assert [len(points) for points in measured] == [2, 2, 2]
    assert set().union(*measured) == POINTS  # they take turns
    final = rows_of(directory / "sensitivity.csv")
    assert {row["epoch"] for row in final} == {"3"}
    assert {row["point"] for row in final} == POINTS
    assert len(final) == len(POINTS)
    data = json.loads((directory / "sensitivity.json").read_text())
    assert (data["epoch"], [row["point"] for row in data["rows"]]) == (3, [row["point"] for row in final])
    assert (directory / "sensitivity.txt").read_text().startswith("Sensitivity at the end of epoch 3\n")
    assert list(final[0])[:6] == ["epoch", "op_name", "sensitive_type", "op_type", "SQNR", "quant_dtype"]
    values = [float(row["SQNR"]) for row in final]
    assert values == sorted(values)


def test_result_is_that_of_the_function_on_the_same_inputs(tmp_path: Path) -> None:
    """B2: at the end of training, against sensitivity() on what the region received."""
    callback = SensitivityAnalysis(output="logits", batches=3)
    inputs: list[torch.Tensor] = []

    class Inputs(SensitivityAnalysis):
        def _captured(self, *args: Any, **kwargs: Any) -> Any:
            calls = super()._captured(*args, **kwargs)
            inputs[:] = [call.args[0].clone() for call in calls[""]]
            return calls

    callback = Inputs(output="logits", batches=3)
    model, _ = run(tmp_path, callback)
    assert [len(x) for x in inputs] == [8, 8, 8]
    expected = sensitivity(find_regions(model)[""], inputs, output="logits")
    assert callback.result is not None
    assert [r.point for r in callback.result.rows] == [r.point for r in expected.rows]
    assert [r.value for r in callback.result.rows] == pytest.approx([r.value for r in expected.rows], rel=1e-9)


def test_epochs_are_compared_on_the_same_batches(tmp_path: Path) -> None:
    """B9: otherwise a change could be that of the data."""
    seen: list[torch.Tensor] = []

    class Inputs(SensitivityAnalysis):
        def _captured(self, *args: Any, **kwargs: Any) -> Any:
            calls = super()._captured(*args, **kwargs)
            seen.append(calls[""][0].args[0].clone())
            return calls

    run(tmp_path, Inputs(max_points=2), max_epochs=2)
    assert len(seen) == 3
    assert torch.equal(seen[0], seen[1])


def test_scalars_and_tables_reach_tensorboard(tmp_path: Path) -> None:
    """Foundation 8: read back with tensorboard's reader."""
    callback = SensitivityAnalysis(per_point=True)
    _, trainer = run(tmp_path, callback, logger=TensorBoardLogger(tmp_path))
    events = EventAccumulator(str(trainer.log_dir)).Reload()
    for point in POINTS:
        assert [event.step for event in events.Scalars(f"sensitivity.MSE/{point}")] == [3, 6]
    assert "sensitivity/text_summary" in events.Tags()["tensors"]
    assert "sensitivity/MSE" in events.Tags()["histograms"]
    assert callback.result is not None
    assert events.Scalars("sensitivity/max")[-1].value == pytest.approx(callback.result.rows[0].value, rel=1e-6)


def test_csv_logger_and_no_logger_work(tmp_path: Path) -> None:
    """Foundation 8."""
    with pytest.warns(UserWarning, match="CSVLogger shows no tables"):
        _, trainer = run(tmp_path, SensitivityAnalysis(metric="Cosine"), logger=CSVLogger(tmp_path))
    header = (Path(str(trainer.log_dir)) / "metrics.csv").read_text().splitlines()[0]
    assert "sensitivity.Cosine/head.weight" in header
    assert "sensitivity/min" in header
    assert rows_of(Path(str(trainer.log_dir)) / "lightning_qat" / "sensitivity.csv")


def test_aggregate_can_be_monitored(tmp_path: Path) -> None:
    """E: EarlyStopping."""
    stopping = EarlyStopping("sensitivity/max", check_on_train_epoch_end=True)
    run(tmp_path, SensitivityAnalysis(), stopping)
    assert stopping.best_score.isfinite()


def test_target_inside_the_module_is_analysed_by_its_own_names(tmp_path: Path) -> None:
    callback = SensitivityAnalysis()
    run(tmp_path, callback, quantization=QuantizationAwareTraining(target=["conv", "head"]))
    assert callback.result is not None
    assert {row.region for row in callback.result.rows} == {"conv", "head"}
    assert callback.result.points == len(callback.result.rows)


def test_turns_go_on_after_a_resume(tmp_path: Path) -> None:
    """Foundation 7."""
    first, resumed = Kept(max_points=2), Kept(max_points=2)
    _, trainer = run(tmp_path, first, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    trainer_of(tmp_path, resumed, max_epochs=2).fit(Classifier(), ckpt_path=tmp_path / "one.ckpt")
    points = [{row.point for row in callback.results[0].rows} for callback in (first, resumed)]
    assert [len(names) for names in points] == [2, 2]
    assert not points[0] & points[1]


def test_epochs_that_run_again_after_a_resume_are_in_the_file_once(tmp_path: Path) -> None:
    """A run that goes on from the middle in the same folder, and one that starts anew there."""
    _, trainer = run(tmp_path, SensitivityAnalysis(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed = trainer_of(tmp_path, SensitivityAnalysis(), max_epochs=4)
    resumed.fit(Classifier(), ckpt_path=tmp_path / "two.ckpt")
    again = trainer_of(tmp_path, SensitivityAnalysis(), max_epochs=3)
    again.fit(Classifier(), ckpt_path=tmp_path / "two.ckpt")  # epoch 2 once more
    path = tmp_path / "lightning_qat" / "sensitivity.csv"
    assert [len(rows_of(path, epoch)) for epoch in range(4)] == [5, 5, 5, 0]
    run(tmp_path, SensitivityAnalysis(), max_epochs=1)
    assert [len(rows_of(path, epoch)) for epoch in range(2)] == [5, 0]
    assert path.read_text().count("op_name") == 1


def test_file_of_another_metric_is_moved_aside(tmp_path: Path) -> None:
    run(tmp_path, SensitivityAnalysis(), max_epochs=1)
    with pytest.warns(UserWarning, match=r"sensitivity.csv has other columns.* now called sensitivity.1.csv"):
        run(tmp_path, SensitivityAnalysis(metric="KL"), max_epochs=1)
    directory = tmp_path / "lightning_qat"
    assert "MSE" in rows_of(directory / "sensitivity.1.csv")[0]
    assert "KL" in rows_of(directory / "sensitivity.csv")[0]


def test_unknown_output_is_an_error_before_the_first_training_step(tmp_path: Path) -> None:
    """B1, bad input."""
    steps = RandomNumbers()
    with pytest.raises(MisconfigurationException, match=r"no output 'logit'. Did you mean 'logits'.*features"):
        run(tmp_path, SensitivityAnalysis(output="logit"), steps)
    assert not steps.drawn


def test_post_processing_is_applied(tmp_path: Path) -> None:
    """B1."""
    callback = SensitivityAnalysis(output="logits", post_process=torch.sigmoid)
    run(tmp_path, callback, max_epochs=1)
    assert callback.result is not None
    assert callback.result.output == "output 'logits' after sigmoid"


def test_schedule_can_be_overridden(tmp_path: Path) -> None:
    class Second(SensitivityAnalysis):
        def should_analyse(self, trainer: Trainer) -> bool:
            return trainer.current_epoch == 1

    run(tmp_path, Second(), max_epochs=3)
    assert {p.stem for p in (tmp_path / "lightning_qat").iterdir()} == {"sensitivity", "quant_plan"}
    path = tmp_path / "lightning_qat" / "sensitivity.csv"
    assert [len(rows_of(path, epoch)) for epoch in range(3)] == [0, 5, 5]  # and the end of training


def test_step_that_fails_in_the_analysis_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    class Failing(SensitivityAnalysis):
        def _captured(self, *args: Any, **kwargs: Any) -> Any:
            super()._captured(*args, **kwargs)
            raise ZeroDivisionError

    state: dict[str, Any] = {}

    class Watching(Failing):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            modes, rng = [m.training for m in pl_module.modules()], torch.get_rng_state()
            with pytest.warns(UserWarning, match="failed with ZeroDivisionError.*Training goes on without it"):
                super().on_train_epoch_end(trainer, pl_module)
            state["same"] = modes == [m.training for m in pl_module.modules()] and torch.equal(
                rng, torch.get_rng_state()
            )
            state["log"] = "log" in pl_module.__dict__
            raise KeyError

    with pytest.raises(KeyError):
        run(tmp_path, Watching())
    assert state == {"same": True, "log": False}


def test_bad_arguments_and_a_missing_callback_are_refused(tmp_path: Path) -> None:
    """Bad input: one clear error before training."""
    with pytest.raises(MisconfigurationException, match="metric must be a name"):
        SensitivityAnalysis(metric=3)  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=r"max_points=0\): must be at least 1"):
        SensitivityAnalysis(max_points=0)
    with pytest.raises(MisconfigurationException, match=r"max_samples=1\): must be at least 2"):
        SensitivityAnalysis(max_samples=1)
    trainer = Trainer(
        accelerator="cpu", default_root_dir=tmp_path, logger=False, callbacks=[SensitivityAnalysis()], fast_dev_run=True
    )
    with pytest.raises(MisconfigurationException, match="SensitivityAnalysis needs fake-quants"):
        trainer.fit(Classifier())


def test_run_that_is_never_quantized_is_said_to_have_no_analysis(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ended before there were scales"):
        run(tmp_path, SensitivityAnalysis(), quantization=QuantizationAwareTraining(start_epoch=5))
    assert {path.name for path in (tmp_path / "lightning_qat").iterdir()} == {"quant_plan.json"}


@pytest.mark.parametrize("kwargs", [{}, {"precision": "bf16-mixed"}])
def test_training_ends_bit_for_bit_as_without_a_sketch(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    """Foundation: leaves no trace, also with backward passes in between."""
    callback = SensitivityAnalysis(batches=2, output="logits", method="sketch")
    assert_same_run(tmp_path, callback, own_metrics="sensitivity/", **kwargs)
    assert callback.result is not None
    assert callback.result.method == "sketch"


def test_sketch_estimates_every_epoch_and_confirms_at_the_end(tmp_path: Path) -> None:
    """Design 7: one probe without confirmation; at the end four, with the top measured."""
    callback = Kept(method="sketch", metric="SQNR", top_k=1)
    _, trainer = run(tmp_path, callback, max_epochs=3)
    directory = tmp_path / "lightning_qat"
    epoch = rows_of(directory / "sensitivity.csv", 1)
    assert {row["point"] for row in epoch} == POINTS
    assert {(row["SQNR"], row["exact"]) for row in epoch} == {("", "False")}
    assert all(row["rank_change"] for row in epoch)  # since epoch 0
    final = rows_of(directory / "sensitivity.csv")
    assert [row["exact"] for row in final] == ["True"] * 3 + ["False"] * 2
    assert [float(row["SQNR"]) for row in final[:3]] == sorted(float(row["SQNR"]) for row in final[:3])
    assert callback.result is not None
    assert callback.result.probes == 4
    scores = [row.score for row in callback.results[-1].rows]
    assert float(trainer.callback_metrics["sensitivity/max_score"]) == pytest.approx(max(scores), rel=1e-6)


def test_unknown_method_is_refused() -> None:
    """Bad input."""
    with pytest.raises(MisconfigurationException, match=r"unknown method 'skecth'.*'sketch'"):
        SensitivityAnalysis(method="skecth")  # type: ignore[arg-type]
