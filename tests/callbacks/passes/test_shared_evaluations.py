"""What several callbacks measure of the same model is measured once, whatever their order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_qat.analysis.statistics.statistics import LayerStatisticsResult
from lightning_qat.callbacks.accuracy_table import AccuracyTable
from lightning_qat.callbacks.convergence_monitor import ConvergenceMonitor
from lightning_qat.callbacks.layer_statistics import LayerStatistics
from lightning_qat.callbacks.passes import shared_evaluations
from lightning_qat.callbacks.passes.evaluation import Evaluation, evaluate
from lightning_qat.callbacks.passes.shared_evaluations import SharedEvaluations
from lightning_qat.callbacks.pipeline_check import PipelineCheck
from lightning_qat.callbacks.quantized_run import evaluations_of
from tests.harness.noisy_run import assert_same_run
from tests.harness.small_digits import pretrained
from tests.harness.trainers import qat_trainer

VALIDATION_BATCHES = 6


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[Evaluation]:
    """All that are really made from here on."""
    made: list[Evaluation] = []

    def counted(*args: Any, **kwargs: Any) -> Evaluation:
        made.append(evaluate(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(shared_evaluations, "evaluate", counted)
    return made


class Asking(Callback):
    """Asks for evaluations before the first step."""

    def __init__(self, ask: Callable[[Trainer, LightningModule, SharedEvaluations], None]) -> None:
        self.ask = ask

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ask(trainer, pl_module, evaluations_of(trainer))


def ask(directory: Path, function: Callable[[Trainer, LightningModule, SharedEvaluations], None]) -> None:
    qat_trainer(directory, Asking(function), limit_train_batches=1, limit_val_batches=VALIDATION_BATCHES).fit(
        pretrained()
    )


def of_the_start(directory: Path, *callbacks: Callback) -> None:
    """Train one step, without looking at what comes after it."""
    model = pretrained()
    seed_everything(0, verbose=False)
    qat_trainer(directory, *callbacks, limit_train_batches=1).fit(model)


def test_float_and_calibrated_model_are_evaluated_once_for_all(tmp_path: Path, evaluations: list[Evaluation]) -> None:
    """C1, C4, D7: and every callback has the numbers that it finds alone."""

    def callbacks() -> tuple[ConvergenceMonitor, PipelineCheck, AccuracyTable]:
        return ConvergenceMonitor(float_batches=1), PipelineCheck(batches=1, rungs=[0, 4]), AccuracyTable(name="a")

    alone = callbacks()
    for one in alone:
        of_the_start(tmp_path / type(one).__name__, one)
    for number, order in enumerate(((0, 1, 2), (2, 1, 0))):
        evaluations.clear()
        together = callbacks()
        of_the_start(tmp_path / str(number), *(together[i] for i in order))
        assert len(evaluations) == 3  # float, calibrated, and QAT at the end of training
        monitor, check, table = together
        assert monitor.series.float_model == alone[0].series.float_model
        assert monitor.series.calibrated == alone[0].series.calibrated
        assert check.result is not None
        assert alone[1].result is not None
        assert check.result.rows == alone[1].result.rows
        assert table.result == alone[2].result


def test_same_question_is_answered_from_memory_and_another_one_is_not(
    tmp_path: Path, evaluations: list[Evaluation]
) -> None:
    def look(trainer: Trainer, pl_module: LightningModule, shared: SharedEvaluations) -> None:
        few = shared.evaluate(trainer, pl_module, "quantize", limit=2)
        assert shared.evaluate(trainer, pl_module, "quantize", limit=2) is few
        every = shared.evaluate(trainer, pl_module, "quantize")
        assert (few.batches, every.batches) == (2, VALIDATION_BATCHES)
        # so many batches are all that there are
        assert shared.evaluate(trainer, pl_module, "quantize", limit=VALIDATION_BATCHES) is every
        assert shared.evaluate(trainer, pl_module, "quantize", limit=5).batches == 5
        assert shared.evaluate(trainer, pl_module, "off") != every
        assert len(evaluations) == 4

    ask(tmp_path, look)


@pytest.mark.parametrize("name", ["head.bias", "bn1.running_var", "_quantization.fake_quants"])
def test_one_changed_number_is_another_model(tmp_path: Path, evaluations: list[Evaluation], name: str) -> None:
    """Written through ``.data``, as averages are swapped in: torch's version counters do not see it."""

    def look(trainer: Trainer, pl_module: LightningModule, shared: SharedEvaluations) -> None:
        before = shared.evaluate(trainer, pl_module, "quantize")
        tensors = {**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers())}
        tensor = next(t for key, t in tensors.items() if key.startswith(name) and t.is_floating_point())
        old = tensor.detach().clone()
        tensor.data.view(-1)[0] *= 2
        assert shared.evaluate(trainer, pl_module, "quantize") is not before
        tensor.data.copy_(old)
        assert shared.evaluate(trainer, pl_module, "quantize").metrics == pytest.approx(before.metrics, rel=0, abs=0)
        assert len(evaluations) == 3

    ask(tmp_path, look)


