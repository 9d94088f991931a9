"""Two and four processes, however they are started, against one process over the same data; and ranks that fail.

Tolerance: scales that calibration gives are equal, bit for bit; weights after two epochs differ by 1e-6 at most, as
ranks add gradients in another order (float32, weights of about 0.3). What the analyses say differs by 1e-3 of it.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_qat
from tests.callbacks.test_ddp import pytestmark as ddp_warnings
from tests.callbacks.test_unwritable import all_callbacks
from tests.harness.ranks import AtTheEnd, Shared, Writers, main
from tests.harness.state import assert_same
from tests.harness.trainers import trainer

ROOT = Path(__file__).parents[2]
REPORTS = {
    "sensitivity": ("epoch", "region", "op_name", "sensitive_type"),
    "layer_statistics": ("epoch", "region", "point"),
    "layer_comparison": ("epoch", "region", "index"),
    "diagnosis": ("epoch", "region", "point"),
}
"""Tables, and what is different in all of their rows."""
pytestmark = [*ddp_warnings, pytest.mark.timeout(120)]
STARTED = [
    pytest.param(strategy, devices, marks=pytest.mark.full) for strategy in ("ddp_spawn", "ddp") for devices in (2, 4)
]


def train(path: Path, strategy: str, devices: int, kind: str = "fixed") -> list[dict[str, Any]]:
    """What every rank had at the end. Forked from this process, or started as a user's script is."""
    if strategy == "ddp_fork":
        main(path, strategy, devices, kind, Writers(path))
    else:
        command = [sys.executable, "-m", "tests.harness.ranks", str(path), strategy, str(devices), kind]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr.decode()
    return ends(path, devices)


def ends(path: Path, devices: int) -> list[dict[str, Any]]:
    return [torch.load(path / f"rank{rank}.pt") for rank in range(devices)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one process."""
    paths = {kind: tmp_path_factory.mktemp(kind) for kind in ("fixed", "learned")}
    for kind, path in paths.items():
        main(path, "auto", 1, kind)
    return paths


def rows(path: Path, name: str) -> list[dict[str, str]]:
    with open(path / "lightning_qat" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("strategy", "devices", "kind"),
    [
        ("ddp_fork", 4, "fixed"),
        ("ddp_fork", 2, "learned"),
        pytest.param("ddp_fork", 2, "fixed", marks=pytest.mark.full),
        pytest.param("ddp_fork", 4, "learned", marks=pytest.mark.full),
        *(pytest.param(*run.values, "fixed", marks=run.marks) for run in STARTED),
    ],
)
def test_several_processes_are_one_process_over_the_same_data(
    tmp_path: Path, alone: dict[str, Path], strategy: str, devices: int, kind: str
) -> None:
    found = train(tmp_path, strategy, devices, kind)
    (expected,) = ends(alone[kind], 1)
    for rank in found:
        assert_same(rank["state"], found[0]["state"])
        assert list(rank["state"]) == list(expected["state"])
        for name, tensor in expected["state"].items():
            exact = kind == "fixed" and name.endswith("scale") and "weight" not in name
            torch.testing.assert_close(rank["state"][name], tensor, rtol=0, atol=0 if exact else 1e-6, msg=name)
        assert rank["metrics"]["val_loss"] == pytest.approx(expected["metrics"]["val_loss"], rel=1e-5)
    for name, keys in REPORTS.items():
        one, several = rows(alone[kind], name), rows(tmp_path, name)
        unique = sorted(tuple(row[key] for key in keys) for row in one)
        assert len(set(unique)) == len(unique)
        assert sorted(tuple(row[key] for key in keys) for row in several) == unique
        if name.startswith("layer"):  # the sketch of sensitivity draws other numbers for batches of another size
            assert_same_numbers(one, several)
    assert [path.name for path in tmp_path.glob("written*")] == ["written0"]


def assert_same_numbers(one: list[dict[str, str]], several: list[dict[str, str]]) -> None:
    """In all columns but for the variance of a weight: it is unbiased, and a weight counts once for each batch."""
    for a, b in zip(one, several, strict=True):
        skipped = {"shape", *(("base_model_var", "analy_model_var") if a.get("base_op_type") == "weight" else ())}
        for column in a.keys() - skipped:
            if re.fullmatch(r"[-\d.e+]+", a[column]):
                assert float(a[column]) == pytest.approx(float(b[column]), rel=1e-3, abs=1e-6), (a, column)
            else:
                assert a[column] == b[column]


def test_rank_without_a_batch_takes_part_in_everything(tmp_path: Path) -> None:
    """Calibration and analyses have data on rank 0 alone; both ranks come to the end, with the scales of these data."""
    one, other = train(tmp_path, "ddp_fork", 2, "without batch")
    assert_same(one["state"], other["state"])
    (tmp_path / "alone").mkdir()
    main(tmp_path / "alone", "auto", 1, "without batch")
    (expected,) = ends(tmp_path / "alone", 1)
    scales = {k for k in expected["state"] if k.endswith("scale") and "weight" not in k}
    assert scales
    assert_same({k: one["state"][k] for k in scales}, {k: expected["state"][k] for k in scales})


@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp", marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ["raises", "raises in calibration"])
def test_rank_that_raises_leaves_no_other_waiting(tmp_path: Path, strategy: str, kind: str) -> None:
    """It ends the run of all, with its own error."""
    with pytest.raises(Exception, match="only here"):
        train(tmp_path, strategy, 2, kind)
    assert not list(tmp_path.glob("rank*.pt"))


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_all_callbacks_come_to_the_end_where_metrics_are_reduced_over_ranks(tmp_path: Path) -> None:
    """``sync_dist=True``: reading a metric is a step of all ranks. One that rank 0 took alone hung the run."""
    callbacks = [lightning_qat.QuantizationAwareTraining(), lightning_qat.Calibration(batches=8), *all_callbacks()]
    run = trainer(
        tmp_path, *callbacks, Writers(tmp_path), AtTheEnd(tmp_path), max_epochs=2, strategy="ddp_fork", devices=2
    )
    run.fit(Shared())
    one, other = ends(tmp_path, 2)
    assert_same(one["state"], other["state"])
    assert [path.name for path in tmp_path.glob("written*")] == ["written0"]
    assert {"report.html", "pipeline_check.json", "float_finetune.json", "result_table.json"} <= {
        path.name for path in (tmp_path / "lightning_qat").iterdir()
    }
