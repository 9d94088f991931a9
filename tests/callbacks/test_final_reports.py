"""Runs that are killed behind their last checkpoint: the resumed run makes the final reports, as the run would have.

Lightning has nothing left to train then, and calls neither ``on_train_start`` nor ``on_train_end``. It was met with
the reports of analyses at the end of training; its siblings are the accuracy table, the fingerprint of a float run, the
plan, and reports that the first run had made in a folder that the resumed run does not have.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F

from lightning_qat.callbacks.accuracy_table import AccuracyTable
from lightning_qat.callbacks.convergence_monitor import ConvergenceMonitor
from lightning_qat.callbacks.layer_comparison import LayerComparison
from lightning_qat.callbacks.layer_statistics import LayerStatistics
from lightning_qat.callbacks.model_check import ModelCheck
from lightning_qat.callbacks.pipeline_check import PipelineCheck
from lightning_qat.callbacks.pipeline_fingerprint import PipelineFingerprint
from lightning_qat.callbacks.sensitivity_analysis import SensitivityAnalysis
from tests.harness import noisy_run
from tests.harness.state import assert_same, state_of
from tests.harness.trainers import qat_trainer, trainer

ROOT = Path(__file__).parents[2]
REPORTS = (
    "sensitivity.json",
    "layer_comparison.json",
    "diagnosis.json",
    "layer_statistics.json",
    "convergence.json",
    "model_check_result.json",
    "result_table.json",
    "quant_plan.json",
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback"),
    pytest.mark.filterwarnings("ignore:PipelineCheck. cannot tell"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
]


class Classifier(noisy_run.Classifier):
    """With dropout, but without noise in its evaluation: the random state is not part of a checkpoint."""

    def step(self, batch: tuple[Tensor, Tensor], name: str) -> Tensor:
        logits = self(batch[0])["logits"]
        loss = F.cross_entropy(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.log_dict({f"{name}_loss": loss, f"{name}_accuracy": self.accuracy})
        return loss


class Killed(Exception):
    """Ends a run in the middle of a hook, as far as its files and checkpoints can tell."""


class KillAt(Callback):
    """Raises at the end of training. List it in front of the callbacks that report."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise Killed


def reporting() -> list[Callback]:
    return [
        ModelCheck(),
        SensitivityAnalysis(every_n_epochs=2),
        LayerComparison(),
        LayerStatistics(),
        ConvergenceMonitor(),
        PipelineCheck(batches=2, rungs=[2]),
        AccuracyTable(),
    ]


def run(path: Path, *callbacks: Callback, ckpt_path: Path | None = None, **kwargs: Any) -> LightningModule:
    torch.manual_seed(0)
    module = Classifier()
    last = ModelCheckpoint(path, save_last=True, **kwargs)
    qat_trainer(path, *callbacks, last, max_epochs=2).fit(module, ckpt_path=ckpt_path)
    return module


def killed(path: Path, **kwargs: Any) -> Path:
    with pytest.raises(Killed):
        run(path, KillAt(), *reporting(), **kwargs)
    return path / "last.ckpt"