def test_results_are_those_of_an_evaluation_in_that_state(tmp_path: Path) -> None:
    """Against Lightning's own evaluation of the float model."""
    found: list[Evaluation] = []
    ask(tmp_path, lambda trainer, module, shared: found.append(shared.evaluate(trainer, module, "off")))
    plain = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    assert found[0].metrics == pytest.approx(plain.validate(pretrained(), verbose=False)[0], rel=1e-6)


@pytest.mark.filterwarnings("ignore:PipelineCheck. cannot tell. the float model is no better than a constant guess")
def test_training_is_bit_identical_with_all_of_them(tmp_path: Path) -> None:
    """Foundation: nothing is left behind, whoever measures."""
    callbacks = (
        ConvergenceMonitor(float_batches=2),
        PipelineCheck(batches=2),
        LayerStatistics(),
        AccuracyTable(target=None),
    )
    assert_same_run(tmp_path, *callbacks, own_metrics=("layer_statistics/", "convergence/"))


@pytest.mark.parametrize("monitor_first", [True, False])
def test_points_are_measured_once_for_statistics_and_monitor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, monitor_first: bool
) -> None:
    """B4, C1: the statistics are those of LayerStatistics alone."""

    def fit(directory: Path, *callbacks: Callback) -> None:
        model = pretrained()
        seed_everything(0, verbose=False)
        qat_trainer(directory, *callbacks, limit_train_batches=3, max_epochs=2).fit(model)

    alone = LayerStatistics()
    fit(tmp_path / "alone", alone)
    measured: list[LayerStatistics] = []
    original = LayerStatistics.measure

    def counted(self: LayerStatistics, *args: Any, **kwargs: Any) -> LayerStatisticsResult:
        measured.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LayerStatistics, "measure", counted)
    monitor, statistics = ConvergenceMonitor(float_batches=1), LayerStatistics()
    fit(tmp_path / "both", *((monitor, statistics) if monitor_first else (statistics, monitor)))
    assert measured == [statistics] * 3  # before the first step and at the end of two epochs
    assert statistics.result == alone.result
    assert statistics.result is not None
    for row in statistics.result.rows:
        health = monitor.series.points.latest[row.point]
        assert (health.sqnr, health.clipped_share, health.flip_rate) == (row.sqnr, row.clipped_share, row.flip_rate)


def test_model_that_is_changed_between_the_two_is_measured_again(tmp_path: Path) -> None:
    """B4: as by pruning at the end of an epoch; flips are still those since the epoch before."""

    class Clearing(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.get_parameter("head.weight").data[0] = 0.0

    def fit(directory: Path, *callbacks: Callback) -> None:
        model = pretrained()
        seed_everything(0, verbose=False)
        qat_trainer(directory, *callbacks, limit_train_batches=3, max_epochs=2).fit(model)

    alone, together, monitor = LayerStatistics(), LayerStatistics(), ConvergenceMonitor(float_batches=1)
    fit(tmp_path / "alone", Clearing(), alone)
    fit(tmp_path / "both", monitor, Clearing(), together)
    assert together.result == alone.result
    assert together.result is not None
    flips = {row.point: row.flip_rate for row in together.result.rows}
    assert flips["conv1.weight"] == monitor.series.points.latest["conv1.weight"].flip_rate
    assert flips["head.weight"] != monitor.series.points.latest["head.weight"].flip_rate


def test_monitor_measures_for_itself_where_statistics_are_rarer(tmp_path: Path) -> None:
    class Late(LayerStatistics):
        def should_analyse(self, trainer: Trainer) -> bool:
            return trainer.current_epoch >= 1

    for statistics in (LayerStatistics(every_n_epochs=2), Late()):
        monitor = ConvergenceMonitor(float_batches=1)
        qat_trainer(tmp_path, monitor, statistics, limit_train_batches=3, max_epochs=2).fit(pretrained())
        assert monitor.series.points.epochs == 2
        assert statistics.result is not None
        rates = [row.flip_rate for row in statistics.result.rows if row.flip_rate is not None]
        own = [h.flip_rate for h in monitor.series.points.latest.values() if h.flip_rate is not None]
        assert max(rates) > max(own)  # over two epochs, not one


def test_without_quantization_nothing_is_kept(tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    assert evaluations_of(trainer) is not evaluations_of(trainer)
