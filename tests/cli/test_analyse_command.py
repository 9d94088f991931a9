"""``python -m lightning_qat analyse``: final reports from a checkpoint, and checkpoints that cannot be read."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_qat.callbacks.accuracy_table import AccuracyTable
from lightning_qat.callbacks.layer_comparison import LayerComparison
from lightning_qat.callbacks.sensitivity_analysis import SensitivityAnalysis
from lightning_qat.cli.command_line import main
from tests.harness.classifier import Classifier
from tests.harness.damage import is_one_sentence
from tests.harness.trainers import float_checkpoint, qat_trainer

PROJECT = """
import sys
from lightning_qat import AccuracyTable, Calibration, LayerComparison, QuantizationAwareTraining, SensitivityAnalysis
from tests.harness.classifier import Classifier
from tests.harness.trainers import trainer

callbacks = [QuantizationAwareTraining(), Calibration(batches=4), {callbacks}]
trainer(sys.argv[1], *callbacks, max_epochs={epochs}).fit(Classifier())
"""
REPORTING = "SensitivityAnalysis(), LayerComparison(), AccuracyTable()"


def project(tmp_path: Path, callbacks: str = REPORTING, epochs: int = 2) -> str:
    path = tmp_path / "train.py"
    path.write_text(PROJECT.format(callbacks=callbacks, epochs=epochs))
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with its checkpoints and reports."""
    path = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    callbacks = SensitivityAnalysis(), LayerComparison(), AccuracyTable()
    saved = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    qat_trainer(path, *callbacks, saved, max_epochs=2).fit(Classifier())
    return path


def reports(path: Path, *names: str) -> dict[str, Any]:
    return {name: json.loads((path / "lightning_qat" / name).read_text()) for name in names}


@pytest.mark.parametrize("epochs", [2, 5])
def test_reports_equal_those_of_the_run(tmp_path: Path, trained: Path, capsys: Any, epochs: int) -> None:
    """Also of a run that was to train longer: the checkpoint is looked at as it is."""
    script = project(tmp_path, epochs=epochs)
    root = tmp_path / "root"
    assert main(["analyse", script, str(root), "--ckpt_path", str(trained / "epoch=1.ckpt")]) == 0
    names = ("sensitivity.json", "layer_comparison.json", "diagnosis.json")
    found, expected = reports(root, *names), reports(trained, *names)
    for report in (*found.values(), *expected.values()):
        for row in report["rows"]:
            row.pop("rank_change", None)  # this one compares with the epoch before
    assert found == expected
    table = reports(root, "result_table.json")["result_table.json"]["runs"]["run"]
    assert table == {"QAT": reports(trained, "result_table.json")["result_table.json"]["runs"]["run"]["QAT"]}
    assert "SensitivityAnalysis, LayerComparison, AccuracyTable" in " ".join(capsys.readouterr().out.split())
    assert not list(root.rglob("*.ckpt"))


def test_output_and_an_earlier_epoch(tmp_path: Path, trained: Path) -> None:
    words = ["--ckpt_path", str(trained / "epoch=0.ckpt"), "--output", str(tmp_path / "there")]
    assert main(["analyse", project(tmp_path), str(tmp_path / "root"), *words]) == 0
    found = reports(tmp_path / "there", "sensitivity.json", "layer_comparison.json")
    assert found["sensitivity.json"]["epoch"] == 0
    assert found["layer_comparison.json"]["rows"]
    assert not (tmp_path / "root" / "lightning_qat" / "sensitivity.json").exists()


