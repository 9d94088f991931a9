"""D2 in a Trainer run: points by a sensitivity table of an earlier run, which no later run needs."""

from __future__ import annotations

import csv
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_qat.callbacks.insertion.quantized_checkpoint import load_quantized
from lightning_qat.callbacks.sensitivity_analysis import SensitivityAnalysis
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.region.regions import find_regions
from tests.harness.classifier import Classifier
from tests.harness.trainers import qat_trainer


@pytest.fixture(scope="module")
def run_before(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The table of a run of two epochs, and its activation points in the order of the last epoch."""
    folder = tmp_path_factory.mktemp("before")
    qat_trainer(folder, SensitivityAnalysis(), max_epochs=2).fit(Classifier())
    (path,) = folder.rglob("sensitivity.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = [r for r in rows if r["epoch"] == rows[-1]["epoch"] and r["sensitive_type"] == "activation"]
    assert len({row["epoch"] for row in rows}) == 2
    return path, [row["point"] for row in sorted(last, key=lambda row: -float(row["score"]))]


def overrides(path: Path, top: object = 2) -> dict[str, Any]:
    return {"overrides": [{"sensitivity": str(path), "top": top, "activation": {"dtype": "int16"}}]}


def region_of(module: Classifier) -> Region:
    (region,) = find_regions(module).values()
    return region


def wide(module: Classifier) -> set[str]:
    return {point.name for point in region_of(module).plan.points if point.dtype == "int16"}


def test_the_first_points_are_raised_and_no_later_run_needs_the_table(
    run_before: tuple[Path, list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table, ranked = run_before
    path = tmp_path / "copy.csv"
    path.write_bytes(table.read_bytes())
    module = Classifier()
    run = qat_trainer(tmp_path, qat=overrides(path))
    with caplog.at_level(logging.INFO):
        run.fit(module)
    assert wide(module) == set(ranked[:2])
    assert f"2 of the {len(ranked)} activation points in the table: {ranked[0]}, {ranked[1]}." in caplog.text
    run.save_checkpoint(tmp_path / "quantized.ckpt")
    path.unlink()
    loaded = load_quantized(Classifier, tmp_path / "quantized.ckpt")
    assert wide(loaded) == set(ranked[:2])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        resumed = Classifier()
        qat_trainer(tmp_path / "resumed", qat=overrides(path), max_epochs=2).fit(
            resumed, ckpt_path=tmp_path / "quantized.ckpt", weights_only=True
        )
    assert wide(resumed) == set(ranked[:2])
    assert region_of(resumed).plan == region_of(module).plan
    assert not [w for w in said if "another configuration" in str(w.message)]


def test_another_rule_beside_the_table_is_still_compared(run_before: tuple[Path, list[str]], tmp_path: Path) -> None:
    """What differs between a checkpoint and a run is said as before, for the rules that are written out."""
    table, _ = run_before
    run = qat_trainer(tmp_path, qat=overrides(table))
    run.fit(Classifier())
    run.save_checkpoint(tmp_path / "quantized.ckpt")
    more = {"overrides": [*overrides(table)["overrides"], {"op_type": "linear", "weight": {"dtype": "int4"}}]}
    with pytest.warns(UserWarning, match="another configuration than this run's"):
        qat_trainer(tmp_path / "next", qat=more, max_epochs=2).fit(
            Classifier(), ckpt_path=tmp_path / "quantized.ckpt", weights_only=True
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"there is no such file; give the sensitivity.csv of a run of it"),
        ("point,score\nbackbone.conv1.output,1\n", r"1 of its 1 points are of ops .* 'backbone.conv1' \(near .*conv1"),
        ("point,mse\nconv1.output,1\n", r"it has no column score"),
    ],
)
def test_a_wrong_table_stops_the_run_before_training(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "table.csv"
    if content is not None:
        path.write_text(content)
    module = Classifier()
    run = qat_trainer(tmp_path, qat=overrides(path))
    with pytest.raises(MisconfigurationException, match=message):
        run.fit(module)
    assert run.global_step == 0
    assert not find_regions(module)


@pytest.mark.parametrize("top", [0, "0%", "some"])
def test_a_wrong_top_is_said_when_the_callback_is_made(tmp_path: Path, top: object) -> None:
    with pytest.raises(MisconfigurationException, match="top must be a"):
        qat_trainer(tmp_path, qat=overrides(tmp_path / "table.csv", top))
