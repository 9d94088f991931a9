"""The script for a GPU runs from end to end; on a CPU, with tiny models. What it measures there means nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.benchmarks.gpu import VARIANTS, main

CPU = ["--device", "cpu", "--size", "tiny"]


def test_script_measures_compares_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "gpu.json"
    main([*CPU, "--no-tests", "--only", "float", "lightning_qat", "--output", str(output)])
    result = json.loads(output.read_text())
    assert [(r["model"], r["variant"]) for r in result["rows"]] == [
        (model, variant) for model in ("ResNet-50", "ViT-S") for variant in ("float", "lightning_qat")
    ]
    for row in [*result["rows"], *result["analyses"]]:
        assert row["reason"] == ""
        assert row["seconds"] > 0
        assert math.isfinite(row["ratio"])
    assert [row["ratio"] for row in result["rows"] if row["variant"] == "float"] == [1.0, 1.0]
    assert len(result["analyses"]) == 12
    assert {aim["aim"] for aim in result["aims"]} == {"eager step", "eager memory"}
    assert all(aim["met"] is None for aim in result["aims"] if "memory" in aim["aim"])
    printed = capsys.readouterr().out
    assert "| ViT-S | lightning_qat |" in printed
    assert "| ResNet-50 | eager step | 1.4 |" in printed


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(900)
def test_whole_script(tmp_path: Path) -> None:
    """Every variant, compiled ones and torch.ao too, and the tests, which are all skipped or pass without a GPU."""
    output = tmp_path / "gpu.json"
    main([*CPU, "--limit", "800", "--output", str(output)])
    result = json.loads(output.read_text())
    assert {row["variant"] for row in result["rows"]} == set(VARIANTS)
    assert [row["reason"] for row in result["rows"]] == [""] * len(result["rows"])
    assert result["tests"]["passed"]


def test_without_a_gpu_it_says_what_to_write(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        main([])
    assert "--device cpu --size tiny" in capsys.readouterr().err
