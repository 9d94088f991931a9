"""What loggers get by default: the worst points and what follows them, not a curve for each of a thousand points."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult, SensitivityRow
from lightning_qat.analysis.statistics.code_histogram import CodeHistogram
from lightning_qat.analysis.statistics.statistics import LayerStatisticsResult
from lightning_qat.reporting.loggers import log_code_histogram
from lightning_qat.reporting.reports_of_run import RunReports
from lightning_qat.reporting.run_outputs import RunOutputs
from lightning_qat.reporting.tensorboard_tags import LAYER_STATISTICS, WorstPoints, sensitivity_tags
from tests.harness.run_folder import point_names, statistics_row


def scores(values: dict[str, float]) -> SensitivityResult:
    rows = (SensitivityRow(n, "weight", "linear", v / 2, "int8", n, v, True) for n, v in values.items())
    return SensitivityResult(tuple(rows))


def test_the_worst_points_have_curves_and_keep_them() -> None:
    worst = WorstPoints(sensitivity_tags("MSE"))
    first = worst.numbers(scores({f"p{i}": float(i) for i in range(20)}))
    assert set(first) == {f"sensitivity.{c}/p{i}" for i in range(15, 20) for c in ("score", "MSE")}
    assert first["sensitivity.MSE/p19"] == 9.5
    second = worst.numbers(scores({f"p{i}": float(-i % 20) for i in range(20)}))
    assert {tag for tag in second if "score" in tag} == {
        f"sensitivity.score/p{i}" for i in (*range(15, 20), 1, 2, 3, 4, 5)
    }
    third = worst.numbers(scores({f"q{i}": 1.0 for i in range(20)}))
    assert third == {}  # ten are followed at most, and none of them is here


def test_nan_is_the_worst_and_what_is_perfect_is_not_bad() -> None:
    nan, inf = float("nan"), float("inf")
    draw = random.Random(0)
    row = statistics_row("x", draw)
    values = {"a": (0.0, inf), "b": (nan, 10.0), "c": (0.5, nan), "d": (0.0, inf)}
    rows = tuple(type(row)(**{**vars(row), "point": n, "clipped_share": c, "sqnr": s}) for n, (c, s) in values.items())
    numbers = WorstPoints(LAYER_STATISTICS).numbers(LayerStatisticsResult(rows))
    assert [tag.rpartition("/")[2] for tag in numbers if "clipped_share" in tag] == ["b", "c"]
    assert [tag.rpartition("/")[2] for tag in numbers if ".sqnr/" in tag] == ["c", "b"]


def test_many_points_have_few_tags_unless_all_are_asked_for(tmp_path: Path) -> None:
    draw = random.Random(0)
    names = point_names(200)
    histograms = tuple(CodeHistogram(name, -128, 8, (1,) * 32, 2, 3) for name in names)
    counts = {}
    for per_point in (False, True):
        logger = SimpleNamespace(experiment=SummaryWriter(tmp_path / str(per_point)))
        logger.log_metrics = lambda numbers, step, to=logger.experiment: [
            to.add_scalar(tag, value, step) for tag, value in numbers.items()
        ]
        outputs = RunOutputs("layer_statistics", LAYER_STATISTICS, RunReports(pytest.fail, pytest.fail))
        for step in range(2):
            rows = tuple(statistics_row(name, draw) for name in names)
            outputs.log(LayerStatisticsResult(rows, histograms), [logger], step, per_point=per_point)
        logger.experiment.close()
        events = EventAccumulator(str(tmp_path / str(per_point)), size_guidance={"scalars": 0}).Reload()
        counts[per_point] = len(events.Tags()["scalars"])
        assert len([tag for tag in events.Tags()["histograms"] if tag.startswith("layer_statistics.codes/")]) == 3
        assert "custom_scalars__config__" in events.Tags()["tensors"]
        assert events.Scalars("layer_statistics.count/rounding")[-1].value == 200
    assert counts[False] <= 4 * 10 + 1
    assert counts[True] == 13 * 200 + 1


def test_a_histogram_of_codes_has_numpys_mean_and_its_clipped_ends() -> None:
    sent: dict[str, Any] = {}
    logger = SimpleNamespace(experiment=SimpleNamespace(add_histogram_raw=lambda tag, **kwargs: sent.update(kwargs)))
    log_code_histogram([logger, object()], "t", CodeHistogram("a", -2, 1, (1, 2, 0, 4), below=3, above=5), 7)
    codes = np.repeat([-3, -2, -1, 0, 1, 2], [3, 1, 2, 0, 4, 5])
    assert (sent["num"], sent["sum"], sent["sum_squares"]) == (15, codes.sum(), (codes**2).sum())
    assert sent["bucket_limits"] == [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]
    assert sent["bucket_counts"] == [3, 1, 2, 0, 4, 5]
    assert (sent["min"], sent["max"], sent["global_step"]) == (-3, 2, 7)
