"""A tuning of two tasks that must both hold, with the parts of the model quantized apart and as a whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml

from lightning_qat.cli.tune_stage import run_stage
from lightning_qat.tuning.tune import Tuning
from lightning_qat.tuning.tuning_result import TuningResult
from lightning_qat.tuning.tuning_settings import TuningSettings
from tests.harness.two_tasks import two_task_weights

SCRIPT = """
import warnings; warnings.filterwarnings("ignore")
import sys
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning_qat import Calibration, QuantizationAwareTraining
from tests.harness.trainers import quiet
from tests.harness.two_tasks import TwoTasks

torch.set_num_threads(1)
seed_everything(0, verbose=False)
target = sys.argv[1].split(",") if len(sys.argv) > 1 else "auto"
qconfig = {"activation": {"scheme": "symmetric"}}
callbacks = [QuantizationAwareTraining(qconfig, init_from="float.ckpt", target=target), Calibration(batches=4)]
Trainer(**{**quiet(), "max_epochs": 1, "callbacks": callbacks}).fit(TwoTasks())
"""


def tuned(arguments: tuple[str, ...], target: dict[str, str | float], output: str | None = None) -> TuningResult:
    """Tune by calibration in the present folder, with stages in this process."""
    without = ("wide calibrated", "wide QAT", "narrow QAT", "mixed QAT")
    settings = TuningSettings("train.py", arguments, "int4", "int8", target, skip=without, output=output)
    tuning = Tuning(settings, Path("out"), lambda line: None)

    def launch(request: Path) -> int:
        before = Path.cwd()
        run_stage(str(request))
        os.chdir(before)
        return 0

    tuning.stages.launch = launch
    return tuning.run()


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"state_dict": two_task_weights()}, tmp_path / "float.ckpt")
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("arguments", [(), ("backbone,digit,ink",)])
def test_both_tasks_hold_their_targets(arguments: tuple[str, ...]) -> None:
    """F, D7: at int4 one task holds and the other does not. Siblings: one quantized region, and three."""
    result = tuned(arguments, {"val_acc": "1%", "val_r2": "3%"})
    rows = {row.metric: row for row in result.rows}
    assert rows["val_acc"].target is not None
    assert rows["val_r2"].target is not None
    assert rows["val_r2"].values["narrow calibrated"] < rows["val_r2"].target
    assert result.recommended == "mixed calibrated"
    for row in rows.values():
        assert row.values["mixed calibrated"] >= (row.target or 0.0)
    assert 0 < len(result.raised) < result.points
    recommended = yaml.safe_load(Path("out/recommended.yaml").read_text())
    assert {rule["match"] for rule in recommended["overrides"]} == set(result.raised)
    if arguments:
        assert {name.split(".")[0] for name in result.raised} <= {"backbone", "digit", "ink"}
        errors = json.loads(Path("out/search/errors.json").read_text())
        assert errors["output"].startswith("the outputs of digit, ink")


def test_with_the_output_of_one_task_the_other_head_stays_narrow() -> None:
    result = tuned(("backbone,digit,ink",), {"val_r2": "3%"}, output="ink")
    assert result.recommended == "mixed calibrated"
    assert not any(name.startswith("digit.") for name in result.raised)
