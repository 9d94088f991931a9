"""``fingerprint``, ``pipeline-check`` and ``compare-pipelines`` on a finished project (C3 to C6)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_qat.cli.command_line import main
from tests.harness.small_digits import Digits
from tests.harness.trainers import quiet

PROJECT = """
import sys
from pathlib import Path
from lightning.pytorch import Trainer
from lightning_qat import Calibration, QuantizationAwareTraining
from tests.harness.small_digits import Digits
from tests.harness.trainers import quiet

directory, normalized, ckpt_path, init_from = sys.argv[1:5]
callbacks = [QuantizationAwareTraining(init_from=init_from), Calibration(batches=2)] if init_from != "-" else []
settings = quiet() | {"max_epochs": 3, "default_root_dir": directory}
trainer = Trainer(callbacks=callbacks, **settings)
trainer.fit(Digits(normalized_in_training=normalized == "yes"), ckpt_path=None if ckpt_path == "-" else ckpt_path)
Path(directory, "trained").touch()
"""


@pytest.fixture(scope="module")
def float_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("float")
    torch.manual_seed(0)
    seed_everything(0, verbose=False)
    trainer = Trainer(**(quiet() | {"max_epochs": 6, "limit_val_batches": 0, "default_root_dir": directory}))
    trainer.fit(Digits(lr=0.01))
    trainer.save_checkpoint(directory / "float.ckpt")
    return str(directory / "float.ckpt")


@pytest.fixture
def train(tmp_path: Path) -> str:
    (tmp_path / "train.py").write_text(PROJECT)
    return str(tmp_path / "train.py")


def test_finished_project_is_compared_with_qat(
    tmp_path: Path, train: str, float_checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """C5: made from the checkpoint alone; nothing is trained."""
    one, other = str(tmp_path / "a"), str(tmp_path / "b")
    assert main(["fingerprint", train, str(tmp_path), "yes", float_checkpoint, "-", "--output", one]) == 0
    assert main(["fingerprint", train, str(tmp_path), "no", float_checkpoint, "-", "--output", other]) == 0
    assert not (tmp_path / "trained").exists()
    reference, sick = f"{one}/pipeline_fingerprint.json", f"{other}/pipeline_fingerprint.json"
    stored = json.loads(Path(reference).read_text())
    assert stored["metrics"]["val_acc"] > 0.9
    assert not any("_quantization" in name for name in stored["weights"])
    assert "PipelineCheck(reference=" in capsys.readouterr().out

    assert main(["compare-pipelines", reference, reference]) == 0
    assert main(["compare-pipelines", reference, sick, "--output", str(tmp_path / "c")]) == 1
    assert "normalization missing here?" in (tmp_path / "c" / "pipeline_differences.txt").read_text()

    healthy = [train, str(tmp_path), "yes", "-", float_checkpoint, "--batches", "10", "--reference", reference]
    assert main(["pipeline-check", *healthy]) == 0
    capsys.readouterr()
    broken = [train, str(tmp_path), "no", "-", float_checkpoint, "--batches", "10", "--reference", reference]
    assert main(["pipeline-check", *broken]) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "pipeline misaligned (rung 2, lr 0, BN fixed)" in output
    assert "normalization missing here?" in output
    data = json.loads((tmp_path / "lightning_qat" / "pipeline_check.json").read_text())
    assert data["verdict"] == "pipeline misaligned"


def test_checkpoint_is_given_to_scripts_that_know_no_such_option(
    tmp_path: Path, train: str, float_checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """C5: a script without LightningCLI has no --ckpt_path; it is handed to trainer.fit, with fake-quant too."""

    def fingerprint(ckpt_path: str, name: str, *options: str) -> dict[str, object]:
        directory = str(tmp_path / name)
        assert main(["fingerprint", train, str(tmp_path), "yes", ckpt_path, "-", "--output", directory, *options]) == 0
        stored: dict[str, object] = json.loads((tmp_path / name / "pipeline_fingerprint.json").read_text())
        return stored

    expected = fingerprint(float_checkpoint, "by_script")
    capsys.readouterr()
    given = fingerprint("-", "by_command", "--ckpt_path", float_checkpoint)
    assert "Note:" not in capsys.readouterr().out
    assert {k: given[k] for k in ("metrics", "losses", "weights")} == {
        k: expected[k] for k in ("metrics", "losses", "weights")
    }
    untrained = fingerprint("-", "without")
    assert untrained["weights"] != expected["weights"]
    assert "give them: --ckpt_path float.ckpt" in " ".join(capsys.readouterr().out.split())

    reference = str(tmp_path / "by_script" / "pipeline_fingerprint.json")
    words = ["pipeline-check", train, str(tmp_path), "yes", "-", "-", "--ckpt_path", float_checkpoint]
    assert main([*words, "--batches", "10", "--reference", reference]) == 0
    assert main(["fingerprint", train, str(tmp_path), "yes", "-", "-", "--ckpt_path", "nowhere.ckpt"]) == 2
    assert "ckpt_path: there is no file 'nowhere.ckpt'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare-pipelines", "only.json"], "give two fingerprints"),
        (["compare-pipelines", "a.json", "b.json"], "a.json is not a fingerprint: there is no such file"),
        (["pipeline-check", "train.py", "--reference", "a.json"], "a.json is not a fingerprint: there is no such file"),
        (["fingerprint", "nowhere.py"], "there is no script 'nowhere.py'"),
    ],
)
def test_bad_input_is_one_clear_error(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err
