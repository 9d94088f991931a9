"""Every file in configs/ runs (foundation 8), and the YAML block of the README is one of them."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from examples.digits import main

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
# what each addition to somebody's own config needs before it
ADDITIONS = {
    "quantization_aware_training": ["quantization_aware_training", "calibration"],
    "calibration": ["quantization_aware_training", "calibration"],
    "model_check": ["quantization_aware_training", "calibration", "model_check"],
    "zero_lr_finetune": ["quantization_aware_training", "calibration", "zero_lr_finetune"],
    "float_finetune": ["quantization_aware_training", "calibration", "float_finetune"],
    "layer_comparison": ["quantization_aware_training", "calibration", "sensitivity_analysis", "layer_comparison"],
    "pipeline_check": ["quantization_aware_training", "calibration", "pipeline_check"],
    "convergence_monitor": ["quantization_aware_training", "calibration", "convergence_monitor"],
    "pipeline_fingerprint": ["pipeline_fingerprint"],
    "layer_statistics": ["quantization_aware_training", "calibration", "layer_statistics"],
    "sensitivity_analysis": ["quantization_aware_training", "calibration", "sensitivity_analysis"],
    "accuracy_table": ["quantization_aware_training", "calibration", "accuracy_table"],
    "all_callbacks": ["all_callbacks"],
}
RUNS = {"digits_float": "fit", "digits_int4": "fit", "digits_int8": "fit", "digits_int16": "test"}


def run(subcommand: str, configs: list[Path], root: Path, *extra: str) -> None:
    """Run the example on a few batches, with everything it writes below ``root``."""
    args = [subcommand, *(f"--config={path}" for path in configs), f"--trainer.default_root_dir={root}"]
    args += [
        "--trainer.limit_val_batches=2",
        "--trainer.limit_test_batches=1",
        "--trainer.limit_train_batches=2",
        "--trainer.enable_progress_bar=false",
    ]
    if subcommand == "fit":
        args += ["--trainer.max_epochs=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["digits.py", *args, *extra])
        main()


@pytest.mark.parametrize("name", sorted(ADDITIONS))
def test_config_works_after_a_project_of_its_own(name: str, tmp_path: Path, digits_float_checkpoint: Path) -> None:
    """E: a callback is added to a LightningCLI project by one more --config, with the project's float checkpoint."""
    project = tmp_path / "project.yaml"
    project.write_text(
        yaml.safe_dump(
            {"trainer": {"accelerator": "cpu", "logger": False, "callbacks": [{"class_path": "ModelSummary"}]}}
        )
    )
    additions = []
    for addition in ADDITIONS[name]:
        text = (CONFIGS / f"{addition}.yaml").read_text()
        text = text.replace("init_from: null", f"init_from: {digits_float_checkpoint}")
        text = text.replace("init_from: float.ckpt", f"init_from: {digits_float_checkpoint}")
        additions.append(tmp_path / f"{addition}.yaml")
        additions[-1].write_text(text)
    run("fit", [project, *additions], tmp_path)


@pytest.mark.parametrize("name", sorted(RUNS))
def test_digits_config_runs(name: str, tmp_path: Path, digits_float_checkpoint: Path) -> None:
    """Foundation 8: the digits runs work from YAML alone; paths below logs/ are moved to a temporary directory."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    text = text.replace("logs/digits/float/float.ckpt", str(digits_float_checkpoint)).replace(
        "logs/digits", str(tmp_path)
    )
    config = tmp_path / f"{name}.yaml"
    config.write_text(text)
    run(RUNS[name], [config], tmp_path)
    if name != "digits_float":
        assert (tmp_path / "lightning_qat" / "result_table.json").is_file()


def test_every_config_is_in_this_test() -> None:
    """A new config has to be run too."""
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*ADDITIONS, *RUNS}


def test_yaml_block_of_the_readme_works_as_it_is(tmp_path: Path, digits_float_checkpoint: Path) -> None:
    """The block is given behind the config of a project that has never heard of this package."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    block = next(b for b in blocks if "QuantizationAwareTraining" in b)
    assert yaml.safe_load(block) == yaml.safe_load((CONFIGS / "all_callbacks.yaml").read_text())
    config = tmp_path / "readme.yaml"
    config.write_text(block.replace("float.ckpt", str(digits_float_checkpoint)))
    run("fit", [config], tmp_path, "--trainer.accelerator=cpu", "--trainer.logger=false")


def test_additions_need_no_import_in_the_script() -> None:
    """E: short names are known only after ``import lightning_qat``; a script that is not to be changed lacks it."""
    for name in ADDITIONS:
        callbacks = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["trainer"]["callbacks+"]
        assert all(callback["class_path"].startswith("lightning_qat.") for callback in callbacks), name


def test_init_from_on_the_command_line_as_the_config_says(tmp_path: Path, digits_float_checkpoint: Path) -> None:
    """E: an argument of a callback belongs to the last one listed so far. A missing file shows that it is read."""
    first, second = CONFIGS / "quantization_aware_training.yaml", CONFIGS / "calibration.yaml"
    others = f"--config={second}", "--trainer.accelerator=cpu", "--trainer.logger=false"
    run("fit", [first], tmp_path, f"--trainer.callbacks.init_from={digits_float_checkpoint}", *others)
    with pytest.raises(MisconfigurationException, match=r"there is no file .*missing\.ckpt"):
        run("fit", [first], tmp_path / "again", f"--trainer.callbacks.init_from={tmp_path / 'missing.ckpt'}", *others)


def test_config_with_a_missing_float_checkpoint_says_so(tmp_path: Path) -> None:
    """Bad input: init_from names a file that does not exist."""
    config = tmp_path / "c.yaml"
    config.write_text((CONFIGS / "digits_int16.yaml").read_text().replace("logs/digits/float", str(tmp_path)))
    with pytest.raises(MisconfigurationException, match=r"there is no file .*float\.ckpt"):
        run("test", [config], tmp_path)


def test_overrides_by_sensitivity_from_yaml(tmp_path: Path, digits_float_checkpoint: Path) -> None:
    """D2, D4: the table of one run chooses the points of the next, by YAML alone. `0.5%` is a text in YAML."""
    text = (CONFIGS / "quantization_aware_training.yaml").read_text()
    text = text.replace("init_from: null", f"init_from: {digits_float_checkpoint}")
    others = [CONFIGS / "calibration.yaml", CONFIGS / "sensitivity_analysis.yaml"]
    options = "--trainer.accelerator=cpu", "--trainer.logger=false"
    (tmp_path / "first.yaml").write_text(text)
    run("fit", [tmp_path / "first.yaml", *others], tmp_path / "first", *options)
    (table,) = (tmp_path / "first").rglob("sensitivity.csv")
    rule = f"overrides: [{{sensitivity: {table}, top: 0.5%, activation: {{dtype: int16}}}}]"
    assert "overrides: []" in text
    (tmp_path / "second.yaml").write_text(text.replace("overrides: []", rule))
    run("fit", [tmp_path / "second.yaml", *others], tmp_path / "second", *options)
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["sensitive_type"] == "activation"]
    (plan,) = (tmp_path / "second").rglob("quant_plan.json")
    (region,) = json.loads(plan.read_text())["regions"].values()
    wide = [point["name"] for point in region["points"] if point["dtype"] == "int16"]
    assert wide == [max(rows, key=lambda row: float(row["score"]))["point"]]
