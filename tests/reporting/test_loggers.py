"""Results to loggers, known by what they can do."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_qat.analysis.sensitivity.sensitivity import SensitivityResult, SensitivityRow
from lightning_qat.reporting.loggers import log_histogram, log_scalars, log_table
from lightning_qat.reporting.tensorboard_tags import Tags


def row(name: str, value: float, region: str = "") -> SensitivityRow:
    return SensitivityRow(name, "weight", "conv2d", value, "int8", f"{name}.weight", value, True, region=region)


RESULT = SensitivityResult((row("a_b", 2.0), row("c", 1.0, "backbone")), output="output 'x'", points=2)


class OnlyNumbers:
    experiment = SimpleNamespace()

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((metrics, step))


class TensorBoard(OnlyNumbers):
    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.experiment: Any = SummaryWriter(str(directory))


def test_keys_hold_column_region_and_point() -> None:
    """E: per-layer scalars."""
    assert Tags("sensitivity", ("MSE",)).numbers(RESULT) == {
        "sensitivity.MSE/a_b.weight": 2.0,
        "sensitivity.MSE/backbone.c.weight": 1.0,
    }


def test_scalars_go_to_every_logger_in_one_call() -> None:
    """E: a CSV logger writes a row per call."""
    loggers = [OnlyNumbers(), OnlyNumbers()]
    log_scalars(loggers, {"a": 1.0, "b": 2.0}, 7)
    log_scalars(loggers, {}, 8)
    assert [logger.logged for logger in loggers] == [[({"a": 1.0, "b": 2.0}, 7)]] * 2


def test_tensorboard_gets_tables_and_histograms(tmp_path: Path) -> None:
    """E: read back with TensorBoard's own reader."""
    logger = TensorBoard(tmp_path)
    assert log_table([logger], "sensitivity", RESULT, 3, ("op_name", "MSE"), rows=1) == []
    log_histogram([logger], "spread", [1.0, 2.0, None, math.inf, math.nan], 3)
    log_histogram([logger], "nothing", [None, math.nan], 3)
    logger.experiment.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (text,) = events.Tensors("sensitivity/text_summary")
    content = text.tensor_proto.string_val[0].decode()
    assert text.step == 3
    assert "\na_b       2\n" in content
    assert "backbone" not in content
    assert "The first 1 of 2 rows; all are in the files." in content
    assert events.Tags()["histograms"] == ["spread"]
    assert events.Histograms("spread")[0].histogram_value.num == 2


def test_loggers_without_text_are_reported_by_name(tmp_path: Path) -> None:
    """E: for other loggers only files."""
    assert log_table([OnlyNumbers(), TensorBoard(tmp_path)], "t", RESULT, 0) == ["OnlyNumbers"]
    log_histogram([OnlyNumbers()], "t", [1.0], 0)
