"""What the page says a sensitivity is large by: the two limits of the diagnosis, from the numbers in the files."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from lightning_qat.reporting.html.point_table import point_table
from lightning_qat.reporting.html.run_folder import RunFolder, read_run
from lightning_qat.reporting.html.sensitivity_scale import output_size, sensitivity_scale
from tests.harness import run_folder

NAMES = [f"op{number}.output" for number in range(17)]
OUTPUT = np.random.default_rng(0).normal(3.0, 4.0, 10_000)


def written(tmp_path: Path, scores: list[float], output: bool = True, regions: int = 1) -> RunFolder:
    """A run with these sensitivities, and the values of the float model's output."""
    run = run_folder.write_run(tmp_path, NAMES[: len(scores)])
    place = run / "lightning_qat"
    path = place / "sensitivity.csv"
    with open(path, newline="") as file:
        (heading, *rows) = list(csv.reader(file))
    for row, score in zip(rows[-len(scores) :], scores, strict=True):
        row[heading.index("score")] = str(score)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([heading, *rows])
    row = {"mod_name": "<output>", "base_model_mean": OUTPUT.mean(), "base_model_var": OUTPUT.var()}
    rows_of_output = [row | {"region": str(region)} for region in range(regions)] if output else []
    document = {"output": "the whole output", "rows": rows_of_output}
    (place / "layer_comparison.json").write_text(json.dumps(document))
    (place / "sensitivity.json").write_text(json.dumps({"output": "the whole output", "rows": []}))
    return read_run(run)


def test_shares_are_of_the_root_mean_square_of_the_output(tmp_path: Path) -> None:
    run = written(tmp_path, [0.1, 0.2, 5.0])
    size = float(np.sqrt((OUTPUT**2).mean()))
    assert output_size(run) == pytest.approx(size)
    assert point_table(run).column("effect") == pytest.approx([0.1 / size, 0.2 / size, 5.0 / size])


@pytest.mark.parametrize(
    ("scores", "output", "limit", "large"),
    [
        ([0.1, 0.2, 5.0], True, 0.8, NAMES[2:3]),  # 4 times the median
        ([0.01, 0.02, 0.15], True, 5.0 / 32, []),  # far above the median, and nothing in the output
        ([0.01, 0.02, 0.17], True, 5.0 / 32, NAMES[2:3]),
        ([0.01, 0.02, 0.15], False, 0.08, NAMES[2:3]),  # the output is not known
        ([1.0, 1.1, 1.2], True, 4.4, []),
        ([0.0, 0.0, 0.0], False, 0.0, []),
    ],
)
def test_large_is_what_is_above_both_limits(
    tmp_path: Path, scores: list[float], output: bool, limit: float, large: list[str]
) -> None:
    found = sensitivity_scale(written(tmp_path, scores, output))
    assert list(found.large) == large
    assert f"the median of 3 points is {statistics.median(scores):.4g}" in found.text
    shown = float(found.text.partition("large from ")[2].partition(" ")[0])
    assert shown == pytest.approx(limit, rel=0.02)
    assert ("3.125 % of the output" in found.text) == output


def test_without_numbers_nothing_is_said(tmp_path: Path) -> None:
    """None at all; and NaN, which the diagnosis names itself."""
    assert sensitivity_scale(RunFolder("run", tmp_path)).text == ""
    assert sensitivity_scale(written(tmp_path, [float("nan")] * 3)).text == ""


def test_of_several_regions_the_outputs_are_not_mixed(tmp_path: Path) -> None:
    """Siblings: another output was compared than sensitivities are about; cells that are no numbers."""
    run = written(tmp_path, [0.1, 0.2, 5.0], regions=2)
    assert output_size(run) is None
    assert set(point_table(run).column("effect")) == {None}
    place = tmp_path / "lightning_qat"
    one = {"mod_name": "<output>", "base_model_mean": 1.0, "base_model_var": 1.0}
    for about, row in (("the output y", one), ("the whole output", one | {"base_model_mean": "nan"})):
        (place / "layer_comparison.json").write_text(json.dumps({"output": about, "rows": [row]}))
        assert output_size(read_run(tmp_path)) is None


def test_many_large_points_are_counted_and_the_largest_named(tmp_path: Path) -> None:
    found = sensitivity_scale(written(tmp_path, [0.1] * 10 + [1.0 + n for n in range(7)], output=False))
    assert found.large == tuple(NAMES[16:11:-1])
    assert found.more == 2
