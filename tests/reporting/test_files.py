"""Results as files."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from lightning_qat.analysis.sensitivity.sensitivity import SensitivityResult, SensitivityRow
from lightning_qat.analysis.statistics.statistics import LayerStatisticsResult, LayerStatisticsRow
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.reporting import files
from lightning_qat.reporting.files import write_result

ROW = SensitivityRow("conv", "weight", "conv2d", 0.25, "int8", "conv.weight", 0.5, True)
RESULT = SensitivityResult((ROW,), metric="MSE", output="output 'a'", points=2, left_out=("fc.weight",))


def test_names_of_the_files(tmp_path: Path) -> None:
    """B2: sensitivity.csv."""
    final = write_result(RESULT, tmp_path / "new", "sensitivity")
    assert [p.name for p in final] == ["sensitivity.csv", "sensitivity.txt", "sensitivity.json"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(p.name for p in final)


def test_all_formats_hold_the_same_rows(tmp_path: Path) -> None:
    table, text, data = (path.read_text() for path in write_result(RESULT, tmp_path, "sensitivity"))
    (row,) = csv.DictReader(table.splitlines())
    assert (row["point"], float(row["MSE"])) == ("conv.weight", 0.25)
    parsed = json.loads(data)
    assert parsed["rows"][0]["MSE"] == 0.25
    assert parsed["left_out"] == ["fc.weight"]
    assert "MSE of output 'a', 1 of 2 points by isolation, 1 left out" in text
    assert "conv.weight" in text


def test_result_without_rows_still_has_its_header(tmp_path: Path) -> None:
    table = write_result(SensitivityResult((), metric="KL"), tmp_path, "sensitivity")[0].read_text()
    assert table.split(",")[:4] == ["op_name", "sensitive_type", "op_type", "KL"]


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"unknown format 'xlsx'.*csv, txt, json"):
        write_result(RESULT, tmp_path, "sensitivity", formats=("xlsx",))  # type: ignore[arg-type]


def test_readme_documents_every_column() -> None:
    """Foundation: documented column by column."""
    readme = (Path(files.__file__).parent / "README.md").read_text()
    results = {"sensitivity.csv": SensitivityResult(()), "layer_statistics.csv": LayerStatisticsResult(())}
    for section, result in results.items():
        text = readme.split(f"## `{section}")[1].split("\n## ")[0]
        table = text.split("| column | meaning |")[1].split("\n\n")[0]
        first_cells = (line.split("|")[1] for line in table.splitlines() if line.count("|") > 2)
        documented = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
        columns = {"epoch", *result.columns()} - {"MSE"}
        assert columns <= documented, columns - documented
        assert documented - columns <= {"L1", "MSE", "Cosine", "SQNR", "KL"}
    assert LayerStatisticsResult(()).columns() == tuple(LayerStatisticsRow.__dataclass_fields__)
