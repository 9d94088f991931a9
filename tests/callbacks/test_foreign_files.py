"""Files of others in the place of ours: one clear error, and nothing in them is run.

A checkpoint that calls a function when it is unpickled, YAML that does when it is loaded, and files of other programs,
for every reader: of weights, of checkpoints, of tables, of fingerprints, of profiles.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

import lightning_qat
from lightning_qat.analysis.runs.run_comparison import compare_runs
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.planning.hardware_profile_files import hardware_profile
from lightning_qat.reporting.accuracy_table_files import read_result_table
from tests.harness.classifier import Classifier
from tests.harness.damage import is_one_sentence
from tests.harness.trainers import qat_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`weights_only` was not set"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
]


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("word/document.xml", "<x/>")
    return buffer.getvalue()


def hostile(mark: Path) -> dict[str, bytes]:
    """Files by what they are."""
    weights = Classifier().state_dict()
    return {
        "checkpoint": saved({"state_dict": {**weights, "net.head.weight": Payload(mark)}, "callbacks": {}}),
        "old checkpoint": saved({"state_dict": Payload(mark)}, _use_new_zipfile_serialization=False),
        "pickle": pickle.dumps(Payload(mark)),
        "yaml": f"!!python/object/apply:os.mkdir ['{mark}']".encode(),
        "yaml inside": f"name: a\nprofile: !!python/object/apply:os.mkdir ['{mark}']".encode(),
        "zip": zipped(),
        "png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        "html": b"<!doctype html><script>alert(1)</script>",
        "program": b"\x7fELF" + bytes(64),
        "list": b"[1, 2, 3]",
    }


def fit_from(path: Path) -> None:
    quantization = QuantizationAwareTraining(init_from=str(path))
    qat_trainer(path.parent, quantization=quantization, limit_train_batches=1, limit_val_batches=1).fit(Classifier())


def override_by(path: Path) -> None:
    rule: Any = {"sensitivity": str(path), "top": 1, "activation": {"dtype": "int16"}}
    qat_trainer(path.parent, qat={"overrides": [rule]}, limit_train_batches=1, limit_val_batches=1).fit(Classifier())


def check_against(path: Path) -> None:
    check = lightning_qat.PipelineCheck(batches=1, reference=str(path))
    qat_trainer(path.parent, check, limit_train_batches=1, limit_val_batches=1).fit(Classifier())


def precision_errors(path: Path) -> None:
    region = lightning_qat.insert(torch.nn.Sequential(torch.nn.Linear(2, 2)), (torch.ones(1, 2),))
    lightning_qat.PrecisionErrors.load(path, region)


def runs(path: Path) -> None:
    """Two runs whose tables are both that file."""
    for run in ("a", "b"):
        folder = path.parent / run / "lightning_qat"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("sensitivity.csv", "quant_plan.json", "layer_statistics.csv"):
            (folder / name).write_bytes(path.read_bytes())
    compare_runs(path.parent / "a", path.parent / "b")


READERS: dict[str, Callable[[Path], object]] = {
    "load_quantized": lambda path: lightning_qat.load_quantized(Classifier, path),
    "init_from": fit_from,
    "overrides": override_by,
    "reference": check_against,
    "PrecisionErrors.load": precision_errors,
    "compare_runs": runs,
    "profile": hardware_profile,
    "result table": read_result_table,
}


@pytest.mark.parametrize("reader", READERS)
def test_nothing_is_run_and_the_error_names_the_file(tmp_path: Path, reader: str) -> None:
    mark = tmp_path / "run"
    for kind, content in hostile(mark).items():
        folder = tmp_path / kind
        folder.mkdir()
        suffix = ".yaml" if reader == "profile" else ".csv" if reader == "overrides" else ".json"
        path = folder / f"foreign{'.ckpt' if reader in ('load_quantized', 'init_from') else suffix}"
        path.write_bytes(content)
        with pytest.raises((ConfigurationError, MisconfigurationException)) as refusal:
            READERS[reader](path)
        message = str(refusal.value)
        assert not mark.exists(), f"{kind} was run"
        assert path.name in message or reader == "compare_runs", (kind, message)
        assert is_one_sentence(message), (kind, message)


def test_payload_would_run_if_it_were_unpickled(tmp_path: Path) -> None:
    """The files above are dangerous: without that the test would say nothing."""
    mark = tmp_path / "run"
    pickle.loads(hostile(mark)["pickle"])
    assert mark.is_dir()
    mark.rmdir()
    torch.load(io.BytesIO(hostile(mark)["checkpoint"]), weights_only=False)
    assert mark.is_dir()
