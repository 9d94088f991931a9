"""``python -m lightning_qat check`` and ``inspect`` on projects of every kind."""

from __future__ import annotations

import importlib.util
import inspect as python_inspect
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

from examples.digits import DigitsDataModule
from lightning_qat.cli.command_line import main
from lightning_qat.cli.inspect_command import find_point
from lightning_qat.cli.script_surroundings import one_device
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.reporting.model_check_file import read_model_check

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "examples" / "digits.py")

PLAIN = """
import sys
from pathlib import Path
from lightning.pytorch import Trainer
from lightning_qat import Calibration, QuantizationAwareTraining, ZeroLRFinetune
from tests.harness.classifier import Classifier, loader

class Here(Classifier):  # of __main__
    pass

if __name__ == "__main__":
    options = dict(max_epochs=3, accelerator="cpu", default_root_dir=sys.argv[1], {options})
    trainer = Trainer(callbacks=[{callbacks}], **options)
    try:
        trainer.fit(Here(), loader(), loader(16))
    except Exception:  # whatever happens
        print("caught")
    Path(sys.argv[1], "trained").touch()
"""
QAT = "QuantizationAwareTraining(), Calibration(batches=2)"


def script(tmp_path: Path, callbacks: str = QAT, options: str = "") -> str:
    """A project without LightningCLI; its one argument is where it writes."""
    path = tmp_path / "train.py"
    path.write_text(PLAIN.format(callbacks=callbacks, options=options))
    return str(path)


