"""Damaged and hostile files, over every reader of files of a run.

What people met: a ``sensitivity.csv`` saved in UTF-16, fingerprints with wrong types, JSON nested 10,000 deep, scales
of NaN in a plan, ended in tracebacks or were used. Every file here is damaged in the same systematic ways
(``tests/harness/damage.py``): each reader either reads it, and what is made of it works, or says in one sentence what
is wrong with which file.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.fingerprint.fingerprint_differences import compare_fingerprints, compare_stages
from lightning_qat.analysis.fingerprint.layer_calls import LayerCall, Sketch
from lightning_qat.analysis.fingerprint.module_settings import ModuleSettings
from lightning_qat.analysis.fingerprint.tensor_summary import TensorSummary
from lightning_qat.analysis.fingerprint.training_plan import TrainingPlan
from lightning_qat.analysis.model_check.finding import Finding
from lightning_qat.analysis.model_check.model_check_result import ModelCheckResult, Section
from lightning_qat.analysis.runs.accuracy import ResultTable
from lightning_qat.analysis.runs.run_comparison import compare_runs
from lightning_qat.quantization.errors import ConfigurationError, DamagedFileError
from lightning_qat.quantization.planning.hardware_profile_files import hardware_profile
from lightning_qat.quantization.reading.files import Document
from lightning_qat.reporting.files import write_fingerprint, write_result
from lightning_qat.reporting.model_check_file import read_model_check
from tests.harness.damage import damaged_bytes, damaged_values, read_or_refused

OLD = Path(__file__).parent / "runs" / "old_layout"
PROFILES = Path(__file__).parents[2] / "lightning_qat" / "profiles"
Read = Callable[[], Any]
IMAGE = TensorSummary(
    "0", "float32", (3, 8, 8), 64, (0.0, 0.1), (1.0, 1.1), (0.1, 0.1), (-2.0, -2.1), (2.0, 2.1), None, 0
)
LABELS = TensorSummary("1", "int64", (), 64, (1.0,), (1.0,), (0.1,), (0.0,), (3.0,), {"0": 16, "2": 48})
SKETCH = Sketch((2, 2), 1.0, (0.1,) * 8)
FINGERPRINT = Fingerprint(
    data={"train": (IMAGE, LABELS)},
    model_inputs={"train": (IMAGE,), "validate": (IMAGE,)},
    losses={"train_loss": 1.5},
    metrics={"val_acc": 0.9},
    standard_errors={"val_acc": 0.01},
    modes={"eval": ["bn"]},
    batch_norm={"bn": {"momentum": 0.1, "running_mean": 0.0, "running_var": 1.0}},
    optimizers=[{"class": "SGD", "groups": [{"lr": 0.1, "weight_decay": 1e-4}]}],
    schedulers=[{"class": "StepLR"}],
    settings={"precision": "32", "gradient_clip_val": 1.0},
    weights={"a": "1f"},
    agreement={"train": {"out=1": 0.9}, "validate": {"out=1": 0.9}},
    modules={"bn": ModuleSettings("BatchNorm2d", {"eps": 1e-5}, "", True)},
    layers={"validate": (LayerCall("bn", {"0": SKETCH}, {"0": SKETCH}),)},
    untrained=["bn"],
    sizes={"bn.weight": 8},
    plan=TrainingPlan(100, 800.0, (0.01,), 0.9, (0.1,), (0.1,), (0.1,), (1.0,)),
)


@contextmanager
def no_limits() -> Iterator[None]:
    """Let Python write what it refuses to read: very long numbers, very deep lists."""
    digits, depth = sys.get_int_max_str_digits(), sys.getrecursionlimit()
    sys.set_int_max_str_digits(0)
    sys.setrecursionlimit(200_000)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(digits)
        sys.setrecursionlimit(depth)


def damaged_json(data: Any) -> Iterator[tuple[str, bytes]]:
    for name, value in damaged_values(data):
        if name != "nested":  # as bytes, below
            with no_limits():
                yield name, json.dumps(value).encode()
    yield from damaged_bytes(json.dumps(data).encode())


def every_case_is_read_or_refused(path: Path, cases: Iterator[tuple[str, bytes]], read: Read) -> None:
    refused = 0
    for name, content in cases:
        path.write_bytes(content)
        outcome = read_or_refused(read, f"{path.name}, {name}")
        refused += isinstance(outcome, Exception)
    assert refused > 20  # the damage is noticed


def one_row(path: Path) -> Any:
    data = json.loads(path.read_text())
    data["rows"] = data["rows"][:1]
    return data


def test_fingerprint(tmp_path: Path) -> None:
    path = write_fingerprint(FINGERPRINT, tmp_path / "f.json")
    assert Fingerprint.from_json(path) == FINGERPRINT

    def read() -> None:
        other = Fingerprint.from_json(path)
        compare_fingerprints(FINGERPRINT, other).full_blocks()
        compare_fingerprints(other, FINGERPRINT)
        compare_stages(other)

    every_case_is_read_or_refused(path, damaged_json(json.loads(path.read_text())), read)


@pytest.mark.parametrize("name", ["sensitivity.json", "layer_comparison.json"])
def test_table_of_points(tmp_path: Path, name: str) -> None:
    path, other = tmp_path / name, OLD / "after" / name
    every_case_is_read_or_refused(
        path, damaged_json(one_row(OLD / "before" / name)), lambda: compare_runs(path, other).full_blocks()
    )


@pytest.mark.parametrize("name", ["sensitivity.csv", "layer_comparison.csv"])
def test_table_as_csv(tmp_path: Path, name: str) -> None:
    path, other = tmp_path / name, OLD / "after" / name
    cases = damaged_bytes((OLD / "before" / name).read_bytes(), places=60)
    every_case_is_read_or_refused(path, cases, lambda: compare_runs(path, other).full_blocks())


def test_plan_beside_the_tables(tmp_path: Path) -> None:
    shutil.copy(OLD / "before" / "sensitivity.json", tmp_path)
    data = json.loads((OLD / "before" / "quant_plan.json").read_text())
    region = data["regions"][""]
    data["regions"][""] = {**region, "points": region["points"][:2], "ops": region["ops"][:1]}
    path = tmp_path / "quant_plan.json"
    every_case_is_read_or_refused(path, damaged_json(data), lambda: compare_runs(OLD / "after", tmp_path).full_blocks())


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("scale", float("nan"), "scale must be a positive number, not nan"),
        ("scale", "inf", "scale must be a positive number, not 'inf'"),
        ("scale", 0, "scale must be a positive number, not 0"),
        ("scale", [0.5, -1], "scale must be a number, not"),
        ("fixed_scale", -1, "fixed_scale must be a positive number, not -1"),
        ("zero_point", 128, "the zero point 128 is none of the codes -127 to 127"),
        ("zero_point", [0, -129], "the zero point -129 is none of the codes"),
        ("dtype", "int99", "dtype must be one of int2, int3"),
        ("percentile", 20, "percentile must be in percent, above 50"),
    ],
)
def test_scales_that_cannot_be_are_named_with_their_place(tmp_path: Path, field: str, value: Any, problem: str) -> None:
    shutil.copy(OLD / "before" / "sensitivity.json", tmp_path)
    data = json.loads((OLD / "before" / "quant_plan.json").read_text())
    data["regions"][""]["points"][1][field] = value
    (tmp_path / "quant_plan.json").write_text(json.dumps(data))
    with pytest.raises(DamagedFileError) as refusal:
        compare_runs(OLD / "after", tmp_path)
    message = str(refusal.value)
    assert message.startswith(f"{tmp_path / 'quant_plan.json'} is not a quantization plan: regions[''].points[1]")
    assert problem in message
    assert message.endswith("; write it again with lightning_qat.write_plan(model, directory).")


def test_result_table(tmp_path: Path) -> None:
    data = {"version": 1, "runs": {"run": {"float": {"acc": 0.9}, "QAT": {"acc": 0.88, "loss": "nan"}}}}
    path = tmp_path / "lightning_qat" / "result_table.json"
    path.parent.mkdir()
    for name in ("sensitivity.json", "quant_plan.json"):
        shutil.copy(OLD / "before" / name, path.parent)

    def read() -> None:
        ResultTable.read(path).result("run", ["acc"], "1%").full_blocks()
        compare_runs(tmp_path, OLD / "after").full_blocks()

    every_case_is_read_or_refused(path, damaged_json(data), read)


def test_model_check(tmp_path: Path) -> None:
    result = ModelCheckResult(
        (Finding("warning", "unfused", ("a", "b"), "what.", "why.", "do."),),
        (Section("types:", ("op", "int8"), (("conv", 3), ("add", None))),),
    )
    path = write_result(result, tmp_path, "check", formats=("json",))[0]
    assert read_model_check(path) == result
    cases = damaged_json(json.loads(path.read_text()))
    every_case_is_read_or_refused(path, cases, lambda: read_model_check(path).full_blocks())


def test_hardware_profile(tmp_path: Path) -> None:
    data = yaml.safe_load((PROFILES / "onnxruntime_qdq.yaml").read_text())
    data["ops"] = data["ops"][:2]
    path = tmp_path / "p.yaml"
    every_case_is_read_or_refused(path, damaged_json(data), lambda: hardware_profile(path))


@pytest.mark.parametrize(
    "text",
    [
        "a: 2001-99-99",
        "&a [*a]",
        "a: &a [x, x]\nb: &b [*a, *a]\nops: [*b, *b]",
        "? [a]\n: b",
        "- " * 5000,
        "a: !!binary x",
    ],
)
def test_hardware_profile_in_odd_yaml(tmp_path: Path, text: str) -> None:
    """A date that does not exist, a list that holds itself, aliases of aliases, a list as a key."""
    path = tmp_path / "p.yaml"
    path.write_text(text)
    assert isinstance(read_or_refused(lambda: hardware_profile(path), text[:20]), ConfigurationError)


@pytest.mark.parametrize(
    "read",
    [
        Fingerprint.from_json,
        ResultTable.read,
        read_model_check,
        lambda path: compare_runs(path, path),
        hardware_profile,
    ],
)
def test_directory_in_the_place_of_a_file(tmp_path: Path, read: Callable[[Any], Any]) -> None:
    path = tmp_path / "x.yaml"
    path.mkdir()
    assert isinstance(read_or_refused(lambda: read(path), "directory"), ConfigurationError)


def test_table_in_utf_16_says_so(tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.csv"
    path.write_text((OLD / "before" / "sensitivity.csv").read_text(), encoding="utf-16")
    message = (
        r"sensitivity.csv is not a table of points: it is a text in UTF-16: save it in UTF-8; give the log directory"
    )
    with pytest.raises(DamagedFileError, match=message):
        compare_runs(path, OLD / "after" / "sensitivity.csv")


def test_table_that_a_spreadsheet_has_saved_is_read(tmp_path: Path) -> None:
    """With a byte order mark and other ends of lines, it is the same table."""
    text = (OLD / "before" / "sensitivity.csv").read_text()
    path = tmp_path / "sensitivity.csv"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert not compare_runs(path, OLD / "before" / "sensitivity.csv").changed


def test_a_growing_table_that_ends_inside_a_character_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    """A run was killed while it wrote a name that is not plain ASCII."""
    path = tmp_path / "sensitivity.csv"
    path.write_bytes("epoch,point,score\n0,über.w,1.0\n1,ü".encode()[:-1])
    rows = Document(path, "a table", "make it again").csv(growing="epoch")
    assert rows == [{"epoch": "0", "point": "über.w", "score": "1.0"}]