@pytest.mark.parametrize(
    ("callbacks", "words", "message"),
    [
        (REPORTING, [], "analyse needs a checkpoint of the run: add --ckpt_path last.ckpt."),
        ("", ["--ckpt_path", "{trained}"], "no callback of this project reports at the end of training: add"),
        (REPORTING, ["--ckpt_path", "{float}"], "ckpt_path is a float checkpoint"),
        (REPORTING, ["--ckpt_path", "{tmp}/none.ckpt"], "there is no file"),
    ],
)
def test_what_is_missing_is_said(
    tmp_path: Path, trained: Path, capsys: Any, callbacks: str, words: list[str], message: str
) -> None:
    places = {"trained": trained / "epoch=1.ckpt", "tmp": tmp_path, "float": float_checkpoint(tmp_path)}
    words = [word.format(**places) for word in words]
    assert main(["analyse", project(tmp_path, callbacks), str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


def damaged(kind: str, content: bytes, path: Path) -> Path:
    """A damaged copy of a checkpoint."""
    file = path / "damaged.ckpt"
    data: Any = torch.load(path / "whole.ckpt")
    if kind == "empty":
        file.touch()
    elif kind == "cut off":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "text":
        file.write_text("weights")
    else:
        if kind == "list":
            data = [1]
        elif kind == "object":
            data["object"] = Path()
        else:
            del data[kind]
        torch.save(data, file)
    return file


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("empty", "it is empty"),
        ("cut off", "its "),
        ("text", "its 7 bytes are damaged"),
        ("list", "it must be a mapping with the keys state_dict, not [1]"),
        ("object", "it holds an object of pathlib"),
        ("state_dict", "state_dict is missing"),
        ("optimizer_states", "it does not fit this project (KeyError: "),
    ],
)
@pytest.mark.parametrize("command", ["analyse", "check"])
def test_damaged_checkpoint_is_one_sentence(
    tmp_path: Path, trained: Path, capsys: Any, command: str, kind: str, problem: str
) -> None:
    """In every command that takes one; also in the middle of what Lightning itself restores."""
    (tmp_path / "whole.ckpt").write_bytes((trained / "epoch=1.ckpt").read_bytes())
    file = damaged(kind, (tmp_path / "whole.ckpt").read_bytes(), tmp_path)
    assert main([command, project(tmp_path), str(tmp_path), "--ckpt_path", str(file)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"error: {file} is not a checkpoint that can be restored: {problem}"), message
    assert is_one_sentence(message.removeprefix("error: ")) or kind == "object"


def test_reports_that_cannot_be_written_are_an_error(tmp_path: Path, trained: Path, capsys: Any) -> None:
    """In training they are a warning; here they are what was asked for."""
    (tmp_path / "there").write_text("mine")
    words = ["--ckpt_path", str(trained / "epoch=1.ckpt"), "--output", str(tmp_path / "there")]
    with pytest.warns(UserWarning, match="could not be written"):
        assert main(["analyse", project(tmp_path, "AccuracyTable()"), str(tmp_path / "there"), *words]) == 2
    assert re.search(
        r"error: \S+/there/lightning_qat/\S+ cannot be written: Not a directory\.", capsys.readouterr().err
    )


FAILING = """
class Classifier(Classifier):
    def {hook}(self, *args):
        raise RuntimeError("the camera is off")

"""


def test_an_analysis_that_fails_is_the_result_of_the_command(tmp_path: Path, trained: Path, capsys: Any) -> None:
    """In a run it is a warning; here it is what was asked for."""
    script = Path(project(tmp_path, "SensitivityAnalysis()"))
    text = script.read_text().replace("callbacks = [", FAILING.format(hook="validation_step") + "callbacks = [", 1)
    script.write_text(text)
    words = ["analyse", str(script), str(tmp_path / "root"), "--ckpt_path", str(trained / "epoch=1.ckpt")]
    with pytest.warns(UserWarning, match="the camera is off"):
        assert main(words) == 2
    assert (
        "error: SensitivityAnalysis: the analysis failed with RuntimeError: the camera is off"
        in capsys.readouterr().err
    )


def test_an_error_of_the_project_is_not_blamed_on_a_checkpoint_that_was_restored(tmp_path: Path, trained: Path) -> None:
    """Also where the checkpoint holds other objects and the project reads them on purpose."""
    checkpoint = torch.load(trained / "epoch=1.ckpt", weights_only=True)
    torch.save({**checkpoint, "arguments": argparse.Namespace(lr=1)}, tmp_path / "other.ckpt")
    script = Path(project(tmp_path))
    text = script.read_text().replace("fit(Classifier())", "fit(Classifier(), weights_only=False)")
    text = text.replace("callbacks = [", FAILING.format(hook="on_fit_start") + "callbacks = [", 1)
    script.write_text(text)
    with pytest.raises(RuntimeError, match="the camera is off"):
        main(["analyse", str(script), str(tmp_path / "root"), "--ckpt_path", str(tmp_path / "other.ckpt")])
