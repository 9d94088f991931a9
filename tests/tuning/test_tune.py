"""A tuning from end to end: the stages, their state on disk, what it recommends, and how it says no.

The script trains a digits model whose int3 calibration loses accuracy; stages run in this process to be quick, and in
their own process in the test of kills.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

import lightning_qat
from lightning_qat.analysis.mixed_precision.precision_choice import PrecisionChoice
from lightning_qat.cli.command_line import main
from lightning_qat.cli.tune_stage import run_stage
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.tuning import stage_work
from lightning_qat.tuning.tune import StoppedError, Tuning
from lightning_qat.tuning.tuning_result import TuningResult
from lightning_qat.tuning.tuning_settings import TuningSettings
from tests.harness.small_digits import float_weights

SCRIPT = """
import warnings; warnings.filterwarnings("ignore")
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning_qat import Calibration, QuantizationAwareTraining
from tests.harness.small_digits import Digits
from tests.harness.trainers import quiet

torch.set_num_threads(1)
seed_everything(0, verbose=False)
callbacks = [QuantizationAwareTraining(init_from="float.ckpt"), Calibration(batches=4)]
trainer = Trainer(**{**quiet(), "max_epochs": 1, "callbacks": callbacks, "enable_checkpointing": True, "logger": True})
trainer.fit(Digits(lr=LR))
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.save({"state_dict": float_weights()}, tmp_path / "float.ckpt")
    (tmp_path / "train.py").write_text(SCRIPT.replace("LR", "1e-3"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(**others: Any) -> TuningSettings:
    given = {"narrow": "int3", "wide": "int8", "target": "1%", "metrics": ("val_acc",)}
    return TuningSettings("train.py", (), **{**given, **others})


def tuned(launches: list[str] | None = None, say: list[str] | None = None, **others: Any) -> TuningResult:
    """Run or go on with a tuning in the present folder; note the stages that are launched, and what is said."""
    tuning = Tuning(settings(**others), Path("out"), ([] if say is None else say).append)

    def noted(request: Path) -> int:
        if launches is not None:
            launches.append(request.parent.name)
        before = Path.cwd()
        try:
            run_stage(str(request))
        finally:
            os.chdir(before)  # a stage has a process of its own
        return 0

    tuning.stages.launch = noted
    return tuning.run()


def test_tuning_meets_the_target_with_few_wide_points(project: Path) -> None:
    """F, D1-D7: every stage in its folder, each with its configuration; the table shows all of them."""
    launches: list[str] = []
    result = tuned(launches)
    assert result.recommended
    assert launches[:4] == ["float", "wide_calibrated", "wide_QAT", "narrow_calibrated"]
    row = next(row for row in result.rows if row.metric == "val_acc")
    assert row.target is not None
    assert row.values[result.recommended] >= row.target
    assert row.values["narrow calibrated"] < row.target
    assert 0 < len(result.raised) < result.points
    assert result.stages[:3] == ("wide calibrated", "wide QAT", "narrow calibrated")
    recommended = yaml.safe_load((project / "out" / "recommended.yaml").read_text())
    lightning_qat.QuantizationAwareTraining(**recommended)  # as its first lines say
    assert {rule["match"] for rule in recommended["overrides"]} == set(result.raised)
    assert recommended["qconfig"]["weight"]["dtype"] == "int3"
    evaluations = json.loads((project / "out" / "search" / "evaluations.json").read_text())
    assert 1 <= len(evaluations) <= 8
    for stage in launches:
        assert (project / "out" / stage / "config.yaml").exists()
    assert "target met" in (project / "out" / "result.txt").read_text()

    again: list[str] = []
    assert tuned(again) == result
    assert again == []  # nothing is done twice


def test_a_configuration_stands_alone_where_a_rule_named_a_sensitivity_table(project: Path) -> None:
    """The rule is written as the points that it took, so the table is not read again."""
    (project / "sensitivity.csv").write_text("point,score\nconv1.weight,2.0\nconv2.weight,1.0\nhead.weight,0.5\n")
    rule = 'overrides=[{"sensitivity": "sensitivity.csv", "top": 1, "weight": {"dtype": "int4"}}]'
    (project / "train.py").write_text(SCRIPT.replace("LR", "1e-3").replace('"float.ckpt"', f'"float.ckpt", {rule}'))
    result = tuned(skip=("wide QAT", "narrow QAT", "mixed QAT"))
    assert result.recommended == "mixed calibrated"
    own, *raised = yaml.safe_load((project / "out" / "recommended.yaml").read_text())["overrides"]
    assert own == {"match": "conv1.weight", "weight": {"dtype": "int4"}}
    assert {rule["match"] for rule in raised} == set(result.raised)


class Killed(BaseException):
    """Stands in for the end of the process."""


def test_a_tuning_goes_on_in_the_stage_it_was_in(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two evaluations: none is repeated, and the result is the same."""
    whole = tuned(skip=("wide QAT", "narrow QAT", "mixed QAT"))
    table = (project / "out" / "result.csv").read_text()
    for path in (project / "out").rglob("*"):
        if path.is_file():
            path.unlink()
    evaluated: list[tuple[str, ...]] = []
    original = stage_work._Evaluations._evaluated

    def counted(self: Any, mix: PrecisionChoice) -> dict[str, float]:
        evaluated.append(mix.raised)
        if len(evaluated) == 2:
            raise Killed
        return original(self, mix)

    monkeypatch.setattr(stage_work._Evaluations, "_evaluated", counted)
    launches: list[str] = []
    with pytest.raises(Killed):
        tuned(launches, skip=("wide QAT", "narrow QAT", "mixed QAT"))
    assert launches[-1] == "search"
    launches.clear()
    result = tuned(launches, skip=("wide QAT", "narrow QAT", "mixed QAT"))
    assert launches[0] == "search"
    assert "float" not in launches
    assert len(evaluated) - 1 == len(set(evaluated))  # but for the one that was killed
    assert result == whole
    assert (project / "out" / "result.csv").read_text() == table


def test_another_target_takes_the_measurements_that_are_there(project: Path) -> None:
    """Solving again: no calibration, no training and no errors anew; only mixes that were not evaluated yet."""
    without = ("wide QAT", "narrow QAT", "mixed QAT")
    tuned(skip=without)
    errors = (project / "out" / "search" / "errors.json").stat().st_mtime_ns
    launches: list[str] = []
    tuned(launches, skip=without, target="3%")
    assert set(launches) <= {"search", "mixed_calibrated"}
    assert (project / "out" / "search" / "errors.json").stat().st_mtime_ns == errors


def test_what_was_made_from_other_files_is_not_taken(project: Path) -> None:
    without = ("wide QAT", "narrow QAT", "mixed QAT")
    tuned(skip=without)
    torch.save({"state_dict": float_weights(1)}, project / "float.ckpt")
    launches: list[str] = []
    tuned(launches, skip=without)
    assert launches[:3] == ["float", "wide_calibrated", "narrow_calibrated"]
    (project / "train.py").write_text(SCRIPT.replace("LR", "2e-3"))
    with pytest.raises(ConfigurationError, match="the script or a file it is given has changed"):
        tuned()
    with pytest.raises(ConfigurationError, match=r"holds another tuning \(narrow: 'int3' there, 'int4' here"):
        tuned(narrow="int4")


def test_a_module_of_the_project_that_has_changed_is_noticed(project: Path) -> None:
    """The model is mostly not in the script: stages of its former code were taken as done before.

    Siblings: the evaluations of a search, whose hashes know plan, weights and data but not the code of the metric; and
    the last checkpoint of a training that was killed.
    """
    metric = "from tests.harness.small_digits import Digits as Model\n\nclass Digits(Model):\n    pass\n"
    (project / "own_model.py").write_text(metric)
    script = SCRIPT.replace("LR", "1e-3").replace("tests.harness.small_digits", "own_model")
    (project / "train.py").write_text('import sys; sys.modules.pop("own_model", None)\n' + script)
    without = ("wide QAT", "narrow QAT", "mixed QAT")
    tuned(skip=without)
    evaluations = (project / "out" / "search" / "evaluations.json").read_text()
    again: list[str] = []
    tuned(again, skip=without)
    assert again == []
    killed = project / "out" / "mixed_QAT_1"
    killed.mkdir()
    for name in ("request.json", "last.ckpt"):
        (killed / name).write_text("{}")
    halved = "    def validation_step(self, batch, batch_idx):\n        super().validation_step(batch, batch_idx)\n"
    halved += "        self.log('val_half', 0.5)\n"
    (project / "own_model.py").write_text(metric + halved)
    lines: list[str] = []
    tuned(again, lines, skip=without)
    assert again == ["float", "wide_calibrated", "narrow_calibrated", "search", "mixed_calibrated"][: len(again)]
    assert "search" in again
    assert f"float: made again, as {project.resolve() / 'own_model.py'} has changed" in lines
    assert "val_half" in (project / "out" / "search" / "evaluations.json").read_text()
    assert "val_half" not in evaluations
    assert not (killed / "last.ckpt").exists()


def test_a_training_killed_behind_its_last_checkpoint_is_finished(project: Path) -> None:
    """Lightning finds nothing left to train: the stage evaluates and notes its outcome all the same."""
    skip = ("wide calibrated", "narrow QAT", "mixed QAT")
    whole = tuned(skip=skip)
    folder = project / "out" / "wide_QAT"
    assert (folder / "last.ckpt").exists()
    (folder / "outcome.json").unlink()
    manifest = json.loads((project / "out" / "manifest.json").read_text())
    del manifest["stages"]["wide QAT"]
    (project / "out" / "manifest.json").write_text(json.dumps(manifest))
    launches: list[str] = []
    again = tuned(launches, skip=skip)
    assert launches[0] == "wide_QAT"
    assert {row.metric: row.values["wide QAT"] for row in again.rows} == {
        row.metric: row.values["wide QAT"] for row in whole.rows
    }


def test_an_outcome_that_was_not_noted_yet_is_taken(project: Path) -> None:
    without = ("wide QAT", "narrow QAT", "mixed QAT")
    whole = tuned(skip=without)
    (project / "out" / "manifest.json").unlink()
    launches: list[str] = []
    assert tuned(launches, skip=without) == whole
    assert launches == []


def test_a_script_that_changes_the_directory(project: Path) -> None:
    (project / "elsewhere").mkdir()
    script = SCRIPT.replace("LR", "1e-3").replace('"float.ckpt"', repr(str(project / "float.ckpt")))
    (project / "train.py").write_text(f"import os; os.chdir({str(project / 'elsewhere')!r})\n" + script)
    launches: list[str] = []
    tuned(launches, narrow="int8", wide="int16", skip=("wide QAT",))
    assert launches == ["float", "wide_calibrated", "narrow_calibrated"]
    assert not list((project / "elsewhere").iterdir())


def test_a_met_target_stays_met_where_a_later_stage_stops(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def collapses(self: Tuning, name: str, *_: Any, **__: Any) -> bool:
        raise StoppedError(f"{name} collapses. hyperparameters: the learning rate.")

    monkeypatch.setattr(Tuning, "_trained", collapses)
    result = tuned()
    assert result.recommended == "wide calibrated"
    assert result.note.endswith("Then it stopped: wide QAT collapses. hyperparameters: the learning rate.")
    assert (project / "out" / "recommended.yaml").exists()


def test_a_narrow_type_that_is_enough_ends_the_tuning(project: Path) -> None:
    launches: list[str] = []
    result = tuned(launches, narrow="int8", wide="int16", skip=("wide QAT",))
    assert launches == ["float", "wide_calibrated", "narrow_calibrated"]
    assert result.recommended == "narrow calibrated"
    assert result.raised == ()
    assert "with all points at int8" in result.note


def test_wide_types_that_collapse_stop_with_the_diagnosis(project: Path) -> None:
    """D1: one scale is fixed at a wrong value; no training is tried, and the point is named."""
    wrong = 'overrides=[{"match": "relu_1.output", "activation": {"fixed_scale": 1e-4}}]'
    (project / "train.py").write_text(SCRIPT.replace("LR", "1e-3").replace('"float.ckpt"', f'"float.ckpt", {wrong}'))
    launches: list[str] = []
    result = tuned(launches)
    assert launches == ["float", "wide_calibrated"]
    assert result.recommended == ""
    assert result.note.startswith("target missed: all points at int8 lose more than 10 % of val_acc")
    assert "relu_1.output" in result.note
    assert "Either int8 is too narrow for this model" in result.note  # int16 is not: then it is a mistake
    assert (project / "out" / "wide_calibrated" / "diagnosis.txt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ("acc",)}, r"metric 'acc' is not logged\. Did you mean 'val_acc'\?"),
        ({"target": 0.999}, "the float model itself has val_acc"),
    ],
)
def test_targets_that_make_no_sense_end_after_the_first_stage(
    project: Path, options: dict[str, Any], message: str
) -> None:
    launches: list[str] = []
    with pytest.raises(ConfigurationError, match=message):
        tuned(launches, **options)
    assert launches == ["float"]


def test_a_stage_that_fails_is_one_error_with_its_log(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "train.py").write_text("raise ValueError('no data here')\n")
    assert main(["tune", "train.py", "--output", "out"]) == 2
    assert "error: stage 'float' failed: ValueError: no data here (all of it: " in capsys.readouterr().err
    assert "Traceback" in (project / "out" / "float" / "log.txt").read_text()


def test_a_stage_can_be_repeated(project: Path) -> None:
    without = ("wide QAT", "narrow QAT", "mixed QAT")
    with pytest.raises(ConfigurationError, match="no stage has run in "):  # there are no choices to list
        Tuning(settings(skip=without), Path("out"), lambda line: None, ["search"])
    whole = tuned(skip=without)
    with pytest.raises(ConfigurationError, match="unknown stage to repeat 'int8'"):
        Tuning(settings(skip=without), Path("out"), lambda line: None, ["int8"])
    Tuning(settings(skip=without), Path("out"), lambda line: None, ["narrow calibrated"])
    launches: list[str] = []
    assert tuned(launches, skip=without).rows == whole.rows
    assert launches[0] == "narrow_calibrated"


def test_a_model_without_two_types_is_one_error(project: Path) -> None:
    """Nothing left to raise: overrides fix every point."""
    fixed = 'overrides=[{"match": "*", "activation": {"dtype": "int3"}, "weight": {"dtype": "int3"}}]'
    (project / "train.py").write_text(SCRIPT.replace("LR", "1e-3").replace('"float.ckpt"', f'"float.ckpt", {fixed}'))
    with pytest.raises(MisconfigurationException, match="there is nothing to raise"):  # one line in its own process
        tuned(skip=("wide calibrated", "wide QAT", "narrow QAT"))


def test_dry_run_prints_the_stages_and_runs_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "train.py", "--dry-run", "--skip", "wide QAT"]) == 0
    text = capsys.readouterr().out
    assert "At most 4 trainings" in text
    assert "wide QAT" not in text
    assert "Time: nothing has run yet" in text
    assert not (project / "tuning_train").exists()


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_script_that_is_not_there_is_one_error(
    project: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    """A dry run printed the stages of a script that does not exist; a run began a stage, with a folder."""
    assert main(["tune", "tran.py", *options]) == 2
    assert capsys.readouterr().err == "error: there is no script 'tran.py'.\n"
    assert not (project / "tuning_tran").exists()


def test_time_is_estimated_before_the_first_training(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From an evaluation and a few steps on a copy; the dry run of a tuning that has begun says it again."""
    lines: list[str] = []
    tuned(say=lines, skip=("wide QAT",), target=0.5)
    some = r"(about \d+|less than 1) s"
    text = rf"an evaluation takes {some}, a training {some}; all stages together at most about \d+ s"
    first = next(line for line in lines if line.startswith("an evaluation"))
    assert re.fullmatch(text, first)
    assert lines.index(first) == 1  # behind "float: started"
    command = ["tune", "train.py", "--dry-run", "--output", "out", "--dtypes", "int3,int8", "--skip", "wide QAT"]
    assert main(command) == 0
    assert re.search(f"Time: {text}", capsys.readouterr().out.replace("\n", " "))


def test_a_training_whose_length_is_not_known_has_no_estimate(project: Path) -> None:
    """A run without a last epoch ends by itself."""
    (project / "train.py").write_text(SCRIPT.replace("LR", "1e-3").replace('"max_epochs": 1', '"max_epochs": -1'))
    lines: list[str] = []
    tuned(say=lines, skip=("wide QAT",), target=0.5)
    assert any(line.endswith("how long a training takes is not known before the first one") for line in lines)


CLI_SCRIPT = """
import warnings; warnings.filterwarnings("ignore")
import torch
from lightning.pytorch.cli import LightningCLI
from tests.harness.small_digits import Digits

torch.set_num_threads(1)
LightningCLI(Digits, seed_everything_default=0, save_config_callback=None)
"""


@pytest.mark.parametrize("listed", [True, False])
def test_recommended_configuration_reproduces_the_accuracy(project: Path, listed: bool) -> None:
    """With LightningCLI `fit --config recommended.yaml` alone gives what the stage measured.

    Siblings: the project names the callbacks, or it knows nothing of quantization and `ckpt_path` holds float weights.
    """
    (project / "train.py").write_text(CLI_SCRIPT)
    quantization = {
        "class_path": "lightning_qat.QuantizationAwareTraining",
        "init_args": {"init_from": str(project / "float.ckpt")},
    }
    trainer = {"max_epochs": 1, "accelerator": "cpu", "devices": 2, "strategy": "ddp", "logger": False,
               "enable_progress_bar": False, "enable_model_summary": False}  # fmt: skip
    config: dict[str, Any] = {"trainer": trainer}
    if listed:
        trainer["callbacks"] = quantization
    else:
        config["ckpt_path"] = str(project / "float.ckpt")
    (project / "my.yaml").write_text(yaml.safe_dump(config))
    tuning = Tuning(
        TuningSettings("train.py", ("--config", "my.yaml"), "int3", "int8", "3%", ("val_acc",), skip=("wide QAT",)),
        project / "out",
        lambda line: None,
    )

    def launch(request: Path) -> int:
        run_stage(str(request))
        return 0

    tuning.stages.launch = launch
    result = tuning.run()
    assert "QAT" in result.recommended
    recommended = yaml.safe_load((project / "out" / "recommended.yaml").read_text())
    names = [entry["class_path"].rpartition(".")[2] for entry in recommended["trainer"]["callbacks"]]
    assert names.count("QuantizationAwareTraining") == names.count("Calibration") == 1
    measured = next(row.values[result.recommended] for row in result.rows if row.metric == "val_acc")
    command = [sys.executable, "train.py", "fit", "--config", "out/recommended.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    recorded = (
        "import lightning.pytorch as pl\nfit = pl.Trainer.fit\ndef noted(self, *a, **k):\n    fit(self, *a, **k)\n"
    )
    recorded += "    print('VAL', float(self.callback_metrics['val_acc']))\npl.Trainer.fit = noted\n"
    (project / "train.py").write_text(recorded + CLI_SCRIPT)
    ended = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert float(ended.stdout.rpartition("VAL ")[2]) == pytest.approx(measured, abs=1e-6)


@pytest.mark.full
def test_killed_at_twenty_moments_it_ends_with_the_same_table(project: Path) -> None:
    """kill -9 of the tuning alone, again and again (its stage ends with it); then the table is that without kills."""
    command = [sys.executable, "-m", "lightning_qat", "tune", "train.py", "--dtypes", "int3,int8"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    subprocess.run([*command, "--output", "whole"], env=environment, check=True, capture_output=True)
    whole = time.monotonic() - began
    moments, kills = random.Random(0), 0
    while kills < 20:
        with subprocess.Popen([*command, "--output", "killed"], env=environment, stdout=subprocess.DEVNULL) as process:
            try:
                process.wait(moments.uniform(0.02, 0.4) * whole)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
    subprocess.run([*command, "--output", "killed"], env=environment, check=True, capture_output=True)
    assert kills >= 5
    for path in (project / "killed").rglob("*.json"):
        json.loads(path.read_text())
    assert (project / "killed" / "result.csv").read_text() == (project / "whole" / "result.csv").read_text()
    evaluations = [project / folder / "search" / "evaluations.json" for folder in ("killed", "whole")]
    assert evaluations[0].read_text() == evaluations[1].read_text()
