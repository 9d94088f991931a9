"""Runs with names that try something, and with places that are no folder."""

from __future__ import annotations

import csv
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_qat
from lightning_qat.callbacks.trainer.output_directory import local_folder
from lightning_qat.cli.command_line import main
from lightning_qat.reporting.accuracy_table_files import read_result_table
from tests.callbacks.test_unwritable import all_callbacks
from tests.harness.noisy_run import Classifier, rows_of, run
from tests.harness.trainers import qat_trainer, trainer
from tests.reporting.test_hostile_names import HOSTILE, is_harmless

MARKUP, CONTROL = "[/red][bold]", "a\x1b[2J\rb\u2028c\u202e"
LONG = "x" * 257


class Named(Classifier):
    """Layers and metrics of any name."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.named = nn.Module()
        for name in names:
            self.named.add_module(name.replace(".", "_") or "_", nn.Linear(4, 4))
        self.metric = "val_" + "".join(names)[:40]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.dropout(F.relu(self.bn(self.conv(x))).mean((2, 3)))
        for layer in self.named.children():
            h = layer(h)
        return {"logits": self.head(h), "features": h}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log(self.metric, torch.tensor(0.5))


class WithTest(Named):
    """With a test."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.step(batch, "test")

    test_dataloader = Classifier.val_dataloader


def fit(directory: Path, model: LightningModule, **kwargs: Any) -> Path:
    """Train with every callback; the folder with the reports of the run."""
    run_of = qat_trainer(directory, *all_callbacks(), max_epochs=1, **kwargs)
    run_of.fit(model)
    return local_folder(run_of.log_dir or run_of.default_root_dir) / "lightning_qat"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("of", [TensorBoardLogger, CSVLogger])
