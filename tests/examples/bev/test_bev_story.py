"""The story of the bird's-eye-view example: its parts, and in the long suite the whole of it on less data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.bev.chapters import BEGIN, END, Chapter, meets, table, write_into
from examples.bev.configuration import at_int8, callback, read, with_model, with_overrides, without
from examples.bev.reports import EDITS, Reports, rules

ROOT = Path(__file__).parents[3]
FAULTS = ROOT / "examples" / "bev" / "configs" / "faults.yaml"
FLOATS = {"dynamic": 80.0, "static": 50.0}


def test_table_has_the_columns_in_their_order_and_marks_what_meets_the_target() -> None:
    chapters = [
        Chapter("a", columns={"first": {"dynamic": 0.0, "static": 49.6}}),
        Chapter("b"),
        Chapter("c", columns={"second": {"dynamic": 79.3, "static": 49.4}}),
    ]
    assert table(chapters, FLOATS).splitlines() == [
        "|  | float | target (loss < 1 %) | first | second |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| dynamic | 80.0 | 79.2 | 0.0 | **79.3** |",
        "| static | 50.0 | 49.5 | **49.6** | 49.4 |",
    ]
    assert not meets(chapters[2].columns["second"], FLOATS)
    assert meets({"dynamic": 79.2, "static": 49.5}, FLOATS)


def test_a_story_replaces_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("# Head\n")
    write_into(path, "first")
    write_into(path, "second")
    assert path.read_text() == f"# Head\n\n{BEGIN}\n\nsecond\n\n{END}\n"


def test_settings_are_changed_in_a_copy() -> None:
    settings = read(FAULTS)
    before = json.dumps(settings)
    rule = {"match": "a", "activation": {"split": {"axis": 0, "sizes": [1, 1]}}}
    narrow = at_int8(with_overrides(with_model(settings, annotate=True), [rule, rule | {"weight": {"dtype": "int16"}}]))
    assert json.dumps(settings) == before
    assert callback(narrow, "QuantizationAwareTraining")["overrides"] == [rule]  # the others name a type
    assert narrow["model"]["annotate"]
    names = [c["class_path"] for c in without(narrow, "ModelCheck")["trainer"]["callbacks"]]
    assert "ModelCheck" not in names
    assert "ModelCheckpoint" in names


def test_only_what_a_report_says_at_the_right_place_is_done(tmp_path: Path) -> None:
    finding = {
        "severity": "warning",
        "kind": "varying code",
        "names": ["a"],
        "action": "Put the code into `with dynamic_block(self, name):`.",
        "location": "examples/bev/model.py:1",
        "yaml": "",
    }
    pasted = finding | {"kind": "float op", "yaml": 'overrides:\n  - {match: "a.output", activation: {dtype: int16}}\n'}
    report: dict[str, Any] = {"rows": [finding, pasted, pasted | {"severity": "info"}]}
    (tmp_path / "model_check_result.json").write_text(json.dumps(report))
    found = Reports(tmp_path)
    assert not found.edits()  # line 1 is not the loop
    first = EDITS[0].code.__code__.co_firstlineno
    assert EDITS[0].is_meant(finding | {"location": f"examples/bev/model.py:{first + 3}"})
    assert rules(found.pasted_findings()) == [{"match": "a.output", "activation": {"dtype": "int16"}}]


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_the_quick_story_finds_and_repairs_everything(tmp_path: Path) -> None:
    """All columns of the source, on less data and with a model that is trained less: it finds vehicles, but few lines.

    So nothing is asserted of the lines' column, and nothing of the target at int8: one epoch of 20 steps ends anywhere.
    """
    command = [sys.executable, "examples/bev/story.py", "--quick", "--root", str(tmp_path / "story"), "--without-tune"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    columns = json.loads((tmp_path / "story" / "columns.json").read_text())
    floats = columns.pop("float")
    for collapsed in ("int16 calibration, first", "int8 calibration"):
        assert columns[collapsed]["dynamic"] < 0.7 * floats["dynamic"], columns
    for right in ("int16 calibration, fixed inputs", "int16 calibration, split dim_t"):
        assert columns[right]["dynamic"] > 0.95 * floats["dynamic"], columns
    for lost in ("int16 QAT, first", "float finetune", "float finetune, lr 0"):
        assert columns[lost]["dynamic"] < 0.1 * floats["dynamic"], columns
    assert columns["int16 QAT, pipeline fixed"]["dynamic"] > 0.95 * floats["dynamic"], columns
    story = (tmp_path / "story" / "story.md").read_text()
    for said in ("varying code", "shared scale", "configuration not applied", "float op", "wide integer output"):
        assert said in story
    assert "pipeline misaligned" in story
    assert "non-uniform" in story