def written(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


CHECKED = {"lightning_qat/model_check_result.txt", "lightning_qat/model_check_result.json"}


@pytest.fixture
def digits_config(tmp_path: Path, digits_float_checkpoint: Path) -> str:
    """The config of the int8 run, with its paths in a temporary directory."""
    text = (ROOT / "configs" / "digits_int8.yaml").read_text()
    text = text.replace("logs/digits/float/float.ckpt", str(digits_float_checkpoint))
    (tmp_path / "int8.yaml").write_text(text.replace("logs/digits", str(tmp_path / "logs")))
    return str(tmp_path / "int8.yaml")


def test_check_of_a_lightning_cli_project_uses_the_config_of_fit(
    tmp_path: Path, digits_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Foundation 8: the same file as for fit, nothing trained, nothing else written."""
    assert main(["check", DIGITS, "--config", digits_config, "--calibration-batches", "2"]) == 0
    assert written(tmp_path / "logs") == CHECKED
    result = read_model_check(tmp_path / "logs" / "lightning_qat" / "model_check_result.json")
    assert result.counts["error"] == result.counts["warning"] == 0
    out = capsys.readouterr().out
    assert f"Model check: 0 errors, 0 warnings, {result.counts['info']} info" in out
    assert str(tmp_path / "logs" / "lightning_qat" / "model_check_result.txt") in out.replace("\n", "")


def test_arguments_of_fit_are_passed_on(tmp_path: Path, digits_config: str) -> None:
    """On the command line, as with fit; and --fail-on decides the exit status."""
    command = ["check", DIGITS, "--config", digits_config, "--calibration-batches=1", f"--output={tmp_path / 'there'}"]
    assert main([*command, "--fail-on", "warning"]) == 0
    assert main([*command, "--data.batch_size=2"]) == 0  # batch norm with tiny batches
    assert main([*command, "--data.batch_size", "2", "--fail-on", "warning"]) == 1
    assert main([*command, "--data.batch_size", "2", "--fail-on", "error"]) == 0
    assert written(tmp_path / "there") == {"model_check_result.txt", "model_check_result.json"}
    assert not (tmp_path / "logs").exists()


def test_check_without_a_script_reads_class_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Subclass mode: the configuration names its classes, found from the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("my_project.py").write_text(
        "from tests.harness.classifier import Classifier\nclass Net(Classifier):\n    pass\n"
    )
    Path("fit.yaml").write_text(
        "model: {class_path: my_project.Net, init_args: {lr: 0.01}}\n"
        f"trainer: {{accelerator: cpu, default_root_dir: {tmp_path / 'logs'}, max_epochs: 2}}\n"
    )
    assert main(["check", "--config", "fit.yaml"]) == 0
    assert written(tmp_path / "logs") == CHECKED
    out = capsys.readouterr().out
    assert "QuantizationAwareTraining is not among the callbacks" in out.replace("\n", " ")


def test_check_of_a_plain_script_stops_where_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A script that catches every Exception around fit, and goes on afterwards."""
    before = (Trainer.fit, Trainer.__init__, LightningCLI.__init__, list(sys.argv), list(sys.path))
    assert main(["check", script(tmp_path, f"{QAT}, ZeroLRFinetune()"), str(tmp_path / "out")]) == 0
    assert written(tmp_path / "out") == CHECKED  # no "trained", no logs, no checkpoint
    assert "caught" not in capsys.readouterr().out
    assert (Trainer.fit, Trainer.__init__, LightningCLI.__init__, sys.argv, sys.path) == before


def test_project_for_several_devices_is_checked_on_one(tmp_path: Path) -> None:
    options = 'devices=2, strategy="ddp", num_nodes=2'
    assert main(["check", script(tmp_path, options=options), str(tmp_path / "out")]) == 0
    assert written(tmp_path / "out") == CHECKED


@pytest.mark.parametrize(
    ("devices", "expected"), [("auto", 1), (-1, 1), (8, 1), ("3", 1), ("2,3", [2]), ([1, 0], [1]), (0, 0), ([], [])]
)
def test_one_device_is_the_first_that_is_named(devices: Any, expected: Any) -> None:
    assert one_device({"devices": devices, "strategy": "fsdp"}) == {
        "devices": expected,
        "strategy": "fsdp",
        "num_nodes": 1,
    }


CLI = """
from lightning.pytorch.cli import LightningCLI
from tests.harness.classifier import Classifier

cli = LightningCLI(Classifier, {arguments})
{more}
"""


@pytest.mark.parametrize(
    ("arguments", "more", "command"),
    [
        ("run=False", "cli.trainer.fit(cli.model)", ["-c", "{config}"]),
        ("args=['fit', '--config', '{config}']", "", []),
        ("", "", ["fit", "--config", "{config}"]),
    ],
)
@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended to run from within Python")
def test_every_way_to_write_a_lightning_cli_works(
    tmp_path: Path, arguments: str, more: str, command: list[str]
) -> None:
    config = tmp_path / "fit.yaml"
    trainer = f"{{accelerator: cpu, max_epochs: 1, default_root_dir: {tmp_path / 'out'}}}"
    config.write_text(f"seed_everything: 0\ntrainer: {trainer}\nmodel: {{lr: 0.01}}\n")
    (tmp_path / "cli.py").write_text(CLI.format(arguments=arguments.format(config=config), more=more))
    assert main(["check", str(tmp_path / "cli.py"), *(word.format(config=config) for word in command)]) == 0
    assert written(tmp_path / "out") == CHECKED


@pytest.mark.parametrize(
    ("callbacks", "extra", "calibrated"),
    [
        (QAT, [], True),
        ("QuantizationAwareTraining(start_epoch=2), Calibration(batches=2)", [], True),
        ("QuantizationAwareTraining()", [], True),
        (QAT, ["--calibration-batches", "0"], False),
    ],
)
def test_check_calibrates_whatever_the_schedule(
    tmp_path: Path, callbacks: str, extra: list[str], calibrated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    from lightning_qat.callbacks import model_check

    original = model_check.check

    def spy(regions: Any, **kwargs: Any) -> Any:
        seen.extend(region.is_calibrated for region in regions.values())
        return original(regions, **kwargs)

    monkeypatch.setattr(model_check, "check", spy)
    assert main(["check", script(tmp_path, callbacks), str(tmp_path / "out"), *extra]) == 0
    assert seen == [calibrated]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "nowhere.py"], "error: there is no script 'nowhere.py'"),
        (["check", "{tmp}/nothing.yaml"], "nothing.yaml' is a configuration, not a script: write train.py --config"),
        (["check", "{tmp}/float.ckpt"], "float.ckpt' is not a Python script"),
        (["fingerprint", "{tmp}/resume.py", "{tmp}"], "ckpt_path: there is no file 'nowhere.ckpt'"),
        (["check", "{tmp}/idle.py"], "idle.py ended without calling trainer.fit"),
        (["check", "--config", "{tmp}/nothing.yaml"], "give the script first: train.py --config fit.yaml"),
        (["check", "{tmp}/train.py", "{tmp}", "--calibration-batches", "many"], "'many' is not a number of batches"),
        (["check", "{tmp}/train.py", "{tmp}", "--fail-on", "never-ever"], "invalid choice: 'never-ever'"),
        (["inspect", "{tmp}/train.py", "{tmp}"], "the following arguments are required: --point"),
        (["inspect", "{tmp}/train.py", "{tmp}", "--point", "conv1.wieght"], "Near names: conv1.weight"),
        (["inspect", "{tmp}/train.py", "{tmp}", "--point", "conv1.weight", "--samples", "99"], "dataset has 0 to 15"),
        (["inspect", "{tmp}/train.py", "{tmp}", "--point", "conv1.weight", "--samples", "x"], "such as 0,3"),
        (
            ["inspect", "{tmp}/train.py", "{tmp}", "--point", "conv1.weight", "--calibration-batches=0"],
            "has no scale yet: calibrate first",
        ),
        (["chek"], "invalid choice: 'chek'"),
    ],
)
def test_bad_usage_is_one_error_and_status_2(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script(tmp_path)
    (tmp_path / "resume.py").write_text(
        (tmp_path / "train.py").read_text().replace("loader(16))", 'loader(16), ckpt_path="nowhere.ckpt")')
    )
    (tmp_path / "float.ckpt").touch()
    (tmp_path / "idle.py").write_text("import sys\n")
    (tmp_path / "nothing.yaml").write_text("trainer: {accelerator: cpu}\n")
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        ("{class_path: lightning_qat.Calibration, init_args: {batchs: 3}}", "Option 'batchs' is not accepted"),
        ("{class_path: lightning_qat.Calibration, init_args: {batches: -3}}", "Calibration(batches=-3)"),
        ("{class_path: QuantizationAware}", "QuantizationAware"),
        (
            "{class_path: lightning_qat.QuantizationAwareTraining, init_args: "
            "{qconfig: {activation: {observer: mes}}}}",
            "Got value: mes",
        ),
    ],
)
@pytest.mark.parametrize("has_script", [True, False])
def test_mistake_in_the_yaml_is_a_few_lines_and_status_2(
    tmp_path: Path, callback: str, message: str, has_script: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """LightningCLI itself prints its usage and all that was given; what is wrong is one line of dozens."""
    config = tmp_path / "fit.yaml"
    model = "" if has_script else "model: {class_path: tests.harness.classifier.Classifier}\n"
    config.write_text(f"seed_everything: 0\n{model}trainer:\n  callbacks:\n    - {callback}\n")
    (tmp_path / "cli.py").write_text(CLI.format(arguments="", more=""))
    arguments = [*([str(tmp_path / "cli.py")] if has_script else []), "--config", str(config)]
    assert main(["check", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ")
    assert message in lines[-1]
    assert len(lines) <= 6


def test_without_jsonargparse_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only where it is needed: without a script."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["check", "--config", "fit.yaml"]) == 2
    assert "pip install 'lightning-qat[cli]'" in capsys.readouterr().err


def test_errors_of_the_script_are_the_scripts(tmp_path: Path) -> None:
    """A bug in the project shows with its traceback, and everything is put back."""
    (tmp_path / "bad.py").write_text("import sys\nassert sys.argv[1:] == ['--output', 'x'], sys.argv\n1 / 0\n")
    fit = Trainer.fit
    with pytest.raises(ZeroDivisionError):
        main(["check", str(tmp_path / "bad.py"), "--", "--output", "x"])
    assert Trainer.fit is fit


@pytest.mark.parametrize("words", [["--help"], ["check", "--help"], ["inspect", "--help"], ["--version"]])
def test_help_is_for_people(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "python -m lightning_qat" in out or "lightning_qat 0" in out
    assert all(len(line) <= 120 for line in out.splitlines())


def test_inspect_dumps_the_chosen_samples(
    tmp_path: Path, digits_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Float, quantized, error; summary, histogram and figures; of samples of the validation data."""
    common = [DIGITS, "--config", digits_config, "--calibration-batches=2", "--point", "conv1.input0"]
    assert main(["inspect", *common, "--samples", "0,3"]) == 0
    directory = tmp_path / "logs" / "lightning_qat" / "inspect" / "conv1.input0"
    assert written(tmp_path / "logs") == {str(path.relative_to(tmp_path / "logs")) for path in directory.iterdir()}
    assert {p.name for p in directory.iterdir()} == {
        "tensors.npz", "summary.txt", "histogram.csv", "values.png", "error.png", "quantized_against_float.png",
    }  # fmt: skip
    data = DigitsDataModule()
    data.setup()
    with np.load(directory / "tensors.npz", allow_pickle=False) as arrays:
        chosen = torch.stack([data.val_set[i][0] for i in (0, 3)])
        assert np.array_equal(arrays["float_0"], chosen)
        expected = torch.fake_quantize_per_tensor_affine(chosen, float(arrays["scale"]), 0, -128, 127)
        assert np.array_equal(arrays["quantized_0"], expected)
    out = capsys.readouterr().out
    assert "2x1x8x8" in out
    assert str(directory / "values.png") in out
    assert main(["inspect", *common, "--no-figures", f"--output={tmp_path / 'all'}"]) == 0
    with np.load(tmp_path / "all" / "conv1.input0" / "tensors.npz", allow_pickle=False) as arrays:
        assert arrays["float_0"].shape == (64, 1, 8, 8)  # the first batch
    assert len(written(tmp_path / "all")) == 3


def test_point_of_several_regions_needs_its_region() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    regions = {name: insert(child, (torch.ones(1, 2),)) for name, child in model.items()}
    name = next(iter(regions["a"].points))
    assert find_point(regions, f"b.{name}") == ("b", name)
    assert find_point({"a": regions["a"]}, name) == ("a", name)
    with pytest.raises(ConfigurationError, match=f"write one of a.{name}, b.{name}"):
        find_point(regions, name)


def test_module_runs_as_a_program(tmp_path: Path) -> None:
    """One real process: exit status and output."""
    command = [
        sys.executable,
        "-m",
        "lightning_qat",
        "check",
        script(tmp_path),
        str(tmp_path / "out"),
        "--fail-on=error",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert "Model check: 0 errors" in done.stdout
    assert written(tmp_path / "out") == CHECKED


def test_signature_of_fit_survives_the_interception() -> None:
    """LightningCLI builds its options from it."""
    from lightning_qat.cli.run_project import _Outcome, _taken_over

    taken_over = _taken_over(Trainer.fit, _Outcome(lambda project: None))
    assert python_inspect.signature(taken_over) == python_inspect.signature(Trainer.fit)


@pytest.mark.parametrize("words", [["check"], ["pipeline-check", "--batches", "1"], ["fingerprint"]])
def test_output_that_cannot_be_written_is_one_error_below_the_result(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What took minutes to find is shown in any case."""
    (tmp_path / "file").write_text("mine")
    project = script(tmp_path)
    command, *options = words
    words = [command, project, str(tmp_path), *options, "--output", str(tmp_path / "file")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about an untrained model
        assert main(words) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.fullmatch(rf"error: {tmp_path}/file/\S+ cannot be written: (Not a directory|File exists)\.", errors[0])
    assert "Traceback" not in err
    assert {"check": "Model check", "pipeline-check": "Pipeline check", "fingerprint": ""}[command] in out