@pytest.mark.parametrize("name", [MARKUP, CONTROL, "a:bug:b|c", LONG[:200]], ids=["markup", "control", "table", "long"])
def test_run_and_its_logger_may_have_any_name(
    tmp_path: Path, of: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Markup in a logger's name crashed at the end of training, in the title of the result table."""
    model = Named(name)
    directory = fit(tmp_path, model, logger=of(tmp_path, name=name))
    assert list(read_result_table(tmp_path / "lightning_qat" / "result_table.json").runs) == [f"{name}/version_0"]
    assert is_harmless(capsys.readouterr().out)
    assert (directory / "sensitivity.csv").exists()


@pytest.mark.filterwarnings("ignore")
def test_layers_and_metrics_may_have_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything that a run writes about them: tables, texts, JSON, figures, the plan, the terminal, warnings."""
    names = [MARKUP, CONTROL, LONG, *(name for key, name in HOSTILE.items() if key not in ("letters", "long"))]
    model = Named(*names)
    directory = fit(tmp_path, model)
    out, err = capsys.readouterr()
    assert is_harmless(out)
    assert is_harmless("\n".join(line for line in err.splitlines() if "lightning_qat" in line))
    point = f"named.{CONTROL.replace('.', '_')}.weight"
    for table in ("sensitivity", "layer_statistics"):
        rows = rows_of(directory / f"{table}.csv", 0)
        assert point in {row["point"] for row in rows}
        assert all(None not in row and None not in row.values() for row in rows)  # as many cells as columns
    for path in directory.rglob("*"):
        if path.suffix in (".txt", ".md"):
            assert is_harmless(path.read_text()), path.name
        if path.suffix == ".json":
            json.loads(path.read_text())
    assert point in {
        p["name"] for p in json.loads((directory / "quant_plan.json").read_text())["regions"][""]["points"]
    }
    with open(directory / "result_table.csv", newline="") as file:
        assert [row["metric"] for row in csv.DictReader(file)].count(model.metric) == 1
    assert list((directory / "figures").glob("*.png"))


def test_warnings_show_names_and_obey_nothing(tmp_path: Path) -> None:
    """As a path, a metric, a value of the configuration."""
    root = tmp_path / CONTROL
    root.mkdir()
    (root / "lightning_qat").write_text("mine")
    table = lightning_qat.AccuracyTable(metrics=[CONTROL], name=MARKUP)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qat_trainer(root, table, lightning_qat.ModelCheck()).test(WithTest(CONTROL), verbose=False)
    texts = [str(w.message) for w in caught if "a\\x1b[2J" in str(w.message)]
    assert len(texts) >= 2  # the path that cannot be written, and the metric that is not logged
    assert all(is_harmless(text) and r"a\x1b[2J\rb\u2028c\u202e" in text for text in texts)


def test_command_line_errors_obey_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare-runs", CONTROL, MARKUP]) == 2
    text = capsys.readouterr().err
    assert is_harmless(text)
    assert text.startswith("error: ")


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("memory://bucket/run 1", Path.cwd() / "lightning_qat_reports/memory/bucket/run_1"),
        ("s3://b/../../x", Path.cwd() / "lightning_qat_reports/s3/b/_../_../x"),
        ("simplecache::s3://b", Path.cwd() / "lightning_qat_reports/simplecache__s3/b"),
        ("file:///tmp/x", Path("/tmp/x")),
        ("file:/tmp/x", Path("/tmp/x")),
        ("local:///tmp/x", Path("/tmp/x")),
        ("logs/run", Path("logs/run")),
        ("/tmp/memory:/x", Path("/tmp/memory:/x")),
    ],
)
def test_reports_go_to_folders_of_this_machine(place: str, expected: Path) -> None:
    """Also where Lightning's own files go to a store; a local URL is the folder that it names."""
    assert local_folder(place) == expected


@pytest.mark.parametrize("logger", [False, "csv"])
def test_root_in_another_store_is_one_warning_and_no_folder_called_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    root = "memory://bucket/run"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(root, *all_callbacks(), max_epochs=1, logger=CSVLogger(root) if logger else False)  # type: ignore[arg-type]
    texts = [str(w.message) for w in caught if "this machine" in str(w.message)]
    assert len(texts) == 1
    assert f"{root}: {tmp_path / 'lightning_qat_reports' / 'memory' / 'bucket' / 'run'}" in texts[0]
    assert os.listdir() == ["lightning_qat_reports"]
    reports = tmp_path / "lightning_qat_reports" / "memory" / "bucket" / "run"
    of_run = reports / "lightning_logs" / "version_0" if logger else reports
    assert (of_run / "lightning_qat" / "sensitivity.csv").is_file()
    assert list(read_result_table(reports / "lightning_qat" / "result_table.json").runs) == [
        "lightning_logs/version_0" if logger else "run"
    ]


def test_float_run_with_a_fingerprint_says_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no QuantizationAwareTraining in it."""
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="folders of this machine only"):
        trainer(Path(), lightning_qat.PipelineFingerprint(batches=1), default_root_dir="s3://b/x").fit(Classifier())
    assert (tmp_path / "lightning_qat_reports/s3/b/x/lightning_qat/pipeline_fingerprint.json").is_file()


def test_local_url_is_the_folder_that_it_names(tmp_path: Path) -> None:
    run(f"file://{tmp_path}", lightning_qat.ModelCheck(), max_epochs=1)  # type: ignore[arg-type]
    assert (tmp_path / "lightning_qat" / "model_check_result.txt").is_file()


def test_a_logger_may_give_its_folder_as_a_path(tmp_path: Path) -> None:
    """Lightning hands on what ``save_dir`` of another logger returns, unchanged."""

    class Other(DummyLogger):
        @property
        def save_dir(self) -> Any:
            return tmp_path / "logs"

    qat_trainer(tmp_path, logger=Other(), max_steps=1).fit(Classifier())
    assert (tmp_path / "logs" / "lightning_qat" / "quant_plan.json").exists()
    assert local_folder(tmp_path) == tmp_path