def contents(path: Path, *without: str) -> dict[str, Any]:
    """The reports of a run, without columns that a resumed run cannot know."""
    found = {name: json.loads((path / "lightning_qat" / name).read_text()) for name in REPORTS}
    for row in found["layer_statistics.json"]["rows"]:
        for column in without:
            row.pop(column)
    del found["model_check_result.json"]["rows"]  # a resumed run does not start from random weights
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody killed."""
    path = tmp_path_factory.mktemp("whole")
    run(path, *reporting())
    return path


def test_run_that_is_killed_behind_its_last_checkpoint_is_reported_when_resumed(tmp_path: Path, whole: Path) -> None:
    checkpoint = killed(tmp_path)
    assert not (tmp_path / "lightning_qat" / "layer_comparison.json").exists()
    module = run(tmp_path, *reporting(), ckpt_path=checkpoint)
    assert contents(tmp_path) == contents(whole)
    for name in ("layer_comparison.csv", "sensitivity.csv", "layer_statistics.csv", "diagnosis.txt"):
        file, expected = (path / "lightning_qat" / name for path in (tmp_path, whole))
        assert file.read_text() == expected.read_text(), name
    weights = torch.load(checkpoint)["state_dict"]
    assert_same({k: v for k, v in state_of(module).items() if k in weights}, {k: weights[k] for k in state_of(module)})


def test_resumed_run_in_another_folder_makes_all_reports(tmp_path: Path, whole: Path) -> None:
    """A resumed run gets a log directory of its own. How many codes flipped, only the run that trained knows."""
    checkpoint = killed(tmp_path / "first")
    run(tmp_path / "second", *reporting(), ckpt_path=checkpoint)
    found, expected = (contents(path, "flip_rate") for path in (tmp_path / "second", whole))
    for name in ("sensitivity.json", "layer_comparison.json", "layer_statistics.json", "convergence.json"):
        assert found[name] == expected[name], name
    stages = found["result_table.json"]["runs"]["run"]
    assert stages["QAT"] == expected["result_table.json"]["runs"]["run"]["QAT"]


def test_checkpoint_that_validation_wrote_is_reported_too(tmp_path: Path, whole: Path) -> None:
    """It is older than the hooks at the end of its epoch; Lightning calls these again."""
    checkpoint = killed(tmp_path / "first", save_on_train_epoch_end=False)
    run(tmp_path / "second", *reporting(), ckpt_path=checkpoint)
    found, expected = (contents(path, "flip_rate") for path in (tmp_path / "second", whole))
    for name in ("sensitivity.json", "layer_comparison.json", "layer_statistics.json"):
        assert found[name]["rows"] == expected[name]["rows"], name
    checks, expected_checks = (
        [(row["check"], row["status"]) for row in contents["convergence.json"]["rows"]]
        for contents in (found, expected)
    )
    assert checks == expected_checks


def test_monitor_keeps_its_verdict(tmp_path: Path) -> None:
    """A verdict that the killed run has reached is not lost, nor what PipelineCheck does about it."""
    paths = tmp_path / "first", tmp_path / "second"
    with pytest.raises(Killed):
        run(paths[0], KillAt(), ConvergenceMonitor())
    monitor = ConvergenceMonitor()
    run(paths[1], monitor, ckpt_path=paths[0] / "last.ckpt")
    first, second = (json.loads((path / "lightning_qat" / "convergence.json").read_text()) for path in paths)
    assert monitor.result is not None
    assert first == second


def test_averages_are_reported_as_at_the_end_of_training(tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        return [EMAWeightAveraging(decay=0.5), AccuracyTable(), LayerComparison()]

    run(tmp_path / "whole", *callbacks())
    with pytest.raises(Killed):
        run(tmp_path / "killed", KillAt(), *callbacks())
    run(tmp_path / "killed", *callbacks(), ckpt_path=tmp_path / "killed" / "last.ckpt")
    for name in ("layer_comparison.json", "result_table.json"):
        found, expected = (json.loads((tmp_path / p / "lightning_qat" / name).read_text()) for p in ("killed", "whole"))
        assert found == expected, name


def test_fingerprint_of_a_float_run(tmp_path: Path) -> None:
    def fit(*callbacks: Callback, ckpt_path: Path | None = None) -> None:
        torch.manual_seed(0)
        trainer(tmp_path, *callbacks, ModelCheckpoint(tmp_path, save_last=True)).fit(Classifier(), ckpt_path=ckpt_path)

    with pytest.raises(Killed):
        fit(KillAt(), PipelineFingerprint())
    assert not (tmp_path / "lightning_qat" / "pipeline_fingerprint.json").exists()
    fit(PipelineFingerprint(), ckpt_path=tmp_path / "last.ckpt")
    assert json.loads((tmp_path / "lightning_qat" / "pipeline_fingerprint.json").read_text())["weights"]


def test_fit_that_trains_reports_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second fit of the same Trainer, also behind one that failed before it trained."""
    checkpoint = killed(tmp_path / "first")
    calls: list[int] = []
    comparison = LayerComparison()
    original = comparison.on_train_end
    monkeypatch.setattr(comparison, "on_train_end", lambda *args: (calls.append(1), original(*args)))
    fit = qat_trainer(tmp_path / "second", comparison, max_epochs=3)
    with pytest.raises(Exception, match="optimizer"):
        fit.fit(Classifier(), ckpt_path=_without_optimizer(checkpoint, tmp_path / "broken.ckpt"))
    fit.fit(Classifier(), ckpt_path=checkpoint)
    assert len(calls) == 1
    assert "run" not in vars(fit.fit_loop)


def _without_optimizer(checkpoint: Path, path: Path) -> Path:
    content = torch.load(checkpoint)
    del content["optimizer_states"]
    torch.save(content, path)
    return path


SCRIPT = """
import os, sys
from pathlib import Path
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_qat import LayerComparison
from tests.harness.noisy_run import Classifier
from tests.harness.trainers import qat_trainer

class Kill(Callback):
    def on_train_end(self, trainer, pl_module):
        os._exit(9)

path = Path(sys.argv[1])
torch.manual_seed(0)
qat_trainer(path, Kill(), LayerComparison(), ModelCheckpoint(path, save_last=True), max_epochs=1).fit(Classifier())
"""


def test_process_that_is_killed(tmp_path: Path) -> None:
    """Without any Python code running afterwards."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 9, done.stderr.decode()[-2000:]
    assert not (tmp_path / "lightning_qat" / "layer_comparison.json").exists()
    qat_trainer(tmp_path, LayerComparison(), max_epochs=1).fit(noisy_run.Classifier(), ckpt_path=tmp_path / "last.ckpt")
    assert json.loads((tmp_path / "lightning_qat" / "layer_comparison.json").read_text())["rows"]
